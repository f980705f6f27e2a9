"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Owns an average of every float parameter and buffer: average = decay * average + (1 - decay) * now.

    torch's own AveragedModel reads a counter from the device at every step; this makes no host
    synchronisation.

    Args:
        model: averaged over its own steps; it starts as its own average.
        decay: 0 to 1; over the first steps it is held to (1 + steps) / (10 + steps), so that the start is
            forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.n_steps = 0
        self._live = _float_state(model)
        self.average = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Take in the network as it stands."""
        self.n_steps += 1
        decay = min(self.decay, (1 + self.n_steps) / (10 + self.n_steps))
        for average, live in _by_dtype(self.average, self._live):
            torch._foreach_lerp_(average, live, 1 - decay)

    @torch.no_grad()
    def mask(self, masks: Mapping[str, Tensor]) -> None:
        """Zero the average wherever a mask is off: of a weight that was pruned it still holds the past."""
        for name, mask in masks.items():
            self.average[name].masked_fill_(~mask, 0)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network with its averages in place; afterwards with its own values again."""
        with torch.no_grad():
            own = {name: live.detach().clone() for name, live in self._live.items()}
            for name, live in self._live.items():
                live.copy_(self.average[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, live in self._live.items():
                    live.copy_(own[name])

    def load(self, average: Mapping[str, Tensor], n_steps: int) -> None:
        """Take over a saved average. Raises KeyError or RuntimeError when it is another network's."""
        for name, value in self.average.items():
            value.copy_(average[name])
        self.n_steps = n_steps


def _float_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are floats, once each, as they lie in memory."""
    state = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    found = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def _by_dtype(
    averages: Mapping[str, Tensor], live: Mapping[str, Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Lists of one dtype, which the fused operations want."""
    names: dict[torch.dtype, list[str]] = {}
    for name, value in averages.items():
        names.setdefault(value.dtype, []).append(name)
    for group in names.values():
        yield [averages[name] for name in group], [live[name].detach() for name in group]
