"""What belongs together: the spaces of channels that a ledger of labels has, with why others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_export.graph.channels import reasons
from sparse_export.graph.channels.labels import FIXED, AxisRecord, Ledger, hash_of, mixed

__all__ = ["Channels", "Member", "Space", "spaces_of"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """An axis of a parameter or buffer that a space lies on.

    slots: int64 (width, block): entries of the axis that belong to each channel. More than one where a
        convolution's map was flattened.  groups: of a grouped convolution whose axis 1 this is; each block of
        axis 0 has its own order, and entries are counted block by block.  reads: it meets values of the
        channels.
    """

    name: str
    axis: int
    groups: int
    slots: Tensor
    reads: bool


@dataclass(frozen=True, kw_only=True)
class Space:
    """Channels that have one order wherever they occur.

    free: they may be permuted; else `reason` says why not.
    """

    name: str
    width: int
    members: tuple[Member, ...]
    free: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The spaces of a network, those that are free first. untraced: why nothing could be found, or empty."""

    spaces: tuple[Space, ...]
    untraced: str = ""

    @property
    def free(self) -> tuple[Space, ...]:
        return tuple(space for space in self.spaces if space.free)


def spaces_of(ledger: Ledger) -> Iterator[Space]:
    """The spaces of a ledger: free ones, then what stays, grouped by where it lies and why."""
    n = len(ledger.roots())
    reasons = _reasons(ledger)
    home, uses = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        home.index_add_(0, roots, torch.full((len(roots),), hash_of(key)))
        uses.index_add_(0, roots, mixed(record.uses[there], hash_of(key)))
    for i, record in enumerate(ledger.sums):
        roots, there = _on(ledger, record)
        uses.index_add_(0, roots, mixed(record.uses[there], hash_of("sum", i)))

    occurring = (home != 0).nonzero()[:, 0]
    groups: dict[tuple[int, int], list[int]] = {}
    for root in occurring.tolist():
        if root not in reasons:
            groups.setdefault((int(home[root]), int(uses[root])), []).append(root)
    space_of: dict[int, int] = {}
    sizes: list[int] = []
    told: list[str] = []
    for roots_of_one in (g for g in groups.values() if len(g) > 1):
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append("")
    single: dict[int, list[int]] = {}
    for (where, _), roots_of_one in groups.items():
        if len(roots_of_one) == 1:
            single.setdefault(where, []).extend(roots_of_one)
    for roots_of_one in single.values():
        reason = _who_tells_apart(ledger, roots_of_one)
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append(reason)
    stuck: dict[tuple[int, str], list[int]] = {}
    for root in occurring.tolist():
        if root in reasons:
            stuck.setdefault((int(home[root]), reasons[root]), []).append(root)
    for (_, reason), roots_of_one in stuck.items():
        for root in roots_of_one:
            space_of[root] = len(sizes)
        sizes.append(len(roots_of_one))
        told.append(reason)

    members = _members(ledger, space_of, sizes)
    names: Counter[str] = Counter()
    for i, width in enumerate(sizes):
        base = f"{members[i][0].name}[{members[i][0].axis}]"
        names[base] += 1
        name = base if names[base] == 1 else f"{base}#{names[base]}"
        yield Space(name=name, width=width, members=tuple(members[i]), free=not told[i], reason=told[i])


def _on(ledger: Ledger, record: AxisRecord) -> tuple[Tensor, Tensor]:
    """Representatives on an axis, and the entries where there are any."""
    there = (record.atoms >= 0).nonzero()[:, 0]
    return ledger.roots()[record.atoms[there]], there


def _reasons(ledger: Ledger) -> dict[int, str]:
    """Representatives that have to stay, each with the first reason."""
    found: dict[int, str] = {}

    def note(roots: Tensor, reason: str) -> None:
        for root in roots.tolist():
            found.setdefault(root, reason)

    for atoms, reason in ledger.pins:
        note(ledger.roots()[atoms].unique(), reason)
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        if key.name in ledger.held:
            note(roots, ledger.held[key.name])
        counted = roots if record.makes else mixed(roots, record.uses[there])
        _, index, counts = counted.unique(return_inverse=True, return_counts=True)
        note(roots[counts[index] > 1], reasons.several_entries(record.where, key.name))
    return found


def _who_tells_apart(ledger: Ledger, roots: list[int]) -> str:
    if len(roots) == 1:
        return reasons.ONE_CHANNEL
    n = len(ledger.roots())
    for record in (*ledger.axes.values(), *ledger.sums):
        total = torch.zeros(n, dtype=torch.int64)
        on, there = _on(ledger, record)
        total.index_add_(0, on, mixed(record.uses[there], 1))
        if len(total[roots].unique()) > len(roots) // 2:
            return reasons.told_apart(record.where)
    return reasons.TOGETHER


def _members(ledger: Ledger, space_of: dict[int, int], sizes: list[int]) -> list[list[Member]]:
    n = len(ledger.roots())
    space = torch.full((n,), FIXED)
    for root, i in space_of.items():
        space[root] = i
    members: list[list[Member]] = [[] for _ in sizes]
    for key, record in ledger.axes.items():
        roots, there = _on(ledger, record)
        order = record.uses[there].argsort(stable=True)
        roots, there = roots[order], there[order]
        order = roots.argsort(stable=True)
        roots, there = roots[order], there[order]
        for i in space[roots].unique().tolist():
            if i < 0:
                continue
            slots = there[space[roots] == i]
            n_each = len(slots) // sizes[i] if len(slots) % sizes[i] == 0 else 1  # 1: among those that stay
            members[i].append(
                Member(
                    name=key.name,
                    axis=key.axis,
                    groups=key.groups,
                    slots=slots.reshape(-1, n_each),
                    reads=record.reads,
                )
            )
    return members
