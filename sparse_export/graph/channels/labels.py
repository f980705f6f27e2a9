"""Labels that follow every value of a network, and the ledger of which channels are one.

A label is an atom and a sub. The atom is the channel that the value belongs to: an entry of some parameter axis,
-1 for a value that no permutation moves. The sub is a 64-bit hash of everything else that identifies the
value. A permutation p of channels puts the value of label (p(a), s) where that of (a, s) was. So two channels
may change places when each has the same subs wherever the network tells subs apart: on the columns of a
weight, in a sum.

Most values of a tensor differ only by their place: the pixels of a map, the tokens of a text. Along such an
axis labels have length 1, and the place counts as part of the sub. So following them costs as much as there are
channels, whatever the size of a picture.

Legend: R rows, C columns. Hashes are int64 that wrap around.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from sparse_export.graph.channels import reasons

Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
FIXED = -1
_MOST = 1 << 25  # labels of one tensor; each takes 16 bytes, and rules some times that


class UnknownOperation(Exception):  # noqa: N818 - a finding, caught by whoever runs the labels
    """No rule says what this does to channels."""


def hash_of(*words: object) -> int:
    """A 64-bit hash of words, the same in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mixed(*parts: Tensor | int) -> Tensor:
    """Hash int64 tensors, broadcast together, entry by entry; the order of the parts counts."""
    total: Words = np.zeros(1, np.uint64)
    for part in parts:
        words = part.numpy().view(np.uint64) if isinstance(part, Tensor) else np.uint64(part % (1 << 64))
        total = _scrambled(total * np.uint64(0x9E3779B97F4A7C1) + words)  # wraps around, as meant
    rank = max((part.dim() for part in parts if isinstance(part, Tensor)), default=0)
    return torch.from_numpy(total.view(np.int64)).reshape(total.shape if rank else ())


def _scrambled(x: Words) -> Words:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_rows(subs_RC: Tensor) -> Tensor:
    """A hash of each row as a vector: int64 (R,)."""
    return mixed(subs_RC, torch.arange(subs_RC.shape[1])).sum(1)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of one tensor.

    Attributes:
        atoms: int64, on the CPU, with an axis for each of the tensor's: as long as it, or 1 where values differ
            by nothing but their place, or not at all.
        subs: likewise, of the same shape.
        shape: of the tensor.
        even: for each axis of length 1, whether values are the same along it wherever they stand.
        numbers: likewise of the atoms' shape, float64: what all these values always are, NaN where that is not
            one known number; None where numbers are not followed.
    """

    atoms: Tensor
    subs: Tensor
    shape: tuple[int, ...]
    even: tuple[bool, ...]
    numbers: Tensor | None = None

    @staticmethod
    def of(atoms: Tensor, subs: Tensor) -> Labels:
        """Labels that tell every entry."""
        return Labels(atoms, subs, tuple(atoms.shape), tuple(size == 1 for size in atoms.shape))

    def is_long(self, axis: int) -> bool:
        """Does more than the place differ along an axis?"""
        return self.atoms.shape[axis] > 1

    @property
    def long(self) -> list[int]:
        """The axes along which more than the place differs."""
        return [axis for axis, size in enumerate(self.atoms.shape) if size > 1]

    def spread(self, axes: Iterable[int]) -> Labels:
        """The same labels, told entry by entry along some axes."""
        atoms, subs, numbers, even = self.atoms, self.subs, self.numbers, list(self.even)
        rank = len(self.shape)
        for axis in {axis % rank for axis in axes}:
            n = self.shape[axis]
            if n == 1 or atoms.shape[axis] > 1:
                continue
            sizes = [*atoms.shape[:axis], n, *atoms.shape[axis + 1 :]]
            if math.prod(sizes) > _MOST:
                raise UnknownOperation(
                    f"{math.prod(sizes):,} values that differ, and at most {_MOST:,} are followed"
                )
            if self.even[axis]:
                subs = subs.expand(sizes)
            else:
                subs = mixed(subs, torch.arange(n).reshape(-1, *[1] * (rank - axis - 1)))
            atoms = atoms.expand(sizes)
            numbers = None if numbers is None else numbers.expand(sizes)
            even[axis] = False
        return Labels(atoms, subs, self.shape, tuple(even), numbers)

    def moved(self, index: Tensor) -> Labels:
        """Labels of a tensor whose entry i is this one's entry index[i], counted row-major."""
        return self.moved_whole(index).packed()

    def moved_whole(self, index: Tensor) -> Labels:
        """As `moved`, told entry by entry."""
        whole = self.spread(range(len(self.shape)))
        return Labels.of(whole.atoms.reshape(-1)[index], whole.subs.reshape(-1)[index])

    def led_by(self, n: int) -> Labels:
        """Labels with so many axes of size 1 before the others."""
        return self.reshaped((*[1] * n, *self.shape)) if n else self

    def turned(self, order: Sequence[int]) -> Labels:
        """Labels with their axes in another order."""
        numbers = None if self.numbers is None else self.numbers.permute(*order)
        shape, even = tuple(self.shape[i] for i in order), tuple(self.even[i] for i in order)
        return Labels(self.atoms.permute(*order), self.subs.permute(*order), shape, even, numbers)

    def taken(self, axis: int, index: Tensor) -> Labels:
        """The entries `index` of an axis, in that order."""
        shape = (*self.shape[:axis], len(index), *self.shape[axis + 1 :])
        if not self.is_long(axis) and not self.even[axis] and len(index.unique()) < len(index):
            return self.spread([axis]).taken(
                axis, index
            )  # what is taken twice is not told apart by its place
        if not self.is_long(axis):
            even = (*self.even[:axis], self.even[axis] or len(index) == 1, *self.even[axis + 1 :])
            return replace(self, shape=shape, even=even)
        numbers = None if self.numbers is None else self.numbers.index_select(axis, index)
        even = (*self.even[:axis], len(index) == 1, *self.even[axis + 1 :])
        atoms, subs = self.atoms.index_select(axis, index), self.subs.index_select(axis, index)
        return Labels(atoms, subs, shape, even, numbers)

    def reshaped(self, shape: Sequence[int]) -> Labels:
        """Labels of the same values in row-major order under another shape."""
        blocks = list(_blocks(self.shape, shape))
        spread = [
            axis
            for start, end, _, _ in blocks
            if any(self.is_long(axis) for axis in range(start, end))
            for axis in range(start, end)
        ]
        told = self.spread(spread)
        sizes: list[int] = []
        even: list[bool] = []
        for start, end, first, last in blocks:
            is_told = any(told.is_long(axis) for axis in range(start, end))
            sizes += shape[first:last] if is_told else [1] * (last - first)
            alike = not is_told and all(told.even[axis] for axis in range(start, end))
            even += [alike or size == 1 for size in shape[first:last]]
        numbers = None if told.numbers is None else told.numbers.reshape(sizes)
        atoms, subs = told.atoms.reshape(sizes), told.subs.reshape(sizes)
        return Labels(atoms, subs, tuple(shape), tuple(even), numbers).packed()

    def rows(self, dims: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Atoms and subs (R, C): C runs over `dims`, R over the others, as far as more than places differ."""
        rank = len(self.shape)
        moved = sorted(dim % rank for dim in dims)
        told = self.spread(moved)
        order = [*(axis for axis in range(rank) if axis not in moved), *moved]
        n_columns = math.prod(self.shape[dim] for dim in moved)
        return tuple(x.permute(*order).reshape(-1, n_columns) for x in (told.atoms, told.subs))  # type: ignore[return-value]

    def packed(self, ledger: Ledger | None = None) -> Labels:
        """The same, shorter: an axis goes along which every channel stays itself. What differed along it becomes
        part of each channel's subs.

        Args:
            ledger: says which atoms are one by now.
        """
        found, long = self, self.long
        if len(long) < 2:
            return self
        roots = self.atoms if ledger is None else ledger.rooted(self.atoms)
        for axis in long:
            if len(found.long) > 1 and (shorter := found._without(axis, roots)) is not None:
                found = shorter
                roots = roots.amax(axis, keepdim=True)
        return found

    def _without(self, axis: int, roots: Tensor) -> Labels | None:
        first = self.subs.narrow(axis, 0, 1)
        top = roots.amax(axis, keepdim=True)
        is_even = bool((self.subs == first).all()) and bool((roots == top).all())
        even = (*self.even[:axis], is_even, *self.even[axis + 1 :])
        numbers = None
        if self.numbers is not None:
            low, high = self.numbers.amin(axis, keepdim=True), self.numbers.amax(axis, keepdim=True)
            numbers = torch.where(low == high, low, math.nan)
        if is_even:
            return Labels(self.atoms.narrow(axis, 0, 1), first, self.shape, even, numbers)
        if not bool((top >= 0).any()):
            return None
        # A slice of one number, as padding makes it, is the same in any order of the channels.
        others = [i for i in range(roots.dim()) if i != axis]
        start = tuple(slice(None) if i == axis else slice(0, 1) for i in range(roots.dim()))
        filled = ((roots < 0) & (self.subs == self.subs[start])).amin(others, keepdim=True)
        if not bool(((roots == top) | filled).all()):
            return None
        places = torch.arange(roots.shape[axis]).reshape(-1, *[1] * (roots.dim() - axis - 1))
        subs = mixed(self.subs, places).sum(axis, keepdim=True)
        return Labels(self.atoms.amax(axis, keepdim=True), subs, self.shape, even, numbers)


def _blocks(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """The smallest runs of axes that become runs of axes: start and end before, start and end after."""
    i = o = 0
    while i < len(before) or o < len(after):
        start, first, n_in, n_out = i, o, 1, 1
        if i < len(before):
            n_in, i = before[i], i + 1
        if o < len(after):
            n_out, o = after[o], o + 1
        while n_in != n_out:
            if n_in < n_out:
                n_in, i = n_in * before[i], i + 1
            else:
                n_out, o = n_out * after[o], o + 1
        yield start, i, first, o


def positions(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Each entry's row-major place."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def fixed_labels(shape: Sequence[int], *words: object) -> Labels:
    """Values that stay where they are, each one another."""
    sizes = [1] * len(shape)
    subs = torch.full(sizes, hash_of(*words))
    return Labels(torch.full(sizes, FIXED), subs, tuple(shape), tuple(size == 1 for size in shape))


def labels_along(atoms: Tensor, subs: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Labels:
    """Labels of values whose channels lie along `dims`, in rising order: atoms and subs (C,)."""
    dims = sorted(dim % len(shape) for dim in dims)
    sizes = [size if axis in dims else 1 for axis, size in enumerate(shape)]
    even = tuple(size == 1 for size in shape)
    return Labels(atoms.reshape(sizes), subs.reshape(sizes), tuple(shape), even)


@dataclass(frozen=True)
class AxisKey:
    """One axis of a parameter or buffer. groups > 1: axis 1 of a grouped convolution, which has an order of
    its own in each of so many blocks of axis 0; its entries are counted block by block."""

    name: str
    axis: int
    groups: int = 1


@dataclass
class AxisRecord:
    """What is known of one axis: its entries' atoms, the hash of how each is used, and whether it makes
    values.

    reads: does it meet values as well?  where: what uses it, for messages.
    """

    where: str
    atoms: Tensor
    uses: Tensor
    makes: bool = False
    reads: bool = False


@dataclass
class Ledger:
    """Union-find over atoms, the axes they lie on, and the reasons that hold some in place.

    tells: is it noted how each entry of an axis is used? Only who asks which channels are alike needs that.
    """

    shapes: dict[str, tuple[int, ...]]
    tells: bool = True
    axes: dict[AxisKey, AxisRecord] = field(default_factory=dict)
    sums: list[AxisRecord] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    _n: int = 0
    _above: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    _ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _groups: dict[tuple[str, int], AxisKey] = field(default_factory=dict)

    def new_atoms(self, n: int) -> Tensor:
        self._n += n
        return torch.arange(self._n - n, self._n)

    def roots(self) -> Tensor:
        """The representative of every atom."""
        return self.rooted(torch.arange(self._n))

    def rooted(self, atoms: Tensor) -> Tensor:
        """Representatives of atoms; FIXED stays."""
        if len(self._above) < self._n:  # room for as many again: atoms come in small numbers
            self._above = torch.cat([self._above, torch.arange(len(self._above), 2 * self._n)])
        if self._ties:
            a, b = (torch.cat(ends) for ends in zip(*self._ties, strict=True))
            self._ties.clear()
            roots, ends = self._found(torch.stack([a, b])).unique(return_inverse=True)
            n, edges = len(roots), ends.reshape(2, -1).numpy()
            graph = coo_matrix((np.ones(len(a), np.bool_), (edges[0], edges[1])), shape=(n, n))
            n_one, found = connected_components(graph, directed=False)
            of_root = torch.from_numpy(found).long()
            least = torch.full((int(n_one),), self._n).scatter_reduce_(0, of_root, roots, "amin")
            self._above[roots] = least[of_root]
        return torch.where(atoms < 0, FIXED, self._found(atoms.clamp(min=0))) if self._n else atoms

    def _found(self, atoms: Tensor) -> Tensor:
        found = self._above[atoms]
        while not torch.equal(higher := self._above[found], found):
            found = higher
        self._above[atoms] = found
        return found

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make one of the atoms a[i] and b[i], wherever neither is FIXED. Broadcasts."""
        apart = (a >= 0) & (b >= 0) & (a != b)
        if bool(apart.any()):
            self._ties.append((a.expand(apart.shape)[apart], b.expand(apart.shape)[apart]))

    def pin(self, atoms: Tensor, reason: str) -> None:
        atoms = atoms.reshape(-1)
        atoms = atoms[atoms >= 0].unique()
        if len(atoms):
            self.pins.append((atoms, reason))

    def hold(self, name: str, reason: str) -> None:
        """Nothing of this parameter or buffer may move."""
        self.held.setdefault(name, reason)

    def columns(self, rows: tuple[Tensor, Tensor], where: str) -> tuple[Tensor, Tensor]:
        """Tie each column of atoms and subs (R, C); gives its atom and the hash of its subs: (C,) and (C,).

        A column that is fixed in some rows and not in others pins what it holds.
        """
        atoms, subs = rows
        if not len(atoms):
            return torch.full((atoms.shape[1],), FIXED), torch.zeros(atoms.shape[1], dtype=torch.int64)
        if len(atoms) == 1 and not self.tells:
            return atoms[0], subs[0]
        if len(atoms) == 1:
            uses = mixed(subs[0], 0)
            return atoms[0], torch.where(atoms[0] < 0, mixed(uses, torch.arange(len(uses))), uses)
        # A row of one number, as padding makes it, is the same in any order.
        alike = (atoms < 0).all(1) & (subs == subs[:, :1]).all(1)
        if bool(alike.any()) and not bool(alike.all()):
            atoms = atoms[~alike]
        top, low = atoms.max(0).values, atoms.min(0).values
        if not torch.equal(top, low):
            self.tie(atoms, top)
        self.pin(atoms[:, (low < 0) & (top >= 0)], reasons.mixed_with_fixed(where))
        uses = hashed_rows(subs.T)
        # A column that stays is told from every other by its place.
        return top, torch.where(low < 0, mixed(uses, torch.arange(len(uses))), uses)

    def use(self, key: AxisKey, atoms: Tensor, uses: Tensor | int, where: str) -> None:
        """The axis' entry i meets values of atoms[i], in the way uses[i]. FIXED: the entry has to stay."""
        record = self._record(key, len(atoms), where)
        if record is None:
            self.pin(atoms, self.held[key.name])
            return
        self.tie(record.atoms, atoms)
        stays = ((record.atoms < 0) | (atoms < 0)) & (record.uses != 0)  # a first use has uses == 0
        reason = reasons.also_meets_fixed(where, key.name)
        self.pin(record.atoms[stays], reason)
        self.pin(atoms[stays], reason)
        record.reads = True
        record.atoms = torch.maximum(record.atoms, atoms)
        record.uses = record.uses + self._told(uses, 1, len(atoms))

    def make(self, key: AxisKey, uses: Tensor | int, where: str) -> tuple[Tensor, Tensor]:
        """The axis' entries make values: gives their atoms, new where there were none, and what tells them
        apart.
        """
        size = self.shapes[key.name][key.axis] * key.groups
        record = self._record(key, size, where)
        if record is not None and not record.makes:
            if not bool((record.uses != 0).any()):
                record.atoms = self.new_atoms(size)
            else:
                there = self.rooted(record.atoms[record.atoms >= 0])
                if len(there.unique()) < len(there):
                    self.hold(key.name, reasons.read_and_written(where, key.name))
                    record = None
        if record is None:
            atoms = torch.full((size,), FIXED)
        else:
            record.makes = True
            record.uses = record.uses + self._told(uses, 2, size)
            atoms = record.atoms
        if not self.tells:
            return atoms, torch.zeros_like(atoms)
        return atoms, mixed(torch.where(atoms < 0, torch.arange(size), -1), hash_of(key))

    def _told(self, uses: Tensor | int, kind: int, n: int) -> Tensor | int:
        return mixed(torch.as_tensor(uses), kind).expand(n) if self.tells else 1

    def sum_over(self, atoms: Tensor, uses: Tensor, where: str) -> None:
        """The network sums over these atoms: what they are, but not in which order, makes a difference."""
        self.sums.append(AxisRecord(where, atoms.reshape(-1), uses.reshape(-1)))

    def _record(self, key: AxisKey, size: int, where: str) -> AxisRecord | None:
        other = self._groups.setdefault((key.name, key.axis), key)
        if other != key:
            self.hold(key.name, reasons.groups_differ(where, key.name, key.groups, other.groups))
        if key.name in self.held:
            return None
        empty = torch.full((size,), FIXED)
        return self.axes.setdefault(key, AxisRecord(where, empty, torch.zeros(size, dtype=torch.int64)))
