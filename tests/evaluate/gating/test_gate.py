"""The gate passes a good bundle, and names the first link that is broken, each with its exit code."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_export.building import build
from sparse_export.errors import (
    ArtefactError,
    GateFailed,
    NotTrustedError,
    SpeedupNotReached,
    UnknownNameError,
    UsageError,
)
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.comparison import Comparison
from sparse_export.evaluate.gate import Gate, check_gate, gate, write_results
from sparse_export.evaluate.links.junit import junit_xml
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import Validation
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, RunReference, read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import Run, save_run_info
from sparse_export.signature import class_signature
from sparse_export.tasks import data
from sparse_export.tasks.scores import score_text
from tests.engines.making import engine_fact, header
from tests.evaluate.gating.conftest import QUICK, Spoil, rewrite
from tests.making_runs import digits_accuracy, digits_fact, digits_run, network_and_masks, save_run

LINKS = ("files", "weights", "graph", "engines", "score", "speed")
ENGINE = "engines/made-up.engine"
VERSION = "1.7.1.116"


def outcomes(found: Gate) -> dict[str, str]:
    return {link.name: link.outcome for link in found.links}


def broken_at(found: Gate, name: str, exit_code: int) -> str:
    """Hold that a link is the broken one, that those before hold and those behind were not run; gives the
    reason.
    """
    states = list(outcomes(found).items())
    at = LINKS.index(name)
    assert [link for link, _ in states] == list(LINKS)
    assert states[at] == (name, "broken"), found.links[at]
    assert {state for _, state in states[:at]} <= {"kept", "nothing to check"}
    assert {state for _, state in states[at + 1 :]} <= {"not run"}
    assert (found.passed, found.exit_code) == (False, exit_code)
    assert f"the link {name!r} is broken" in found.verdict
    return found.links[at].reason or ""


def a_tensor(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], None]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor).copy()
            change(values)
            tensor.CopyFrom(numpy_helper.from_array(values, name))


def a_third_in_a_group(w_OI: np.ndarray) -> None:
    """Move a weight of fc1 into a group that has two already: as many zeros as before, and no longer 2:4."""
    first, second = w_OI[0, :4], w_OI[0, 4:8]
    second[np.flatnonzero(second == 0)[0]] = first[np.flatnonzero(first)[0]]
    first[np.flatnonzero(first)[0]] = 0


def test_a_good_bundle_passes_and_every_link_tells_its_figures(passed: Gate) -> None:
    assert passed.passed
    assert passed.exit_code == 0
    assert outcomes(passed) == {
        "files": "kept",
        "weights": "kept",
        "graph": "kept",
        "engines": "nothing to check",
        "score": "kept",
        "speed": "nothing to check",
    }
    text = " ".join(str(passed).split())
    assert passed.validation is not None
    assert passed.validation.score is not None
    assert f"model.onnx has accuracy {score_text(passed.validation.score)} on the test set" in text
    assert "4 stored weights hold 2:4" in text
    assert "of the run's own weights 4 keep their pattern" in text
    assert "McNemar p 1" in text
    assert "PASSED. Kept: files, weights, graph, score. Nothing to check: engines, speed." in text
    check_gate(passed)


def test_the_results_can_be_read_by_machines(passed: Gate, tmp_path: Path) -> None:
    document, junit = write_results(tmp_path / "results", passed)
    assert (document.name, junit.name) == ("gate.json", "gate.junit.xml")
    read = json.loads(document.read_bytes())
    assert (read["kind"], read["passed"], len(read["links"])) == ("gate", True, 6)
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    assert suite is not None
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "0",
        "errors": "0",
        "skipped": "2",
    }
    points = suite.find("testcase[5]/properties/property[@name='difference']")
    assert points is not None
    assert float(points.get("value", "nan")) == 0.0


def test_a_packed_bundle_with_its_dense_form_passes(
    runs: dict[str, Run], dense: Bundle, tmp_path: Path
) -> None:
    bundle = build(runs["sparse"].path, tmp_path / "both", onnx="both")
    found = gate(bundle.path, dense.path, n_threads=1)
    assert found.passed, found.verdict


def test_another_dense_form_than_the_packed_one_breaks_the_graph(
    runs: dict[str, Run], dense: Bundle, tmp_path: Path
) -> None:
    bundle = build(runs["sparse"].path, tmp_path / "both", onnx="both")
    model = onnx.load(bundle.path / "model-dense.onnx")
    a_tensor(model, "fc2.bias", lambda values: values.fill(0.0))
    onnx.save(model, bundle.path / "model-dense.onnx")
    rewrite(bundle.path)
    reason = broken_at(gate(bundle.path, dense.path), "graph", 6)
    assert "is not the graph of model.onnx with dense weights" in reason


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_bundle_of_another_precision_passes(
    precision: str, runs: dict[str, Run], dense: Bundle, tmp_path: Path
) -> None:
    bundle = build(runs["sparse"].path, tmp_path / precision, precision=precision)  # type: ignore[arg-type]
    found = gate(bundle.path, dense.path, n_threads=1, max_drop=5.0)
    assert found.passed, found.verdict
    (weights,) = (link for link in found.links if link.name == "weights")
    counted = weights.figures["n_nonzero"]
    assert isinstance(counted, int)
    assert 0.9 * bundle.info.n_nonzero < counted <= bundle.info.n_nonzero  # rounding may make zeros


def test_a_file_that_was_changed_breaks_the_files(copied: Path, dense: Bundle) -> None:
    content = bytearray((copied / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "model.onnx").write_bytes(content)
    found = gate(copied, dense.path)
    assert "model.onnx is not the file that was written" in broken_at(found, "files", 6)
    with pytest.raises(ArtefactError, match="The link 'files' is broken"):
        check_gate(found)


def test_a_manifest_that_is_damaged_breaks_the_files(copied: Path, dense: Bundle) -> None:
    (copied / "manifest.json").write_text("{")
    assert "is not JSON" in broken_at(gate(copied, dense.path), "files", 6)


def test_a_table_of_layers_that_is_not_listed_breaks_the_files(copied: Path, dense: Bundle) -> None:
    info = read_bundle_info(copied)
    files = {name: fact for name, fact in info.files.items() if name != "layers.json"}
    save_bundle_info(copied, replace(info, files=files))
    assert "lists no layers.json" in broken_at(gate(copied, dense.path), "files", 6)


def test_a_weight_that_breaks_its_pattern_breaks_the_weights(spoil: Spoil, dense: Bundle) -> None:
    bundle = spoil(lambda model: a_tensor(model, "fc1.weight", a_third_in_a_group))
    found = gate(bundle, dense.path)
    reason = broken_at(found, "weights", 3)
    assert "fc1.weight, promised 2:4: 1 of" in reason
    with pytest.raises(GateFailed, match="The link 'weights' is broken"):
        check_gate(found)


def test_a_weight_that_its_mask_leaves_out_breaks_the_weights(dense: Bundle, tmp_path: Path) -> None:
    bundle = build(digits_run(tmp_path / "run"), tmp_path / "bundle")

    def revive(values: np.ndarray) -> None:
        values[tuple(index[0] for index in np.nonzero(values == 0))] = 1e-3

    model = onnx.load(bundle.onnx_path)
    a_tensor(model, "conv2.weight", revive)
    onnx.save(model, bundle.onnx_path)
    rewrite(bundle.path)
    assert "conv2.weight: " in broken_at(gate(bundle.path, dense.path, max_drop=100.0), "weights", 3)


def test_the_runs_own_weights_are_counted_too(
    runs: dict[str, Run], sparse: Bundle, dense: Bundle, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["sparse"].path, run)
    for name, kind in (("model", "weight"), ("masks", "mask")):
        tensors = load_file(run / f"{name}.safetensors")
        tensor = tensors["fc1.weight"].clone()
        filled = int(tensor[0, :4].nonzero()[0].item())
        empty = 4 + int((tensor[0, 4:8] == 0).nonzero()[0].item())
        tensor[0, empty], tensor[0, filled] = tensor[0, filled].clone(), tensor[0, empty].clone()
        save_file({**tensors, "fc1.weight": tensor}, run / f"{name}.safetensors")
        assert tensor.dtype == (torch.float32 if kind == "weight" else torch.bool)
    info = runs["sparse"].info
    save_run_info(run, replace(info, files=file_infos(run, info.files)))
    bundle = tmp_path / "bundle"
    shutil.copytree(sparse.path, bundle)
    rewrite(bundle, run=replace(sparse.info.run, path=str(run), run_sha256=sha256_file(run / "run.json")))
    reason = broken_at(gate(bundle, dense.path), "weights", 3)
    assert "fc1.weight of the run, promised 2:4: 1 groups have more nonzeros" in reason


def test_a_run_that_is_not_here_is_told(spoil: Spoil, dense: Bundle) -> None:
    found = gate(spoil(lambda model: None), dense.path, n_threads=1)
    assert found.passed, found.verdict
    assert "the run /nowhere/run is not here" in " ".join(found.links[1].told)


def test_a_promised_weight_that_is_no_constant_any_more_breaks_the_graph(spoil: Spoil, dense: Bundle) -> None:
    def detach(model: onnx.ModelProto) -> None:
        graph = model.graph
        (node,) = (node for node in graph.node if "fc2.weight" in node.input)
        graph.node.insert(0, helper.make_node("ReduceSum", ["input"], ["all"], keepdims=0))
        graph.node.insert(1, helper.make_node("Sub", ["all", "all"], ["none"]))
        graph.node.insert(2, helper.make_node("Add", ["fc2.weight", "none"], ["moved"]))
        node.input[list(node.input).index("fc2.weight")] = "moved"

    reason = broken_at(gate(spoil(detach), dense.path), "graph", 3)
    assert "fc2.weight, promised 2:4: it is not the weight of a layer there" in reason


def test_a_graph_without_one_of_its_activations_breaks_the_graph(spoil: Spoil, dense: Bundle) -> None:
    def bypass(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "Relu")
        node.op_type = "Identity"

    assert "gives another answer than the stored one" in broken_at(
        gate(spoil(bypass), dense.path), "graph", 3
    )


def test_other_layers_than_those_that_were_built_break_the_graph(spoil: Spoil, dense: Bundle) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Gemm").name = "another"

    assert "has node another" in broken_at(gate(spoil(rename), dense.path), "graph", 6)


def with_engine(folder: Path, onnx_sha256: str) -> None:
    """Put a file that looks like an engine into a bundle."""
    (folder / "engines").mkdir()
    (folder / ENGINE).write_bytes(header(100, VERSION))
    fact = engine_fact(file=ENGINE, version=VERSION, onnx_sha256=onnx_sha256)
    rewrite(folder, add=(ENGINE,), engines=(fact,))


def test_an_engine_of_this_graph_passes(copied: Path, dense: Bundle) -> None:
    digest = sha256_file(copied / "model.onnx")
    with_engine(copied, digest)
    found = gate(copied, dense.path, n_threads=1, runtimes=["onnxruntime-cpu"])
    assert found.passed, found.verdict
    assert f"{ENGINE} was built from this graph, {digest[:12]}" in " ".join(found.links[3].told)


def test_an_engine_of_another_graph_breaks_the_engines(copied: Path, dense: Bundle) -> None:
    with_engine(copied, sha256_file(copied / "golden" / "input.npy"))
    assert "was built from the graph" in broken_at(gate(copied, dense.path), "engines", 6)


def test_an_engine_that_nobody_vouched_for_breaks_the_engines(
    copied: Path, dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_engine(copied, sha256_file(copied / "model.onnx"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "somebody-else"))
    found = gate(copied, dense.path)
    assert "--trust" in broken_at(found, "engines", 6)
    assert found.links[3].error == "NotTrustedError"
    digest = sha256_file(copied / "manifest.json")
    assert gate(copied, dense.path, trust=digest, n_threads=1, runtimes=["onnxruntime-cpu"]).passed


def test_the_digests_of_an_engine_and_of_a_factory_are_named_at_once(
    copied: Path, dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the engine's was asked for only after that of the run was given."""
    module, masks = network_and_masks(density=0.5)
    run = save_run(tmp_path / "run", module, masks, name="no_such_module:net")
    with_engine(copied, sha256_file(copied / "model.onnx"))
    reference = RunReference(path=str(run.path), run_sha256=sha256_file(run.path / "run.json"))
    rewrite(copied, run=reference)
    needed = [sha256_file(copied / "manifest.json"), reference.run_sha256]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "somebody-else"))
    options = " ".join(f"--trust {digest}" for digest in needed)
    assert options in broken_at(gate(copied, dense.path), "weights", 6)
    with pytest.raises(NotTrustedError, match=options):
        validate(copied, runtimes=["tensorrt"])


def test_lost_accuracy_breaks_the_accuracy_with_its_figures(dense: Bundle, tmp_path: Path) -> None:
    others = [build(digits_run(tmp_path / f"run-{seed}", density=1.0, seed=seed)) for seed in (6, 7)]
    worst, *_, best = sorted((dense, *others), key=lambda one: one.info.score.figure)  # type: ignore[union-attr]
    assert worst.info.score is not None
    assert best.info.score is not None
    lost = best.info.score.figure - worst.info.score.figure
    assert lost > 1
    found = gate(worst.path, best.path, n_threads=1)
    reason = broken_at(found, "score", 3)
    assert f"model.onnx is {lost:.2f} points below the dense bundle" in reason
    assert found.links[4].figures["difference"] == pytest.approx(-lost)
    assert found.validation is not None
    assert gate(worst.path, best.path, n_threads=1, max_drop=lost).passed


def test_data_that_are_not_here_break_the_accuracy(copied: Path, dense: Bundle, tmp_path: Path) -> None:
    against = tmp_path / "dense"
    shutil.copytree(dense.path, against)
    for folder in (copied, against):
        info = read_bundle_info(folder)
        assert info.data is not None
        rewrite(folder, data=replace(info.data, name="mnist"))
    found = gate(copied, against, data_dir=tmp_path / "no-data")
    broken_at(found, "score", 5)
    assert found.links[4].error == "DataNotFound"


def test_a_speed_that_is_not_reached_breaks_the_speed(sparse: Bundle, dense: Bundle, tmp_path: Path) -> None:
    found = gate(sparse.path, dense.path, require_speedup=5.0, **QUICK)
    assert "at batch 1" in broken_at(found, "speed", 4)
    (comparison,) = found.comparisons
    low = comparison.latency[0].ratio.low
    assert found.links[5].figures["batch_1_speedup_low"] == low
    with pytest.raises(SpeedupNotReached):
        check_gate(found)
    junit = ElementTree.parse(write_results(tmp_path, found)[1]).getroot()
    (failure,) = junit.iter("failure")
    assert failure.get("type") == "SpeedupNotReached"


def test_a_speed_that_is_reached_passes(sparse: Bundle, tmp_path: Path) -> None:
    wide = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.Linear(2048, 10)
    )
    run = save_run(
        tmp_path / "run", wide, {}, name=None, fact=digits_fact(), test=digits_accuracy(wide.eval())
    )
    slow = build(replace(run, module=wide))
    found = gate(sparse.path, slow.path, max_drop=100.0, require_speedup=1.01, **QUICK)
    assert found.passed, found.verdict
    assert f"{found.links[5].figures['batch_1_speedup']:.3f}x" in str(found)


def test_speed_is_measured_where_it_is_deployed_and_nowhere_in_silence(
    sparse: Bundle, dense: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each runtime that is named, else by whatever `compare` finds best; engines that did not run are
    named.
    """
    asked: list[str | None] = []
    asked_of = importlib.import_module("sparse_export.evaluate.gate")

    def played(*bundles: Bundle, runtime: str | None, **options: Any) -> Comparison:
        asked.append(runtime)
        found = compare(*bundles, runtime="onnxruntime-cpu", **options)
        low, name = (1.5, "tensorrt") if runtime is None else (1.0, runtime)
        (at,) = found.latency
        at = replace(at, ratio=replace(at.ratio, low=low, estimate=1.6))
        missed = None if low > 1 else "The speed-up is as played."
        return replace(found, runtime=name, latency=(at,), speedup_missed=missed, passed_over={"a": "of b"})

    def with_engine(*args: Any, **options: Any) -> Validation:
        found = validate(*args, **options)
        return replace(found, not_run={"tensorrt-rtx": "there is no GPU"})

    monkeypatch.setattr(asked_of, "compare", played)
    monkeypatch.setattr(asked_of, "validate", with_engine)
    best = gate(sparse.path, dense.path, require_speedup=1.2, max_drop=100.0, **QUICK)
    assert (asked, best.passed) == ([None], True)
    assert "measured with tensorrt," in str(best)
    assert "a is passed over: of b" in str(best)
    assert "Not run here, so not vouched for: tensorrt-rtx." in best.verdict
    assert "not timed" not in best.verdict  # the engine that was played
    named = gate(
        sparse.path,
        dense.path,
        require_speedup=1.2,
        max_drop=100.0,
        runtimes=["onnxruntime-cpu", "onnxruntime-cpu"],
        **QUICK,
    )
    assert asked == [None, "onnxruntime-cpu", "onnxruntime-cpu"]
    assert "With onnxruntime-cpu: The speed-up is as played." in broken_at(named, "speed", 4)
    assert {"batch_1_speedup_low", "onnxruntime-cpu_batch_1_speedup_low"} <= set(named.links[5].figures)


@pytest.mark.parametrize("timed", ["onnxruntime-cpu", "tensorrt", "tensorrt-rtx"])
def test_an_engine_that_was_not_timed_is_named_beside_a_speed_that_was_kept(
    timed: str, dense: Bundle, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fast(*bundles: Bundle, **options: Any) -> Comparison:
        return replace(compare(*bundles, **options), speedup_missed=None, runtime=timed)

    monkeypatch.setattr(importlib.import_module("sparse_export.evaluate.gate"), "compare", fast)
    with_engine(copied, sha256_file(copied / "model.onnx"))
    found = gate(copied, dense.path, require_speedup=1.2, max_drop=100.0, **QUICK)
    assert found.passed, found.verdict
    told = "The speed is not that of its engines: not timed on tensorrt-rtx." in found.verdict
    assert told == (timed != "tensorrt-rtx")


def test_a_speed_up_over_another_precision_is_no_promise_that_can_be_kept(
    sparse: Bundle, copied: Path
) -> None:
    rewrite(copied, precision="int8")
    found = gate(copied, sparse.path, require_speedup=1.2, max_drop=100.0, **QUICK)
    assert "which computes in int8" in broken_at(found, "speed", 2)
    assert found.comparisons == ()


def test_junit_keeps_what_xml_cannot_hold_out(passed: Gate) -> None:
    odd = replace(passed, bundle="caf\udce9\x01 <&> \"'")
    case = next(ElementTree.fromstring(junit_xml(odd.bundle, odd.links, odd.created)).iter("testcase"))
    assert case.get("classname") == "caf\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} <&> \"'"


@pytest.mark.parametrize(
    "options", [{"max_drop": -1.0}, {"max_drop": float("nan")}, {"require_speedup": 0.5}]
)
def test_bounds_that_are_none_are_refused(options: dict[str, float], sparse: Bundle, dense: Bundle) -> None:
    with pytest.raises(UsageError):
        gate(sparse.path, dense.path, **options)  # type: ignore[arg-type]


def test_a_bundle_that_is_not_there_is_wrong_usage(dense: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        gate(tmp_path / "nothing", dense.path)


def test_a_runtime_that_is_none_is_refused_before_the_work(sparse: Bundle, dense: Bundle) -> None:
    with pytest.raises(UnknownNameError, match="no runtime named 'onnxrt'"):
        gate(sparse.path, dense.path, runtimes=["onnxrt"])


def test_wrong_usage_that_is_found_on_the_way_breaks_its_link_and_is_written(
    sparse: Bundle, copied: Path, tmp_path: Path
) -> None:
    info = read_bundle_info(copied)
    assert info.data is not None
    rewrite(copied, data=replace(info.data, test_sha256="0" * 64))
    found = gate(sparse.path, copied)
    assert "the very same samples" in broken_at(found, "score", 2)
    (error,) = ElementTree.parse(write_results(tmp_path, found)[1]).getroot().iter("error")
    assert error.get("type") == "UsageError"
    with pytest.raises(UsageError, match="The link 'score' is broken"):
        check_gate(found)


def test_an_unknown_name_that_breaks_a_link_is_told_as_it_was(passed: Gate) -> None:
    """Its class makes its own sentence of a name, and takes none."""
    broken = replace(passed.links[4], outcome="broken", error="UnknownNameError", reason="No such thing.")
    with pytest.raises(UsageError, match="The link 'score' is broken: No such thing"):
        check_gate(replace(passed, links=(broken,)))


def test_labels_that_do_not_fit_the_outputs_break_the_link_of_accuracy(
    sparse: Bundle, dense: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = data.load_test_set

    def shifted(*args: Any, **options: Any) -> Any:
        inputs, labels = genuine(*args, **options)
        return inputs, labels + 6

    monkeypatch.setattr(data, "load_test_set", shifted)
    reason = broken_at(gate(sparse.path, dense.path, n_threads=1), "score", 2)
    assert "The labels of the test set of digits run from 6 to 15, outside the class numbers 0 to 9" in reason


def test_another_signature_than_the_files_breaks_the_graph(copied: Path, dense: Bundle) -> None:
    rewrite(copied, signature=class_signature((1, 8, 8), 5))
    reason = broken_at(gate(copied, dense.path, n_threads=1), "graph", 6)
    assert "has the outputs logits float32 (batch, 10)" in reason
