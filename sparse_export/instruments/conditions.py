"""How a measurement was made and on what machine: the fields that every timed result has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from sparse_export.instruments.card import CardLog, watched_cards
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.pinning import pinned
from sparse_export.version import library_versions, now

__all__ = ["Conditions", "Timed", "how_timed", "measuring"]


class Conditions(TypedDict):
    """What measured times depend on, by the names of a result's fields.

    n_threads: inside an operator.  cores: that they were held to; () where they had every usable one.
    rounds, block_s, seed: see `measure_interleaved`.  machine: before the measurement.  cards: what NVML said
    meanwhile.  created: when it ended.
    """

    n_threads: int
    cores: tuple[int, ...]
    rounds: int
    block_s: float
    seed: int
    machine: dict[str, Any]
    cards: CardLog
    versions: dict[str, str]
    created: str


@contextmanager
def measuring(*, n_threads: int, rounds: int, block_s: float, seed: int) -> Iterator[Conditions]:
    """Watch the cards and hold threads to as many cores while something is timed; yields what to put on record."""
    machine = machine_facts()
    with watched_cards() as cards, pinned(n_threads) as cores:
        conditions: Conditions = {
            "n_threads": n_threads,
            "cores": cores,
            "rounds": rounds,
            "block_s": block_s,
            "seed": seed,
            "machine": machine,
            "cards": cards,
            "versions": library_versions(),
            "created": now(),
        }
        yield conditions
    conditions["created"] = now()


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What every timed result tells: the `Conditions`, as fields."""

    n_threads: int
    cores: tuple[int, ...]
    rounds: int
    block_s: float
    seed: int
    machine: dict[str, Any]
    cards: CardLog
    versions: dict[str, str]
    created: str


def how_timed(result: Timed) -> str:
    """Threads, rounds and seed, as part of a sentence."""
    held = f" on core {', '.join(map(str, result.cores))}" if result.cores else ""
    return (
        f"threads: {result.n_threads}{held}, {result.rounds} interleaved rounds of blocks of "
        f"{1e3 * result.block_s:g} ms, seed {result.seed}"
    )
