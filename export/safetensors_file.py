"""One safetensors file: which tensors it holds, and their rows, read on demand.

Owns the file format and nothing else. Reads with plain file reads rather than a memory map, so that what has been read
counts as memory only while it is held.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from edge.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
STORAGE: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file. `dtype` is safetensors' name for it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * STORAGE[self.dtype].itemsize


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of a safetensors file.

    Raises:
      CheckpointError: not a safetensors file, cut short, or of a dtype that is not a float; names the file.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes < 2 or header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > size:
            raise _broken(path, f"its header should be {header_bytes} bytes long, the file has {size} bytes")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    entries = {name: _entry(path, name, fields, start, size) for name, fields in header.items()}
    end = max((entry.offset + entry.bytes for entry in entries.values()), default=start)
    if end != size:
        raise _broken(path, f"its tensors end at byte {end}, the file has {size} bytes")
    return entries


def _entry(path: Path, name: str, fields: object, start: int, size: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(int(n) for n in fields["shape"])  # type: ignore[index]
        begin, end = (int(n) for n in fields["data_offsets"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _broken(path, f"the entry of tensor `{name}` is malformed") from None
    if dtype not in STORAGE:
        raise CheckpointError(
            f"Tensor `{name}` in `{path.name}` has dtype {dtype}, expected one of {', '.join(STORAGE)}",
            hint="Save the checkpoint in bfloat16, float16 or float32; quantised checkpoints cannot be exported",
        )
    entry = TensorEntry(path, name, dtype, shape, start + begin)
    if begin < 0 or min(shape, default=0) < 0 or end - begin != entry.bytes:
        what = f"tensor `{name}` of shape {list(shape)} should take {entry.bytes} bytes, found {end - begin}"
        raise _broken(path, what)
    if start + end > size:
        raise _broken(path, f"tensor `{name}` should end at byte {start + end}, the file has {size} bytes")
    return entry


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file for reading, unbuffered; what the system refuses is the checkpoint's fault, not the bundle's."""
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {error.strerror or error}", hint="Check the file's permissions and its disk"
        ) from None


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{path.name}` is not a whole safetensors file: {what}",
        hint="The copy is incomplete; copy the checkpoint again",
    )


def read_raw(entry: TensorEntry, first: int = 0, last: int | None = None) -> np.ndarray:
    """Rows `first` to `last` of a tensor as stored, shape (rows, ...); bfloat16 arrives as uint16 bit patterns."""
    rows = entry.shape[0] if entry.shape else 1
    last = rows if last is None else last
    width = math.prod(entry.shape[1:])
    array = np.empty((last - first, *entry.shape[1:]), STORAGE[entry.dtype])
    view = array.reshape(-1).view(np.uint8).data
    position = entry.offset + first * width * array.itemsize
    with _opened(entry.path) as file:
        done = 0
        while done < len(view):
            read = os.preadv(file.fileno(), [view[done:]], position + done)
            if read == 0:
                raise _broken(entry.path, f"tensor `{entry.name}` ends {len(view) - done} bytes early")
            done += read
    return array


def to_float32(raw: np.ndarray, entry: TensorEntry) -> np.ndarray:
    """Values of a raw array as float32, exactly.

    Raises:
      CheckpointError: a value is infinite or not a number; names the tensor.
    """
    if entry.dtype == "BF16":
        values = raw.astype(np.uint32)
        values <<= 16
        values = values.view(np.float32)
    else:
        values = raw.astype(np.float32)
    require_finite(values, f"Tensor `{entry.name}`")
    return values


def require_finite(values: np.ndarray, subject: str) -> None:
    """Refuse values (float32) that are infinite or not a number.

    Raises:
      CheckpointError: `subject` holds so many of them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(values.sum())
    if suspicious and not np.isfinite(values).all():
        count = int(values.size - np.isfinite(values).sum())
        raise CheckpointError(
            f"{subject} holds {count} values that are infinite or not a number",
            hint="Training diverged or the file is damaged; take an earlier checkpoint",
        )
