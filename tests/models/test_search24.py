"""The search for the fastest algorithm, with children that break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from sparse_export.models import search24
from sparse_export.models.search24 import ProductSize, fastest, search
from sparse_export.sparsity import cusparselt
from sparse_export.sparsity.product24 import DEFAULT

SIZES = [
    ProductSize(n_outputs=64, n_inputs=32, n_rows=8, dtype="float16"),
    ProductSize(n_outputs=32, n_inputs=64, n_rows=16, dtype="bfloat16"),
]


class Children:
    """Times by (size, algorithm); None breaks the child, `refused` is refused by the library."""

    def __init__(self, times: dict[tuple[int, int], float | str | None]) -> None:
        self.times, self.n = times, 0

    def __call__(self, sizes: Sequence[ProductSize], done: Sequence[tuple[int, int]]) -> Iterator[str]:
        self.n += 1
        for place in range(len(sizes)):
            for (of, algorithm), took in self.times.items():
                if of != place or (place, algorithm) in done:
                    continue
                yield f"try {place} {algorithm}"
                if took is None:
                    yield "failed an illegal instruction"
                    return
                yield took if isinstance(took, str) else f"took {took}"
            yield f"ended {place}"


def test_the_fastest_of_those_that_work_is_taken() -> None:
    children = Children({(0, -1): 3.0, (0, 0): 2.0, (0, 1): 2.5, (1, -1): 1.0, (1, 0): 1.5})
    assert search(SIZES, children) == {SIZES[0]: 0, SIZES[1]: DEFAULT}
    assert children.n == 1


def test_an_algorithm_that_breaks_its_process_is_left_out_and_the_others_are_tried() -> None:
    children = Children(
        {(0, -1): 3.0, (0, 0): None, (0, 1): 2.0, (1, -1): None, (1, 0): "refused", (1, 1): 4.0}
    )
    assert search(SIZES, children) == {SIZES[0]: 1, SIZES[1]: 1}
    assert children.n == 3


def test_where_everything_breaks_it_gives_up_finds_nothing_and_says_so() -> None:
    children = Children({(place, algorithm): None for place in (0, 1) for algorithm in range(-1, 40)})
    with pytest.warns(UserWarning, match="2 of 2 sizes .* illegal instruction"):
        assert search(SIZES, children) == {}
    assert children.n < 20


def test_a_size_that_refuses_every_algorithm_is_left_to_the_librarys_own_choice() -> None:
    children = Children({(0, -1): "refused", (0, 0): "refused", (1, -1): 2.0, (1, 0): 1.0})
    assert search(SIZES, children) == {SIZES[0]: DEFAULT, SIZES[1]: 0}


def test_a_child_that_says_nothing_finds_nothing_and_what_is_not_understood_is_passed_over() -> None:
    with pytest.warns(UserWarning, match="2 of 2"):
        assert search(SIZES, lambda sizes, done: iter(())) == {}
    with pytest.warns(UserWarning, match="1 of 2"):
        found = search(SIZES, lambda *_: iter(["", "a notice", "try 0 3", "took 1.5", "ended 0"]))
    assert found == {SIZES[0]: 3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")
def test_a_real_child_without_a_card_tells_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('another torch was imported')")
    monkeypatch.chdir(tmp_path)
    (last,) = search24._child(0, SIZES, [])
    assert last.startswith("failed")
    assert "another torch" not in last


def test_what_was_found_is_kept_for_the_card_and_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cusparselt, "version", lambda: "0.8.0")
    asked: list[list[ProductSize]] = []

    def found(sizes: list[ProductSize], *_: object) -> dict[ProductSize, int]:
        asked.append(sizes)
        return dict.fromkeys(sizes, 7)

    monkeypatch.setattr(search24, "search", found)
    monkeypatch.setattr(search24, "_known", {})
    assert fastest([SIZES[0], SIZES[0]], "a card") == {SIZES[0]: 7}
    assert fastest(SIZES, "a card") == dict.fromkeys(SIZES, 7)
    assert asked == [[SIZES[0]], [SIZES[1]]]
    monkeypatch.setattr(search24, "_known", {})  # as in another process
    assert fastest(SIZES, "a card") == dict.fromkeys(SIZES, 7)
    assert len(asked) == 2
    fastest(SIZES, "another card")
    assert asked[2:] == [SIZES]
    (tmp_path / "sparse-export" / "algorithms24.json").write_text('[{"where": 3}]')
    monkeypatch.setattr(search24, "_known", {})
    assert fastest(SIZES, "a card") == dict.fromkeys(SIZES, 7)  # what is damaged is found again
    assert asked[3:] == [SIZES]

    def nothing(sizes: list[ProductSize], *_: object) -> dict[ProductSize, int]:
        asked.append(sizes)
        return {}

    monkeypatch.setattr(search24, "search", nothing)
    monkeypatch.setattr(search24, "_known", {})
    monkeypatch.setattr(search24, "_failed", set())
    asked.clear()
    for _ in range(2):
        assert fastest(SIZES, "a third card") == dict.fromkeys(SIZES, DEFAULT)
    assert asked == [SIZES]  # a search that failed is not repeated in this process
    assert "a third card" not in (tmp_path / "sparse-export" / "algorithms24.json").read_text()
