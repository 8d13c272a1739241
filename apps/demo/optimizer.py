"""Muon for the matrices of the layers, AdamW for everything else.

Owns the update rule and its constants; knows nothing of the model but the names of its parameters.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(update: Tensor) -> Tensor:
    """Bring the singular values of a stack of matrices (N, rows, columns) near 1, by Newton-Schulz in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.to(torch.bfloat16)
    turned = x.shape[-2] > x.shape[-1]
    if turned:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if turned else x).float()


class Muon:
    """Momentum, then an orthogonal update; parameters of one shape are updated together."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            self._groups[tuple(parameter.shape)].append(parameter)
        self._momentum = {parameter: torch.zeros_like(parameter) for parameter in parameters}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter that has a gradient."""
        for shape, members in self._groups.items():
            live, updates = [], []
            for parameter in members:
                gradient, momentum = parameter.grad, self._momentum[parameter]
                if gradient is None:
                    continue
                momentum.lerp_(gradient, 1 - MOMENTUM)
                live.append(parameter)
                updates.append(gradient.lerp(momentum, MOMENTUM))
            if not live:
                continue
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(live, orthogonalize(torch.stack(updates)), strict=True):
                parameter.mul_(1 - rate * WEIGHT_DECAY)
                parameter.add_(update, alpha=-rate * scale)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates this parameter: two-dimensional, and neither an embedding nor a head."""
    return parameter.ndim == 2 and "embed" not in name and (name.startswith("model.") or ".blocks." in name)


class Optimizer:
    """Both rules behind one step; vision parameters have their own rate.

    Args:
      named: the parameters this optimizer updates, which may be a part of the model's.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        def members(vision: bool, matrix: bool) -> list[Tensor]:
            return [p for n, p in named.items() if ("visual." in n) == vision and is_matrix(n, p) == matrix]

        self._muon = {vision: Muon(members(vision, True)) for vision in (False, True)}
        groups = [{"params": members(vision, False)} for vision in (False, True)]
        self._adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)

    def step(self, muon_rate: float, adam_rate: float, vision_factor: float = 1.0) -> None:
        """Update the parameters from their gradients."""
        self._adam.param_groups[0]["lr"] = adam_rate
        self._adam.param_groups[1]["lr"] = adam_rate * vision_factor
        self._adam.step()
        self._muon[False].step(muon_rate)
        self._muon[True].step(muon_rate * vision_factor)
