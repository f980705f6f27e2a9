"""Make trained networks 2:4 by every method, with and without an order of channels, and fine-tune them.

    python -m benchmarks.bench_sparsify --data-dir DIR [--work DIR] [--seeds N] [--case NAME]... [--json FILE]

Dense networks are trained first. What lies in the work folder already, networks and results, is used again.
Each seed is that of a dense network and of what is drawn for it. Shares of the sum of |w| are over the layers
that become 2:4; accuracies are of the test set. A network with batch norms is pruned with and without
re-estimating them, and not fine-tuned.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from sparse_export.files import write_json
from sparse_export.formats.run import RUN_FILE
from sparse_export.instruments.machine import machine_facts
from sparse_export.oneshot import SparsifyReport, sparsify
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe
from sparse_export.version import library_versions, now

METHODS = ("magnitude", "activation", "reconstruction")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dense network to be trained, and how it is then pruned."""

    name: str
    model: str
    data: str
    epochs: int
    finetune: int
    options: tuple[str, ...]


CASES = (
    Case(name="mnist", model="lenet300-100", data="mnist", epochs=20, finetune=2, options=("permute",)),
    Case(
        name="fashion-mnist",
        model="lenet300-100",
        data="fashion-mnist",
        epochs=20,
        finetune=2,
        options=("permute",),
    ),
    Case(
        name="fashion-mnist-norms",
        model="benchmarks.sparsify_networks:norms_cnn",
        data="fashion-mnist",
        epochs=4,
        finetune=0,
        options=("norms",),
    ),
)


def dense_run(case: Case, seed: int, work: Path, data_dir: Path) -> Path:
    run = work / f"{case.name}-dense-{seed}"
    if not (run / RUN_FILE).is_file():
        changes = {
            "model": case.model,
            "data": case.data,
            "epochs": case.epochs,
            "seed": seed,
            "dense": True,
        }
        train(load_recipe("mnist-lenet300-100", changes=changes), run, data_dir=data_dir, device="cpu")
    return run


def measured(case: Case, seed: int, work: Path, data_dir: Path) -> Iterator[dict[str, Any]]:
    """A dense network's results, method by method."""
    dense = dense_run(case, seed, work, data_dir)
    for method, on in product(METHODS, product((False, True), repeat=len(case.options))):
        options = dict(zip(case.options, on, strict=True))
        name = "-".join([case.name, str(seed), method, *(key for key, is_on in options.items() if is_on)])
        file = work / f"{name}.json"
        if file.is_file():
            yield json.loads(file.read_bytes())
            continue
        with tempfile.TemporaryDirectory(dir=work) as folder:
            began = time.process_time()
            done = sparsify(
                dense,
                Path(folder) / "run",
                method=method,
                permute=options.get("permute", False),
                norms=options.get("norms", False),
                finetune=case.finetune,
                data_dir=data_dir,
                seed=seed,
                device="cpu",
            )
        result = {
            "case": case.name,
            "seed": seed,
            "options": options,
            "cpu_seconds": time.process_time() - began,
            "report": _without_paths(done.report),
        }
        write_json(file, result)
        yield result


def _without_paths(report: SparsifyReport) -> dict[str, Any]:
    return asdict(report) | {"weights": {"from": "run", "sha256": report.weights["sha256"]}}


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, with each seed's figure behind."""
    lines = []
    keys = dict.fromkeys((r["case"], r["report"]["method"], *r["options"].items()) for r in results)
    for key in keys:
        these = [r for r in results if (r["case"], r["report"]["method"], *r["options"].items()) == key]
        case, method, *options = key
        on = "+".join(name for name, is_on in options if is_on) or "-"
        lines.append(f"{case:<20} {method:<15} {on:<14} {_figures(these)}")
    return "\n".join(lines)


def _figures(these: list[dict[str, Any]]) -> str:
    reports = [result["report"] for result in these]
    parts = [f"kept {statistics.mean(report['kept_share'] for report in reports):.4f}"]
    for index, stage in enumerate(reports[0]["stages"]):
        accuracies = [report["stages"][index]["test"] for report in reports]
        percents = [100 * found["n_correct"] / found["n_samples"] for found in accuracies]
        each = ", ".join(f"{percent:.2f}" for percent in percents)
        parts.append(f"{stage['name']} {statistics.mean(percents):.2f} ({each})")
    return "  ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make trained networks 2:4 by every method.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the data sets lie")
    parser.add_argument("--work", type=Path, help="folder of dense runs (default: a temporary one)")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="networks of each kind (default: 3)"
    )
    parser.add_argument(
        "--case", action="append", choices=[case.name for case in CASES], help="which (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and the machine's facts")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        chosen = [case for case in CASES if case.name in (options.case or [case.name])]
        for case, seed in product(chosen, range(options.seeds)):
            for result in measured(case, seed, work, options.data_dir):
                results.append(result)
                print(table([result]), flush=True)
    print("\n" + table(results))
    if options.json:
        document = {
            "results": results,
            "cases": [asdict(case) for case in chosen],
            "date": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
