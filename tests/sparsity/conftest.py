"""Hypothesis without deadlines: on a shared machine a slow example is no finding."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None, print_blob=True)
settings.load_profile("no-deadline")
