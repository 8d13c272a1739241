"""The attention kernels: every instruction set against the oracle, and the oracle against code that is not ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FLOAT_NMSE,
    INT8_NMSE,
    available_sets,
    biases,
    cached_rows,
    instruction_set,
    needs_kernels,
    new_rows,
    nmse,
    numpy_attention,
    softmax,
)

from apps.bench.kernel_cases import (
    AttentionCase,
    AttentionData,
    Piece,
    angles,
    attention_cases,
    attention_data,
    offset_cases,
    quantise_rows,
    rotate,
)
from edge import native

pytestmark = needs_kernels
CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")


def run(data: AttentionData, threads: native.Threads | None = None) -> np.ndarray:
    return native.attention(**data.arguments(), threads=threads)


def reference(data: AttentionData) -> np.ndarray:
    return native.attention_reference(**data.arguments())


def same_cache(left: AttentionData, right: AttentionData) -> bool:
    pairs = [(getattr(left, name), getattr(right, name)) for name in CACHES]
    return all(a is b is None or a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.name)
def test_every_instruction_set_agrees_with_the_oracle(case: AttentionCase):
    before = attention_data(case)
    oracle = before.fresh()
    expected = reference(oracle)
    limit = FLOAT_NMSE if case.kv == "float32" else INT8_NMSE
    for name in available_sets():
        data = before.fresh()
        with instruction_set(name):
            found = run(data)
        assert nmse(found, expected) <= limit, name
        assert same_cache(data, oracle), f"{name} wrote another cache than the oracle"


@pytest.mark.parametrize("case", attention_cases(), ids=lambda case: case.name)
def test_the_oracle_does_what_the_maths_says(case: AttentionCase):
    before = attention_data(case, seed=1)
    after = before.fresh()
    found = reference(after)
    assert nmse(found, numpy_attention(before, after)) <= 1e-11


@pytest.mark.parametrize("case", attention_cases()[::5] + offset_cases(), ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case: AttentionCase):
    before = attention_data(case, seed=2)
    alone = before.fresh()
    expected = run(alone)
    for count in (2, 3):
        data = before.fresh()
        with native.Threads(count) as threads:
            assert run(data, threads).tobytes() == expected.tobytes()
        assert same_cache(data, alone)


@pytest.mark.parametrize(("kv", "offset"), [("float32", False), ("int8", False), ("int8", True)])
def test_appending_rounds_exactly_as_numpy_does(kv: str, offset: bool):
    case = AttentionCase("append", 4, 2, 64, 33, (Piece(10),), kv=kv, key_bias=50 * offset, offset=offset)
    before = attention_data(case, seed=3)
    before.qkv[5] = 0
    if before.qkv_bias is not None and not offset:
        before.qkv_bias[:] = 0  # so that token 5 is a row of zeros
    data = before.fresh()
    run(data)
    keys, values = _appended(before)
    slots = before.new_slots
    if kv == "float32":
        np.testing.assert_array_equal(data.key_cache[:, slots], keys)
        np.testing.assert_array_equal(data.value_cache[:, slots], values)
    else:
        assert data.key_scales is not None and data.value_scales is not None
        written = ((keys, data.key_cache, data.key_scales), (values, data.value_cache, data.value_scales))
        for rows, cache, scales in written:
            codes, expected_scales = quantise_rows(rows)
            np.testing.assert_array_equal(scales[:, slots], expected_scales)
            np.testing.assert_array_equal(cache[:, slots], codes)
    others = np.setdiff1d(np.arange(case.capacity), slots)
    for name in CACHES:
        if (array := getattr(data, name)) is not None:
            np.testing.assert_array_equal(array[:, others], getattr(before, name)[:, others])


def _appended(data: AttentionData) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (Hkv, T, D) float32 before rounding to codes, each step in float32 and in the header's order."""
    case = data.case
    rows = data.qkv.reshape(case.new_tokens, -1, case.head_dim).swapaxes(0, 1)[case.query_heads :]
    assert data.qkv_bias is not None
    bias = data.qkv_bias.reshape(-1, 1, case.head_dim)[case.query_heads :]
    keys, values = rows[: case.kv_heads] + bias[: case.kv_heads], rows[case.kv_heads :]
    if data.key_offset is not None:
        keys = keys - data.key_offset[:, None]
    if case.kv == "float32":
        values = values + bias[case.kv_heads :]
    return rotate(keys, data.rope_cos, data.rope_sin), values


def _stock_attention(data: AttentionData) -> np.ndarray:
    """ONNX Runtime's GroupQueryAttention over the same rows, all of them turned by numpy to where they now stand."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    case = data.case
    keys, values, _, runs = cached_rows(data)
    shifts = np.asarray(case.shifts)[runs] if len(runs) else np.zeros(0)
    keys = rotate(keys, *(table[:, None] for table in angles(-shifts, case.head_dim)))
    queries, new_keys, new_values = new_rows(data)
    here = tuple(table[:, None] for table in angles(data.new_positions, case.head_dim))
    room = ((0, 0), (0, case.new_tokens), (0, 0))
    feeds = {
        "query": rotate(queries, *here).reshape(1, case.new_tokens, -1),
        "key": rotate(new_keys, *here).reshape(1, case.new_tokens, -1),
        "value": new_values.reshape(1, case.new_tokens, -1),
        "past_key": np.pad(keys.swapaxes(0, 1), room)[None],
        "past_value": np.pad(values.swapaxes(0, 1), room)[None],
    }
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    total = case.depth + case.new_tokens
    helper = onnx.helper
    names = ["output", "present_key", "present_value"]
    node = helper.make_node("GroupQueryAttention", [*feeds, "last", "total"], names,
                            domain="com.microsoft", num_heads=case.query_heads, kv_num_heads=case.kv_heads)  # fmt: skip
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    infos += [helper.make_tensor_value_info("last", onnx.TensorProto.INT32, [1]),
              helper.make_tensor_value_info("total", onnx.TensorProto.INT32, [])]  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "stock", infos, outputs), opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    counts = {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
    return session.run(["output"], {**feeds, **counts})[0][0]


STOCK_CASES = [
    AttentionCase("float32, 16/2/128, 5 new at 300", 16, 2, 128, 5, (Piece(300),), kv="float32"),
    AttentionCase("float32, decode, three runs", 28, 4, 128, 1, (Piece(70), Piece(90, 1, 4), Piece(3, 2)), (0, 50, 900),
                  kv="float32"),
    AttentionCase("int8, 144 new at 200", 4, 2, 64, 144, (Piece(200),)),
    AttentionCase("int8, offset, two runs", 16, 2, 128, 9, (Piece(70), Piece(90, 1, 4)), (0, 5000), key_bias=20,
                  offset=True),
]  # fmt: skip


@pytest.mark.parametrize("case", STOCK_CASES, ids=lambda case: case.name)
def test_the_stock_operator_gives_the_same_on_the_same_cache(case: AttentionCase):
    """The stock operator attends to the new rows unrounded, so an int8 cache differs by that rounding."""
    data = attention_data(case, seed=4)
    expected = _stock_attention(data)
    limit = 1e-8 if case.kv == "float32" else INT8_NMSE
    assert nmse(reference(data.fresh()), expected) <= limit
    assert nmse(run(data.fresh()), expected) <= limit


def test_torch_gives_the_same():
    torch = pytest.importorskip("torch")
    case = AttentionCase("torch", 16, 2, 128, 65, (Piece(100),), kv="float32")
    data = attention_data(case, seed=5)
    keys, values, _, _ = cached_rows(data)
    queries, new_keys, new_values = new_rows(data)
    here = tuple(table[:, None] for table in angles(data.new_positions, case.head_dim))
    keys = np.concatenate([keys, rotate(new_keys, *here)])
    values = np.concatenate([values, new_values])
    seen = np.tril(np.ones((case.new_tokens, case.depth + case.new_tokens), bool), case.depth)
    by_head = [torch.from_numpy(np.ascontiguousarray(rows.swapaxes(0, 1)))[None]
               for rows in (rotate(queries, *here), np.repeat(keys, 8, 1), np.repeat(values, 8, 1))]  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, attn_mask=torch.from_numpy(seen))
    assert nmse(run(data.fresh()), expected[0].numpy().swapaxes(0, 1).reshape(case.new_tokens, -1)) <= FLOAT_NMSE


@pytest.mark.parametrize("first_position", [0, 10_000_000])
def test_turning_the_query_by_run_equals_turning_every_key(first_position: int):
    pieces = tuple(Piece(3 + 7 * run % 23, run, run % 3) for run in range(9))
    shifts = tuple(range(0, 9 * 1234, 1234))
    moved = AttentionCase("moved", 16, 2, 128, 6, pieces, shifts, kv="float32", first_position=first_position)
    data = attention_data(moved, seed=6)
    keys, _, _, _ = cached_rows(data)
    by_row = np.repeat(shifts, [piece.length for piece in pieces])
    back = tuple(table[:, None] for table in angles(-by_row, 128))
    turned = data.fresh()
    rows = np.concatenate([np.arange(slot, slot + length) for slot, length, _ in data.spans])
    turned.key_cache[:, rows] = rotate(keys, *back).swapaxes(0, 1).astype(np.float32)
    turned.run_cos, turned.run_sin = np.ones_like(data.run_cos), np.zeros_like(data.run_sin)
    assert np.abs(run(data) - run(turned)).max() <= 1e-5


def _score_error(data: AttentionData, queries: np.ndarray, true_keys: np.ndarray) -> tuple[float, float]:
    """RMS error of the scores and KL divergence of their softmax, from the cache as a call left it."""
    slots = np.stack([data.new_slots, np.ones_like(data.new_slots), np.zeros_like(data.new_slots)], 1)
    keys, _, _, _ = cached_rows(AttentionData(**{**vars(data), "spans": slots}))
    width = data.case.head_dim
    found, expected = (np.einsum("qhd,shd->hqs", queries, rows) / width**0.5 for rows in (keys, true_keys))
    error = found - expected
    rms = float((error - error.mean(-1, keepdims=True)).std())  # a constant changes no weight
    weights = softmax(expected)
    divergence = np.sum(weights * (np.log(weights + 1e-300) - np.log(softmax(found) + 1e-300)), -1)
    return rms, float(divergence.mean())


@pytest.mark.parametrize("offset", [True, False])
def test_keys_with_the_bias_of_qwen_survive_int8_only_with_their_offset(offset: bool):
    case = AttentionCase("norm 605", 16, 2, 128, 512, key_bias=605.0, offset=offset)
    data = attention_data(case, seed=7)
    run(data)
    _, keys, _ = new_rows(data)
    here = tuple(table[:, None] for table in angles(data.new_positions, case.head_dim))
    queries = np.random.default_rng(0).standard_normal((64, 2, 128))
    rms, divergence = _score_error(data, queries, rotate(keys, *here))
    assert (rms <= 0.05 and divergence <= 1e-3) == offset, (rms, divergence)


@st.composite
def layouts(draw: st.DrawFn) -> AttentionCase:
    """Any list of spans: empty ones, single tokens, runs used often or never."""
    runs = draw(st.integers(1, 5))
    lengths = st.one_of(st.integers(0, 3), st.integers(0, 70), st.sampled_from([63, 64, 65, 128]))
    piece = st.builds(Piece, lengths, st.integers(0, runs - 1), st.integers(0, 5))
    pieces = draw(st.lists(piece, max_size=8))
    shifts = draw(st.lists(st.integers(-1000, 100_000), min_size=runs, max_size=runs))
    kv = draw(st.sampled_from(["float32", "int8", "int8 with offset"]))
    heads, width = draw(st.sampled_from([(4, 2), (7, 1), (2, 2), (16, 2)])), draw(st.sampled_from([16, 64, 80, 128]))
    return AttentionCase("drawn", *heads, width, draw(st.sampled_from([1, 2, 3, 16, 65])), tuple(pieces), tuple(shifts),
                         kv=kv.split()[0], key_bias=20.0 * ("offset" in kv), offset="offset" in kv)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(layouts(), st.integers(0, 100))
def test_any_layout_of_spans_gives_what_the_oracle_gives(case: AttentionCase, seed: int):
    data = attention_data(case, seed)
    oracle = data.fresh()
    expected = reference(oracle)
    found = run(data)
    assert nmse(found, expected) <= (FLOAT_NMSE if case.kv == "float32" else INT8_NMSE)
    assert same_cache(data, oracle)


def test_the_fixture_has_a_bias_to_speak_of():
    data = attention_data(offset_cases()[2])
    assert np.linalg.norm(biases(data)[0][0]) == pytest.approx(605, rel=0.05)
