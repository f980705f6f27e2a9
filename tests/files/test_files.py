"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export import files
from sparse_export.errors import ArtefactError, OutputError
from sparse_export.files import (
    claimed,
    is_leftover,
    json_bytes,
    move_file,
    output_error,
    put_back,
    remove_leftovers,
    require_writable,
    sha256_file,
    staged_folder,
    temporary_folder,
    write_bytes,
    write_json,
)

CHECKOUT = Path(__file__).resolve().parents[2]


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


def _no_exchange(*_: object) -> bool:
    return False


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_last_rename_that_fails_leaves_the_old_folder(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with staged_folder(target) as stage:
        (stage / "old").write_text("")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if Path(to) == target and (self / "new").exists():
            _full_disk()
        return rename(self, to)

    monkeypatch.setattr(files, "exchange", _full_disk if can_exchange else _no_exchange)
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

    monkeypatch.setattr(files, "exchange", _no_exchange)
    monkeypatch.setattr(Path, "rename", interrupting)
    with pytest.raises(KeyboardInterrupt), staged_folder(target) as stage:
        (stage / "new").write_text("")
    assert (_names(tmp_path), _names(target)) == (["target"], [kept])


# ---- processes that are killed

_KILLED = """
import os, signal, sys
from pathlib import Path
from sparse_export import files

target, moment = Path(sys.argv[1]), sys.argv[2]
rename, exchange = Path.rename, files.exchange

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def replacing(one, other):
    if moment.startswith("no exchange"):
        return False
    if moment == "before the exchange":
        die()
    exchange(one, other)
    die()

def renaming(self, to):
    moved = rename(self, to)
    if moment == "no exchange, one rename" or self.name != target.name:
        die()
    return moved

files.exchange, Path.rename = replacing, renaming
with files.staged_folder(target) as stage:
    (stage / "new").write_text("")
    if moment == "in the block":
        die()
"""
_MOMENTS = {
    "in the block": "old",
    "before the exchange": "old",
    "after the exchange": "new",
    "no exchange, one rename": None,
    "no exchange, two renames": "new",
}


def _killed(script: str, *words: object) -> None:
    done = subprocess.run([sys.executable, "-c", script, *map(str, words)], cwd=CHECKOUT, check=False)
    assert done.returncode == -signal.SIGKILL


def _replaced_and_killed(tmp_path: Path, moment: str) -> Path:
    target = tmp_path / "target"
    with staged_folder(target) as stage:
        (stage / "old").write_text("")
    _killed(_KILLED, target, moment)
    assert len(_names(tmp_path)) > 1  # something is left of it
    return target


@pytest.mark.parametrize(("moment", "stands"), _MOMENTS.items())
def test_a_process_killed_while_it_replaces_a_folder_leaves_the_old_or_the_new_one(
    moment: str, stands: str | None, tmp_path: Path
) -> None:
    target = _replaced_and_killed(tmp_path, moment)
    assert (_names(target) if target.exists() else None) == (stands and [stands])
    put_back(target)  # as every reader begins
    assert _names(target) == [stands or "old"]
    with claimed(target):
        assert _names(target) == [stands or "old"]
    assert _names(tmp_path) == ["target"]


@pytest.mark.parametrize("moment", _MOMENTS)
def test_the_next_that_writes_there_replaces_what_a_killed_process_left(moment: str, tmp_path: Path) -> None:
    target = _replaced_and_killed(tmp_path, moment)
    with pytest.raises(RuntimeError), staged_folder(target):
        assert _names(target) in (["old"], ["new"])  # put back before anything else
        raise RuntimeError
    with staged_folder(target) as stage:
        (stage / "newest").write_text("")
    assert (_names(target), _names(tmp_path)) == (["newest"], ["target"])


def test_a_bundle_that_was_set_aside_is_put_back_when_it_is_opened(tmp_path: Path) -> None:
    from sparse_export.formats.bundle import read_bundle_info
    from sparse_export.inspect import inspect

    for read in (read_bundle_info, inspect):
        aside = tmp_path / ".bundle.0123abcd.tmp.old.tmp"
        aside.mkdir()
        (aside / "manifest.json").write_text("{}")
        with pytest.raises(ArtefactError, match=r"bundle/manifest\.json describes None"):
            read(tmp_path / "bundle")
        assert _names(tmp_path) == ["bundle"]
        shutil.rmtree(tmp_path / "bundle")


def test_a_reader_that_may_not_put_it_back_says_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    aside = tmp_path / ".target.0123abcd.tmp.old.tmp"
    aside.mkdir()

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ArtefactError, match=f"{aside}.*Read-only file system.*Rename it to {target}"):
        put_back(target)
    assert _names(tmp_path) == [aside.name]


_WRITING = """
import os, sys
from pathlib import Path
from sparse_export import files

place, fsync = Path(sys.argv[1]), os.fsync

def wait(descriptor):
    print(flush=True)
    sys.stdin.read()
    fsync(descriptor)

os.fsync = wait
if sys.argv[2] == "file":
    files.write_bytes(place / "model.safetensors", b"whole")
else:
    with files.temporary_folder() as folder:
        (folder / "engine").write_text("")
        wait(0)
"""


@contextmanager
def _writing(*words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of it; what it waits for is the end of its stdin."""
    with subprocess.Popen(
        [sys.executable, "-c", _WRITING, *map(str, words)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(words[0])},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_the_file_of_a_dead_writer_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    with _writing(tmp_path, "file") as process:
        (left,) = _names(tmp_path)
        assert is_leftover(left)
        remove_leftovers(tmp_path)
        write_bytes(tmp_path / "model.safetensors", b"other")
        assert _names(tmp_path) == [left, "model.safetensors"]
        process.kill()
        process.wait()
    (tmp_path / ".model.safetensors.4711.tmp").write_text("")  # of an earlier version, by process id
    (tmp_path / ".another.4711.tmp").write_text("")
    (tmp_path / ".of somebody else.tmp").write_text("")
    write_bytes(tmp_path / "model.safetensors", b"new")
    assert _names(tmp_path) == [".another.4711.tmp", ".of somebody else.tmp", "model.safetensors"]
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == [".of somebody else.tmp", "model.safetensors"]


def test_the_temporary_folder_of_a_dead_process_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with _writing(tmp_path, "folder") as process:
        before = _names(tmp_path)
        with temporary_folder() as own:
            assert stat.S_IMODE(own.stat().st_mode) == 0o700
            assert set(before) < set(_names(tmp_path))
        assert _names(tmp_path) == before  # its folder and its lock
        process.kill()
        process.wait()
    assert _names(tmp_path) == before
    with temporary_folder() as own:
        assert _names(tmp_path) == [f".{own.name}.lock", own.name]
    assert _names(tmp_path) == []


def test_a_temporary_folder_that_cannot_be_made_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set TMPDIR"), temporary_folder():
        pass


def test_a_link_to_a_folder_is_followed_when_that_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_folder(tmp_path / "link") as stage:
        (stage / "new").write_text("")
    assert _names(tmp_path / "real") == ["new"]
    assert (tmp_path / "link").is_symlink()


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


def test_a_file_is_moved_to_another_file_system_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, replace = tmp_path / "source", Path.replace
    source.write_bytes(b"content")

    def elsewhere(self: Path, target: Path) -> Path:
        if self == source:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", elsewhere)
    move_file(source, tmp_path / "place")
    assert (_names(tmp_path), (tmp_path / "place").read_bytes()) == (["place"], b"content")


def test_a_temporary_folder_inside_another_leaves_that_one_alone() -> None:
    with temporary_folder() as outer:
        (outer / "kept").touch()
        with temporary_folder() as inner:
            assert inner != outer
        assert (outer / "kept").is_file()
    assert not outer.exists()
