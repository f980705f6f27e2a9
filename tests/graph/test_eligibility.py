"""The codes of the verifier are those of its document."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from sparse_export.formats.layers import ReasonCode
from sparse_export.graph.eligibility import MEANINGS, reason, verdict

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "verifier.md"


def test_every_code_has_a_meaning() -> None:
    assert set(MEANINGS) == set(get_args(ReasonCode))


def test_the_document_has_every_code_with_the_same_verdict_in_the_same_order() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (yes|no|unproven) \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert rows == [(code, eligible) for code, (eligible, _) in MEANINGS.items()]


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([], "yes"),
        (["shared"], "yes"),
        (["shared", "int8"], "unproven"),
        (["int8", "float32"], "no"),
        (["activations", "shared"], "no"),
    ],
)
def test_the_worst_reason_decides(codes: list[ReasonCode], wanted: str) -> None:
    assert verdict([reason(code) for code in codes]) == wanted


def test_a_reason_without_words_of_its_own_is_a_sentence() -> None:
    for code in MEANINGS:
        text = reason(code).text
        assert text[0].isupper() or not text[0].isalpha()
        assert text.endswith(".")
