"""The decoder's weights, rounded layer by layer with the activations of real turns at hand.

Owns the order: the calibration turns go through each map as it was just written, so that later layers are fitted to
what the bundle computes. One layer's weights are in memory at a time. Measures each layer's keys and values on the way.
What comes out of a layer is kept until the export is complete, so that an interrupted one repeats at most one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edge.contract import DecoderFacts, LayerCache, WeightOverride
from edge.rope import decoder_rope
from export.float_layers import Cache, decoder_attention, rms_norm, silu
from export.gptq import gptq, input_products
from export.kept import Kept, Record
from export.kv_choice import LayerKeys, choose_cache
from export.memory import release_freed_memory
from export.native import key_offset_name
from export.plan import GPTQ, QUANTIZED, Plan
from export.quantize import dequantize_blocks, quantize_blocks
from export.tensor_names import TEXT
from export.turns import Conversation
from export.weight_store import StoredTensor
from export.weight_writer import MatrixColumns, Step, WeightWriter
from export.weights import MapSource, bias_offset, layer_maps, write_head, write_layer_vectors

ACTIVATION_BYTES = 256 << 20
"""What the widest activation of all calibration tokens may take; conversations are cut short for it."""
PIECE_TOKENS = 512
ERROR_SAMPLES = 512
PROMOTED_ABOVE = 0.3
"""A map whose outputs int4 changes by more than this part of their norm gets int8."""

STATE = "calibration"
"""Name of the record of what came out of the last finished layer."""

Apply = Callable[[np.ndarray], np.ndarray]


def most_tokens(facts: DecoderFacts, conversations: int) -> int:
    """How much of each conversation is calibrated on."""
    return ACTIVATION_BYTES // (4 * facts.intermediate_size) // max(1, conversations)


@dataclass
class CalibrationTurns:
    """What goes into the decoder: all conversations' tokens one behind another, and the rotary rows of each."""

    embeds: np.ndarray  # (T, W)
    ends: list[int]
    tables: list[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(
        cls, writer: WeightWriter, talks: Sequence[Conversation], token_rows: Callable[[np.ndarray], np.ndarray]
    ) -> CalibrationTurns:
        """The calibration part of `talks`, each as long as memory allows."""
        facts = writer.checkpoint.facts.decoder
        used = [talk for talk in talks if talk.calibration_tokens]
        most = most_tokens(facts, len(used))
        rope, parts, tables = decoder_rope(facts), [], []
        for talk in used:
            count = min(talk.calibration_tokens, most)
            parts.append(talk.embeds(token_rows(talk.ids), talk.visual)[:count])
            tables.append(rope.tables(talk.positions[:, :count]))
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return cls(np.concatenate(parts), ends, tables)

    def spans(self) -> list[tuple[int, int]]:
        """Where each conversation starts and ends."""
        return list(zip([0, *self.ends[:-1]], self.ends, strict=True))


@dataclass
class Calibrated:
    """What became of the decoder.

    Attributes:
      overrides: maps that got another precision because of their error.
      output_errors, kv_layers: see `edge.contract`.
    """

    overrides: list[WeightOverride] = field(default_factory=list)
    output_errors: dict[str, float] = field(default_factory=dict)
    kv_layers: list[LayerCache] = field(default_factory=list)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Calibrated:
        """What `asdict` made of one."""
        overrides = [WeightOverride(**one) for one in facts["overrides"]]
        return cls(overrides, dict(facts["output_errors"]), [LayerCache(**one) for one in facts["kv_layers"]])


def write_calibrated_decoder(
    writer: WeightWriter,
    plan: Plan,
    embedding: StoredTensor,
    turns: CalibrationTurns,
    kv: str,
    step: Step,
    kept: Kept | None = None,
) -> Calibrated:
    """Every weight of the decoder graph, as `weights.write_decoder`, fitted to `turns`.

    Args:
      kv: auto, fp32 or int8: what each layer's cache may become.
      kept: what an interrupted export with the same arguments left, if it did; gets what this one would leave.
    """
    return _Calibration(writer, plan, turns, kv, kept).run(embedding, step)


class _Calibration:
    def __init__(
        self, writer: WeightWriter, plan: Plan, turns: CalibrationTurns, kv: str, kept: Kept | None = None
    ) -> None:
        self._writer, self._plan, self._turns, self._kv, self._kept = writer, plan, turns, kv, kept
        self._facts = writer.checkpoint.facts.decoder
        self._hidden = turns.embeds
        self._found = Calibrated()
        self._offsets: dict[int, np.ndarray] = {}  # by layer, of those whose keys have one

    def run(self, embedding: StoredTensor, step: Step) -> Calibrated:
        facts, finished = self._facts, self._take_up()
        for layer in range(finished):
            self._pass_by(layer)
        if finished < facts.layers:  # codes are never mixed with activations that went through others
            self._writer.file.write_the_rest()
        for layer in range(finished, facts.layers):
            write_layer_vectors(self._writer, layer)
            self._layer(layer)
            release_freed_memory()
            self._keep(layer + 1)
            step(layer + 1, facts.layers + 1)
        write_head(self._writer, self._plan, embedding)
        step(facts.layers + 1, facts.layers + 1)
        return self._found

    def _take_up(self) -> int:
        """Go on behind the layers that are finished; returns how many are."""
        record = self._kept.load(STATE) if self._kept else None
        if record is None or record.facts["tensors"] > self._writer.file.found():
            return 0
        arrays = dict(record.arrays)
        self._hidden = arrays.pop("hidden")
        self._offsets = {int(layer): offset for layer, offset in arrays.items()}
        self._found = Calibrated.of(record.facts["found"])
        return int(record.facts["layers"])

    def _keep(self, layers: int) -> None:
        """Note what came out of the first `layers`, all of which are written."""
        file = self._writer.file
        file.mark()
        if self._kept:
            facts = {"layers": layers, "tensors": file.tensors, "found": asdict(self._found)}
            offsets = {str(layer): offset for layer, offset in self._offsets.items()}
            self._kept.save(STATE, Record(facts, {"hidden": self._hidden, **offsets}))

    def _pass_by(self, layer: int) -> None:
        """Take note of where the weights of a layer lie that is finished; none is computed again."""
        write_layer_vectors(self._writer, layer)
        promoted = {override.name: override.weights for override in self._found.overrides}
        for name, source in layer_maps(self._writer, self._plan, layer).items():
            columns, dtype, block = self._shaped(name, source)
            if dtype in QUANTIZED:
                self._writer.codes(name, columns, promoted.get(name, dtype), block, (), ())
            else:
                self._writer.matrix(name, source.sources, dtype, rows=source.rows, width=source.width)
            if layer in self._offsets and name.endswith("qkv"):
                self._writer.array(key_offset_name(layer), self._offsets[layer])

    def _shaped(self, name: str, source: MapSource) -> tuple[MatrixColumns, str, int]:
        """A map's columns, and the dtype and block that its shape and the plan allow."""
        columns = MatrixColumns(self._writer.checkpoint, source.sources, source.rows, source.width)
        return columns, *self._writer.fitting(name, columns, self._plan.dtype(name))

    def _layer(self, layer: int) -> None:
        source, name, epsilon = f"{TEXT}layers.{layer}.", f"layers.{layer}.", self._facts.rms_norm_eps
        read, maps = self._writer.checkpoint.read, layer_maps(self._writer, self._plan, layer)
        normed = rms_norm(self._hidden, read(source + "input_layernorm.weight"), epsilon)
        bias = np.concatenate([read(f"{source}self_attn.{part}_proj.bias") for part in "qkv"])
        qkv = self._map(name + "qkv", maps, normed)(normed) + bias
        self._cache(layer, qkv)
        mixed = self._attention(qkv)
        self._hidden = self._hidden + self._map(name + "attention_output", maps, mixed)(mixed)
        normed = rms_norm(self._hidden, read(source + "post_attention_layernorm.weight"), epsilon)
        activated = _activate(self._map(name + "gate_up", maps, normed), normed)
        self._hidden = self._hidden + self._map(name + "down", maps, activated)(activated)

    def _attention(self, qkv: np.ndarray) -> np.ndarray:
        parts = [
            decoder_attention(self._facts, cos, sin, Cache())(qkv[first:last])
            for (first, last), (cos, sin) in zip(self._turns.spans(), self._turns.tables, strict=True)
        ]
        return np.concatenate(parts)

    def _cache(self, layer: int, qkv: np.ndarray) -> None:
        """Measure the layer's keys and values, and write the offset that its cache needs."""
        spans = self._turns.spans()
        keys = LayerKeys(self._facts, [qkv[first:last] for first, last in spans], self._turns.tables)
        cache, offset = choose_cache(keys, bias_offset(self._writer.checkpoint, layer), self._kv)
        self._found.kv_layers.append(cache)
        if offset is not None:
            self._offsets[layer] = offset
            self._writer.array(key_offset_name(layer), offset)

    def _map(self, name: str, maps: dict[str, MapSource], inputs: np.ndarray) -> Apply:
        """Write the map `name` for these inputs (T, K), and return it as it was written."""
        source = maps[name]
        columns, dtype, block = self._shaped(name, source)
        values = columns.whole()
        if dtype not in QUANTIZED:
            self._writer.matrix(name, source.sources, dtype, rows=source.rows, width=source.width)
            return _applying(values if dtype == "float32" else values.astype(np.float16).astype(np.float32))
        sample = inputs[:: -(-len(inputs) // ERROR_SAMPLES)]
        expected = _padded(sample, len(values)) @ values
        segments = input_products(inputs, len(values), block) if self._plan.method == GPTQ else None

        def rounded(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
            if segments is None:
                codes, scales = quantize_blocks(values, block, dtype)
            else:
                codes, scales = gptq(values, segments, block, dtype)
            weight = dequantize_blocks(codes, scales)
            return codes, scales, weight, _error(_padded(sample, len(values)) @ weight, expected)

        codes, scales, weight, error = rounded(dtype)
        if dtype == "int4" and error > PROMOTED_ABOVE and name not in self._plan.overrides:
            dtype = "int8"
            reason = f"in int4 its outputs on the calibration turns differ by {error:.2g}, above {PROMOTED_ABOVE}"
            self._found.overrides.append(WeightOverride(name, "int8", reason))
            codes, scales, weight, error = rounded(dtype)
        self._found.output_errors[name] = float(f"{error:.3g}")
        self._writer.codes(name, columns, dtype, block, [codes], [scales])
        return _applying(weight)


def _applying(weight: np.ndarray) -> Apply:
    return lambda inputs: _padded(inputs, len(weight)) @ weight


def _padded(inputs: np.ndarray, k: int) -> np.ndarray:
    """(T, K) filled up with zeros as the weight's rows are."""
    return inputs if inputs.shape[1] == k else np.pad(inputs, ((0, 0), (0, k - inputs.shape[1])))


def _activate(gate_up: Apply, inputs: np.ndarray) -> np.ndarray:
    """silu(gate) * up of (T, W), a piece at a time, since both together are the widest activation of a layer."""
    parts = []
    for first in range(0, len(inputs), PIECE_TOKENS):
        gate, up = np.split(gate_up(inputs[first : first + PIECE_TOKENS]), 2, axis=1)
        parts.append(silu(gate) * up)
    return np.concatenate(parts)


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / norm if norm else 0.0
