"""Frames in a GPU's memory: which are taken, as what, and what is said of the others. Nobody reads the memory here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted import FRAME, reply_ids, scripted_bundle

import edge
from edge.backends.fake import ScriptedBackend
from edge.device_frames import FrameOnDevice, Nv12Frame
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


@pytest.mark.parametrize("luma", [plane(30, 40, strides=(64, 1)), plane(30, 40, 1, strides=(64, 1, 1))])
@pytest.mark.parametrize("chroma", [plane(15, 20, 2, strides=(64, 2, 1)), plane(15, 40, strides=(64, 1))])
def test_an_nv12_frame_is_taken_with_its_planes_in_the_usual_forms(luma: Any, chroma: Any) -> None:
    found = check_frame(Nv12Frame(luma, chroma, bt709=True))
    assert isinstance(found, FrameOnDevice) and found.chroma is not None
    assert found.shape == (30, 40, 3)
    assert (found.plane.shape, found.plane.strides) == ((30, 40), (64, 1))
    assert (found.chroma.shape, found.chroma.strides) == ((15, 20, 2), (64, 2, 1))
    assert (found.full_range, found.bt709) == (False, True)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (plane(30, 40), r"RGB of shape \(height, width, 3\), found \(30, 40\)"),
        (plane(30, 40, 3, dtype=np.float32), "uint8, found float32"),
        (plane(30, 40, 3, strides=(1, 30, 1200)), r"rows in one piece, one below the other; found strides \(1, 30"),
        (plane(30, 40, 3, strides=(-120, 3, 1)), r"rows in one piece, one below the other; found strides \(-120"),
        (plane(30, 40, 3, pointer=0), "its address is null"),
        (Nv12Frame(plane(30, 40), plane(14, 20, 2)), r"found uint8 \(30, 40\) and uint8 \(14, 20, 2\)"),
        (Nv12Frame(plane(31, 40), plane(15, 20, 2)), r"even sides .* found uint8 \(31, 40\)"),
        (Nv12Frame(plane(0, 40), plane(0, 20, 2)), r"even sides .* found uint8 \(0, 40\)"),
        (Nv12Frame(plane(30, 40, 3), plane(15, 20, 2)), r"found uint8 \(30, 40, 3\)"),
        (Nv12Frame(plane(30, 40), plane(15, 20, 2, dtype=np.int8)), r"and int8 \(15, 20, 2\)"),
        (Nv12Frame(plane(30, 40), plane(15, 20, 2, strides=(40, 1, 20))), "chroma plane on a GPU .* strides"),
        (Nv12Frame(plane(30, 40), None), "chroma plane: expected an array on a GPU .* found NoneType"),
        (Nv12Frame(np.zeros((30, 40), np.uint8), plane(15, 20, 2)), "luma plane .* on a GPU, found an array of numpy"),
    ],
)  # fmt: skip
def test_a_frame_that_cannot_be_read_is_refused_with_what_it_is(frame: Any, said: str) -> None:
    with pytest.raises(FrameError, match=said):
        check_frame(frame)


@pytest.mark.parametrize("frame", [plane(28, 28, 3), edge.Nv12Frame(plane(28, 28), plane(14, 14, 2))])
def test_a_backend_without_a_gpu_refuses_frames_on_one_and_goes_on(tmp_path: Path, frame: Any) -> None:
    bundle = scripted_bundle(tmp_path)
    backend = ScriptedBackend(bundle.manifest, [reply_ids(bundle, "</Silence>")])
    session = edge.StreamSession(bundle, backend=backend)
    with pytest.raises(FrameError, match="in the host's memory for this backend, found one on a GPU") as caught:
        session.push(frame, 0)
    assert "cuda or tensorrt" in str(caught.value.hint)
    session.push(FRAME, 0)
