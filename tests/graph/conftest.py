"""A fixture of engines: whether one can be built here."""

from __future__ import annotations

from tests.engines.conftest import rtx  # noqa: F401 - a fixture
