"""The command `sparsify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparse_export as se
from tests.cli.conftest import Call, Made


def test_a_run_is_sparsified_and_the_steps_are_shown(made: Made, call: Call, tmp_path: Path) -> None:
    words = ("sparsify", made.dense_run, "--permute", "--norms", "--calibration-samples", 64)
    result = call(*words, "--keep-dense", "conv*", "--finetune", 1, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run")
    lines = [line.split() for line in result.stdout.splitlines()]
    steps = {words[0]: words for words in lines if words and words[0] in _STEPS}
    assert list(steps) == list(_STEPS)
    assert steps["original"][3] == steps["permuted"][3]
    kinds = {words[0]: words[2] for words in lines if words and words[0].endswith(".weight")}
    assert (kinds["conv2.weight"], kinds["fc1.weight"], kinds["fc2.weight"]) == ("dense", "2:4", "dense")
    assert "epoch 1/1" in result.stderr
    built = call("build", tmp_path / "run", "--onnx", "packed", "--out", tmp_path / "bundle")
    assert built.exit_code == 0, built.stderr
    info = se.open_run(tmp_path / "run").info
    assert f"{info.test.figure:.2f}" in " ".join(steps["fine-tuned"]) if info.test else False


_STEPS = ("original", "permuted", "sparsified", "fine-tuned")


def test_json_is_the_report_with_the_runs_folder(made: Made, call: Call, tmp_path: Path) -> None:
    result = call("sparsify", made.sparse_run, "--data", "none", "--out", tmp_path / "run", "--json")
    document = json.loads(result.stdout)
    assert document.pop("run") == str(tmp_path / "run")
    assert document == json.loads((tmp_path / "run" / "sparsify.json").read_text())
    assert (document["pattern"], document["method"], document["n_calibration"]) == ("2:4", "magnitude", 0)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("resnet18",), 2, "--weights pretrained, random or FILE"),
        (("digits-cnn", "--weights", "random", "--method", "activation"), 2, "Give --data NAME"),
        (("digits-cnn", "--weights", "random", "--pattern", "two"), 2, "'two' is not a pattern"),
        (("digits-cnn", "--weights", "random", "--input-shape", "3,x"), 2, "--input-shape is '3,x'"),
        (("digits-cnn", "--weights", "random", "--data", "mnist", "--data-dir", "none"), 5, "mnist"),
        (("digits-cnn", "--weights", __file__), 6, "never unpickled"),
        (("nothing/here",), 2, "does not exist"),
    ],
)
def test_what_goes_wrong_ends_with_its_code_and_leaves_nothing(
    words: tuple[str, ...], code: int, told: str, call: Call, tmp_path: Path
) -> None:
    result = call("sparsify", *words, "--out", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_finished_run_in_the_way_is_not_said_to_be_resumable(tmp_path: Path) -> None:
    """Before, `--resume` was advised, which is no option of sparsify, and goes on with nothing."""
    from sparse_export.errors import UsageError
    from sparse_export.train.run_folder import require_empty
    from tests.making_runs import network_and_masks, save_run

    save_run(tmp_path / "run", *network_and_masks(density=1.0))
    with pytest.raises(UsageError, match=r"already holds a run\..*Choose another one with --out\.$"):
        require_empty(tmp_path / "run")
