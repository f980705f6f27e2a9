from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparse_export.instruments.pinning import cores_to_use, pinned

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system does not say on which cores a process runs"
)
needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="this process may use one core only, so there is nothing to pin",
)


@needs_affinity
@needs_two_cores
def test_threads_are_held_to_as_many_cores_and_let_go_again_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="broken"), pinned(1) as cores:
        assert os.sched_getaffinity(0) == set(cores)
        assert len(cores) == 1
        raise RuntimeError("broken")
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_as_many_threads_as_cores_are_not_pinned() -> None:
    before = os.sched_getaffinity(0)
    with pinned(len(before)) as cores:
        assert cores == ()
        assert os.sched_getaffinity(0) == before


def _machine(folder: Path, siblings: list[str]) -> Path:
    for core, text in enumerate(siblings):
        place = folder / f"cpu{core}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("siblings", "n_threads", "wanted"),
    [
        (["0,4", "1,5", "2,6", "3,7"] * 2, 4, (0, 1, 2, 3)),
        (["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"], 4, (0, 2, 4, 6)),
        (["0-1", "0-1", "2-3", "2-3", "4-5", "4-5", "6-7", "6-7"], 5, (0, 1, 2, 4, 6)),
        (["what"] * 8, 3, (0, 1, 2)),
    ],
)
def test_each_physical_core_is_used_once_before_any_is_used_twice(
    siblings: list[str],
    n_threads: int,
    wanted: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores_to_use(n_threads, _machine(tmp_path, siblings)) == wanted


def test_a_machine_that_tells_nothing_of_its_cores_still_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert cores_to_use(1, tmp_path) == (3,)


def test_a_system_without_affinity_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores_to_use(1) == ()
