"""What training minimises: Streamo's loss on states and replies, and auxiliary heads that are dropped afterwards.

Owns the loss weights. Knows tensors only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.demo.conversation import IGNORED

NOT_APPLICABLE = 255
CELL_CLASSES = (3, 4, 3, 5, 2)  # what, colour, shape, side of the arm, light
EVENT_CLASSES = (3, 9, 4, 3, 5, 2)  # phase, kind, colour, shape, visible count, light
PLACE_CLASSES, THINGS = 3, 12
ASKED_CLASSES = (5, 4, 9, 4, 3, 5)  # task in force, what it is about, kind, colour, shape; turns of the event so far
FOCUS = 2.0  # Streamo's gamma
MOST_CLASS_WEIGHT = 5.0
DIGIT_WEIGHT = 3.0


class AuxiliaryHeads(nn.Module):
    """Linear read-outs: of each visual token, and of each turn's state position in a late layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(hidden, sum(CELL_CLASSES))
        self.event_norm = nn.RMSNorm(hidden)
        self.events = nn.Linear(hidden, sum(EVENT_CLASSES) + PLACE_CLASSES * THINGS)
        self.asked = nn.Linear(hidden, sum(ASKED_CLASSES))

    def cell_loss(self, visual: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy. visual (..., hidden), labels (..., 5) uint8."""
        scores = self.cells(visual.reshape(-1, visual.shape[-1]))
        return _grouped(scores, labels.reshape(-1, labels.shape[-1]), CELL_CLASSES)

    def event_loss(self, hidden: Tensor, events: Tensor, places: Tensor) -> Tensor:
        """Mean cross entropy. hidden (N, hidden), events (N, 6) and places (N, 12) uint8."""
        scores = self.events(self.event_norm(hidden))
        split = sum(EVENT_CLASSES)
        place_scores = scores[:, split:].reshape(-1, PLACE_CLASSES)
        return _grouped(scores[:, :split], events, EVENT_CLASSES) + 3 * _cross_entropy(place_scores, places.reshape(-1))

    def asked_loss(self, hidden: Tensor, asked: Tensor) -> Tensor:
        """Mean cross entropy of the question in force. hidden (N, hidden), asked (N, 6) uint8."""
        return _grouped(self.asked(self.event_norm(hidden)), asked, ASKED_CLASSES)


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    labels = labels.long()
    count = (labels != NOT_APPLICABLE).sum().clamp(min=1)
    return F.cross_entropy(scores, labels, ignore_index=NOT_APPLICABLE, reduction="sum") / count


def _grouped(scores: Tensor, labels: Tensor, classes: tuple[int, ...]) -> Tensor:
    parts = scores.split(list(classes), dim=-1)
    return torch.stack([_cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)]).sum()


def stream_loss(
    logits: Tensor, target: Tensor, state_ids: tuple[int, int, int], end_id: int, digit_ids: tuple[int, ...]
) -> dict[str, Tensor]:
    """Streamo's loss at the supervised positions.

    A state token weighs alpha * (1 - p)^2 with alpha its inverse frequency in the batch over the number of states
    present, at most `MOST_CLASS_WEIGHT`; other tokens weigh 1. States, words and the closing token behind a bare state
    are averaged apart, so that the many easy closing tokens do not thin out the rest. Among the words a digit weighs
    `DIGIT_WEIGHT`: digits are few, and all of a time or a count hangs on them.

    Args:
      logits: (N, vocabulary) float32.
      target: (N,) the tokens to predict, with their order in the sequence kept.
      state_ids: ids of silence, standby, response.
      end_id: id of the closing token.
      digit_ids: ids of the ten digits.

    Returns:
      "state", "text" and "end" losses and "state_right", the share of states predicted right.
    """
    entropy = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORED)
    states = torch.tensor(state_ids)
    is_state = (target[:, None] == states).any(-1)
    previous = torch.roll(target, 1)
    after_bare_state = (target == end_id) & ((previous == states[0]) | (previous == states[1]))
    words = ~is_state & ~after_bare_state
    word_weight = 1 + (DIGIT_WEIGHT - 1) * (target[:, None] == torch.tensor(digit_ids)).any(-1)[words].float()
    state_target, state_entropy = target[is_state], entropy[is_state]
    counts = torch.stack([(state_target == token).sum() for token in states]).float()
    alpha = counts.sum() / counts.clamp(min=1) / (counts > 0).sum().clamp(min=1)
    alpha = alpha.clamp(max=MOST_CLASS_WEIGHT)
    weight = (alpha * (state_target[:, None] == states)).sum(-1) * (1 - torch.exp(-state_entropy)) ** FOCUS
    right = logits[is_state][:, states].argmax(-1) == (state_target[:, None] == states).float().argmax(-1)
    return {
        "state": (weight * state_entropy).sum() / is_state.sum().clamp(min=1),
        "text": (word_weight * entropy[words]).sum() / word_weight.sum().clamp(min=1),
        "end": entropy[after_bare_state].sum() / after_bare_state.sum().clamp(min=1),
        "state_right": right.float().mean(),
    }
