"""What it takes to talk about clips with the unquantised model and to fit weights to these turns: memory and disk.

Owns the estimate, from the checkpoint's shapes and the clips' sizes. Runs nothing. Whoever changes what `calibrate`,
`gptq` or `float_model` hold at a time changes it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge.preprocess import PreprocessConfig, grid_of, smart_resize
from export.calibrate import ERROR_SAMPLES, most_tokens
from export.checkpoint import Checkpoint
from export.converse import clips_used
from export.float_model import fits
from export.gptq import SEGMENT_ROWS
from export.plan import GPTQ, QUANTIZED, Plan
from export.tensor_names import DECODER_MAPS, EMBEDDING, TEXT
from export.turns import Clip

PYTHON_BYTES = 150 << 20
"""The interpreter with numpy and this package, and what its allocator keeps."""
SYSTEM_TOKENS, TURN_TOKENS, REPLY_TOKENS = 256, 24, 16
"""Of text: in front of the first turn, around a frame, and of an average reply where replies have words."""
FLOAT = 4


@dataclass(frozen=True)
class CalibrationNeeds:
    """What the turns of an export take.

    Attributes:
      clips, turns, tokens: what weights are fitted to.
      memory_bytes: about the peak of the process until the decoder is written.
      held_bytes: the part of it that is still held while parity is checked.
      kept_bytes: on disk until the export is complete, for one that goes on after an interruption.
    """

    clips: int = 0
    turns: int = 0
    tokens: int = 0
    memory_bytes: int = 0
    held_bytes: int = 0
    kept_bytes: int = 0


def calibration_needs(
    checkpoint: Checkpoint, plan: Plan, preprocess: PreprocessConfig, clips: Sequence[Clip]
) -> CalibrationNeeds:
    """What an export of `checkpoint` by `plan` takes for these clips; none are none."""
    if not clips:
        return CalibrationNeeds()
    facts, at_once = checkpoint.facts.decoder, fits(checkpoint)
    used = [_Talk.of(clip, preprocess, REPLY_TOKENS if at_once else 0) for clip in clips_used(clips, at_once)]
    fitted = [talk for talk in used if talk.calibration_turns]
    tokens = sum(min(talk.calibration_tokens, most_tokens(facts, len(fitted))) for talk in fitted)
    visual_bytes = FLOAT * facts.hidden_size * sum(talk.visual_tokens for talk in used)
    patch_bytes = FLOAT * sum(talk.patches for talk in used) * 3 * preprocess.patch_size**2
    held_bytes = sum(frame.nbytes for clip in clips for frame in clip.frames) + visual_bytes + patch_bytes
    hidden_bytes = FLOAT * facts.hidden_size * tokens
    asked = _conversation_bytes(checkpoint, max(talk.tokens for talk in used), at_once)
    fitted_bytes = _fitting_bytes(checkpoint, plan, tokens) if tokens else 0
    return CalibrationNeeds(
        clips=len(fitted),
        turns=sum(talk.calibration_turns for talk in fitted),
        tokens=tokens,
        memory_bytes=PYTHON_BYTES + held_bytes + max(asked, 2 * hidden_bytes + fitted_bytes),
        held_bytes=held_bytes,
        kept_bytes=visual_bytes + 2 * hidden_bytes,  # the record and the one that replaces it
    )


@dataclass(frozen=True)
class _Talk:
    """A clip's conversation, counted before it is had."""

    turns: int
    calibration_turns: int
    patches: int  # of all frames
    visual_tokens: int
    tokens: int

    @classmethod
    def of(cls, clip: Clip, preprocess: PreprocessConfig, reply_tokens: int) -> _Talk:
        patches = 0
        for frame in clip.frames:
            rows, columns = grid_of(*smart_resize(frame.shape[0], frame.shape[1], preprocess), preprocess)
            patches += rows * columns
        turns, visual = len(clip.frames), patches // preprocess.merge_size**2
        tokens = SYSTEM_TOKENS + visual + turns * (TURN_TOKENS + reply_tokens)
        return cls(turns, clip.calibration_turns, patches, visual, tokens)

    @property
    def calibration_tokens(self) -> int:
        return self.tokens * self.calibration_turns // self.turns


def _conversation_bytes(checkpoint: Checkpoint, tokens: int, at_once: bool) -> int:
    """The unquantised model with the conversation of one clip: all of its weights, or a map at a time."""
    facts = checkpoint.facts.decoder
    cache_bytes = FLOAT * tokens * facts.layers * 2 * facts.num_kv_heads * facts.head_dim
    if at_once:
        return FLOAT * checkpoint.parameters + cache_bytes
    width = max(shape[1] for shape in map_shapes(checkpoint).values())
    weights = max(rows * columns for rows, columns in map_shapes(checkpoint).values())
    return 2 * FLOAT * weights + 2 * FLOAT * tokens * width + cache_bytes  # a map's tensors, and the map they become


def _fitting_bytes(checkpoint: Checkpoint, plan: Plan, tokens: int) -> int:
    """The most that a map takes beside the hidden states: while it is fitted, or while its products are inverted."""
    return max(_map_bytes(checkpoint, plan, name, *shape, tokens) for name, shape in map_shapes(checkpoint).items())


def _map_bytes(checkpoint: Checkpoint, plan: Plan, name: str, k: int, n: int, tokens: int) -> int:
    table = checkpoint.entries[EMBEDDING]
    stored = FLOAT if checkpoint.updates else table.bytes // table.count  # with an adapter a map is held merged
    weight_bytes, input_bytes = (stored + FLOAT) * k * n, FLOAT * tokens * k
    rounded = any(
        plan.precision(f"layers.{layer}.{name}") in QUANTIZED for layer in range(checkpoint.facts.decoder.layers)
    )
    if not rounded:
        return weight_bytes + input_bytes
    written_bytes = (1 + FLOAT) * k * n + 2 * FLOAT * ERROR_SAMPLES * n  # codes, what they mean, and the check of both
    if plan.method != GPTQ:
        return weight_bytes + written_bytes + input_bytes
    count = -(-k // SEGMENT_ROWS)
    segment = -(-k // count)
    products_bytes, inverse_bytes = count * FLOAT * segment**2, 3 * 8 * segment**2
    return weight_bytes + input_bytes + products_bytes + max(written_bytes, k * n + inverse_bytes)


def map_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """The decoder layer's maps as (K, N)."""
    shapes = {}
    for name, sources in DECODER_MAPS.items():
        parts = [checkpoint.entries[f"{TEXT}layers.0.{source}.weight"].shape for source in sources]
        shapes[name] = (parts[0][1], sum(part[0] for part in parts))
    return shapes
