"""Bundles of int8 and fp8 hold a graph for engines beside the one for onnxruntime."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from sparse_export.building import build
from sparse_export.building.bundle import dry_run
from sparse_export.building.engine_form import engine_form
from sparse_export.building.request import BuildRequest
from sparse_export.engines import tensorrt_import
from sparse_export.engines.precision import RMS_TOLERANCE, TOLERANCE
from sparse_export.errors import ArtefactError, GateFailed
from sparse_export.evaluate.gate import gate
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import ENGINE_MODEL_FILE, Bundle, open_bundle
from sparse_export.formats.run import Run
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.quantize import quantized
from sparse_export.graph.passes.quantize_typed import quantized_for_engines
from sparse_export.graph.quantized_ends import quantized_ends
from sparse_export.inspect import inspect
from sparse_export.runtimes.onnxruntime import open_session
from tests.engines.conftest import SMALL, small_graph
from tests.exporting import exported_once
from tests.making_runs import digits_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, Bundle]]:
    folder = tmp_path_factory.mktemp("made")
    with exported_once():
        run = digits_run(folder / "run")
        yield (
            run,
            build(
                run.path, folder / "bundle", precision="int8", n_calibration=32, pattern="2:4", max_cut=0.9
            ),
        )


def test_the_manifest_names_the_graph_and_how_its_ranges_were_taken(made: tuple[Run, Bundle]) -> None:
    bundle = open_bundle(made[1].path)
    info = bundle.info.engine_graph
    assert info is not None
    assert info.file == ENGINE_MODEL_FILE in bundle.info.required_files
    assert info.ranges == min(info.rms, key=info.rms.__getitem__)
    assert 0 < info.rms[info.ranges] < RMS_TOLERANCE["int8"]
    assert (info.n_products, info.n_quantized) == (5, 4)  # all but the one that gives the scores
    assert bundle.info.rms == RMS_TOLERANCE["int8"]


def test_both_graphs_keep_the_pattern_of_every_layer(made: tuple[Run, Bundle]) -> None:
    cpu, engine = (onnx.load(made[1].path / name) for name in ("model.onnx", ENGINE_MODEL_FILE))
    kept = [[layer.pattern_holds for layer in graph_layers(model)] for model in (cpu, engine)]
    assert kept[0] == kept[1]
    assert sum(map(bool, kept[1])) >= 3
    types = {tensor.data_type for tensor in engine.graph.initializer}
    assert {TensorProto.INT8, TensorProto.FLOAT16} <= types
    assert TensorProto.FLOAT not in types


def test_the_golden_pair_holds_on_the_graph_for_engines(made: tuple[Run, Bundle]) -> None:
    path = made[1].path
    wanted, x = (np.load(path / "golden" / name) for name in ("output.npy", "input.npy"))
    with open_session(path / ENGINE_MODEL_FILE) as session:
        found = session.run(x)
    assert 0 < np.abs(found - wanted).max() < TOLERANCE["int8"] * wanted.std()


def test_another_graph_for_engines_is_not_the_bundle(made: tuple[Run, Bundle], tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made[1].path, folder)
    (folder / ENGINE_MODEL_FILE).write_bytes(b"something else")
    with pytest.raises(ArtefactError, match=ENGINE_MODEL_FILE):
        open_bundle(folder)


def test_a_graph_for_engines_that_is_wrong_is_not_written(
    made: tuple[Run, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where onnxruntime or the placement computes something else than the network."""

    def wrong(model: onnx.ModelProto, *others: object, **options: object) -> onnx.ModelProto:
        found = quantized_for_engines(model, *others, **options)  # type: ignore[arg-type]
        for node in found.graph.node:
            if node.op_type == "Relu":
                node.op_type = "Neg"
        return found

    monkeypatch.setattr("sparse_export.building.engine_form.quantized_for_engines", wrong)
    with pytest.raises(GateFailed, match="differs from the network"):
        build(made[0].path, tmp_path / "bundle", precision="int8", n_calibration=32)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.tensorrt
def test_the_engine_is_built_of_that_graph(made: tuple[Run, Bundle], tmp_path: Path) -> None:
    if not tensorrt_import.is_installed("tensorrt-rtx"):
        pytest.skip("no TensorRT for RTX: pip install '.[rtx]'")
    bundle = build(
        made[0].path, tmp_path / "bundle", precision="int8", n_calibration=32, targets=("tensorrt-rtx",)
    )
    (engine,) = bundle.info.engines
    assert engine.onnx_sha256 == sha256_file(bundle.path / ENGINE_MODEL_FILE)
    found = gate(
        bundle.path, bundle.path, n_threads=1, rounds=20, block_s=0.001, runtimes=["onnxruntime-cpu"]
    )
    assert "was built from this graph" in " ".join(found.links[3].told)


def test_other_ranges_are_tried_where_the_largest_magnitudes_are_too_wide() -> None:
    """One value of thousands is far out, and everything else would fall into a few steps."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((20480, 16), dtype=np.float32)
    x[-1, 0] = 3000.0
    batches = [{"input": x[:32]}, {"input": x[32:]}]
    found = engine_form(small_graph(), SMALL, batches, "int8")
    assert found is not None
    assert list(found.rms) == ["max", "percentile"]
    assert found.ranges != "max"
    assert found.rms[found.ranges] < found.rms["max"] / 4
    assert engine_form(small_graph(), SMALL, [], "fp16") is None
    assert [one.holds for one in quantized_ends(found.model)] == [True, False]


def test_a_dry_run_names_the_file(made: tuple[Run, Bundle], tmp_path: Path) -> None:
    request = BuildRequest(
        targets=("onnx",),
        compact=False,
        onnx="dense",
        pattern=None,
        max_cut=0.0,
        gather="input",
        planned_dense=None,
        precision="fp8",
        n_calibration=32,
        engines=(),
        time_layers=False,
    )
    files = {one.file: one.how for one in dry_run(made[0].path, tmp_path / "out", request).files}
    assert files[ENGINE_MODEL_FILE].startswith("fp8 between float16")


# ---- inspect


def test_inspect_tells_which_layers_read_and_write_int8_and_what_breaks_it(made: tuple[Run, Bundle]) -> None:
    found = inspect(made[1].path)
    assert [one.reads for one in found.quantized] == [True] * 5
    assert [one.writes for one in found.quantized] == [True] * 4 + [False]
    assert found.quantized[-1].broken_by.startswith("logits")
    text = " ".join(str(found).split())
    assert "4 of 5 products read and write quantized values" in text
    assert "Whether it then picks one is not measured" in text
    assert found.quantized[-1].broken_by in text


def test_inspect_names_the_input_of_a_product_that_is_not_quantized(tmp_path: Path) -> None:
    """In onnxruntime's form the Relu between two products reads float values."""
    model = quantized(small_graph(), [{"input": np.ones((4, 16), np.float32)}], "int8")
    onnx.save(model, tmp_path / "m.onnx")
    first, second = inspect(tmp_path / "m.onnx").quantized
    assert (first.reads, first.writes, second.reads) == (True, True, True)
    node = next(node for node in model.graph.node if node.name == "second")
    node.input[0] = "a"  # past its pair
    onnx.save(model, tmp_path / "m.onnx")
    first, second = inspect(tmp_path / "m.onnx").quantized
    assert (second.reads, second.broken_by) == (False, "a")
    assert (first.writes, first.broken_by) == (False, "a")


def test_inspect_says_nothing_of_quantization_where_there_is_none(tmp_path: Path) -> None:
    onnx.save(small_graph(), tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert found.quantized == ()
    assert "quantized" not in str(found)
