"""Our model of the Python backend on engines: the profile of a batch, and what it is allowed to load."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.serving.package import package
from tests.card import Card, Profiles
from tests.serving.conftest import Bundles
from tests.serving.engines import model_of, pretend, with_engines

SAMPLE = (1, 8, 8)
ENGINE = "tensorrt-fp16-sm90.engine"
Make = Callable[..., contextlib.AbstractContextManager[tuple[Any, Card]]]


@pytest.fixture
def make(bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A model of a bundle with an engine of these profiles, on a card that is none."""

    @contextlib.contextmanager
    def make(
        profiles: Profiles, *, version_compatible: bool = False, loads: bool = True
    ) -> Iterator[tuple[Any, Card]]:
        card = Card(capability=(9, 0), profiles=profiles, sample=SAMPLE, loads=loads)
        pretend(card, monkeypatch)
        bundle = with_engines(
            bundles.dense,
            tmp_path / "net",
            ENGINE,
            profiles=profiles,
            version_compatible=version_compatible,
        )
        made = package([bundle], [None], tmp_path / "out", runtimes=["python"])
        with contextlib.contextmanager(model_of)(made.path / "model_repository" / "net-python") as model:
            yield model, card

    return make


def _batch(n: int, seed: int = 0) -> np.ndarray:
    x: np.ndarray = np.random.default_rng(seed).standard_normal((n, *SAMPLE), dtype=np.float32)
    return x


def test_each_batch_runs_in_the_profile_that_is_tuned_nearest_to_it(make: Make) -> None:
    with make([(1, 1, 4), (2, 8, 16), (16, 32, 32)]) as (model, card):
        for n in (1, 4, 5, 16, 20, 2, 32):
            (answer,) = model.execute([_batch(n)])
            assert answer.error is None
            np.testing.assert_array_equal(answer.tensors[0], 2 * _batch(n))
    assert card.executed == [(1, 0), (4, 0), (5, 1), (16, 1), (20, 2), (2, 0), (32, 2)]
    assert card.memory == {}  # all of it was freed


def test_requests_that_were_merged_get_their_own_answers(make: Make) -> None:
    with make([(1, 8, 32)]) as (model, card):
        answers = model.execute([_batch(3, 1), _batch(1, 2)])
    assert card.executed == [(4, 0)]
    for answer, x in zip(answers, (_batch(3, 1), _batch(1, 2)), strict=True):
        np.testing.assert_array_equal(answer.tensors[0], 2 * x)


def test_a_batch_that_no_profile_takes_is_an_error_with_the_sizes_and_the_next_one_is_answered(
    make: Make,
) -> None:
    with make([(1, 2, 4), (5, 8, 8)]) as (model, card):
        (refused,) = model.execute([_batch(9)])
        (answer,) = model.execute([_batch(8)])
    assert "a batch of 9 fits no profile of the engine, which takes 1 to 4, 5 to 8" in refused.error
    assert answer.error is None
    assert card.executed == [(8, 1)]


@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_a_version_compatible_engine_may_run_code_that_it_brings_along(
    version_compatible: bool, make: Make
) -> None:
    with make([(1, 8, 32)], version_compatible=version_compatible) as (_, card):
        assert card.host_code_allowed == [version_compatible]


def test_an_engine_that_does_not_load_is_told_of_when_the_model_starts(make: Make) -> None:
    with pytest.raises(RuntimeError, match=r"TensorRT 11\.1\.0 cannot load"), make([(1, 8, 32)], loads=False):
        pass


@pytest.mark.parametrize("name", ["model.onnx", "model-sm90.plan"])
def test_a_file_that_it_has_no_hash_of_is_not_loaded(
    name: str, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(capability=(9, 0), profiles=[(1, 8, 32)], sample=SAMPLE)
    pretend(card, monkeypatch)
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, profiles=[(1, 8, 32)])
    made = package([bundle], [None], tmp_path / "out", runtimes=["python"])
    model = made.path / "model_repository" / "net-python"
    facts = json.loads((model / "1" / "model.json").read_text())
    del facts["sha256"][name]
    (model / "1" / "model.json").write_text(json.dumps(facts))
    with (
        pytest.raises(RuntimeError, match=f"model.json has no SHA-256 of {name}, so it is not used"),
        contextlib.contextmanager(model_of)(model),
    ):
        pass
