"""Which layers of a network are worth making 2:4 on one machine, and what that costs in weights."""

from __future__ import annotations
