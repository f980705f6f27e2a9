"""Texts of the benchmark as word pieces."""

from __future__ import annotations

from benchmarks.texts import LENGTH, _ids

PIECES = ["[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "##a", "cafe", ",", "!", "x"]
KNOWN = {piece: at for at, piece in enumerate(PIECES)}


def test_words_are_cut_into_the_longest_known_pieces() -> None:
    found = [PIECES[at] for at in _ids("Unaffable, CAFÉ unxyz x!", KNOWN)]
    assert found == ["[CLS]", "un", "##aff", "##able", ",", "cafe", "[UNK]", "x", "!", "[SEP]"]


def test_a_long_text_is_cut_off_and_ends_as_others_do() -> None:
    found = _ids("x " * 500, KNOWN)
    assert (len(found), found[0], found[-1]) == (LENGTH, 1, 2)
