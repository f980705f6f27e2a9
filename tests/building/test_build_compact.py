"""A bundle with a compacted graph is a bundle like any other, and tells what went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from sparse_export.building import build
from sparse_export.cli.build import command
from sparse_export.errors import GateFailed
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import Run
from sparse_export.graph.passes.compact import Compacted, compact
from sparse_export.inspect import inspect
from tests.making_runs import digits_accuracy, digits_fact, digits_run, network_and_masks, save_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which some channels have lost all their weights."""
    module, masks = network_and_masks()
    with torch.no_grad():
        for name, mask in masks.items():
            if name != "fc2.weight":
                mask[::3] = False
                module.get_parameter(name).mul_(mask).add_(0.0)
    folder = tmp_path_factory.mktemp("run") / "run"
    return save_run(folder, module, masks, fact=digits_fact(), test=digits_accuracy(module))


@pytest.fixture(scope="module")
def bundle(run: Run) -> Bundle:
    return build(run.path, run.path.parent / "compact", compact=True)


def test_the_manifest_tells_what_went_and_the_counts_are_the_files(bundle: Bundle) -> None:
    info = open_bundle(bundle.path).info
    assert info.compacted is not None
    assert info.compacted.n_weights_after == info.n_parameters < info.compacted.n_weights_before
    arrays = onnx.load(bundle.onnx_path).graph.initializer
    shapes = {tensor.name: tuple(tensor.dims) for tensor in arrays}
    layers = json.loads((bundle.path / "layers.json").read_bytes())["layers"]
    assert [layer.after for layer in info.compacted.layers] == [tuple(layer["shape"]) for layer in layers]
    assert all(shapes[layer.weight] == layer.after for layer in info.compacted.layers)
    assert info.compacted.n_removed == sum(a.before[0] - a.after[0] for a in info.compacted.layers) > 0
    assert info.macs == sum(layer["macs"] for layer in layers)


def test_a_plain_bundle_tells_of_nothing(run: Run) -> None:
    assert build(run.path).info.compacted is None


def test_a_compacted_bundle_is_valid(bundle: Bundle) -> None:
    found = validate(bundle, max_drop=0.0, n_threads=1)
    check_gates(found)
    assert found.parity_ok


def test_inspect_tells_that_the_graph_is_smaller(bundle: Bundle) -> None:
    assert "parameters left" in inspect(bundle.path).facts["compacted"]


def test_compare_tells_that_the_shapes_differ_and_by_how_much(bundle: Bundle, tmp_path: Path) -> None:
    dense = build(digits_run(tmp_path / "dense", density=1.0).path)
    found = compare(dense, bundle, batches=(1,), rounds=20, block_s=0.002, warmup_limit_s=0.2, n_threads=1)
    share = bundle.info.n_parameters / dense.info.n_parameters
    assert f"it has {share:.3f} of the dense one's parameters" in found.latency[0].verdict
    assert "same shapes" not in found.latency[0].verdict
    assert (found.sparse.n_parameters, found.sparse.macs) == (bundle.info.n_parameters, bundle.info.macs)


def test_the_command_prints_layer_by_layer_what_went(run: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(command, [str(run.path), "--out", str(tmp_path / "b"), "--compact"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layer", "whole", "compacted", "what", "kept", "it", "from", "more"]
    assert next(line for line in lines if line.startswith("fc1.weight")).split()[1] == "64x256"
    assert "parameters left (0." in done.stdout


def test_a_wrong_graph_is_not_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(model: onnx.ModelProto, **options: Any) -> Compacted:
        found = compact(model, **options)
        bias = next(t for t in found.model.graph.initializer if t.name.startswith("fc1.bias"))
        values: Any = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return found

    monkeypatch.setattr("sparse_export.building.patterns.compacted_graph", spoilt)
    with pytest.raises(GateFailed, match="The compacted graph differs"):
        build(run.path, tmp_path / "wrong", compact=True)
    assert not (tmp_path / "wrong").exists()
