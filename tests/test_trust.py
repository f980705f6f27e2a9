"""The trust store: what this user vouches for, and nobody else can change."""

from __future__ import annotations

import json
import os
import pwd
import stat
from pathlib import Path

import pytest

from sparse_export import trust
from sparse_export.errors import ArtefactError, NotTrustedError, OutputError, UsageError

A = "a" * 64
B = "b" * 64


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    return tmp_path / "share" / "sparse-export" / "trust.json"


def test_nothing_is_trusted_at_first_and_asking_writes_nothing(store: Path) -> None:
    assert not trust.is_trusted(A)
    assert not store.exists()


def test_what_is_remembered_is_trusted_and_nothing_else(store: Path) -> None:
    trust.remember(A)
    assert trust.is_trusted(A)
    assert not trust.is_trusted(B)


def test_remembering_keeps_what_was_remembered_before(store: Path) -> None:
    for digest in (B, A, B):
        trust.remember(digest)
    assert json.loads(store.read_bytes())["sha256"] == [A, B]


def test_the_store_is_private_whatever_the_umask(store: Path) -> None:
    before = os.umask(0)
    try:
        trust.remember(A)
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.stat().st_mode) == 0o600


def test_no_temporary_file_stays_behind(store: Path) -> None:
    trust.remember(A)
    assert [path.name for path in store.parent.iterdir()] == ["trust.json"]


def test_the_place_is_read_when_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.remember(A)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    assert not trust.is_trusted(A)


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_without_an_absolute_place_the_home_folder_is_used(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_DATA_HOME")
    else:
        monkeypatch.setenv("XDG_DATA_HOME", value)
    assert trust.store_path() == tmp_path / ".local" / "share" / "sparse-export" / "trust.json"


def test_requiring_an_unknown_digest_tells_what_to_pass() -> None:
    with pytest.raises(NotTrustedError, match=f"The factory x:y would run code .* --trust {A}"):
        trust.require(A, "The factory x:y", trusted=None)


def test_requiring_a_known_digest_passes() -> None:
    trust.remember(A)
    trust.require(A, "it", trusted=None)
    assert trust.is_trusted(A)


def test_a_matching_digest_is_remembered() -> None:
    assert not trust.is_trusted(A)
    trust.require(A, "it", trusted=A.upper())
    assert trust.is_trusted(A)
    trust.require(A, "it", trusted=None)


@pytest.mark.parametrize("given", [B, (B,), [B, "c" * 64]])
def test_digests_of_other_files_vouch_for_nothing(given: str | list[str]) -> None:
    with pytest.raises(NotTrustedError, match=f"it has SHA-256 {A}, not '{B}'.*--trust {A}"):
        trust.require(A, "it", trusted=given)
    assert not trust.is_trusted(A)
    assert not trust.is_trusted(B)


def test_a_trusted_file_stays_so_when_the_digest_of_another_is_given() -> None:
    trust.remember(A)
    trust.require(A, "it", trusted=B)
    assert not trust.is_trusted(B)


def test_one_of_several_digests_is_enough_and_only_that_is_remembered() -> None:
    trust.require(A, "it", trusted=(B, f" {A.upper()}"))
    assert trust.is_trusted(A)
    assert not trust.is_trusted(B)


def test_one_message_names_every_digest_that_is_needed_and_how_to_pass_them() -> None:
    files = [trust.RunsCode(sha256=digest, what=what) for digest, what in ((A, "The engine"), (B, "The net"))]
    with pytest.raises(NotTrustedError) as caught:
        trust.require_all(files, trusted=None)
    assert str(caught.value) == (
        "The engine; The net would run code that was not made here. "
        f"Look at them, and when you trust them pass --trust {A} --trust {B} once."
    )
    with pytest.raises(NotTrustedError, match=f"The net has SHA-256 {B}, not '{A}'.*pass --trust {B} too"):
        trust.require_all(files, trusted=A)
    with pytest.raises(NotTrustedError, match=f"The net would run .*pass --trust {B} once"):
        trust.require_all(files, trusted=None)
    trust.require_all(files, trusted=(B,))
    trust.require_all(files, trusted=None)


def test_what_one_digest_vouches_for_is_named_together() -> None:
    files = [trust.RunsCode(sha256=A, what=what) for what in ("The engine", "The task", "The task")]
    with pytest.raises(NotTrustedError, match=f"The engine and The task would .*pass --trust {A} once"):
        trust.require_all(files, trusted=None)


@pytest.mark.parametrize("given", [None, (), ""])
def test_without_a_digest_only_what_is_known_is_vouched_for(given: str | tuple[str, ...] | None) -> None:
    assert not trust.is_vouched_for(A, trusted=given)
    trust.remember(A)
    assert trust.is_vouched_for(A, trusted=given)


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, "a" * 65])
def test_what_is_no_digest_is_refused(digest: str) -> None:
    with pytest.raises(UsageError, match="is not a SHA-256"):
        trust.remember(digest)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_store_that_others_can_reach_is_refused(store: Path, mode: int) -> None:
    trust.remember(A)
    store.chmod(mode)
    with pytest.raises(ArtefactError, match=f"has mode {mode:04o}"):
        trust.is_trusted(A)
    with pytest.raises(ArtefactError, match=f"has mode {mode:04o}"):
        trust.remember(B)


def test_a_store_of_somebody_else_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust.remember(A)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ArtefactError, match=f"belongs to user {me}"):
        trust.is_trusted(A)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"sha256": "aa"}',
        b'{"sha256": [1]}',
        b'{"sha256": ["xyz"]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_store_is_told_with_the_file_to_delete(store: Path, content: bytes) -> None:
    trust.remember(A)
    store.write_bytes(content)
    with pytest.raises(ArtefactError, match=f"Delete {store}"):
        trust.is_trusted(A)


def test_a_folder_in_the_stores_place_is_told(store: Path) -> None:
    store.mkdir(parents=True, mode=0o700)
    with pytest.raises(ArtefactError, match="trust store"):
        trust.is_trusted(A)


def test_a_store_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="Cannot write"):
        trust.remember(A)


def test_without_any_home_folder_the_variable_to_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_DATA_HOME")
    with pytest.raises(UsageError, match=r"no place for the trust store.*Set XDG_DATA_HOME"):
        trust.store_path()
