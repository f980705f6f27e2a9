"""Parameters that a network reads itself: which of their axes is channels shows at their first use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_export.graph.channels import reasons, rules
from sparse_export.graph.channels.labels import (
    FIXED,
    AxisKey,
    Labels,
    Ledger,
    UnknownOperation,
    fixed_labels,
    hash_of,
    labels_along,
    mixed,
    positions,
)


@dataclass
class Undecided:
    """Entries of a parameter or buffer that the forward reads itself: which axis is channels shows at its
    first use.

    Attributes:
        shape: of the value.
        order: each entry's place in the parameter; None where it is the parameter as it is stored.
        tag: what was done to it on the way.
    """

    name: str
    shape: tuple[int, ...]
    order: Tensor | None = None
    tag: int = 0

    @property
    def index(self) -> Tensor:
        """Each entry's place in the parameter."""
        return positions(self.shape) if self.order is None else self.order


Found = Labels | Undecided


@dataclass
class Parameters:
    """What was decided of the parameters that a network reads itself.

    Attributes:
        ledger: where their channels are noted.
        axes: by name the axis that is channels, None where none is. All runs of a network share it.
    """

    ledger: Ledger
    axes: dict[str, int | None]

    def settle(self, found: Found, other: Labels | None, where: str) -> Labels:
        """Labels of a value; an undecided parameter gets the axis that has `other`'s channels, or none."""
        if isinstance(found, Labels):
            return found
        shape = self.ledger.shapes[found.name]
        if found.name not in self.axes:
            self.axes[found.name] = self._axis_like(found, other, shape) if other is not None else None
        axis = self.axes[found.name]
        tag = hash_of("read", found.name, axis, found.tag)
        if axis is None:
            self.ledger.hold(found.name, reasons.unclear(where, found.name))
            if found.order is None:
                return fixed_labels(shape, tag)
            index = found.index
            return Labels.of(torch.full_like(index, FIXED), mixed(index, tag)).packed()
        atoms, apart = self.ledger.make(AxisKey(found.name, axis), 0, where)
        if found.order is None:
            return labels_along(atoms, mixed(apart, tag), shape, [axis])
        step = math.prod(shape[axis + 1 :])
        at = found.index // step % shape[axis]
        return Labels.of(atoms[at], mixed(apart[at], found.index - at * step, tag)).packed()

    def _axis_like(self, found: Undecided, other: Labels, shape: tuple[int, ...]) -> int | None:
        if not _has_channels(other):  # it meets numbers that have none, as on the way to a norm's scale
            return _only_long(shape)
        index, atoms = torch.broadcast_tensors(found.index, self.ledger.rooted(other.atoms))
        index, atoms = index[atoms >= 0], atoms[atoms >= 0]
        step = 1
        fitting = None
        for axis in reversed(range(len(shape))):
            at = index // step % shape[axis]
            step *= shape[axis]
            n_pairs = len((at * (int(atoms.max()) + 1) + atoms).unique()) if len(atoms) else 0
            # Each channel meets one entry of the axis, and each entry some channel.
            if shape[axis] > 1 and n_pairs == len(atoms.unique()) and len(at.unique()) == shape[axis]:
                fitting = axis
        return fitting

    def give_up(self, found: Found, reason: str) -> None:
        """Nothing of a value may move."""
        if isinstance(found, Undecided):
            self.axes.setdefault(found.name, None)
            self.ledger.hold(found.name, reason)
        else:
            self.ledger.pin(found.atoms, reason)

    def looked_up(self, found: Found, index: Tensor, filler: str = "") -> Found:
        """The value whose entry i is this one's entry index[i], counted row-major; -1 was filled in."""
        index = index.long()
        if isinstance(found, Undecided):
            if bool((index < 0).any()):
                raise UnknownOperation("padding of a parameter")
            return Undecided(found.name, tuple(index.shape), found.index.reshape(-1)[index], found.tag)
        filled = index < 0
        if not bool(filled.any()):
            return found.moved(index)
        moved = found.spread(range(len(found.shape))).moved_whole(index.clamp(min=0))
        subs = torch.where(filled, hash_of("filled", filler), moved.subs)
        return Labels.of(torch.where(filled, FIXED, moved.atoms), subs).packed()

    def elementwise(
        self, operands: Sequence[Found], shape: torch.Size | tuple[int, ...], where: str
    ) -> Found:
        """Each entry of the result is computed from the entries at its place."""
        undecided = [found for found in operands if isinstance(found, Undecided)]
        if len(undecided) == len(operands) == 1:
            return replace(undecided[0], tag=hash_of(undecided[0].tag, where))
        if len(undecided) == len(operands):
            return self._among_parameters(undecided, shape, where)
        known = max((found for found in operands if isinstance(found, Labels)), key=_has_channels)
        return rules.elementwise(self.ledger, [self.settle(one, known, where) for one in operands], shape)

    def _among_parameters(
        self, operands: Sequence[Undecided], shape: torch.Size | tuple[int, ...], where: str
    ) -> Labels:
        """Parameters with one another: each has one axis longer than 1, or they stay."""
        first: Labels | None = None
        settled = []
        for found in operands:
            if first is None:
                self.axes.setdefault(found.name, _only_long(self.ledger.shapes[found.name]))
            labels = self.settle(found, first, where)
            first = labels if first is None else first
            settled.append(labels)
        return rules.elementwise(self.ledger, settled, shape)

    def joined(self, parts: Sequence[Found], dim: int, where: str) -> Labels:
        """Parts one behind the other."""
        decided = [part for part in parts if isinstance(part, Labels)]
        known = max(decided, key=_has_channels) if decided else None
        example = None
        if known is not None:
            example = known.taken(dim % len(known.shape), torch.zeros(1, dtype=torch.int64))
        labels = []
        for part in parts:
            if isinstance(part, Undecided) and part.name not in self.axes and example is not None:
                index = part.index.narrow(dim, 0, 1)
                shape = self.ledger.shapes[part.name]
                self.axes[part.name] = self._axis_like(
                    Undecided(part.name, tuple(index.shape), index), example, shape
                )
            labels.append(self.settle(part, None, where))
        return rules.joined(labels, dim)

    def raw(self, found: Found | None) -> str:
        """The name of a parameter or buffer that is used as it is. Raises UnknownOperation for another."""
        if not isinstance(found, Undecided) or found.tag:
            raise UnknownOperation("a computed parameter")
        if found.order is not None and not torch.equal(
            found.order, positions(self.ledger.shapes[found.name])
        ):
            raise UnknownOperation("a rearranged parameter")
        return found.name


def _has_channels(labels: Labels) -> bool:
    return bool((labels.atoms >= 0).any())


def _only_long(shape: tuple[int, ...]) -> int | None:
    """The axis that is longer than 1, where there is one such."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    return long[0] if len(long) == 1 else None
