"""The search for the fastest algorithm, with children that break."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sparse_export.sparsity import cusparselt, search24
from sparse_export.sparsity.search24 import DEFAULT, ProductSize, fastest, search

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
        for (place, algorithm), took in self.times.items():
            if (place, algorithm) in done:
                continue
            yield f"try {place} {algorithm}"
            if took is None:
                return
            yield took if isinstance(took, str) else f"took {took}"


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


def test_where_nothing_works_the_librarys_own_choice_is_left() -> None:
    children = Children({(place, algorithm): None for place in (0, 1) for algorithm in range(-1, 40)})
    assert search(SIZES, children) == {SIZES[0]: DEFAULT, SIZES[1]: DEFAULT}
    assert children.n < 20  # it gives up


def test_what_was_found_is_kept_for_the_card_and_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cusparselt, "version", lambda: "0.8.0")
    asked: list[list[ProductSize]] = []

    def found(sizes: list[ProductSize]) -> dict[ProductSize, int]:
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
