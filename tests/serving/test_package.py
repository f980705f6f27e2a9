"""A package is whole or not there, and holds for each runtime what that runtime reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from sparse_export.building import build
from sparse_export.errors import ArtefactError, NotTrustedError, UnknownNameError, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle, read_bundle_info, save_bundle_info
from sparse_export.formats.listed import FileInfo, file_infos, verify_files
from sparse_export.graph.dense_file import may_be_packed
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.serving.model_config import check_config
from sparse_export.serving.package import Package, package
from sparse_export.serving.repository import (
    RUNTIMES,
    Served,
    model_name,
    open_served,
    require_name,
    require_served,
    require_trusted_engines,
    why_not_served,
)
from sparse_export.serving.settings import ModelSettings
from sparse_export.serving.tensors import interface_of
from sparse_export.signature import TensorInfo
from sparse_export.trust import remember
from tests.card import batches
from tests.cli.conftest import Call
from tests.engines.making import bundle_info
from tests.named_graphs import PICTURES, WORDS, words_graph
from tests.sealing import first_version, write_sealed
from tests.serving.conftest import DIGITS, Bundles
from tests.serving.engines import with_engines
from tests.serving.manifest_checks import problem
from tests.serving.named_bundles import named_bundle

ENGINE = "tensorrt-fp16-sm90.engine"


@pytest.fixture(scope="module")
def packaged(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package(
        [bundles.dense, bundles.sparse],
        [None, None],
        tmp_path_factory.mktemp("packaged") / "out",
        base_image="registry.example.com/triton:1.0",
    )


def test_it_holds_a_model_for_each_bundle_and_runtime(packaged: Package) -> None:
    names = ["dense", "dense-python", "sparse", "sparse-python"]
    assert [model.name for model in packaged.models] == names
    assert sorted(path.name for path in (packaged.path / "model_repository").iterdir()) == names
    assert any("no model for tensorrt" in note for note in packaged.notes)


def test_every_configuration_parses_and_names_its_bundle(packaged: Package, bundles: Bundles) -> None:
    for model in packaged.models:
        path = packaged.path / "model_repository" / model.name / "config.pbtxt"
        message = check_config(path.read_text(), path)
        manifest = getattr(bundles, model.name.partition("-")[0]) / BUNDLE_FILE
        assert message.name == model.name
        assert message.parameters["manifest_sha256"].string_value == sha256_file(manifest)


def test_the_names_of_the_classes_are_where_the_server_looks_for_them(packaged: Package) -> None:
    readme, repository = (packaged.path / "README.md").read_text(), packaged.path / "model_repository"
    named = {model.name: model.labels for model in packaged.models}
    for name, runtime in (("dense", "onnxruntime"), ("dense-python", "python")):
        file = named[name]
        assert file == f"model_repository/{name}/labels.txt"
        assert (packaged.path / file).read_text().splitlines() == list(DIGITS)
        assert _config(packaged, name).output[0].label_filename == "labels.txt"
        assert f"| {name} | {runtime} | classification | [labels.txt]({file}) |" in readme
    for name in ("sparse", "sparse-python"):
        assert named[name] is None
        assert not (repository / name / "labels.txt").exists()
        assert not _config(packaged, name).output[0].label_filename


def test_appended_outputs_are_served_compared_and_named(bundles: Bundles, tmp_path: Path) -> None:
    steps = ("softmax", "argmax", "topk:10")
    run = bundles.dense.with_name("dense-run")
    bundle = build(run, tmp_path / "net", postprocess=steps)
    made = package([bundle.path], [None], tmp_path / "out")
    outputs = [(one.name, list(one.dims), one.label_filename) for one in _config(made, "net-python").output]
    assert outputs == [
        ("logits", [10], "labels.txt"),
        ("probabilities", [10], "labels.txt"),
        ("class", [1], ""),
        ("top_scores", [10], ""),
        ("top_classes", [10], ""),
    ]
    index = json.loads((made.path / "golden" / "net" / "golden.json").read_text())
    compared = {one["name"]: one for one in index["outputs"]}
    assert (
        {"logits", "probabilities", "top_scores"}
        <= compared.keys()
        == {
            "logits",
            *bundle.info.golden.inner,
        }
    )
    assert compared["probabilities"]["largest_difference"] > 0
    facts = json.loads((made.path / "model_repository" / "net-python" / "1" / "model.json").read_text())
    assert facts["outputs"] == [name for name, _, _ in outputs]


def test_its_list_of_files_is_complete_and_right(packaged: Package) -> None:
    document = json.loads((packaged.path / "package.json").read_text())
    verify_files(packaged.path, {name: FileInfo(**fact) for name, fact in document["files"].items()})
    there = {str(path.relative_to(packaged.path)) for path in packaged.path.rglob("*") if path.is_file()}
    assert there == {*document["files"], "package.json"}


def test_native_backends_get_dense_weights_and_ours_the_packed_ones(
    packaged: Package, bundles: Bundles
) -> None:
    repository = packaged.path / "model_repository"
    native = repository / "sparse" / "1" / "model.onnx"
    ours = repository / "sparse-python" / "1" / "model.onnx"
    assert ours.read_bytes() == (bundles.sparse / "model.onnx").read_bytes()
    assert (may_be_packed(native), may_be_packed(ours)) == (False, True)
    assert len(onnx.load(native).functions) == 0
    x = open_served(bundles.sparse).golden_inputs
    with open_session(native, n_threads=1) as a, open_session(ours, n_threads=1) as b:
        assert a.run(x)["logits"].tobytes() == b.run(x)["logits"].tobytes()


def test_engines_become_plans_for_each_type_of_gpu(bundles: Bundles, tmp_path: Path) -> None:
    names = ("tensorrt-fp16-sm86.engine", "tensorrt-fp16-sm90.engine", "tensorrt-fp16-sm120.engine")
    bundle = with_engines(
        bundles.sparse, tmp_path / "net", *names, "tensorrt-int8-sm90.engine", "tensorrt-rtx-fp16-sm89.engine"
    )
    made = package([bundle], [None], tmp_path / "out", base_image="triton:1")
    assert [model.name for model in made.models] == ["net", "net-onnxruntime", "net-python"]
    folder = made.path / "model_repository" / "net"
    message = check_config((folder / "config.pbtxt").read_text(), "config.pbtxt")
    assert dict(message.cc_model_filenames) == {
        "8.6": "model-sm86.plan",
        "9.0": "model-sm90.plan",
        "12.0": "model-sm120.plan",
    }
    assert (folder / "1" / "model-sm90.plan").read_bytes() == b"tensorrt-fp16-sm90.engine"
    told = [note for note in made.notes if "left out" in note]
    assert len(told) == 2
    assert "an engine of TensorRT for RTX, which Triton's TensorRT backend cannot load" in told[0] + told[1]
    text = (made.path / "README.md").read_text()
    assert "engines/tensorrt-rtx-fp16-sm89.engine: an engine of TensorRT for RTX" in text
    assert made.tensorrt == "10.14.1.48"
    facts = json.loads((made.path / "model_repository" / "net-python" / "1" / "model.json").read_text())
    assert facts["engines"] == dict(message.cc_model_filenames)
    assert "nvidia.com/gpu: 1" in (made.path / "kubernetes" / "triton.yaml").read_text()


def _config(made: Package, model: str) -> Any:
    path = made.path / "model_repository" / model / "config.pbtxt"
    return check_config(path.read_text(), path)


def test_a_model_takes_no_larger_batches_than_its_engine_has_profiles_for(
    bundles: Bundles, tmp_path: Path
) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, profiles=batches((1, 8, 32)))
    made = package([bundle], [None], tmp_path / "out")
    largest = {model.runtime: model.max_batch for model in made.models}
    assert largest == {"tensorrt": 32, "onnxruntime": 64, "python": 32}
    for model in made.models:
        most = largest[model.runtime]
        message = _config(made, model.name)
        assert message.max_batch_size == most
        assert [sample.batch_size for sample in message.model_warmup] == [1, most]


@pytest.mark.parametrize(
    ("profiles", "most"),
    [
        (((1, 1, 4), (8, 8, 8)), 4),  # 5 to 7 are in neither, and requests are merged to any number
        (((5, 8, 32), (1, 1, 4)), 32),
        (((1, 8, 32), (1, 64, 128)), 64),
        (((1, 1, 1),), 1),
    ],
)
def test_every_smaller_batch_is_in_a_profile_too(
    profiles: tuple[tuple[int, int, int], ...], most: int, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, profiles=batches(*profiles))
    made = package([bundle], [None], tmp_path / "out", runtimes=["tensorrt"])
    message = _config(made, "net")
    assert message.max_batch_size == most
    names = [str(at) for at in range(len(profiles))] if len(profiles) > 1 else []
    assert list(message.instance_group[0].profile) == names


@pytest.mark.parametrize("runtime", ["tensorrt", "python"])
def test_larger_batches_than_the_engine_takes_are_refused_when_they_are_asked_for(
    runtime: str, bundles: Bundles, call: Call, tmp_path: Path
) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, profiles=batches((1, 8, 32)))
    words = ("package", bundle, "--runtime", runtime, "--out", tmp_path / "out", "--max-batch")
    refused = call(*words, 33)
    assert refused.exit_code == 2
    assert "takes up to 32" in refused.stderr
    assert "1:8:32" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert call(*words, 32).exit_code == 0
    settings = ModelSettings(max_batch=33)
    made = package([bundle], [None], tmp_path / "onnx", runtimes=["onnxruntime"], settings=settings)
    assert [model.max_batch for model in made.models] == [33]


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"profiles": batches((8, 8, 8))}, "no batch of 1"), ({"told": False}, "does not say which batches")],
)
def test_an_engine_that_cannot_take_what_requests_bring_is_left_out_and_said_why(
    changes: dict[str, Any], why: str, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, **changes)
    made = package([bundle], [None], tmp_path / "out")
    assert [model.runtime for model in made.models] == ["onnxruntime", "python"]
    assert any(why in note for note in made.notes)
    with pytest.raises(UsageError, match=why):
        package([bundle], [None], tmp_path / "out", runtimes=["tensorrt"])


def test_engines_say_which_tensorrt_the_image_needs(bundles: Bundles, tmp_path: Path) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, tensorrt="11.9.1.2.post1")
    made = package([bundle], [None], tmp_path / "out", runtimes=["tensorrt"], base_image="triton:1")
    assert made.tensorrt == "11.9.1.2"
    assert any("TensorRT 11.9.1.2," in note for note in made.notes)
    assert "grep -q '^11[.]9[.]1[.]2-'" in (made.path / "docker" / "Dockerfile").read_text()
    assert "TensorRT 11.9.1.2 " in (made.path / "README.md").read_text()


def test_engines_of_two_tensorrts_are_refused(bundles: Bundles, tmp_path: Path) -> None:
    one = with_engines(bundles.dense, tmp_path / "one", "tensorrt-fp16-sm90.engine")
    two = with_engines(bundles.sparse, tmp_path / "two", "tensorrt-fp16-sm90.engine", tensorrt="10.9.0.34")
    with pytest.raises(UsageError, match=r"10\.14\.1\.48 and 10\.9\.0\.34"):
        package([one, two], [None, None], tmp_path / "out")


def test_a_tensorrt_in_a_manifest_brings_no_words_into_the_dockerfile(
    bundles: Bundles, tmp_path: Path
) -> None:
    bundle = with_engines(bundles.dense, tmp_path / "net", ENGINE, tensorrt="x'; touch /tmp/x; '")
    with pytest.raises(ArtefactError, match="version of TensorRT"):
        package([bundle], [None], tmp_path / "out")


def test_without_a_base_image_the_rest_is_written_and_what_is_left_out_is_said(
    bundles: Bundles, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    told = call("package", bundles.dense, "--out", out)
    assert told.exit_code == 0, told.stderr
    document = json.loads(call("package", bundles.dense, "--out", out, "--json").stdout)
    package_json = json.loads((out / "package.json").read_text())
    left_out = {
        "docker/Dockerfile",
        "docker/compose.yaml",
        "kubernetes/triton.yaml",
        "kubernetes/kserve.yaml",
    }
    assert document["left_out"].keys() == package_json["left_out"].keys() == left_out
    assert document["base_image"] is package_json["base_image"] is document["image"] is None
    text = (out / "README.md").read_text()
    for name, reason in document["left_out"].items():
        assert not (out / name).exists()
        assert f"left out {name}: {reason}" in told.stdout
        assert f"- `{name}`: {reason}." in text
    assert "`onnxruntime==" in text  # what an image of the user's own needs
    assert (out / "model_repository" / "dense-python" / "config.pbtxt").is_file()


def test_with_a_base_image_every_file_is_written(packaged: Package) -> None:
    assert packaged.left_out == {}
    text = (packaged.path / "docker" / "Dockerfile").read_text()
    assert "\nFROM registry.example.com/triton:1.0\n" in text
    text = (packaged.path / "README.md").read_text()
    assert packaged.image is not None
    assert packaged.image in text
    assert "Left out" not in text


def test_an_image_of_ones_own_is_deployed_without_a_dockerfile(bundles: Bundles, tmp_path: Path) -> None:
    image = f"registry.example.com/net@sha256:{'0' * 64}"
    made = package([bundles.dense], [None], tmp_path / "out", image=image)
    assert made.left_out.keys() == {"docker/Dockerfile", "docker/compose.yaml"}
    for name in ("kubernetes/triton.yaml", "kubernetes/kserve.yaml"):
        text = (made.path / name).read_text()
        assert problem(name, text) is None
        assert f"image: {image}\n" in text
    with pytest.raises(UsageError, match="digest"):
        package([bundles.dense], [None], tmp_path / "built", image=image, base_image="triton:1")


def test_an_engine_is_served_only_when_it_is_trusted(bundles: Bundles, tmp_path: Path) -> None:
    folder = with_engines(bundles.dense, tmp_path / "net", "tensorrt-fp16-sm70.engine", trusted=False)
    served = open_served(folder)
    with pytest.raises(NotTrustedError) as error:
        require_trusted_engines([served], None)
    assert error.value.exit_code == 6
    with pytest.raises(NotTrustedError):
        package([served.bundle.path], [None], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    package([served.bundle.path], [None], tmp_path / "out", runtimes=["onnxruntime"])  # no engine in it
    remember(served.manifest_sha256)  # as building does
    require_trusted_engines([served], None)
    package([served.bundle.path], [None], tmp_path / "all")


def test_the_digests_of_all_bundles_are_named_at_once(bundles: Bundles, tmp_path: Path) -> None:
    folders = [
        with_engines(one, tmp_path / one.name, "tensorrt-fp16-sm75.engine", trusted=False)
        for one in (bundles.dense, bundles.sparse)
    ]
    digests = [open_served(folder).manifest_sha256 for folder in folders]
    with pytest.raises(NotTrustedError, match=" ".join(f"--trust {digest}" for digest in digests)):
        package(folders, [None, None], tmp_path / "out")
    package(folders, [None, None], tmp_path / "out", trust=digests)


def test_a_damaged_bundle_leaves_the_package_that_was_there(bundles: Bundles, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles.dense, damaged)
    out = tmp_path / "out"
    package([damaged], [None], out, runtimes=["onnxruntime"])
    before = (out / "package.json").read_bytes()
    (damaged / "model.onnx").write_bytes(b"")
    with pytest.raises(ArtefactError):
        package([damaged], [None], out)
    assert (out / "package.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out"]


@pytest.mark.parametrize("image", ["", "net:latest", "net", "net:1 && rm", "net:1\nRUN id", "NET:1"])
def test_an_image_that_is_not_pinned_is_refused(image: str, bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--image"):
        package([bundles.dense], [None], tmp_path / "out", image=image)
    with pytest.raises(UsageError, match="--base-image"):
        package([bundles.dense], [None], tmp_path / "out", base_image=image)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_body_mb", [0, -1, 2048])
def test_a_body_limit_that_no_server_takes_is_refused(
    max_body_mb: int, bundles: Bundles, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--max-body-mb"):
        package([bundles.dense], [None], tmp_path / "out", max_body_mb=max_body_mb)


def test_a_version_in_a_manifest_brings_no_words_into_the_dockerfile(
    bundles: Bundles, tmp_path: Path
) -> None:
    bundle = tmp_path / "net"
    shutil.copytree(bundles.dense, bundle)
    manifest = json.loads((bundle / BUNDLE_FILE).read_text())
    manifest["versions"] = {"onnxruntime": "1.0'; touch /tmp/x; '"}
    write_sealed(bundle / BUNDLE_FILE, manifest)
    with pytest.raises(ArtefactError, match="version of onnxruntime"):
        package([bundle], [None], tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "workload"),
    [
        ("net", "net-triton"),
        ("Net_v2.1", "net-v2-1-triton"),
        ("3d", "model-3d-triton"),
        ("0" * 100, f"model-{'0' * 44}-triton"),
        ("a" * 49 + "-b", f"{'a' * 49}-triton"),
    ],
)
def test_the_workload_has_a_name_that_kubernetes_takes(
    model: str, workload: str, bundles: Bundles, tmp_path: Path
) -> None:
    made = package([bundles.dense], [model], tmp_path / "out", runtimes=["onnxruntime"], image="net:1")
    text = (made.path / "kubernetes" / "triton.yaml").read_text()
    assert problem("kubernetes/triton.yaml", text) is None
    assert next(yaml.safe_load_all(text))["metadata"]["name"] == workload


def test_several_bundles_are_deployed_under_the_name_of_the_package(bundles: Bundles, tmp_path: Path) -> None:
    images = []
    for second in (bundles.sparse, bundles.other):
        made = package([bundles.dense, second], ["a", "b"], tmp_path / "Fleet_2", base_image="triton:1")
        text = (made.path / "kubernetes" / "triton.yaml").read_text()
        assert next(yaml.safe_load_all(text))["metadata"]["name"] == "fleet-2-triton"
        assert made.image is not None
        images.append(made.image)
    assert all(image.startswith("fleet-2-triton:") for image in images)
    assert images[0] != images[1]


def test_two_models_of_one_name_are_refused(bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Two models would have the name 'net-python'"):
        package([bundles.dense, bundles.other], ["net", "net-python"], tmp_path / "out")


def test_a_folder_that_is_no_package_is_not_replaced(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="not a package"):
        package([bundles.dense], [None], tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_package_is_not_replaced_where_something_else_would_be_lost(
    bundles: Bundles, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    package([bundles.dense], [None], out)
    for name in ("kubernetes/mine.yaml", "notes"):
        (out / name).write_text("mine")
        with pytest.raises(UsageError, match=rf"holds .*{name}, which its package\.json does not list"):
            package([bundles.dense], [None], out)
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    shutil.copytree(bundles.dense, out / "bundle")  # the only copy, perhaps
    with pytest.raises(UsageError, match="does not list"):
        package([out / "bundle"], [None], out)
    assert (out / "bundle" / "manifest.json").is_file()


def test_a_package_of_something_else_is_not_replaced(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "of-npm", "files": ["lib"]}')
    with pytest.raises(UsageError, match="not a package"):
        package([bundles.dense], [None], tmp_path)


def test_an_unknown_runtime_is_told_the_known_ones(bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        package([bundles.dense], [None], tmp_path / "out", runtimes=["onnxruntim"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "$(x)", "-x", "a;b", "ü", "x" * 101])
def test_names_that_a_path_or_a_shell_would_take_apart_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        require_name(name)


@pytest.mark.parametrize(
    ("folder", "name"), [("a b", "a-b"), ("$(touch x)", "touch-x-"), ("net.v2", "net.v2"), ("ü", "model")]
)
def test_a_folder_of_any_name_has_a_name_to_be_served_by(folder: str, name: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / folder) == name


def test_the_command_prints_models_and_the_path(bundles: Bundles, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--name", "net", "--out", out, "--max-batch", 16, "--base-image", "triton:1", "--json")
    result = call("package", bundles.dense, *words)
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert [model["name"] for model in document["models"]] == ["net", "net-python"]
    assert "max_batch_size: 16" in (out / "model_repository" / "net-python" / "config.pbtxt").read_text()
    deployment = next(yaml.safe_load_all((out / "kubernetes" / "triton.yaml").read_text()))
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == document["image"]


def test_the_command_wants_as_many_names_as_bundles(bundles: Bundles, call: Call, tmp_path: Path) -> None:
    result = call("package", bundles.dense, bundles.sparse, "--name", "net", "--out", tmp_path / "out")
    assert (result.exit_code, "once for each" in result.stderr) == (2, True)


def test_a_bundle_of_the_first_version_makes_the_models_that_it_always_made(
    bundles: Bundles, tmp_path: Path
) -> None:
    old = with_engines(bundles.dense, tmp_path / "old", ENGINE, profiles=batches((1, 8, 32)))
    document = json.loads((old / BUNDLE_FILE).read_text())
    document["engines"][0]["profiles"] = [[1, 8, 32]]
    (old / BUNDLE_FILE).write_text(json.dumps(first_version(document, ("input", "logits"))))
    remember(sha256_file(old / BUNDLE_FILE))
    made = package([old], ["net"], tmp_path / "out")
    assert {model.runtime: model.max_batch for model in made.models} == {
        "tensorrt": 32,
        "onnxruntime": 64,
        "python": 32,
    }
    message = _config(made, "net-python")
    assert [(one.name, list(one.dims)) for one in (*message.input, *message.output)] == [
        ("input", [1, 8, 8]),
        ("logits", [10]),
    ]
    index = json.loads((made.path / "golden" / "net" / "golden.json").read_text())
    assert [(one["name"], one["datatype"], one["file"]) for one in index["inputs"]] == [
        ("input", "FP32", "input.npy")
    ]
    assert 0 < index["outputs"][0]["largest_difference"] < 0.01


def test_what_onnxruntime_and_triton_do_not_exchange_is_served_by_an_engine_or_not_at_all(
    tmp_path: Path,
) -> None:
    half = replace(PICTURES, outputs=(replace(PICTURES.outputs[0], dtype="bfloat16"),))
    single = replace(PICTURES, inputs=(*PICTURES.inputs, TensorInfo(name="k", dtype="float32", shape=())))
    reasons = []
    for signature in (half, single):
        info = bundle_info(signature=signature)
        served = Served(
            name="net",
            bundle=Bundle(path=tmp_path, info=info),
            manifest_sha256="0" * 64,
            interface=interface_of(signature),
            golden_inputs={},
            golden_outputs={},
            engines=(),
            left_out=(),
        )
        reasons.append({runtime: why_not_served(served, runtime) or "" for runtime in RUNTIMES})
        with pytest.raises(UsageError, match="has no model for onnxruntime"):
            require_served(served, "onnxruntime")
    assert "scores is bfloat16" in reasons[0]["python"]
    assert "scores is bfloat16" in reasons[0]["onnxruntime"]
    assert reasons[1]["python"] == ""
    assert "k is a single number" in reasons[1]["onnxruntime"]
    assert "k is a single number" in reasons[1]["tensorrt"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda array: array.astype(np.int32), "input_ids is int32, not int64"),
        (lambda array: array[:, :-1], "sequence is 12 in attention_mask and 11 in another input"),
        (lambda array: array[:0], "input_ids is empty"),
    ],
)
def test_golden_arrays_that_the_network_would_not_take_are_refused(
    change: Callable[[np.ndarray], np.ndarray], said: str, tmp_path: Path
) -> None:
    bundle = named_bundle(tmp_path / "words", words_graph(), WORDS)
    info = read_bundle_info(bundle)
    file = bundle / info.golden.inputs["input_ids"]
    np.save(file, change(np.load(file)))
    save_bundle_info(bundle, replace(info, files=file_infos(bundle, info.files)))
    with pytest.raises(ArtefactError, match=said):
        open_served(bundle)
