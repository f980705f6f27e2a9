"""A bundle that is read again while a server serves it, without the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_export.building import build
from sparse_export.errors import UsageError
from sparse_export.serving import supervise
from sparse_export.serving.process import WorkFolder, work_folder
from sparse_export.serving.repository import open_served
from sparse_export.serving.serve_options import ServeOptions
from sparse_export.serving.settings import ModelSettings
from sparse_export.serving.slot import Slot, write_model
from tests.card import batches
from tests.making_runs import digits_run
from tests.serving.conftest import Bundles
from tests.serving.engines import with_engines

ENGINE = "tensorrt-fp16-sm90.engine"


@pytest.fixture
def folder() -> Iterator[WorkFolder]:
    with work_folder() as made:
        yield made


def slot(bundle: Path) -> Slot:
    return Slot(path=bundle, served=open_served(bundle, "net"), runtime="python")


def test_what_a_failed_version_left_does_not_stand_in_the_way_of_the_next(
    folder: WorkFolder, bundles: Bundles, tmp_path: Path
) -> None:
    options = ServeOptions(settings=ModelSettings(max_batch=16))
    narrow = with_engines(bundles.dense, tmp_path / "narrow", ENGINE, profiles=batches((1, 4, 8)))
    target = folder.repository / "net"
    with pytest.raises(UsageError, match="takes up to 8"):
        write_model(folder, target, slot(narrow), options, version=1)
    write_model(folder, target, slot(bundles.dense), options, version=1)
    assert {path.name for path in (target / "1").iterdir()} == {
        "__pycache__",
        "model.json",
        "model.onnx",
        "model.py",
    }
    assert not list(folder.staging.iterdir())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone")])
def test_files_that_cannot_be_read_leave_the_old_version(
    error: OSError, folder: WorkFolder, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise error

    told: list[str] = []
    one = slot(bundles.dense)
    running: Any = SimpleNamespace(exit_code=lambda: None)
    nothing: Any = None
    supervisor = supervise._Supervisor(
        *(nothing, folder, nothing, nothing, [one], ServeOptions(), nothing, told.append, nothing)
    )
    monkeypatch.setattr(supervise, "open_served", unreadable)
    supervisor._reload(running, one)
    assert one.version == 1
    assert told == [f"Error: net: version 1 stays. {error}"]


def test_a_bundle_that_takes_raw_samples_does_not_follow_one_that_does_not(
    folder: WorkFolder, bundles: Bundles, tmp_path: Path
) -> None:
    raw = build(digits_run(tmp_path / "run").path, tmp_path / "raw", fold="float32").path
    told: list[str] = []
    one = slot(bundles.dense)
    running: Any = SimpleNamespace(exit_code=lambda: None)
    nothing: Any = None
    supervisor = supervise._Supervisor(
        *(nothing, folder, nothing, nothing, [one], ServeOptions(), nothing, told.append, nothing)
    )
    one.path = raw
    supervisor._reload(running, one)
    assert one.version == 1
    (said,) = told
    assert "takes raw float32 samples, 0 to 255, where clients send normalized samples" in said
