"""What a build refuses before it has exported anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_export.building import build, bundle
from sparse_export.errors import ArtefactError, OutputError, UsageError
from tests.making_runs import network_and_masks, save_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run without data. Exporting its graph is a failure."""
    module, masks = network_and_masks(density=1.0)
    save_run(tmp_path / "run", module, masks)
    monkeypatch.setattr(bundle, "build_graph", lambda *_, **__: pytest.fail("work began"))
    return tmp_path / "run"


def test_a_home_that_cannot_be_written_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at its end, with the advice to choose another --out."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"trust store .* cannot be written.*Set XDG_DATA_HOME"):
        build(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_trust_store_is_told_before_the_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    (tmp_path / "sparse-export").mkdir()
    store = tmp_path / "sparse-export" / "trust.json"
    store.write_text("{")
    store.chmod(0o600)
    with pytest.raises(ArtefactError, match="is damaged"):
        build(run, tmp_path / "out")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_precision_that_has_nothing_to_be_calibrated_on(precision: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no data set"):
        build(run, tmp_path / "out", precision=precision)  # type: ignore[arg-type]
