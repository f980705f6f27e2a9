"""Labels that follow every value of a network, and the ledger of which channels are one.

A label is an atom and a sub. The atom is the channel that the value belongs to: an entry of some parameter axis,
-1 for a value that no permutation moves. The sub is a 64-bit hash of everything else that identifies the
value. A permutation p of channels puts the value of label (p(a), s) where that of (a, s) was. So two channels
may change places when each has the same subs wherever the network tells subs apart: on the columns of a
weight, in a sum.

Legend: R rows, C columns. Hashes are int64 that wrap around.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = -1


def hash_of(*words: object) -> int:
    """A 64-bit hash of words, the same in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mixed(*parts: Tensor | int) -> Tensor:
    """Hash int64 tensors, broadcast together, entry by entry; the order of the parts counts."""
    total = torch.zeros((), dtype=torch.int64)
    for part in parts:
        total = _scrambled(total * 0x9E3779B97F4A7C1 + part)  # wraps around, as meant
    return total


def _scrambled(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def hashed_rows(subs_RC: Tensor) -> Tensor:
    """A hash of each row as a vector: int64 (R,)."""
    return mixed(subs_RC, torch.arange(subs_RC.shape[1])).sum(1)


@dataclass
class Labels:
    """The labels of one tensor: atoms and subs, int64, of its shape, on the CPU."""

    atoms: Tensor
    subs: Tensor

    def moved(self, index: Tensor) -> Labels:
        """Labels of a tensor whose entry i is this one's entry index[i], counted row-major."""
        return Labels(self.atoms.reshape(-1)[index], self.subs.reshape(-1)[index])

    def expanded(self, shape: torch.Size) -> Labels:
        return Labels(self.atoms.expand(shape), self.subs.expand(shape))


def positions(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Each entry's row-major place."""
    n = 1
    for size in shape:
        n *= size
    return torch.arange(n).reshape(tuple(shape))


def fixed_labels(shape: torch.Size, *words: object) -> Labels:
    """Values that stay where they are, each one another."""
    return Labels(torch.full(shape, FIXED), mixed(positions(shape), hash_of(*words)))


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
    """Union-find over atoms, the axes they lie on, and the reasons that hold some in place."""

    shapes: dict[str, tuple[int, ...]]
    axes: dict[AxisKey, AxisRecord] = field(default_factory=dict)
    sums: list[AxisRecord] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    _parent: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def new_atoms(self, n: int) -> Tensor:
        start = len(self._parent)
        atoms = torch.arange(start, start + n)
        self._parent = torch.cat([self._parent, atoms])
        return atoms

    def roots(self) -> Tensor:
        """The representative of every atom."""
        while True:
            above = self._parent[self._parent]
            if torch.equal(above, self._parent):
                return self._parent
            self._parent = above

    def rooted(self, atoms: Tensor) -> Tensor:
        """Representatives of atoms; FIXED stays."""
        roots = torch.cat([self.roots(), torch.tensor([FIXED])])
        return roots[atoms]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Make one of the atoms a[i] and b[i], wherever neither is FIXED. Broadcasts."""
        a, b = torch.broadcast_tensors(a, b)
        a, b = a.reshape(-1), b.reshape(-1)
        both = (a >= 0) & (b >= 0)
        a, b = a[both], b[both]
        while len(a):
            roots = self.roots()
            low, high = torch.minimum(roots[a], roots[b]), torch.maximum(roots[a], roots[b])
            apart = low != high
            if not bool(apart.any()):
                return
            a, b, low, high = a[apart], b[apart], low[apart], high[apart]
            # Each representative takes one smaller neighbour: no cycles; whoever lost comes round again.
            self._parent = roots.clone().scatter_(0, high, low)

    def pin(self, atoms: Tensor, reason: str) -> None:
        atoms = atoms.reshape(-1)
        atoms = atoms[atoms >= 0].unique()
        if len(atoms):
            self.pins.append((atoms, reason))

    def hold(self, name: str, reason: str) -> None:
        """Nothing of this parameter or buffer may move."""
        self.held.setdefault(name, reason)

    def columns(self, labels: Labels, reason: str) -> tuple[Tensor, Tensor]:
        """Tie each column of labels of shape (R, C); gives its atom and the hash of its subs: (C,) and (C,).

        A column that is fixed in some rows and not in others pins what it holds.
        """
        atoms, subs = labels.atoms, labels.subs
        if not len(atoms):
            return torch.full((atoms.shape[1],), FIXED), torch.zeros(atoms.shape[1], dtype=torch.int64)
        # A row of one number, as padding makes it, is the same in any order.
        alike = (atoms < 0).all(1) & (subs == subs[:, :1]).all(1)
        if bool(alike.any()) and not bool(alike.all()):
            atoms = atoms[~alike]
        top, low = atoms.max(0).values, atoms.min(0).values
        if not torch.equal(top, low):
            self.tie(atoms, top)
        self.pin(atoms[:, (low < 0) & (top >= 0)], f"{reason}: some of what it reads moves and some does not")
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
        reason = f"{where}: {key.name} also meets values that stay in place"
        self.pin(record.atoms[stays], reason)
        self.pin(atoms[stays], reason)
        record.reads = True
        record.atoms = torch.maximum(record.atoms, atoms)
        record.uses = record.uses + mixed(torch.as_tensor(uses), 1).expand(len(atoms))

    def make(self, key: AxisKey, uses: Tensor | int, where: str) -> tuple[Tensor, Tensor]:
        """The axis' entries make values: gives their atoms, new where there were none, and what tells them
        apart.
        """
        size = self.shapes[key.name][key.axis] * key.groups
        record = self._record(key, size, where)
        if record is not None and not record.makes:
            there = self.rooted(record.atoms[record.atoms >= 0])
            if not bool((record.uses != 0).any()):
                record.atoms = self.new_atoms(size)
            elif len(there.unique()) < len(there):
                self.hold(key.name, f"{where}: {key.name} is read and written along one axis")
                record = None
        if record is None:
            atoms = torch.full((size,), FIXED)
        else:
            record.makes = True
            record.uses = record.uses + mixed(torch.as_tensor(uses), 2).expand(size)
            atoms = record.atoms
        return atoms, mixed(torch.where(atoms < 0, torch.arange(size), -1), hash_of(key))

    def sum_over(self, atoms: Tensor, uses: Tensor, where: str) -> None:
        """The network sums over these atoms: what they are, but not in which order, makes a difference."""
        self.sums.append(AxisRecord(where, atoms.reshape(-1), uses.reshape(-1)))

    def _record(self, key: AxisKey, size: int, where: str) -> AxisRecord | None:
        other = next((k for k in self.axes if k.name == key.name and k.axis == key.axis and k != key), None)
        if other is not None:
            self.hold(key.name, f"{where}: {key.name} is used with {key.groups} and {other.groups} groups")
        if key.name in self.held:
            return None
        empty = torch.full((size,), FIXED)
        return self.axes.setdefault(key, AxisRecord(where, empty, torch.zeros(size, dtype=torch.int64)))
