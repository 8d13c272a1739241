"""The benchmark of the native kernels: who is timed when, what a line reports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import needs_kernels, nmse

from apps.bench import attention, kernels, matmul, model, peaks, random_model, timing
from apps.bench.stock_operators import GroupQueryAttention, MatMulNBits
from apps.bench.timing import FASTEST, PEAK, Contestant, SelfTimed, Times, Work
from apps.bench.workers import Worker
from apps.cli.main import main
from edge import native
from edge.errors import UsageError


def line(**goals: float) -> dict:
    times = {"ours": Times([20.0, 10.0, 30.0]), "slow": Times([50.0, 60.0]), "fast": Times([30.0, 40.0])}
    return timing.row("kernel", "2 x 3", 2, times, Work(1e6, 2e5, "int8_gops"), goals)


def test_everybody_gets_a_turn_in_every_round(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0)
    order: list[str] = []
    contestants = {name: Contestant(lambda name=name: order.append(name), calls=2) for name in ("ours", "stock")}
    monkeypatch.setattr(timing, "_repeats", lambda contestant: 1)
    times = timing.interleave(contestants, rounds=3)
    assert order == ["ours", "stock"] * 3
    assert all(len(found.us) == 3 for found in times.values())


def test_one_that_takes_its_own_time_gets_its_turns_among_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "SETTLE_S", 0)
    monkeypatch.setattr(timing, "_repeats", lambda contestant: 1)
    order: list[str] = []

    def measure_us() -> float:
        order.append("peer")
        return 10.0 * len(order)

    contestants = {"ours": Contestant(lambda: order.append("ours")), "peer": SelfTimed(measure_us, calls=2)}
    times = timing.interleave(contestants, rounds=2)
    assert order == ["peer", "ours", "peer", "ours", "peer"]  # the first one warms up
    assert times["peer"].us == [15.0, 25.0]


def test_a_line_compares_minima_with_the_fastest_of_the_others():
    found = line(**{"slow": 4.0, FASTEST: 3.5, "absent": 9.0})
    assert (found["ours_us"], found["ours_us_median"]) == (10.0, 20.0)
    assert (found["stock"], found["stock_us"], found["stock_us_median"]) == ("fast", 30.0, 35.0)
    assert found["speedup"] == 3.0
    assert (found["gops"], found["gbs"]) == (100.0, 20.0)
    assert found["goals"]["slow"] == {"wanted": 4.0, "found": 5.0, "reached": True}
    assert found["goals"][FASTEST]["reached"] is False
    assert "absent" not in found["goals"]
    json.dumps(found)


def test_the_fraction_of_the_peak_is_of_what_bounds_the_work():
    found = line(**{PEAK: 0.65})
    timing.add_fraction_of_peak(found, {"int8_gops": 200.0, "read_gbs": 30.0, "f32_gops": 50.0})
    assert found["fraction_of_peak"] == 0.5
    assert found["goals"][PEAK] == {"wanted": 0.65, "found": 0.5, "reached": False}


def test_the_tables_hold_every_line():
    found = line(**{FASTEST: 2.0, PEAK: 0.3})
    timing.add_fraction_of_peak(found, {"int8_gops": 200.0})
    result = {"peaks": {"2": {"read_gbs": 30.0, "int8_gops": 200.0, "f32_gops": 50.0}}, "rows": [found]}
    text = kernels.markdown(result)
    assert "| 2 | 30.0 | 200 | 50 |" in text
    assert "kernel: 2 x 3" in text and "2.00x the fastest: reached (3.00x)" in text and "50% (100 GOP/s)" in text


def test_the_best_of_several_peaks_is_kept():
    first, second = {"1": {"read_gbs": 5.0, "int8_gops": 9.0}}, {"1": {"read_gbs": 7.0, "int8_gops": 8.0}}
    assert peaks.best_of(first, second) == {"1": {"read_gbs": 7.0, "int8_gops": 9.0}}


@needs_kernels
def test_peaks_are_measured_for_each_number_of_threads():
    found = peaks.measure([1, 2], 1, read_bytes=1 << 22)
    assert set(found) == {"1", "2"}
    assert all(value > 0 for best in found.values() for value in best.values())


@needs_kernels
def test_our_contestants_run():
    pytest.importorskip("onnx")
    with native.Threads(1) as pool:
        for kv in attention.KV_TYPES:
            ours = attention.OurAttention((4, 2, 64), 3, 100, 2, kv, pool)
            ours.run()
            assert all(np.isfinite(kept[0]).all() for kept in ours._kept)
        matmul.OurProducts(5, 64, 32, 4, 32, 2, pool).run()
        matmul.OurProducts(1, 64, 32, 8, 32, 2, pool).run()


def test_stock_contestants_run():
    pytest.importorskip("onnx")
    GroupQueryAttention((4, 2, 64), 3, 100, 2, 1).run()
    product = MatMulNBits(64, 32, 5, 4, 32, 2, 1)
    product.run()
    assert np.isfinite(product._output).all()


def test_random_weights_are_stored_as_the_graphs_expect_them(tmp_path: Path):
    pytest.importorskip("onnx")
    from export.weight_store import WeightFile

    with WeightFile(tmp_path / "data") as file:
        weights = random_model.RandomWeights(file, 0, 32)
        weights.matrix("four", 64, 10, "int4")
        weights.matrix("eight", 64, 10, "int8")
        weights.table("embedding", (10, 256), "int8", 1.0)
    assert weights.stored["four.weight"].length == 320 and weights.stored["eight.weight"].length == 640
    assert weights.stored["four.scale"].shape == (2, 10)
    assert weights.stored["embedding"].dtype == "int8" and weights.stored["embedding.scale"].shape == (10, 2)


@needs_kernels
@pytest.mark.slow
def test_a_small_model_is_measured_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The full shape with one layer; the two graphs must also say the same."""
    pytest.importorskip("onnx")
    monkeypatch.setattr(model, "DECODER_GOALS", {(144, 0): {}, (1, 64): {}})
    rows = model.measure(tmp_path, 1, 1, layers=1)
    assert {row["name"] for row in rows} == {"append 144 tokens", "decode one token", "vision tower"}
    assert all(row["ours_us"] > 0 and row["stock"] == "ONNX Runtime" for row in rows)
    (folder,) = tmp_path.iterdir()
    (logits, visual), (stock_logits, stock_visual) = (_results(folder, stock) for stock in (False, True))
    assert nmse(logits, stock_logits) < 1e-3 and nmse(visual, stock_visual) < 1e-3


def _results(folder: Path, stock: bool) -> tuple[np.ndarray, np.ndarray]:
    from apps.bench.decoder_worker import Model
    from apps.bench.model_worker import opened

    loaded = Model(opened(folder, stock=stock), "cpu", 1, 160)
    assert loaded.backend.evicts_in_place is not stock
    loaded._random = np.random.default_rng(5)
    loaded.append(tokens=16, depth=0)
    logits = loaded.result.copy()
    loaded.encode(4, 6)
    return logits, loaded.result


def test_a_worker_that_dies_is_an_error_with_its_last_words():
    import sys

    with pytest.raises(UsageError, match="ended with code 3: no luck"):
        Worker("nobody", [sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(UsageError, match="cannot be started"):
        Worker("nobody", ["/no/such/program"])


@needs_kernels
def test_the_command_ends_with_one_json_document(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peaks, "measure", lambda *_: {"1": {"read_gbs": 1.0, "int8_gops": 2.0, "f32_gops": 3.0}})
    assert main(["bench", "kernels", "--only", "peaks", "--threads", "1", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["rows"] == [] and result["peaks"]["1"]["read_gbs"] == 1.0


@pytest.mark.parametrize(
    "words", [["--only", "everything"], ["--threads", "0"], ["--threads", "1,x"], ["--repeats", "0"]]
)
def test_wrong_options_are_refused(words: list[str], capfd: pytest.CaptureFixture[str]):
    assert main(["bench", "kernels", *words]) == 2
    assert "error:" in capfd.readouterr().err
