"""How far a build is, from the phases that TensorRT reports: trees of phases, each of a number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["BuildProgress", "Phases", "Progress"]


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """How far a build is.

    Attributes:
        phase: name of the phase that changed last.
        fraction: of the outermost phase, from 0 to 1; it starts again with the next.
    """

    phase: str
    fraction: float


Progress = Callable[[BuildProgress], None]


@dataclass(kw_only=True)
class _Phase:
    parent: str | None
    n_steps: int
    n_done: int = 0


@dataclass(kw_only=True)
class Phases:
    """The phases that are open. Unknown names are ignored: they differ between releases."""

    _open: dict[str, _Phase] = field(default_factory=dict)

    def start(self, name: str, parent: str | None, n_steps: int) -> BuildProgress:
        """Open a phase of n_steps steps within another, or outermost where that is None or unknown."""
        known = parent in self._open and parent != name
        self._open[name] = _Phase(parent=parent if known else None, n_steps=max(n_steps, 1))
        return self._state(name)

    def step(self, name: str, step: int) -> BuildProgress | None:
        """Record a finished step, counted from 0; None for an unknown phase."""
        phase = self._open.get(name)
        if phase is None:
            return None
        phase.n_done = min(max(phase.n_done, step + 1), phase.n_steps)
        return self._state(name)

    def finish(self, name: str) -> BuildProgress | None:
        """Close a phase and those within it; None for an unknown phase."""
        phase = self._open.get(name)
        if phase is None:
            return None
        phase.n_done = phase.n_steps
        state = self._state(name)
        for child in [key for key, value in self._open.items() if value.parent == name]:
            del self._open[child]
        del self._open[name]
        return state

    def _state(self, name: str) -> BuildProgress:
        share, at, seen = 0.0, name, {name}
        while True:
            phase = self._open[at]
            share = min((phase.n_done + share) / phase.n_steps, 1.0)
            if phase.parent is None or phase.parent in seen or phase.parent not in self._open:
                return BuildProgress(phase=name, fraction=share)
            at = phase.parent
            seen.add(at)
