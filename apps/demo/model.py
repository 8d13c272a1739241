"""A fast training forward over the parameters of transformers' Qwen2.5-VL, for many equal-sized frames at once.

Owns the arithmetic: matrices multiply in `compute` dtype, norms, residuals and losses stay in float32. Reads the
parameters of a `Qwen2_5_VLForConditionalGeneration` and gives the same numbers. Knows nothing of streams or losses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.demo.checkpoint import TEXT, VISION
from edge.preprocess import CLIP_MEAN, CLIP_STD

GRID = (6, 10)  # patches of a 140 x 84 frame
MERGED = (3, 5)
VISUAL_TOKENS = MERGED[0] * MERGED[1]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_LAYERS, _HEADS, _KV_HEADS = TEXT["num_hidden_layers"], TEXT["num_attention_heads"], TEXT["num_key_value_heads"]
_HEAD_DIM = TEXT["hidden_size"] // _HEADS
_EPS = 1e-6


def patches_of(frames: Tensor) -> Tensor:
    """Normalised patches in the processor's order, one copy in time.

    Args:
      frames: (N, 84, 140, 3) uint8.

    Returns:
      (N, 60, 588) float32.
    """
    mean = torch.tensor(CLIP_MEAN) * 255
    std = torch.tensor(CLIP_STD) * 255
    pixels = (frames.float() - mean) / std
    blocks = pixels.view(-1, MERGED[0], 2, 14, MERGED[1], 2, 14, 3)
    return blocks.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, GRID[0] * GRID[1], 588)


def _vision_layout() -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines (60, 32) of the 2-D rotary embedding and the window mask (60, 60), in merge order."""
    rows = torch.arange(GRID[0])[:, None].expand(*GRID)
    columns = torch.arange(GRID[1])[None, :].expand(*GRID)
    order = [grid.reshape(MERGED[0], 2, MERGED[1], 2).permute(0, 2, 1, 3).reshape(-1) for grid in (rows, columns)]
    head_dim = VISION["hidden_size"] // VISION["num_heads"]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = torch.cat([order[0][:, None] * frequencies, order[1][:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    side = VISION["window_size"] // VISION["patch_size"]
    window = (order[0] // side) * 100 + order[1] // side
    return angles.cos(), angles.sin(), window[:, None] == window[None, :]


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def text_rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """m-RoPE cosines and sines.

    Args:
      positions: (3, B, S) integer: time, height, width.

    Returns:
      Two (B, S, 64) float32 tensors.
    """
    frequencies = 1.0 / TEXT["rope_theta"] ** (torch.arange(0, _HEAD_DIM, 2).float() / _HEAD_DIM)
    sections = TEXT["rope_scaling"]["mrope_section"]
    angles = positions.float()[..., None] * frequencies  # (3, B, S, 32)
    parts = angles.split(sections, dim=-1)
    chosen = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    chosen = torch.cat([chosen, chosen], dim=-1)
    return chosen.cos(), chosen.sin()


_VISION_PARTS = (
    "norm1.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm2.weight",
    "mlp.gate_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight",
    "mlp.down_proj.bias",
)  # fmt: skip
_TEXT_PARTS = (
    "input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.k_proj.weight",
    "self_attn.k_proj.bias", "self_attn.v_proj.weight", "self_attn.v_proj.bias", "self_attn.o_proj.weight",
    "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
)  # fmt: skip


def vision_layer(
    x, cos, sin, bias, norm1, qkv, qkv_bias, proj, proj_bias, norm2, gate, gate_bias, up, up_bias, down, down_bias
):
    """One block of the vision tower: x (N, 60, hidden) float32; products in the dtype of `cos`."""
    count, length, hidden = x.shape
    heads, dtype = VISION["num_heads"], cos.dtype
    mixed = F.linear(_rms_norm(x, norm1).to(dtype), qkv.to(dtype), qkv_bias.to(dtype))
    q, k, v = mixed.view(count, length, 3, heads, hidden // heads).permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    scores = (q @ k.transpose(-1, -2)).float() * (hidden // heads) ** -0.5 + bias
    mixed = (scores.softmax(-1).to(dtype) @ v).transpose(1, 2).reshape(count, length, hidden)
    x = x + F.linear(mixed, proj.to(dtype), proj_bias.to(dtype)).float()
    normed = _rms_norm(x, norm2).to(dtype)
    wide = F.silu(F.linear(normed, gate.to(dtype), gate_bias.to(dtype)))
    wide = wide * F.linear(normed, up.to(dtype), up_bias.to(dtype))
    return x + F.linear(wide, down.to(dtype), down_bias.to(dtype)).float()


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, heads, S, 64), k and v (B, kv heads, S, 64) to (B, heads, S, 64)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def before_attention(x, cos, sin, norm1, q, q_bias, k, k_bias, v, v_bias):
    """First half of a decoder layer: x (B, S, hidden) float32 to rotated q, rotated k, and v."""
    batch, length, _ = x.shape
    dtype = cos.dtype
    weight, bias = torch.cat([q, k, v]).to(dtype), torch.cat([q_bias, k_bias, v_bias]).to(dtype)
    heads = F.linear(_rms_norm(x, norm1).to(dtype), weight, bias).view(batch, length, -1, _HEAD_DIM).transpose(1, 2)
    rotated = _rotate(heads[:, : _HEADS + _KV_HEADS], cos, sin)
    return rotated[:, :_HEADS], rotated[:, _HEADS:], heads[:, _HEADS + _KV_HEADS :]


def after_attention(x, mixed, o, norm2, gate, up, down):
    """Second half of a decoder layer: what attention mixed (B, heads, S, 64), then the feed-forward part."""
    batch, length, _ = x.shape
    dtype = mixed.dtype
    x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), o.to(dtype)).float()
    normed = _rms_norm(x, norm2).to(dtype)
    first, second = F.linear(normed, torch.cat([gate, up]).to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(first) * second, down.to(dtype)).float()


class FastModel:
    """The forward of one set of parameters, by transformers' names."""

    def __init__(self, parameters: dict[str, Tensor], compute: torch.dtype = torch.bfloat16) -> None:
        self.parameters, self.compute = parameters, compute
        cos, sin, window = _vision_layout()
        self._vision_cos, self._vision_sin = cos.to(compute), sin.to(compute)
        self._window_bias = torch.zeros(window.shape).masked_fill(~window, float("-inf")).to(compute)
        self._no_bias = torch.zeros_like(self._window_bias)
        # Kept as attributes so that training can put compiled versions in their place.
        self.vision_layer = vision_layer
        self.before_attention, self.after_attention = before_attention, after_attention

    def _weights(self, name: str, parts: tuple[str, ...]) -> list[Tensor]:
        return [self.parameters[f"{name}.{part}"] for part in parts]

    def _matrix(self, name: str) -> Tensor:
        return self.parameters[name].to(self.compute)

    def _linear(self, x: Tensor, name: str, bias: bool = True) -> Tensor:
        return F.linear(x, self._matrix(f"{name}.weight"), self._matrix(f"{name}.bias") if bias else None)

    def vision_blocks(self, frames: Tensor) -> Tensor:
        """The tower without its merger: (N, 84, 140, 3) uint8 to (N, 60, hidden) float32."""
        kernel = self.parameters["model.visual.patch_embed.proj.weight"]
        folded = kernel.sum(dim=2).reshape(kernel.shape[0], -1).to(self.compute)  # both frames of the pair are equal
        x = F.linear(patches_of(frames).to(self.compute), folded).float()
        for index in range(VISION["depth"]):
            full = index in VISION["fullatt_block_indexes"]
            weights = self._weights(f"model.visual.blocks.{index}", _VISION_PARTS)
            x = self.vision_layer(
                x, self._vision_cos, self._vision_sin, self._no_bias if full else self._window_bias, *weights
            )
        return x

    def merge(self, x: Tensor) -> Tensor:
        """The merger: (N, 60, hidden) to (N, 15, text hidden) float32."""
        name = "model.visual.merger"
        normed = _rms_norm(x, self.parameters[f"{name}.ln_q.weight"]).to(self.compute)
        wide = F.gelu(self._linear(normed.reshape(x.shape[0], VISUAL_TOKENS, -1), f"{name}.mlp.0"))
        return self._linear(wide, f"{name}.mlp.2").float()

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `text_rotary`."""
        return text_rotary(positions)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (..., 256) float32."""
        return F.embedding(ids, self.parameters["model.language_model.embed_tokens.weight"])

    def text(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], probe_layer: int = -1, attend: Attend | None = None
    ) -> tuple[Tensor, Tensor]:
        """The decoder over whole sequences.

        Args:
          x: (B, S, 256) float32 input embeddings.
          rotary: cosines and sines (B, S, 64).
          probe_layer: whose output is returned besides the last.
          attend: (layer, q, k, v) -> mixed, in place of causal attention over the sequence.

        Returns:
          (normalised last hidden states, hidden states after `probe_layer`), float32.
        """
        cos, sin = (part.to(self.compute)[:, None] for part in rotary)
        probe = x
        for index in range(_LAYERS):
            weights = self._weights(f"model.language_model.layers.{index}", _TEXT_PARTS)
            q, k, v = self.before_attention(x, cos, sin, *weights[:7])
            mixed = causal_attention(q, k, v) if attend is None else attend(index, q, k, v)
            x = self.after_attention(x, mixed, *weights[7:])
            if index == probe_layer:
                probe = x
        return _rms_norm(x, self.parameters["model.language_model.norm.weight"]), probe

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (..., vocabulary rows) float32 of normalised hidden states."""
        return self._linear_head(hidden.to(self.compute)).float()

    def _linear_head(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self._matrix("model.language_model.embed_tokens.weight"))


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters of transformers' model by name, without the tied head."""
    return {name: value for name, value in model.named_parameters() if name != "lm_head.weight"}
