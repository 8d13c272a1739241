"""Two or more single-threaded processes that train one model: gradients are averaged in shared memory.

Owns the shared buffers and who updates which parameter. One thread a process avoids waiting in every small operation,
which matters where other work runs on the same cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch
from torch import Tensor


@dataclass
class Team:
    """What the processes share. Parameters themselves live in shared memory; each process updates its own part."""

    size: int
    gradients: Tensor  # (size, total elements) float32, shared
    barrier: Barrier

    @classmethod
    def of(cls, parameters: dict[str, Tensor], size: int, context) -> Team:
        """Shared buffers for these parameters, which are moved to shared memory."""
        for parameter in parameters.values():
            parameter.data.share_memory_()
        total = sum(parameter.numel() for parameter in parameters.values())
        return cls(size, torch.zeros(size, total).share_memory_(), context.Barrier(size))

    def owned(self, rank: int, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that process `rank` updates: about the same number of elements for each process."""
        loads = [0] * self.size
        mine = {}
        for name, parameter in sorted(parameters.items(), key=lambda item: (-item[1].numel(), item[0])):
            owner = loads.index(min(loads))
            loads[owner] += parameter.numel()
            if owner == rank:
                mine[name] = parameter
        return mine

    def average(self, rank: int, parameters: dict[str, Tensor], clip: float) -> float:
        """Replace every gradient by the clipped average of all processes'.

        Parameters without a gradient keep none; they must be the same in every process.

        Returns:
          The norm of the average before clipping.
        """
        mine = self.gradients[rank]
        live: list[tuple[Tensor, int, int]] = []
        start = 0
        for parameter in parameters.values():
            stop = start + parameter.numel()
            if parameter.grad is not None:
                mine[start:stop].copy_(parameter.grad.reshape(-1))
                live.append((parameter.grad, start, stop))
            start = stop
        self.barrier.wait()
        squares = 0.0
        for gradient, start, stop in live:
            mean = self.gradients[:, start:stop].mean(0)
            squares += float(mean.dot(mean))
            gradient.copy_(mean.view_as(gradient))
        norm = squares**0.5
        if norm > clip:
            for gradient, _, _ in live:
                gradient.mul_(clip / norm)
        self.barrier.wait()
        return norm
