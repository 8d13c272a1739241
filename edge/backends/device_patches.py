"""A frame on a GPU to what the vision graphs read, without leaving it.

Owns the way from a checked frame to the frame kernels, for every backend with a GPU. Knows no graph.
"""

from __future__ import annotations

from edge.backends.place import DevicePlace
from edge.device_frames import FrameOnDevice
from edge.errors import FrameError
from edge.gpu_arrays import DeviceArray
from edge.preprocess import PreprocessConfig


def device_patches(
    place: DevicePlace, frame: FrameOnDevice, size: tuple[int, int], preprocess: PreprocessConfig
) -> DeviceArray:
    """`resize_frame` and `patchify` of a frame on the device: (P, 3 * patch**2) float32, valid until the next one.

    Args:
      place: where the patches lie, and the work is done.
      size: height and width after the resize.

    Raises:
      FrameError: it is on another GPU.
    """
    from edge.gpu_operations import patches_of_frame

    for plane in (frame.plane, frame.chroma):
        if plane is not None and plane.device not in (None, place.device_number):
            raise FrameError(
                f"A frame should be on GPU {place.device_number}, as the backend is, found it on GPU {plane.device}",
                hint="Copy it there, or to a numpy array",
            )
    patch = preprocess.patch_size
    found = place.result("frame", (size[0] // patch * (size[1] // patch), 3 * patch**2))
    return patches_of_frame(
        place.gpu,
        frame.plane,
        frame.chroma,
        new_size=size,
        patch=patch,
        merge=preprocess.merge_size,
        mean=preprocess.image_mean,
        deviation=preprocess.image_std,
        full_range=frame.full_range,
        bt709=frame.bt709,
        output=found,
        stream=place.stream,
    )
