"""A session of an engine, on a card that is none: what the library may do, which profile, and which stream waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_export.artefact import Bundle
from sparse_export.engine import door
from sparse_export.engine.door import Gpu
from sparse_export.errors import ArtefactError, NotTrustedError, UsageError
from sparse_export.runtime.tensorrt import EngineSession, open_engine
from tests.card import Card, Profiles, Stream, pretend_torch_cuda
from tests.engine.making import bundle_with_engine

CURRENT = 3
Open = Callable[..., EngineSession]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(capability=(9, 0), profiles=((1, 8, 32),), sample=(16,))
    module = card.tensorrt()
    monkeypatch.setattr(door, "library", lambda target: module)
    monkeypatch.setattr(door, "version", lambda target: module.__version__)
    monkeypatch.setattr(door, "gpu", lambda: Gpu(name="a card", architecture="sm90"))
    return card


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    return pretend_torch_cuda(monkeypatch, Stream(CURRENT))


def _bundle(
    folder: Path, *, known: bool = True, profiles: Profiles = ((1, 8, 32),), **changes: object
) -> Bundle:
    return bundle_with_engine(
        folder,
        b"an engine of nobody's",
        known=known,
        target="tensorrt",
        version="11.1.0",
        architecture="sm90",
        architectures=(),
        profiles=tuple(profiles),
        **changes,
    )


@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_a_version_compatible_engine_may_run_code_that_it_brings_along(
    version_compatible: bool, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, version_compatible=version_compatible)
    open_engine(bundle, bundle.info.engines[0]).close()
    assert card.host_code_allowed == [version_compatible]


def test_no_code_is_allowed_before_the_engine_is_trusted(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, known=False, version_compatible=True, onnx_sha256="f" * 64)
    with pytest.raises(NotTrustedError):
        open_engine(bundle, bundle.info.engines[0])
    assert card.host_code_allowed == []


def test_an_engine_that_the_library_refuses_ends_with_6(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    card.loads = False
    bundle = _bundle(tmp_path)
    with pytest.raises(ArtefactError, match="cannot load"):
        open_engine(bundle, bundle.info.engines[0])


def test_each_batch_runs_in_the_profile_that_is_tuned_nearest_to_it(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    card.profiles = ((1, 1, 4), (2, 8, 16), (16, 32, 32))
    bundle = _bundle(tmp_path, profiles=card.profiles)
    with open_engine(bundle, bundle.info.engines[0]) as session:
        assert session.max_batch == 32
        for n in (1, 5, 20, 2):
            x = torch.randn(n, 16)
            assert torch.equal(session.run_torch(x), 2 * x)
        with pytest.raises(UsageError, match="1 to 4, 2 to 16, 16 to 32"):
            session.run_torch(torch.randn(33, 16))
    assert card.executed == [(1, 0), (5, 1), (20, 2), (2, 0)]
