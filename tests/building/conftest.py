"""The fixtures of engines, which bundles hold."""

from __future__ import annotations

from tests.engines.conftest import call, rtx, stand_in  # noqa: F401 - fixtures
