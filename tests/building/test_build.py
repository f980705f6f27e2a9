"""A bundle holds the network of its run, whole, or is not written at all."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_export import models
from sparse_export.building import build
from sparse_export.errors import (
    ArtefactError,
    GateFailed,
    NotTrustedError,
    OutputError,
    SparseExportError,
    UnknownNameError,
    UsageError,
)
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import Bundle, open_bundle
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import Run, TaskInfo, open_run, read_run_info, save_run_info
from sparse_export.graph.export import onnx_from_module
from sparse_export.sparsity.pattern import NMPattern, largest_per_group
from tests.exporting import exported_once
from tests.making_runs import digits_run, network_and_masks, save_run


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Bundle]:
    run = digits_run(tmp_path_factory.mktemp("made") / "run")
    return run, build(run.path)


@pytest.fixture
def run(made: tuple[Run, Bundle], tmp_path: Path) -> Run:
    """A run of its own, to be spoilt."""
    shutil.copytree(made[0].path, tmp_path / "run")
    return open_run(tmp_path / "run")


def rehash(folder: Path, **changes: Any) -> None:
    """Make `run.json` agree with files that were changed on purpose."""
    info = read_run_info(folder)
    save_run_info(folder, replace(info, files=file_infos(folder, info.files), **changes))


def test_the_bundle_lies_beside_the_run_and_holds_what_it_lists(made: Any) -> None:
    run, bundle = made
    assert bundle.path == run.path.with_name("run-bundle")
    found = {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()}
    assert found == {
        "SHA256SUMS",
        "golden/input.npy",
        "golden/output.npy",
        "layers.json",
        "manifest.json",
        "model.onnx",
    }
    assert set(bundle.info.files) == found - {"SHA256SUMS", "manifest.json"}


def test_the_bundle_that_is_returned_is_the_one_on_disk(made: Any) -> None:
    assert open_bundle(made[1].path) == made[1]


def test_every_hash_in_the_sums_is_right(made: Any) -> None:
    folder = made[1].path
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert len(lines) == 5
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_manifest_tells_of_the_run(made: Any) -> None:
    run, bundle = made
    info = bundle.info
    assert info.run.path == str(run.path)
    assert info.run.run_sha256 == sha256_file(run.path / "run.json")
    assert (info.layers, info.score, info.data) == (run.info.layers, run.info.test, run.info.data)
    assert info.density == run.info.n_active / run.info.n_masked


def test_the_manifests_counts_are_those_of_the_file(made: Any) -> None:
    run, bundle = made
    model = onnx.load(bundle.onnx_path)
    arrays = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    floats = [array for array in arrays if array.dtype == np.float32]
    assert bundle.info.n_parameters == sum(array.size for array in floats)
    assert bundle.info.n_nonzero == sum(np.count_nonzero(array) for array in floats)
    layers = json.loads((bundle.path / "layers.json").read_bytes())["layers"]
    assert sum(layer["n_nonzero"] for layer in layers) == run.info.n_active
    assert bundle.info.macs == sum(layer["macs"] for layer in layers)
    assert bundle.info.nonzero_macs == sum(layer["nonzero_macs"] for layer in layers)


def test_the_golden_output_is_torchs_and_onnxruntime_agrees(made: Any) -> None:
    run, bundle = made
    x, y = (np.load(bundle.path / name) for name in ("golden/input.npy", "golden/output.npy"))
    assert x.shape == (8, 1, 8, 8)
    assert x.dtype == y.dtype == np.float32
    module = models.create("digits-cnn").eval()
    module.load_state_dict(load_file(run.path / "model.safetensors"))
    with torch.inference_mode():
        np.testing.assert_array_equal(module(torch.from_numpy(x)).numpy(), y)
    session = onnxruntime.InferenceSession(bundle.onnx_path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": x})[0]
    assert np.abs(found - y).max() <= bundle.info.atol + bundle.info.rtol * y.std()


def test_names_of_classes_are_the_runs_or_those_of_a_file(run: Run, tmp_path: Path) -> None:
    rehash(run.path, task=TaskInfo(name="classification", labels=tuple("abcdefghij")))
    assert build(run.path).info.task.labels == tuple("abcdefghij")
    names = [f"digit {n}" for n in range(10)]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    bundle = build(run.path, labels=tmp_path / "labels.txt")
    assert open_bundle(bundle.path).info.task == TaskInfo(name="classification", labels=tuple(names))
    (tmp_path / "labels.txt").write_text("\n".join(names[:9]))
    with pytest.raises(UsageError, match=r"9 names, and the network has 10 classes"):
        build(run.path, labels=tmp_path / "labels.txt")


def test_building_again_gives_the_same_bytes(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph: Any = importlib.import_module("sparse_export.building.graph")
    monkeypatch.setattr(graph, "onnx_from_module", onnx_from_module)  # the export too is done again
    again = build(made[0].path, tmp_path / "again")
    assert again.info.files == made[1].info.files


def test_the_network_in_memory_is_used_and_left_alone(tmp_path: Path) -> None:
    module, masks = network_and_masks()
    run = replace(save_run(tmp_path / "run", module, masks, name=None), module=module.train())
    bundle = build(run)
    assert module.training
    assert bundle.info.model.name is None


def test_a_run_without_a_name_and_without_its_network_cannot_be_built(tmp_path: Path) -> None:
    save_run(tmp_path / "run", *network_and_masks(), name=None)
    with pytest.raises(UsageError, match="does not say how its network is made"):
        build(tmp_path / "run")


def test_a_dense_run_has_density_one(tmp_path: Path) -> None:
    bundle = build(digits_run(tmp_path / "run", density=1.0).path)
    assert bundle.info.density == 1.0
    assert bundle.info.n_nonzero == bundle.info.n_parameters


def test_an_earlier_bundle_is_replaced(made: Any, run: Run) -> None:
    shutil.copytree(made[1].path, run.path.parent / "run-bundle")
    (run.path.parent / "run-bundle" / "model.onnx").write_bytes(b"old")
    open_bundle(build(run.path).path)
    assert sorted(path.name for path in run.path.parent.iterdir()) == ["run", "run-bundle"]


@pytest.mark.parametrize("name", ["notes.txt", "golden/mine.npy"])
def test_a_bundle_with_a_file_of_somebody_is_not_replaced(made: Any, run: Run, name: str) -> None:
    bundle = run.path.parent / "run-bundle"
    shutil.copytree(made[1].path, bundle)
    (bundle / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {bundle / name}, which its manifest.json does not list"):
        build(run.path)
    assert (bundle / name).read_text() == "mine"


def test_what_running_a_bundle_left_in_it_does_not_keep_it_from_being_replaced(made: Any, run: Run) -> None:
    bundle = run.path.parent / "run-bundle"
    shutil.copytree(made[1].path, bundle)
    (bundle / "cache" / "onnxruntime-tensorrt" / "ab").mkdir(parents=True)
    (bundle / "cache" / "onnxruntime-tensorrt" / "ab" / "x.engine").write_bytes(b"native code")
    open_bundle(build(run.path).path)
    assert not (bundle / "cache").exists()


def test_a_bundle_with_a_link_to_a_folder_is_not_replaced(made: Any, run: Run, tmp_path: Path) -> None:
    bundle = run.path.parent / "run-bundle"
    shutil.copytree(made[1].path, bundle)
    (bundle / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(UsageError, match="link, which its manifest"):
        build(run.path)


def test_a_link_to_a_bundle_stays_and_what_it_names_is_replaced(made: Any, run: Run, tmp_path: Path) -> None:
    shutil.copytree(made[1].path, tmp_path / "real")
    (tmp_path / "real" / "model.onnx").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    open_bundle(build(run.path, tmp_path / "link").path)
    open_bundle(tmp_path / "real")
    assert (tmp_path / "link").is_symlink()


def test_an_empty_folder_is_filled(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bundle = build(run.path, tmp_path / "empty")
    assert bundle.path == tmp_path / "empty"
    assert open_bundle(bundle.path).info == bundle.info


def test_a_folder_of_something_else_is_not_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(UsageError, match="thesis exists and is not a bundle"):
        build(run.path, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_the_run_itself_is_not_replaced(run: Run) -> None:
    with pytest.raises(UsageError, match="is not a bundle"):
        build(run.path, run.path)
    open_run(run.path)


def test_a_file_is_not_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="file exists and is not a bundle"):
        build(run.path, tmp_path / "file")


def test_a_place_below_a_file_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="Cannot write"):
        build(run.path, tmp_path / "file" / "bundle")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Cannot write"):
        build(run.path, tmp_path / "locked" / "bundle")


def test_a_full_disk_leaves_nothing_behind(
    made: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made[1].path, tmp_path / "run-bundle")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        build(run.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-bundle"]
    assert open_bundle(tmp_path / "run-bundle").info == made[1].info


def test_a_graph_that_computes_something_else_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_module: Any = importlib.import_module("sparse_export.building.graph")
    genuine = build_module.onnx_from_module

    def spoilt(*args: Any, **options: Any) -> onnx.ModelProto:
        model: onnx.ModelProto = genuine(*args, **options)
        for tensor in model.graph.initializer:
            if tensor.name == "fc2.bias":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 0.5, tensor.name))
        return model

    monkeypatch.setattr(build_module, "onnx_from_module", spoilt)
    with pytest.raises(GateFailed, match=r"differs from the network by 0\.5"):
        build(run.path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Unheard(nn.Module):
    """Takes another branch for one sample, which torch.export is not shown."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits if torch.compiler.is_exporting() or x.shape[0] > 1 else 2 * logits


class Heard(nn.Module):
    """Takes another branch for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.flatten(1))
        return logits if x.shape[0] > 1 else 2 * logits


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (Heard, UsageError, r"Heard depends on the batch size at test_build\.py.*false at batch 1"),
        (Unheard, GateFailed, "at batch 1 and agrees at batch 2, 3 and 8"),
    ],
)
def test_a_network_that_computes_something_else_at_one_batch_size_is_not_built(
    make: type[nn.Module], error: type[SparseExportError], told: str, tmp_path: Path
) -> None:
    module = make().eval()
    run = save_run(tmp_path / "run", module, {}, name=None)
    with pytest.raises(error, match=told):
        build(replace(run, module=module))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kept", [True, False])
def test_a_graph_that_breaks_the_pattern_its_run_promises_is_not_written(kept: bool, tmp_path: Path) -> None:
    module, masks = network_and_masks(density=0.999)
    pattern = NMPattern(n=2, m=4)
    weight = module.get_parameter("fc1.weight")
    if kept:
        masks["fc1.weight"] = largest_per_group(weight.detach(), 1, pattern)
        with torch.no_grad():
            weight.mul_(masks["fc1.weight"]).add_(0.0)
    run = save_run(tmp_path / "run", module, masks)
    layers = tuple(
        replace(layer, pattern="2:4" if layer.name == "fc1.weight" else None) for layer in run.info.layers
    )
    save_run_info(run.path, replace(run.info, layers=layers))
    if kept:
        assert build(run.path).info.layers == layers
        return
    with pytest.raises(GateFailed, match=r"fc1\.weight"):
        build(run.path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_unknown_target_is_told_with_the_known_ones(run: Run) -> None:
    with pytest.raises(UnknownNameError, match=r"no build target named 'onxx'.*Did you mean 'onnx'"):
        build(run.path, targets=["onxx"])


@pytest.mark.parametrize("targets", [[], "onnx"])
def test_targets_must_be_a_list_of_some(run: Run, targets: Any) -> None:
    with pytest.raises(UsageError, match="build targets are"):
        build(run.path, targets=targets)


def test_a_tampered_weight_file_is_refused(run: Run) -> None:
    file = run.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.safetensors is not the file that was written"):
        build(run.path)


def test_a_truncated_weight_file_is_refused_even_when_its_hash_is_on_record(run: Run) -> None:
    file = run.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    rehash(run.path)
    with pytest.raises(ArtefactError, match=r"model\.safetensors cannot be read"):
        build(run.path)


def test_a_weight_file_that_is_not_on_record_is_refused(run: Run) -> None:
    info = read_run_info(run.path)
    kept = {"masks.safetensors": info.files["masks.safetensors"]}
    save_run_info(run.path, replace(info, files=kept))
    with pytest.raises(ArtefactError, match=r"lists no model\.safetensors"):
        build(run.path)


def test_an_unfinished_run_is_refused(run: Run) -> None:
    rehash(run.path, status="running")
    with pytest.raises(ArtefactError, match="is not finished"):
        build(run.path)


def test_the_weights_of_another_network_are_refused_with_the_differences(tmp_path: Path) -> None:
    module, masks = network_and_masks("lenet5")
    save_run(tmp_path / "run", module, masks, name="digits-cnn")
    with pytest.raises(ArtefactError, match="another network than digits-cnn") as caught:
        build(tmp_path / "run")
    assert "conv1.weight has shape (20, 1, 5, 5) instead of (16, 1, 3, 3)" in caught.value.what
    assert "it lacks bn1.bias" in caught.value.what
    assert "it has conv1.bias, which the network has not" in caught.value.what


def test_masks_for_other_layers_than_on_record_are_refused(run: Run) -> None:
    masks = load_file(run.path / "masks.safetensors")
    del masks["fc1.weight"]
    save_file(masks, run.path / "masks.safetensors")
    rehash(run.path)
    with pytest.raises(ArtefactError, match=r"run\.json has masks for .*fc1\.weight"):
        build(run.path)


def test_a_mask_that_keeps_another_number_than_on_record_is_refused(run: Run) -> None:
    masks = load_file(run.path / "masks.safetensors")
    masks["fc1.weight"][:] = True
    save_file(masks, run.path / "masks.safetensors")
    rehash(run.path)
    with pytest.raises(ArtefactError, match=r"mask for fc1\.weight .* keeps 16384 weights"):
        build(run.path)


def test_a_mask_of_another_shape_is_refused(run: Run) -> None:
    masks = load_file(run.path / "masks.safetensors")
    masks["fc1.weight"] = masks["fc1.weight"].T.contiguous()
    save_file(masks, run.path / "masks.safetensors")
    rehash(run.path)
    with pytest.raises(ArtefactError, match=r"mask for fc1\.weight .* has shape \(256, 64\)"):
        build(run.path)


def test_weights_that_the_mask_does_not_cover_are_refused(run: Run) -> None:
    state = load_file(run.path / "model.safetensors")
    state["fc1.weight"][:] = 1.0
    save_file(state, run.path / "model.safetensors")
    rehash(run.path)
    with pytest.raises(ArtefactError, match=r"fc1\.weight .* has nonzero weights"):
        build(run.path)


def test_a_density_other_than_on_record_is_refused(run: Run) -> None:
    rehash(run.path, density=0.5)
    with pytest.raises(ArtefactError, match=r"and 0\.500000 by run\.json"):
        build(run.path)


def test_masks_of_bytes_are_masks(run: Run) -> None:
    masks = load_file(run.path / "masks.safetensors")
    save_file({name: mask.to(torch.uint8) for name, mask in masks.items()}, run.path / "masks.safetensors")
    rehash(run.path)
    assert build(run.path).info.density == run.info.density


def test_a_network_that_gives_nan_is_not_built(tmp_path: Path) -> None:
    module, masks = network_and_masks()
    with torch.no_grad():
        module.get_parameter("fc2.bias")[0] = float("nan")
    save_run(tmp_path / "run", module, masks)
    with pytest.raises(GateFailed, match="NaN or infinity"):
        build(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_input_shape_that_does_not_fit_is_told(tmp_path: Path) -> None:
    save_run(tmp_path / "run", *network_and_masks(), input_shape=(3, 8, 8))
    with pytest.raises(UsageError, match=r"DigitsCNN does not take inputs \(8, 3, 8, 8\)"):
        build(tmp_path / "run")


class _Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("a table of its own")


def test_whatever_the_network_raises_is_told_with_its_cause(tmp_path: Path) -> None:
    module = _Refusing()
    run = save_run(tmp_path / "run", module, {}, name=None)
    with pytest.raises(UsageError, match=r"_Refusing does not take inputs .*a table of its own") as caught:
        build(replace(run, module=module))
    assert isinstance(caught.value.__cause__, KeyError)


_FACTORY = """
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def factory_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of somebody else's network; its module leaves a file when it is imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "foreign_net.py").write_text(_FACTORY)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "foreign_net", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return save_run(tmp_path / "run", module, {}, name="foreign_net:small")


def imported(tmp_path: Path) -> bool:
    return (tmp_path / "code" / "imported").exists()


def test_a_factory_that_nobody_vouched_for_is_not_imported(factory_run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotTrustedError, match=sha256_file(factory_run.path / "run.json")):
        build(factory_run.path)
    assert not imported(tmp_path)


def test_a_factory_is_not_imported_for_the_digest_of_something_else(factory_run: Run, tmp_path: Path) -> None:
    with pytest.raises(NotTrustedError, match="not 'aaaa"):
        build(factory_run.path, trust="a" * 64)
    assert not imported(tmp_path)


def test_a_factory_is_imported_with_its_digest_and_then_without(factory_run: Run, tmp_path: Path) -> None:
    build(factory_run.path, trust=sha256_file(factory_run.path / "run.json"))
    assert imported(tmp_path)
    build(factory_run.path)


def test_a_run_that_changed_after_it_was_trusted_is_not_trusted(factory_run: Run) -> None:
    build(factory_run.path, trust=sha256_file(factory_run.path / "run.json"))
    rehash(factory_run.path, seed=1)
    with pytest.raises(NotTrustedError):
        build(factory_run.path)


def test_a_factorys_network_in_memory_needs_no_trust(factory_run: Run, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    build(replace(factory_run, module=module))
    assert not imported(tmp_path)
