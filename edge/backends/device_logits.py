"""The logits of the last run where they lie on a GPU.

Owns the two ways in which they leave it: whole, for whoever wants an array, or as the one token that was chosen there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge.gpu_arrays import DeviceArray

if TYPE_CHECKING:
    from edge.backends.place import DevicePlace
    from edge.sampling import Sampling


class DeviceLogits:
    """(V,) float32 on a device; see `sampling.LogitsOnDevice`. Valid until the next run.

    Args:
      row: (1, V) float32. token: (1,) int32, where the choice is written.
    """

    def __init__(self, place: DevicePlace, row: DeviceArray, token: DeviceArray) -> None:
        self._place, self._row, self._token = place, row, token

    def choose(self, sampling: Sampling, random: float) -> int:
        """The token that `sampling.Sampler` would choose; 4 bytes leave the device."""
        from edge.gpu_operations import sample

        sample(
            self._place.gpu,
            self._row,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            random=random,
            token=self._token,
            stream=self._place.stream,
        )
        return int(self._place.read(self._token)[0])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found: np.ndarray = self._place.read(self._row)[0]
        return found.astype(dtype or found.dtype, copy=copy is not False)
