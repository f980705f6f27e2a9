"""int8 and fp8 with 2:4 against float32 with 2:4: scores, agreement, and engines that are really built.

    python -m benchmarks.quantized [NAME ...] [--run RUN ...] [--data-dir DIR] [--json FILE]

Classifiers are trained here under 2:4 and scored on their whole test sets, as are runs of classifiers that are 2:4
already, by --run; published networks, whose wheels pip
downloads, are made 2:4 in one shot by magnitude, and their outputs are held against those of the same network in
float32. Of each, `model.onnx` (onnxruntime's form) and `model-engine.onnx` are run by onnxruntime on the CPU, and an
engine of TensorRT for RTX is built of the latter where the library is there. No engine is run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks.public_networks import NETWORKS, NotFetchedError, cache_folder, fetch
from sparse_export.building.bundle import build
from sparse_export.building.engine_form import engine_form
from sparse_export.engines import tensorrt_import
from sparse_export.engines.build import build_engine
from sparse_export.engines.options import EngineOptions, Precision, parse_profile
from sparse_export.engines.precision import convert_precision
from sparse_export.errors import SparseExportError
from sparse_export.evaluate.test_set import test_set_of
from sparse_export.formats.bundle import ENGINE_MODEL_FILE, MODEL_FILE, Bundle
from sparse_export.formats.run import Run, open_run
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import open_model, save_model, signature_of
from sparse_export.graph.passes.fold_norms import with_folded_norms
from sparse_export.instruments.paired_scores import paired_accuracy_difference
from sparse_export.oneshot.graph_pruning import sparsify_graph
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.tolerance import differences
from sparse_export.signature import Array, Feeds, Signature
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.tasks.agreement import agreement_of
from sparse_export.tasks.labels import predicted_classes
from sparse_export.train.loop import train
from sparse_export.train.recipe import recipe_from_table
from sparse_export.version import library_versions, now

PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")
_ENGINE: tensorrt_import.Target = "tensorrt-rtx"


class Block(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.second = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.side = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if n_in != n_out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + self.side(x))


def residual() -> nn.Module:
    """A small ResNet for pictures of 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32, 32, 1),
        Block(32, 64, 2),
        Block(64, 128, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


TRAINED: dict[str, tuple[str, str, int, int | None]] = {
    "digits-cnn": ("digits-cnn", "digits", 20, None),
    "lenet300-100": ("lenet300-100", "mnist", 1, 40_000),
    "residual": ("benchmarks.quantized:residual", "cifar10", 4, 5_000),
}
"""Network, data set, epochs, and how many training samples."""
PUBLIC = ("minilm", "nudenet", "magika", "ocr-cls", "open-nsfw", "ocr-det")


def _data(name: str, n_train: int | None, folder: Path, work: Path) -> str:
    """The data set by its name, or a part of it as a file."""
    from sparse_export.tasks import data

    if n_train is None:
        return name
    found = data.load(name, folder)
    np.savez(
        work / "data.npz",
        x_train=np.asarray(found.x_train[:n_train]),
        y_train=np.asarray(found.y_train[:n_train]),
        x_test=np.asarray(found.x_test),
        y_test=np.asarray(found.y_test),
    )
    return f"npz:{work / 'data.npz'}"


def of_trained(name: str, folder: Path, work: Path) -> dict[str, Any]:
    """Train a classifier under 2:4, build it in each precision, and score its graphs on the test set."""
    model, data, epochs, n_train = TRAINED[name]
    table = {
        "model": model,
        "data": _data(data, n_train, folder, work),
        "epochs": epochs,
        "batch_size": 100,
        "validation_fraction": 0.0,
        "optimizer": {"name": "adam", "lr": 0.001, "weight_decay": 0.0},
        "learning_rate": {"schedule": "cosine"},
        "sparsity": {"pattern": "2:4", "density": 0.5},
    }
    run = train(recipe_from_table(table, source=name), work / "run", data_dir=folder, device="cpu")
    return {"network": name, "data": data, **of_run(run, folder, work)}


def of_run(run: Run, folder: Path, work: Path) -> dict[str, Any]:
    """Build a run of a classifier in each precision, and score its graphs on the test set."""
    row: dict[str, Any] = {"precisions": {}}
    whole = build(run, work / "fp32", data_dir=folder)
    right = _right(whole, MODEL_FILE, folder)
    row["fp32"] = _percent(right)
    for precision in PRECISIONS:
        bundle = build(run, work / precision, precision=precision, data_dir=folder)
        info = bundle.info.engine_graph
        assert info is not None
        found = {one: _right(bundle, one, folder) for one in (MODEL_FILE, ENGINE_MODEL_FILE)}
        graph = onnx.load(bundle.path / ENGINE_MODEL_FILE)
        row["precisions"][precision] = {
            **asdict(info),
            "scores": {one: _percent(correct) for one, correct in found.items()},
            "differences": {
                one: asdict(paired_accuracy_difference(right, correct)) for one, correct in found.items()
            },
            "engine": _built(graph, bundle.info.signature, precision, (), work),
        }
    return row


def _percent(right: Array) -> float:
    return round(100 * float(right.mean()), 4)


def _right(bundle: Bundle, file: str, folder: Path) -> Array:
    """Bool (n,): which samples of the test set a graph classifies rightly."""
    test = test_set_of(bundle, data_dir=folder)
    assert test is not None
    right, start, targets = [], 0, np.asarray(test.targets)
    name = bundle.info.signature.outputs[0].name
    with open_session(bundle.path / file, signature=bundle.info.signature) as session:
        for feeds in test.samples.batches(250):
            found = predicted_classes(session.run(feeds)[name])
            right.append(found == targets[start : start + len(found)])
            start += len(found)
    return np.concatenate(right)


def of_public(name: str, work: Path) -> dict[str, Any]:
    """Make a published network 2:4, quantize it, and hold its outputs against those in float32."""
    network = NETWORKS[name]
    model = with_folded_norms(open_model(fetch(network, cache_folder())))
    made = [
        network.inputs(np.random.default_rng(seed), n) for seed, n in ((1, network.n_calibration), (2, 32))
    ]
    return _of_graph(name, model, signature_of(model), made, network.profiles, work)


def of_transformer(name: str, work: Path) -> dict[str, Any]:
    """The same of timm's smallest ViT, with random weights."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).eval()
    model = onnx_from_module(network, example_of_shape((3, 64, 64)), masks={})
    signature = signature_of(model)
    generator = np.random.default_rng(0)
    made: list[Any] = [
        {signature.input_names[0]: generator.standard_normal((32, 3, 64, 64), dtype=np.float32)} for _ in "ab"
    ]
    return _of_graph(name, model, signature, made, (), work)


def _of_graph(
    name: str,
    model: onnx.ModelProto,
    signature: Signature,
    made: Sequence[Feeds],
    profiles: Sequence[str],
    work: Path,
) -> dict[str, Any]:
    """made: inputs to calibrate on, and others to measure on."""
    samples, held = (_batches(signature, one) for one in made)
    pruned = sparsify_graph(
        model, signature=signature, batches=None, pattern=NMPattern(n=2, m=4), method="magnitude"
    ).model
    wanted = _outputs(pruned, signature, held, work)
    row: dict[str, Any] = {"network": name, "precisions": {}}
    for precision in PRECISIONS:
        start = time.process_time()
        form = engine_form(pruned, signature, samples, precision)
        assert form is not None
        spent = time.process_time() - start
        one: dict[str, Any] = {
            "ranges": form.ranges,
            "migrated": form.migrated,
            "rms": dict(form.rms),
            "n_products": form.n_products,
            "n_quantized": form.n_quantized,
            "cpu_s": round(spent, 1),
        }
        for file, graph in (
            (MODEL_FILE, lambda precision=precision: convert_precision(pruned, precision, samples)),
            (ENGINE_MODEL_FILE, lambda form=form: form.model),
        ):
            one[file] = _held(graph, signature, held, wanted, work)
        one["engine"] = _built(form.model, signature, precision, profiles, work)
        row["precisions"][precision] = one
    return row


def _batches(signature: Signature, feeds: Feeds) -> list[Feeds]:
    n = signature.n_samples(feeds)
    return [signature.part(feeds, at, min(at + 8, n)) for at in range(0, n, 8)]


def _outputs(model: onnx.ModelProto, signature: Signature, held: Sequence[Feeds], work: Path) -> list[Feeds]:
    save_model(model, work / "m.onnx")
    with open_session(work / "m.onnx", signature=signature) as session:
        return [session.run(feeds) for feeds in held]


def _held(
    graph: Callable[[], onnx.ModelProto],
    signature: Signature,
    held: Sequence[Feeds],
    wanted: Sequence[Feeds],
    work: Path,
) -> dict[str, Any]:
    """Agreement with the network in float32, and its errors by the spread; or why there is none."""
    try:
        found = _outputs(graph(), signature, held, work)
    except SparseExportError as error:
        return {"problem": error.what}
    agreement = agreement_of(zip(wanted, found, strict=True), signature, inputs="held out")
    off = [one for a, b in zip(found, wanted, strict=True) for one in differences(a, b, atol=0, rtol=1)]
    return {
        "agreement": [round(one, 3) for one in (agreement.percent, agreement.low, agreement.high)],
        "rms": max(one.rms_difference or 0.0 for one in off),
        "largest": max(one.max_relative_difference or 0.0 for one in off),
    }


def _built(
    graph: onnx.ModelProto, signature: Signature, precision: Precision, profiles: Sequence[str], work: Path
) -> dict[str, Any]:
    """What building an engine came to: products in float32 are refused by the build."""
    if not tensorrt_import.is_installed(_ENGINE):
        return {"problem": "TensorRT for RTX is not installed"}
    options = EngineOptions(target=_ENGINE, architectures=("sm89",))
    if profiles:
        options = replace(options, profiles=tuple(map(parse_profile, profiles)))
    try:
        built = build_engine(graph, work / "x.engine", options, signature, precision=precision)
    except SparseExportError as error:
        return {"problem": error.what}
    size = (work / "x.engine").stat().st_size
    return {
        "version": built.version,
        "n_layers": built.n_layers,
        "size_bytes": size,
        "build_s": built.build_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=None)
    parser.add_argument("--run", dest="runs", type=Path, action="append", default=[])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    words = parser.parse_args()
    from sparse_export.tasks.data.places import default_data_dir

    folder = words.data_dir or default_data_dir()
    torch.manual_seed(0)
    rows = []
    names = words.names or ([] if words.runs else [*TRAINED, "vit-tiny", *PUBLIC])
    for name in (*names, *words.runs):
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            try:
                if isinstance(name, Path):
                    opened = open_run(name)
                    row = {
                        "network": opened.info.model.name,
                        "method": opened.info.method,
                        **of_run(opened, folder, work),
                    }
                elif name in TRAINED:
                    row = of_trained(name, folder, work)
                else:
                    row = of_transformer(name, work) if name == "vit-tiny" else of_public(name, work)
            except (SparseExportError, NotFetchedError) as error:
                row = {"network": name, "problem": str(error)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        if words.json:
            document = {"versions": library_versions(), "created": now(), "rows": rows}
            words.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
