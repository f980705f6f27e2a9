"""A raw photograph goes into Triton itself, as pixels or as a file, and the name of a class comes out."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

from sparse_export.building import build
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.run import TaskInfo
from sparse_export.serving.model_config import check_config
from sparse_export.serving.package import Package, package
from sparse_export.serving.picture_models import picture_identity
from sparse_export.serving.repository import open_served
from sparse_export.serving.triton_decode import decoded
from sparse_export.tasks.data.imagefolder import Pictures, list_pictures, open_picture
from sparse_export.tasks.data.pictures import Inputs
from tests.exporting import exported_once
from tests.making_runs import digits_run
from tests.picture_runs import KINDS, picture_folder, picture_run
from tests.serving.serving import Serving, serving

PROTOCOLS = [pytest.param(http, "http_port", id="http"), pytest.param(grpc, "grpc_port", id="grpc")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    root = picture_folder(tmp_path_factory.mktemp("pictures") / "set")
    return list_pictures("pictures", root).test


@pytest.fixture(scope="module")
def bundle(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("built")
    root = pictures.files[0].parents[2]
    with exported_once():
        return build(
            picture_run(folder / "run", root),
            folder / "net",
            preprocess=True,
            postprocess=["softmax", "topk:3"],
        )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("digits")
    with exported_once():
        return build(digits_run(folder / "run").path, folder / "digits", preprocess=True)


@pytest.fixture(scope="module")
def served(
    server: Path, bundle: Bundle, digits: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    with serving(bundle.path, digits.path, log=tmp_path_factory.mktemp("log") / "log") as one:
        yield one


def _wanted(bundle: Bundle, pictures: Pictures) -> np.ndarray:
    """Scores by the training's loader and onnxruntime."""
    fact = bundle.info.data
    assert fact is not None
    size = bundle.info.signature.input_shape[1:]
    inputs = Inputs(pictures, (size[0], size[1]), fact.crop_ratio, fact.mean, fact.std)[: len(pictures)]
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    scores: np.ndarray = session.run(["logits"], {"input": inputs})[0]
    return scores


def _ask(
    protocol: Any, client: Any, model: str, name: str, array: np.ndarray, outputs: list[Any] | None = None
) -> Any:
    tensor = protocol.InferInput(name, list(array.shape), "UINT8")
    tensor.set_data_from_numpy(array)
    return client.infer(model, [tensor], outputs=outputs)


def test_every_model_is_ready_and_was_checked(served: Serving) -> None:
    models = {one["name"]: one for one in served.document["models"]}
    assert models.keys() == {"net", "net-picture", "net-file", "digits", "digits-picture"}
    for name in ("net-picture", "net-file", "digits-picture"):
        assert models[name]["runtime"] == "ensemble"
        assert models[name]["largest_difference"] < 1e-4
    assert models["net-file"]["compared"] == ["logits", "probabilities", "top_scores", "top_classes"]


@pytest.mark.parametrize(("protocol", "port"), PROTOCOLS)
@pytest.mark.parametrize("model", ["net-picture", "net-file"])
def test_a_photograph_goes_in_and_the_name_of_its_class_comes_out(
    model: str, protocol: Any, port: str, served: Serving, bundle: Bundle, pictures: Pictures
) -> None:
    scores = _wanted(bundle, pictures)
    asked = [protocol.InferRequestedOutput("probabilities", class_count=1)]
    with protocol.InferenceServerClient(f"127.0.0.1:{getattr(served, port)}") as client:
        for file, wanted in zip(pictures.files, scores, strict=True):
            if model == "net-file":
                name, sent = "file", np.frombuffer(file.read_bytes(), np.uint8)[np.newaxis]
            else:
                name, sent = "picture", np.asarray(open_picture(file))[np.newaxis]
            answer = _ask(protocol, client, model, name, sent, asked).as_numpy("probabilities")
            probability, number, label = answer.ravel()[0].decode().split(":")
            assert (int(number), label) == (wanted.argmax(), KINDS[wanted.argmax()])
            assert float(probability) == pytest.approx(
                np.exp(wanted - wanted.max()).max() / np.exp(wanted - wanted.max()).sum(), abs=0.02
            )


@pytest.mark.parametrize(("protocol", "port"), PROTOCOLS)
def test_pictures_of_one_size_go_together_and_give_all_outputs(
    protocol: Any, port: str, served: Serving
) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (5, 33, 50, 3), dtype=np.uint8)
    with protocol.InferenceServerClient(f"127.0.0.1:{getattr(served, port)}") as client:
        whole = _ask(protocol, client, "net-picture", "picture", batch)
        single = _ask(protocol, client, "net-picture", "picture", batch[3:4])
    logits, top = whole.as_numpy("logits"), whole.as_numpy("top_classes")
    assert (logits.shape, top.shape) == ((5, 10), (5, 3))
    np.testing.assert_array_equal(top, np.argsort(-logits, 1)[:, :3])
    np.testing.assert_allclose(single.as_numpy("logits")[0], logits[3], atol=1e-4)


def test_digits_go_in_as_they_lie_in_their_files(served: Serving, digits: Bundle) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    prepare, network = (
        onnxruntime.InferenceSession(digits.path / name) for name in ("preprocess.onnx", "model.onnx")
    )
    (inputs,) = prepare.run(None, {"picture": raw})
    (wanted,) = network.run(None, {"input": inputs})
    with http.InferenceServerClient(f"127.0.0.1:{served.http_port}") as client:
        found = _ask(http, client, "digits-picture", "picture", raw).as_numpy("logits")
        assert not client.is_model_ready("digits-file")
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_a_file_that_is_no_picture_is_an_error_and_the_next_one_is_answered(
    content: bytes, served: Serving, pictures: Pictures
) -> None:
    with http.InferenceServerClient(f"127.0.0.1:{served.http_port}") as client:
        bad = np.frombuffer(content or b"\0", np.uint8)[np.newaxis]
        with pytest.raises(InferenceServerException, match="is no picture"):
            _ask(http, client, "net-file", "file", bad)
        good = np.frombuffer(pictures.files[0].read_bytes(), np.uint8)[np.newaxis]
        assert _ask(http, client, "net-file", "file", good).as_numpy("logits").shape == (1, 10)


@pytest.mark.slow
@pytest.mark.full
def test_no_request_is_lost_when_the_network_gets_another_version(
    server: Path, digits: Bundle, tmp_path: Path
) -> None:
    other = build(digits_run(tmp_path / "run", seed=9).path, tmp_path / "other", preprocess=True)
    link, raw = tmp_path / "net", np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    link.symlink_to(digits.path)
    stop, errors, answers = threading.Event(), [], set()

    def client(protocol: Any, port: int) -> None:
        with protocol.InferenceServerClient(f"127.0.0.1:{port}") as one:
            while not stop.is_set():
                try:
                    answer = _ask(protocol, one, "net-picture", "picture", raw)
                    answers.add(answer.as_numpy("logits").tobytes())
                except InferenceServerException as error:
                    errors.append(str(error))

    with serving(link, log=tmp_path / "log") as running:
        ports = (http, running.http_port), (grpc, running.grpc_port)
        threads = [threading.Thread(target=client, args=one) for one in (*ports, *ports)]
        for thread in threads:
            thread.start()
        for number, target in enumerate((other.path, digits.path), start=3):
            (tmp_path / "new").symlink_to(target)
            (tmp_path / "new").rename(link)
            running.process.send_signal(signal.SIGHUP)
            running.wait_for("golden answer right", times=number)
            time.sleep(1.5)
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(answers) == 2


@pytest.fixture(scope="module")
def packaged(bundle: Bundle, digits: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Package:
    out = tmp_path_factory.mktemp("packaged") / "out"
    return package([bundle.path, digits.path], [None, None], out, base_image="triton:1.0")


def test_a_package_has_the_same_models_and_says_how_to_ask_them(packaged: Package, served: Serving) -> None:
    names = [model.name for model in packaged.models]
    assert {one["name"] for one in served.document["models"]} <= set(names)
    assert sorted(names) == sorted(path.name for path in (packaged.path / "model_repository").iterdir())
    largest = {model.name: model.max_batch for model in packaged.models}
    assert (largest["net-picture"], largest["net-file"], largest["net-decode"]) == (64, 1, 1)
    readme = (packaged.path / "README.md").read_text()
    for name in ("net-picture", "net-file", "digits-picture"):
        assert f"python client/picture.py --model {name} " in readme
    assert "python client/example.py --model net --golden golden/net" in readme
    assert "numpy pillow`" in readme
    assert "pixels that are not give wrong answers" in readme
    assert "'pillow>=10'" in (packaged.path / "docker" / "Dockerfile").read_text()
    for name in names:
        check_config((packaged.path / "model_repository" / name / "config.pbtxt").read_text(), name)


def test_without_the_python_backend_files_are_not_decoded_and_that_is_said(
    bundle: Bundle, tmp_path: Path
) -> None:
    made = package([bundle.path], [None], tmp_path / "out", runtimes=["onnxruntime"])
    assert [model.name for model in made.models] == ["net", "net-preprocess", "net-picture"]
    assert any("no model for picture files" in note for note in made.notes)


@pytest.mark.parametrize("model", ["net-picture", "net-file", "digits-picture"])
def test_the_client_of_the_package_prints_the_name_of_a_class(
    model: str, packaged: Package, served: Serving, pictures: Pictures, bundle: Bundle, tmp_path: Path
) -> None:
    file = pictures.files[3]
    if model == "digits-picture":
        file = tmp_path / "digit.png"
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(file)
        names = [f"class {n}" for n in range(10)]
    else:
        names = [KINDS[_wanted(bundle, pictures.part(3, 4))[0].argmax()]]
    ports = ["--http", f"127.0.0.1:{served.http_port}", "--grpc", f"127.0.0.1:{served.grpc_port}"]
    done = subprocess.run(
        [sys.executable, packaged.path / "client" / "picture.py", "--model", model, *ports, file],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = re.fullmatch(rf"{re.escape(str(file))}: (.*), -?\d+\.\d{{4}}\n", done.stdout)
    assert told is not None
    assert told[1] in names


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("RGB", "jpg"), ("RGBA", "png"), ("P", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("1", "png")),
        *(("I;16", "png"), ("I;16", "tiff"), ("LA", "png"), ("RGB", "webp"), ("P", "gif"), ("L", "pgm")),
    ],
)
def test_a_file_is_decoded_as_training_decodes_it(mode: str, suffix: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (13, 9, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 + 100)
    else:
        picture = picture.convert(mode)
    file = tmp_path / f"picture.{suffix}"
    picture.save(file)
    np.testing.assert_array_equal(decoded(file.read_bytes()), np.asarray(open_picture(file)))


def test_files_of_unknown_range_or_too_many_pixels_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="unknown range"):
        decoded((tmp_path / "floats.tiff").read_bytes())
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombWarning):
        decoded((tmp_path / "large.png").read_bytes())


def test_models_around_a_network_stay_for_new_weights_and_not_for_other_names_of_classes(
    bundle: Bundle,
) -> None:
    served = open_served(bundle.path, "net")
    task = TaskInfo(name="classification", labels=tuple("abcdefghij"))
    renamed = replace(served, bundle=replace(bundle, info=replace(bundle.info, task=task)))
    heavier = replace(served, bundle=replace(bundle, info=replace(bundle.info, n_nonzero=1)))
    assert picture_identity(served) == picture_identity(heavier)
    assert picture_identity(served) != picture_identity(renamed)
