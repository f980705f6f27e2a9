"""Train, compact and time the LeNets: how much of a sparse network goes with its dead channels, and what that
gains.

    python -m benchmarks.bench_compact --data-dir DIR [--work DIR] [--rounds N] [--batch SIZES] [--case
    NAME]... [--json FILE]

Each step is a command of the command line, run in a process of its own: `train`, `build --compact`, `build`
of the dense twin, `compare`. Runs and bundles that lie in the work folder already are used again. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.instruments.machine import machine_facts
from sparse_export.version import library_versions, now


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sparse run to be compacted and held against its dense twin."""

    recipe: str
    density: float
    preset: str
    epochs: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.density:g}-{self.preset}"


CASES = (
    Case(recipe="mnist-lenet300-100", density=0.05, preset="reference", epochs=20),
    Case(recipe="mnist-lenet300-100", density=0.01, preset="reference", epochs=20),
    Case(recipe="mnist-lenet5", density=0.05, preset="reference", epochs=5),
    Case(recipe="mnist-lenet5", density=0.05, preset="default", epochs=5),
    Case(recipe="mnist-lenet300-100", density=0.05, preset="default", epochs=20),
    Case(recipe="mnist-lenet300-100", density=0.01, preset="default", epochs=20),
    Case(recipe="mnist-lenet300-100", density=0.05, preset="compact", epochs=20),
    Case(recipe="mnist-lenet300-100", density=0.01, preset="compact", epochs=20),
    Case(recipe="mnist-lenet5", density=0.05, preset="compact", epochs=5),
)


class Commands:
    """Runs the command line and notes what was run."""

    def __init__(self, work: Path, data_dir: Path) -> None:
        self.work = work
        self.data_dir = data_dir
        self.ran: list[list[str]] = []

    def run(self, *words: str) -> dict[str, Any]:
        self.ran.append(["sparse-export", *words])
        done = subprocess.run(
            [sys.executable, "-m", "sparse_export", *words, "--json"],
            check=True,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def train(self, recipe: str, name: str, epochs: int, *options: str) -> Path:
        run = self.work / name
        if not (run / "run.json").is_file():
            data = ("--data-dir", str(self.data_dir))
            self.run("train", recipe, *options, "--epochs", str(epochs), *data, "--out", str(run))
        else:
            words = json.loads((run / "run.json").read_bytes())["command"]
            named = {"--out": "WORK/" + name, "--data-dir": "DIR"}
            self.ran.append(
                [named.get(before, word) for before, word in zip(["", *words], words, strict=False)]
            )
        return run


def measure(commands: Commands, case: Case, rounds: int, batches: str) -> dict[str, Any]:
    """Everything about one case: what went, and the whole comparison with its raw samples."""
    work = commands.work
    name = case.name
    sparse = commands.train(
        case.recipe, name, case.epochs, "--preset", case.preset, "--density", f"{case.density:g}"
    )
    dense = commands.train(case.recipe, f"{case.recipe}-dense", case.epochs, "--dense")
    bundles = work / f"{name}-bundle", work / f"{case.recipe}-dense-bundle"
    built = commands.run("build", str(sparse), "--compact", "--out", str(bundles[0]))
    commands.run("build", str(dense), "--out", str(bundles[1]))
    validated = commands.run(
        "validate", str(bundles[0]), "--data-dir", str(commands.data_dir), "--threads", "1"
    )
    compared = commands.run(
        "compare",
        str(bundles[1]),
        str(bundles[0]),
        "--batch",
        batches,
        "--rounds",
        str(rounds),
        "--threads",
        "1",
        "--data-dir",
        str(commands.data_dir),
    )
    return {
        "case": vars(case),
        "compacted": built["manifest"]["compacted"],
        "parity": validated["parity"],
        "comparison": compared,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train, compact and time the LeNets.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the data sets lie")
    parser.add_argument("--work", type=Path, help="folder of runs and bundles (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=24, metavar="N", help="of compare (default: 24)")
    parser.add_argument("--batch", default="1,32,256", metavar="SIZES", help="of compare (default: 1,32,256)")
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only this one (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the machine's facts")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(options.work or Path(folder), options.data_dir)
        cases = [case for case in CASES if not options.case or case.name in options.case]
        results = [measure(commands, case, options.rounds, options.batch) for case in cases]
    for result in results:
        case, fact = result["case"], result["compacted"]
        share = fact["n_weights_after"] / fact["n_weights_before"]
        accuracy = result["comparison"]["sparse"]["score"]
        print(
            f"{case['recipe']} {case['density']:g} {case['preset']}, {case['epochs']} epochs: {share:.4f} of "
            "the parameters, "
            f"{accuracy['n_correct']}/{accuracy['n_samples']} right"
        )
        for at in result["comparison"]["latency"]:
            ratio = at["ratio"]
            print(
                f"  batch {at['batch']:>3}: {ratio['estimate']:.3f}x [{ratio['low']:.3f}, "
                f"{ratio['high']:.3f}]"
            )
        for layer in fact["layers"]:
            print(f"  {layer['weight']:<14}{layer['before']} -> {layer['after']}  {layer['why']}")
    if options.json:
        document = {
            "results": results,
            "commands": commands.ran,
            "date": now(),
            "machine": machine_facts(),
            "versions": library_versions(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1).replace(str(commands.work), "WORK")
        options.json.write_text(text.replace(str(commands.data_dir), "DIR") + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
