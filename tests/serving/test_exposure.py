"""Who may reach a server that requests can crash, and what a machine lacks for one."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from sparse_export.errors import UsageError
from sparse_export.serving import exposure
from sparse_export.serving.exposure import image_is_patched, require_loopback, shortages
from sparse_export.serving.package import package
from tests.cli.conftest import Call
from tests.serving.conftest import Bundles


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_may(host: str) -> None:
    require_loopback(host, exposed=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "somewhere", "::ffff:1.2.3.4", ""])
def test_others_may_only_where_that_is_said(host: str) -> None:
    with pytest.raises(UsageError, match=r"can be crashed by anybody.*--expose-unpatched-server"):
        require_loopback(host, exposed=False)
    require_loopback(host, exposed=True)


def test_serve_refuses_another_address_before_anything_else(call: Call) -> None:
    ended = call("serve", "nowhere", "--host", "0.0.0.0")
    assert ended.exit_code == 2
    assert "--expose-unpatched-server" in ended.stderr


@pytest.mark.parametrize(
    ("reference", "patched"),
    [
        ("nvcr.io/nvidia/tritonserver:25.08-py3", True),
        ("nvcr.io/nvidia/tritonserver:25.07-py3", True),
        ("nvcr.io/nvidia/tritonserver:26.01-py3", True),
        ("nvcr.io/nvidia/tritonserver:25.06-py3", False),
        ("nvcr.io/nvidia/tritonserver:24.12-trtllm", False),
        ("localhost:5000/triton:v25.03", False),
        ("registry.example.com/triton:1.0", None),
        ("registry.example.com/triton:2.51.0", None),
        ("registry.example.com/triton:25.13", None),
        (f"registry.example.com/triton@sha256:{'0' * 64}", None),
        ("localhost:5000/triton", None),
    ],
)
def test_the_release_that_a_tag_names(reference: str, patched: bool | None) -> None:
    assert image_is_patched(reference) is patched


def test_an_old_base_image_is_refused_and_one_without_a_release_is_noted(
    bundles: Bundles, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"older than 25\.07"):
        package([bundles.dense], ["m"], tmp_path / "a", base_image="triton:24.10-py3")
    assert not (tmp_path / "a").exists()
    made = package([bundles.dense], ["m"], tmp_path / "b", base_image="triton:mine")
    assert any("names no release of Triton" in note and "not checked" in note for note in made.notes)
    made = package([bundles.dense], ["m"], tmp_path / "c", base_image="triton:25.08-py3")
    assert not any("not checked" in note for note in made.notes)


def test_what_this_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(exposure, "_SHARED_MEMORY", tmp_path / "shm")
    files, shared = shortages()
    assert "only 64 files may be open at once" in files
    assert "shm is missing" in shared
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(exposure, "_SHARED_MEMORY", tmp_path)
    assert shortages() == ()
