"""A 2:4 bundle of the digits, a dense one of the same weights, and bundles that were changed with their
manifests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from sparse_export import trust
from sparse_export.building import build
from sparse_export.evaluate.gate import Gate, gate
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle, read_bundle_info, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import Run
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from tests.exporting import exported_once
from tests.making_runs import digits_accuracy, digits_fact, network_and_masks, save_run

TWO_FOUR = NMPattern(n=2, m=4)
Spoil = Callable[[Callable[[onnx.ModelProto], None]], Path]
QUICK: dict[str, Any] = {"batches": (1,), "rounds": 20, "block_s": 0.001, "n_threads": 1}


@pytest.fixture(scope="package", autouse=True)
def _exported_once() -> Iterator[None]:
    with exported_once():
        yield


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """digits-cnn with random weights: 2:4 wherever that fits, and the very same weights as a run without
    masks.
    """
    folder = tmp_path_factory.mktemp("gating")
    module, masks = network_and_masks(density=0.999)
    patterns = {}
    for name, parameter in module.named_parameters():
        if name in masks:
            two_four = fits(tuple(parameter.shape), 1, TWO_FOUR)
            patterns[name] = "2:4" if two_four else None
            masks[name] = (
                largest_per_group(parameter.detach(), 1, TWO_FOUR)
                if two_four
                else torch.ones_like(masks[name])
            )
            with torch.no_grad():
                parameter.mul_(masks[name]).add_(0.0)
    facts: dict[str, Any] = {"fact": digits_fact(), "test": digits_accuracy(module)}
    made = save_run(folder / "sparse-run", module, masks, **facts)
    layers = tuple(replace(layer, pattern=patterns.get(layer.name)) for layer in made.info.layers)
    return {
        "sparse": save_run(folder / "sparse-run", module, masks, **facts, layers=layers),
        "dense": save_run(folder / "dense-run", module, {}, **facts),
    }


@pytest.fixture(scope="package")
def sparse(runs: dict[str, Run]) -> Bundle:
    return build(runs["sparse"].path)


@pytest.fixture(scope="package")
def dense(runs: dict[str, Run]) -> Bundle:
    return build(runs["dense"].path)


@pytest.fixture(scope="package")
def passed(sparse: Bundle, dense: Bundle) -> Gate:
    return gate(sparse.path, dense.path, n_threads=1)


def rewrite(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with files that were changed on purpose, and vouch for it."""
    info = read_bundle_info(folder)
    files = {name: file_infos(folder, [name])[name] for name in {*info.files, *changes.pop("add", ())}}
    save_bundle_info(folder, replace(info, files=files, **changes))
    trust.remember(sha256_file(folder / BUNDLE_FILE))


@pytest.fixture
def copied(sparse: Bundle, tmp_path: Path) -> Path:
    """A bundle of its own, to be changed; its run is not beside it."""
    folder = tmp_path / "bundle"
    shutil.copytree(sparse.path, folder)
    rewrite(folder, run=replace(sparse.info.run, path="/nowhere/run"))
    return folder


@pytest.fixture
def spoil(copied: Path) -> Spoil:
    """Change the graph of a bundle, and its manifest with it; gives the bundle."""

    def spoilt(change: Callable[[onnx.ModelProto], None]) -> Path:
        model = onnx.load(copied / "model.onnx")
        change(model)
        onnx.save(model, copied / "model.onnx")
        rewrite(copied)
        return copied

    return spoilt
