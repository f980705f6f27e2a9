"""Plans which layers of a network to make 2:4 on one machine, and what that costs in weights."""

from __future__ import annotations
