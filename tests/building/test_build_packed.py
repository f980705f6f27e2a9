"""A bundle with packed weights is the same bundle for every later stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner, Result

from sparse_export.building import build
from sparse_export.cli.main import cli
from sparse_export.errors import ArtefactError, GateFailed, UnknownNameError
from sparse_export.evaluate.bench import bench
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.run import Run
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.format24 import packed_weights
from sparse_export.inspect import inspect
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from tests.exporting import exported_once
from tests.making_runs import digits_accuracy, digits_fact, digits_run, network_and_masks, save_run

TWO_FOUR = NMPattern(n=2, m=4)


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """digits-cnn, 2:4 wherever its reduction axis allows it."""
    module, masks = network_and_masks(density=0.999)
    for name, parameter in module.named_parameters():
        if name not in masks:
            continue
        if fits(tuple(parameter.shape), 1, TWO_FOUR):
            masks[name] = largest_per_group(parameter.detach(), 1, TWO_FOUR)
        else:
            masks[name] = torch.ones_like(masks[name])
        with torch.no_grad():
            parameter.mul_(masks[name]).add_(0.0)
    folder = tmp_path_factory.mktemp("two-four") / "run"
    return save_run(folder, module, masks, fact=digits_fact(), test=digits_accuracy(module))


@pytest.fixture(scope="module")
def bundles(run: Run) -> dict[str, Bundle]:
    return {
        form: build(run.path, run.path.with_name(form), onnx=form) for form in ("dense", "packed", "both")
    }


def test_packed_is_smaller_and_expands_to_the_dense_file(bundles: dict[str, Bundle]) -> None:
    dense, packed = (bundles[form].onnx_path for form in ("dense", "packed"))
    model = onnx.load(packed)
    onnx.checker.check_model(model, full_check=True)
    assert packed_weights(model) == ("conv2.weight", "conv3.weight", "fc1.weight", "fc2.weight")
    assert packed.stat().st_size < 0.6 * dense.stat().st_size
    assert expand(model).SerializeToString(deterministic=True) == dense.read_bytes()


def test_both_forms_are_listed_with_their_hashes(bundles: dict[str, Bundle]) -> None:
    both = open_bundle(bundles["both"].path)
    assert both.info.files["model.onnx"] == bundles["packed"].info.files["model.onnx"]
    assert both.info.files["model-dense.onnx"] == bundles["dense"].info.files["model.onnx"]
    assert "model-dense.onnx" not in bundles["packed"].info.files
    with (both.path / "model-dense.onnx").open("ab") as stream:
        stream.write(b".")
    try:
        with pytest.raises(ArtefactError, match="model-dense"):
            open_bundle(both.path)
    finally:
        (both.path / "model-dense.onnx").write_bytes(bundles["dense"].onnx_path.read_bytes())


def test_the_facts_are_those_of_the_dense_graph(bundles: dict[str, Bundle]) -> None:
    dense, packed = (bundles[form] for form in ("dense", "packed"))
    assert (packed.path / "layers.json").read_bytes() == (dense.path / "layers.json").read_bytes()
    for field in ("n_parameters", "n_nonzero", "macs", "nonzero_macs", "layers", "density"):
        assert getattr(packed.info, field) == getattr(dense.info, field)


def test_a_stock_onnxruntime_runs_the_packed_file_to_the_same_bits(bundles: dict[str, Bundle]) -> None:
    x = np.load(bundles["dense"].path / "golden/input.npy")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    outputs = [
        onnxruntime.InferenceSession(
            bundles[form].onnx_path, options, providers=["CPUExecutionProvider"]
        ).run(None, {"input": x})[0]
        for form in ("dense", "packed")
    ]
    assert outputs[0].tobytes() == outputs[1].tobytes()


def test_a_packed_bundle_is_validated_like_a_dense_one(bundles: dict[str, Bundle]) -> None:
    dense, packed = (validate(bundles[form], max_drop=0.0, n_threads=1) for form in ("dense", "packed"))
    check_gates(packed)
    assert (packed.score, packed.golden, packed.parity) == (dense.score, dense.golden, dense.parity)


def test_a_packed_bundle_is_compared_with_a_dense_one(bundles: dict[str, Bundle]) -> None:
    found = compare(bundles["dense"], bundles["packed"], batches=(1,), rounds=20, n_threads=1, block_s=0.001)
    assert found.sparse.size_bytes == bundles["packed"].info.files["model.onnx"].size_bytes
    assert found.sparse.n_nonzero == found.dense.n_nonzero
    assert found.drop == 0.0


def test_a_packed_bundle_is_timed_like_a_dense_one(bundles: dict[str, Bundle]) -> None:
    for form in ("packed", "both"):
        found = bench(
            bundles[form],
            batches=(2,),
            runtimes=("onnxruntime-cpu",),
            rounds=20,
            n_threads=1,
            block_s=0.001,
            warmup_limit_s=0.05,
        )
        assert found.rows[0].latency.n_calls >= 40
        assert found.size_bytes == bundles[form].info.files["model.onnx"].size_bytes


def test_an_earlier_bundle_of_both_is_replaced(run: Run, tmp_path: Path) -> None:
    build(run.path, tmp_path / "bundle", onnx="both")
    build(run.path, tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "model-dense.onnx").exists()


@pytest.mark.parametrize("form", ["packed", "both"])
def test_packing_what_is_not_two_four_fails_with_reasons_and_writes_nothing(
    form: str, tmp_path: Path
) -> None:
    run = digits_run(tmp_path / "run", density=0.9)
    with pytest.raises(
        GateFailed, match=r"conv1.*no multiple of 4; conv2.weight: .* groups have more than 2"
    ):
        build(run.path, onnx=form)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unknown_form_is_told_with_the_known_ones(run: Run) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'packed'"):
        build(run.path, onnx="pack")


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="sparse-export")


def test_the_command_packs_and_tells_the_sizes(run: Run, tmp_path: Path) -> None:
    result = call("build", run.path, "--out", tmp_path / "bundle", "--onnx", "both")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "bundle")
    size = (tmp_path / "bundle" / "model.onnx").stat().st_size
    assert f"model.onnx {size:,} bytes packed" in result.stdout


def test_the_command_ends_with_three_when_nothing_is_two_four(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run", density=0.9)
    result = call("build", run.path, "--onnx", "packed", "--json")
    document: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code, document["error"]["type"]) == (3, "GateFailed")


def test_inspect_sees_the_packed_weights_as_it_sees_the_dense_ones(bundles: dict[str, Bundle]) -> None:
    dense, packed = (inspect(bundles[form].path) for form in ("dense", "packed"))
    assert packed.graph == dense.graph != ()
    assert (packed.broken, packed.unchecked) == (dense.broken, dense.unchecked) == ((), None)
    alone = inspect(bundles["packed"].onnx_path)
    assert alone.layers == inspect(bundles["dense"].onnx_path).layers
