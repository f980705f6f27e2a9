"""What every test gets: its own user folders, a fixed seed, and a reason where the hardware is missing."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("here", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "repeatable", deadline=None, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.load_profile("repeatable" if os.environ.get("CI") else "here")


# Tests of serving need Triton's client from their first line on. A machine that has only torch and a card has none.
_LEFT_OUT = [] if importlib.util.find_spec("tritonclient") else ["serving"]
collect_ignore = list(_LEFT_OUT)


def pytest_configure() -> None:
    """Before a test module imports onnxruntime, and for every process that a test starts: no telemetry."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def pytest_report_header() -> list[str]:
    return [f"left out: tests/{name}, for tritonclient is not installed" for name in _LEFT_OUT]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="Seed of every test's random numbers (default 0).")


def _cuda_is_there() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about an old or absent driver; the skip says it
        return torch.cuda.is_available()


def _tensorrt_is_there() -> bool:
    from sparse_export.engines import tensorrt_import

    return any(map(tensorrt_import.is_installed, tensorrt_import.TARGETS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs absent hardware, and look for the hardware only when a test asks for it."""
    for mark, is_there, reason in (
        ("gpu", _cuda_is_there, "no CUDA device"),
        ("tensorrt", _tensorrt_is_there, "no TensorRT library"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        seed = item.config.getoption("--seed")
        report.sections.append(("seed", f"random numbers started from --seed {seed}"))
    return report


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--seed")
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):  # loading it would cost the light tests seconds
        torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    """A test that sets torch's number of threads does not set it for the next."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _own_user_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point everything that is kept per user to a temporary folder: no test reads or writes the user's own.

    For the session, so that a bundle which a session fixture made is still known to the tests that use it.
    """
    home = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "SPARSE_EXPORT_DATA"):
            patch.setenv(variable, str(home / variable.lower()))
        for variable in [name for name in os.environ if name.startswith("SPARSE_EXPORT_")]:
            if variable != "SPARSE_EXPORT_DATA":
                patch.delenv(variable)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that may lie beside the checkout."""
    folder = CHECKOUT.parent / "shared" / "data"
    if not (folder / "materialize.py").is_file():
        pytest.skip(f"no real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def mnist_dir(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that holds the real MNIST as torchvision lays it out."""
    folder = tmp_path_factory.mktemp("mnist")
    subprocess.run(
        [sys.executable, str(shared_data / "materialize.py"), str(folder), "mnist"],
        check=True,
        capture_output=True,
    )
    return folder
