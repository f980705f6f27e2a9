"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import OutputError
from sparse_export.files import (
    json_bytes,
    move_file,
    output_error,
    require_writable,
    sha256_file,
    staged_folder,
    write_bytes,
    write_json,
)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@given(content=st.binary(max_size=4096))
def test_what_is_written_is_read_and_has_its_hash(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("files") / "deep" / "file"
    write_bytes(path, content)
    assert path.read_bytes() == content
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_writing_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert (path.read_bytes(), _names(tmp_path)) == (b"new", ["file"])


def test_a_rename_that_fails_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(Path, "replace", _full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        write_bytes(path, b"new")
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(OutputError) as caught:
        write_bytes(path, b"new")
    assert str(path) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert (path.read_bytes(), _names(tmp_path)) == (b"old", ["file"])


def test_content_is_on_the_disk_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_bytes(tmp_path / "file", b"content")
    assert events == ["file", "rename", "folder"]


def test_a_folder_in_the_way_of_the_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OutputError, match="Cannot write"):
        write_bytes(tmp_path / "file", b"")
    assert _names(tmp_path) == ["file"]


def test_a_file_in_the_way_of_the_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        write_bytes(tmp_path / "file" / "below", b"")


def test_json_ends_with_a_newline_and_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "ü"]})
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_has_not_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": number})


def test_require_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    require_writable(tmp_path / "a" / "b")
    assert _names(tmp_path / "a" / "b") == []


def test_require_writable_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose another place"):
        require_writable(tmp_path / "file")


def test_an_output_error_gives_the_reason_of_the_system() -> None:
    error = output_error(Path("/a/b"), OSError(errno.EROFS, os.strerror(errno.EROFS)))
    assert str(error).startswith("Cannot write /a/b: Read-only file system.")


def test_a_staged_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged_folder(target) as stage:
        (stage / "file").write_text("new")
        assert not target.exists()
        assert stage.parent == target.parent
    assert (_names(target), _names(target.parent)) == (["file"], ["target"])


def test_a_staged_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("old", "new"):
        with staged_folder(target) as stage:
            (stage / name).write_text("")
    assert (_names(target), _names(tmp_path)) == (["new"], ["target"])


def test_an_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as stage:
        (stage / "old").write_text("")
    with pytest.raises(RuntimeError, match="midway"), staged_folder(target) as stage:
        (stage / "new").write_text("")
        raise RuntimeError("midway")
    assert (_names(target), _names(tmp_path)) == (["old"], ["target"])


def test_a_full_disk_in_the_block_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left on device"), staged_folder(tmp_path / "target"):
        _full_disk()
    assert _names(tmp_path) == []


def test_a_last_rename_that_fails_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as stage:
        (stage / "old").write_text("")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if Path(to) == target and (self / "new").exists():
            _full_disk()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError), staged_folder(target) as stage:
        (stage / "new").write_text("")
    assert (_names(tmp_path), _names(target)) == (["target"], ["old"])


@pytest.mark.parametrize(("after", "kept"), [("old", "old"), ("new", "new")])
def test_an_interruption_around_a_rename_leaves_one_whole_folder_and_nothing_beside(
    after: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as stage:
        (stage / "old").write_text("")
    rename = Path.rename
    interrupted: list[Path] = []

    def interrupting(self: Path, to: Path) -> Path:
        is_the_one = (self / after).exists() and not interrupted
        moved = rename(self, to)
        if is_the_one:
            interrupted.append(moved)
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupting)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as stage:
        (stage / "new").write_text("")
    assert (_names(tmp_path), _names(target)) == (["target"], [kept])


def test_a_staged_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "target"):
        pass
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o755


def test_a_file_that_is_moved_is_whole_and_gone_from_where_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"content")
    move_file(source, tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place").read_bytes() == b"content"
    assert not source.exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place"]


def test_a_file_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "place").write_bytes(b"old")
    with pytest.raises(OutputError):
        move_file(tmp_path / "absent", tmp_path / "place")
    assert (tmp_path / "place").read_bytes() == b"old"
