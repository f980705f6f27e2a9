"""Search channel orders for 2:4 of the matrices that orders are compared on, and of runs' layers.

    python -m benchmarks.bench_permutation [--matrix NAME]... [--size N]... [--rounds N]... [--seed N]
                                           [--run RUN...] [--json FILE]

The matrices, each N x N from generator 1000 + N: `gauss`; `heavy`, columns scaled by exp(gauss); `heavysort`,
the same in rising order of scale; `unstr80`, scaled by exp(gauss / 2) and the smallest 80 % zero. Printed is
the share of sum |w| that 2:4 keeps before and after; `rows50` keeps the larger half of each row wherever it
lies, which no order can pass; efficacy is the part of the way from before to rows50. The CPU time is that of
the process, the search being single-threaded.

Of a run, both objectives are tried on each masked layer whose reduction axis 4 divides.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import scipy
import scipy.optimize  # loaded before the clock runs
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from sparse_export.instruments.machine import machine_facts
from sparse_export.sparsity.pattern import NMPattern, fits, groups_over
from sparse_export.sparsity.permute import DEFAULT_ROUNDS, Objective, find_permutation
from sparse_export.version import library_versions, now

PATTERN = NMPattern(n=2, m=4)
SIZES = (256, 512, 1024)


def gauss(n: int) -> NDArray[np.float64]:
    return np.random.default_rng(1000 + n).standard_normal((n, n))


def heavy(n: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(1000 + n)
    scale = np.exp(rng.standard_normal(n))
    return np.multiply(rng.standard_normal((n, n)), scale)


def heavysort(n: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(1000 + n)
    scale: NDArray[np.float64] = np.sort(np.exp(rng.standard_normal(n)))
    return np.multiply(rng.standard_normal((n, n)), scale)


def unstr80(n: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(1000 + n)
    scale = np.exp(0.5 * rng.standard_normal(n))
    weight = rng.standard_normal((n, n)) * scale
    weight.reshape(-1)[np.abs(weight).ravel().argsort()[: int(0.8 * n * n)]] = 0
    return weight


MATRICES: dict[str, Callable[[int], NDArray[np.float64]]] = {
    "gauss": gauss,
    "heavy": heavy,
    "heavysort": heavysort,
    "unstr80": unstr80,
}


@dataclass(frozen=True, kw_only=True)
class SearchedMatrix:
    """before, after, rows50: shares of sum |w| that are kept."""

    matrix: str
    n: int
    rounds: int
    seed: int
    before: float
    after: float
    rows50: float
    cpu_s: float
    wall_s: float

    @property
    def efficacy(self) -> float:
        """The part of the way from before to rows50 that was gone; 1 where there was none to go."""
        way = self.rows50 - self.before
        return (self.after - self.before) / way if way else 1.0


@dataclass(frozen=True, kw_only=True)
class SearchedLayer:
    """kept_*: share of sum |w| that 2:4 keeps; over_*: groups with more than 2 nonzeros, of n_groups."""

    run: str
    layer: str
    rows: int
    columns: int
    density: float
    objective: Objective
    rounds: int
    n_groups: int
    over_before: int
    over_after: int
    kept_before: float
    kept_after: float
    cpu_s: float


def kept_share(weight_OI: Tensor, pattern: NMPattern = PATTERN) -> float:
    """The share of sum |w| that is left when each group keeps its N largest."""
    magnitude = weight_OI.abs().double()
    kept = magnitude.view(-1, pattern.m).topk(pattern.n, dim=1).values.sum()
    return float(kept / magnitude.sum())


def measure(matrix: str, n: int, rounds: int, seed: int) -> SearchedMatrix:
    weight = torch.from_numpy(MATRICES[matrix](n)).float()
    cpu, wall = time.process_time(), time.perf_counter()
    order = find_permutation(weight, PATTERN, seed=seed, rounds=rounds)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    return SearchedMatrix(
        matrix=matrix,
        n=n,
        rounds=rounds,
        seed=seed,
        before=kept_share(weight),
        after=kept_share(weight[:, order]),
        rows50=kept_share(weight, NMPattern(n=n // 2, m=n)),
        cpu_s=cpu_s,
        wall_s=wall_s,
    )


def measure_run(run: Path, seed: int) -> list[SearchedLayer]:
    """Every masked layer with input channels in whole groups, by both objectives."""
    weights, masks = load_file(run / "model.safetensors"), load_file(run / "masks.safetensors")
    found: list[SearchedLayer] = []
    for name, mask in masks.items():
        weight = (weights[name] * mask).float().movedim(1, -1).flatten(0, -2)
        if not fits(tuple(weight.shape), 1, PATTERN):
            continue
        for objective in get_args(Objective):
            cpu = time.process_time()
            order = find_permutation(weight, PATTERN, seed=seed, objective=objective)
            cpu_s = time.process_time() - cpu
            found.append(
                SearchedLayer(
                    run=run.name,
                    layer=name,
                    rows=weight.shape[0],
                    columns=weight.shape[1],
                    density=float((weight != 0).double().mean()),
                    objective=objective,
                    rounds=DEFAULT_ROUNDS[objective],
                    n_groups=weight.numel() // PATTERN.m,
                    over_before=int(groups_over(weight, 1, PATTERN)),
                    over_after=int(groups_over(weight[:, order], 1, PATTERN)),
                    kept_before=kept_share(weight),
                    kept_after=kept_share(weight[:, order]),
                    cpu_s=cpu_s,
                )
            )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Search channel orders for 2:4.")
    parser.add_argument("--matrix", action="append", choices=list(MATRICES), help="repeatable (default: all)")
    parser.add_argument(
        "--size",
        action="append",
        type=int,
        metavar="N",
        help="a multiple of 4; repeatable (default: 256, 512, 1024)",
    )
    parser.add_argument(
        "--rounds", action="append", type=int, metavar="N", help="repeatable (default: the search's own)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--run", nargs="+", type=Path, metavar="RUN", help="folders that `train` wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the machine's facts")
    options = parser.parse_args(arguments)
    for size in options.size or ():
        if size < 4 or size % 4:
            parser.error(f"--size is {size}; a multiple of 4 was expected.")

    facts = {
        "date": now(),
        "machine": machine_facts(),
        "versions": library_versions() | {"scipy": scipy.__version__},
    }
    matrices: list[SearchedMatrix] = []
    layers: list[SearchedLayer] = []
    print("matrix        n  rounds  before   after  rows50  efficacy   CPU s  wall s")
    for name in options.matrix or MATRICES:
        for size in options.size or SIZES:
            for rounds in options.rounds or (DEFAULT_ROUNDS["magnitude"],):
                row = measure(name, size, rounds, options.seed)
                matrices.append(row)
                print(
                    f"{name:<10} {size:>4} {rounds:>7}  {row.before:.4f}  {row.after:.4f}  {row.rows50:.4f}"
                    f"  {row.efficacy:>8.3f} {row.cpu_s:>7.2f} {row.wall_s:>7.2f}",
                    flush=True,
                )
    if options.run:
        print(
            "run   layer          rows  columns  density  objective  over before  after  kept before   after "
            " CPU s"
        )
        for run in options.run:
            for layer in measure_run(run, options.seed):
                layers.append(layer)
                print(
                    f"{layer.run:<5} {layer.layer:<12} {layer.rows:>6} {layer.columns:>8} "
                    f"{layer.density:>8.3f}"
                    f"  {layer.objective:<9} {layer.over_before:>12} {layer.over_after:>6}"
                    f" {layer.kept_before:>12.4f} {layer.kept_after:>7.4f} {layer.cpu_s:>6.2f}"
                )
    if options.json:
        document = {
            "matrices": [asdict(row) | {"efficacy": row.efficacy} for row in matrices],
            "layers": [asdict(layer) for layer in layers],
        } | facts
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
