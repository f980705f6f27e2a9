"""`build --fold-preprocess`: the file that ships takes raw samples, and is measured on them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sparse_export.building import build
from sparse_export.building import fold_preprocess as module
from sparse_export.building.from_source import run_at
from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.preparation import RawType
from sparse_export.formats.run import read_run_info, save_run_info
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.passes.fold_preprocess import with_folded_preprocess
from sparse_export.tasks import data
from sparse_export.tasks.data.imagefolder import list_pictures
from sparse_export.tasks.data.pictures import decode
from tests.cli.conftest import Call
from tests.exporting import exported_once
from tests.making_runs import digits_accuracy, digits_fact, digits_run, network_and_masks, save_run
from tests.picture_runs import picture_folder, picture_run


def _logits(bundle: Bundle, raw: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    found: np.ndarray = session.run(None, {"input": raw})[0]
    return found


def _close(found: np.ndarray, wanted: np.ndarray, share: float = 1e-4) -> None:
    assert np.abs(found - wanted).max() < share * wanted.std()


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_raw_pictures_give_the_score_and_outputs_of_the_network(dtype: RawType, tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    with exported_once():
        bundle = build(run.path, tmp_path / "bundle", fold=dtype)
        plain = build(run.path, tmp_path / "plain")
    info = open_bundle(bundle.path).info
    assert info == bundle.info
    assert info.signature.inputs[0].dtype == dtype
    folded = info.folded
    assert folded is not None
    assert folded.levels and folded.dtype == dtype
    assert (folded.mean, folded.std) == (digits_fact().mean, digits_fact().std)
    assert 0 <= folded.largest_difference <= folded.allowed_difference == 3e-4
    digits = data.load("digits")
    wanted = _logits(plain, data.normalise(digits.x_test, digits.mean, digits.std).numpy())
    found = _logits(bundle, digits.x_test.numpy().astype(dtype))
    _close(found, wanted)
    np.testing.assert_array_equal(found.argmax(1), wanted.argmax(1))
    validation = validate(bundle.path, max_drop=0)
    check_gates(validation)
    assert validation.score == run.info.test


def test_zeros_and_a_pattern_stay_in_a_packed_file(tmp_path: Path) -> None:
    module, masks = network_and_masks(density=0.999)
    for name, parameter in module.named_parameters():
        if name in masks and parameter.shape[1] % 4 == 0:
            groups = torch.arange(parameter.shape[1]) % 4 < 2
            masks[name] = groups.view(1, -1, *(1,) * (parameter.dim() - 2)).expand_as(parameter).clone()
            with torch.no_grad():
                parameter.mul_(masks[name]).add_(0.0)
    run = save_run(tmp_path / "run", module, masks, fact=digits_fact(), test=digits_accuracy(module))
    with exported_once():
        plain = build(run.path, tmp_path / "plain")
        bundle = build(run.path, tmp_path / "bundle", fold="uint8", onnx="packed")
        whole = build(run.path, tmp_path / "whole", fold="uint8")
    assert bundle.info.n_nonzero - plain.info.n_nonzero <= 32  # a bias may be new
    weights = [
        {
            one.name: numpy_helper.to_array(one)
            for one in onnx.load(made.path / "model.onnx").graph.initializer
        }
        for made in (plain, whole)
    ]
    for name in masks:
        np.testing.assert_array_equal(weights[0][name] == 0, weights[1][name] == 0)
    check_gates(validate(bundle.path, max_drop=0))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_other_precisions_are_calibrated_and_measured_on_raw_samples(precision: str, tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    with exported_once():
        bundle = build(run.path, tmp_path / "bundle", fold="uint8", precision=precision)  # type: ignore[arg-type]
        plain = build(run.path, tmp_path / "plain", precision=precision)  # type: ignore[arg-type]
    validation = validate(bundle.path)
    check_gates(validation)
    scores = [one.score for one in (validation, validate(plain.path))]
    right = [score.n_correct for score in scores if score is not None]
    assert abs(right[0] - right[1]) < 0.03 * 400  # type: ignore[operator]


def test_floats_of_an_archive_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (30, 1, 8, 8)).astype(np.float32)
    y = np.arange(30) % 10
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    source = data.load(f"npz:{tmp_path / 'own.npz'}")
    fact = replace(digits_fact(), name=source.name, mean=source.mean, std=source.std)
    run = save_run(tmp_path / "run", *network_and_masks(), fact=fact)
    with pytest.raises(UsageError, match="are floats"):
        build(run.path, tmp_path / "bundle", fold="uint8")
    with exported_once():
        bundle = build(run.path, tmp_path / "bundle", fold="float32")
        plain = build(run.path, tmp_path / "plain")
    assert bundle.info.folded is not None and not bundle.info.folded.levels
    wanted = _logits(plain, data.normalise(source.x_test, source.mean, source.std).numpy())
    _close(_logits(bundle, x), wanted)


def test_pictures_of_a_folder_are_cropped_and_given_raw(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "set")
    run = picture_run(tmp_path / "run", root)
    with exported_once():
        bundle = build(run, tmp_path / "bundle", fold="uint8")
        plain = build(run, tmp_path / "plain")
    assert bundle.info.folded is not None and bundle.info.folded.place == "weight, behind a Sub"
    fact = bundle.info.data
    assert fact is not None
    raw = decode(list_pictures("x", root).test, (20, 16), fact.crop_ratio)
    _close(_logits(bundle, raw.numpy()), _logits(plain, data.normalise(raw, fact.mean, fact.std).numpy()))
    first = validate(bundle.path, task="classification", data=fact.name)
    second = validate(plain.path, task="classification", data=fact.name)
    assert first.score == second.score
    assert first.score is not None and first.score.n_correct


def test_bundles_that_take_other_samples_are_not_compared(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    with exported_once():
        raw = build(run.path, tmp_path / "raw", fold="float32")
        plain = build(run.path, tmp_path / "plain")
        again = build(run.path, tmp_path / "again", fold="float32")
    with pytest.raises(UsageError, match=r"normalized samples.*raw float32 samples"):
        compare(plain.path, raw.path, batches=(1,), rounds=8)
    with pytest.raises(UsageError, match="same --fold-preprocess"):
        validate(raw.path, against=plain.path)
    check_gates(validate(raw.path, against=again.path, max_drop=0))


def test_what_cannot_be_folded_is_refused_before_work(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    with pytest.raises(UsageError, match="--preprocess and --fold-preprocess"):
        build(run.path, tmp_path / "bundle", fold="uint8", preprocess=True)
    with pytest.raises(UsageError, match="normalizes samples as digits does"):
        build(run.path, tmp_path / "bundle", fold="uint8", mean=(0.5,), std=(0.5,))
    with pytest.raises(UsageError, match="nothing is folded"):
        build(run.path, tmp_path / "bundle", mean=(0.5,), std=(0.5,))
    save_run_info(run.path, replace(run.info, data=None))
    for numbers in ({}, {"mean": (0.5,)}, {"std": (0.5,)}):
        with pytest.raises(UsageError, match="nothing says how pictures become the network's input"):
            build(run.path, tmp_path / "bundle", fold="uint8", **numbers)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"--mean has 3 and --std 1 numbers.*\(batch, 1, 8, 8\)"):
        build(run.path, tmp_path / "bundle", fold="uint8", mean=(0, 0, 0), std=(1,))
    save_run_info(run.path, replace(run.info, data=replace(digits_fact(), mean=(), std=())))
    with pytest.raises(UsageError, match="taken as they are"):
        build(run.path, tmp_path / "bundle", fold="uint8")
    assert not (tmp_path / "bundle").exists()


def test_a_wrong_fold_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = with_folded_preprocess

    def wrong(model: onnx.ModelProto, **options: object) -> object:
        return genuine(model, **(options | {"mean": (0.9,)}))  # type: ignore[arg-type]

    monkeypatch.setattr(module, "with_folded_preprocess", wrong)
    with pytest.raises(GateFailed, match="normalization folded into it"), exported_once():
        build(digits_run(tmp_path / "run").path, tmp_path / "bundle", fold="uint8")
    assert not (tmp_path / "bundle").exists()


def test_a_run_that_holds_a_graph_is_folded_too(tmp_path: Path) -> None:
    root = picture_folder(tmp_path / "set")
    with exported_once():
        first = build(picture_run(tmp_path / "run", root), tmp_path / "first")
    run = run_at(first.path / "model.onnx", run_folder=tmp_path / "graph-run")
    info = read_run_info(run)
    save_run_info(run, replace(info, data=first.info.data, task=first.info.task))
    bundle = build(run, tmp_path / "bundle", fold="uint8")
    plain = build(run, tmp_path / "plain")
    assert bundle.info.model.form == "onnx"
    assert bundle.info.folded is not None and bundle.info.folded.place == "weight, behind a Sub"
    validation = validate(bundle.path)
    check_gates(validation)
    assert validation.parity is not None
    assert validation.score == validate(plain.path).score
    table = str(validation)  # there is no torch network
    assert "accuracy, its network" in table and "PyTorch" not in table


def test_the_command_says_what_the_graph_takes_and_the_dry_run_too(tmp_path: Path, call: Call) -> None:
    run = digits_run(tmp_path / "run")
    told = call("build", run.path, "--dry-run", "--fold-preprocess", "uint8")
    assert told.exit_code == 0, told.stderr
    assert "raw samples in uint8" in told.stdout
    with exported_once():
        told = call("build", run.path, "--fold-preprocess", "uint8", "--out", tmp_path / "bundle")
    assert told.exit_code == 0, told.stderr
    assert "takes raw uint8 samples, 0 to 255, normalized in " in told.stdout
    shown = call("inspect", tmp_path / "bundle", "--json")
    assert json.loads(shown.stdout)
    assert "raw uint8" in call("inspect", tmp_path / "bundle").stdout


def test_a_package_takes_raw_samples(tmp_path: Path, call: Call) -> None:
    run = digits_run(tmp_path / "run")
    with exported_once():
        build(run.path, tmp_path / "bundle", fold="uint8")
    told = call("package", tmp_path / "bundle", "--out", tmp_path / "package")
    assert told.exit_code == 0, told.stderr
    configs = list((tmp_path / "package").glob("model_repository/*/config.pbtxt"))
    assert configs
    assert all("TYPE_UINT8" in config.read_text() for config in configs)
    assert "takes raw uint8 samples, 0 to 255" in (tmp_path / "package" / "README.md").read_text()
    document = json.loads((tmp_path / "package" / "package.json").read_text())
    assert document["models"][0]["raw"] == "raw uint8 samples, 0 to 255"


def _pictures_file(folder: Path) -> Path:
    """An ONNX file that takes normalized pictures of three channels and a free height and width."""
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 12)),
    ).eval()
    example = example_of_shape((3, 16, 20))
    file = folder / "net.onnx"
    onnx.save(onnx_from_module(network, example, masks={}), file)
    return file


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_onnx_file_takes_raw_pictures_with_a_mean_and_deviation_that_are_given(
    precision: str, tmp_path: Path, call: Call
) -> None:
    file = _pictures_file(tmp_path)
    raw = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 20), dtype=np.uint8)
    normalized = (raw / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    name = onnx.load(file).graph.input[0].name
    np.savez(tmp_path / "raw.npz", **{name: raw})  # type: ignore[arg-type]
    np.savez(tmp_path / "normalized.npz", **{name: normalized.astype(np.float32)})
    told = call(
        *("sparsify", file, "--inputs", tmp_path / "normalized.npz", "--method", "reconstruction"),
        *("--out", tmp_path / "run"),
    )
    assert told.exit_code == 0, told.stderr
    fold = ("--fold-preprocess", "uint8", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")
    more = ("--inputs", tmp_path / "raw.npz", "--precision", precision)
    for model, out in ((tmp_path / "run", "sparse"), (file, "dense")):
        told = call("build", model, *fold, *more, "--out", tmp_path / out)
        assert told.exit_code == 0, told.stderr
        assert "takes raw uint8 samples, 0 to 255" in told.stdout
    plain = build(tmp_path / "run", tmp_path / "plain", inputs=tmp_path / "normalized.npz")
    sparse = open_bundle(tmp_path / "sparse")
    assert sparse.info.folded is not None
    assert (sparse.info.folded.mean, sparse.info.folded.std) == (MEAN, STD)
    weights = [
        {
            one.name: numpy_helper.to_array(one)
            for one in onnx.load(made.path / "model.onnx").graph.initializer
        }
        for made in (plain, sparse)
    ]
    if precision == "fp32":
        run = [onnxruntime.InferenceSession(made.path / "model.onnx") for made in (plain, sparse)]
        wanted = run[0].run(None, {name: normalized.astype(np.float32)})[0]
        _close(run[1].run(None, {name: raw})[0], wanted)
        shared = [key for key, one in weights[0].items() if one.ndim > 1 and key in weights[1]]
        assert len(shared) >= 3
        for key in shared:
            np.testing.assert_array_equal(weights[0][key] == 0, weights[1][key] == 0)
    judged = validate(sparse.path, against=tmp_path / "dense", inputs=tmp_path / "raw.npz")
    check_gates(judged)
    with pytest.raises(UsageError, match="uint8"):
        validate(sparse.path, against=tmp_path / "dense", inputs=tmp_path / "normalized.npz")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing says how pictures become the network's input"),
        (("--mean", "0,0,0"), "--mean was given without --std"),
        (("--std", "1,1,1"), "--std was given without --mean"),
        (("--mean", "0,0", "--std", "1,1"), "--mean has 2 and --std 2 numbers"),
        (("--mean", "0,0,x", "--std", "1,1,1"), "numbers by channel were expected"),
        (("--mean", "0,0,0", "--std", "1,0,1"), "numbers by channel above 0 were expected"),
        (("--mean", "104,117,123", "--std", "1,1,1"), "Divide the numbers by 255"),
    ],
)
def test_a_normalization_that_cannot_be_meant_is_refused(
    words: tuple[str, ...], said: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = call("build", _pictures_file(tmp_path), "--fold-preprocess", "uint8", *words)
    assert told.exit_code == 2
    assert said in " ".join(told.stderr.replace("│", " ").split())
    told = call("build", "net.onnx", "--mean", "0,0,0", "--std", "1,1,1")
    assert told.exit_code == 2
    assert "belongs to --data imagefolder:DIR" in told.stderr


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((math.nan,) * 3, STD, "mean is .*Finite numbers"),
        (MEAN, (0, 1, 1), "std is .*0.000001 and more"),
        (MEAN, (-0.2, 0.25, 0.3), "std is .*0.000001 and more"),
        (MEAN, (math.inf,) * 3, "std is .*0.000001 and more"),
        (("0.4",) * 3, STD, "mean is .*A number for each channel"),
        ("0,0,0", STD, "mean is .*A number for each channel"),
        (0.5, 0.5, "mean is .*A number for each channel"),
        ([[0.5], [0.5, 0.5]], STD, "mean is .*A number for each channel"),
        ((True,) * 3, STD, "mean is .*A number for each channel"),
        (np.reshape(MEAN, (3, 1, 1)), STD, "A number for each channel"),
        ((104, 117, 123), STD, "Divide the numbers by 255"),
    ],
)
def test_numbers_by_channel_from_python_are_checked(
    mean: Any, std: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_at(_pictures_file(tmp_path))
    with pytest.raises(UsageError, match=said):
        build(run, tmp_path / "bundle", fold="uint8", mean=mean, std=std)
    assert not (tmp_path / "bundle").exists()


def test_arrays_of_numbers_by_channel_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_at(_pictures_file(tmp_path))
    for mean, std in ((np.zeros(3, np.float32), np.ones(3, np.int64)), (torch.zeros(3), [1, 1, 1])):
        made: Any = build(run, tmp_path / "bundle", fold="uint8", mean=mean, std=std)  # type: ignore[arg-type]
        assert (made.info.folded.mean, made.info.folded.std) == ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UsageError, match=r"fold is 'int8'.*float32, uint8"):
        build(run, tmp_path / "bundle", fold="int8", mean=MEAN, std=STD)  # type: ignore[arg-type]


def test_normalized_floats_are_not_taken_as_raw_pictures(tmp_path: Path, call: Call) -> None:
    file = _pictures_file(tmp_path)
    name = onnx.load(file).graph.input[0].name
    raw = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 20)).astype(np.float32)
    options = ("--fold-preprocess", "float32", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")
    for samples, is_raw in ((raw, True), (raw / 255, False), (raw / 64 - 2, False), (raw * 2, False)):
        np.savez(tmp_path / "samples.npz", **{name: samples})  # type: ignore[arg-type]
        told = call("build", file, *options, "--inputs", tmp_path / "samples.npz", "--out", tmp_path / "b")
        assert (told.exit_code == 0) is is_raw, told.stderr
        assert is_raw or "Raw pictures of 0 to 255 were expected" in told.stderr


def test_a_fixed_batch_is_named_where_nothing_can_be_folded(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = _pictures_file(tmp_path)
    model = onnx.load(file)
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, file)
    told = call("build", file, "--fold-preprocess", "uint8", "--mean", "0,0,0", "--std", "1,1,1")
    assert told.exit_code == 2
    assert "its batch size is fixed" in told.stderr
