"""How sparse networks can be for half a point: `sparsify --max-drop 0.5` on published and on trained networks.

    python -m benchmarks.how_sparse [--network NAME ...] [--max-drop AMOUNT] [--recover STEPS] [--data-dir DIR]
        [--json FILE]

Published networks have no labels here: they are held against themselves, the dense network, by the classes that
they give where they are classifiers, else by the agreement of their outputs. What was chosen is then measured on
samples that it never saw. Each runs in a process of its own, for its peak of memory. FILE keeps the rows of
networks that are not measured again.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.public_networks import NETWORKS, cache_folder, fetch, write_inputs
from sparse_export.errors import GateFailed
from sparse_export.formats.run import open_run
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.paired_scores import ScoreDifference, paired_accuracy_difference
from sparse_export.oneshot import Sparsified, sparsify
from sparse_export.oneshot.choice import Choice
from sparse_export.oneshot.recovery import NONE
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.outputs import output_batches
from sparse_export.tasks.agreement import agreement_of
from sparse_export.tasks.inputs import read_inputs
from sparse_export.tasks.samples import BatchSamples
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe
from sparse_export.version import library_versions, now

__all__ = ["measured"]


@dataclass(frozen=True, kw_only=True)
class _Published:
    """How a published network is asked. n: inputs to calibrate and choose on; n_test: to measure on."""

    n: int
    n_test: int
    is_classifier: bool = False


_PUBLISHED = {
    "magika": _Published(n=200, n_test=200, is_classifier=True),
    "minilm": _Published(n=80, n_test=60),
    "nudenet": _Published(n=40, n_test=30),
    "open-nsfw": _Published(n=60, n_test=60, is_classifier=True),
    "ocr-rec": _Published(n=30, n_test=30),
    "ocr-cls": _Published(n=200, n_test=200, is_classifier=True),
}
_TRAINED = {
    "digits-cnn, digits": ("digits", 15),
    "LeNet-300-100, MNIST": ("mnist-lenet300-100", 2),
    "LeNet-5, MNIST": ("mnist-lenet5", 2),
    "LeNet-300-100, Fashion-MNIST": ("fashion-mnist-lenet300-100", 3),
}
_METHOD = "reconstruction"


def measured(
    name: str, max_drop: str, data_dir: Path | None, work: Path, recover: str = NONE
) -> dict[str, Any]:
    """The row of one network.

    Args:
        name: of it.
        max_drop: as `--max-drop` takes it.
        data_dir: where MNIST and Fashion-MNIST lie.
        work: an empty folder.
        recover: as `--recover` takes it.
    """
    row: dict[str, Any] = {"name": name, "max_drop": max_drop, "method": _METHOD, "recover": recover}
    if name in _TRAINED:
        recipe, epochs = _TRAINED[name]
        run = train(
            load_recipe(recipe, changes={"dense": True, "epochs": epochs}),
            work / "run",
            data_dir=data_dir,
            device="cpu",
        )
    began, cpu = time.monotonic(), _cpu_seconds()
    try:
        if name in _TRAINED:
            done = sparsify(
                run.path,
                work / "sparse",
                method=_METHOD,
                max_drop=max_drop,
                data_dir=data_dir,
                device="cpu",
                recover=recover,
            )
        else:
            done = _published(name, max_drop, recover, work)
    except GateFailed as cause:
        return row | {"failed": cause.what}
    choice = done.report.choice
    assert choice is not None
    row |= {
        "cpu_seconds": round(_cpu_seconds() - cpu, 1),
        "seconds": round(time.monotonic() - began, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    on_test = _difference(choice.test) if choice.test is not None else _on_new_inputs(name, work)
    found = done.report.recovery
    row["recovery"] = None if found is None else asdict(found)
    return row | _chosen(choice) | {"n_calibration": done.report.n_calibration, "test": on_test}


def _published(name: str, max_drop: str, recover: str, work: Path) -> Sparsified:
    network, how = NETWORKS[name], _PUBLISHED[name]
    return sparsify(
        fetch(network, cache_folder()),
        work / "sparse",
        method=_METHOD,
        max_drop=max_drop,
        task="classification" if how.is_classifier else None,
        inputs=write_inputs(network, work / "inputs.npz", n=how.n, seed=1),
        axes=network.told("--axes"),
        sizes=network.told("--size"),
        recover=recover,
    )


def _chosen(choice: Choice) -> dict[str, Any]:
    return {
        "share": choice.share,
        "share_of_all": choice.share_of_all,
        "of": choice.saving,
        "n_sparse": sum(bool(one.sparse) for one in choice.layers),
        "n_layers": len(choice.layers),
        "score": choice.dense.name,
        "held_back": {
            "n": choice.dense.n_samples,
            "dense": choice.dense.figure,
            "sparse": choice.sparse.figure,
            "all_sparse": next((p.score for p in choice.curve if p.n_layers == len(choice.layers)), None),
        },
        "weights": choice.weights,
        "n_scores": round(choice.n_scores, 1),
        "curve": [[round(point.share, 4), point.n_layers, point.score] for point in choice.curve],
    }


def _difference(found: ScoreDifference) -> dict[str, Any]:
    return {"n": found.n_samples, "points": found.amount, "low": found.low, "high": found.high}


def _on_new_inputs(name: str, work: Path) -> dict[str, Any]:
    """The sparse network against the dense one on inputs of another seed."""
    how = _PUBLISHED[name]
    inputs = write_inputs(NETWORKS[name], work / "test.npz", n=how.n_test, seed=2)
    runs = [open_run(work / one) for one in ("sparse-dense", "sparse")]
    signature = runs[1].info.signature
    samples = BatchSamples(
        parts=read_inputs(inputs, signature, n_samples=how.n_test, within=False).batches, signature=signature
    )
    with (
        open_session(runs[0].graph_path, signature=signature) as dense,
        open_session(runs[1].graph_path, signature=signature) as sparse,
    ):
        pairs = [
            (a, b)
            for (_, a), (_, b) in zip(
                output_batches(dense, samples), output_batches(sparse, samples), strict=True
            )
        ]
    if how.is_classifier:
        (output,) = signature.output_names
        same = np.concatenate([a[output].argmax(1) == b[output].argmax(1) for a, b in pairs])
        return _difference(paired_accuracy_difference(np.ones_like(same), same))
    found = agreement_of(pairs, signature, inputs="")
    return {
        "n": found.n_samples,
        "points": found.percent - 100,
        "low": found.low - 100,
        "high": found.high - 100,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _in_child(name: str, words: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.how_sparse", "--one", name, "--max-drop", words.max_drop]
    command += ["--recover", words.recover]
    command += ["--data-dir", str(words.data_dir)] if words.data_dir else []
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line for each network, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", action="append", choices=[*_PUBLISHED, *_TRAINED])
    parser.add_argument("--max-drop", default="0.5")
    parser.add_argument("--recover", default=NONE)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    words = parser.parse_args(arguments)
    if words.one:
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(measured(words.one, words.max_drop, words.data_dir, Path(work), words.recover)))
        return
    rows: dict[str, Any] = {}
    if words.json and words.json.is_file():
        rows = {one["name"]: one for one in json.loads(words.json.read_text())["networks"]}
    for name in words.network or [*_PUBLISHED, *_TRAINED]:
        row = rows[name] = _in_child(name, words)
        print(
            f"{name}: {row['failed']}"
            if "failed" in row
            else f"{name}: {100 * row['share']:.1f} % of multiply-adds, test {row['test']['points']:.2f} points "
            f"[{row['test']['low']:.2f}, {row['test']['high']:.2f}], {row['cpu_seconds']} CPU s",
            flush=True,
        )
        if words.json:
            document = {
                "created": now(),
                "command": "python -m benchmarks.how_sparse",
                "machine": machine_facts(),
                "versions": library_versions(),
                "networks": list(rows.values()),
            }
            words.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
