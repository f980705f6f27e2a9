"""Inspecting tells what a folder or a file holds."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from sparse_export.building import build
from sparse_export.cli.main import cli
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.formats.bundle import read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import Run, SpeedInfo, open_run, save_run_info
from sparse_export.formats.score import Score
from sparse_export.graph.quantized_ends import QuantizedEnds
from sparse_export.inspect import inspect
from sparse_export.inspection import require_promises, require_unchanged, told_speed
from tests.making_runs import digits_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = digits_run(tmp_path_factory.mktemp("made") / "run")
    build(run)
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A run and its bundle, to be spoilt."""
    shutil.copytree(made.path.parent, tmp_path / "copy")
    return open_run(tmp_path / "copy" / "run")


def test_a_run_tells_its_layers_and_accuracy(made: Run) -> None:
    found = inspect(made.path)
    assert (found.kind, found.problem, found.n_files) == ("run", None, 2)
    assert found.score == made.info.test
    assert [layer.name for layer in found.layers] == [
        f"{x}.weight" for x in ("conv1", "conv2", "conv3", "fc1", "fc2")
    ]
    assert (found.n_weights, found.n_nonzero) == (made.info.n_masked, made.info.n_active)
    assert found.density == made.info.density
    assert found.n_parameters == made.info.n_parameters


def test_an_unfinished_run_can_be_looked_at(run: Run) -> None:
    save_run_info(run.path, replace(run.info, status="running", files={}, test=None))
    (run.path / "model.safetensors").unlink()
    found = inspect(run.path)
    assert (found.kind, found.problem, found.score) == ("unfinished run", None, None)


def test_a_bundle_tells_its_layers_and_its_work(made: Run) -> None:
    found = inspect(made.path.with_name("run-bundle"))
    assert (found.kind, found.problem, found.n_files) == ("bundle", None, 4)
    assert found.n_nonzero == made.info.n_active
    assert "multiply-accumulates" in found.facts


def test_the_onnx_file_of_a_bundle_tells_the_same_counts(made: Run) -> None:
    found = inspect(made.path.with_name("run-bundle") / "model.onnx")
    assert found.kind == "onnx"
    assert found.facts["producer"].startswith("sparse-export ")
    kept = {layer.name: (layer.shape, layer.n_nonzero) for layer in found.layers}
    assert kept == {layer.name: (layer.shape, layer.n_active) for layer in made.info.layers}


def test_anybodys_onnx_file_can_be_looked_at(tmp_path: Path) -> None:
    weight = np.ones((4, 6), dtype=np.float32)
    weight[:, ::2] = 0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
        "theirs",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight.T.copy(), "v")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7),
        tmp_path / "m.onnx",
    )
    found = inspect(tmp_path / "m.onnx")
    assert [(layer.name, layer.n_weights, layer.n_nonzero, layer.density) for layer in found.layers] == [
        ("w", 24, 12, 0.5),
        ("v", 24, 12, 0.5),
    ]
    assert found.facts["multiply-accumulates"] == "48 for one sample, 24 by non-zero weights"
    assert found.facts["opset"] == "ai.onnx 13"


@pytest.mark.parametrize(
    ("folder", "file"),
    [("run", "model.safetensors"), ("run-bundle", "model.onnx"), ("run-bundle", "layers.json")],
)
def test_the_file_that_was_changed_is_named(run: Run, folder: str, file: str) -> None:
    path = run.path.with_name(folder)
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(content)
    found = inspect(path)
    assert found.problem is not None
    assert str(path / file) in found.problem
    assert "NOT verified" in str(found)
    result = CliRunner().invoke(cli, ["inspect", str(path), "--json"])
    assert result.exit_code == 6
    assert json.loads(result.stdout)["problem"] == found.problem
    assert f"is not what was written: {found.problem}" in result.stderr


def test_the_file_that_is_missing_is_named(run: Run) -> None:
    (run.path / "masks.safetensors").unlink()
    found = inspect(run.path)
    assert found.problem == f"{run.path / 'masks.safetensors'} is missing."
    with pytest.raises(ArtefactError, match=r"masks\.safetensors is missing\. Every"):
        require_unchanged(found)


def test_what_is_whole_passes(made: Run) -> None:
    for path in (made.path, made.path.with_name("run-bundle")):
        require_unchanged(inspect(path))
        assert CliRunner().invoke(cli, ["inspect", str(path)]).exit_code == 0


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("run", "run.json"),
        ("run", "model.safetensors"),
        ("run-bundle", "manifest.json"),
        ("run-bundle", "SHA256SUMS"),
        ("run-bundle", "golden/input.npy"),
    ],
)
def test_a_file_of_a_folder_is_answered_with_the_folder_to_give(made: Run, folder: str, file: str) -> None:
    path = made.path.with_name(folder)
    kind = folder.rpartition("-")[2]
    with pytest.raises(UsageError, match=rf"is a file in the {kind} .*Give the folder: .*{folder}$"):
        inspect(path / file)


def test_the_table_has_a_line_for_each_layer_and_the_total(made: Run) -> None:
    lines = str(inspect(made.path)).splitlines()
    table = lines[lines.index("") + 1 :]
    assert table[0].split() == ["layer", "shape", "weights", "non-zero", "density"]
    assert table[2].split()[:3] == ["conv2.weight", "32x16x3x3", "4,608"]
    total = ["total", f"{made.info.n_masked:,}", f"{made.info.n_active:,}", f"{made.info.density:.4f}"]
    assert table[-1].split() == total
    assert len({len(line) for line in table}) == 1
    assert "2 files" in lines[len(lines) - len(table) - 2] or any(
        "2 verified by SHA-256" in line for line in lines
    )


def test_a_damaged_description_is_told(run: Run) -> None:
    (run.path / "run.json").write_text("{")
    with pytest.raises(ArtefactError, match="is not JSON"):
        inspect(run.path)


def test_a_truncated_onnx_file_is_told(run: Run) -> None:
    file = run.path.with_name("run-bundle") / "model.onnx"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ArtefactError, match="cannot be read as ONNX"):
        inspect(file)


def test_another_file_is_told(tmp_path: Path) -> None:
    for suffix in ("txt", "json", "textproto", "pbtxt", "onnxtxt", "onnxjson", "bin"):
        (tmp_path / f"notes.{suffix}").write_text("buy milk")
        with pytest.raises(ArtefactError, match=rf"notes\.{suffix} cannot be read as ONNX"):
            inspect(tmp_path / f"notes.{suffix}")


def test_a_graph_is_read_whatever_its_file_is_called(made: Run, tmp_path: Path) -> None:
    shutil.copy(made.path.with_name("run-bundle") / "model.onnx", tmp_path / "model.txt")
    assert inspect(tmp_path / "model.txt").n_nonzero == made.info.n_active


def test_another_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run nor a bundle"):
        inspect(tmp_path)


def test_a_path_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "absent")


def spoilt_promise(made: Run, tmp_path: Path, *, keep: bool) -> Path:
    """A bundle that promises 2:4 for its first linear layer, with a graph that keeps it or does not."""
    bundle = tmp_path / "bundle"
    shutil.copytree(made.path.with_name("run-bundle"), bundle)
    info = read_bundle_info(bundle)
    if keep:
        model = onnx.load(bundle / "model.onnx")
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "fc1.weight")
        weight = numpy_helper.to_array(tensor).copy()
        weight[:, 0::4] = weight[:, 1::4] = 0
        tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
        onnx.save(model, bundle / "model.onnx")
    layers = tuple(replace(layer, pattern="2:4" if "fc1" in layer.name else None) for layer in info.layers)
    save_bundle_info(bundle, replace(info, layers=layers, files=file_infos(bundle, info.files)))
    return bundle


def test_a_graph_tells_of_each_layer_whether_it_is_2_to_4_and_usable(made: Run) -> None:
    for path, more in (
        (made.path.with_name("run-bundle"), []),
        (made.path.with_name("run-bundle") / "model.onnx", ["2:4", "would", "keep"]),
    ):
        found = inspect(path)
        assert [layer.weight for layer in found.graph] == [layer.name for layer in found.layers]
        stem = found.graph[0]
        assert (stem.pattern_holds, stem.n_groups, stem.eligible) == (False, None, "no")
        text = str(found)
        header = next(line for line in text.splitlines() if line.startswith("layer "))
        assert header.split() == ["layer", "op", "shape", "density", "2:4", *more, "eligible", "why", "not"]
        row = next(line for line in text.splitlines() if line.startswith("conv1.weight"))
        assert row.split()[1:3] == ["Conv", "16x1x3x3"]
        assert row.endswith("indivisible, float32")
        assert "0 of 5 layers hold 2:4" in text
        assert "four does not divide the reduction axis" in text


def test_a_file_tells_what_2_to_4_would_keep_and_what_is_missing(made: Run) -> None:
    file = made.path.with_name("run-bundle") / "model.onnx"
    found = inspect(file)
    stem, *others = found.graph
    text = str(found)
    rows = {line.split()[0]: line for line in text.splitlines() if ".weight " in line}
    assert stem.would_keep is None
    assert " -  " in rows["conv1.weight"]
    for layer in others:
        assert layer.would_keep is not None
        assert f"  {100 * layer.would_keep:.1f} %  " in rows[layer.weight]
    totals = found.if_pruned
    assert totals is not None and totals.macs_share is not None and totals.would_keep is not None
    assert (
        f"4 of 5 layers could be 2:4: they hold {100 * totals.macs_share:.1f} % of the multiply-adds and "
        f"would keep {100 * totals.would_keep:.1f} % of |w|; missing: float16, bfloat16 or int8; "
    ) in " ".join(text.split())
    document = json.loads(CliRunner().invoke(cli, ["inspect", str(file), "--json"]).stdout)
    assert document["if_pruned"]["n_layers"] == 4
    assert [layer["would_keep"] for layer in document["graph"]] == [layer.would_keep for layer in found.graph]
    assert document["graph"][1]["eligible_if_pruned"] == "no"
    assert [one["code"] for one in document["graph"][1]["reasons_if_pruned"]] == ["float32", "small"]


def test_a_bundle_tells_it_in_json_only_and_its_own_table_of_layers_is_without(made: Run) -> None:
    bundle = made.path.with_name("run-bundle")
    assert "would keep" not in str(inspect(bundle))
    graph = json.loads(CliRunner().invoke(cli, ["inspect", str(bundle), "--json"]).stdout)["graph"]
    for layer in graph:
        for name in ("would_keep", "magnitude", "eligible_if_pruned", "reasons_if_pruned"):
            del layer[name]
    assert json.loads((bundle / "layers.json").read_bytes())["layers"] == graph


def test_a_file_that_is_2_to_4_wherever_four_divides_is_told_nothing_of_pruning(
    made: Run, tmp_path: Path
) -> None:
    model = onnx.load(made.path.with_name("run-bundle") / "model.onnx")
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            weight = numpy_helper.to_array(tensor).copy()
            weight[:, 0::4] = weight[:, 1::4] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert [layer.would_keep for layer in found.graph] == [None, 1.0, 1.0, 1.0, 1.0]
    assert "would keep" not in str(found)


def test_a_run_shows_the_pattern_that_a_layer_promises(run: Run) -> None:
    assert "promised" not in str(inspect(run.path))
    layers = (*run.info.layers[:-1], replace(run.info.layers[-1], pattern="2:4"))
    save_run_info(run.path, replace(run.info, layers=layers))
    found = inspect(run.path)
    assert [layer.pattern for layer in found.layers] == [None, None, None, None, "2:4"]
    rows = str(found).splitlines()
    assert rows[-2].split()[0] == "fc2.weight"
    assert rows[-2].endswith("2:4")


def test_a_bundle_that_keeps_its_promise_passes(made: Run, tmp_path: Path) -> None:
    found = inspect(spoilt_promise(made, tmp_path, keep=True))
    assert (found.problem, found.broken, found.unchecked) == (None, (), None)
    row = next(line for line in str(found).splitlines() if line.startswith("fc1.weight"))
    assert row.split()[4:7] == ["2:4", "yes", "no"]
    require_promises(found)


def test_a_bundle_that_breaks_its_promise_is_told_and_fails_the_gate(made: Run, tmp_path: Path) -> None:
    found = inspect(spoilt_promise(made, tmp_path, keep=False))
    (clause,) = found.broken
    assert clause.startswith("fc1.weight, promised 2:4: ")
    assert f"BROKEN PROMISE: {clause}" in " ".join(str(found).split())
    with pytest.raises(GateFailed, match="does not keep what its manifest promises"):
        require_promises(found)


def test_a_promise_that_cannot_be_checked_is_not_passed_over(made: Run, tmp_path: Path) -> None:
    bundle = spoilt_promise(made, tmp_path, keep=True)
    (bundle / "model.onnx").unlink()
    found = inspect(bundle)
    assert found.graph == ()
    with pytest.raises(ArtefactError, match="cannot be checked"):
        require_promises(found)


def test_a_broken_promise_ends_the_command_with_3_after_the_table(made: Run, tmp_path: Path) -> None:
    bundle = spoilt_promise(made, tmp_path, keep=False)
    result = CliRunner().invoke(cli, ["inspect", str(bundle), "--json"])
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert document["broken"][0].startswith("fc1.weight, promised 2:4")
    reasons = {layer["weight"]: layer["reasons"] for layer in document["graph"]}
    assert reasons["conv1.weight"][0]["code"] == "indivisible"
    assert "fc1.weight, promised 2:4" in result.stderr


SPEED = SpeedInfo(
    step_ms=1.25,
    estimate_channels=1.1,
    estimate_macs=3.0,
    all_layers_estimate_channels=1.2,
    all_layers_estimate_macs=4.0,
    n_moments=2,
)


def test_a_run_tells_the_measured_time_of_a_step_and_apart_from_it_the_estimates(run: Run) -> None:
    assert inspect(run.path).speed is None
    save_run_info(run.path, replace(run.info, speed=SPEED))
    result = CliRunner().invoke(cli, ["inspect", str(run.path), "--json"])
    assert json.loads(result.stdout)["speed"]["step_ms"] == 1.25
    rows = str(inspect(run.path)).splitlines()
    (measured,) = (row for row in rows if row.startswith("time of a step"))
    assert measured.endswith("1.25 ms, measured, mask updates included")
    (estimated,) = (row for row in rows if row.startswith("estimates"))
    assert "1.1x without empty channels, 3x without multiplications by zero, of convolutions" in estimated
    assert "not measured" in estimated


def test_without_a_convolution_the_estimates_are_those_of_all_layers() -> None:
    linear = replace(SPEED, estimate_channels=None, estimate_macs=None)
    assert "1.2x without empty channels, 4x" in told_speed(linear)["estimates"]
    assert "of all layers" in told_speed(linear)["estimates"]
    nothing = replace(linear, all_layers_estimate_channels=None, all_layers_estimate_macs=None)
    assert set(told_speed(nothing)) == {"time of a step"}
    assert told_speed(None) == {}


def test_a_dense_run_estimates_nothing_of_zeros(run: Run) -> None:
    assert set(told_speed(SPEED, is_dense=True)) == {"time of a step"}
    save_run_info(run.path, replace(run.info, speed=SPEED, method="dense"))
    text = str(inspect(run.path))
    assert "time of a step" in text and "mask updates" not in text
    assert "by zero" not in text


def test_a_bundle_of_another_precision_says_whose_score_it_shows(run: Run, tmp_path: Path) -> None:
    bundle = build(run, tmp_path / "bundle")
    assert "its run's" not in str(inspect(bundle.path))
    for precision in ("int8", "fp8"):
        info = replace(bundle.info, precision=precision, score=Score(n_correct=3, n_samples=4))
        save_bundle_info(bundle.path, info)
        text = str(inspect(bundle.path))
        assert re.search(rf"its run's test accuracy +75.00 % \(3/4\), before {precision}; `sparse-exp", text)


@pytest.mark.parametrize(("facts", "word"), [({"precision": "fp8"}, "fp8"), ({}, "8 bits")])
def test_quantized_products_are_told_of_their_own_type(facts: dict[str, str], word: str, run: Run) -> None:
    ends = QuantizedEnds(node="a", reads=True, writes=True, broken_by="")
    found = replace(inspect(run.path), facts=facts, quantized=(ends,))
    assert f"sparse kernels for {word} need" in " ".join(str(found).split())
