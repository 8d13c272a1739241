"""The product with quantised weights: every instruction set against the oracle, numpy and ONNX Runtime."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import INT8_NMSE, available_sets, instruction_set, needs_kernels, nmse, numpy_product

from apps.bench.kernel_cases import MatmulCase, MatmulData, matmul_cases, matmul_data, pack_codes
from edge import kernels_abi as abi
from edge import native
from edge.kernel_arguments import matmul_arguments, weights_source

pytestmark = needs_kernels
ROUNDED_NMSE = 1e-9
"""Against a product whose input was rounded to the same codes; what remains is the order of float32 sums."""


def packed(data: MatmulData, threads: native.Threads | None = None) -> native.Weights:
    case = data.case
    return native.Weights(data.codes, data.scales, bits=case.bits, block=case.block, gated=case.gated, threads=threads)


def product(data: MatmulData, threads: native.Threads | None = None) -> np.ndarray:
    with packed(data, threads) as weights:
        return weights.run(data.input, bias=data.bias, residual=data.residual, threads=threads)


def reference(data: MatmulData) -> np.ndarray:
    case = data.case
    return native.matmul_reference(data.input, data.codes, data.scales, bits=case.bits, block=case.block,
                                   gated=case.gated, bias=data.bias, residual=data.residual)  # fmt: skip


def worst_row(found: np.ndarray, expected: np.ndarray) -> float:
    """Rows differ in size a thousandfold, so each is measured by itself."""
    return max(nmse(*rows) for rows in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", matmul_cases(), ids=lambda case: case.name)
def test_every_instruction_set_agrees_with_the_oracle_and_with_numpy(case: MatmulCase):
    data = matmul_data(case)
    exact, rounded = numpy_product(data, quantise=False), numpy_product(data, quantise=True)
    oracle = reference(data)
    assert nmse(oracle, exact) <= 1e-12
    for name in available_sets():
        with instruction_set(name):
            found = product(data)
        assert nmse(found, oracle) <= INT8_NMSE, name
        assert worst_row(found, rounded) <= ROUNDED_NMSE, name


@pytest.mark.parametrize("case", matmul_cases()[::3], ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case: MatmulCase):
    data = matmul_data(case, seed=1)
    alone = product(data)
    for count in (2, 3):
        with native.Threads(count) as threads:
            assert product(data, threads).tobytes() == alone.tobytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_gives_the_same_alone_and_among_others(bits: int):
    """A turn split differently must not change what the model says."""
    data = matmul_data(MatmulCase(256, 96, 37, bits, 64), seed=2)
    with packed(data) as weights:
        together = weights.run(data.input)
        alone = np.concatenate([weights.run(row[None]) for row in data.input])
    assert worst_row(alone, together) <= ROUNDED_NMSE


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_may_lie_apart_and_the_residual_may_be_the_output(rows: int):
    data = matmul_data(MatmulCase(128, 92, rows, residual=True), seed=3)
    expected = product(data)
    wide_input = np.full((rows, 150), np.nan, np.float32)
    wide_input[:, 7:135] = data.input
    wide_output = np.full((rows, 111), 5, np.float32)
    wide_output[:, 3:95] = data.residual
    view = wide_output[:, 3:95]
    with packed(data) as weights:
        assert weights.run(wide_input[:, 7:135], residual=view, output=view) is view
    np.testing.assert_array_equal(view, expected)
    assert (wide_output[:, :3] == 5).all() and (wide_output[:, 95:] == 5).all()


def test_rows_of_zeros_give_exactly_the_bias():
    data = matmul_data(MatmulCase(128, 92, 5, bias=True), seed=4)
    data.input[:] = 0
    np.testing.assert_array_equal(product(data), np.tile(data.bias, (5, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad: float):
    data = matmul_data(MatmulCase(128, 92, 3), seed=5)
    clean = product(data)
    data.input[1, 40] = bad
    for name in available_sets():
        with instruction_set(name):
            found = product(data)
        assert not np.isfinite(found[1]).any(), name
        assert nmse(found[[0, 2]], clean[[0, 2]]) <= ROUNDED_NMSE, name


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32)])
def test_the_stock_operator_gives_the_same_from_the_same_weights(bits: int, block: int):
    """MatMulNBits rounds the input to 8 bits as well, in its own way: both are near, and as near as each other."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    case = MatmulCase(256, 96, 9, bits, block)
    data = matmul_data(case, seed=6)
    codes = (data.values.T.astype(np.int16) + (8 if bits == 4 else 128)).astype(np.uint8)
    stored = (codes[:, ::2] | codes[:, 1::2] << 4) if bits == 4 else codes
    helper, constant = onnx.helper, onnx.numpy_helper.from_array
    node = helper.make_node("MatMulNBits", ["A", "B", "S"], ["Y"], domain="com.microsoft", K=case.inputs,
                            N=case.outputs, bits=bits, block_size=block, accuracy_level=4)  # fmt: skip
    blocks = case.inputs // block
    weights = [constant(stored.reshape(case.outputs, blocks, -1), "B"),
               constant(np.ascontiguousarray(data.scales.T).reshape(-1), "S")]  # fmt: skip
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("A", "Y")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "stock", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"A": data.input})[0]
    exact = numpy_product(data, quantise=False)
    assert nmse(product(data), expected) <= INT8_NMSE
    assert worst_row(product(data), exact) <= 1.5 * worst_row(expected, exact) + 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "block"), [(100, 32), (588, 32), (31, 32), (1, 16), (3420, 128)])
def test_the_last_block_may_be_short(bits: int, inputs: int, block: int):
    """The same as with rows of zeros behind it, which is what the oracle of whole blocks is given."""
    filled = -(-inputs // block) * block
    data = matmul_data(MatmulCase(filled, 36, 5, bits, block), seed=7)
    data.input[:, inputs:] = 0
    data.values[inputs:] = 0
    expected = numpy_product(data, quantise=True)
    source, _kept = weights_source(data.codes, data.scales, bits, block, False)
    source.inputs = inputs
    library, given_input = abi.load_library(), np.ascontiguousarray(data.input[:, :inputs])
    arguments, output, _kept_too = matmul_arguments(given_input, (inputs, 36, False), None, None, None)
    for name in available_sets():
        pointer = ctypes.c_void_p()
        with instruction_set(name):
            assert library.streamo_weights_pack(ctypes.byref(source), None, ctypes.byref(pointer)) == 0
            assert library.streamo_matmul_run(pointer, ctypes.byref(arguments), None) == 0
        library.streamo_weights_destroy(pointer)
        assert worst_row(output, expected) <= ROUNDED_NMSE, name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size_gives_what_numpy_gives(data: st.DataObject):
    bits, block = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([16, 32, 64, 112, 128, 256]))
    gated, columns = data.draw(st.booleans()), data.draw(st.integers(1, 70))
    case = MatmulCase(block * data.draw(st.integers(1, 5)), 2 * columns, data.draw(st.integers(1, 70)), bits, block,
                      gated, data.draw(st.booleans()), data.draw(st.booleans()))  # fmt: skip
    given_data = matmul_data(case, data.draw(st.integers(0, 1000)))
    assert worst_row(product(given_data), numpy_product(given_data, quantise=True)) <= ROUNDED_NMSE


def test_codes_are_packed_as_export_packs_them():
    from export.quantize import pack_int4

    codes = matmul_data(MatmulCase(64, 10)).values
    np.testing.assert_array_equal(pack_codes(codes).reshape(-1), pack_int4(codes))
