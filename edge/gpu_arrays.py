"""Arrays in a GPU's memory: what of ours and of other libraries can be handed to a kernel without a copy.

Owns the reading of DLPack and of the CUDA array interface. Knows no kernel and never touches the memory.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge.errors import KernelError


@dataclass(frozen=True)
class DeviceArray:
    """An array in device memory.

    Attributes:
      pointer: device address of the first element. shape: sizes. dtype: of the elements.
      strides: bytes from one element to the next along each axis, as numpy says it.
      owner: whatever keeps the memory alive.
      device: number of its GPU, where its library says it; None: unknown.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    owner: Any = field(default=None, repr=False, compare=False)
    device: int | None = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other."""
        wanted = contiguous_strides(self.shape, self.dtype)
        return all(size <= 1 or have == want for size, have, want in zip(self.shape, self.strides, wanted, strict=True))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": self.strides,
            "version": 3,
        }

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape; only of a contiguous array."""
        if not self.is_contiguous or np.prod(shape, dtype=np.int64) != np.prod(self.shape, dtype=np.int64):
            raise KernelError(f"device array: shape {self.shape} with strides {self.strides} cannot become {shape}")
        return DeviceArray(self.pointer, shape, self.dtype, contiguous_strides(shape, self.dtype), self.owner)


def contiguous_strides(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Strides of an array whose elements lie one behind the other, last axis first."""
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def device_array(value: Any, name: str = "array") -> DeviceArray:
    """Another library's device array, seen as ours; nothing is copied, and `value` is kept alive.

    Args:
      value: a DeviceArray, or an object with `__cuda_array_interface__` or `__dlpack__`. Its contents must be ready:
        the stream that wrote them must have been waited for.
      name: of the argument, for errors.

    Raises:
      KernelError: it is none of these, or its memory is not a GPU's.
    """
    if isinstance(value, DeviceArray):
        return value
    interface = getattr(value, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_interface(interface, value, name)
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _from_dlpack(value, name)
    raise KernelError(
        f"{name}: expected an array on a GPU (DLPack or the CUDA array interface), found {type(value).__name__}"
    )


def device_pointer(value: Any, name: str = "array") -> int:
    """The device address of a contiguous device array, or of an integer that is one already; 0 for None."""
    if value is None:
        return 0
    if isinstance(value, int):
        return value
    array = device_array(value, name)
    if not array.is_contiguous:
        raise KernelError(f"{name}: expected a contiguous array, found strides {array.strides} of shape {array.shape}")
    return array.pointer


def _from_interface(interface: dict[str, Any], owner: Any, name: str) -> DeviceArray:
    try:
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        pointer = int(interface["data"][0] or 0)
        strides = interface.get("strides")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise KernelError(f"{name}: its CUDA array interface makes no sense: {error}") from None
    if interface.get("mask") is not None:
        raise KernelError(f"{name}: expected an array without a mask")
    strides = contiguous_strides(shape, dtype) if strides is None else tuple(int(step) for step in strides)
    return DeviceArray(pointer, shape, dtype, strides, owner)


# DLPack's C structs, as its specification gives them.
_CUDA, _CUDA_MANAGED = 2, 13
_KINDS = {0: "i", 1: "u", 2: "f"}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(value: Any, name: str) -> DeviceArray:
    kind, number = value.__dlpack_device__()
    if int(kind) not in (_CUDA, _CUDA_MANAGED):
        raise KernelError(f"{name}: expected memory of a GPU, found DLPack device type {int(kind)}")
    capsule = value.__dlpack__()
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    # The capsule stays as it is and frees itself; the tensor stays alive with `value`.
    tensor = _Tensor.from_address(pointer_of(capsule, b"dltensor"))
    if tensor.code not in _KINDS or tensor.lanes != 1 or tensor.bits % 8:
        raise KernelError(f"{name}: DLPack type {tensor.code} of {tensor.bits} bits is not supported")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    else:
        strides = contiguous_strides(shape, dtype)
    device = int(number) if int(kind) == _CUDA else None  # managed memory is everywhere
    return DeviceArray((tensor.data or 0) + tensor.byte_offset, shape, dtype, strides, value, device)
