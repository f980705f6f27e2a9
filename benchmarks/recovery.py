"""What each step of `sparsify --recover` gives: all layers 2:4 in one shot, on the same samples, step by step.

    python -m benchmarks.recovery [--network NAME ...] [--steps STEPS ...] [--json FILE]
    python -m benchmarks.recovery --run RUN --data-dir DIR [--way NUMBER ...] [--json FILE]

Published networks have no labels here: they are held against themselves, the dense network, on inputs that no weight
was calibrated on. No step is left out where it does not help: what `--recover` would keep is told beside. RUN is a
run of `benchmarks/cifar10-resnet20.toml` or `cifar10-small-vit.toml`, dense; it is measured on its test set, also
after fine-tuning. FILE keeps the rows that are not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.public_networks import NETWORKS, cache_folder, fetch, write_inputs
from sparse_export.formats.run import Run, open_run
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import prepared, signature_of
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.paired_scores import ScoreDifference, paired_accuracy_difference
from sparse_export.models.run_network import network_of_run
from sparse_export.oneshot import sparsify
from sparse_export.oneshot.graph_pruning import PrunedGraph, sparsify_graph
from sparse_export.oneshot.graph_source import Told, graph_source
from sparse_export.oneshot.held_back import HeldBack
from sparse_export.oneshot.layers import Method
from sparse_export.oneshot.parted import parted
from sparse_export.oneshot.recovering import changed_arrays
from sparse_export.oneshot.recovery import NONE, recovery_from_text
from sparse_export.oneshot.sensitivity import change_of_outputs
from sparse_export.oneshot.switchable import SwitchableSession
from sparse_export.runtimes.outputs import output_batches
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.sparsity.pattern import pattern_from_text
from sparse_export.tasks.agreement import agreement_of
from sparse_export.tasks.inputs import read_inputs
from sparse_export.tasks.samples import BatchSamples
from sparse_export.train.batches import batch_loader
from sparse_export.train.distributed import ALONE
from sparse_export.train.recipe import recipe_from_table
from sparse_export.version import library_versions, now

__all__ = ["on_published", "on_trained"]

_PUBLISHED = {  # samples to calibrate on, as `benchmarks.how_sparse` has them, and to measure on
    "minilm": (40, 60),
    "open-nsfw": (30, 60),
    "ocr-rec": (15, 30),
    "nudenet": (20, 30),
    "ocr-cls": (100, 200),
    "magika": (100, 200),
}
_STEPS = (NONE, "streams", "bias", "variance", "damping", "auto", "damping,streams,sums,bias,variance")
_METHOD: Method = "reconstruction"
_CALIBRATION = 512
_AT_ONCE = 128
_TUNED: tuple[dict[str, Any], ...] = (
    {"recover": "auto"},
    {"recover": "auto", "calibration_samples": 2048},
    {"recover": "auto", "permute": True},
    {"recover": "auto", "norms": True},
    {"recover": "auto", "finetune": 2, "distill": "outputs"},
    {},
    {"recover": "auto", "finetune": 2},
    {"recover": "auto", "finetune": 2, "distill": "features"},
    {"recover": "auto,joint"},
    {"recover": "auto,joint", "calibration_samples": 2048},
    {"recover": "auto,joint", "finetune": 2, "distill": "features"},
)


def on_published(name: str, steps: Sequence[str], work: Path) -> Iterator[dict[str, Any]]:
    """Measure a published network.

    Args:
        name: of it.
        steps: what `--recover` takes, one after the other.
        work: an empty folder.

    Yields:
        A row for each.
    """
    network, (n, n_test) = NETWORKS[name], _PUBLISHED[name]
    calibration = write_inputs(network, work / "calibration.npz", n=n, seed=1)
    others = write_inputs(network, work / "test.npz", n=n_test, seed=2)
    told = Told(axes=network.told("--axes"), sizes=network.told("--size"), inputs=calibration)
    source = graph_source(
        str(fetch(network, cache_folder())),
        told,
        weights=None,
        input_shape=None,
        seed=0,
        trust=None,
        in_torch=False,
    )
    assert source is not None
    signature = source.signature
    batches = read_inputs(calibration, signature, n_samples=n, within=False).batches
    test = read_inputs(others, signature, n_samples=n_test, within=False).batches
    yield from _rows(name, source.model, signature, batches, test, steps)


def on_trained(
    run: Run, data_dir: Path | None, steps: Sequence[str], ways: Sequence[int], work: Path
) -> Iterator[dict[str, Any]]:
    """Measure a run of a classifier in torch: its graph on its test set, and what `sparsify` makes of it.

    Args:
        run: dense.
        data_dir: where its data lie.
        steps: what `--recover` takes, one after the other.
        ways: numbers of the calls of `sparsify` that are made then.
        work: an empty folder.

    Yields:
        A row for each of the steps, and for each way to fine-tune.
    """
    network = network_of_run(run)
    recipe = recipe_from_table(run.info.recipe, source=str(run.path))
    loader = batch_loader(recipe, data_dir, False, torch.device("cpu"), ALONE)
    model = prepared(onnx_from_module(network, example_of_shape(loader.input_shape), masks={}, fold=False))
    signature = signature_of(model)
    (name,) = signature.input_names
    order = torch.randperm(loader.info.n_train, generator=torch.Generator().manual_seed(0))[:_CALIBRATION]
    batches: list[Feeds] = []
    for x, _ in loader.training(order, _AT_ONCE, 0, 0):
        assert isinstance(x, torch.Tensor)
        batches.append({name: x.numpy()})
    test: list[Feeds] = []
    labels: list[Array] = []
    for x, y in loader.part("test", 500):
        assert isinstance(x, torch.Tensor)
        test.append({name: x.numpy()})
        labels.append(y.numpy())
    targets = np.concatenate(labels)
    called = f"{str(run.info.model.name).rpartition(':')[2]}, CIFAR-10"
    yield from _rows(called, model, signature, batches, test, steps, targets)
    before = _right(network, test, name, targets)
    for place in ways:
        options = _TUNED[place]
        began = time.process_time()
        done = sparsify(
            run.path,
            work / f"run{place}",
            method=_METHOD,
            data_dir=data_dir,
            device="cpu",
            **options,
        )
        after = _right(network_of_run(done.run), test, name, targets)
        words = " ".join(
            f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
            for key, value in options.items()
        )
        found = done.report.recovery
        yield {
            "name": called,
            "steps": f"sparsify {words}".strip(),
            "kept": None if found is None else found.kept,
            "joint": None if done.report.joint is None else asdict(done.report.joint),
            "dense": 100 * float(before.mean()),
            "accuracy": _difference(paired_accuracy_difference(before, after)),
            "cpu_seconds": round(time.process_time() - began, 1),
        }


def _right(network: torch.nn.Module, test: Sequence[Feeds], name: str, targets: Array) -> Array:
    network = network.eval()
    with torch.no_grad():
        found = [network(torch.from_numpy(feeds[name])).argmax(1).numpy() for feeds in test]
    right: Array = np.concatenate(found) == targets
    return right


def _rows(
    name: str,
    model: onnx.ModelProto,
    signature: Signature,
    batches: Sequence[Feeds],
    test: Sequence[Feeds],
    steps: Sequence[str],
    targets: Array | None = None,
) -> Iterator[dict[str, Any]]:
    for text in steps:
        began = time.process_time()
        pruned = sparsify_graph(
            model,
            signature=signature,
            batches=batches,
            pattern=pattern_from_text("2:4"),
            method=_METHOD,
            recovery=recovery_from_text(text),
            n_threads=1,
        )
        used = time.process_time() - began
        yield {
            "name": name,
            "steps": text,
            "n_calibration": pruned.n_calibration,
            "n_layers": len(pruned.masks),
            "n_biases": len({one for beside in pruned.beside.values() for one in beside}),
            "cpu_seconds": round(used, 1),
        } | _measured(model, pruned, signature, test, targets)


def _measured(
    model: onnx.ModelProto,
    pruned: PrunedGraph,
    signature: Signature,
    test: Sequence[Feeds],
    targets: Array | None,
) -> dict[str, Any]:
    samples = BatchSamples(parts=tuple(test), signature=signature)
    held = HeldBack(samples=samples, targets=None, task=None, words="test samples")
    graph = parted(model)
    dense, sparse = changed_arrays(pruned, graph), changed_arrays(pruned, pruned.graph)
    with SwitchableSession(graph, signature, dense, n_values=samples.n_values, n_threads=1) as session:
        values = session.values(sparse)
        change = change_of_outputs(session, held, {"sparse": values})["sparse"]
        session.use({})
        before = [one for _, one in output_batches(session, samples, who="The dense network")]
        session.use(values)
        after = [one for _, one in output_batches(session, samples, who="The sparse network")]
    pairs = list(zip(before, after, strict=True))
    found: dict[str, Any] = {"n_test": len(samples), "change": change}
    agreed = agreement_of(pairs, signature, inputs="")
    found["agreement"] = {"percent": agreed.percent, "low": agreed.low, "high": agreed.high}
    if signature.n_classes is not None:
        (output,) = signature.output_names
        classes = [np.concatenate([one[output].argmax(1) for one in side]) for side in (before, after)]
        same = classes[0] == classes[1]
        found["classes"] = _difference(paired_accuracy_difference(np.ones_like(same), same))
        if targets is not None:
            right = [one == targets for one in classes]
            found["dense"] = 100 * float(right[0].mean())
            found["accuracy"] = _difference(paired_accuracy_difference(*right))
    return found


def _difference(found: ScoreDifference) -> dict[str, Any]:
    return {"n": found.n_samples, "points": found.amount, "low": found.low, "high": found.high}


def _line(row: Mapping[str, Any]) -> str:
    parts = [f"{row['name']}, {row['steps']}:"]
    if "change" in row:
        agreed = row["agreement"]
        parts.append(f"change {row['change']:.4f}, agreement {agreed['percent']:.2f} %")
        parts.append(f"[{agreed['low']:.2f}, {agreed['high']:.2f}]")
    for key in ("classes", "accuracy"):
        if key in row:
            one = row[key]
            parts.append(f"{key} {one['points']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]")
    return " ".join([*parts, f"{row['cpu_seconds']} CPU s"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line for each row, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", action="append", choices=[*_PUBLISHED])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--steps", action="append")
    parser.add_argument("--way", action="append", type=int, choices=range(len(_TUNED)))
    parser.add_argument("--json", type=Path)
    words = parser.parse_args(arguments)
    rows: dict[tuple[str, str], Any] = {}
    if words.json and words.json.is_file():
        rows = {(one["name"], one["steps"]): one for one in json.loads(words.json.read_text())["rows"]}
    steps = words.steps or _STEPS
    ways = range(len(_TUNED)) if words.way is None else words.way

    def all_rows() -> Iterator[dict[str, Any]]:
        names = words.network or ([] if words.run else [*_PUBLISHED])
        for name in names:
            with tempfile.TemporaryDirectory() as work:
                yield from on_published(name, steps, Path(work))
        if words.run:
            with tempfile.TemporaryDirectory() as work:
                yield from on_trained(open_run(words.run), words.data_dir, steps, ways, Path(work))

    for row in all_rows():
        rows[row["name"], row["steps"]] = row
        print(_line(row), flush=True)
        if words.json:
            document = {
                "created": now(),
                "command": "python -m benchmarks.recovery",
                "machine": machine_facts(),
                "versions": library_versions(),
                "method": _METHOD,
                "rows": list(rows.values()),
            }
            words.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
