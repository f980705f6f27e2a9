"""Two bundles of one network, and Triton's server, installed from nothing once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_export.building import build
from sparse_export.errors import MissingCapability
from sparse_export.formats.run import TaskInfo
from sparse_export.serving.golden_files import write_golden_files
from sparse_export.serving.repository import open_served
from sparse_export.serving.server_files import find_server, install_server
from sparse_export.sparsity.pattern import NMPattern, fits, largest_per_group
from sparse_export.tasks import data
from tests.cli.conftest import call  # noqa: F401 - a fixture
from tests.making_runs import digits_accuracy, digits_fact, network_and_masks, save_run
from tests.serving.serving import Serving, serving

TWO_FOUR = NMPattern(n=2, m=4)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Bundles:
    """dense: as it is. sparse: 2:4 where it can be, with packed weights. other: dense, with other weights."""

    dense: Path
    sparse: Path
    other: Path


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("served")
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # small networks: on a busy machine threads wait for each other longer than they work
    for name, seed, density in (("dense", 5, 1.0), ("sparse", 5, 0.999), ("other", 6, 1.0)):
        module, masks = network_and_masks(density=density, seed=seed)
        for key, parameter in module.named_parameters():
            if key in masks:
                two_four = fits(tuple(parameter.shape), 1, TWO_FOUR)
                kept = (
                    largest_per_group(parameter.detach(), 1, TWO_FOUR)
                    if two_four
                    else torch.ones_like(masks[key])
                )
                masks[key] = kept
                with torch.no_grad():
                    parameter.mul_(kept).add_(0.0)
        run = save_run(
            folder / f"{name}-run",
            module,
            masks,
            fact=digits_fact(),
            test=digits_accuracy(module),
            task=TaskInfo(name="classification", labels=DIGITS if name == "dense" else ()),
        )
        build(run, folder / name, onnx="packed" if name == "sparse" else "dense")
    torch.set_num_threads(threads)
    return Bundles(folder / "dense", folder / "sparse", folder / "other")


@pytest.fixture(scope="session")
def golden(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Folders with the golden pair of each, as a package has them."""
    folder = tmp_path_factory.mktemp("golden")
    for name in ("dense", "sparse", "other"):
        write_golden_files(folder / name, open_served(getattr(bundles, name)))
    return Bundles(folder / "dense", folder / "sparse", folder / "other")


@pytest.fixture(scope="session")
def server() -> Path:
    """The installed server. Where it cannot be had the tests are skipped; in CI they fail."""
    try:
        folder = install_server(print)
        find_server()
    except MissingCapability as cause:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no server of Triton: {cause}")
    return folder


@pytest.fixture(scope="session")
def running(server: Path, bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`serve` with the dense and the sparse bundle side by side."""
    log = tmp_path_factory.mktemp("running") / "log"
    with serving(bundles.dense, bundles.sparse, log=log) as one:
        yield one


@pytest.fixture(scope="session")
def digits_test() -> np.ndarray:
    """The test set as the network takes it, float32 (samples, 1, 8, 8)."""
    digits = data.load("digits")
    x: np.ndarray = data.normalise(digits.x_test, digits.mean, digits.std).numpy()
    return x
