"""Contestants that live in processes of their own: started, asked for one measurement after the other, ended.

Owns the processes and the pipes. What they answer: see `apps.bench.model_worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.bench.timing import SelfTimed
from edge.errors import EdgeError, UsageError

ROOT = Path(__file__).resolve().parent.parent.parent


class Worker:
    """A process that measures on request. Use as a context manager.

    Args:
      command: what to run; it is given the folder that holds our packages as PYTHONPATH.

    Raises:
      UsageError: it cannot be started, or ends before it is ready.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        try:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"`{command[0]}` cannot be started: {error.strerror}") from None
        self.version = str(self._answer()["ready"])

    def measure(self, request: Mapping[str, int]) -> float:
        """Microseconds of one request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None
        return float(self._answer()["ms"]) * 1e3

    def contestant(self, request: Mapping[str, int], calls: int = 1) -> SelfTimed:
        """For `timing.interleave`: `calls` calls of one kind, which one request asks for."""
        return SelfTimed(lambda: self.measure(request), calls)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        return dict(json.loads(line))

    def _gone(self) -> EdgeError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return UsageError(f"The benchmark's process for {self.name} ended with code {code}: {said[-1] if said else ''}")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def bundle_command(bundle: Path, threads: int, capacity: int, *, stock: bool = False) -> list[str]:
    """Command of a worker with a bundle's graphs, the native or the stock ones."""
    options = ["--threads", str(threads), "--capacity", str(capacity), *["--stock"] * stock]
    return [sys.executable, "-m", "apps.bench.model_worker", str(bundle), *options]
