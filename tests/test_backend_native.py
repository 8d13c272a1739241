"""One bundle, two sets of graphs: the native ones give what the stock ones give, and stand in for each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from kernel_cases import needs_kernels

from edge import kernels_abi
from edge.backends.base import CacheView
from edge.backends.ort import OrtBackend
from edge.bundle import Bundle
from edge.errors import BackendError
from edge.rope import decoder_rope, text_positions

CAPACITY = 40
Tables = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels_abi.load_library.cache_clear()
    monkeypatch.setenv(kernels_abi.LIBRARY_VARIABLE, kernels_abi.OFF)
    yield
    kernels_abi.load_library.cache_clear()


@pytest.fixture
def stock(demo_bundle: Bundle, without_kernels: None) -> OrtBackend:
    return OrtBackend(demo_bundle, threads=2)


@pytest.fixture(scope="module")
def with_native(demo_bundle: Bundle) -> OrtBackend:
    return OrtBackend(demo_bundle, threads=2)


def view_of(slots: list[int], spans: list[tuple[int, int, int]], runs: Tables) -> CacheView:
    return CacheView(np.array(slots, np.int32), np.array(spans, np.int32).reshape(-1, 3), *runs)


def tokens_of(backend: OrtBackend, position: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings and angles of `count` tokens; the same for the same positions."""
    facts = backend._manifest.decoder_facts
    embeds = [np.random.default_rng(position + i).standard_normal(facts.hidden_size) for i in range(count)]
    return (
        np.array(embeds, np.float32),
        *decoder_rope(facts).tables(np.asarray(text_positions(position, count))),
    )


def no_runs(backend: OrtBackend) -> Tables:
    empty = np.zeros((0, backend._manifest.decoder_facts.head_dim // 2), np.float32)
    return empty, empty


def one_run(backend: OrtBackend, shift: int) -> Tables:
    return decoder_rope(backend._manifest.decoder_facts).tables(np.asarray(text_positions(shift, 1)))


def three_appends(backend: OrtBackend) -> list[np.ndarray]:
    """Logits of a cache filled from its first row."""
    backend.allocate_cache(CAPACITY)
    runs, logits, filled = one_run(backend, 0), [], 0
    for count in (7, 1, 5):
        spans = [(0, filled, 0)] if filled else []
        view = view_of(list(range(filled, filled + count)), spans, runs if filled else no_runs(backend))
        logits.append(backend.run_decoder(*tokens_of(backend, filled, count), view).copy())
        filled += count
    return logits


@needs_kernels
def test_native_and_stock_graphs_give_the_same_logits(with_native: OrtBackend, stock: OrtBackend) -> None:
    assert with_native.evicts_in_place and not stock.evicts_in_place
    for found, expected in zip(three_appends(with_native), three_appends(stock), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (10, 6), (2, 30), (18, 12)])
def test_native_and_stock_graphs_see_the_same_frame(
    with_native: OrtBackend, stock: OrtBackend, rows: int, columns: int
) -> None:
    width = 3 * with_native._manifest.preprocess.patch_size**2
    patches = np.random.default_rng(rows).standard_normal((rows * columns, width)).astype(np.float32)
    found, expected = (backend.encode(patches, rows, columns) for backend in (with_native, stock))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@needs_kernels
def test_a_window_that_slid_gives_the_logits_of_one_that_stayed_where_it_was(with_native: OrtBackend) -> None:
    backend, rope = with_native, decoder_rope(with_native._manifest.decoder_facts)
    nothing, unmoved = no_runs(backend), one_run(backend, 0)
    kept = tokens_of(backend, 6, 4)
    embeds, cos, sin = tokens_of(backend, 4, 3)

    backend.allocate_cache(CAPACITY)
    backend.run_decoder(*tokens_of(backend, 0, 6), view_of(list(range(6)), [], nothing))
    backend.run_decoder(*kept, view_of([6, 7, 8, 9], [(0, 6, 0)], unmoved))
    angles = rope.tables(np.asarray(text_positions(10, 3)))
    expected = backend.run_decoder(embeds, *angles, view_of([10, 11, 12], [(6, 4, 0)], unmoved)).copy()

    # In other rows, and now the first six leave: positions 6 .. 9 become 0 .. 3, and the new tokens start at 4.
    backend.allocate_cache(CAPACITY)
    backend.run_decoder(*tokens_of(backend, 0, 6), view_of(list(range(20, 26)), [], nothing))
    backend.run_decoder(*kept, view_of([3, 9, 4, 5], [(20, 6, 0)], unmoved))
    stays = [(3, 1, 0), (9, 1, 0), (4, 2, 0)]
    slid = backend.run_decoder(embeds, cos, sin, view_of([20, 21, 30], stays, one_run(backend, 6)))
    np.testing.assert_allclose(slid, expected, atol=1e-4 * np.abs(expected).max())


@needs_kernels
def test_where_all_is_as_it_should_be_nothing_is_said(with_native: OrtBackend) -> None:
    assert with_native.notices == []


def test_without_the_library_stock_graphs_are_used_and_that_is_said_once(stock: OrtBackend) -> None:
    (notice,) = stock.notices
    assert "switched off" in notice and "Stock operators" in notice


def test_the_stock_graph_refuses_a_window_with_gaps(stock: OrtBackend) -> None:
    stock.allocate_cache(CAPACITY)
    with pytest.raises(BackendError, match="found a window with gaps"):
        stock.run_decoder(*tokens_of(stock, 0, 2), view_of([5, 6], [(0, 3, 0)], one_run(stock, 0)))


@needs_kernels
def test_a_bundle_without_native_graphs_runs_on_stock_ones_and_says_so(demo_bundle: Bundle) -> None:
    manifest = demo_bundle.manifest
    plain = [dataclasses.replace(part, native_file="") for part in (manifest.vision, manifest.decoder)]
    bundle = dataclasses.replace(demo_bundle, manifest=dataclasses.replace(manifest, vision=plain[0], decoder=plain[1]))
    backend = OrtBackend(bundle)
    assert not backend.evicts_in_place
    assert len(backend.notices) == 1 and "no native graph of its vision and decoder" in backend.notices[0]


@needs_kernels
def test_an_operators_refusal_reaches_the_user_as_one_sentence(with_native: OrtBackend) -> None:
    with_native.allocate_cache(CAPACITY)
    view = view_of([CAPACITY], [], no_runs(with_native))
    with pytest.raises(BackendError, match=f"decoder.native.onnx.*streamo::SpanAttention: .*{CAPACITY}"):
        with_native.run_decoder(*tokens_of(with_native, 0, 1), view)
