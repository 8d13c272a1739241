"""The operators of domain `streamo` inside ONNX Runtime: the same numbers as the kernels called directly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_cases import needs_kernels

from edge import contract, native

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = needs_kernels

HEADS, KV_HEADS, WIDTH, CAPACITY = 4, 2, 32, 24
FLOAT, INT8, UINT8, INT32 = (getattr(onnx.TensorProto, name) for name in ("FLOAT", "INT8", "UINT8", "INT32"))
TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.int8): INT8, np.dtype(np.uint8): UINT8, np.dtype(np.int32): INT32}

Arrays = dict[str, np.ndarray]


def session_of(
    op: str,
    inputs: list[str],
    arrays: Arrays,
    outputs: dict[str, Any],
    *,
    constants: tuple[str, ...] = (),
    **attributes,
):
    """One node of `op`; what is not in `constants` is an input of the graph, dimensions free."""
    helper = onnx.helper
    values = [
        helper.make_tensor_value_info(name, TYPES[array.dtype], [None] * array.ndim)
        for name, array in arrays.items()
        if name not in constants
    ]
    results = [helper.make_tensor_value_info(name, TYPES[np.dtype(dtype)], None) for name, dtype in outputs.items()]
    node = helper.make_node(op, inputs, list(outputs), domain=contract.CUSTOM_DOMAIN, **attributes)
    stored = [onnx.numpy_helper.from_array(arrays[name], name) for name in constants]
    graph = helper.make_graph([node], "one", values, results, stored)
    opsets = [helper.make_opsetid("", contract.OPSET), helper.make_opsetid(contract.CUSTOM_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(native.library_path()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def attention_arrays(dtype: Any, *, tokens: int = 5, empty: bool = False) -> Arrays:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    angles, run_angles = (
        random.uniform(0, 6, (tokens, WIDTH // 2)),
        random.uniform(0, 6, (0 if empty else 2, WIDTH // 2)),
    )
    caches = [normal(1, KV_HEADS, CAPACITY, WIDTH) for _ in range(2)]
    if dtype == np.int8:
        caches = [(40 * cache).clip(-127, 127).astype(np.int8) for cache in caches]
    spans = np.array([[0, 7, 0], [12, 4, 1]], np.int32)
    arrays = {
        "qkv": normal(tokens, (HEADS + 2 * KV_HEADS) * WIDTH),
        "qkv_bias": normal((HEADS + 2 * KV_HEADS) * WIDTH),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "new_slots": np.arange(17, 17 + tokens, dtype=np.int32),
        "spans": spans[:0] if empty else spans,
        "run_cos": np.cos(run_angles).astype(np.float32),
        "run_sin": np.sin(run_angles).astype(np.float32),
    }
    if dtype == np.int8:
        arrays |= {name: random.uniform(0.01, 0.03, (1, KV_HEADS, CAPACITY)).astype(np.float32) for name in SCALES}
    return arrays


SCALES = ("key_scales", "value_scales")
CACHES = ("key_cache", "value_cache")
ATTRIBUTES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "scale": WIDTH**-0.5}


def attention_session(arrays: Arrays, **changed: Any) -> Any:
    int8 = arrays["key_cache"].dtype == np.int8
    names = [name if name in arrays else "" for name in (*BASE_INPUTS, *(INT8_INPUTS if int8 else ()))]
    while not names[-1]:
        names.pop()
    outputs: dict[str, Any] = {"attention": np.float32}
    outputs |= {contract.updated(name): arrays[name].dtype for name in (*CACHES, *(SCALES if int8 else ()))}
    op = contract.SPAN_ATTENTION_INT8 if int8 else contract.SPAN_ATTENTION
    return session_of(op, names, arrays, outputs, **{**ATTRIBUTES, **changed})


BASE_INPUTS = (
    *("qkv", "qkv_bias", "rope_cos", "rope_sin", "key_cache", "value_cache"),
    *("new_slots", "spans", "run_cos", "run_sin"),
)
INT8_INPUTS = (*SCALES, "key_offset", "slot_cos", "slot_sin")


def called_directly(arrays: Arrays) -> tuple[np.ndarray, Arrays]:
    """Attention and the caches after it; the given arrays stay as they are."""
    copies = {name: array.copy() for name, array in arrays.items()}
    return native.attention(**copies, query_heads=HEADS), copies


def with_key_offset(arrays: Arrays) -> Arrays:
    random = np.random.default_rng(1)
    angles = random.uniform(0, 6, (CAPACITY, WIDTH // 2))
    return arrays | {
        "key_offset": random.standard_normal((KV_HEADS, WIDTH)).astype(np.float32),
        "slot_cos": np.cos(angles).astype(np.float32),
        "slot_sin": np.sin(angles).astype(np.float32),
    }


def without(arrays: Arrays, name: str) -> Arrays:
    return {key: array for key, array in arrays.items() if key != name}


@pytest.mark.parametrize(
    "arrays",
    [
        pytest.param(attention_arrays(np.float32), id="float32"),
        pytest.param(attention_arrays(np.float32, tokens=1), id="one-token"),
        pytest.param(attention_arrays(np.float32, empty=True), id="nothing-cached"),
        pytest.param(without(attention_arrays(np.float32), "qkv_bias"), id="no-bias"),
        pytest.param(attention_arrays(np.int8), id="int8"),
        pytest.param(attention_arrays(np.int8, empty=True), id="int8-nothing-cached"),
        pytest.param(with_key_offset(attention_arrays(np.int8)), id="int8-key-offset"),
        pytest.param(without(with_key_offset(attention_arrays(np.int8)), "qkv_bias"), id="int8-key-offset-no-bias"),
    ],
)
def test_attention_gives_the_bits_of_a_direct_call_and_leaves_its_inputs(arrays: Arrays) -> None:
    expected, after = called_directly(arrays)
    given = {name: array.copy() for name, array in arrays.items()}
    session = attention_session(arrays)
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))
    np.testing.assert_array_equal(found["attention"], expected)
    for name in (*CACHES, *(SCALES if "key_scales" in arrays else ())):
        np.testing.assert_array_equal(found[contract.updated(name)], after[name])
        np.testing.assert_array_equal(given[name], arrays[name])


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_caches_bound_to_input_and_output_are_changed_in_place(dtype: Any) -> None:
    arrays = attention_arrays(dtype)
    expected, after = called_directly(arrays)
    session = attention_session(arrays)
    binding, attention = session.io_binding(), np.empty_like(expected)
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        if name in (*CACHES, *SCALES):
            binding.bind_output(contract.updated(name), "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("attention", "cpu", 0, attention.dtype, attention.shape, attention.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(attention, expected)
    for name in CACHES:
        np.testing.assert_array_equal(arrays[name], after[name])


def product_arrays(bits: int, *, gated: bool, rows: int = 6, inputs: int = 64, outputs: int = 48) -> Arrays:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 256, inputs * outputs * bits // 8, np.uint8)
    if bits == 8:
        codes[codes == 128] = 0  # -128 is no code
    return {
        "input": random.standard_normal((rows, inputs)).astype(np.float32),
        "codes": codes,
        "scales": random.uniform(0.01, 0.02, (inputs // 32, outputs)).astype(np.float32),
        "bias": random.standard_normal(outputs).astype(np.float32),
        "residual": random.standard_normal((rows, outputs // 2 if gated else outputs)).astype(np.float32),
    }


def product_session(names: list[str], arrays: Arrays, bits: int, gated: bool, **changed: Any) -> Any:
    arrays = {name: arrays[name] for name in names if name}
    constants = changed.pop("constants", ("codes", "scales"))
    attributes = {"bits": bits, "block_size": 32, "gated": int(gated)} | changed
    return session_of(contract.STREAM_MATMUL, names, arrays, {"output": np.float32}, constants=constants, **attributes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("extra", [(), ("bias",), ("", "residual"), ("bias", "residual")])
def test_a_product_gives_the_bits_of_a_direct_call(bits: int, gated: bool, extra: tuple[str, ...]) -> None:
    arrays = product_arrays(bits, gated=gated)
    session = product_session(["input", "codes", "scales", *extra], arrays, bits, gated)
    given = {name: arrays[name] for name in ("input", *extra) if name}
    with native.Weights(arrays["codes"], arrays["scales"], bits=bits, block=32, gated=gated) as weights:
        expected = weights.run(arrays["input"], **{name: arrays[name] for name in extra if name})
    for _ in range(2):
        np.testing.assert_array_equal(session.run(None, given)[0], expected)


@pytest.mark.parametrize("starts", [[0, 9], [0, 4, 8, 9]])
def test_window_attention_gives_the_bits_of_a_direct_call(starts: list[int]) -> None:
    random = np.random.default_rng(3)
    angles = random.uniform(0, 6, (9, 8))
    arrays = {
        "qkv": random.standard_normal((9, 3 * 2 * 16)).astype(np.float32),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "window_starts": np.array(starts, np.int32),
    }
    session = session_of(
        contract.WINDOW_ATTENTION, list(arrays), arrays, {"output": np.float32}, num_heads=2, scale=0.25
    )
    np.testing.assert_array_equal(session.run(None, arrays)[0], native.window_attention(**arrays, heads=2))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("new_slots", np.array([CAPACITY] * 5, np.int32), f"{CAPACITY}"),
        ("new_slots", np.arange(3, dtype=np.int32), r"new_slots: expected shape \(5\), found \(3\)"),
        ("spans", np.zeros((2, 2), np.int32), r"spans: expected shape \(any, 3\), found \(2, 2\)"),
        ("run_sin", np.zeros((1, WIDTH // 2), np.float32), r"run_sin: expected shape \(2, 16\), found \(1, 16\)"),
        ("rope_cos", np.zeros((5, 3), np.float32), "rope_cos: expected shape"),
        ("key_cache", np.zeros((1, 3, CAPACITY, WIDTH), np.float32), "key_cache: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(name: str, value: np.ndarray, says: str) -> None:
    arrays = attention_arrays(np.float32)
    session = attention_session(arrays)
    with pytest.raises(Exception, match=f"streamo::SpanAttention: .*{says}"):
        session.run(None, arrays | {name: value})
    expected, _ = called_directly(arrays)
    np.testing.assert_array_equal(session.run(["attention"], arrays)[0], expected)


def test_weights_that_do_not_fit_are_refused_when_the_session_is_made() -> None:
    arrays, names = product_arrays(8, gated=False), ["input", "codes", "scales"]
    with pytest.raises(Exception, match="streamo::StreamMatMul: codes: expected 3072 bytes, found 3071"):
        product_session(names, arrays | {"codes": arrays["codes"][1:]}, 8, False)
    with pytest.raises(Exception, match=r"streamo::StreamMatMul: .*bits.*5"):
        product_session(names, arrays | {"codes": arrays["codes"][: 64 * 48 * 5 // 8]}, 5, False)
    with pytest.raises(Exception, match="codes: expected an initializer"):
        product_session(names, arrays, 8, False, constants=("scales",))
    with pytest.raises(Exception, match="block_size"):
        product_session(names, arrays, 8, False, block_size=-1)


def test_the_sessions_thread_count_changes_no_bit() -> None:
    arrays = product_arrays(4, gated=True, rows=70, inputs=256, outputs=512)
    names = ["input", "codes", "scales"]
    session = product_session(names, arrays, 4, True)
    with native.Weights(arrays["codes"], arrays["scales"], bits=4, block=32, gated=True) as weights:
        found = [session.run(None, {"input": arrays["input"]})[0], weights.run(arrays["input"])]
        for count in (1, 2, 3):
            with native.Threads(count) as threads:
                found.append(weights.run(arrays["input"], threads=threads))
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
