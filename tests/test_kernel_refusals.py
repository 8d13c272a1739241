"""What the C interface refuses: with a code and a sentence, before anything is written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kernel_cases import available_sets, instruction_set, needs_kernels

from apps.bench.kernel_cases import AttentionCase, AttentionData, MatmulCase, Piece, attention_data, matmul_data
from edge import kernels_abi as abi
from edge import native
from edge.errors import KernelError
from edge.kernel_arguments import attention_arguments, matmul_arguments, weights_source

pytestmark = needs_kernels
BAD_ARGUMENT, UNSUPPORTED = 1, 2
BASE = AttentionCase("refused", 4, 2, 64, 3, (Piece(20), Piece(10, 1, 2)), (0, 9), offset=True)


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


ATTENTION_FIELDS: list[tuple[str, Any]] = [
    ("query_heads", 0),
    ("query_heads", 3),
    ("query_heads", -4),
    ("kv_heads", 0),
    ("kv_heads", -2),
    ("head_dim", 0),
    ("head_dim", 8),
    ("head_dim", 65),
    ("head_dim", 272),
    ("head_dim", -64),
    ("capacity", 0),
    ("capacity", -1),
    ("new_tokens", 0),
    ("new_tokens", -1),
    ("kv_type", 7),
    ("span_count", -1),
    ("run_count", -1),
    ("run_count", 1),
    *((name, None) for name in ("qkv", "rope_cos", "rope_sin", "key_cache", "value_cache", "key_scales", "value_scales",
                                "slot_cos", "slot_sin", "new_slots", "spans", "run_cos", "run_sin", "output")),
]  # fmt: skip

ATTENTION_TABLES: list[tuple[str, str, np.ndarray]] = [
    ("a slot below the cache", "new_slots", int32(33, -1, 35)),
    ("a slot above the cache", "new_slots", int32(33, 34, 38)),
    ("a slot far above the cache", "new_slots", int32(33, 34, 2**31 - 1)),
    ("a slot twice", "new_slots", int32(33, 34, 33)),
    ("a new slot inside a span", "new_slots", int32(33, 34, 5)),
    ("a span below the cache", "spans", int32(-1, 20, 0, 22, 10, 1)),
    ("a span above the cache", "spans", int32(0, 20, 0, 30, 10, 1)),
    ("a span whose end overflows", "spans", int32(0, 20, 0, 22, 2**31 - 1, 1)),
    ("a negative length", "spans", int32(0, 20, 0, 22, -1, 1)),
    ("a run that does not exist", "spans", int32(0, 20, 0, 22, 10, 2)),
    ("a negative run", "spans", int32(0, 20, -1, 22, 10, 1)),
    ("spans that overlap", "spans", int32(0, 20, 0, 19, 5, 1)),
]


def contents(data: AttentionData) -> bytes:
    caches = (data.key_cache, data.value_cache, data.key_scales, data.value_scales)
    return b"".join(cache.tobytes() for cache in caches if cache is not None)


def refused_attention(data: AttentionData, change: Callable[[Any], None]) -> list[tuple[int, str]]:
    """Status and sentence of both entry points after `change` of the C struct; nothing may have been written."""
    given = {"scale": None, **data.arguments()}
    arguments, output, _kept = attention_arguments(given)
    output[:] = 7
    change(arguments)
    before, library = contents(data), abi.load_library()
    results = []
    for status in (
        lambda: library.streamo_attention_run(ctypes.byref(arguments), None),
        lambda: library.streamo_attention_reference(ctypes.byref(arguments)),
    ):
        results.append((status(), abi.last_error(library)))
    assert contents(data) == before
    assert (output == 7).all()
    return results


@pytest.mark.parametrize(("name", "value"), ATTENTION_FIELDS, ids=lambda value: str(value))
def test_attention_refuses_a_field_that_does_not_fit(name: str, value: Any):
    data = attention_data(BASE)
    for status, sentence in refused_attention(data, lambda arguments: setattr(arguments, name, value)):
        assert status in (BAD_ARGUMENT, UNSUPPORTED)
        assert len(sentence) > 10 and "\n" not in sentence


@pytest.mark.parametrize(("what", "name", "table"), ATTENTION_TABLES, ids=[case[0] for case in ATTENTION_TABLES])
def test_attention_refuses_slots_and_spans_that_do_not_fit(what: str, name: str, table: np.ndarray):
    data = attention_data(BASE)
    for status, sentence in refused_attention(data, lambda arguments: setattr(arguments, name, table.ctypes.data)):
        assert status == BAD_ARGUMENT
        assert any(character.isdigit() for character in sentence), sentence


def test_a_float_cache_refuses_an_offset():
    data = attention_data(AttentionCase("float", 4, 2, 64, 3, (Piece(20),), kv="float32"))
    offset = np.zeros((2, 64), np.float32)
    for status, _ in refused_attention(data, lambda arguments: setattr(arguments, "key_offset", offset.ctypes.data)):
        assert status == BAD_ARGUMENT


def test_no_arguments_at_all_are_refused():
    library = abi.load_library()
    for function in ("streamo_attention_run", "streamo_window_attention_run", "streamo_matmul_run"):
        arguments = (None, None, None) if function == "streamo_matmul_run" else (None, None)
        assert getattr(library, function)(*arguments) == BAD_ARGUMENT
        assert abi.last_error(library)
    assert library.streamo_weights_pack(None, None, None) == BAD_ARGUMENT
    library.streamo_weights_destroy(None)
    library.streamo_threads_destroy(None)


def test_the_sentence_is_gone_after_a_call_that_fits():
    data = attention_data(BASE)
    refused_attention(data, lambda arguments: setattr(arguments, "capacity", 0))
    native.attention(**data.arguments())
    assert abi.last_error(abi.load_library()) == ""


SOURCE_FIELDS = [("inputs", 0), ("inputs", -32), ("outputs", 0), ("outputs", -2), ("outputs", 31),
                 ("bits", 3), ("bits", 0), ("block", 0), ("block", 24), ("block", 512), ("block", -32), ("gated", 2),
                 ("codes", None), ("scales", None)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SOURCE_FIELDS, ids=lambda value: str(value))
def test_weights_that_do_not_fit_are_not_packed(name: str, value: Any):
    data = matmul_data(MatmulCase(128, 32, 2))
    source, _kept = weights_source(data.codes, data.scales, 4, 32, False)
    setattr(source, name, value)
    pointer, library = ctypes.c_void_p(), abi.load_library()
    status = library.streamo_weights_pack(ctypes.byref(source), None, ctypes.byref(pointer))
    assert status in (BAD_ARGUMENT, UNSUPPORTED)
    assert abi.last_error(library) and not pointer


PRODUCT_FIELDS = [("rows", 0), ("rows", -1), ("input", None), ("output", None), ("input_stride", 127),
                  ("input_stride", -128), ("output_stride", 31), ("output_stride", 0)]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PRODUCT_FIELDS, ids=lambda value: str(value))
def test_a_product_that_does_not_fit_is_refused(name: str, value: Any):
    data = matmul_data(MatmulCase(128, 32, 2))
    library = abi.load_library()
    with native.Weights(data.codes, data.scales, bits=4, block=32) as weights:
        arguments, output, _kept = matmul_arguments(data.input, (128, 32, False), None, None, None)
        output[:] = 7
        setattr(arguments, name, value)
        assert library.streamo_matmul_run(weights.pointer, ctypes.byref(arguments), None) == BAD_ARGUMENT
    assert abi.last_error(library) and (output == 7).all()


WINDOW_STARTS = [int32(0, 3, 2, 8), int32(1, 8), int32(0, 7), int32(0, 9), int32(-1, 8), int32(0, 3, 3, 7)]


@pytest.mark.parametrize("starts", WINDOW_STARTS, ids=str)
def test_windows_that_do_not_cover_the_rows_are_refused(starts: np.ndarray):
    qkv, table = np.zeros((8, 3 * 32), np.float32), np.zeros((8, 8), np.float32)
    with pytest.raises(KernelError):
        native.window_attention(qkv, table, table, starts, heads=2)
    with pytest.raises(KernelError):
        native.window_attention_reference(qkv, table, table, starts, heads=2)


def test_an_unknown_instruction_set_is_refused_and_the_old_one_stays():
    for name in available_sets():
        with instruction_set(name):
            with pytest.raises(KernelError):
                native.select_instruction_set("mmx")
            assert native.instruction_set() == name
    assert not native.instruction_set_available("mmx")


def test_the_best_instruction_set_is_chosen_by_itself():
    assert native.instruction_set() == available_sets()[0]
    assert "portable" in available_sets()
