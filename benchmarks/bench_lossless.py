"""Train without a pattern, then make 2:4 what can be without loss: which layers, what a Gather costs, what a
late cap adds.

    python -m benchmarks.bench_lossless --data-dir DIR [--work DIR] [--only NAME ...] [--json FILE]

Runs are trained and bundles built by the command line, one thread each; runs that lie in the work folder are
used again. The network for CIFAR-10 sees the first 8,000 training and 2,000 test images and few epochs, the
small ViT one epoch of MNIST: they show how far the road carries, not how well such networks can be trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.bench_compact import Commands
from sparse_export.formats.run import open_run
from sparse_export.graph.passes.fit_pattern import Gather, fit_pattern
from sparse_export.instruments.interleave import measure_interleaved
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.statistics import paired_ratio
from sparse_export.models.run_network import masks_of_run, network_of_run
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks import data
from sparse_export.version import library_versions, now

DENSITIES = (0.05, 0.1, 0.2)
SMALL_CUT = 0.001
BATCHES = (1, 256)
TWO_FOUR = NMPattern(n=2, m=4)

_SMALL_VGG = """
model = "benchmarks.lossless_networks:small_vgg"
data = "npz:{data}"
epochs = {epochs}
batch_size = 64
[optimizer]
name = "sgd"
lr = 0.05
[learning_rate]
schedule = "cosine"
"""
_SMALL_VIT = """
model = "benchmarks.lossless_networks:small_vit"
data = "mnist"
epochs = {epochs}
batch_size = 100
[optimizer]
name = "adamw"
lr = 1e-3
weight_decay = 0.05
[learning_rate]
schedule = "cosine"
warmup = 0.05
[sparsity]
update_every = 54
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network trained without a pattern. recipe: a shipped one, or the text of one to be written."""

    name: str
    recipe: str
    epochs: int
    gather: Gather


CASES = (
    Case(name="mnist-lenet300-100", recipe="mnist-lenet300-100", epochs=20, gather="input"),
    Case(name="mnist-lenet5", recipe="mnist-lenet5", epochs=3, gather="any"),
    Case(name="small-vgg", recipe=_SMALL_VGG, epochs=8, gather="any"),
    Case(name="small-vit", recipe=_SMALL_VIT, epochs=1, gather="any"),
)


def _recipe(case: Case, work: Path, data_dir: Path) -> str:
    if "\n" not in case.recipe:
        return case.recipe
    subset = work / "cifar10-8000.npz"
    if not subset.is_file():
        with np.load(data_dir / "cifar10.npz") as whole:
            np.savez(
                subset,
                x_train=whole["x_train"][:8000],
                y_train=whole["y_train"][:8000],
                x_test=whole["x_test"][:2000],
                y_test=whole["y_test"][:2000],
            )
    file = work / f"{case.name}.toml"
    file.write_text(case.recipe.format(data=subset, epochs=case.epochs))
    return str(file)


def road(commands: Commands, case: Case, density: float) -> dict[str, Any]:
    """What becomes of each layer with nothing cut, and with at most a thousandth."""
    recipe = _recipe(case, commands.work, commands.data_dir)
    run = commands.train(recipe, f"{case.name}-{density:g}", case.epochs, "--density", f"{density:g}")
    found: dict[str, Any] = {"network": case.name, "density": density, "epochs": case.epochs}
    for kind, options in (
        ("lossless", ("--gather", case.gather)),
        ("small_cut", ("--gather", "any", "--max-cut", f"{SMALL_CUT:g}")),
    ):
        bundle = commands.work / f"{case.name}-{density:g}-{kind}"
        words = ("--pattern", "2:4", *options, "--data-dir", str(commands.data_dir), "--out", str(bundle))
        found[kind] = commands.run("build", str(run), *words)["manifest"]["fitted"]
    return found


# What the Gather costs


def gather_cost(commands: Commands, case: Case, density: float) -> dict[str, Any]:
    """Latency of the bundle with a gather, and of one that picks entry by entry, over that of the plain
    bundle.
    """
    name = f"{case.name}-{density:g}"
    plain = commands.work / f"{name}-plain"
    commands.run("build", str(commands.work / name), "--out", str(plain))
    files = {"plain": plain / "model.onnx", "gathered": commands.work / f"{name}-lossless" / "model.onnx"}
    files["by entry"] = commands.work / f"{name}-by-entry.onnx"
    onnx.save(_by_entry(onnx.load(files["gathered"])), files["by entry"])
    shape = json.loads((plain / "manifest.json").read_bytes())["model"]["input_shape"]
    found: dict[str, Any] = {"network": case.name, "density": density, "at": []}
    for batch in BATCHES:
        x = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
        with (
            open_session(files["plain"], n_threads=1) as first,
            open_session(files["gathered"], n_threads=1) as second,
            open_session(files["by entry"], n_threads=1) as third,
        ):
            sessions = {"plain": first, "gathered": second, "by entry": third}
            times = measure_interleaved(
                {key: partial(session.run, x) for key, session in sessions.items()}, batch=batch
            )
        ratios = {
            key: asdict(paired_ratio(times[key].samples_ms, times["plain"].samples_ms))
            for key in ("gathered", "by entry")
        }
        found["at"].append(
            {"batch": batch, "times": {key: asdict(t) for key, t in times.items()}, "ratio": ratios}
        )
    return found


def _by_entry(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, with one Gather along the last axis in place of transposition, choice of rows and
    transposition.
    """
    nodes = list(model.graph.node)
    gather = next(node for node in nodes if node.op_type == "Gather")
    before = next(node for node in nodes if gather.input[0] in node.output)
    after = next(node for node in nodes if gather.output[0] in node.input)
    gather.input[0], gather.output[0] = before.input[0], after.output[0]
    next(a for a in gather.attribute if a.name == "axis").i = 1
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(node for node in nodes if node is not before and node is not after)
    return model


# What a late cap adds


def late_cap(
    commands: Commands, case: Case, density: float, *, max_cut: float, epochs: int, seeds: int
) -> dict[str, Any]:
    """Cut what is over after the best order, train on with fixed masks; and train on as long without the
    cut.
    """
    run = open_run(commands.work / f"{case.name}-{density:g}")
    fact = run.info.data
    assert fact is not None
    whole = data.load(fact.name, commands.data_dir)
    x_test, y_test = data.load_test_set(fact, run.info.signature.input_shape, commands.data_dir)
    test = torch.from_numpy(x_test[:]), torch.from_numpy(y_test)
    network = network_of_run(run)
    masks = masks_of_run(run, network)
    found: dict[str, Any] = {
        "network": case.name,
        "density": density,
        "max_cut": max_cut,
        "epochs": epochs,
        "n_test": len(y_test),
        "before": _n_correct(network, *test),
        "control": [],
        "capped": [],
    }
    n_train = fact.n_train
    train = data.normalise(whole.x_train[:n_train], fact.mean, fact.std), whole.y_train[:n_train]
    for seed in range(seeds):
        control = network_of_run(run)
        _train_on(control, masks, train, epochs, seed)
        found["control"].append(_n_correct(control, *test))
    fitted = fit_pattern(
        network,
        torch.from_numpy(x_test[:8]),
        TWO_FOUR,
        [layer.name for layer in run.info.layers],
        masks=masks,
        max_cut=max_cut,
        gather=case.gather,
    )
    found["layers"] = [asdict(layer) for layer in fitted.layers]
    found["cut"] = _n_correct(network, *test)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for seed in range(seeds):
        network.load_state_dict(state)
        _train_on(network, masks, train, epochs, seed)
        found["capped"].append(_n_correct(network, *test))
    return found


def _n_correct(network: nn.Module, x: Tensor, y: Tensor) -> int:
    network.eval()
    with torch.inference_mode():
        return sum(
            int((network(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(500), y.split(500), strict=True)
        )


def _train_on(
    network: nn.Module,
    masks: Mapping[str, Tensor],
    train: tuple[Tensor, Tensor],
    epochs: int,
    seed: int,
    lr: float = 0.002,
) -> None:
    """SGD with momentum 0.9, batches of 100, a learning rate that falls by a cosine; masked weights stay
    0.
    """
    network.train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    n_steps = epochs * (len(train[0]) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(train[0]), generator=generator)
        for rows in order[: len(order) // 100 * 100].split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    network.get_parameter(name).mul_(mask)


# The whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From unstructured to 2:4 without loss.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the data sets lie")
    parser.add_argument("--work", type=Path, help="folder of runs and bundles (default: a temporary one)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="networks, of: see CASES; and gather, late")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results and the machine's facts")
    options = parser.parse_args(arguments)
    only = options.only or [*(case.name for case in CASES), "gather", "late"]
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {"roads": [], "gather": [], "late": []}
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(options.work or Path(folder), options.data_dir)
        for case in CASES:
            if case.name in only:
                for density in DENSITIES:
                    results["roads"].append(road(commands, case, density))
                    _print_road(results["roads"][-1])
                    _save(options.json, results, commands)
        if "gather" in only:
            for case in CASES[:2]:
                results["gather"].append(gather_cost(commands, case, DENSITIES[0]))
                _print_gather(results["gather"][-1])
        if "late" in only:
            for density in DENSITIES:
                results["late"].append(late_cap(commands, CASES[0], density, max_cut=0.3, epochs=4, seeds=3))
                _print_late(results["late"][-1])
        _save(options.json, results, commands)


def _save(file: Path | None, results: Mapping[str, Any], commands: Commands) -> None:
    """Write what there is so far."""
    if file is None:
        return
    document = {
        **results,
        "commands": commands.ran,
        "date": now(),
        "machine": machine_facts(),
        "versions": library_versions(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1).replace(str(commands.work), "WORK")
    file.write_text(text.replace(str(commands.data_dir), "DIR") + "\n")


def _print_road(found: Mapping[str, Any]) -> None:
    print(f"{found['network']} trained at {found['density']:g}, {found['epochs']} epochs")
    for kind in ("lossless", "small_cut"):
        fact = found[kind]
        before, after = fact["score_before"], fact["score_after"]
        print(
            f"  {kind}: {before['n_correct']} right before, {after['n_correct']} after, {fact['n_changed']} "
            "changed"
        )
        for layer in fact["layers"]:
            print(
                f"    {layer['name']:<22}{'x'.join(map(str, layer['shape'])):<14}{layer['density']:.4f}  "
                f"{layer['groups_over_before']} -> {layer['groups_over_after']} of {layer['n_groups']}  "
                f"{layer['road']}, cut {layer['n_cut']} ({100 * layer['cut']:.4f} %)  {layer['reason']}"
            )


def _print_gather(found: Mapping[str, Any]) -> None:
    for at in found["at"]:
        median = at["times"]["plain"]["median_ms"]
        for key, ratio in at["ratio"].items():
            print(
                f"{found['network']} batch {at['batch']}: {key} / plain {ratio['estimate']:.3f} "
                f"[{ratio['low']:.3f}, {ratio['high']:.3f}], plain {1000 * median:.0f} us"
            )


def _print_late(found: Mapping[str, Any]) -> None:
    print(
        f"{found['network']} at {found['density']:g}: {found['before']} right as trained, {found['cut']} "
        "when cut; "
        f"trained on: {found['control']} without the cut, {found['capped']} with it"
    )
    for layer in found["layers"]:
        print(f"    {layer['name']:<14}{layer['road']}, cut {layer['n_cut']} ({100 * layer['cut']:.3f} %)")


if __name__ == "__main__":
    main()
