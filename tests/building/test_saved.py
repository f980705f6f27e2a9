"""A bundle whose weights lie beside its graph, as those of more than two gigabytes do, through every command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import nn

from sparse_export.building import build
from sparse_export.building.from_source import run_at
from sparse_export.errors import ArtefactError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.gate import gate
from sparse_export.evaluate.validate import validate
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.listed import copy_listed_graph
from sparse_export.graph import saved
from sparse_export.graph.foreign import onnx_from_file
from sparse_export.graph.saved import model_sha256, save_model
from sparse_export.inspect import inspect
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.serving.package import package
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from tests.making_runs import digits_accuracy, digits_fact, network_and_masks, save_run

TWO_FOUR = NMPattern(n=2, m=4)


@dataclass(frozen=True)
class Made:
    """whole: in one file. beside: the same with its weights beside. packed: the same, 2:4 weights packed, and dense."""

    whole: Bundle
    beside: Bundle
    packed: Bundle


@pytest.fixture(scope="module", autouse=True)
def _little_fits_in_one_file() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "MAX_WEIGHT_BYTES", 5000)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("parted")
    module, masks = network_and_masks(density=0.999)
    for name, parameter in module.named_parameters():
        if name in masks:
            two_four = fits(tuple(parameter.shape), 1, TWO_FOUR)
            ones = torch.ones_like(masks[name])
            masks[name] = largest_per_group(parameter.detach(), 1, TWO_FOUR) if two_four else ones
            with torch.no_grad():
                parameter.mul_(masks[name]).add_(0.0)
    run = save_run(folder / "run", module, masks, fact=digits_fact(), test=digits_accuracy(module))
    beside = build(run, folder / "beside", onnx="dense")
    packed = build(run, folder / "packed", onnx="both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved, "MAX_WEIGHT_BYTES", 2**30)
        whole = build(run, folder / "whole")
    return Made(whole, beside, packed)


def test_the_manifest_lists_the_weights_beside_the_graph_with_their_hash(made: Made) -> None:
    files = made.beside.info.files
    assert {"model.onnx", "model.onnx.data"} <= files.keys()
    assert "model.onnx.data" not in made.whole.info.files
    data = made.beside.path / "model.onnx.data"
    assert files["model.onnx.data"].sha256 == sha256_file(data)
    assert files["model.onnx"].size_bytes < 20_000 < files["model.onnx.data"].size_bytes
    assert {"model.onnx.data", "model-dense.onnx", "model-dense.onnx.data"} <= made.packed.info.files.keys()


def test_both_forms_are_one_graph_and_the_data_can_be_mapped(made: Made) -> None:
    file = made.beside.onnx_path
    onnx.checker.check_model(file)
    bare = onnx.load(file, load_external_data=False)
    linked = [tensor for tensor in bare.graph.initializer if uses_external_data(tensor)]
    assert len(linked) > 3
    assert all(int(ExternalDataInfo(tensor).offset or 0) % 4096 == 0 for tensor in linked)
    assert model_sha256(onnx_from_file(file)) == sha256_file(made.whole.onnx_path)


def test_onnxruntime_gives_the_same_from_either_file(made: Made) -> None:
    feeds = {"input": np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)}
    outputs = []
    for bundle in (made.whole, made.beside, made.packed):
        with open_session(bundle.onnx_path, signature=bundle.info.signature, n_threads=1) as session:
            outputs.append(session.run(feeds)["logits"].tobytes())
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("change", ["flip", "shorten", "remove"])
def test_weights_that_were_changed_are_not_used(made: Made, tmp_path: Path, change: str) -> None:
    bundle = tmp_path / "b"
    bundle.mkdir()
    for name in (*made.beside.info.files, "manifest.json"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes((made.beside.path / name).read_bytes())
    opened = open_bundle(bundle)
    data = bundle / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    if change == "remove":
        data.unlink()
    else:
        data.write_bytes(content if change == "flip" else content[:-1])
    with pytest.raises(ArtefactError, match=r"model\.onnx\.data"):
        open_bundle(bundle)
    with pytest.raises(ArtefactError, match=r"model\.onnx\.data"):
        _ = opened.onnx_path
    target = tmp_path / "copy" / "model.onnx"
    with pytest.raises(ArtefactError, match=r"model\.onnx\.data"):
        copy_listed_graph(bundle, opened.info.files, "model.onnx", target, described_by="manifest.json")
    assert not list(target.parent.glob("*"))  # nothing that was not checked is left


def test_every_command_that_reads_a_bundle_takes_it(made: Made, tmp_path: Path) -> None:
    assert inspect(made.beside.path).problem is None
    assert inspect(made.beside.path).n_nonzero == inspect(made.whole.path).n_nonzero
    validated = validate(made.packed.path, against=made.beside.path, n_threads=1)
    assert validated.parity_ok
    assert validated.score == validated.torch_score == made.beside.info.score
    quick: dict[str, Any] = {"batches": (1,), "rounds": 8, "block_s": 0.001, "n_threads": 1}
    found = compare(made.beside.path, made.packed.path, **quick)
    sizes = [
        file.size_bytes for name, file in made.beside.info.files.items() if name.startswith("model.onnx")
    ]
    assert found.dense.size_bytes == sum(sizes)
    for bundle in (made.beside, made.packed):
        assert gate(bundle.path, against=made.beside.path, n_threads=1).passed


def test_a_package_has_the_weights_with_every_model(made: Made, tmp_path: Path) -> None:
    written = package([made.beside.path, made.packed.path], ["net", "small"], tmp_path / "package")
    repository = written.path / "model_repository"
    for name in ("net", "small"):
        native, ours = repository / name / "1", repository / f"{name}-python" / "1"
        assert (native / "model.onnx.data").is_file() or (native / "model-dense.onnx.data").is_file()
        digests = json.loads((ours / "model.json").read_text())["sha256"]
        assert {"model.onnx", "model.onnx.data"} == digests.keys()
        assert all(sha256_file(ours / file) == digest for file, digest in digests.items())
        x = {"input": np.ones((1, 1, 8, 8), dtype=np.float32)}
        with (
            open_session(native / "model.onnx", n_threads=1) as a,
            open_session(ours / "model.onnx", n_threads=1) as b,
        ):
            assert a.run(x)["logits"].tobytes() == b.run(x)["logits"].tobytes()


def test_native_backends_get_dense_weights_of_a_packed_bundle_without_a_dense_file(
    made: Made, tmp_path: Path
) -> None:
    run = made.packed.info.run.path
    packed = build(run, tmp_path / "packed", onnx="packed")
    written = package([packed.path], ["net"], tmp_path / "package", runtimes=["onnxruntime"])
    native = written.path / "model_repository" / "net" / "1"
    assert {path.name for path in native.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert model_sha256(onnx_from_file(native / "model.onnx")) == sha256_file(made.whole.onnx_path)


def test_a_network_that_is_named_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a graph, by a dense run whose weights lie beside its file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "factory_of_two_heads.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.body, self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 3), nn.Linear(64, 5)\n"
        "    def forward(self, x):\n"
        "        x = torch.relu(self.body(x))\n"
        "        return self.a(x), self.b(x)\n\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n\n"
        "def example_inputs():\n"
        "    return (torch.zeros(2, 64),)\n"
    )
    run = run_at("factory_of_two_heads:net", run_folder=tmp_path / "run")
    assert {"model.onnx", "model.onnx.data"} <= {path.name for path in run.iterdir()}
    bundle = build(run, tmp_path / "bundle")
    assert {"model.onnx", "model.onnx.data"} <= bundle.info.files.keys()
    assert bundle.info.n_parameters == 64 * 65 + 65 * 8
    onnx.checker.check_model(bundle.onnx_path)


def test_a_tensor_that_stays_and_one_without_raw_data_are_read_back(tmp_path: Path) -> None:
    values = np.arange(600, dtype=np.float32)
    model = onnx.ModelProto(ir_version=10, producer_name="somebody")
    model.opset_import.add(domain="", version=20)
    model.graph.name = "g"
    for name, n in (("small", 10), ("listed", 600)):
        model.graph.initializer.add(name=name, data_type=1, dims=[n], doc_string=name, float_data=values[:n])
    assert save_model(model, tmp_path / "m.onnx", max_bytes=100) == ("m.onnx", "m.onnx.data")
    small, listed = onnx_from_file(tmp_path / "m.onnx").graph.initializer
    assert (list(small.float_data), small.doc_string) == (list(values[:10]), "small")
    assert (listed.raw_data, listed.doc_string, list(listed.dims)) == (values.tobytes(), "listed", [600])
    assert (tmp_path / "m.onnx.data").stat().st_size == values.nbytes


def test_a_digest_is_that_of_one_file(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 600), nn.Linear(600, 2))
    from sparse_export.graph.example import example_of_shape
    from sparse_export.graph.export import onnx_from_module

    model = onnx_from_module(module, example_of_shape((8,)), masks={})
    save_model(model, tmp_path / "m.onnx", max_bytes=2**30)
    assert model_sha256(model) == sha256_file(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == model.SerializeToString(deterministic=True)
