"""Each command on a real, briefly trained network."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from sparse_export.cli.build import _bundle_shown
from sparse_export.cli.main import cli
from sparse_export.formats.bundle import Bundle, read_bundle_info
from sparse_export.tasks.data import dataset
from tests.cli.conftest import Call, Made
from tests.sealing import write_sealed

QUICK = ("--batch", "1", "--rounds", "20", "--threads", "1")


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed here has to be timed, not to be steady."""
    for module, name in (
        ("sparse_export.evaluate.compare", "compare"),
        ("sparse_export.evaluate.bench", "bench"),
        ("sparse_export.evaluate.bench_train", "bench_training_step"),
    ):
        short = functools.partial(
            getattr(importlib.import_module(module), name), block_s=0.001, warmup_limit_s=0.05
        )
        monkeypatch.setattr(f"{module}.{name}", short)


def _document(result: Result) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_build_prints_the_path_it_wrote_and_nothing_else_on_the_last_line(
    made: Made, call: Call, tmp_path: Path
) -> None:
    result = call("build", made.sparse_run, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_build_with_json_gives_the_manifest(made: Made, call: Call, tmp_path: Path) -> None:
    document = _document(call("build", made.sparse_run, "--out", tmp_path / "bundle", "--json"))
    assert document["bundle"] == str(tmp_path / "bundle")
    assert document["manifest"] == json.loads((tmp_path / "bundle" / "manifest.json").read_text())


def test_build_tells_an_unknown_target_the_known_ones(made: Made, call: Call, tmp_path: Path) -> None:
    result = call("build", made.sparse_run, "--out", tmp_path / "bundle", "--target", "onx")
    assert (result.exit_code, "Did you mean 'onnx'?" in result.stderr) == (2, True)


def test_build_of_what_is_not_there_is_wrong_usage(call: Call, tmp_path: Path) -> None:
    result = call("build", tmp_path / "nothing", "--json")
    assert (result.exit_code, _document(result)["error"]["type"]) == (2, "UsageError")


@pytest.mark.parametrize("part", ["sparse_run", "sparse", "sparse/model.onnx"])
def test_inspect_shows_layers_of_a_run_a_bundle_and_a_graph(part: str, made: Made, call: Call) -> None:
    name, _, below = part.partition("/")
    path = getattr(made, name) / below
    text = call("inspect", path)
    assert (text.exit_code, "density" in text.stdout) == (0, True)
    document = _document(call("inspect", path, "--json"))
    assert (document["path"], len(document["layers"]) > 1) == (str(path), True)


def _graph_with_a_weight_named(name: str, file: Path) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"])],
        "one",
        [value("x", TensorProto.FLOAT, [1, 4])],
        [value("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(np.ones((4, 2), np.float32), name)],
    )
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), file)
    return file


@pytest.mark.parametrize(
    ("name", "shown"), [("\x1b[31mfc", "\\x1b[31mfc"), ("[red]fc[/red]", "[red]fc[/red]"), ("[/]", "[/]")]
)
def test_a_weight_named_by_commands_of_a_terminal_or_by_markup_is_shown_as_text(
    name: str, shown: str, tmp_path: Path, call: Call
) -> None:
    file = _graph_with_a_weight_named(name, tmp_path / "odd.onnx")
    assert shown in call("inspect", file).stdout
    assert _document(call("inspect", file, "--json"))["layers"][0]["name"] == name


def test_a_terminal_of_80_columns_is_shown_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    file = _graph_with_a_weight_named("[red]" + "layer." * 30, tmp_path / "long.onnx")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit, match="0"):
        cli(["inspect", str(file)])
    monkeypatch.undo()
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert max(map(len, text.splitlines())) <= 80
    wide = CliRunner().invoke(cli, ["inspect", str(file)]).stdout
    assert sorted(re.sub(r"\s", "", text)) == sorted(re.sub(r"\s", "", wide))


def test_inspect_of_a_run_and_its_bundle_agree_on_the_weights_kept(made: Made, call: Call) -> None:
    run, bundle = (_document(call("inspect", path, "--json")) for path in (made.sparse_run, made.sparse))
    assert run["n_nonzero"] == bundle["n_nonzero"]


def test_validate_passes_a_bundle_as_it_was_built(made: Made, call: Call, tmp_path: Path) -> None:
    result = call("validate", made.sparse, "--max-drop", "0", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    assert _document(result)["parity_ok"]
    assert (tmp_path / "validation.json").is_file()


def test_validate_of_what_is_not_there_makes_no_folder(made: Made, call: Call, tmp_path: Path) -> None:
    for words in ((tmp_path / "nosuch",), (made.sparse, "--against", tmp_path / "nosuch")):
        assert call("validate", *words, "--out", tmp_path / "results").exit_code == 2
        assert not (tmp_path / "results").exists()


def test_validate_of_a_changed_file_ends_with_six(made: Made, call: Call, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(made.sparse, bundle)
    with (bundle / "model.onnx").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff\x00\xff")
    result = call("validate", bundle, "--json")
    assert (result.exit_code, _document(result)["error"]["type"]) == (6, "ArtefactError")


def _worse(bundle: Path, folder: Path) -> Path:
    """The bundle with a manifest that promises more than it does."""
    shutil.copytree(bundle, folder)
    manifest = folder / "manifest.json"
    document = json.loads(manifest.read_text())
    document["score"]["n_correct"] = document["score"]["n_samples"]
    write_sealed(manifest, document)
    return folder


def test_a_missed_gate_prints_its_document_all_the_same_and_ends_with_three(
    made: Made, call: Call, tmp_path: Path
) -> None:
    bundle = _worse(made.sparse, tmp_path / "bundle")
    result = call("validate", bundle, "--max-drop", "0", "--json")
    assert result.exit_code == 3
    assert _document(result)["drop"] > 0
    assert result.stderr.startswith("Error: ")


def test_compare_measures_accuracy_and_time_and_writes_what_it_prints(
    made: Made, call: Call, tmp_path: Path
) -> None:
    result = call("compare", made.dense, made.sparse, *QUICK, "--out", tmp_path / "results", "--json")
    assert result.exit_code == 0, result.stderr
    document = _document(result)
    assert (document["score_source"], [at["batch"] for at in document["latency"]]) == ("measured", [1])
    written = json.loads((tmp_path / "results" / "comparison.json").read_text())
    assert {key: written[key] for key in document} == document


def test_compare_writes_a_page_with_the_curves_of_both_runs(made: Made, call: Call, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    result = call("compare", made.dense, made.sparse, *QUICK, "--html", page)
    assert (result.exit_code, f"wrote {page}" in result.stderr) == (0, True)
    assert page.read_text().count("<svg") == 9


def test_compare_prints_a_table_for_people(made: Made, call: Call) -> None:
    result = call("compare", made.dense, made.sparse, *QUICK)
    assert (result.exit_code, "as fast" in result.stdout, "rounds" in result.stderr) == (0, True, True)


def test_a_speedup_that_is_not_reached_ends_with_four_after_the_table(made: Made, call: Call) -> None:
    result = call("compare", made.dense, made.sparse, *QUICK, "--require-speedup", "50")
    assert result.exit_code == 4
    assert "as fast" in result.stdout
    assert "Error: The speed-up is" in result.stderr


def test_compare_of_several_candidates_gives_one_table_one_file_and_one_page(
    made: Made, call: Call, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    words = (made.dense, made.sparse, made.dense, *QUICK, "--html", page, "--out", tmp_path / "out")
    result = call("compare", *words, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert list(document["candidates"]) == ["sparse", "dense"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == document
    assert "dense against 2 candidates" in page.read_text()
    assert call("compare", made.dense, made.sparse, made.sparse, *QUICK).exit_code == 2


@pytest.mark.parametrize(
    "words",
    [("compare", "dense", "sparse"), ("bench", "sparse"), ("validate", "sparse", "--against", "dense")],
)
@pytest.mark.parametrize("option", [("--size", "height=4"), ("--axes", "input=batch,1,8,8")])
def test_sizes_are_not_told_of_bundles(
    words: tuple[str, ...], option: tuple[str, ...], made: Made, call: Call
) -> None:
    paths = {"dense": made.dense, "sparse": made.sparse}
    result = call(*(paths.get(word, word) for word in words), *option)
    assert result.exit_code == 2
    assert f"{option[0]} was given, and " in result.stderr and "on record" in result.stderr


def test_compare_falls_back_to_recorded_accuracies_aloud(made: Made, call: Call, tmp_path: Path) -> None:
    bundles = []
    for bundle in (made.dense, made.sparse):
        copy = tmp_path / bundle.name
        shutil.copytree(bundle, copy)
        manifest = copy / "manifest.json"
        document = json.loads(manifest.read_text())
        document["data"]["name"] = "npz:absent.npz"
        write_sealed(manifest, document)
        bundles.append(copy)
    result = call("compare", *bundles, *QUICK, "--data-dir", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    assert _document(result)["score_source"] == "recorded"
    assert "Comparing the recorded scores." in result.stderr


def test_compare_refuses_another_test_set(made: Made, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_export.tasks import data

    load = data.load

    def other(*words: Any, **options: Any) -> dataset.DataSet:
        found = load(*words, **options)
        found.y_test[0] = (found.y_test[0] + 1) % 10
        return found

    monkeypatch.setattr(data, "load", other)
    result = call("compare", made.dense, made.sparse, *QUICK)
    assert (result.exit_code, "differ from those that the run was tested on" in result.stderr) == (6, True)


@pytest.mark.parametrize("sizes", ["1;2", "one", "", "0", "2,2"])
def test_compare_refuses_batch_sizes_without_meaning(sizes: str, made: Made, call: Call) -> None:
    result = call("compare", made.dense, made.sparse, "--batch", sizes)
    assert (result.exit_code, result.stdout) == (2, "")


def test_compare_finds_out_that_it_cannot_write_before_it_measures(
    made: Made, call: Call, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = call("compare", made.dense, made.sparse, "--out", tmp_path / "file")
    assert (result.exit_code, "Cannot write" in result.stderr, "rounds" in result.stderr) == (1, True, False)


def test_bench_prints_a_row_for_each_batch_and_writes_the_document(
    made: Made, call: Call, tmp_path: Path
) -> None:
    words = ("bench", made.sparse, "--batch", "1,2", "--rounds", 20, "--threads", 1, "--out", tmp_path)
    result = call(*words, "--runtime", "onnxruntime-cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = _document(result)
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["rows"] == document["rows"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--batch", "one"), 2),
        (("--batch", "0"), 2),
        (("--runtime", "onnxruntime"), 2),
        (("--rounds", "3"), 2),
        (("--threads", "0"), 2),
    ],
)
def test_bench_refuses_options_without_meaning(
    words: tuple[str, ...], code: int, made: Made, call: Call
) -> None:
    assert call("bench", made.sparse, *words).exit_code == code


def test_bench_of_what_is_no_bundle_says_so(made: Made, call: Call, tmp_path: Path) -> None:
    assert call("bench", tmp_path / "nothing").exit_code == 2
    assert call("bench", made.sparse_run).exit_code == 6


def test_bench_train_splits_a_step_and_ends_with_4_when_too_little_is_gained(
    call: Call, tmp_path: Path
) -> None:
    words = ("bench-train", "digits", "--rounds", 20, "--threads", 1, "--batch", 4, "--device", "cpu")
    result = call(*words, "--require-speedup", 50, "--out", tmp_path, "--json")
    assert result.exit_code == 4, result.stderr
    document = _document(result)
    assert set(document["sparse"]["part_ms"]) == {"forward", "backward", "optimizer", "masks"}
    assert json.loads((tmp_path / "bench-train.json").read_text())["ratio"] == document["ratio"]


def test_bench_train_tells_an_unknown_recipe_the_nearest(call: Call) -> None:
    result = call("bench-train", "digit")
    assert (result.exit_code, "digits" in result.stderr) == (2, True)


def test_gate_tells_every_link_and_writes_both_files(made: Made, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "results"
    result = call("gate", made.sparse, "--against", made.dense, "--max-drop", 100, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "PASSED. Kept: files, weights, graph, score." in result.stdout
    assert {path.name for path in out.iterdir()} == {"gate.json", "gate.junit.xml"}


def test_gate_ends_with_the_code_of_the_broken_link_after_its_results(
    made: Made, call: Call, tmp_path: Path
) -> None:
    shutil.copytree(made.sparse, tmp_path / "bundle")
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"")
    result = call(
        "gate", tmp_path / "bundle", "--against", made.dense, "--out", tmp_path / "results", "--json"
    )
    assert result.exit_code == 6
    document = _document(result)
    assert [link["outcome"] for link in document["links"]] == ["broken", *["not run"] * 5]
    assert "The link 'files' is broken" in result.stderr
    assert json.loads((tmp_path / "results" / "gate.json").read_text()) == document


def test_gate_of_what_is_not_there_leaves_no_folder(made: Made, call: Call, tmp_path: Path) -> None:
    result = call("gate", tmp_path / "nothing", "--against", made.dense, "--out", tmp_path / "results")
    assert (result.exit_code, (tmp_path / "results").exists()) == (2, False)


_MOMENTS = {  # command -> a function that it calls when it has temporary files
    "build": "sparse_export.building.bundle.write_golden",
    "build engine": "sparse_export.engines.build._run",
    "sparsify": "sparse_export.oneshot.steps.finish_run",
    "package": "sparse_export.serving.package.deployment_files",
}


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=[pytest.mark.tensorrt] * name.endswith("engine")) for name in _MOMENTS],
)
def test_sigterm_ends_a_command_with_130_and_leaves_no_temporary_file(
    command: str, made: Made, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, temporary = tmp_path / "place" / "out", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    seen: list[str] = []

    def terminated(*_: object, **__: object) -> None:
        seen.extend(path.name for folder in (temporary, out.parent) for path in folder.iterdir())
        for _time in range(2):  # as `timeout` does, to the process and to its group
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(_MOMENTS[command], terminated)
    words: dict[str, tuple[object, ...]] = {
        "build": ("build", made.sparse_run),
        "build engine": ("build", made.sparse_run, "--target", "tensorrt-rtx"),
        "sparsify": ("sparsify", made.dense_run, "--data", "none"),
        "package": ("package", made.sparse, "--runtime", "python"),
    }
    result = call(*words[command], "--out", out, "--json")
    assert (result.exit_code, _document(result)["error"]["message"]) == (130, "Interrupted.")
    assert any(name.endswith(".tmp") for name in seen)
    assert any(name.startswith("sparse-export-work-") for name in seen) == (command == "build engine")
    assert (list(temporary.iterdir()), list(out.parent.iterdir())) == ([], [])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_table_of_build_fits_a_narrow_terminal(made: Made, call: Call, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    text = call("build", made.sparse_run, "--pattern", "2:4", "--compact", "--out", bundle).stdout
    info = read_bundle_info(bundle)
    assert info.fitted is not None
    assert info.compacted is not None
    drawn = _bundle_shown(Bundle(path=bundle, info=info), "dense").draw(width=80)
    assert max(map(len, drawn.splitlines())) <= 80
    for layer in info.fitted.layers:
        assert layer.name in text
        assert layer.name in drawn.replace("\n", "")


def test_a_model_that_is_not_there_is_told_with_all_that_could_be(call: Call, tmp_path: Path) -> None:
    told = call("build", tmp_path / "runs" / "missing")
    assert told.exit_code == 2
    assert "missing does not exist" in told.stderr
    for word in ("train", "sparsify", ".onnx file", "--weights"):
        assert word in told.stderr
