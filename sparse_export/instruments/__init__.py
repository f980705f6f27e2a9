"""Times, intervals and the facts about a machine that go with them."""

from __future__ import annotations
