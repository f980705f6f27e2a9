"""Whole update intervals of training with CSR products against as many dense steps, to check what
`bench-train` adds up.

    python -m benchmarks.csr_interval [--width 4096] [--update-every 500] [--intervals 3] [--threads 2]
    [--json FILE]

Both networks (four layers of one width, batch 128, density .05) really train, on random inputs: the sparse
one by `SparseTraining` and `StepCsr` with their own windows and updates, nothing added up afterwards. They
take turns of five steps, in random order. One ratio for each interval; with few intervals their least and
greatest say more than a mean.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from sparse_export.instruments.machine import machine_facts
from sparse_export.train import SparseTraining
from sparse_export.train.csr_choice import choose_products
from sparse_export.train.step_csr import StepCsr
from sparse_export.train.stopping import cpu_settings
from sparse_export.version import command_line, library_versions, now

_TURN, _BATCH = 5, 128


def network(width: int) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    return model, SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def stepper(
    model: nn.Module, optimizer: Optimizer, width: int, finish: Callable[[], object]
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)

    def step() -> None:
        x = torch.randn((_BATCH, width), generator=generator)
        y = torch.randint(width, (_BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        finish()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--update-every", type=int, default=500)
    parser.add_argument("--intervals", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    width, every = arguments.width, arguments.update_every
    machine = machine_facts()
    with cpu_settings(arguments.threads):
        dense_model, dense_optimizer = network(width)
        dense = stepper(dense_model, dense_optimizer, width, dense_optimizer.step)
        model, optimizer = network(width)
        trainer = SparseTraining(model, optimizer, density=0.05, update_every=every)
        chosen = choose_products(model, trainer.masks, torch.zeros(_BATCH, width))
        layers = [fact.name for fact in chosen if fact.by == "csr"]
        if not layers:
            raise SystemExit(
                "CSR products win for no layer here: " + "; ".join(fact.reason for fact in chosen)
            )
        products = StepCsr(model, trainer, layers=layers)

        def finish() -> None:
            trainer.step()
            products.after_step()

        sparse = stepper(model, optimizer, width, finish)
        order = random.Random(0)
        totals: list[dict[str, float]] = []
        for _ in range(arguments.intervals):
            total = {"dense": 0.0, "sparse": 0.0}
            for first in range(0, every, _TURN):
                turns = [("dense", dense), ("sparse", sparse)]
                order.shuffle(turns)
                for name, step in turns:
                    begin = time.perf_counter()
                    for _ in range(min(_TURN, every - first)):
                        step()
                    total[name] += time.perf_counter() - begin
            totals.append(total)
            print(
                f"{every} steps: dense {total['dense']:.1f} s, sparse {total['sparse']:.1f} s, "
                f"dense / sparse {total['dense'] / total['sparse']:.3f}, updates so far {trainer.n_updates}",
                flush=True,
            )
    ratios = [total["dense"] / total["sparse"] for total in totals]
    print(
        f"dense / sparse over {len(ratios)} intervals: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f}), window {products.window} of {every} steps"
    )
    if arguments.json:
        facts = {
            "command": command_line(),
            "date": now(),
            "machine": machine,
            "versions": library_versions(),
            "width": width,
            "threads": arguments.threads,
            "update_every": every,
            "window": products.window,
            "seconds": totals,
        }
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
