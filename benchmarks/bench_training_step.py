"""What sparse momentum adds to a training step, and `train` to a bare loop, on LeNet-300-100.

    python -m benchmarks.bench_training_step [--fused] [--rounds N] [--json FILE]
    python -m benchmarks.bench_training_step --whole-run --data-dir DIR [--rounds N] [--json FILE]

First form: three loops over the same random batches take turns in blocks, in random order: `dense`
(optimizer.step), `masked` (the same, then every weight times a fixed mask) and `sparse` (SparseTraining.step
with one mask update in 540 steps, as an epoch of MNIST has). Each round is 540 steps of each. --fused:
torch's fused SGD, which `train` uses and which makes the step shorter, in place of its plain one.  Second
form: whole processes, CPU seconds as the system counts them: `sparse-export train mnist-lenet300-100 --epochs
20 --density 0.05` against a bare masked loop with the same data, batch size, optimiser, thread and number of
steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from sparse_export import models
from sparse_export.instruments.machine import machine_facts
from sparse_export.tasks import data
from sparse_export.train import SparseTraining
from sparse_export.version import command_line, library_versions, now

STEPS = 540
BLOCK = 135
BATCH = 100


class Loop:
    """One network in training. after: what follows the backward pass."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, kind: str, *, fused: bool) -> None:
        torch.manual_seed(0)
        self.x, self.y = x, y
        self.model = models.create("lenet300-100")
        self.optimizer = SGD(
            self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=fused
        )
        weights = [value for name, value in self.model.named_parameters() if name.endswith("weight")]
        masks = [(torch.rand_like(value) < 0.05).float() for value in weights]
        self.finish: Callable[[], object] = self.optimizer.step
        if kind == "masked":
            self.finish = lambda: self._masked_step(weights, masks)
        elif kind == "sparse":
            trainer = SparseTraining(
                self.model, self.optimizer, density=0.05, total_steps=100 * STEPS, update_every=STEPS
            )
            self.finish = trainer.step

    def _masked_step(self, weights: list[nn.Parameter], masks: list[torch.Tensor]) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                weight.mul_(mask)

    def run(self, n_steps: int) -> None:
        n_batches = len(self.y) // BATCH
        for step in range(n_steps):
            rows = torch.arange(BATCH) + BATCH * (step % n_batches)
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows])
            loss.backward()
            self.finish()


def steps(rounds: int, *, fused: bool, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per 540 steps of each loop, round by round; the blocks of a round in random order."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((5400, 1, 28, 28), generator=generator)
    y = torch.randint(0, 10, (5400,), generator=generator)
    loops = {kind: Loop(x, y, kind, fused=fused) for kind in ("dense", "masked", "sparse")}
    for loop in loops.values():
        loop.run(STEPS)
    shuffle = random.Random(seed)
    samples: dict[str, list[float]] = {kind: [] for kind in loops}
    for _ in range(rounds):
        total = dict.fromkeys(loops, 0.0)
        for _ in range(STEPS // BLOCK):
            for kind in shuffle.sample(list(loops), len(loops)):
                started = time.perf_counter()
                loops[kind].run(BLOCK)
                total[kind] += time.perf_counter() - started
        for kind, seconds in total.items():
            samples[kind].append(seconds)
    return samples


def bare_run(data_dir: Path, epochs: int) -> None:
    """The bare masked loop of the second form, on the very data."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    mnist = data.load("mnist", data_dir)
    (x, y), _ = data.split(mnist)
    loop = Loop(data.normalise(x, mnist.mean, mnist.std), y, "masked", fused=True)
    for _ in range(epochs):
        order = torch.randperm(len(y))
        for first in range(0, len(y), BATCH):
            rows = order[first : first + BATCH]
            loop.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(loop.model(loop.x[rows]), y[rows])
            loss.backward()
            loop.finish()


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of a child process. Raises when it fails."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def whole_runs(rounds: int, data_dir: Path, epochs: int = 20) -> dict[str, list[float]]:
    """CPU seconds of whole processes, in turn."""
    samples: dict[str, list[float]] = {"bare": [], "train": []}
    with tempfile.TemporaryDirectory() as folder:
        for place in range(rounds):
            out = str(Path(folder) / str(place))
            commands = {
                "bare": [sys.executable, "-m", "benchmarks.bench_training_step", "--bare", str(epochs)],
                "train": [
                    *(
                        sys.executable,
                        "-m",
                        "sparse_export",
                        "train",
                        "mnist-lenet300-100",
                        "--density",
                        "0.05",
                    ),
                    *("--epochs", str(epochs), "--out", out),
                ],
            }
            for kind, command in sorted(commands.items(), reverse=place % 2 == 1):
                samples[kind].append(cpu_seconds([*command, "--data-dir", str(data_dir)]))
    return samples


def report(samples: dict[str, list[float]], base: str) -> dict[str, Any]:
    """Print medians and the paired ratios to `base`, and return them with the raw samples."""
    rows = {}
    for kind, values in samples.items():
        ratios = [value / reference for value, reference in zip(values, samples[base], strict=True)]
        rows[kind] = {
            "median_s": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        print(
            f"{kind:8} median {rows[kind]['median_s']:8.3f} s   to {base} {rows[kind]['ratio']:.4f} "
            f"({rows[kind]['ratio_min']:.4f} to {rows[kind]['ratio_max']:.4f}, {len(values)} rounds)"
        )
    return {"base": base, "summary": rows, "samples_s": samples}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--whole-run", action="store_true")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--bare", type=int, metavar="EPOCHS", help="run the bare masked loop, time nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.bare:
        bare_run(arguments.data_dir, arguments.bare)
        return
    if arguments.whole_run:
        result = report(whole_runs(arguments.rounds, arguments.data_dir), "bare")
    else:
        result = report(steps(arguments.rounds, fused=arguments.fused), "dense")
    if arguments.json:
        facts = {
            "command": command_line(),
            "date": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
        }
        arguments.json.write_text(json.dumps(facts | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
