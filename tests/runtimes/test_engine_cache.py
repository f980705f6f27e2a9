"""Engines that onnxruntime's TensorRT provider keeps are read back only where this user alone left them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparse_export.files import sha256_file
from sparse_export.runtimes import engine_cache
from sparse_export.runtimes.engine_cache import cache_for, open_cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in what passes for a bundle."""
    folder = tmp_path / "bundle"
    folder.mkdir(mode=0o755)
    (folder / "manifest.json").write_text("{}")
    (folder / "model.onnx").write_bytes(b"a graph")
    return folder / "model.onnx"


def test_the_cache_of_a_bundle_is_in_its_folder_and_private(model: Path) -> None:
    cache = open_cache(model)
    assert cache.path == model.parent / "cache" / "onnxruntime-tensorrt" / sha256_file(model)
    assert (cache.in_bundle, cache.note) == (True, None)
    assert cache.path.stat().st_mode & 0o777 == 0o700


def test_what_a_session_left_is_there_for_the_next_one(model: Path) -> None:
    first = open_cache(model)
    (first.path / "a.engine").write_bytes(b"native code")
    first.keep()
    engine_cache._opened.clear()  # as in another process
    assert (open_cache(model).path / "a.engine").read_bytes() == b"native code"


@pytest.mark.parametrize("what", ["never vouched for", "changed", "added", "a link"])
def test_what_this_user_did_not_leave_is_neither_read_nor_touched(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    first = open_cache(model)
    engine = first.path / "a.engine"
    engine.write_bytes(what.encode())
    if what != "never vouched for":
        first.keep()
    if what == "changed":
        engine.write_bytes(b"other code")
    if what == "added":
        (first.path / "b.engine").write_bytes(b"more code")
    if what == "a link":
        (tmp_path / "elsewhere").write_bytes(what.encode())
        engine.unlink()
        engine.symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in first.path.iterdir()}
    engine_cache._opened.clear()  # as in another process
    second = open_cache(model)
    assert (second.in_bundle, list(second.path.iterdir())) == (False, [])
    assert str(first.path) in (second.note or "")
    assert {path.name: path.read_bytes() for path in first.path.iterdir()} == before


def test_a_folder_of_the_user_that_others_may_write_to_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "lone.onnx"
    file.write_bytes(b"a graph")
    usual = open_cache(file)
    (usual.path / "a.engine").write_bytes(b"native code")
    assert (open_cache(file).path / "a.engine").is_file()
    usual.path.chmod(0o777)
    other = open_cache(file)
    assert list(other.path.iterdir()) == []
    assert other.path.stat().st_mode & 0o777 == 0o700
    assert "may be written to by others" in (other.note or "")


def test_another_process_does_not_take_an_open_sessions_cache_away(model: Path) -> None:
    first = open_cache(model)
    (first.path / "a.engine").write_bytes(b"of a session that is open")
    engine_cache._opened.clear()  # as in another process
    open_cache(model)
    assert (first.path / "a.engine").is_file()


def test_the_cache_of_another_file_is_not_taken_for_this_ones(model: Path) -> None:
    first = open_cache(model)
    (first.path / "a.engine").write_bytes(b"native code")
    first.keep()
    model.write_bytes(b"another graph")
    other = cache_for(model)
    first.path.rename(other.path)
    engine_cache._opened.clear()
    assert not open_cache(model).in_bundle


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_bundle_that_others_may_write_to_has_its_cache_with_the_user_and_that_is_said(
    mode: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    model.parent.chmod(mode)
    cache = open_cache(model)
    assert cache.path == tmp_path / "home" / "sparse-export" / "onnxruntime-tensorrt" / sha256_file(model)
    assert cache.note is not None
    assert "may be written to by others" in cache.note
    assert str(cache.path) in cache.note
    assert not (model.parent / "cache").exists()


def test_a_bundle_that_cannot_be_written_to_has_its_cache_with_the_user(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    cache = cache_for(model)
    assert (cache.in_bundle, "cannot be written to" in (cache.note or "")) == (False, True)


def test_two_sessions_of_one_process_share_a_cache_before_either_is_closed(model: Path) -> None:
    first = open_cache(model)
    (first.path / "a.engine").write_bytes(b"of the first session, which is open")
    assert list(open_cache(model).path.iterdir()) == [first.path / "a.engine"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_cache_folder_that_leads_elsewhere_is_not_followed(
    depth: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    link = model.parent.joinpath(*("cache", "onnxruntime-tensorrt", sha256_file(model))[:depth])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    cache = open_cache(model)
    assert not cache.in_bundle
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_outside_a_bundle_has_its_cache_with_the_user_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    file = tmp_path / "lone.onnx"
    file.write_bytes(b"a graph")
    cache = cache_for(file)
    assert (cache.in_bundle, cache.note) == (False, None)
    assert cache.path.is_relative_to(tmp_path / "home")
