"""`preprocess.onnx` makes of raw samples what the training's loader makes of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparse_export.building import build
from sparse_export.building import preprocess as module
from sparse_export.errors import ArtefactError, GateFailed, UsageError
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.preparation import PREPROCESS_FILE
from sparse_export.formats.run import save_run_info
from sparse_export.graph.preprocess import picture_graph
from sparse_export.signature import TensorInfo
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder
from sparse_export.tasks.data.imagefolder import Pictures, center_crop, list_pictures, open_picture
from sparse_export.tasks.data.pictures import Inputs
from tests.cli.conftest import Call
from tests.exporting import exported_once
from tests.making_runs import digits_fact, digits_run, network_and_masks, save_run
from tests.picture_runs import SIZE, picture_folder, picture_run

LEVEL = 1 / 255 / min(imagefolder.STD)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures") / "set")


@pytest.fixture(scope="module")
def bundle(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    run = picture_run(folder / "run", pictures)
    with exported_once():
        return build(run, folder / "bundle", preprocess=True)


def _through(bundle: Bundle, listed: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """The network's inputs and scores for raw pictures, each sent by itself."""
    first, second = (
        onnxruntime.InferenceSession(bundle.path / name) for name in (PREPROCESS_FILE, "model.onnx")
    )
    made = [first.run(None, {"picture": np.asarray(open_picture(file))[None]})[0] for file in listed.files]
    return np.concatenate(made), np.concatenate([second.run(None, {"input": one})[0] for one in made])


def _require_same(bundle: Bundle, listed: Pictures) -> None:
    """Inputs within two levels of the loader's, and the same answer on every picture."""
    fact = bundle.info.data
    assert fact is not None
    size = bundle.info.signature.input_shape[1:]
    wanted = Inputs(listed, (size[0], size[1]), fact.crop_ratio, fact.mean, fact.std)[: len(listed)]
    inputs, scores = _through(bundle, listed)
    assert np.abs(inputs - wanted).max() < 2 * LEVEL + 1e-5
    assert np.abs(inputs - wanted).mean() < 0.05 * LEVEL
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    (by_loader,) = session.run(None, {"input": wanted})
    assert len(set(by_loader.argmax(1))) > 4
    np.testing.assert_array_equal(scores.argmax(1), by_loader.argmax(1))


def test_every_test_picture_gets_the_answer_that_it_gets_through_the_loader(
    bundle: Bundle, pictures: Path
) -> None:
    _require_same(bundle, list_pictures("x", pictures).test)


def test_the_manifest_has_the_graph_its_input_and_a_pair_that_checks_it(bundle: Bundle) -> None:
    info = open_bundle(bundle.path).info.preprocess
    assert info is not None
    assert info == bundle.info.preprocess
    assert info.input == TensorInfo(name="picture", dtype="uint8", shape=("batch", "height", "width", 3))
    assert 0 <= info.largest_difference <= info.allowed_difference < 2.1 * LEVEL
    raw, wanted = (np.load(bundle.path / name) for name in (info.golden_input, info.golden_output))
    assert raw.dtype == np.uint8 and wanted.shape == (2, 3, *SIZE)
    assert set(info.files) <= bundle.info.files.keys()
    (bundle.path / PREPROCESS_FILE).rename(bundle.path / "elsewhere")
    try:
        with pytest.raises(ArtefactError, match=PREPROCESS_FILE):
            open_bundle(bundle.path)
    finally:
        (bundle.path / "elsewhere").rename(bundle.path / PREPROCESS_FILE)


@given(
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop_ratio=st.floats(0.3, 1.0),
)
def test_pictures_of_any_size_are_cut_where_the_loader_cuts_them(
    height: int,
    width: int,
    size: tuple[int, int],
    crop_ratio: float,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.mktemp("one") / "picture.png"
    drawn = np.random.default_rng(height * width).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    output = TensorInfo(name="x", dtype="float32", shape=("n", 3, *size))
    model, _ = picture_graph(output, crop_ratio=crop_ratio, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"picture": drawn})
    assert found.shape == (2, 3, *size)
    for picture, got in zip(drawn, found, strict=True):
        Image.fromarray(picture).save(file)
        assert np.abs(got - center_crop(file, size, crop_ratio).numpy()).max() < 2.01


def test_arrays_are_scaled_and_normalised_to_the_same_bits(tmp_path: Path) -> None:
    with exported_once():
        bundle = build(digits_run(tmp_path / "run").path, tmp_path / "bundle", preprocess=True)
    info = bundle.info.preprocess
    assert info is not None
    assert (info.input.name, info.input.dtype, info.input.shape) == ("picture", "uint8", ("batch", 8, 8, 1))
    assert info.largest_difference == 0
    digits = data.load("digits")
    wanted = data.normalise(digits.x_test, digits.mean, digits.std).numpy()
    session = onnxruntime.InferenceSession(bundle.path / PREPROCESS_FILE)
    (found,) = session.run(None, {"picture": digits.x_test.permute(0, 2, 3, 1).numpy()})
    assert found.tobytes() == wanted.tobytes()


def test_floats_of_an_archive_are_normalised_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, (30, 1, 8, 8)).astype(np.float32)
    y = np.arange(30) % 10
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    source = data.load(f"npz:{tmp_path / 'own.npz'}")
    fact = replace(digits_fact(), name=source.name, mean=source.mean, std=source.std)
    run = save_run(tmp_path / "run", *network_and_masks(), fact=fact)
    with exported_once():
        bundle = build(run.path, tmp_path / "bundle", preprocess=True)
    session = onnxruntime.InferenceSession(bundle.path / PREPROCESS_FILE)
    (found,) = session.run(None, {"sample": x})
    assert found.tobytes() == data.normalise(source.x_test, source.mean, source.std).numpy().tobytes()


def test_a_graph_that_makes_something_else_is_not_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = picture_run(tmp_path / "run", pictures)

    def wrong(*args: object, **options: object) -> tuple[onnx.ModelProto, TensorInfo]:
        model, raw = picture_graph(*args, **options)  # type: ignore[arg-type]
        (node,) = (one for one in model.graph.node if one.op_type == "Resize")
        for attribute in node.attribute:
            if attribute.name in ("antialias", "exclude_outside"):
                attribute.i = 0
        return model, raw

    monkeypatch.setattr(module, "picture_graph", wrong)
    with pytest.raises(GateFailed, match="differs from the training's loader"), exported_once():
        build(run, tmp_path / "bundle", preprocess=True)
    assert not (tmp_path / "bundle").exists()


def test_a_run_whose_data_are_not_known_or_taken_as_they_are_is_refused(tmp_path: Path) -> None:
    run = digits_run(tmp_path / "run")
    save_run_info(run.path, replace(run.info, data=None))
    with pytest.raises(UsageError, match="names no data set"):
        build(run.path, tmp_path / "bundle", preprocess=True)
    save_run_info(run.path, replace(run.info, data=replace(digits_fact(), mean=(), std=())))
    with pytest.raises(UsageError, match="taken as they are"):
        build(run.path, tmp_path / "bundle", preprocess=True)


def test_a_dry_run_lists_what_would_be_written(tmp_path: Path, call: Call) -> None:
    run = digits_run(tmp_path / "run")
    told = call("build", run.path, "--dry-run", "--preprocess", "--postprocess", "softmax")
    assert told.exit_code == 0, told.stderr
    assert re.search(r"^model.onnx +fp32, dense, softmax$", told.stdout, re.MULTILINE)
    assert re.search(r"^preprocess.onnx ", told.stdout, re.MULTILINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(("size", "crop_ratio"), [(64, 1.0), (128, 0.875), (224, 0.875)])
def test_every_real_photograph_gets_the_same_answer(
    size: int, crop_ratio: float, shared_data: Path, tmp_path: Path
) -> None:
    root = shared_data / "imagenette-mini"
    run = picture_run(tmp_path / "run", root, crop_ratio=crop_ratio, size=(size, size))
    bundle = build(run, tmp_path / "bundle", preprocess=True)
    _require_same(bundle, list_pictures("x", root).test)
