"""Why a bundle failed on held-out turns: which layers lose most, and the fewest bytes that would pass.

Owns the search. Each decoder layer is run on the unquantised model's own activations, once as it is and once with the
weights that were written; then the layers that lose most get more bits, and the turns are compared again. Everything
runs in numpy with float32 activations: what a rounded cache and rounded activations do is not in it, so that an error
that stays without any rounding of weights is told to be theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.rope import decoder_rope
from export.checkpoint import Checkpoint
from export.expected import float_logits
from export.float_layers import Cache, decoder_attention, decoder_layer
from export.float_model import FloatModel
from export.held_out import Tally
from export.limits import keeps
from export.plan import value_bytes
from export.quantize import block_for, dequantize_blocks, quantize_blocks
from export.rounded import RoundedCheckpoint
from export.tensor_names import TEXT
from export.turns import Conversation

if TYPE_CHECKING:
    from export.proof import HeldOut, Written

MORE_BITS = {"int4": ("int8", "fp16"), "int8": ("fp16",), "fp16": (), "fp32": ()}
SHOWN_LAYERS = 5
LONGEST_TOKENS = 1500
"""Of the conversation that layers are compared on; more tokens say the same."""


@dataclass(frozen=True)
class RaisedCheckpoint(RoundedCheckpoint):
    """A bundle's values, with those of some decoder layers rounded less.

    Args:
      raised: by layer: int8 or fp16.
    """

    raised: Mapping[int, str] = field(default_factory=dict)
    block: int = 32

    @classmethod
    def from_rounded(cls, rounded: RoundedCheckpoint, raised: Mapping[int, str], block: int) -> RaisedCheckpoint:
        own = {f.name: getattr(rounded, f.name) for f in dataclasses.fields(rounded)}
        return cls(**own, raised=raised, block=block)

    def read(self, name: str) -> np.ndarray:
        layer = layer_of(name)
        precision = self.raised.get(layer) if layer is not None else None
        if precision is None or name not in self.matrices:
            return super().read(name)
        values = Checkpoint.read(self, name)
        if precision == "fp16":
            return np.asarray(values.astype(np.float16), np.float32)
        block = block_for(values.shape[1], self.block) or values.shape[1]
        codes, scales = quantize_blocks(np.ascontiguousarray(values.T), block, precision)
        return np.ascontiguousarray(dequantize_blocks(codes, scales).T)


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to."""
    parts = name.removeprefix(f"{TEXT}layers.").split(".") if name.startswith(f"{TEXT}layers.") else []
    return int(parts[0]) if parts else None


def diagnose(
    written: Written, held_out: HeldOut, talks: Sequence[Conversation], limits: Mapping[str, float]
) -> dict[str, Any]:
    """What the report says beside the figures.

    Returns:
      `worst_layers`: layer and relative error of its output, worst first; `weights_alone_pass`: whether it is not the
      rounding of weights that fails; `cheapest`: the fewest more bytes that would pass, verified on the turns, as
      `layers`, `weights`, `more_bytes`; None where nothing that was tried does.
    """
    rounded = written.rounded()
    original = FloatModel(written.checkpoint)
    errors = layer_errors(original, FloatModel(rounded), _shortest(talks))
    worst = sorted(range(len(errors)), key=lambda layer: -errors[layer])
    search = _Search(written, held_out, talks, limits, original, rounded, worst)
    alone = search.passes({})
    return {
        "worst_layers": [[layer, float(f"{errors[layer]:.3g}")] for layer in worst[:SHOWN_LAYERS]],
        "weights_alone_pass": alone,
        "cheapest": None if alone else search.cheapest(),
    }


def layer_errors(original: FloatModel, stored: FloatModel, talk: Conversation) -> list[float]:
    """Of each decoder layer on the original's activations: error of what it adds, as a part of what it should add."""
    facts = original.checkpoint.facts.decoder
    count = min(len(talk.ids), LONGEST_TOKENS)
    visual = talk.visual or original.vision(talk.frames)
    hidden = talk.embeds(original.embeddings(talk.ids), visual)[:count]
    cos, sin = decoder_rope(facts).tables(talk.positions[:, :count])
    errors = []
    for layer in range(facts.layers):
        outputs = []
        for model in (original, stored):
            attend = decoder_attention(facts, cos, sin, Cache())
            outputs.append(decoder_layer(hidden, attend, *model.layer(layer), facts.rms_norm_eps))
        wanted, found = outputs
        errors.append(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted - hidden)))
        hidden = wanted
    return errors


class _Search:
    """Tries more bits for more and more layers, those that lose most first."""

    def __init__(
        self,
        written: Written,
        held_out: HeldOut,
        talks: Sequence[Conversation],
        limits: Mapping[str, float],
        original: FloatModel,
        rounded: RoundedCheckpoint,
        worst: list[int],
    ) -> None:
        self._written, self._held_out, self._talks, self._limits = written, held_out, talks, limits
        self._rounded, self._worst = rounded, worst
        self._expected = [float_logits(original, talk, talk.visual) for talk in talks]
        stored = FloatModel(rounded)
        self._visual = [stored.vision(talk.frames) for talk in talks]  # the same whatever decoder layers are raised

    def passes(self, raised: Mapping[int, str]) -> bool:
        """Whether the turns would pass with these layers raised."""
        block = self._written.decoder.block
        model = FloatModel(RaisedCheckpoint.from_rounded(self._rounded, raised, block))
        tally = Tally(self._held_out.tokens, self._held_out.interval_s)
        for talk, expected, visual in zip(self._talks, self._expected, self._visual, strict=True):
            tally.add(talk, expected, float_logits(model, talk, visual))
        figures = tally.figures()
        return all(keeps(figures, name, limit) for name, limit in self._limits.items())

    def cheapest(self) -> dict[str, Any] | None:
        """The first choice that passes, in the order of bytes."""
        for more_bytes, precision, layers in sorted(self._choices()):
            if self.passes(dict.fromkeys(layers, precision)):
                return {"weights": precision, "layers": sorted(layers), "more_bytes": more_bytes}
        return None

    def _choices(self) -> Iterator[tuple[int, str, tuple[int, ...]]]:
        """More bytes, precision and layers: 1, 2, 4 ... of those that lose most, and all of them."""
        worst = self._worst
        counts = sorted({min(1 << i, len(worst)) for i in range(len(worst).bit_length() + 1)})
        for precision in MORE_BITS[self._written.weights]:
            for count in counts:
                yield self._more_bytes(worst[:count], precision), precision, tuple(worst[:count])

    def _more_bytes(self, layers: Sequence[int], precision: str) -> int:
        entries, block = self._written.checkpoint.entries, self._written.decoder.block
        names = [name for name in self._rounded.matrices if layer_of(name) in layers]
        values = sum(entries[name].count for name in names)
        return int(values * (value_bytes(precision, block) - value_bytes(self._written.weights, block)))


def _shortest(talks: Sequence[Conversation]) -> Conversation:
    return min(talks, key=lambda talk: len(talk.ids))
