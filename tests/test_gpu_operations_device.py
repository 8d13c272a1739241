"""Products, norm, windows, sampling and frames on a real GPU: the interpreter's tests, and the public sizes.

The tests of the other files are collected here a second time, with this module's `gpu`. Memory errors and races on the
device: `compute-sanitizer --tool memcheck` (or `racecheck`) in front of the same command.
"""

from __future__ import annotations

import pytest
from kernel_cases import needs_kernels
from test_gpu_attention_device import gpu
from test_gpu_frame import (
    test_an_rgb_frame_gives_the_cpus_patches_to_the_bit,
    test_hard_edges_overshoot_and_are_clipped_as_pillow_does,
    test_nv12_follows_the_standards,
    test_nv12_is_opencvs_rgb_within_one_level_by_default,
    test_nv12_is_resized_as_its_rgb_is,
    test_repeated_runs_are_identical_and_sizes_may_alternate,
)
from test_gpu_products import (
    check,
    product,
    test_a_product_is_rounded_before_it_becomes_a_code,
    test_a_row_that_is_not_finite_spoils_no_other,
    test_channels_beside_a_huge_one_keep_their_precision,
    test_no_size_of_activations_overflows_or_vanishes,
    test_norm_is_the_formula_and_adds_first,
    test_products_agree_with_numpy,
    test_rows_may_lie_apart_and_the_residual_may_be_the_output,
    test_rows_of_8_bits_give_what_the_cpu_library_gives,
    test_rows_of_zeros_give_exactly_the_bias,
    test_the_last_block_may_be_short,
    test_the_other_form_of_rows_serves_both_widths_of_codes,
)
from test_gpu_sample import (
    test_all_logits_equal_gives_the_first,
    test_far_smaller_logits_are_never_chosen,
    test_greedy_is_numpys_argmax,
    test_samples_are_the_hosts,
    test_the_first_of_equal_logits_is_chosen,
    test_ties_are_taken_in_the_order_of_the_tokens,
)
from test_gpu_window_attention import (
    test_numbers_beyond_float16_neither_overflow_nor_vanish,
    test_windows_give_what_the_maths_and_the_cpu_say,
)

from apps.bench.kernel_cases import MatmulCase, matmul_data
from edge.gpu import Gpu

__all__ = [
    "gpu",
    "test_a_product_is_rounded_before_it_becomes_a_code",
    "test_a_row_that_is_not_finite_spoils_no_other",
    "test_all_logits_equal_gives_the_first",
    "test_an_rgb_frame_gives_the_cpus_patches_to_the_bit",
    "test_channels_beside_a_huge_one_keep_their_precision",
    "test_far_smaller_logits_are_never_chosen",
    "test_greedy_is_numpys_argmax",
    "test_hard_edges_overshoot_and_are_clipped_as_pillow_does",
    "test_no_size_of_activations_overflows_or_vanishes",
    "test_norm_is_the_formula_and_adds_first",
    "test_numbers_beyond_float16_neither_overflow_nor_vanish",
    "test_nv12_follows_the_standards",
    "test_nv12_is_opencvs_rgb_within_one_level_by_default",
    "test_nv12_is_resized_as_its_rgb_is",
    "test_products_agree_with_numpy",
    "test_repeated_runs_are_identical_and_sizes_may_alternate",
    "test_rows_may_lie_apart_and_the_residual_may_be_the_output",
    "test_rows_of_8_bits_give_what_the_cpu_library_gives",
    "test_rows_of_zeros_give_exactly_the_bias",
    "test_samples_are_the_hosts",
    "test_the_first_of_equal_logits_is_chosen",
    "test_the_last_block_may_be_short",
    "test_the_other_form_of_rows_serves_both_widths_of_codes",
    "test_ties_are_taken_in_the_order_of_the_tokens",
    "test_windows_give_what_the_maths_and_the_cpu_say",
]

pytestmark = [pytest.mark.gpu, needs_kernels]

PUBLIC_SIZES = [
    MatmulCase(2048, 22016, rows, bits, 32, gated=True) for rows in (1, 144) for bits in (4, 8)
] + [MatmulCase(11008, 2048, rows, 4, 128, residual=True) for rows in (1, 144)]  # fmt: skip


@pytest.mark.parametrize("case", PUBLIC_SIZES, ids=lambda case: case.name)
def test_the_3bs_products_agree_with_numpy_and_200_runs_give_the_same_bits(gpu: Gpu, case: MatmulCase):
    data = matmul_data(case)
    first = check(gpu, data).tobytes()
    assert all(product(gpu, data).tobytes() == first for _ in range(199))
