"""Frames in a GPU's memory: which are taken, as what, and what is said of the others. Nobody reads the memory here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import FRAME, reply_ids, scripted_bundle

import edge
from edge.backends.fake import ScriptedBackend
from edge.device_frames import FrameOnDevice
from edge.errors import FrameError
from edge.frames import check_frame
from edge.gpu_arrays import DeviceArray, contiguous_strides


def plane(*shape: int, strides: tuple[int, ...] | None = None, dtype: Any = np.uint8, pointer: int = 4096) -> Any:
    """An array that says it is on a GPU."""
    kind = np.dtype(dtype)
    return DeviceArray(pointer, shape, kind, strides or contiguous_strides(shape, kind))


def test_an_rgb_frame_is_taken_as_it_lies() -> None:
    found = check_frame(plane(30, 40, 3, strides=(256, 3, 1)))
    assert isinstance(found, FrameOnDevice) and found.chroma is None
    assert found.shape == (30, 40, 3) and found.plane.strides == (256, 3, 1)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (plane(30, 40), r"RGB of shape \(height, width, 3\), found \(30, 40\)"),
        (plane(30, 40, 3, dtype=np.float32), "uint8, found float32"),
        (plane(30, 40, 3, strides=(1, 30, 1200)), r"rows in one piece, one below the other; found strides \(1, 30"),
        (plane(30, 40, 3, strides=(-120, 3, 1)), r"rows in one piece, one below the other; found strides \(-120"),
        (plane(30, 40, 3, pointer=0), "its address is null"),
    ],
)  # fmt: skip
def test_a_frame_that_cannot_be_read_is_refused_with_what_it_is(frame: Any, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        check_frame(frame)


def test_a_backend_without_a_gpu_refuses_frames_on_one_and_goes_on(tmp_path: Path) -> None:
    bundle, frame = scripted_bundle(tmp_path), plane(28, 28, 3)
    backend = ScriptedBackend(bundle.manifest, [reply_ids(bundle, "</Silence>")])
    session = edge.StreamSession(bundle, backend=backend)
    with pytest.raises(FrameError, match="in the host's memory for this backend, found one on a GPU") as caught:
        session.push(frame, 0)
    assert "cuda or tensorrt" in str(caught.value.hint)
    session.push(FRAME, 0)
