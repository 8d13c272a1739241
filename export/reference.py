"""The checkpoint in PyTorch, as transformers runs it, with the weights of one layer in memory at a time.

Owns the loading of weights into transformers' own modules as its forward reaches them. torch and transformers are
imported here and nowhere else in this package.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

from edge.errors import CheckpointError, UsageError
from export.checkpoint import TEXT, VISUAL, Checkpoint
from export.memory import release_freed_memory

PIECE_VALUES = 4 << 20
OLDEST = "4.52"
"""The first transformers whose model keeps the vision tower and the decoder under one class."""


class Reference:
    """transformers' Qwen2.5-VL over a checkpoint's tensors, float32.

    Raises:
      UsageError: torch or transformers is not installed, or too old.
      CheckpointError: transformers does not take the config.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._torch = torch = _require("torch")
        modeling = _require("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
        transformers = _require("transformers")
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, float32"
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
        text.rotary_emb = modeling.Qwen2_5_VLRotaryEmbedding(config.text_config)
        head_dim = checkpoint.facts.vision.head_dim
        vision.rotary_pos_emb = modeling.Qwen2_5_VisionRotaryEmbedding(head_dim // 2)
        for module, prefix in (
            (vision.patch_embed, VISUAL + "patch_embed."),
            *((block, f"{VISUAL}blocks.{i}.") for i, block in enumerate(vision.blocks)),
            (vision.merger, VISUAL + "merger."),
            *((layer, f"{TEXT}layers.{i}.") for i, layer in enumerate(text.layers)),
            (text.norm, TEXT + "norm."),
        ):
            self._load_when_called(module, prefix)

    def vision(self, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
        """Embeddings (N, W) float32 of one frame of rows x columns patches, given without their time axis."""
        torch = self._torch
        slices = self._checkpoint.facts.temporal_patch_size
        pixels = np.repeat(patches.reshape(len(patches), 3, 1, -1), slices, axis=2).reshape(len(patches), -1)
        with torch.inference_mode():
            embeds = self._model.visual(torch.from_numpy(pixels), grid_thw=torch.tensor([[1, rows, columns]]))
        return np.asarray(embeds.numpy())

    def positions(self, ids: np.ndarray, grids: list[tuple[int, int]]) -> np.ndarray:
        """m-RoPE positions (3, T) of a whole conversation whose frames have these grids of patches."""
        torch = self._torch
        grid = torch.tensor([[1, rows, columns] for rows, columns in grids])
        positions, _ = self._model.get_rope_index(torch.from_numpy(ids)[None], grid)
        return np.asarray(positions[:, 0].numpy())

    def hidden(self, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Final hidden states (T, W) float32 of a whole conversation, computed in one pass."""
        torch = self._torch
        with torch.inference_mode():
            states = self._model.language_model(
                inputs_embeds=torch.from_numpy(embeds)[None],
                position_ids=torch.from_numpy(positions)[:, None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
                use_cache=False,
            ).last_hidden_state
        return np.asarray(states[0].numpy())

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits (n, V) of hidden states (n, W)."""
        torch = self._torch
        states = torch.from_numpy(np.ascontiguousarray(hidden))
        pieces = self._checkpoint.head_rows(max(1, PIECE_VALUES // hidden.shape[1]))
        return np.concatenate([(states @ torch.from_numpy(rows).T).numpy() for rows in pieces], axis=1)

    def _load_when_called(self, module: Any, prefix: str) -> None:
        names = [name for name, _ in module.named_parameters()]

        def load(*_: object) -> None:
            tensors = {name: self._torch.from_numpy(self._checkpoint.read(prefix + name)) for name in names}
            module.load_state_dict(tensors, strict=True, assign=True)

        def unload(*_: object) -> None:
            module.to("meta")
            release_freed_memory()

        module.register_forward_pre_hook(load)
        module.register_forward_hook(unload)


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
