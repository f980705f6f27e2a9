"""What the sessions of all runtimes have in common."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_export.errors import UsageError
from sparse_export.runtimes.session import BaseSession


class _Doubling(BaseSession):
    def __init__(self, shape: tuple[int | str | None, ...] | None = ("batch", 3)) -> None:
        super().__init__("doubling-cpu", np.float32, shape)
        self.n_freed = 0

    def _run(self, x: np.ndarray) -> np.ndarray:
        doubled: np.ndarray = 2 * x
        return doubled

    def _free(self) -> None:
        self.n_freed += 1


def test_memory_is_given_back_once_and_nothing_runs_afterwards() -> None:
    with _Doubling() as session:
        assert session.run(np.ones((2, 3), np.float32)).tolist() == [[2.0] * 3] * 2
    session.close()
    assert session.n_freed == 1
    with pytest.raises(UsageError, match="This session is closed"):
        session.run(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    "x",
    [np.ones((2, 3)), np.ones((2, 4), np.float32), np.ones(3, np.float32), np.ones((2, 3, 1), np.float32)],
)
def test_a_batch_of_another_type_or_shape_is_not_run(x: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"float32 of shape \(any, 3\) was expected"):
        _Doubling().run(x)


def test_where_no_shape_is_known_only_the_type_is_checked() -> None:
    session = _Doubling(None)
    assert session.run(np.ones((5, 7), np.float32)).shape == (5, 7)
    with pytest.raises(UsageError, match=r"The input is float64 .* float32 was expected"):
        session.run(np.ones((5, 7)))
