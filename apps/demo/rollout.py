"""Free runs of many streams at once: the model's own answers stay in its history.

Owns a padded KV cache and greedy decoding. Gives what the re-send loop gives, as far as rounding allows, only faster.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.demo.checkpoint import TEXT
from apps.demo.conversation import STATES, encode, state_ids, tokenizer
from apps.demo.labels import RESPONSE, SILENCE
from apps.demo.model import VISUAL_TOKENS, FastModel, text_rotary
from apps.demo.samples import SIZE
from apps.demo.world import Stream
from edge.preprocess import resize_frame
from edge.prompt import IM_END, STREAMO

MAX_REPLY_TOKENS = 40
_KV_SHAPE = (TEXT["num_key_value_heads"], TEXT["hidden_size"] // TEXT["num_attention_heads"])


class Rollout:
    """The caches and positions of a batch of streams that advance turn by turn."""

    def __init__(self, model: FastModel, rows: int, capacity_tokens: int) -> None:
        self.model, self.rows = model, rows
        kv_heads, head_dim = _KV_SHAPE
        shape = (TEXT["num_hidden_layers"], 2, rows, kv_heads, capacity_tokens, head_dim)
        self._cache = torch.zeros(shape, dtype=model.compute)
        self._length = torch.zeros(rows, dtype=torch.long)
        self._position = torch.zeros(rows, dtype=torch.long)

    def append(self, ids: list[list[int]], images: Tensor | None = None) -> Tensor:
        """Run new tokens of every row; an empty list leaves its row alone.

        Args:
          ids: token ids by row; image pads stand for the visual tokens.
          images: (rows, 15, hidden) float32, put at the image pads.

        Returns:
          (rows, vocabulary) scores after each row's last new token; of no meaning for rows without new tokens.
        """
        counts = torch.tensor([len(row) for row in ids])
        width = max(int(counts.max()), 1)
        padded = torch.zeros(self.rows, width, dtype=torch.long)
        positions = torch.zeros(3, self.rows, width, dtype=torch.long)
        pad = tokenizer().token_to_id("<|image_pad|>")
        for row, tokens in enumerate(ids):
            if not tokens:
                continue
            padded[row, : len(tokens)] = torch.tensor(tokens)
            columns, self._position[row] = _positions(tokens, pad, int(self._position[row]))
            positions[:, row, : len(tokens)] = torch.from_numpy(columns)
        x = self.model.embed(padded)
        if images is not None:
            here = padded == pad
            x[here] = images[here.any(-1)].reshape(-1, x.shape[-1])
        slots = self._length[:, None] + torch.arange(width)
        slots = slots.clamp(max=self._cache.shape[4] - 1)
        used = int(slots.max()) + 1
        allowed = torch.arange(used)[None, None, :] <= slots[:, :, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            index = slots[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            keys, values = self._cache[layer]
            keys.scatter_(2, index, k)
            values.scatter_(2, index, v)
            return F.scaled_dot_product_attention(
                q, keys[:, :, :used], values[:, :, :used], attn_mask=allowed[:, None], enable_gqa=True
            )

        hidden, _ = self.model.text(x, text_rotary(positions), attend=attend)
        self._length += counts
        last = hidden[torch.arange(self.rows), (counts - 1).clamp(min=0)]
        return self.model.logits(last)


def _positions(tokens: list[int], pad: int, start: int) -> tuple[np.ndarray, int]:
    columns = np.zeros((3, len(tokens)), np.int64)
    index, position = 0, start
    while index < len(tokens):
        if tokens[index] == pad:
            row, column = np.divmod(np.arange(VISUAL_TOKENS), 5)
            columns[:, index : index + VISUAL_TOKENS] = position + np.stack([row * 0, row, column])
            index, position = index + VISUAL_TOKENS, position + 5
        else:
            columns[:, index] = position
            index, position = index + 1, position + 1
    return columns, position


@torch.no_grad()
def run_streams(
    model: FastModel, streams: list[Stream], frames: list[Stream] | None = None
) -> list[list[tuple[str, str]]]:
    """Answers (state, text) of every turn of every stream, free-running and greedy.

    Args:
      model: the parameters to run.
      streams: what is asked, and for how long.
      frames: streams to take the pictures from instead, one for each.
    """
    pad, end = tokenizer().token_to_id("<|image_pad|>"), encode(IM_END)[0]
    longest = max(stream.duration_s for stream in streams)
    rollout = Rollout(model, len(streams), 260 + longest * 48)
    pending = [list(encode(STREAMO.system_text())) for _ in streams]
    answers: list[list[tuple[str, str]]] = [[] for _ in streams]
    close = list(encode(IM_END + "\n"))
    for t in range(longest):
        live = [row for row, stream in enumerate(streams) if t < stream.duration_s]
        pictures = [resize_frame((frames or streams)[row].render(t), SIZE) for row in live]
        images = torch.zeros(len(streams), VISUAL_TOKENS, TEXT["hidden_size"])
        images[live] = model.merge(model.vision_blocks(torch.from_numpy(np.stack(pictures))))
        new: list[list[int]] = [[] for _ in streams]
        for row in live:
            before, after = STREAMO.turn_text(t, streams[row].questions.get(t, ""))
            new[row] = pending[row] + list(encode(before)) + [pad] * VISUAL_TOKENS + list(encode(after))
        scores = rollout.append(new, images)
        speaking = []
        for row in live:
            state = STATES[int(scores[row, list(state_ids())].argmax())]
            if t < min(streams[row].questions):
                state = SILENCE
            answers[row].append((state, ""))
            pending[row] = [state_ids()[STATES.index(state)], *close]
            if state == RESPONSE:
                speaking.append(row)
                pending[row] = close
        for row, text in _speak(rollout, speaking, end).items():
            answers[row][-1] = (RESPONSE, text)
    return answers


def _speak(rollout: Rollout, speaking: list[int], end: int) -> dict[int, str]:
    """Greedy text of the rows that respond, up to the closing token."""
    said: dict[int, list[int]] = {row: [] for row in speaking}
    step = {row: state_ids()[2] for row in speaking}
    while step:
        scores = rollout.append([[step[row]] if row in step else [] for row in range(rollout.rows)])
        tokens = {row: int(scores[row].argmax()) for row in step}
        step = {}
        for row, token in tokens.items():
            if token != end and len(said[row]) < MAX_REPLY_TOKENS:
                said[row].append(token)
                step[row] = token
    return {row: tokenizer().decode(ids, skip_special_tokens=False).strip() for row, ids in said.items()}
