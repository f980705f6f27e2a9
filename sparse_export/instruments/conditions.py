"""How a measurement was made and on what machine: the fields that every timed result has, and their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sparse_export.instruments.card import CardLog, watched_cards
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.pinning import pinned
from sparse_export.version import library_versions, now

__all__ = ["Conditions", "clock_notes", "conditions_text", "measuring", "onnxruntime_text"]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What measured times depend on; every timed result has these fields.

    Attributes:
        n_threads: inside an operator.
        cores: that they were held to; () where they had every usable one.
        rounds: see `measure_interleaved`, as for block_s and seed.
        machine: before the measurement.
        cards: what NVML said meanwhile.
        created: when it ended.
        sizes: by name, what the free sizes of the inputs were, other than the batch.
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
    sizes: dict[str, int] = field(default_factory=dict)


@contextmanager
def measuring(
    *, n_threads: int, rounds: int, block_s: float, seed: int, sizes: Mapping[str, int] | None = None
) -> Iterator[Callable[[], Conditions]]:
    """Watch the cards and hold threads to as many cores while something is timed.

    Yields:
        What gives the conditions; it is to be called when the measurement has ended.
    """
    machine = machine_facts()
    with watched_cards() as cards, pinned(n_threads) as cores:
        yield lambda: Conditions(
            n_threads=n_threads,
            cores=cores,
            rounds=rounds,
            block_s=block_s,
            seed=seed,
            machine=machine,
            cards=cards,
            versions=library_versions(),
            created=now(),
            sizes=dict(sizes or {}),
        )


def conditions_text(result: Conditions, by: str, *notes: str, at_most: bool = False) -> str:
    """By what, how and where something was timed, as a sentence.

    Args:
        result: that was timed.
        by: the library that ran it, with its version.
        notes: clauses on how, in addition.
        at_most: whether the measurement may end before its last round.
    """
    held = f" on core {', '.join(map(str, result.cores))}" if result.cores else ""
    most = "at most " if at_most else ""
    how = (
        f"threads: {result.n_threads}{held}",
        f"{most}{result.rounds} interleaved rounds of blocks of {1e3 * result.block_s:g} ms",
        f"seed {result.seed}",
        *(f"{name} = {size}" for name, size in result.sizes.items()),
    )
    machine = result.machine
    where = [machine["cpu_model"] or "unknown CPU", f"{machine['n_cores_usable']} cores"]
    where += [str(gpu["name"]) for gpu in machine["gpus"]]
    where += [f"load {machine['load_average'][0]}"] if machine["load_average"] else []
    return f"{', '.join((by, *how, *notes))}; {', '.join(where)}."


def onnxruntime_text(result: Conditions, name: str = "onnxruntime") -> str:
    """A runtime with the version of onnxruntime, whichever of its distributions is installed."""
    version = next((v for library, v in result.versions.items() if library.startswith("onnxruntime")), "")
    return f"{name} {version}".rstrip()


def clock_notes(cards: CardLog) -> list[str]:
    """A sentence where a card's clock was held down, else nothing."""
    held = cards.throttled
    return [f"The card's clock was held down meanwhile: {', '.join(held)}."] if held else []
