"""Accuracy of one recipe dense, by ASP, by SR-STE and by sparse momentum under 2:4, along one axis and along
both: the tables in docs/results.md.

    python -m benchmarks.pattern_accuracy RECIPE --data-dir DIR --json FILE
                                          [--seeds 0,1,2,3,4] [--epochs 20] [--jobs 2] [--work DIR] [--setting
                                          NAME]...

Every figure is a `sparse-export train` of its own, in a process of its own; all have the same number of
steps, the dense phase of ASP counted. Differences to the dense twin are paired by seed, since weights and the
order of samples start alike; their intervals are Student's t over the seeds. --work keeps finished runs,
which are not run again.
--setting, once for each, trains those alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from sparse_export.formats.run import open_run, read_run_info
from sparse_export.instruments.machine import machine_facts
from sparse_export.version import command_line, library_versions, now

SETTINGS: dict[str, list[str]] = {
    "dense": ["--dense"],
    "asp 2:4": ["--pattern", "2:4", "--method", "asp"],
    "sr-ste 2:4": ["--pattern", "2:4", "--method", "sr-ste"],
    "sparse momentum 2:4": ["--pattern", "2:4"],
    "sparse momentum 2:4 along both axes": ["--pattern", "2:4", "--transposable"],
    "asp 2:4 along both axes": ["--pattern", "2:4", "--transposable", "--method", "asp"],
    "sparse momentum 2:4, density .2": ["--pattern", "2:4", "--density", "0.2"],
    "sparse momentum 2:4, density .1": ["--pattern", "2:4", "--density", "0.1"],
}
PAIRS = [
    *((name, "dense") for name in SETTINGS if name != "dense"),
    ("sparse momentum 2:4", "asp 2:4"),
    ("sparse momentum 2:4", "sr-ste 2:4"),
    ("sparse momentum 2:4 along both axes", "sparse momentum 2:4"),
    ("asp 2:4 along both axes", "asp 2:4"),
]


def train(recipe: str, setting: str, seed: int, epochs: int, data_dir: Path, work: Path) -> dict[str, Any]:
    """One run's facts, trained unless it is there already."""
    out = work / f"{setting.replace(' ', '-').replace(':', 'of').replace(',', '')}-{seed}"
    finished = (out / "run.json").is_file() and read_run_info(out).status == "complete"
    resume = (out / "run.json").is_file()
    command = [sys.executable, "-m", "sparse_export", "train", "--data-dir", str(data_dir), "--out", str(out)]
    command += (
        ["--resume"] if resume else [recipe, *SETTINGS[setting], "--seed", str(seed), "--epochs", str(epochs)]
    )
    if not finished:
        subprocess.run(command, check=True, capture_output=True, text=True)
    info = open_run(out).info
    if info.test is None or info.validation is None:
        raise SystemExit(f"{out} was trained without a test or a validation part; {recipe} needs both.")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "setting": setting,
        "seed": seed,
        "test_percent": info.test.figure,
        "validation_score": info.validation.figure,
        "n_active": info.n_active,
        "n_masked": info.n_masked,
        "layers": {layer.name: layer.density for layer in info.layers},
        "steps": info.n_steps,
        "flip_rates": [line["flip_rate"] for line in lines],
        "seconds": info.seconds,
    }


def difference(
    runs: Mapping[tuple[str, int], dict[str, Any]], one: str, other: str, seeds: list[int]
) -> dict[str, Any]:
    """Test points of `one` less those of `other`: mean, two-sided 95 % interval, lower end of the one-sided
    one.
    """
    points = [runs[one, seed]["test_percent"] - runs[other, seed]["test_percent"] for seed in seeds]
    mean = statistics.mean(points)
    error = statistics.stdev(points) / math.sqrt(len(points))
    two_sided, one_sided = (float(student.ppf(share, len(points) - 1)) * error for share in (0.975, 0.95))
    return {
        "one": one,
        "other": other,
        "mean": mean,
        "low": mean - two_sided,
        "high": mean + two_sided,
        "one_sided_low": mean - one_sided,
        "points": points,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--setting", choices=list(SETTINGS), action="append")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if len(seeds) < 2:
        parser.error("an interval needs two seeds at least")
    settings = arguments.setting or list(SETTINGS)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        work = arguments.work or Path(folder)
        futures = {
            (setting, seed): pool.submit(
                train, arguments.recipe, setting, seed, arguments.epochs, arguments.data_dir, work
            )
            for seed in seeds
            for setting in settings
        }
        runs = {key: future.result() for key, future in futures.items()}
    for setting in settings:
        rows = [runs[setting, seed] for seed in seeds]
        tests = [row["test_percent"] for row in rows]
        print(
            f"{setting:36} {rows[0]['n_active']:>9,} of {rows[0]['n_masked']:,}  "
            f"test {statistics.mean(tests):.3f} % ({', '.join(f'{value:.2f}' for value in tests)})  "
            f"validation {statistics.mean(row['validation_score'] for row in rows):.3f} %"
        )
    differences = [
        difference(runs, one, other, seeds) for one, other in PAIRS if one in settings and other in settings
    ]
    for found in differences:
        print(
            f"{found['one']} - {found['other']}: {found['mean']:+.3f} [{found['low']:+.3f}, "
            f"{found['high']:+.3f}], "
            f"one-sided from {found['one_sided_low']:+.3f}"
        )
    document = {
        "command": command_line(),
        "date": now(),
        "machine": machine_facts(),
        "versions": library_versions(),
        "recipe": arguments.recipe,
        "epochs": arguments.epochs,
        "runs": list(runs.values()),
        "differences": differences,
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
