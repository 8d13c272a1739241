"""Free memory is the least of what the machine and the control groups around the process have left."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.bundle import Bundle
from edge.capacity import check_fits, plan_for_bundle
from edge.errors import MemoryBudgetError
from edge.memory import _group_bytes, _machine_bytes, available_bytes
from edge.session import StreamSession


def group(folder: Path, limit: str, used: int, droppable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")


def test_each_limited_group_around_the_process_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    group(root, "9000", 1000)
    group(root / "machine", "max", 4000)
    group(root / "machine" / "kiosk", "5000", 4500, droppable=300)
    (tmp_path / "membership").write_text("4:memory:/elsewhere\n0::/machine/kiosk\n")
    assert list(_group_bytes(tmp_path / "membership", root)) == [800, 8000]


@pytest.mark.parametrize("text", ["", "0::/\n", "0::/gone\n", "4:memory:/old\n", "0::/../..\n"])
def test_groups_that_say_nothing_limit_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "membership").write_text(text)
    assert list(_group_bytes(tmp_path / "membership", tmp_path / "cgroup")) == []
    assert list(_group_bytes(tmp_path / "missing", tmp_path / "cgroup")) == []


def test_the_machine_is_asked(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4 kB\n")
    assert _machine_bytes(tmp_path / "meminfo") == 4096
    (tmp_path / "meminfo").write_text("MemAvailable: much\n")
    assert _machine_bytes(tmp_path / "meminfo") is None
    assert (available_bytes() or 0) > 0


@pytest.mark.parametrize("policy", ["slide", "rebuild"])
def test_the_window_that_is_proposed_fits_and_one_turn_more_does_not(scripted: Bundle, policy: str) -> None:
    wanted = plan_for_bundle(scripted, 500, policy=policy)
    free = wanted.total_bytes - 7 * wanted.turn_bytes
    with pytest.raises(MemoryBudgetError, match=r"500 turns needs .* .B: .* .B is free") as caught:
        check_fits(wanted, free_bytes=free)
    assert caught.value.hint == "Use `--window 493` or less"
    check_fits(plan_for_bundle(scripted, 493, policy=policy), free_bytes=free)
    with pytest.raises(MemoryBudgetError):
        check_fits(plan_for_bundle(scripted, 494, policy=policy), free_bytes=free)
    with pytest.raises(MemoryBudgetError, match="weights"):
        check_fits(plan_for_bundle(scripted, 493, policy=policy), weights_bytes=wanted.turn_bytes, free_bytes=free)


def test_where_not_even_a_short_window_fits_another_way_out_is_named(
    scripted: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.session.available_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError) as caught:
        StreamSession(scripted, backend=_NeverAllocates())  # type: ignore[arg-type]
    assert "--max-reply-tokens" in (caught.value.hint or "")


class _NeverAllocates:
    evicts_in_place = True

    def allocate_cache(self, capacity_tokens: int) -> None:
        raise AssertionError("memory was taken before it was known to fit")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from scripted import scripted_bundle

    return scripted_bundle(tmp_path_factory.mktemp("scripted"))
