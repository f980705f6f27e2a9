"""The options of `sparsify` by which layers are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from sparse_export.oneshot import layer_sensitivities
from tests.cli.conftest import Call, Made
from tests.oneshot.choosable import LAYERS, choosable, write_data


def test_a_dry_run_shows_the_layers_and_writes_nothing(made: Made, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = call("sparsify", made.dense_run, "--dry-run", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    found = layer_sensitivities(made.dense_run)
    assert [one["name"] for one in document["layers"]] == [one.name for one in found.layers]
    shown = call("sparsify", made.dense_run, "--dry-run", "--out", out)
    assert found.layers[0].name in shown.stdout
    assert not out.exists()
    refused = call("sparsify", made.dense_run, "--dry-run", "--permute")
    assert (refused.exit_code, "exclude each other" in refused.stderr) == (2, True)


def test_the_curve_and_the_share_are_shown(made: Made, call: Call, tmp_path: Path) -> None:
    result = call("sparsify", made.dense_run, "--max-drop", "30", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "layers that could be are sparse: 100.0 % of their multiply-adds" in words
    assert "multiply-adds sparse" in words
    assert "30 might be lost" in words
    assert "score 1:" in result.stderr


def test_exit_3_where_no_layer_may_be_sparse(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(choosable(sensitive=LAYERS), file)
    write_data(file)
    words = ("--task", "classification", "--data", f"npz:{tmp_path / 'data.npz'}", "--max-drop", "0")
    result = call("sparsify", file, *words, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 3, result.stderr
    assert json.loads(result.stdout)["error"]["exit_code"] == 3
    assert "No layer can be made sparse" in result.stderr
    assert not (tmp_path / "run").exists()
