"""Products with quantised weights on a GPU, through the launcher, in Triton's interpreter.

`numpy_product` is the maths in float64; `edge.native` is our CPU library, whose rounding of 8-bit rows must be the
same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_interpreter import FakeCuda, needs_compiler, needs_triton, variants
from kernel_cases import INT8_NMSE, needs_kernels, nmse, numpy_product

from apps.bench.kernel_cases import MatmulCase, MatmulData, matmul_data
from edge import gpu_abi as abi
from edge import gpu_operations as operations
from edge import native
from edge.errors import KernelError
from edge.gpu import DeviceArray, Gpu
from edge.kernels_abi import MatmulArguments, WeightsSource

pytestmark = [needs_kernels, needs_triton, needs_compiler]

FLOAT16_NMSE = 1e-6
ROUNDED_NMSE = 1e-9
"""Against a product whose rows were rounded to the same codes; what remains is the order of float32 sums."""
AUTO, FP16, INT8 = abi.ACTIVATIONS_AUTO, abi.ACTIVATIONS_FP16, abi.ACTIVATIONS_INT8


@pytest.fixture
def cuda(tmp_path: Path) -> FakeCuda:
    return FakeCuda(tmp_path)


@pytest.fixture
def gpu(cuda: FakeCuda) -> Iterator[Gpu]:
    with cuda.open() as opened:
        yield opened


def product(gpu: Gpu, data: MatmulData, activations: int = AUTO) -> np.ndarray:
    case = data.case
    on_device = {name: None if value is None else gpu.array(value)
                 for name, value in (("bias", data.bias), ("residual", data.residual))}  # fmt: skip
    found = operations.matmul(gpu, gpu.array(data.input), gpu.array(data.codes), gpu.array(data.scales),
                              bits=case.bits, block=case.block, gated=case.gated, activations=activations,
                              **on_device)  # fmt: skip
    return gpu.numpy(found)


def kernels_used(cuda: FakeCuda, gpu: Gpu, data: MatmulData, activations: int = AUTO) -> list[str]:
    cuda.launched.clear()
    product(gpu, data, activations)
    return [name for name, _ in cuda.launched]


def worst_row(found: np.ndarray, expected: np.ndarray) -> float:
    """Rows differ in size a thousandfold, so each is measured by itself."""
    return max(nmse(*rows) for rows in zip(found, expected, strict=True))


def check(gpu: Gpu, data: MatmulData, activations: int = AUTO) -> np.ndarray:
    found = product(gpu, data, activations)
    rounded = activations == INT8 or (activations == AUTO and data.case.bits == 8)
    exact = numpy_product(data, quantise=False)
    if rounded:
        assert worst_row(found, numpy_product(data, quantise=True)) <= ROUNDED_NMSE
        assert nmse(found, exact) <= INT8_NMSE
    else:
        assert worst_row(found, exact) <= FLOAT16_NMSE
    return found


def cases() -> list[MatmulCase]:
    """One row, a few and many of each width of code; every block; everything that can be fused."""
    found = []
    for bits in (4, 8):
        found += [MatmulCase(128, 96, rows, bits, 64) for rows in (1, 2, 17)]
        found += [
            MatmulCase(2 * block, 128, rows, bits, block)
            for block in ((32, 128) if bits == 4 else (128,))
            for rows in (1, 3)
        ]
        found += [MatmulCase(96, 32, 1, bits, 96)]
        found += [MatmulCase(128, 192, rows, bits, 64, gated=True, bias=True) for rows in (1, 2, 20)]
        found += [MatmulCase(128, 128, 2, bits, gated=True, bias=True, residual=True)]
        found += [MatmulCase(128, 160, rows, bits, bias=True, residual=True) for rows in (1, 18)]
        found += [MatmulCase(3 * block, 70, 2, bits, block) for block in (16, 48)]
        found += [MatmulCase(48, 92, 5, bits, 16, gated=True, bias=True, residual=True)]
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_products_agree_with_numpy(gpu: Gpu, case: MatmulCase):
    check(gpu, matmul_data(case))


@pytest.mark.parametrize(("bits", "activations", "rows"), [(4, INT8, 1), (4, INT8, 3), (8, FP16, 1), (8, FP16, 3)])
def test_the_other_form_of_rows_serves_both_widths_of_codes(gpu: Gpu, bits: int, activations: int, rows: int):
    check(gpu, matmul_data(MatmulCase(128, 128, rows, bits, 64, bias=True), seed=1), activations)
    check(gpu, matmul_data(MatmulCase(64, 36, rows, bits, 32, gated=True), seed=2), activations)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_8_bits_give_what_the_cpu_library_gives(gpu: Gpu, bits: int, rows: int):
    data = matmul_data(MatmulCase(256, 128, rows, bits, 32, gated=True, bias=True), seed=3)
    with native.Weights(data.codes, data.scales, bits=bits, block=32, gated=True) as weights:
        expected = weights.run(data.input, bias=data.bias)
    assert worst_row(product(gpu, data, INT8), expected) <= ROUNDED_NMSE


def values_that_round_twice(count: int, largest: np.float32) -> np.ndarray:
    """Numbers whose product with 127 / largest is between two integers only once it is rounded to float32: rounded as
    one with its product, such a code is another one."""
    inverse = np.float32(127) / largest
    near = (np.arange(-127, 127) + 0.5) / np.float64(inverse)
    found = (
        (near.astype(np.float32).view(np.int32)[:, None] + np.arange(-2, 3, dtype=np.int32)).view(np.float32).ravel()
    )
    exact = found.astype(np.float64) * inverse
    rounded = (found * inverse).astype(np.float64)
    found = found[np.rint(exact) != np.rint(rounded)]
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize(("bits", "rows"), [(8, 1), (8, 2), (4, 1), (4, 2)])
def test_a_product_is_rounded_before_it_becomes_a_code(gpu: Gpu, bits: int, rows: int):
    data = matmul_data(MatmulCase(32, 32, rows, bits, 32), seed=12)
    data.input[:] = [*values_that_round_twice(31, np.float32(3.3)).tolist(), 3.3]
    assert worst_row(product(gpu, data, INT8), numpy_product(data, quantise=True)) <= ROUNDED_NMSE


def test_what_becomes_codes_is_not_fused():
    """The interpreter rounds everything by itself, so it cannot tell."""
    rounding = [name for name in variants() if name.startswith(("rows_by_block", "product_row_", "append"))]
    assert not [name for name in rounding if variants()[name].fuse]
    assert len(rounding) > 10


def test_sizes_choose_the_kernels(cuda: FakeCuda, gpu: Gpu):
    one, few, many = (matmul_data(MatmulCase(64, 64, rows, 4, 32)) for rows in (1, 3, 17))
    assert kernels_used(cuda, gpu, one) == ["product_row_w4a32_s16", "finish"]
    assert kernels_used(cuda, gpu, few) == ["rows_by_row", "product_rows_w4a16_k32_m16", "finish"]
    assert kernels_used(cuda, gpu, many) == ["rows_by_row", "product_rows_w4a16_k32_m64", "finish"]
    assert kernels_used(cuda, gpu, few, INT8) == ["rows_by_block", "product_rows_w4a8_k32_m16", "finish"]
    gated = matmul_data(MatmulCase(64, 64, 3, 8, 64, gated=True))
    assert kernels_used(cuda, gpu, gated) == ["rows_by_block", "product_rows_w8a8_k64_m16_gated"]
    ragged = matmul_data(MatmulCase(48, 34, 1, 4, 16))
    assert kernels_used(cuda, gpu, ragged) == ["rows_by_row", "product_any_w4a16", "finish"]


@pytest.mark.parametrize(
    ("case", "activations"),
    [
        (MatmulCase(512, 768, 1, 4, 32, bias=True), AUTO),
        (MatmulCase(800, 768, 1, 4, 32, gated=True, bias=True), AUTO),
        (MatmulCase(512, 768, 1, 4, 128), INT8),
        (MatmulCase(512, 384, 1, 8, 64, residual=True), AUTO),
        (MatmulCase(544, 384, 1, 8, 32), FP16),
    ],
    ids=str,
)
def test_a_product_that_fills_the_device_takes_long_segments(
    tmp_path: Path, case: MatmulCase, activations: int
) -> None:
    cuda = FakeCuda(tmp_path, multiprocessors=1)
    with cuda.open() as gpu:
        check(gpu, matmul_data(case), activations)
    assert cuda.launched[0][0].startswith("product_row_w") and cuda.launched[0][0].endswith("_s32")


@pytest.mark.parametrize(("bits", "rows"), [(4, 1), (8, 3)])
def test_many_splits_of_k_are_merged_to_the_same_sums(cuda: FakeCuda, gpu: Gpu, bits: int, rows: int):
    """A deep and narrow product is cut along K, so that the whole chip works on it."""
    data = matmul_data(MatmulCase(1024 if rows == 1 else 1536, 32, rows, bits, 32, bias=True), seed=4)
    check(gpu, data)
    grid = next(grid for name, grid in cuda.launched if name.startswith("product"))
    assert max(grid[1], grid[2]) >= 4


@pytest.mark.parametrize(("bits", "rows"), [(4, 1), (4, 18), (8, 2)])
def test_repeated_runs_are_identical_to_the_bit(gpu: Gpu, bits: int, rows: int):
    data = matmul_data(MatmulCase(288, 64, rows, bits, 32, bias=True), seed=5)
    assert product(gpu, data).tobytes() == product(gpu, data).tobytes()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("largest", [1e5, 1e30, 1e-30])
def test_no_size_of_activations_overflows_or_vanishes(gpu: Gpu, rows: int, largest: float):
    """Qwen2.5's residual stream has channels beyond float16's 65,504 beside others of 1."""
    data = matmul_data(MatmulCase(64, 32, rows, 4, 32), seed=6)
    data.input[:] = np.random.default_rng(0).standard_normal(data.input.shape)
    if largest > 1e6 or largest < 1:
        data.input *= np.float32(largest)
    else:
        data.input[:, 7] = largest
    check(gpu, data, FP16)
    assert nmse(product(gpu, data, INT8), numpy_product(data, quantise=True)) <= ROUNDED_NMSE


def test_channels_beside_a_huge_one_keep_their_precision(gpu: Gpu):
    data = matmul_data(MatmulCase(128, 64, 3, 4, 32), seed=7)
    data.input[:] = np.random.default_rng(1).standard_normal(data.input.shape)
    data.input[:, 7] = 1e5
    data.values[7] = 0
    data.codes[7] = 0
    assert worst_row(product(gpu, data), numpy_product(data, quantise=False)) <= FLOAT16_NMSE


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_zeros_give_exactly_the_bias(gpu: Gpu, bits: int, rows: int):
    data = matmul_data(MatmulCase(64, 64, rows, bits, bias=True), seed=8)
    data.input[:] = 0
    np.testing.assert_array_equal(product(gpu, data), np.tile(data.bias, (rows, 1)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_that_is_not_finite_spoils_no_other(gpu: Gpu, bad: float, bits: int):
    data = matmul_data(MatmulCase(64, 64, 3, bits), seed=9)
    clean = product(gpu, data)
    data.input[1, 40] = bad
    with np.errstate(all="ignore"):
        found = product(gpu, data)
        alone = matmul_data(MatmulCase(64, 64, 1, bits), seed=9)
        alone.input[:] = data.input[1]
        single = product(gpu, alone)
    assert not np.isfinite(found[1]).any() and not np.isfinite(single).any()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", [1, 20])
def test_rows_may_lie_apart_and_the_residual_may_be_the_output(gpu: Gpu, rows: int):
    data = matmul_data(MatmulCase(128, 64, rows, residual=True), seed=10)
    expected = product(gpu, data)
    wide_input = np.full((rows, 160), np.nan, np.float32)
    wide_input[:, :128] = data.input
    wide_output = np.full((rows, 80), 5, np.float32)
    wide_output[:, :64] = data.residual
    input, output = gpu.array(wide_input), gpu.array(wide_output)
    codes, scales = gpu.array(data.codes), gpu.array(data.scales)
    source = abi_source(data, codes.pointer, scales.pointer)
    arguments = MatmulArguments(rows=rows, input=input.pointer, residual=output.pointer, output=output.pointer,
                                input_stride=160, output_stride=80)  # fmt: skip
    need = ctypes.c_size_t()
    pair = (ctypes.byref(source), ctypes.byref(arguments), AUTO)
    gpu.call("matmul_workspace", *pair, ctypes.byref(need))
    space = gpu.workspace(need.value)
    gpu.call("matmul_run", *pair, space.pointer, space.nbytes, None)
    found = gpu.numpy(output)
    np.testing.assert_array_equal(found[:, :64], expected)
    assert (found[:, 64:] == 5).all()


def abi_source(data: MatmulData, codes: int, scales: int) -> WeightsSource:
    case = data.case
    return WeightsSource(case.inputs, case.outputs, case.bits, case.block, int(case.gated), codes, scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("inputs", [100, 31, 16])
def test_the_last_block_may_be_short(gpu: Gpu, bits: int, inputs: int):
    """The same as with rows of zeros behind it, which is what the oracle of whole blocks is given."""
    data = matmul_data(MatmulCase(-(-inputs // 32) * 32, 36, 3, bits, 32), seed=11)
    data.input[:, inputs:] = 0
    expected = numpy_product(data, quantise=bits == 8)
    found = operations.matmul(gpu, gpu.array(np.ascontiguousarray(data.input[:, :inputs])),
                              gpu.array(np.ascontiguousarray(data.codes[:inputs])), gpu.array(data.scales),
                              bits=bits, block=32)  # fmt: skip
    assert worst_row(gpu.numpy(found), expected) <= FLOAT16_NMSE


def test_a_workspace_that_is_too_small_is_refused_with_both_sizes(gpu: Gpu):
    data = matmul_data(MatmulCase(64, 64, 2))
    weights = gpu.array(data.codes), gpu.array(data.scales)
    source = abi_source(data, weights[0].pointer, weights[1].pointer)
    kept = gpu.array(data.input), gpu.empty((2, 64))
    arguments = MatmulArguments(rows=2, input=kept[0].pointer, output=kept[1].pointer, input_stride=64,
                                output_stride=64)  # fmt: skip
    space = gpu.workspace(256)
    with pytest.raises(KernelError, match=r"workspace of \d+ bytes, found 100"):
        gpu.call("matmul_run", ctypes.byref(source), ctypes.byref(arguments), AUTO, space.pointer, 100, None)


def test_an_unknown_form_of_rows_is_refused(gpu: Gpu):
    data = matmul_data(MatmulCase(64, 64, 2))
    with pytest.raises(KernelError, match="activations 0, 1 or 2, found 7"):
        product(gpu, data, 7)


def test_norm_is_the_formula_and_adds_first(gpu: Gpu):
    random = np.random.default_rng(0)
    for rows, width in ((1, 64), (3, 2050)):
        x, residual = random.standard_normal((2, rows, width)).astype(np.float32)
        weight = random.standard_normal(width).astype(np.float32)
        for added in (None, residual):
            total = x.astype(np.float64) + (0 if added is None else added)
            expected = total / np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6) * weight
            on_device = None if added is None else gpu.array(added)
            found = operations.rms_norm(gpu, gpu.array(x), gpu.array(weight), epsilon=1e-6, residual=on_device,
                                        sum=on_device)  # fmt: skip
            assert nmse(gpu.numpy(found), expected) <= 1e-12
            if on_device is not None:
                np.testing.assert_array_equal(gpu.numpy(on_device), x + residual)


@pytest.mark.parametrize("name", ["input", "residual", "weight", "sum", "output"])
def test_a_norm_of_arrays_that_are_not_aligned_is_refused(gpu: Gpu, name: str):
    arrays = {one: gpu.array(np.zeros((2, 64), np.float32)) for one in ("input", "residual", "sum", "output")}
    arrays["weight"] = gpu.array(np.zeros(64, np.float32))
    whole = arrays[name]
    arrays[name] = DeviceArray(whole.pointer + 8, whole.shape, whole.dtype, whole.strides, whole.owner)
    with pytest.raises(KernelError, match="Norm: expected addresses that are multiples of 16 bytes"):
        operations.rms_norm(gpu, epsilon=1e-6, **arrays)
