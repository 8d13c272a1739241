"""An engine on disk: what it was made from and for, in front of TensorRT's bytes, and whether it may be loaded here.

Owns the file's format, the lock that one builder at a time holds, and the rename that makes a file appear whole.
TensorRT itself ends the process, or worse, on an engine of another version; so nothing is given to it unread.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge.errors import EngineError, OutputError

MAGIC = b"STREAMO-ENGINE-1\n"
LENGTH_BYTES = 4
MOST_HEADER_BYTES = 1 << 20
PARTIAL = ".partial"
LABELS = {
    "component": "for the {}",
    "sources_sha256": "from files with hash {:.12}",
    "tensorrt": "with TensorRT {}",
    "sm": "for SM {}",
    "device": "on {}",
    "plugin_sha256": "with a plugin with hash {:.12}",
    "profiles_sha256": "for sizes with hash {:.12}",
}


class DamagedEngineError(EngineError):
    """An engine's file is not what was written; building it again helps."""


@dataclass(frozen=True)
class EngineKey:
    """What an engine depends on. Another value anywhere, and it has to be built again.

    Attributes:
      component: vision or decoder.
      sources_sha256: of the graph and its weights.
      tensorrt: version of TensorRT.
      sm: the GPU's compute capability, 87 for 8.7.
      device: the GPU's name; TensorRT tunes for one model.
      plugin_sha256: of the plugin library.
      profiles_sha256: of the sizes it is built for, and of the builder's options.
    """

    component: str
    sources_sha256: str
    tensorrt: str
    sm: int
    device: str
    plugin_sha256: str
    profiles_sha256: str

    def difference(self, found: EngineKey) -> str | None:
        """What an engine with key `found` was built for instead, in words; None if it is the same."""
        for field in fields(self):
            own, other = getattr(self, field.name), getattr(found, field.name)
            if own != other:
                label = LABELS[field.name]
                return f"it was built {label.format(other)}, expected {label.format(own)}"
        return None


def write_engine(path: Path, key: EngineKey, plan: Any) -> int:
    """Write an engine under a temporary name and rename it.

    Args:
      plan: TensorRT's serialised engine, anything with the buffer protocol.

    Returns:
      The file's size.

    Raises:
      OutputError: it cannot be written.
    """
    content = memoryview(plan).cast("B")
    header = {"key": asdict(key), "engine_bytes": len(content), "engine_sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(header, sort_keys=True).encode()
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            for part in (MAGIC, len(text).to_bytes(LENGTH_BYTES, "little"), text, content):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"Engine `{path}` cannot be written: {error.strerror}",
            hint="Free some space, or choose another folder with `--engines`",
        ) from None
    return size


def unusable(path: Path, key: EngineKey, *, whole: bool = False) -> str | None:
    """Why the engine at `path` cannot be used for `key`; None if it can, or without `whole` seems to.

    Args:
      whole: read all of it, which may be gigabytes.
    """
    try:
        if whole:
            with opened_engine(path, key):
                return None
        _read_header(path, key)
    except EngineError as error:
        return error.message
    return None


@contextmanager
def opened_engine(path: Path, key: EngineKey) -> Iterator[memoryview]:
    """TensorRT's bytes, once everything about the file has been checked.

    Raises:
      EngineError: it is missing or built for something else. DamagedEngineError: it is damaged.
    """
    header, start = _read_header(path, key)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        with memoryview(content) as whole, whole[start:] as plan:
            found = hashlib.sha256(plan).hexdigest()
            if found != header["engine_sha256"]:
                raise _damaged(path, f"sha256 {header['engine_sha256']:.12}, found {found:.12}")
            yield plan


def _read_header(path: Path, key: EngineKey) -> tuple[dict[str, Any], int]:
    """The header, and where the engine starts."""
    prefix = len(MAGIC) + LENGTH_BYTES
    try:
        with path.open("rb") as file:
            begin = file.read(prefix)
            length = int.from_bytes(begin[len(MAGIC) :], "little")
            if len(begin) < prefix or not begin.startswith(MAGIC) or length > MOST_HEADER_BYTES:
                raise _damaged(path, f"that it starts with {MAGIC.decode().strip()}")
            text = file.read(length)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise EngineError(f"Engine `{path}` is not there", hint="Run `streamo-edge build BUNDLE`") from None
    except OSError as error:
        raise EngineError(f"Engine `{path}` cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        found = EngineKey(**header["key"])
        expected = prefix + length + header["engine_bytes"]
        str.__len__(header["engine_sha256"])
    except (ValueError, KeyError, TypeError):
        raise _damaged(path, "a header that says what it was built for") from None
    if size != expected:
        raise _damaged(path, f"{expected} bytes, found {size}")
    if difference := key.difference(found):
        raise EngineError(f"Engine `{path.name}` cannot be used: {difference}", hint="Run `streamo-edge build BUNDLE`")
    return header, prefix + length


def _damaged(path: Path, expected: str) -> DamagedEngineError:
    return DamagedEngineError(
        f"Engine `{path.name}` is damaged: expected {expected}", hint="Run `streamo-edge build BUNDLE`"
    )


@contextmanager
def only_builder(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of the engine at `path`; whoever comes second waits. The lock of a killed process is free.

    What a killed builder has left behind is removed.

    Raises:
      OutputError: the folder cannot be written to.
    """
    import fcntl

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("a")
    except OSError as error:
        raise OutputError(
            f"Engines cannot be kept in `{path.parent}`: {error.strerror}", hint="Choose another with `--engines`"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):
            left.unlink(missing_ok=True)
        yield
