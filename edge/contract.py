"""What export and runtime agree on: tensor names, dtypes and shapes of each graph, and the bundle's manifest.

Owns names and schema. Knows neither how a graph is built (`export`) nor how it is run (`backends`).

Shapes use one alphabet: P patches of a frame, N visual tokens of a frame (P / merge**2), T new tokens, C capacity of
the KV cache in tokens, Hq query heads, Hkv key/value heads, D head width, W hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge.errors import BundleError
from edge.preprocess import PreprocessConfig
from edge.prompt import Protocol

MANIFEST_SCHEMA = "streamo.bundle/3"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
VISION_FILE = "vision.onnx"
DECODER_FILE = "decoder.onnx"
NATIVE_VISION_FILE = "vision.native.onnx"
NATIVE_DECODER_FILE = "decoder.native.onnx"
TENSORRT_VISION_FILE = "vision.tensorrt.onnx"
TENSORRT_DECODER_FILE = "decoder.tensorrt.onnx"
TENSORRT_DATA_FILE = "decoder.tensorrt.data"
"""Float16 scales of the decoder's 4-bit weights, where TensorRT multiplies with them itself."""
EMBEDDING_FILE = "embeddings.bin"
TURNS_FILE = "turns.npz"
MAX_MANIFEST_BYTES = 4 << 20
CHECKSUM = "checksum"
SCALE_BYTES = 4
"""Of the float32 scale beside each row and KV head of an int8 cache."""

OPSET = 21
MATMUL_ACCURACY_LEVEL = "4"
"""ONNX Runtime's `session.qdq_matmulnbits_accuracy_level`: products of quantised weights take 8-bit activations."""
CUSTOM_DOMAIN = "streamo"
STREAM_ATTENTION = "StreamAttention"
"""streamo::StreamAttention of the stock graph:
(qkv, qkv_bias, rope_cos, rope_sin, key_cache, value_cache, cache_length)
-> (attention, key_cache, value_cache); attributes num_heads, num_kv_heads, scale.

  qkv (T, (Hq + 2 Hkv) D), qkv_bias ((Hq + 2 Hkv) D), rope_cos and rope_sin (T, D / 2),
  key_cache and value_cache (1, Hkv, C, D) float32, cache_length (1,) int32: tokens in the cache before this call.
Adds the bias, rotates queries and keys, writes the T new rows behind `cache_length` and attends over all of them,
causally among the new ones. attention is (T, Hq D). The caches are updated in place: bind the same memory to input
and output. The model file carries the op as a function of stock ONNX Runtime operators, so it runs everywhere.
"""

# The native graph: the same weights' bytes, with operators of the library built from `kernels/`. What each computes is
# said in `kernels/include/streamo_kernels.h`. Optional inputs are left out from the end, or named "".
SPAN_ATTENTION = "SpanAttention"
"""streamo::SpanAttention(qkv, qkv_bias, rope_cos, rope_sin, key_cache, value_cache, new_slots, spans, run_cos, run_sin)
-> (attention, key_cache, value_cache); attributes num_heads, num_kv_heads (int), scale (float).

  Caches (1, Hkv, C, D) float32; new_slots (T,) int32; spans (S, 3) int32: slot, length, run, S may be 0;
  run_cos and run_sin (R, D / 2), R may be 0. The caches are updated in place when input and output share memory.
"""
SPAN_ATTENTION_INT8 = "SpanAttentionInt8"
"""As SpanAttention, with caches of int8 and these inputs behind run_sin: key_scales, value_scales (1, Hkv, C) float32
[, key_offset (Hkv, D) float32, slot_cos, slot_sin (C, D / 2) float32]
-> (attention, key_cache, value_cache, key_scales, value_scales).
"""
STREAM_MATMUL = "StreamMatMul"
"""streamo::StreamMatMul(input (T, K), codes, scales (K / block, N) [, bias (N)] [, residual (T, N)]) -> (T, N).

Attributes bits (4 or 8), block_size, gated (0 or 1). codes: the weight's stored bytes as one uint8 vector of
K N bits / 8 bytes. With gated = 1 the N columns are gate and up, and the output is silu(gate) * up, (T, N / 2).
"""
WINDOW_ATTENTION = "WindowAttention"
"""streamo::WindowAttention(qkv (P, 3 heads D), rope_cos, rope_sin (P, D / 2), window_starts (windows + 1,) int32)
-> (P, heads D); attributes num_heads, scale. Patches of one window lie side by side.
"""

# The TensorRT graphs: float16 products of TensorRT's own inside a float32 residual stream, over the same weights'
# bytes, and operators of the plugin library built from `kernels/adapters/tensorrt/`. A plugin's inputs are never left
# out from the middle; attributes say which are there. What TensorRT must not interpret comes as int32 words.
PLUGIN_NAMESPACE = "streamo"
PLUGIN_VERSION = "1"
TABLE_ATTENTION = "StreamoTableAttention"
"""SpanAttention and SpanAttentionInt8 with new_slots and spans in the form that the GPU kernels read.

(qkv, qkv_bias, rope_cos, rope_sin, key_cache, value_cache, attention_table, run_cos, run_sin
 [, key_scales, value_scales] [, key_offset, slot_cos, slot_sin])
-> (attention, key_cache, value_cache [, key_scales, value_scales]); attributes num_heads, num_kv_heads, int8_cache,
key_offset, most_spans (int), scale (float).

  key_cache and value_cache (1, Hkv, C, D) float32, or for int8 (1, Hkv, C, D / 4) int32: four codes a word.
  attention_table (words,) int32: what `streamo_gpu_attention_table` writes for `most_spans`.
The caches and scales are updated in place: each output is its input's memory.
"""
PLUGIN_MATMUL = "StreamoMatMul"
"""StreamMatMul(input, codes, scales [, bias] [, residual]) with codes as (K N bits / 32,) int32 words; attributes bits,
block_size, gated, bias, residual (int). For quantised weights that TensorRT has no weight-only product for.
"""
TENSORRT_INT4_BLOCKS = (64, 128)
"""The blocks of 4-bit weights that TensorRT multiplies with itself; not all versions take blocks of another type."""
MOST_SPANS = 256
"""Stretches of the cache that one step of the TensorRT decoder can look back at."""

# Vision graph.
PATCHES = "patches"  # (P, 3 * patch**2) float32: a frame fills both temporal slices, so their weights are summed
VISION_COS = "vision_rope_cos"  # (P, D / 2) float32
VISION_SIN = "vision_rope_sin"  # (P, D / 2) float32
WINDOW_MASK = "window_mask"  # (P, P) float32, stock graph only: 0 inside a window, else very low; added to the scores
WINDOW_STARTS = "window_starts"  # (windows + 1,) int32; native graph only, whose patches are ordered by window
IMAGE_EMBEDS = "image_embeds"  # (N, W) float32

# Decoder graph.
INPUTS_EMBEDS = "inputs_embeds"  # (T, W) float32
ROPE_COS = "rope_cos"  # (T, D / 2) float32
ROPE_SIN = "rope_sin"  # (T, D / 2) float32
CACHE_LENGTH = "cache_length"  # (1,) int32; stock graph only
NEW_SLOTS = "new_slots"  # (T,) int32; this and the following: native graph only
SPANS = "spans"  # (S, 3) int32: slot, length, run of the cached rows to attend to, none of them new
RUN_COS = "run_cos"  # (R, D / 2) float32: how much further the query is turned for a run
RUN_SIN = "run_sin"  # (R, D / 2) float32
ATTENTION_TABLE = "attention_table"  # (words,) int32; TensorRT graph only, in place of new_slots and spans
SLOT_COS = "slot_cos"  # (C, D / 2) float32: the angles each row was written with; only if a layer has a key offset
SLOT_SIN = "slot_sin"  # (C, D / 2) float32
LOGITS = "logits"  # (1, V) float32, of the last token only


def key_cache_name(layer: int) -> str:
    """Graph input of layer `layer`'s keys, (1, Hkv, C, D); the output is this with `.updated` behind it."""
    return f"key_cache.{layer}"


def value_cache_name(layer: int) -> str:
    """Graph input of layer `layer`'s values, (1, Hkv, C, D); the output is this with `.updated` behind it."""
    return f"value_cache.{layer}"


def key_scales_name(layer: int) -> str:
    """Graph input of layer `layer`'s key scales, (1, Hkv, C) float32; int8 caches of the native graph only."""
    return f"key_scales.{layer}"


def value_scales_name(layer: int) -> str:
    """Graph input of layer `layer`'s value scales, (1, Hkv, C) float32; int8 caches of the native graph only."""
    return f"value_scales.{layer}"


def updated(name: str) -> str:
    """The output that shares memory with cache input `name`."""
    return f"{name}.updated"


@dataclass(frozen=True)
class DecoderFacts:
    """Shape of the language model."""

    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tied_embeddings: bool


@dataclass(frozen=True)
class VisionFacts:
    """Shape of the vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class TokenIds:
    """Ids found by name in the tokenizer. A state is a tuple: one id, or the pieces it is spelt in."""

    silence: tuple[int, ...]
    standby: tuple[int, ...]
    response: tuple[int, ...]
    image_pad: int
    im_end: int
    end_of_text: int


@dataclass(frozen=True)
class StreamDefaults:
    """What the checkpoint's author recommends; a user may choose otherwise."""

    window_turns: int = 120
    max_reply_tokens: int = 128


@dataclass(frozen=True)
class FileFacts:
    """One file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorFacts:
    """One input or output of a graph; symbolic dimensions are strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """One graph of the bundle, and the same with our own operators and for TensorRT over the same weights."""

    file: str
    weights: str  # fp32, fp16, int8 or int4
    weights_bytes: int
    inputs: tuple[TensorFacts, ...]  # of the stock graph
    outputs: tuple[TensorFacts, ...]
    native_file: str = ""  # "" where our operators do not cover the model's shape
    tensorrt_file: str = ""  # likewise


@dataclass(frozen=True)
class EmbeddingTable:
    """The token embeddings, row-major, memory-mapped at run time.

    An int8 table is codes (rows, columns), and from byte `scales_offset` on scales (rows, columns / block_size),
    float32: a value is its code times the scale of its block.
    """

    file: str
    rows: int
    columns: int
    dtype: str  # float32, float16 or int8
    block_size: int = 0  # columns that share a scale; int8 only
    scales_offset: int = 0

    @property
    def file_bytes(self) -> int:
        """What the file has to hold."""
        values = self.rows * self.columns * {"float32": 4, "float16": 2, "int8": 1}[self.dtype]
        if self.dtype != "int8":
            return values
        return self.scales_offset + self.rows * (self.columns // self.block_size) * SCALE_BYTES


@dataclass(frozen=True)
class WeightOverride:
    """A weight that has another precision than the others, and why."""

    name: str  # as in the graph: layers.3.down
    weights: str  # fp32, fp16, int8 or int4
    reason: str


@dataclass(frozen=True)
class WeightPrecision:
    """How the decoder's weights became codes.

    Attributes:
      method: `nearest`: each weight by itself; `gptq`: by what the calibration turns feed to it; "" where no weight is
        quantised.
      block_size: weights along K that share a scale, where K allows it.
      head: precision of the head.
      overrides: weights that differ from the decoder's precision, the head apart.
      output_errors: by weight, how far its products with the calibration turns' inputs are from the unquantised
        weight's: the norm of the difference as a part of their norm. Empty without calibration turns.
      calibration: what was calibrated on.
    """

    method: str = ""
    block_size: int = 0
    head: str = ""
    overrides: tuple[WeightOverride, ...] = ()
    output_errors: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCache:
    """What was measured of one layer's keys and values, and what its cache became.

    Attributes:
      dtype: float32 or int8, of the native graph's cache.
      offset: what is kept out of the cached keys: `none`, `bias` (the key bias where it is large) or `mean` (what
        the layer's keys have in common, measured).
      largest_pair: greatest norm that two channels that rotate together have in common over all tokens, as a part of
        the norm that tokens add to a typical pair. Large ones drown the rest in an int8 row.
      errors: by option (`int8`, `int8 bias`, `int8 mean`), the relative error of the attention's output.
      reason: of the choice, in words.
    """

    dtype: str
    offset: str
    largest_pair: float
    errors: dict[str, float]
    reason: str


def kv_layer_bytes(facts: DecoderFacts, dtype: str) -> int:
    """Bytes of one layer's keys and values of one token: as float32, or as int8 codes with their scales."""
    head_bytes = {"float32": 4 * facts.head_dim, "int8": facts.head_dim + SCALE_BYTES}
    return 2 * facts.num_kv_heads * head_bytes[dtype]


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle that is not a weight."""

    schema: str
    tool: str
    source: dict[str, Any]
    decoder_facts: DecoderFacts
    vision_facts: VisionFacts
    preprocess: PreprocessConfig
    protocol: Protocol
    tokens: TokenIds
    embedding: EmbeddingTable
    vision: Component
    decoder: Component
    kv_dtypes: tuple[str, ...]  # one per layer, float32 or int8: of the native graph; the stock graph's are float32
    files: dict[str, FileFacts]
    stream: StreamDefaults = field(default_factory=StreamDefaults)
    parity: dict[str, Any] = field(default_factory=dict)
    key_offset_layers: tuple[int, ...] = ()  # whose keys are cached without their common part
    precision: WeightPrecision = field(default_factory=WeightPrecision)
    kv_layers: tuple[LayerCache, ...] = ()  # one per layer where calibration turns were measured, else none
    stored_turns: str = ""  # file of the turns that a first run is checked with, see `edge.stored_turns`; "": none

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in the native graph's KV cache: codes, scales, and the angles it was written
        with, which all layers share and only those with a key offset need.
        """
        facts = self.decoder_facts
        angle_bytes = 2 * (facts.head_dim // 2) * 4 if self.key_offset_layers else 0
        return sum(kv_layer_bytes(facts, dtype) for dtype in self.kv_dtypes) + angle_bytes

    @property
    def stock_kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in the stock graph's KV cache, which is float32 in every layer."""
        return self.decoder_facts.layers * kv_layer_bytes(self.decoder_facts, "float32")

    @property
    def max_visual_tokens(self) -> int:
        """Most visual tokens that a frame of any size can become."""
        return max(1, self.preprocess.max_pixels // self.preprocess.factor**2)


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON values, sealed with a checksum of all the others."""
    document = dataclasses.asdict(manifest)
    return {**document, CHECKSUM: checksum_of(document)}


def checksum_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, whatever their order and spacing in the file; the checksum itself is left out."""
    values = {name: value for name, value in document.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_from_json(document: Any) -> Manifest:
    """Read a manifest, checking its checksum and every field's presence and type.

    Raises:
      BundleError: another schema, altered values, or a field that is missing, unknown or of the wrong type.
    """
    if not isinstance(document, Mapping):
        raise BundleError(f"`{MANIFEST_FILE}` should hold a JSON object, found {type(document).__name__}")
    schema = document.get("schema")
    if schema != MANIFEST_SCHEMA:
        raise BundleError(
            f"`{MANIFEST_FILE}` has schema {schema!r}, this version reads {MANIFEST_SCHEMA!r}",
            hint="Export the checkpoint again with `streamo-edge export`",
        )
    expected, found = str(document.get(CHECKSUM, "none")), checksum_of(document)
    if expected != found:
        raise BundleError(
            f"`{MANIFEST_FILE}` was altered: expected checksum {expected[:12]}, found {found[:12]}",
            hint="Copy the bundle again, or export it again with `streamo-edge export`",
        )
    manifest = _read(Manifest, {name: value for name, value in document.items() if name != CHECKSUM}, "")
    return typing.cast(Manifest, manifest)


def _read(kind: Any, value: Any, where: str) -> Any:
    """Convert JSON `value` to the annotated type `kind`; `where` is the path for messages."""
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        _expect(isinstance(value, (list, tuple)), where, "a list", value)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        _expect(len(kinds) == len(value), where, f"a list of {len(kinds)} values", value)
        return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _expect(isinstance(value, Mapping), where, "an object", value)
        return {str(key): _read(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float:
        _expect(isinstance(value, (int, float)) and not isinstance(value, bool), where, "a number", value)
        return float(value)
    if origin is not None:  # int | str
        _expect(isinstance(value, (int, str)) and not isinstance(value, bool), where, "an integer or a name", value)
        return value
    _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), where, kind.__name__, value)
    return value


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, Mapping), where or MANIFEST_FILE, "an object", value)
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        _expect(name in fields, f"{where}.{name}".lstrip("."), "no such field", value[name])
    found = {}
    for name, f in fields.items():
        path = f"{where}.{name}".lstrip(".")
        if name in value:
            found[name] = _read(hints[name], value[name], path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise BundleError(f"`{MANIFEST_FILE}` lacks the field `{path}`", hint="Export the checkpoint again")
    return kind(**found)


def _expect(holds: bool, where: str, expected: str, found: Any) -> None:
    if not holds:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise BundleError(
            f"`{MANIFEST_FILE}` field `{where}`: expected {expected}, found {shown}",
            hint="Export the checkpoint again",
        )
