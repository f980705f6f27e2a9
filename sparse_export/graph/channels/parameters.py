"""Parameters that a network reads itself: which of their axes is channels shows at their first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.graph.channels import rules
from sparse_export.graph.channels.labels import FIXED, AxisKey, Labels, Ledger, hash_of, mixed, positions


class UnknownOperation(Exception):  # noqa: N818 - a finding, caught by whoever runs the labels
    """No rule says what this does to channels."""


@dataclass
class Undecided:
    """Entries of a parameter or buffer that the forward reads itself: which axis is channels shows at its
    first use.

    index: each entry's place in the parameter.  tag: what was done to it on the way.
    """

    name: str
    index: Tensor
    tag: int = 0


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
            self.ledger.hold(found.name, f"{where} reads {found.name}, whose channels are not clear")
            return Labels(torch.full_like(found.index, FIXED), mixed(found.index, tag))
        atoms, apart = self.ledger.make(AxisKey(found.name, axis), 0, where)
        step = 1
        for size in shape[axis + 1 :]:
            step *= size
        at = found.index // step % shape[axis]
        return Labels(atoms[at], mixed(apart[at], found.index - at * step, tag))

    def _axis_like(self, found: Undecided, other: Labels, shape: tuple[int, ...]) -> int | None:
        if not _has_channels(other):  # it meets numbers that have none, as on the way to a norm's scale
            return _only_long(shape)
        index, atoms = torch.broadcast_tensors(found.index, self.ledger.rooted(_without_copies(found, other)))
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
            return Undecided(found.name, found.index.reshape(-1)[index], found.tag)
        moved = found.moved(index.clamp(min=0))
        filled, constant = index < 0, hash_of("filled", filler)
        return Labels(torch.where(filled, FIXED, moved.atoms), torch.where(filled, constant, moved.subs))

    def elementwise(
        self, operands: Sequence[Found], shape: torch.Size | tuple[int, ...], where: str
    ) -> Found:
        """Each entry of the result is computed from the entries at its place."""
        undecided = [found for found in operands if isinstance(found, Undecided)]
        if len(undecided) == len(operands) == 1:
            return Undecided(undecided[0].name, undecided[0].index, hash_of(undecided[0].tag, where))
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

    def joined(self, parts: Sequence[Found], dim: int, where: str, *, stacked: bool) -> Labels:
        """torch.cat or torch.stack."""
        decided = [part for part in parts if isinstance(part, Labels)]
        known = max(decided, key=_has_channels) if decided else None
        example = known
        if known is not None and not stacked:
            example = Labels(known.atoms.narrow(dim, 0, 1), known.subs.narrow(dim, 0, 1))
        labels = []
        for part in parts:
            if isinstance(part, Undecided) and part.name not in self.axes and example is not None:
                index = part.index if stacked else part.index.narrow(dim, 0, 1)
                shape = self.ledger.shapes[part.name]
                self.axes[part.name] = self._axis_like(Undecided(part.name, index), example, shape)
            labels.append(self.settle(part, None, where))
        return rules.joined(labels, dim, stacked=stacked)

    def raw(self, found: Found | None) -> str:
        """The name of a parameter or buffer that is used as it is. Raises UnknownOperation for another."""
        if not isinstance(found, Undecided) or found.tag:
            raise UnknownOperation("a computed parameter")
        if not torch.equal(found.index, positions(self.ledger.shapes[found.name])):
            raise UnknownOperation("a rearranged parameter")
        return found.name


def _has_channels(labels: Labels) -> bool:
    return bool((labels.atoms >= 0).any())


def _only_long(shape: tuple[int, ...]) -> int | None:
    """The axis that is longer than 1, where there is one such."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    return long[0] if len(long) == 1 else None


def _without_copies(found: Undecided, other: Labels) -> Tensor:
    """Atoms of the other value, one of an axis along which they and the parameter are the same."""
    atoms, index = other.atoms, found.index
    for back in range(1, atoms.dim() + 1):
        if index.dim() < back or index.shape[-back] == 1:
            first = atoms.narrow(-back, 0, 1)
            if bool((atoms == first).all()):
                atoms = first
    return atoms
