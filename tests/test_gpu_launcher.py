"""The launcher of GPU kernels: from the C ABI through the driver's functions to the kernels, and all that can fail.

The driver is one of our own that runs kernels in Triton's interpreter (`gpu_interpreter`); no GPU is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_interpreter import (
    ROOT,
    FakeCuda,
    aligned_array,
    gpu_module,
    kernel_file,
    needs_compiler,
    needs_triton,
    run_program,
)
from gpu_memory import WatchedMemory
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_kernels

from edge.errors import BackendError, DeviceError, DeviceLostError, KernelError, MemoryBudgetError
from edge.gpu import Gpu, device_count

pytestmark = [needs_kernels, needs_triton, needs_compiler]

ILLEGAL_ADDRESS, INVALID_VALUE, LAUNCH_TIMEOUT, ECC = 700, 1, 702, 214


def probe() -> dict[str, Any]:
    """The kernels of this file's tests, by name."""
    return {variant.name: variant for variant in kernel_file(ROOT / "tests" / "gpu_probe_kernels.py").variants()}


@pytest.fixture
def cuda(tmp_path: Path) -> FakeCuda:
    return FakeCuda(tmp_path, chosen=list(probe().values()))


@pytest.fixture
def gpu(cuda: FakeCuda) -> Iterator[Gpu]:
    with cuda.open() as opened:
        yield opened


def launch_sum(gpu: Gpu, count: int = 100, stream: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel computes, and what it should."""
    x, y = np.linspace(-3, 3, count, dtype=np.float32), (np.arange(count) % 251 - 125).astype(np.int8)
    out = gpu.empty(count)
    grid = (-(-count // 64),)
    gpu.launch(
        "scaled_sum_64", grid, gpu.array(x), gpu.array(y), out, count, ctypes.c_int64(1 << 33), 0.5, stream=stream
    )
    return gpu.numpy(out, stream), x * np.float32(0.5) + y + np.float32(1 << 33)


# ------------------------------------------------------------------------------------------------------------ working


def test_arguments_of_every_type_reach_the_kernel_in_order(gpu: Gpu, cuda: FakeCuda):
    found, expected = launch_sum(gpu)
    np.testing.assert_array_equal(found, expected)
    assert cuda.launched == [("scaled_sum_64", (2, 1, 1))]


def test_facts_are_the_drivers(gpu: Gpu):
    facts = gpu.facts
    assert (facts.name, facts.sm, facts.kernel_sm, facts.multiprocessors) == ("Fake GPU 0", 87, 87, 16)
    assert facts.driver_version == "13.0" and facts.integrated
    assert facts.free_bytes == facts.memory_bytes == 1 << 40


def test_closing_gives_everything_back(cuda: FakeCuda):
    with cuda.open() as gpu:
        launch_sum(gpu)
        kept = gpu.empty(1000)
        gpu.workspace(5000)
        assert cuda["modules"] == 1 and cuda["contexts"] == 1 and cuda["blocks"] >= 2
    assert kept.pointer  # the array outlives its memory, and frees nothing twice
    assert [cuda[name] for name in ("blocks", "modules", "contexts", "streams", "events")] == [0] * 5


def test_memory_is_freed_with_the_last_array_that_uses_it(gpu: Gpu, cuda: FakeCuda):
    array = gpu.empty((4, 8))
    view = array.reshape(32)
    del array
    assert cuda["block_bytes"] == 128
    del view
    assert cuda["block_bytes"] == 0


def test_a_kernel_loads_at_its_first_use_and_only_once(gpu: Gpu, cuda: FakeCuda):
    assert cuda["modules"] == 0
    launch_sum(gpu)
    launch_sum(gpu)
    assert cuda["modules"] == 1
    gpu.load("racing")
    assert cuda["modules"] == 2
    gpu.load()
    assert cuda["modules"] == 3


@pytest.mark.parametrize(("shared_bytes", "wishes"), [(48 << 10, 0), ((48 << 10) + 16, 1)])
def test_a_kernel_with_much_shared_memory_wishes_for_it_in_place_of_the_l1(
    cuda: FakeCuda, shared_bytes: int, wishes: int
):
    from gpu_interpreter import gpu_module

    archive = gpu_module("archive")
    code = b"FAKECUBIN large - large\0"
    kernel = archive.ArchivedKernel("large", "large", "", 4, shared_bytes, 32, 0, code)
    (cuda.cubins / "sm_87.cubins").write_bytes(archive.archive_bytes(87, 12090, [kernel]))
    before = cuda["wishes"]
    with cuda.open() as gpu:
        gpu.load()
    assert cuda["wishes"] - before == wishes


def test_a_graph_repeats_what_was_recorded_with_the_memory_as_it_is_then(gpu: Gpu, cuda: FakeCuda):
    gpu.load()
    x, y, out = gpu.array(np.ones(8, np.float32)), gpu.array(np.zeros(8, np.int8)), gpu.array(np.zeros(8, np.float32))
    stream = gpu.make("stream")
    gpu.begin_graph(stream)
    gpu.launch("scaled_sum_64", (1,), x, y, out, 8, ctypes.c_int64(0), 2.0, stream=stream)
    graph = gpu.end_graph(stream)
    assert not gpu.numpy(out).any()
    gpu.write(x, np.full(8, 5, np.float32))
    gpu.run_graph(graph, stream)
    gpu.synchronize(stream)
    np.testing.assert_array_equal(gpu.numpy(out), np.full(8, 10, np.float32))
    gpu.destroy("graph", graph)
    gpu.destroy("stream", stream)
    assert cuda["graphs"] == cuda["streams"] == 0


def test_an_array_is_there_when_it_is_given_out(gpu: Gpu, cuda: FakeCuda):
    """A stream of one's own does not wait for the default stream, on which the values are sent."""
    waits = cuda["waits"]
    gpu.array(np.arange(5, dtype=np.float32))
    assert cuda["waits"] == waits + 1


@pytest.mark.parametrize("host_page_tables", [0, 1])
def test_host_memory_may_be_used_again_after_a_copy(cuda: FakeCuda, host_page_tables: int):
    """A device that reads the host's pages itself may do so later; then the copy is waited for."""
    cuda.set(host_page_tables=host_page_tables)
    with cuda.open() as gpu:
        stream, first, second = gpu.make("stream"), gpu.empty(4), gpu.empty(4)
        host = np.ones(4, np.float32)
        for target, source, pageable in (
            (first.pointer, host.ctypes.data, True),
            (host.ctypes.data, first.pointer, True),
            (second.pointer, first.pointer, False),
        ):
            waits = cuda["waits"]
            gpu.call("copy", target, source, 16, stream)
            assert cuda["waits"] - waits == (pageable and host_page_tables)
        gpu.begin_graph(stream)
        gpu.write(first, host, stream)  # cannot be waited for
        gpu.destroy("graph", gpu.end_graph(stream))
        gpu.destroy("stream", stream)
    cuda.set(host_page_tables=0)


def test_a_graph_may_have_branches_that_come_together_again(gpu: Gpu, cuda: FakeCuda):
    stream, other, event = gpu.make("stream"), gpu.make("stream"), gpu.make("event")
    first, second = gpu.array(np.zeros(3, np.uint8)), gpu.array(np.zeros(3, np.uint8))
    for joined in (False, True):
        gpu.begin_graph(stream)
        gpu.record(event, stream)
        gpu.wait(other, event)
        gpu.call("fill", first.pointer, 7, 3, stream)
        gpu.call("fill", second.pointer, 8, 3, other)
        if joined:
            gpu.record(event, other)
            gpu.wait(stream, event)
            graph = gpu.end_graph(stream)
        else:
            with pytest.raises(BackendError, match="recording a graph"):
                gpu.end_graph(stream)
    assert not gpu.numpy(first).any() and not gpu.numpy(second).any()
    gpu.run_graph(graph, stream)
    assert (gpu.numpy(first, stream) == 7).all() and (gpu.numpy(second, stream) == 8).all()
    for what, handle in (("graph", graph), ("event", event), ("stream", other), ("stream", stream)):
        gpu.destroy(what, handle)


def test_events_measure_time(gpu: Gpu):
    begin, end = gpu.make("event"), gpu.make("event")
    gpu.record(begin)
    gpu.record(end)
    assert gpu.elapsed_ms(begin, end) == 1.0
    gpu.destroy("event", begin)
    gpu.destroy("event", end)


def test_threads_may_launch_at_the_same_time(gpu: Gpu, cuda: FakeCuda):
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                found, expected = launch_sum(gpu, 70)
                np.testing.assert_array_equal(found, expected)
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert cuda["modules"] == 1 and cuda["launches"] == 30


# ------------------------------------------------------------------------------------------------- no GPU to be had


def refusal(cuda: FakeCuda, error: type[Exception], *, device: int = 0) -> str:
    """What opening a GPU says; nothing may stay behind."""
    with cuda.in_use(), pytest.raises(error) as caught:
        Gpu(device)
    assert cuda["contexts"] == cuda["modules"] == cuda["blocks"] == 0
    assert caught.value.hint
    return caught.value.message


def test_no_driver_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    for attempt in (device_count, Gpu):
        with pytest.raises(DeviceError, match="driver cannot be loaded") as caught:
            attempt()
        assert "--backend cpu" in caught.value.hint


def test_a_library_that_is_no_driver_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    subprocess.run(["gcc", "-shared", "-o", str(tmp_path / "other.so"), "-xc", "/dev/null"], check=True)
    monkeypatch.setenv("STREAMO_CUDA_DRIVER", str(tmp_path / "other.so"))
    with pytest.raises(DeviceError, match="too old: it has no function cuInit"):
        Gpu()


def test_a_driver_that_is_too_old_is_refused_with_both_versions(cuda: FakeCuda):
    cuda.set(driver=11040)
    assert "expected one for CUDA 12.0 or newer, found CUDA 11.4" in refusal(cuda, DeviceError)


def test_no_device_is_refused(cuda: FakeCuda):
    cuda.set(devices=0)
    assert refusal(cuda, DeviceError) == "The GPU driver shows no GPU"


def test_a_driver_that_does_not_start_is_refused_and_may_start_later(cuda: FakeCuda):
    cuda.set(init_error=803)
    assert "does not start: CUDA_ERROR_OF_THE_FAKE (803)" in refusal(cuda, DeviceError)
    cuda.set(init_error=0)
    with cuda.open() as gpu:
        launch_sum(gpu)


@pytest.mark.parametrize("device", [-1, 1, 1 << 30])
def test_a_device_that_is_not_there_is_refused(cuda: FakeCuda, device: int):
    assert f"no GPU number {device}: the driver shows 1" in refusal(cuda, DeviceError, device=device)


def test_devices_are_counted(cuda: FakeCuda):
    cuda.set(devices=3)
    with cuda.in_use():
        assert device_count() == 3


@pytest.mark.parametrize("sm", [75, 53, 90, 88, 101])
def test_a_generation_without_kernels_is_refused(cuda: FakeCuda, sm: int):
    cuda.set(sm=sm)
    message = refusal(cuda, DeviceError)
    assert f"no GPU kernels for compute capability {sm // 10}.{sm % 10}" in message and f"sm_{sm}.cubins" in message


def write_archives(cuda: FakeCuda, *sms: int, cuda_version: int = 12090) -> None:
    from gpu_interpreter import fake_archive

    for path in cuda.cubins.iterdir():
        path.unlink()
    for sm in sms:
        (cuda.cubins / f"sm_{sm}.cubins").write_bytes(fake_archive(sm, cuda_version, list(probe().values())))


@pytest.mark.parametrize(
    ("device", "archives", "chosen"),
    [
        (86, (80, 86, 87), 86),
        (89, (80, 86, 87), 86),  # code of a lower capability of the same generation
        (89, (80, 87), 80),
        (87, (80, 86), None),  # Orin's code is its own
        (88, (80, 87), 80),
        (80, (86, 89), None),  # nothing newer
        (90, (80, 89), None),  # nothing of another generation
        (121, (120,), None),  # from 90 on the compiler uses what only one capability has
        (103, (100, 103), 103),
    ],
)
def test_code_of_the_same_generation_serves_where_it_can(
    cuda: FakeCuda, device: int, archives: tuple[int, ...], chosen: int | None
):
    write_archives(cuda, *archives)
    cuda.set(sm=device)
    if chosen is None:
        refusal(cuda, DeviceError)
        return
    with cuda.open() as gpu:
        assert (gpu.facts.sm, gpu.facts.kernel_sm) == (device, chosen)


def test_kernels_of_a_newer_toolkit_than_the_driver_are_refused(cuda: FakeCuda):
    write_archives(cuda, 87, cuda_version=13040)
    cuda.set(driver=12060)
    assert "expected one for CUDA 13.0 or newer, found CUDA 12.6" in refusal(cuda, DeviceError)
    cuda.set(driver=13000)  # a minor version may be older


# -------------------------------------------------------------------------------------------------- damaged archives


def with_hash(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "does not start as an archive"),
    "other magic": (lambda data: b"STREAMOGPU2\0" + data[12:], "does not start as an archive"),
    "truncated": (lambda data: data[:-1], "checksum"),
    "half": (lambda data: data[: len(data) // 2], "checksum"),
    "one bit": (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "checksum"),
    "wrong hash": (lambda data: data[:-32] + bytes(32), "checksum"),
    "more behind": (lambda data: with_hash(data[:-32] + b"more"), "do not fill it exactly"),
    "cut, hashed again": (lambda data: with_hash(data[:-40]), "do not fill it|makes no sense"),
    "too many kernels": (
        lambda data: with_hash(data[:20] + struct.pack("<I", 0xFFFFFFFF) + data[24:-32]),
        "do not fill it|makes no sense",
    ),
    "no kernels": (lambda data: with_hash(data[:20] + bytes(4) + data[24:-32]), "do not fill it exactly"),
    "huge name": (lambda data: with_hash(data[:24] + b"\xff\xff" + data[26:-32]), "do not fill it|makes no sense"),
    "another generation": (
        lambda data: with_hash(data[:12] + struct.pack("<I", 90) + data[16:-32]),
        "another GPU generation",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_refused(cuda: FakeCuda, damage: str):
    change, said = DAMAGES[damage]
    path = cuda.cubins / "sm_87.cubins"
    path.write_bytes(change(path.read_bytes()))
    with cuda.in_use(), pytest.raises(DeviceError, match=said) as caught:
        Gpu()
    assert "`sm_87.cubins`" in caught.value.message


def kernel_entry(**changes: Any) -> bytes:
    archive = gpu_module("archive")
    fields = {"name": "a", "symbol": "a", "letters": "pi", "num_warps": 4, "shared_bytes": 0, "registers": 8}
    return archive.archive_bytes(
        87, 12090, [archive.ArchivedKernel(**{**fields, "spill_bytes": 0, "cubin": b"FAKECUBIN", **changes})]
    )


@pytest.mark.parametrize(
    "changes",
    [{"num_warps": 0}, {"num_warps": 3}, {"num_warps": 64}, {"letters": "px"}, {"letters": "p" * 65}, {"name": ""},
     {"name": "a\0b"}, {"symbol": ""}, {"cubin": b""}],
    ids=str,
)  # fmt: skip
def test_a_kernel_that_makes_no_sense_is_refused(cuda: FakeCuda, changes: dict[str, Any]):
    (cuda.cubins / "sm_87.cubins").write_bytes(kernel_entry(**changes))
    with cuda.in_use(), pytest.raises(DeviceError, match="makes no sense"):
        Gpu()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_archive_with_any_bytes_does_more_than_be_refused(data: st.DataObject):
    """Bytes are changed at random and hashed again, so that the reader behind the checksum meets them."""
    whole = bytearray(kernel_entry()[:-32] + kernel_entry()[24:-32])
    whole[20] = 2
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    content = with_hash(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    folder = _fuzz_driver.cubins
    (folder / "sm_87.cubins").write_bytes(content)
    with _fuzz_driver.in_use():
        try:
            Gpu().close()
        except DeviceError:
            pass


@pytest.fixture(autouse=True, scope="module")
def _fuzz(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _fuzz_driver
    _fuzz_driver = FakeCuda(tmp_path_factory.mktemp("fuzz"), chosen=list(probe().values()))


_fuzz_driver: FakeCuda


def test_a_folder_in_place_of_an_archive_is_refused(cuda: FakeCuda):
    path = cuda.cubins / "sm_87.cubins"
    path.unlink()
    path.mkdir()
    refusal(cuda, DeviceError)


def test_machine_code_that_the_driver_does_not_take_is_a_missing_kernel(gpu: Gpu, cuda: FakeCuda):
    cuda.set(load_error=209)
    with pytest.raises(DeviceError, match=r"`scaled_sum_64` does not load on this GPU: \w+ \(209\)"):
        launch_sum(gpu)
    cuda.set(load_error=0)
    launch_sum(gpu)  # the GPU is still usable


# --------------------------------------------------------------------------------------------------- wrong arguments


def test_a_kernel_that_is_not_there_is_named(gpu: Gpu):
    with pytest.raises(DeviceError, match=r"no GPU kernel `nothing` for compute capability 8\.7"):
        gpu.launch("nothing", (1,))


def test_arguments_of_other_types_are_refused_before_the_launch(gpu: Gpu, cuda: FakeCuda):
    array = gpu.empty(64)
    with pytest.raises(KernelError, match="`without_mask_64` takes the arguments pp, found pi"):
        gpu.launch("without_mask_64", (1,), array, 3)
    with pytest.raises(KernelError, match=r"takes the arguments pp, found p$"):
        gpu.launch("without_mask_64", (1,), array)
    assert cuda["launches"] == 0


def test_an_empty_grid_does_nothing_and_one_that_is_too_large_is_refused(gpu: Gpu, cuda: FakeCuda):
    array = gpu.empty(64)
    gpu.launch("without_mask_64", (0, 4), array, array)
    assert cuda["launches"] == 0
    with pytest.raises(BackendError, match=r"refused running the kernel `without_mask_64`: \w+ \(1\)"):
        gpu.launch("without_mask_64", (1, 65536), array, array)
    launch_sum(gpu)


def test_nonsense_is_refused_and_a_closed_gpu_says_so(gpu: Gpu):
    with pytest.raises(KernelError, match="at least 1 byte"):
        gpu.call("alloc", 0, ctypes.byref(ctypes.c_void_p()))
    for name, arguments in {"copy": (None, None, 8, None), "graph_launch": (None, None), "alloc": (8, None),
                            "event_elapsed": (None, None, None), "stream_create": (None,)}.items():  # fmt: skip
        with pytest.raises(KernelError, match="found NULL"):
            gpu.call(name, *arguments)
    gpu.close()
    with pytest.raises(KernelError, match="it was closed"):
        gpu.empty(3)


# ------------------------------------------------------------------------------------------------- while it is running


def test_too_little_memory_says_how_much_is_free_and_the_gpu_goes_on(gpu: Gpu, cuda: FakeCuda):
    cuda.set(memory=1000)
    held = gpu.empty(400, np.uint8)
    with pytest.raises(MemoryBudgetError, match="no memory for 601 bytes: 600 of 1000 bytes are free") as caught:
        gpu.empty(601, np.uint8)
    assert caught.value.exit_code == 5 and caught.value.hint
    assert gpu.empty(600, np.uint8).pointer and held.pointer


def test_the_nth_allocation_may_fail_and_leaves_nothing(gpu: Gpu, cuda: FakeCuda):
    cuda.set(alloc_fails_at=2)
    with pytest.raises(MemoryBudgetError):
        launch_sum(gpu)
    assert cuda["block_bytes"] <= 400
    found, expected = launch_sum(gpu)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, ECC])
@pytest.mark.parametrize("late", [0, 1])
def test_a_sticky_error_is_for_ever_and_the_device_is_not_touched_again(cuda: FakeCuda, code: int, late: int):
    cuda.set(launch_fails_at=2, launch_error=code, launch_is_late=late)
    with cuda.in_use():
        gpu = Gpu()
        launch_sum(gpu)
        other = Gpu()
        with pytest.raises(DeviceLostError, match=rf"unusable until .* failed while .*\({code}\)") as caught:
            launch_sum(gpu)
        assert caught.value.exit_code == 70 and "Restart" in caught.value.hint
        calls, begin = cuda["calls"], time.monotonic()
        attempts = [lambda: gpu.empty(8), gpu.synchronize, lambda: gpu.facts, lambda: other.empty(8), other.load, Gpu]
        for attempt in attempts:
            with pytest.raises(DeviceLostError, match=rf"unusable until .*\({code}\)"):
                attempt()
        gpu.close()
        other.close()
        assert cuda["calls"] == calls and time.monotonic() - begin < 1


def test_an_error_that_is_not_sticky_leaves_the_gpu_usable(gpu: Gpu, cuda: FakeCuda):
    cuda.set(launch_fails_at=1, launch_error=INVALID_VALUE)
    with pytest.raises(BackendError, match="refused running the kernel"):
        launch_sum(gpu)
    launch_sum(gpu)


def test_an_error_while_loading_may_be_sticky_too(cuda: FakeCuda):
    cuda.set(load_error=ILLEGAL_ADDRESS)
    with cuda.in_use(), Gpu() as gpu:
        with pytest.raises(DeviceLostError):
            launch_sum(gpu)
        with pytest.raises(DeviceLostError):
            gpu.synchronize()


def test_a_lost_device_ends_another_process_with_70(cuda: FakeCuda):
    code = (
        "import sys; from edge.gpu import Gpu; from edge.errors import EdgeError\n"
        "gpu = Gpu()\n"
        "try:\n    gpu.launch('without_mask_64', (1,), gpu.empty(64), gpu.empty(64))\n"
        "except EdgeError as error:\n    sys.exit(error.exit_code)\n"
    )
    with cuda.in_use():
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_CUDA": "launch_fails_at=1"}
        assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 70


# --------------------------------------------------------------------------------- what holds kernels to their arrays


def test_an_access_outside_its_array_is_found(cuda: FakeCuda):
    with cuda.in_use() as fake, Gpu() as gpu:
        gpu.launch("without_mask_64", (1,), gpu.empty(64), gpu.empty(64))
        with pytest.raises(DeviceLostError):
            gpu.launch("without_mask_64", (2,), gpu.empty(64), gpu.empty(100))
            gpu.synchronize()
        assert "reads 4 bytes at offset 256 of an array of 256 bytes" in str(fake.failures.pop())


def test_two_programs_that_write_the_same_place_are_found():
    x, out = aligned_array(np.ones(64, np.float32)), aligned_array(np.zeros(64, np.float32))
    memory = WatchedMemory("racing_64", [(array.ctypes.data, array.nbytes) for array in (x, out)])
    pointers = [x.ctypes.data, out.ctypes.data]
    run_program(probe()["racing_64"], (1,), pointers, memory)
    memory = WatchedMemory("racing_64", [(array.ctypes.data, array.nbytes) for array in (x, out)])
    with pytest.raises(AssertionError, match=r"program \(1, 0, 0\) writes memory that another program"):
        run_program(probe()["racing_64"], (2,), pointers, memory)


def test_a_pointer_that_is_not_aligned_is_found():
    x = aligned_array(np.ones(128, np.float32))
    with pytest.raises(AssertionError, match="not a multiple of 16"):
        run_program(probe()["without_mask_64"], (1,), [x.ctypes.data + 4, x.ctypes.data], None)


def test_fresh_memory_is_not_a_number(gpu: Gpu):
    assert np.isnan(gpu.numpy(gpu.empty(10))).all()
