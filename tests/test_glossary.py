"""The glossary can be looked through."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

GLOSSARY = Path(__file__).parents[1] / "docs" / "glossary.md"


def test_its_terms_are_in_the_order_of_the_alphabet_and_there_once() -> None:
    terms = re.findall(r"^\*\*([^*]+)\*\*", GLOSSARY.read_text(), re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", term).encode("ascii", "ignore").decode().lower() for term in terms]
    assert len(plain) > 40
    assert plain == sorted(set(plain))
