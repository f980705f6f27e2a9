"""The parts of a session by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.inference import inference
from benchmarks.gpu.masks import masks
from benchmarks.gpu.products import products
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import Case
from benchmarks.gpu.trained import trained
from benchmarks.gpu.training import training
from sparse_export.instruments.card import watched_cards

PARTS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "ceilings": ceilings,
    "products": products,
    "inference": inference,
    "training": training,
    "masks": masks,
    "trained": trained,
}


def run_part(name: str, setting: Setting, file: Path) -> None:
    """Run one part.

    Args:
        name: of the part.
        setting: of the session.
        file: for its cases; written after each of them.
    """
    cases: list[Case] = []
    torch.backends.cudnn.benchmark = True  # the dense networks are to be as fast as they can be
    with watched_cards() as cards:
        for case in PARTS[name](setting):
            cases.append(case)
            document = {"cases": cases, "throttled": cards.throttled, "cards_why_empty": cards.why_empty}
            file.write_text(json.dumps(document))
