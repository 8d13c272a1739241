"""Python says of the GPU part of the C interface what the header says, and reads device arrays as they are."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import gpu_abi, kernels_abi
from edge.errors import BackendError, KernelError
from edge.gpu_arrays import DeviceArray, contiguous_strides, device_array, device_pointer

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "kernels" / "include"
HEADERS = [INCLUDE / "streamo_gpu.h", INCLUDE / "streamo_onnxruntime.h"]
STRUCTS = {
    "streamo_gpu_facts": gpu_abi.GpuFacts,
    "streamo_gpu_norm": gpu_abi.NormArguments,
    "streamo_gpu_sample": gpu_abi.SampleArguments,
    "streamo_gpu_frame": gpu_abi.FrameArguments,
}
STATUSES = "BAD_ARGUMENT UNSUPPORTED OUT_OF_MEMORY NO_DEVICE NO_KERNEL DEVICE_LOST DEVICE_ERROR".split()

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@needs_gcc
def test_the_headers_are_plain_c(tmp_path: Path):
    source = tmp_path / "one.c"
    includes = "".join(f'#include "{header.name}"\n' for header in HEADERS)
    source.write_text(f"{includes}int lost(void) {{ return STREAMO_DEVICE_LOST; }}\n")
    flags = ["-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    subprocess.run(["gcc", *flags, "-c", str(source), "-o", str(tmp_path / "one.o")], check=True)


def test_the_binding_has_every_function_of_the_headers():
    text = "".join(header.read_text(encoding="utf-8") for header in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    declared = dict(re.findall(r"STREAMO_API [^;(]*?(streamo_\w+)\(([^;]*)\);", text))
    assert set(gpu_abi._SIGNATURES) == set(declared)
    for name, arguments in gpu_abi._SIGNATURES.items():
        assert len(arguments) == declared[name].count(",") + 1, name


@needs_gcc
def test_the_bindings_structs_and_statuses_lie_as_in_c(tmp_path: Path):
    lines, expected = [], []
    for name, struct in STRUCTS.items():
        for field, *_ in struct._fields_:
            lines.append(f'printf("%d ", (int)offsetof({name}, {field}));')
            expected.append(getattr(struct, field).offset)
        lines.append(f'printf("%d ", (int)sizeof({name}));')
        expected.append(ctypes.sizeof(struct))
    for status in (
        "BAD_ARGUMENT",
        "UNSUPPORTED",
        "OUT_OF_MEMORY",
        "NO_DEVICE",
        "NO_KERNEL",
        "DEVICE_LOST",
        "DEVICE_ERROR",
    ):
        lines.append(f'printf("%d ", (int)STREAMO_{status});')
        expected.append(getattr(gpu_abi, status))
    source = tmp_path / "layout.c"
    source.write_text('#include <stdio.h>\n#include "streamo_gpu.h"\nint main(void) {' + "\n".join(lines) + "}")
    subprocess.run(["gcc", f"-I{INCLUDE}", str(source), "-o", str(tmp_path / "layout")], check=True)
    printed = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout
    assert [int(number) for number in printed.split()] == expected


def test_a_function_that_the_library_lacks_is_named_when_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels_abi, "load_library", types.SimpleNamespace)
    library = gpu_abi.load_library.__wrapped__()
    with pytest.raises(BackendError, match="no function `streamo_gpu_frame_run`") as caught:
        library.streamo_gpu_frame_run(None)
    assert caught.value.hint == "Install streamo-edge again"


# --------------------------------------------------------------------------------------- other libraries' device arrays


class WithInterface:
    """An array as CuPy, Numba and PyTorch show one."""

    def __init__(self, **interface: Any) -> None:
        default = {"shape": (4, 6), "typestr": "<f4", "data": (4096, False), "version": 3}
        self.__cuda_array_interface__ = {**default, **interface}


class WithDLPack:
    """A numpy array that says it is on a GPU: its DLPack struct, with another device."""

    def __init__(self, array: np.ndarray, device: int = 2) -> None:
        self.array, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **_: Any) -> Any:
        return self.array.__dlpack__()


def test_the_cuda_array_interface_is_taken_with_and_without_strides():
    whole = device_array(WithInterface())
    assert (whole.pointer, whole.shape, whole.dtype, whole.strides) == (4096, (4, 6), np.float32, (24, 4))
    apart = device_array(WithInterface(strides=(64, 4), typestr="|u1", stream=None))
    assert apart.strides == (64, 4) and apart.dtype == np.uint8 and not apart.is_contiguous


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.float16, np.float32])
@pytest.mark.parametrize("device", [2, 13])
def test_dlpack_is_taken_without_a_copy(dtype: Any, device: int):
    array = np.arange(60).astype(dtype).reshape(3, 4, 5)[:, 1:]
    found = device_array(WithDLPack(array, device))
    assert (found.pointer, found.shape, found.dtype) == (array.ctypes.data, array.shape, array.dtype)
    assert found.strides == array.strides and found.device == (0 if device == 2 else None)


def test_torch_tensors_are_read_as_they_are():
    torch = pytest.importorskip("torch")

    class OnDevice(WithDLPack):
        def __dlpack__(self, **_: Any) -> Any:
            return self.array.__dlpack__()

    tensor = torch.arange(24, dtype=torch.float16).reshape(4, 6)[1:, :3]
    found = device_array(OnDevice(tensor))
    assert (found.pointer, found.shape, found.strides) == (tensor.data_ptr(), (3, 3), (12, 2))


def test_an_array_keeps_what_it_shows_alive():
    import gc
    import weakref

    owner = WithDLPack(np.zeros(4, np.float32))
    alive = weakref.ref(owner)
    found = device_array(owner)
    del owner
    gc.collect()
    assert alive() is found.owner is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: np.zeros(3), "memory of a GPU, found DLPack device type 1"),
        (lambda: WithDLPack(np.zeros(3), 3), "memory of a GPU, found DLPack device type 3"),
        (lambda: WithDLPack(np.zeros(3, np.complex64)), "DLPack type 5 of 64 bits is not supported"),
        (lambda: [1, 2], "expected an array on a GPU .* found list"),
        (lambda: WithInterface(typestr="<q9"), "makes no sense"),
        (lambda: WithInterface(data=None), "makes no sense"),
        (lambda: WithInterface(mask=WithInterface()), "without a mask"),
    ],
    ids=["numpy", "pinned", "complex", "list", "type", "data", "mask"],
)
def test_what_is_no_device_array_is_refused_by_name(make: Callable[[], Any], said: str):
    with pytest.raises(KernelError, match=f"frame: .*{said}"):
        device_array(make(), "frame")


def test_pointers_are_of_contiguous_arrays_only():
    assert device_pointer(None) == 0 and device_pointer(4096) == 4096 and device_pointer(WithInterface()) == 4096
    with pytest.raises(KernelError, match="expected a contiguous array, found strides"):
        device_pointer(WithInterface(strides=(64, 4)))
    assert device_pointer(WithInterface(shape=(1, 6), strides=(64, 4))) == 4096  # one row lies as it likes


def test_device_arrays_show_themselves_to_others():
    array = DeviceArray(4096, (2, 3), np.dtype(np.int8), (3, 1))
    again = device_array(WithInterface(**array.__cuda_array_interface__))
    assert again == array and array.nbytes == 6 and array.reshape(6).strides == (1,)
    with pytest.raises(KernelError, match="cannot become"):
        array.reshape(7)
    assert contiguous_strides((), np.dtype(np.int8)) == ()
