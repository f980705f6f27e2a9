"""Pictures with a network's own mean, deviation, interpolation, sizes and class numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from torch import nn

from sparse_export.building.bundle import build
from sparse_export.cli.main import cli
from sparse_export.errors import RecipeError, UsageError
from sparse_export.evaluate.test_set import test_set_of as samples_of
from sparse_export.evaluate.validate import validate
from sparse_export.formats.run import open_run
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import save_model
from sparse_export.tasks.data import imagefolder
from sparse_export.tasks.data.picture_settings import PictureSettings, class_numbers
from sparse_export.tasks.data.pictures import Inputs
from sparse_export.train import batches
from sparse_export.train.loop import train
from sparse_export.train.recipe import recipe_from_table

NETS = """
from torch import nn

def eye(n_classes=7):
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, n_classes))
"""
OWN: dict[str, Any] = {
    "mean": [0.5, 0.4, 0.3],
    "std": [0.5, 0.6, 0.7],
    "interpolation": "bicubic",
    "resize": 20,
    "image_size": [16, 16],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "eye_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 6)):
        for kind, low in (("dark", 0), ("light", 150)):
            (tmp_path / "own" / part / kind).mkdir(parents=True)
            for index in range(n):
                pixels = rng.integers(low, low + 100, (24 + index, 40 - index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / part / kind / f"{index}.png")
    (tmp_path / "map.json").write_text('{"dark": 5, "light": 2, "other": 6}')
    return tmp_path / "own"


def recipe(folder: Path, **changes: Any) -> Any:
    table = {
        "model": "eye_nets:eye",
        "data": f"imagefolder:{folder}",
        "epochs": 3,
        "batch_size": 10,
        "validation_fraction": 0.0,
        "optimizer": {"name": "adam", "lr": 0.01},
    }
    return recipe_from_table(table | changes, source="of the test")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"cat": 0, "dog": 1}'),
        ("a.json", '["cat", "dog"]'),
        ("a.txt", "cat\ndog\n"),
        ("a.txt", "dog 1\ncat 0\n"),
    ],
)
def test_a_map_of_classes_is_read_in_each_form(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert class_numbers(tmp_path / name) == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"cat": 0, "dog": 0}'),
        ("a.json", '{"cat": -1}'),
        ("a.json", '{"cat": true}'),
        ("a.json", "{"),
        ("a.txt", "cat 0\ncat 1\n"),
        ("a.txt", "cat\ncat\n"),
        ("a.txt", ""),
        ("absent.txt", None),
    ],
)
def test_a_map_that_is_none_is_refused(name: str, text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=r"is no map|cannot be read"):
        class_numbers(tmp_path / name)


def test_settings_of_a_recipe_are_recorded_shipped_and_read_back(folder: Path, tmp_path: Path) -> None:
    made = recipe(folder, classes=str(tmp_path / "map.json"), epochs=20, dense=True, **OWN)
    run = train(made, tmp_path / "run", device="cpu")
    (tmp_path / "map.json").unlink()  # the record has it
    info = open_run(run.path).info.data
    assert info is not None
    assert (info.mean, info.std, info.interpolation) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "bicubic")
    assert (info.crop_ratio, info.classes) == (0.8, {"dark": 5, "light": 2, "other": 6})
    assert run.info.signature.n_classes == 7 and run.info.task.labels == ()
    assert run.info.recipe["classes"] == info.classes
    assert run.info.test is not None and run.info.test.figure == 100.0

    bundle = build(open_run(run.path), tmp_path / "bundle", preprocess=True)
    assert bundle.info.data == info
    assert bundle.info.preprocess is not None and bundle.info.preprocess.largest_difference < 2 / 255 / 0.5
    found = validate(bundle, n_threads=1)
    assert found.score == run.info.test
    by_workers = samples_of(bundle, pictures=PictureSettings(workers=2))
    threads = samples_of(bundle)
    assert by_workers is not None and threads is not None
    assert by_workers.targets.tolist() == threads.targets.tolist()
    for one, other in zip(by_workers.samples.batches(5), threads.samples.batches(5), strict=True):
        assert np.array_equal(one["input"], other["input"])


def test_pictures_without_workers_train_alike_held_or_decoded_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [train(recipe(folder, epochs=1), tmp_path / "held", device="cpu")]
    monkeypatch.setattr(batches, "_HELD_BYTES", 0)
    runs.append(train(recipe(folder, epochs=1), tmp_path / "anew", device="cpu"))
    runs.append(train(recipe(folder, epochs=1, workers=1), tmp_path / "workers", device="cpu"))
    weights = [(run.path / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] == weights[2]


def test_options_reach_an_onnx_file_and_its_bundle(folder: Path, tmp_path: Path) -> None:
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(392, 16), nn.ReLU())
    network = nn.Sequential(*layers, nn.Linear(16, 7)).eval()
    save_model(onnx_from_module(network, example_of_shape((3, 16, 16)), masks={}), tmp_path / "eye.onnx")
    (tmp_path / "map.txt").write_text("dark 5\nlight 2\n")
    options = [
        "--mean",
        "0.5,0.4,0.3",
        "--std",
        "0.5,0.6,0.7",
        "--interpolation",
        "bicubic",
        "--resize",
        "20",
    ]
    options += ["--classes", str(tmp_path / "map.txt"), "--data", f"imagefolder:{folder}"]
    call = [
        "sparsify",
        str(tmp_path / "eye.onnx"),
        "--task",
        "classification",
        "--out",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(cli, [*call, *options, "--json"])
    assert done.exit_code == 0, done.output
    info = open_run(tmp_path / "run").info
    assert info.data is not None and info.data.classes == {"dark": 5, "light": 2} and info.data.n_train == 24
    listing = imagefolder.list_pictures("own", folder, info.data.classes)
    x = Inputs(listing.test, (16, 16), 0.8, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "bicubic")[:]
    bundle = build(open_run(tmp_path / "run"), tmp_path / "bundle")
    taken = samples_of(bundle)
    assert taken is not None and set(taken.targets.tolist()) == {2, 5}
    assert np.array_equal(np.concatenate([one["input"] for one in taken.samples.batches(5)]), x)
    again = CliRunner().invoke(cli, ["validate", str(tmp_path / "bundle"), "--workers", "1", "--json"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["score"] == json.loads(json.dumps(vars(info.test)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mean", "0.5,0.5,0.5"], "--mean belongs to --data imagefolder:DIR"),
        (["--data", "imagefolder:x", "--std", "0,1,1"], "three numbers above 0"),
        (["--data", "imagefolder:x", "--mean", "red"], "three numbers were expected"),
        (["--data", "imagefolder:x", "--mean", "123.7,116.3,103.5"], "Divide the numbers by 255"),
        (["--data", "imagefolder:x", "--std", "1e-300,1,1"], "numbers from 0.000001 on"),
        (["--data", "imagefolder:x", "--classes", "absent.txt"], "cannot be read"),
    ],
)
def test_options_without_meaning_are_wrong_usage(options: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["sparsify", "net.onnx", "--task", "classification", *options])
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "digits", "mean": [0.5, 0.5, 0.5]}, "mean belongs to the data imagefolder:DIR"),
        ({"data": "digits", "interpolation": "bicubic"}, "interpolation belongs to"),
        ({"std": [0.0, 1.0, 1.0]}, "std.0 is 0.0"),
        ({"classes": "absent.json"}, "absent.json cannot be read"),
    ],
)
def test_keys_without_meaning_are_refused(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(folder, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"resize": 12, "image_size": [16, 16]}, "scaled to 12 and cut to 16x16"),
        ({"classes": {"dark": 0}}, "class folders without a number: light"),
    ],
)
def test_settings_that_do_not_fit_the_folder_are_refused(
    changes: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        train(recipe(folder, **changes), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_network_without_pictures_is_not_scored_on_a_folder(folder: Path, tmp_path: Path) -> None:
    run = train(recipe(folder, epochs=1), tmp_path / "run", device="cpu")
    bundle = build(run, tmp_path / "bundle")
    grey = replace(
        bundle.info.signature,
        inputs=(replace(bundle.info.signature.inputs[0], shape=("batch", 1, 16, 16)),),
    )
    bundle = replace(bundle, info=replace(bundle.info, signature=grey))
    with pytest.raises(UsageError, match="holds pictures, and the network takes"):
        samples_of(bundle, data=f"imagefolder:{folder}", pictures=PictureSettings(resize=20))


@pytest.mark.parametrize(
    "text",
    ['[["a"], ["b"]]', "[" * 100_000, '{"a": 4, "b": 1000000000000000000000000000000}', '{"a": 1, "a": 2}'],
    ids=["nested", "deep", "huge", "twice"],
)
def test_a_map_of_classes_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(text)
    with pytest.raises(UsageError, match=r"classes\.json"):
        class_numbers(tmp_path / "classes.json")


def test_a_size_beyond_sense_is_refused_before_any_picture_is_read() -> None:
    with pytest.raises(UsageError, match="100000000 pixels along their shorter side"):
        PictureSettings(resize=100_000_000).crop_ratio((224, 224))
    with pytest.raises(UsageError, match="beyond sense"):
        imagefolder.check_size((224, 100_000_000))
    assert PictureSettings(resize=512).crop_ratio((256, 256)) == 0.5
