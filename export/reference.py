"""The checkpoint in PyTorch, as transformers runs it, with the weights of one layer in memory at a time.

Owns the loading of weights into transformers' own modules when they are reached, and the way of several conversations
through the decoder's layers, so that each is read once. torch and transformers are imported here and nowhere else in
this package.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from edge.errors import CheckpointError, UsageError
from export.checkpoint import Checkpoint
from export.memory import release_freed_memory
from export.tensor_names import TEXT, VISUAL
from export.vision import EPSILON as VISION_EPSILON

PIECE_VALUES = 4 << 20
FRAMES_AT_A_TIME = 32
OLDEST = "4.52"
"""The first transformers whose model keeps the vision tower and the decoder under one class."""


class Reference:
    """transformers' Qwen2.5-VL over a checkpoint's tensors.

    Args:
      dtype: of weights and activations: float32, or bfloat16, whose own error is a yardstick.

    Raises:
      UsageError: torch or transformers is not installed, or too old.
      CheckpointError: transformers does not take the config.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "float32") -> None:
        self._torch = torch = _require("torch")
        modeling = _require("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
        transformers = _require("transformers")
        versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
        self.version = f"{versions}, {dtype}, angles in float64, one layer in memory at a time"
        self._dtype = getattr(torch, dtype)
        if not hasattr(modeling.Qwen2_5_VLModel, "get_rope_index"):
            raise UsageError(
                f"The parity check needs transformers {OLDEST} or newer, found {transformers.__version__}",
                hint="In the checkout: pip install '.[export]'",
            )
        self._checkpoint = checkpoint
        try:
            config = transformers.Qwen2_5_VLConfig.from_pretrained(str(checkpoint.folder), local_files_only=True)
            with torch.device("meta"):
                self._model = modeling.Qwen2_5_VLModel(config).eval()
        except Exception as error:  # noqa: BLE001 - it raises whatever a value it did not expect leads to
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot build a model from `config.json`: {error!r:.300}",
                hint="Check that the folder is a Qwen2.5-VL checkpoint saved by transformers",
            ) from None
        text, vision = self._model.language_model, self._model.visual
        # Tables that follow from the config have no tensors in the checkpoint.
        self._rotary = modeling.Qwen2_5_VLRotaryEmbedding(config.text_config)
        text.rotary_emb = _exact_rotary(torch, self._rotary)
        head_dim = checkpoint.facts.vision.head_dim
        vision.rotary_pos_emb = modeling.Qwen2_5_VisionRotaryEmbedding(head_dim // 2)
        for module, prefix in (
            (vision.patch_embed, VISUAL + "patch_embed."),
            *((block, f"{VISUAL}blocks.{i}.") for i, block in enumerate(vision.blocks)),
            (vision.merger, VISUAL + "merger."),
            (text.norm, TEXT + "norm."),
        ):
            self._load_when_called(module, prefix)

    def config_problems(self) -> list[str]:
        """Where transformers reads the config otherwise than we do: epsilons, positions, shapes of attention."""
        facts, text = self._checkpoint.facts, self._model.language_model
        attention, visual = text.layers[0].self_attn, self._model.visual
        frequencies = facts.decoder.rope_theta ** (-np.arange(0, facts.decoder.head_dim, 2) / facts.decoder.head_dim)
        pairs = {
            "rms_norm_eps": (facts.decoder.rms_norm_eps, _epsilon(text)),
            "the vision tower's epsilon": (VISION_EPSILON, _epsilon(visual)),
            "mrope_section": (list(facts.decoder.mrope_section), list(attention.rope_scaling["mrope_section"])),
            "rotary frequencies": (frequencies.astype(np.float32).tolist(), self._rotary.inv_freq.tolist()),
            "attention heads": (facts.decoder.num_heads, attention.num_heads),
            "key/value heads": (facts.decoder.num_kv_heads, attention.num_key_value_heads),
            "window_size": (facts.vision.window_size, visual.window_size),
            "fullatt_block_indexes": (list(facts.vision.full_attention_blocks), list(visual.fullatt_block_indexes)),
        }
        return [
            f"`config.json`: {name} is read as {_short(ours)}, transformers reads {_short(theirs)}"
            for name, (ours, theirs) in pairs.items()
            if not _same(ours, theirs)
        ]

    def vision(self, frames: Sequence[tuple[np.ndarray, int, int]]) -> list[np.ndarray]:
        """Embeddings (N, W) float32 of frames of rows x columns patches, given without their time axis."""
        torch, found = self._torch, []
        slices = self._checkpoint.facts.temporal_patch_size
        for first in range(0, len(frames), FRAMES_AT_A_TIME):
            some = frames[first : first + FRAMES_AT_A_TIME]
            patches = np.concatenate([patches for patches, _, _ in some])
            pixels = np.repeat(patches.reshape(len(patches), 3, 1, -1), slices, axis=2).reshape(len(patches), -1)
            grid = torch.tensor([[1, rows, columns] for _, rows, columns in some])
            with torch.inference_mode():
                embeds = self._model.visual(torch.from_numpy(pixels).to(self._dtype), grid_thw=grid)
            ends = np.cumsum([rows * columns // self._checkpoint.facts.merge_size**2 for _, rows, columns in some])
            found += np.split(np.asarray(embeds.float().numpy()), ends[:-1])
        return found

    def positions(self, ids: np.ndarray, grids: list[tuple[int, int]]) -> np.ndarray:
        """m-RoPE positions (3, T) of a whole conversation whose frames have these grids of patches."""
        torch = self._torch
        grid = torch.tensor([[1, rows, columns] for rows, columns in grids])
        positions, _ = self._model.get_rope_index(torch.from_numpy(ids)[None], grid)
        return np.asarray(positions[:, 0].numpy())

    def hidden(self, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Final hidden states (T, W) float32 of whole conversations, each computed in one pass.

        Args:
          sequences: embeddings (T, W) and m-RoPE positions (3, T) of each.
        """
        return self.hidden_and_layers(sequences, ())[0]

    def hidden_and_layers(
        self, sequences: Sequence[tuple[np.ndarray, np.ndarray]], layers: Collection[int]
    ) -> tuple[list[np.ndarray], dict[int, list[tuple[np.ndarray, np.ndarray]]]]:
        """`hidden`, and what goes into each of `layers` and comes out of it, (T, W) float32 both, by conversation."""
        states, positions = [embeds for embeds, _ in sequences], [places for _, places in sequences]
        kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for layer in range(self._checkpoint.facts.decoder.layers):
            given, states = states, self.layer(layer, list(zip(states, positions, strict=True)))
            if layer in layers:
                kept[layer] = list(zip(given, states, strict=True))
        return [self.final_norm(rows) for rows in states], kept

    def layer(self, layer: int, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """What one layer makes of hidden states (T, W) at m-RoPE positions (3, T), of each: (T, W) float32.

        Its weights are read once for all.
        """
        torch, text, found = self._torch, self._model.language_model, []
        module = text.layers[layer]
        self._load(module, f"{TEXT}layers.{layer}.")
        for hidden, positions in sequences:
            with torch.inference_mode():
                states = torch.from_numpy(hidden[None]).to(self._dtype)
                tables = text.rotary_emb(states, torch.from_numpy(positions[:, None]))
                result = module(states, attention_mask=None, position_embeddings=tables)  # no mask: causal
            result = result[0] if isinstance(result, tuple) else result
            found.append(np.asarray(result[0].float().numpy()))
        self._unload(module)
        return found

    def final_norm(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states (n, W) of the last layer, as `logits` takes them."""
        with self._torch.inference_mode():
            states = self._torch.from_numpy(np.ascontiguousarray(hidden)).to(self._dtype)
            return np.asarray(self._model.language_model.norm(states).float().numpy())

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (n, V) of hidden states (n, W)."""
        torch = self._torch
        states = torch.from_numpy(np.ascontiguousarray(hidden)).to(self._dtype)
        pieces = self._checkpoint.head_rows(max(1, PIECE_VALUES // hidden.shape[1]))
        return np.concatenate([(states @ self._tensor(rows).T).float().numpy() for rows in pieces], axis=1)

    def _tensor(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(values).to(self._dtype)

    def _load_when_called(self, module: Any, prefix: str) -> None:
        module.register_forward_pre_hook(lambda *_: self._load(module, prefix))
        module.register_forward_hook(lambda *_: self._unload(module))

    def _load(self, module: Any, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]
        tensors = {name: self._tensor(self._checkpoint.read(prefix + name)) for name in names}
        module.load_state_dict(tensors, strict=True, assign=True)

    def _unload(self, module: Any) -> None:
        module.to("meta")
        release_freed_memory()


def _exact_rotary(torch: Any, rotary: Any) -> Any:
    """transformers' angles, in double. Its own are off by 1e-4 at position 1,000, which a large key bias magnifies."""
    half = len(rotary.inv_freq)
    theta = float(rotary.config.rope_theta)
    frequencies = torch.arange(half, dtype=torch.float64)
    frequencies = theta ** (-frequencies / half)

    def tables(values: Any, position_ids: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].double() * frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(values.dtype), both.sin().to(values.dtype)

    module = torch.nn.Module()
    module.forward = tables
    return module


def _epsilon(model: Any) -> float | list[float]:
    """The one of all norms in a model; all of them where they differ."""
    found = sorted(
        {float(module.variance_epsilon) for module in model.modules() if hasattr(module, "variance_epsilon")}
    )
    return found[0] if len(found) == 1 else found


def _same(one: Any, other: Any) -> bool:
    return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-5, atol=0))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_packages() -> None:
    """Fail early, and without importing them, where torch or transformers is missing.

    Raises:
      UsageError: one of them is not installed.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(name) from None


def _missing(name: str) -> UsageError:
    return UsageError(
        f"The parity check needs `{name.partition('.')[0]}`, which is not installed",
        hint="In the checkout: pip install '.[export]'",
    )
