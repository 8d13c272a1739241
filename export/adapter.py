"""A LoRA adapter folder in PEFT's layout: which tensors of its base model it changes, and how.

Owns `adapter_config.json` and the names that PEFT, transformers and ms-swift give an adapter's tensors. What it does to
a checkpoint is `merge`'s, the arithmetic `low_rank`'s.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge.errors import CheckpointError
from export.checkpoint import ADAPTER_CONFIG_FILE as CONFIG_FILE
from export.checkpoint import named_base, parse_json
from export.fingerprint import add_file
from export.low_rank import LowRank
from export.safetensors_file import TensorEntry, read_entries

WEIGHTS_FILE = "adapter_model.safetensors"
VISION_FILE = "vit.safetensors"
"""Where ms-swift's recipe that trains the tower in full beside a LoRA of the decoder leaves the tower."""
PREFIX = "base_model.model."
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<kind>weight|bias))?"  # in between: the adapter's name, mostly left out
)
WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.(weight|bias)$)")
SAFE_INITIALIZATIONS = ("gaussian", "eva", "orthogonal")
"""Those that leave the base model's weights as they are; others train beside a changed base."""
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config "
    "megatron_config megatron_core modules_to_save peft_type peft_version r rank_pattern alpha_pattern revision "
    "runtime_config target_modules task_type use_dora use_rslora qalora_group_size ephemeral_gpu_offload "
    # ms-swift's own
    "lorap_lr_ratio lorap_emb_lr model_key_mapping lora_dtype use_merged_linear enable_lora swift_type".split()
)
"""Keys that are understood here, or that decide only how the adapter was trained. `fan_in_fan_out` concerns a kind of
layer that Qwen2.5-VL does not have; `loftq_config` and its like matter only beside `init_lora_weights`."""


@dataclass(frozen=True)
class Adapter:
    """An opened adapter. Tensors are named as its writer named the base model's.

    Args:
      updates: of a base tensor that is changed, what is added to it.
      replacements: tensors that take the place of the base model's.
    """

    folder: Path
    config_sha256: str
    weights_sha256: str
    base: str | None
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    replacements: Mapping[str, TensorEntry] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return _weight_files(self.folder)

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about the adapter."""
        return {
            "name": self.folder.resolve().name,
            "base": self.base,
            "config_sha256": self.config_sha256,
            "weights_sha256": self.weights_sha256,
            "tensors": len(self.updates) + len(self.replacements),
        }


def open_adapter(folder: Path) -> Adapter:
    """Open and check an adapter folder. Of the tensors, reads the header, and the bytes once for their hash.

    Raises:
      CheckpointError: not an adapter in PEFT's layout, of another kind than LoRA, pickled, damaged, or made with an
        option that this merge does not do.
    """
    config_bytes = _read_config(folder)
    config = _Config.of(config_bytes)
    if not (folder / WEIGHTS_FILE).is_file():
        raise _no_weights(folder)
    factors: dict[str, dict[str, TensorEntry]] = {}
    replacements: dict[str, TensorEntry] = {}
    for name, entry in read_entries(folder / WEIGHTS_FILE).items():
        _take(name.removeprefix(PREFIX), entry, factors, replacements)
    if (folder / VISION_FILE).is_file():
        for name, entry in read_entries(folder / VISION_FILE).items():
            if not FACTOR.fullmatch(name):
                replacements[WRAPPED.sub("", name.removeprefix(PREFIX))] = entry
    updates = {f"{module}.weight": _update(module, parts, config) for module, parts in factors.items()}
    if not updates and not replacements:
        raise CheckpointError(f"Adapter `{folder}` holds no tensors", hint="Copy the adapter again")
    hashes = hashlib.sha256()
    for path in _weight_files(folder):
        digest = hashlib.sha256()
        add_file(digest, path)
        hashes.update(digest.digest())
    return Adapter(
        folder,
        hashlib.sha256(config_bytes).hexdigest(),
        hashes.hexdigest(),
        named_base(folder),
        updates,
        replacements,
    )


def _weight_files(folder: Path) -> list[Path]:
    return [folder / name for name in (WEIGHTS_FILE, VISION_FILE) if (folder / name).is_file()]


def _take(
    name: str, entry: TensorEntry, factors: dict[str, dict[str, TensorEntry]], replacements: dict[str, TensorEntry]
) -> None:
    match = FACTOR.fullmatch(name)
    if match is None:
        if "token_adapter" in name or "lora_" in name:
            raise _unsupported(f"the tensor `{entry.name}`")
        replacements[WRAPPED.sub("", name)] = entry
        return
    if match["kind"] == "bias":
        raise _unsupported(f"`lora_bias` (tensor `{entry.name}`)")
    parts = factors.setdefault(match["module"], {})
    if match["part"] in parts:
        raise CheckpointError(
            f"The adapter has `{parts[match['part']].name}` and `{entry.name}`: two adapters in one file",
            hint="Save the adapter that is meant on its own, with `model.save_pretrained(folder)`",
        )
    parts[match["part"]] = entry


@dataclass(frozen=True)
class _Config:
    """What `adapter_config.json` says about ranks and scales; defaults as PEFT's own class has them."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def of(cls, content: bytes) -> _Config:
        values = parse_json(CONFIG_FILE, content)
        kind = values.get("peft_type")
        if kind != "LORA":
            raise CheckpointError(
                f"`{CONFIG_FILE}` key `peft_type`: expected 'LORA', found {kind!r}",
                hint="Merge the adapter with the library that made it, and export the merged folder",
            )
        start = values.get("init_lora_weights", True)
        if not (start is None or isinstance(start, bool) or start in SAFE_INITIALIZATIONS):
            raise _unsupported(f"`init_lora_weights` {start!r} (which changes the base model, too)")
        for key, value in values.items():
            if key not in HARMLESS and value:
                raise _unsupported(f"`{key}`")
        patterns = {}
        for key in ("rank_pattern", "alpha_pattern"):
            patterns[key] = values.get(key) or {}
            valid = isinstance(patterns[key], dict) and all(_positive(value) for value in patterns[key].values())
            _expect(valid, key, "an object of numbers above 0", patterns[key])
        r, alpha = values.get("r", 8), values.get("lora_alpha", 8)
        _expect(_positive(r) and isinstance(r, int), "r", "a whole number above 0", r)
        _expect(_positive(alpha), "lora_alpha", "a number above 0", alpha)
        return cls(r, alpha, bool(values.get("use_rslora")), bool(values.get("use_dora")), **patterns)

    def rank(self, module: str) -> int:
        return int(_matched(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return _matched(self.alpha_pattern, module, self.alpha) / (rank**0.5 if self.use_rslora else rank)


def _matched(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's name matches, from one of its dots on."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise CheckpointError(f"`{CONFIG_FILE}` has the pattern {pattern!r}, which is none") from None
    return default


def _update(module: str, parts: dict[str, TensorEntry], config: _Config) -> LowRank:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [name for name in names if name not in parts]
    magnitude = parts.get("lora_magnitude_vector")
    if config.use_dora and magnitude is None:
        missing.append("lora_magnitude_vector")
    if missing:
        raise CheckpointError(f"The adapter has no `{missing[0]}` for `{module}`", hint="Copy the adapter again")
    first, second = (parts[name] for name in names)
    rank = config.rank(module)
    if min(len(first.shape), len(second.shape)) < 2 or first.shape[0] != rank or second.shape[1] != rank:
        raise CheckpointError(
            f"The adapter's factors for `{module}` are {list(first.shape)} and {list(second.shape)}, "
            f"expected a rank of {rank} as `{CONFIG_FILE}` gives it",
            hint="Copy the adapter again: its config and its weights do not belong together",
        )
    if magnitude is not None and (embedding or len(first.shape) != 2):
        raise _unsupported(f"`use_dora` on `{module}` (which is no linear layer)")
    if embedding:
        return LowRank(first, second, config.scale(module), transposed=True)
    return LowRank(second, first, config.scale(module), magnitude)


def _read_config(folder: Path) -> bytes:
    try:
        return (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Adapter `{folder}` has no readable `{CONFIG_FILE}` ({error.strerror})",
            hint="Give a folder as PEFT's or ms-swift's `save_pretrained` writes it, for ms-swift `checkpoint-N`",
        ) from None


def _no_weights(folder: Path) -> CheckpointError:
    if (folder / "adapter_model.bin").is_file():
        return CheckpointError(
            f"`{folder / 'adapter_model.bin'}` is a pickle, which can run code when opened; expected `{WEIGHTS_FILE}`",
            hint=f'cd {folder} && python -c "import torch; from safetensors.torch import save_file; save_file({{n: '
            "t.contiguous() for n, t in torch.load('adapter_model.bin', weights_only=True).items()}, "
            f"'{WEIGHTS_FILE}')\"",
        )
    return CheckpointError(
        f"Adapter `{folder}` has no `{WEIGHTS_FILE}`",
        hint="Give a folder as PEFT's or ms-swift's `save_pretrained` writes it, for ms-swift `checkpoint-N`",
    )


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"The adapter uses {what}, which is not merged here",
        hint="Merge it with PEFT (`PeftModel.from_pretrained(base, adapter).merge_and_unload()`), save that model, "
        "and export its folder",
    )


def _expect(holds: bool, key: str, expected: str, found: object) -> None:
    if not holds:
        raise CheckpointError(f"`{CONFIG_FILE}` key `{key}`: expected {expected}, found {found!r}")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
