"""Which precision every weight gets: one for the decoder, and what differs from it, each with its reason.

Owns the names and the defaults. Does not round anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge.contract import DecoderFacts, WeightOverride
from edge.errors import UsageError
from export.tensor_names import DECODER_MAPS
from export.weight_store import BITS

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}
"""What each is called on the command line, and the dtype that is stored."""
QUANTIZED = ("int8", "int4")
KV_DTYPES = {"fp32": "float32", "int8": "int8"}
"""The same for KV caches."""
AUTO = "auto"
"""A KV cache whose layers' precisions are chosen by measuring them."""
SCALE_BITS = 32
BLOCK_SIZES = (16, 32, 64, 128, 256)
NEAREST, GPTQ = "nearest", "gptq"
METHODS = (NEAREST, GPTQ)
HEAD = "head"
BY_USER = "chosen by the user"


@dataclass(frozen=True)
class Plan:
    """The precision of every weight of a bundle.

    Attributes:
      weights: of the decoder's linear maps, a name of `PRECISIONS`.
      block: weights along K that share a scale in int8 and int4.
      method: `nearest` or `gptq`, for the decoder's maps in int8 and int4.
      vision, embedding, head: of the tower's maps, the embedding table and the head.
      overrides: weights that differ from `weights`, by name.
    """

    weights: str
    block: int
    method: str
    vision: str
    embedding: str
    head: str
    overrides: Mapping[str, WeightOverride]

    def precision(self, name: str) -> str:
        """Of the decoder's map `name`, such as layers.3.down."""
        return self.overrides[name].weights if name in self.overrides else self.weights

    def dtype(self, name: str) -> str:
        """The dtype that the decoder's map `name` is stored in."""
        return PRECISIONS[self.precision(name)]

    @property
    def quantized(self) -> bool:
        """Whether any of the decoder's maps is."""
        return self.weights in QUANTIZED or any(o.weights in QUANTIZED for o in self.overrides.values())

    @property
    def coarsest(self) -> str:
        """The precision with the fewest bits of any weight of the bundle: what its errors are judged by."""
        every = {self.weights, self.vision, self.embedding, self.head, *(o.weights for o in self.overrides.values())}
        return max(every, key=list(PRECISIONS).index)

    @property
    def rounded(self) -> bool:
        """Whether any weight of the bundle has 8 bits or fewer."""
        return self.coarsest in QUANTIZED

    def replaced(self, *overrides: WeightOverride) -> Plan:
        """The plan with more overrides."""
        return replace(self, overrides={**self.overrides, **{o.name: o for o in overrides}})


def value_bytes(precision: str, block: int) -> float:
    """Bytes that a weight takes, its part of the scale of its block counted."""
    scale_bits = SCALE_BITS / block if precision in QUANTIZED else 0
    return (BITS[PRECISIONS[precision]] + scale_bits) / 8


def make_plan(
    weights: str,
    *,
    block: int = 32,
    method: str = NEAREST,
    vision: str | None = None,
    embedding: str | None = None,
    layers: Mapping[str, str] | None = None,
    facts: DecoderFacts,
) -> Plan:
    """The plan for one export.

    Args:
      vision: None: int8 beside int8 and int4, else as `weights`.
      embedding: None: int8 beside int8 and int4, else as `weights`.
      layers: the user's own choices by name: layers.3.down, layers.3 for all maps of a layer, or head.

    Raises:
      UsageError: an unknown precision, method, block size or name.
    """
    _check("Weights", weights, PRECISIONS)
    _check("Method", method, METHODS)
    if block not in BLOCK_SIZES:
        raise UsageError(f"Block size {block}: expected one of {', '.join(map(str, BLOCK_SIZES))}")
    quantized = weights in QUANTIZED
    vision = vision or ("int8" if quantized else weights)
    embedding = embedding or ("int8" if quantized else weights)
    _check("Vision tower", vision, ("fp32", "fp16", "int8"))
    _check("Embedding table", embedding, ("fp32", "fp16", "int8"))
    head, overrides = "int8" if quantized else weights, {}
    for name, precision in (layers or {}).items():
        _check(f"Weights of `{name}`", precision, PRECISIONS)
        if name == HEAD:
            _check("Weights of the head", precision, ("fp32", "fp16", "int8"))
            head = precision
            continue
        for full in _maps(name, facts):
            overrides[full] = WeightOverride(full, precision, BY_USER)
    return Plan(weights, block, method if quantized or overrides else NEAREST, vision, embedding, head, overrides)


def _maps(name: str, facts: DecoderFacts) -> list[str]:
    """The maps that a user's name means."""
    group, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    known = group == "layers" and layer.isdigit() and int(layer) < facts.layers and part in ("", *DECODER_MAPS)
    if not known:
        raise UsageError(
            f"There is no weight `{name}`: expected `layers.N` or `layers.N.PART` with N below {facts.layers} and PART "
            f"one of {', '.join(DECODER_MAPS)}, or `{HEAD}`"
        )
    prefix = f"layers.{int(layer)}."
    return [prefix + part] if part else [prefix + each for each in DECODER_MAPS]


def _check(what: str, value: str, allowed: object) -> None:
    names = list(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise UsageError(f"{what} {value!r}: expected one of {', '.join(names)}")
