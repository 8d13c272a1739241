"""Each layer's cache is chosen by its keys and values: an offset where they share a lot, floats where int8 fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from edge import native
from edge.contract import DecoderFacts
from edge.rope import decoder_rope, text_positions
from export.api import export_checkpoint
from export.kv_choice import LayerKeys, choose_cache, measured_offset, output_error, rounded_rows
from export.turns import Clip

FACTS = DecoderFacts(1, 256, 512, 4, 2, 64, 320, 1e-6, 1e6, (8, 12, 12), True)
TOKENS = 400


def layer(common: float = 0.0, *, seed: int = 0) -> tuple[LayerKeys, np.ndarray]:
    """Unit-variance queries, keys and values; `common` is the norm of a bias in four key channels. And that bias."""
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((TOKENS, 8 * 64)).astype(np.float32)
    bias = np.zeros((2, 64), np.float32)
    bias[:, [3, 9, 20, 31]] = common / 2
    qkv[:, 4 * 64 : 6 * 64] += bias.reshape(-1)
    return LayerKeys(FACTS, [qkv], [decoder_rope(FACTS).tables(text_positions(0, TOKENS))]), bias


def test_keys_without_a_common_part_need_no_offset() -> None:
    keys, _ = layer()
    cache, offset = choose_cache(keys, None, "auto")
    assert (cache.dtype, cache.offset) == ("int8", "none") and offset is None
    assert cache.largest_pair < 1 and cache.errors["int8"] < 0.03


def test_a_huge_common_part_is_measured_and_kept_out() -> None:
    keys, bias = layer(600.0)
    cache, offset = choose_cache(keys, None, "auto")
    assert (cache.dtype, cache.offset) == ("int8", "mean") and offset is not None
    assert cache.errors["int8"] > 10 * cache.errors["int8 mean"] and cache.largest_pair > 100
    np.testing.assert_allclose(offset[bias != 0], bias[bias != 0], rtol=0.01)


def test_the_bias_is_preferred_to_the_mean_where_they_do_as_well() -> None:
    keys, bias = layer(600.0)
    cache, offset = choose_cache(keys, bias, "auto")
    assert cache.offset == "bias" and offset is bias and set(cache.errors) == {"int8", "int8 bias", "int8 mean"}
    wrong = np.zeros_like(bias)
    wrong[:, 5] = 50.0
    assert choose_cache(keys, wrong, "auto")[0].offset == "mean"


def test_a_layer_that_int8_would_spoil_keeps_floats_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys, _ = layer()
    monkeypatch.setattr("export.kv_choice.FLOAT_ABOVE", 1e-4)
    cache, _ = choose_cache(keys, None, "auto")
    assert cache.dtype == "float32" and "above" in cache.reason
    assert choose_cache(keys, None, "int8")[0].dtype == "int8"
    assert choose_cache(keys, None, "fp32")[0].reason == "chosen by the user"


@pytest.mark.skipif(native.available() is not None, reason="the native kernels are not built")
@pytest.mark.parametrize("common", [0.0, 600.0])
def test_the_measured_error_is_that_of_the_kernel(common: float) -> None:
    keys, _ = layer(common)
    (qkv,), ((cos, sin),) = keys.qkv, keys.tables
    _, mean = measured_offset(keys)
    offsets = [None] if mean is None else [None, mean]
    bias, run = np.zeros(8 * 64, np.float32), (np.ones((1, 32), np.float32), np.zeros((1, 32), np.float32))

    def attend(caches: list[np.ndarray], **options: Any) -> np.ndarray:
        def call(first: int, last: int, spans: list[tuple[int, int, int]]) -> np.ndarray:
            slots, table = np.arange(first, last, dtype=np.int32), np.array(spans, np.int32).reshape(-1, 3)
            part = (qkv[first:last], cos[first:last], sin[first:last], *caches[:2], slots, table, *run)
            return native.attention(*part, qkv_bias=bias, query_heads=4, **options)

        call(0, TOKENS - 1, [])
        return call(TOKENS - 1, TOKENS, [(0, TOKENS - 1, 0)])

    floats = [np.zeros((2, TOKENS, 64), np.float32) for _ in range(2)]
    exact = attend(floats)
    for offset in offsets:
        codes = [np.zeros((2, TOKENS, 64), np.int8) for _ in range(2)]
        scales = {name: np.zeros((2, TOKENS), np.float32) for name in ("key_scales", "value_scales")}
        more = {} if offset is None else {"key_offset": offset, "slot_cos": cos, "slot_sin": sin}
        found = attend(codes, **scales, **more)
        measured = output_error(LayerKeys(FACTS, [qkv], keys.tables), offset)
        error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        assert 0.2 * measured < error < 5 * measured  # one query here, many there


def test_rounded_rows_are_at_most_half_a_step_away() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 5, 16)).astype(np.float32)
    rows[0, 0] = 0
    steps = np.abs(rows).max(axis=-1, keepdims=True) / 127
    assert (np.abs(rounded_rows(rows) - rows) <= steps * 0.5001).all()


def test_in_a_model_with_a_huge_key_bias_the_offset_is_taken_there_and_nowhere_else(tmp_path: Any) -> None:
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 1, "head_dim": 64, "layers": 3, "intermediate_size": 256}
    write_checkpoint(tmp_path / "checkpoint", key_bias_norm=605.0, **shape)
    rng = np.random.default_rng(0)
    clip = Clip("noise", [rng.integers(0, 256, (84, 84, 3)).astype(np.uint8) for _ in range(6)], {0: "What?"}, False)
    # transformers' angles in float32 are not exact enough for such a bias.
    manifest = export_checkpoint(
        tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", clips=[clip], allow_mismatch=True
    )
    assert [layer.offset for layer in manifest.kv_layers] == ["bias", "none", "bias"]
    assert manifest.key_offset_layers == (0, 2) and manifest.kv_dtypes == ("int8",) * 3
    first, middle, _ = manifest.kv_layers
    assert first.largest_pair > 50 > middle.largest_pair and first.errors["int8 bias"] < 0.2 * first.errors["int8"]
