"""What ONNX Runtime may repeat of decode steps: a number stands for launches that are the same to the last argument.

No graph is recorded here, for that takes a GPU. What is recorded on one are the launches of a run, so these are
compared: all that share a number have to be equal, wherever the window is.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, IdleCuda, needs_compiler, needs_triton
from kernel_cases import needs_kernels

from edge import StreamSession
from edge.backends.base import CacheView
from edge.backends.cuda import CudaBackend
from edge.backends.ort_session import OrtSession
from edge.backends.step_graphs import MOST_GRAPHS, NO_GRAPH, StepGraphs
from edge.bundle import Bundle
from edge.errors import BackendError
from edge.gpu import Gpu

pytestmark = [needs_kernels, needs_triton, needs_compiler]

FRAME = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCuda]:
    cuda = IdleCuda(tmp_path)
    with cuda.in_use():
        yield cuda


def run_empty(backend: CudaBackend, tokens: int) -> None:
    """Some tokens into an empty cache."""
    half = np.zeros((tokens, backend._manifest.decoder_facts.head_dim // 2), np.float32)
    view = CacheView(np.arange(tokens, dtype=np.int32), np.zeros((0, 3), np.int32), half[:1], half[:1])
    backend.run_decoder(backend.embeds_buffer(tokens)[0:tokens], half, half, view)


class Launches:
    """Every run of a decoder with its graph's number and its launches; pointers count if the driver gave them out."""

    def __init__(self, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_number: dict[int | None, list[list[Any]]] = defaultdict(list)
        self._cuda, self._now, self.last = cuda, [], None
        run_bound = OrtSession.run_bound

        def run(session: OrtSession, graph: int | None = None) -> None:
            self._now = []
            run_bound(session, graph)
            self.of_number[graph].append(self._now)
            self.last = graph

        monkeypatch.setattr(OrtSession, "run_bound", run)
        monkeypatch.setattr(cuda, "on_launch", self._note)

    def _note(self, name: str, grid: tuple[int, ...], values: list[Any]) -> None:
        known = [value if isinstance(value, float) or value < 2**31 or self._cuda.block_of(value) else None
                 for value in values]  # fmt: skip
        self._now.append((name, grid, known))

    def recorded(self) -> dict[int, list[list[Any]]]:
        return {number: runs for number, runs in self.of_number.items() if number and number > 0}


def test_runs_of_one_number_launch_the_same_while_a_window_slides_and_questions_come_and_go(
    demo_bundle: Bundle, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(fake, monkeypatch)
    backend = CudaBackend(demo_bundle, threads=1, on_host=True)
    session = StreamSession(demo_bundle, backend=backend, window_turns=3, max_reply_tokens=6)
    session.ask("What happens?")
    for t in range(12):
        if t == 5:
            session.ask("And now?")
        session.push(FRAME if t % 4 else np.concatenate([FRAME, FRAME]), t)
    recorded = launches.recorded()
    for number, runs in recorded.items():
        assert all(run == runs[0] for run in runs), number
    steps = sum(map(len, recorded.values()))
    assert steps > 40 and len(recorded) <= steps / 5  # else there was nothing to repeat
    assert all(runs for runs in launches.of_number[NO_GRAPH])


def test_another_cache_or_memory_that_moved_is_another_graph_and_a_turn_is_none(
    demo_bundle: Bundle, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(fake, monkeypatch)
    backend = CudaBackend(demo_bundle, threads=1, on_host=True)
    numbers = []

    def run(tokens: int) -> None:
        run_empty(backend, tokens)
        numbers.append(launches.last)

    backend.allocate_cache(600)
    for tokens in (500, 1, 1):
        run(tokens)
    patches = np.zeros((60 * 60, 3 * demo_bundle.manifest.preprocess.patch_size**2), np.float32)
    backend.encode(patches, 60, 60)  # takes more scratch memory, which the decoder's operators share
    run(1)
    backend.allocate_cache(580)
    run(1)
    assert numbers == [NO_GRAPH, 1, 1, 2, 3]
    assert all(run == runs[0] for runs in launches.recorded().values() for run in runs)


@pytest.mark.parametrize("turns", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_neither_side_takes_more_memory_the_longer_a_stream_runs(
    demo_bundle: Bundle, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(fake, "_run", lambda *_: None)
    backend = CudaBackend(demo_bundle, threads=1, on_host=True)
    session = StreamSession(demo_bundle, backend=backend, window_turns=20, max_reply_tokens=4)
    session.ask("What happens?")
    for t in range(turns):
        session.push(FRAME, t)
        if t == turns // 2:
            before = held(fake, backend)
    after = held(fake, backend)
    assert after[:3] == before[:3]
    assert after[3] - before[3] < 2 << 20


def held(fake: FakeCuda, backend: CudaBackend) -> tuple[int, int, int, int]:
    """Blocks of the device's memory and their bytes, graphs, and bytes of this process that are resident."""
    resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
    assert backend._graphs is not None
    return fake["blocks"], fake["block_bytes"], len(backend._graphs._numbers), resident


def test_there_are_so_many_graphs_and_no_more() -> None:
    graphs = StepGraphs()
    numbers = [graphs.number(key) for key in range(MOST_GRAPHS + 3)]
    assert sorted(numbers[:MOST_GRAPHS]) == list(range(1, MOST_GRAPHS + 1))
    assert numbers[MOST_GRAPHS:] == [NO_GRAPH] * 3
    assert graphs.number(5) == numbers[5]


class RecordingRuntime(SimpleNamespace):
    """The part of onnxruntime-gpu's module that the backend uses, on no device.

    Attributes:
      refuses: what fails: making a session that records, a recording, a later one, every run, or what is repeated, by
        being something else; "": nothing.
      made: of each session whether it is the decoder's, and whether it records.
      runs: how many sessions there were, and the graph's number, of each run.
    """

    __version__ = "1.31.1"

    class SessionOptions:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

    class RunOptions:
        def add_run_config_entry(self, name: str, value: str) -> None:
            assert name == "gpu_graph_id"
            self.number = int(value)

    @staticmethod
    def get_available_providers() -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, path: str, options: Any, providers: Any, enable_fallback: int) -> Any:
        records = providers[0][1].get("enable_cuda_graph") == "1"
        self.made.append(("decoder" in path, records))
        if records and self.refuses == "session":
            raise RuntimeError("not all nodes are on the CUDA provider")

        def run(binding: Any, run_options: Any) -> None:
            number = NO_GRAPH if run_options is None else run_options.number
            self.runs.append((len(self.made), None if run_options is None else number))
            if number > {"run": 0, "later": 1, "every run": NO_GRAPH - 1}.get(self.refuses, number):
                with Gpu() as gpu:
                    gpu.begin_graph(int(providers[0][1]["user_compute_stream"]))
                raise RuntimeError("operation not permitted when stream is capturing")
            outputs["logits"][:] = 2 if number > 0 and self.refuses == "nothing, but repeats something else" else 1

        inputs = [SimpleNamespace(name=name) for name in ("inputs_embeds",)]
        outputs: dict[str, np.ndarray] = {}

        def bind_output(name: str, device: str, ordinal: int, dtype: Any, shape: list[int], pointer: int) -> None:
            memory = (ctypes.c_char * (int(np.prod(shape)) * np.dtype(dtype).itemsize)).from_address(pointer)
            outputs[name] = np.frombuffer(memory, dtype)

        binding = SimpleNamespace(bind_input=lambda *_: None, bind_output=bind_output)
        return SimpleNamespace(
            get_providers=lambda: ["CUDAExecutionProvider"],
            get_inputs=lambda: inputs,
            get_outputs=lambda: [],
            io_binding=lambda: binding,
            run_with_iobinding=run,
        )


@pytest.fixture
def runtime(tmp_path: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> RecordingRuntime:
    made = RecordingRuntime(__file__=str(tmp_path / "none" / "__init__.py"), refuses="", made=[], runs=[])
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    return made


def test_a_step_is_launched_recorded_and_repeated_before_a_stream_begins(
    demo_bundle: Bundle, runtime: RecordingRuntime
) -> None:
    backend = CudaBackend(demo_bundle)
    assert runtime.made == [(False, False), (True, True)]
    assert [number for _, number in runtime.runs] == [NO_GRAPH, NO_GRAPH, 1, 1]
    assert backend.notices == []


def test_a_recording_that_fails_in_a_stream_costs_nothing_but_speed(
    demo_bundle: Bundle, runtime: RecordingRuntime
) -> None:
    runtime.refuses = "later"
    backend = CudaBackend(demo_bundle)
    assert not backend.notices
    backend.allocate_cache(10)  # another cache, another graph
    before = len(runtime.runs)
    for _ in range(2):
        run_empty(backend, 1)
    assert [number for _, number in runtime.runs[before:]] == [2, NO_GRAPH, NO_GRAPH]
    backend.gpu.begin_graph(backend._stream)  # nothing is being recorded
    backend.gpu.destroy("graph", backend.gpu.end_graph(backend._stream))
    runtime.refuses, before = "every run", len(runtime.runs)
    with pytest.raises(BackendError):
        run_empty(backend, 1)
    assert len(runtime.runs) == before + 1  # what was not being recorded is not done again


@pytest.mark.parametrize("refuses", ["session", "run", "nothing, but repeats something else"])
def test_where_steps_cannot_be_recorded_each_is_launched_anew_and_that_is_said(
    demo_bundle: Bundle, runtime: RecordingRuntime, refuses: str
) -> None:
    runtime.refuses = refuses
    backend = CudaBackend(demo_bundle)
    assert runtime.made[-2:] == [(False, False), (True, False)]
    assert len(backend.notices) == 1 and "does not record decode steps" in backend.notices[0]
    before = len(runtime.runs)
    backend.allocate_cache(10)
    run_empty(backend, 1)
    assert [number for _, number in runtime.runs[before:]] == [None]
    backend.gpu.begin_graph(backend._stream)  # it would be refused if something were still being recorded
