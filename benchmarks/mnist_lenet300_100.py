"""Accuracy of `lenet300-100` on MNIST by density, start and seed: what README's table is made from.

    python -m benchmarks.mnist_lenet300_100 --data-dir DIR --json FILE [--seeds 0,1,2] [--epochs 20] [--jobs
    2]

Every figure is a `sparse-export train mnist-lenet300-100` of its own, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparse_export.instruments.machine import machine_facts
from sparse_export.version import command_line, library_versions, now

SETTINGS: dict[str, list[str]] = {
    "dense": ["--dense"],
    **{f"{density} default": ["--density", density] for density in ("0.05", "0.02", "0.01")},
    **{
        f"{density} reference": ["--density", density, "--preset", "reference"]
        for density in ("0.05", "0.02", "0.01")
    },
}


def train(setting: str, seed: int, epochs: int, data_dir: Path) -> dict[str, Any]:
    """One run's `--json` document."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "sparse_export", "train", "mnist-lenet300-100", *SETTINGS[setting]),
            *("--seed", str(seed), "--epochs", str(epochs), "--data-dir", str(data_dir)),
            *("--out", f"{folder}/run", "--json"),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document | {"setting": setting}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [
            pool.submit(train, setting, seed, arguments.epochs, arguments.data_dir)
            for setting in SETTINGS
            for seed in seeds
        ]
        runs = [future.result() for future in futures]
    for setting in SETTINGS:
        rows = [run for run in runs if run["setting"] == setting]
        accuracies = [row["test_score"] for row in rows]
        print(
            f"{setting:16} {rows[0]['n_active']:>8,} weights  test {statistics.mean(accuracies):.2f} % "
            f"({', '.join(f'{value:.2f}' for value in accuracies)})  "
            f"validation {statistics.mean(row['validation_accuracy'] for row in rows):.2f} %  "
            f"{statistics.mean(row['seconds'] for row in rows):.1f} s"
        )
    facts = {
        "command": command_line(),
        "date": now(),
        "machine": machine_facts(),
        "versions": library_versions(),
    }
    for run in runs:
        del run["run"]
    arguments.json.write_text(json.dumps(facts | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
