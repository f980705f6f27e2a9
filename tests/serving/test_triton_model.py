"""Our model of the Python backend on engines: the profile of a batch, and what it is allowed to load."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.errors import UsageError
from sparse_export.serving.package import package
from sparse_export.serving.repository import golden_batch, largest_batch, open_served
from sparse_export.serving.settings import ModelSettings
from tests.card import Card, Profiles, batches, vectors
from tests.named_graphs import SPOKEN, WORDS, spoken_graph, words_graph
from tests.serving.conftest import Bundles
from tests.serving.engines import model_of, pretend, with_engines
from tests.serving.named_bundles import named_bundle

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
        card = Card(capability=(9, 0), profiles=profiles, signature=vectors(*SAMPLE), loads=loads)
        pretend(card, monkeypatch)
        bundle = with_engines(
            bundles.dense,
            tmp_path / "net",
            ENGINE,
            profiles=profiles,
            version_compatible=version_compatible,
        )
        made = package([bundle], [None], tmp_path / "out", runtimes=["python"])
        with contextlib.contextmanager(model_of)(made.path / "model_repository" / "net") as model:
            yield model, card

    return make


def _request(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((n, *SAMPLE), dtype=np.float32)}


def test_each_batch_runs_in_the_profile_that_is_tuned_nearest_to_it(make: Make) -> None:
    with make(batches((1, 1, 4), (2, 8, 16), (16, 32, 32))) as (model, card):
        for n in (1, 4, 5, 16, 20, 2, 32):
            (answer,) = model.execute([_request(n)])
            assert answer.error is None
            np.testing.assert_array_equal(answer.tensors[0], 2 * _request(n)["input"])
    assert card.executed == [(1, 0), (4, 0), (5, 1), (16, 1), (20, 2), (2, 0), (32, 2)]
    assert card.memory == {}  # all of it was freed


def test_requests_that_were_merged_get_their_own_answers(make: Make) -> None:
    with make(batches((1, 8, 32))) as (model, card):
        answers = model.execute([_request(3, 1), _request(1, 2)])
    assert card.executed == [(4, 0)]
    for answer, x in zip(answers, (_request(3, 1), _request(1, 2)), strict=True):
        np.testing.assert_array_equal(answer.tensors[0], 2 * x["input"])


def test_a_batch_that_no_profile_takes_is_an_error_with_the_sizes_and_the_next_one_is_answered(
    make: Make,
) -> None:
    with make(batches((1, 2, 4), (5, 8, 8))) as (model, card):
        (refused,) = model.execute([_request(9)])
        (answer,) = model.execute([_request(8)])
    sizes = [f"input ({least}, 1, 8, 8) to ({most}, 1, 8, 8)" for least, most in ((1, 4), (5, 8))]
    told = f"input (9, 1, 8, 8) fits no profile of the engine, which takes {sizes[0]}; {sizes[1]}"
    assert told in refused.error
    assert answer.error is None
    assert card.executed == [(8, 1)]


@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_a_version_compatible_engine_may_run_code_that_it_brings_along(
    version_compatible: bool, make: Make
) -> None:
    with make(batches((1, 8, 32)), version_compatible=version_compatible) as (_, card):
        assert card.host_code_allowed == [version_compatible]


def test_an_engine_that_does_not_load_is_told_of_when_the_model_starts(make: Make) -> None:
    with (
        pytest.raises(RuntimeError, match=r"TensorRT 11\.1\.0 cannot load"),
        make(batches((1, 8, 32)), loads=False),
    ):
        pass


@pytest.mark.parametrize("name", ["model.onnx", "model-sm90.plan"])
def test_a_file_that_it_has_no_hash_of_is_not_loaded(
    name: str, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(capability=(9, 0), profiles=batches((1, 8, 32)), signature=vectors(*SAMPLE))
    pretend(card, monkeypatch)
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, profiles=batches((1, 8, 32)))
    made = package([bundle], [None], tmp_path / "out", runtimes=["python"])
    model = made.path / "model_repository" / "net"
    facts = json.loads((model / "1" / "model.json").read_text())
    del facts["sha256"][name]
    (model / "1" / "model.json").write_text(json.dumps(facts))
    with (
        pytest.raises(RuntimeError, match=f"model.json has no SHA-256 of {name}, so it is not used"),
        contextlib.contextmanager(model_of)(model),
    ):
        pass


def _thrice(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    hidden = np.repeat(feeds["input_ids"][..., None].astype(np.float32), 8, axis=2)
    return {"hidden": hidden, "best": feeds["input_ids"] * feeds["attention_mask"]}


def test_an_engine_of_several_inputs_answers_requests_of_different_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = (1, 4, 16), (17, 64, 128)
    profiles = tuple({"batch": (1, 8, 32), "sequence": one} for one in (short, long))
    card = Card(capability=(9, 0), profiles=profiles, signature=WORDS, function=_thrice)
    pretend(card, monkeypatch)
    plain = named_bundle(tmp_path / "plain", words_graph(), WORDS)
    bundle = with_engines(plain, tmp_path / "net", ENGINE, profiles=profiles)
    made = package([bundle], [None], tmp_path / "out", runtimes=["python"])
    requests = [WORDS.draw(n, n, {"sequence": size}) for n, size in ((2, 12), (1, 100), (3, 12), (1, 300))]
    with contextlib.contextmanager(model_of)(made.path / "model_repository" / "net") as model:
        answers = model.execute(requests)
    for answer, feeds in zip(answers[:3], requests, strict=False):
        wanted = _thrice(feeds)
        np.testing.assert_array_equal(answer.tensors[0], wanted["hidden"])
        np.testing.assert_array_equal(answer.tensors[1], wanted["best"])
    assert "fits no profile" in answers[3].error
    assert card.executed == [(5, 0), (1, 1)]
    assert card.memory == {}


@pytest.mark.parametrize(
    ("profiles", "most"),
    [
        (({"batch": (1, 8, 32), "sequence": (1, 12, 64)},), 32),
        (({"batch": (1, 8, 32), "sequence": (1, 4, 8)}, {"batch": (1, 2, 4), "sequence": (9, 12, 64)}), 4),
        (({"batch": (1, 8, 32), "sequence": (1, 12, 64)}, {"batch": (1, 2, 4), "sequence": (30, 40, 99)}), 4),
        (({"batch": (1, 1, 1), "sequence": (1, 12, 64)}, {"batch": (3, 3, 9), "sequence": (1, 12, 64)}), 1),
        (({"batch": (2, 8, 32), "sequence": (1, 12, 64)},), "take no batch of 1"),
        (({"batch": (1, 8, 32), "sequence": (16, 16, 64)},), "do not take the golden input.*sequence 12"),
        (({"batch": (1, 8, 32)},), "not of the sizes that are free"),
    ],
)
def test_requests_are_merged_as_far_as_the_engine_takes_every_length_so(
    profiles: Profiles, most: int | str, tmp_path: Path
) -> None:
    plain = named_bundle(tmp_path / "plain", words_graph(), WORDS)
    bundle = with_engines(plain, tmp_path / "net", ENGINE, profiles=profiles)
    made = package([bundle], [None], tmp_path / "out")
    by_runtime = {model.runtime: model.max_batch for model in made.models}
    if isinstance(most, int):
        assert (by_runtime["tensorrt"], by_runtime["python"]) == (most, most)
    else:
        assert "tensorrt" not in by_runtime
        assert re.search(most, " ".join(made.notes))


def test_a_batch_that_is_not_first_everywhere_goes_in_parts_that_the_engine_takes(tmp_path: Path) -> None:
    plain = named_bundle(tmp_path / "plain", spoken_graph(), SPOKEN)
    profiles = ({"batch": (2, 3, 6), "samples": (16, 16, 16)},)
    served = open_served(with_engines(plain, tmp_path / "net", ENGINE, profiles=profiles))
    assert served.left_out == ()
    settings = ModelSettings()
    assert largest_batch(served, "tensorrt", settings) == 0
    assert golden_batch(served, "tensorrt", settings) == 4  # of 8, in equal parts
    assert golden_batch(served, "onnxruntime", settings) == 8
    with pytest.raises(UsageError, match="Its requests are not merged"):
        largest_batch(served, "python", ModelSettings(max_batch=4))
