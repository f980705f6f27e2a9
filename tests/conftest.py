"""What every test gets: its own user folders, a fixed seed, and a reason where the hardware is missing."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from tests import many

CHECKOUT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("here", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "repeatable", deadline=None, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.load_profile("repeatable" if os.environ.get("CI") else "here")


# Tests of serving need Triton's client from their first line on. A machine that has only torch and a card has
# none.
_LEFT_OUT = [] if importlib.util.find_spec("tritonclient") else ["serving"]
collect_ignore = list(_LEFT_OUT)


def pytest_configure(config: pytest.Config) -> None:
    """Before a test module imports onnxruntime, and for every process that a test starts: no telemetry."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    many.part = config.getoption("--part")


def pytest_report_header() -> list[str]:
    return [f"left out: tests/{name}, for tritonclient is not installed" for name in _LEFT_OUT]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="Seed of every test's random numbers (default 0).")
    parser.addoption("--part", choices=PARTS, help="Run one part of the suite; without it, all of them.")


# Part of the suite -> which tests are in it. Each test is in one; those with `many` examples are in two.
PARTS: dict[str, Callable[[set[str]], bool]] = {
    "every-day": lambda marks: not marks & {"full", "timing"},
    "timing": lambda marks: "timing" in marks and "full" not in marks,
    "full": lambda marks: "timing" not in marks and bool(marks & {"full", "many"}),
    "full-timing": lambda marks: marks >= {"full", "timing"},
}

# Tests of these folders share what took long to make; of the others, those of one file stay together.
TOGETHER = ("tests/serving/", "tests/evaluate/gating/", "tests/cli/", "tests/report/")

# What takes longest is begun first, so that no worker is left with it at the end.
FIRST = ("tests/serving/", "tests/train/test_mnist.py", "tests/train/test_distributed.py")


def unit_of(nodeid: str) -> str:
    """The tests that one worker of pytest-xdist runs, one after the other."""
    return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: files and, where they share fixtures, folders are kept together."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    scheduling._split_scope = unit_of
    return scheduling


def _cuda_is_there() -> bool:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about an old or absent driver; the skip says it
        return torch.cuda.is_available()


def _tensorrt_is_there() -> bool:
    from sparse_export.engines import tensorrt_import

    return any(map(tensorrt_import.is_installed, tensorrt_import.TARGETS))


def _choose_part(config: pytest.Config, items: list[pytest.Item]) -> None:
    if many.part:
        is_in = PARTS[many.part]
        chosen = [item for item in items if is_in({mark.name for mark in item.iter_markers()})]
        if len(chosen) < len(items):
            config.hook.pytest_deselected(items=[*set(items) - set(chosen)])
        items[:] = chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the part, and skip what needs absent hardware, which is looked for only when a test asks for
    it.
    """
    _choose_part(config, items)
    if hasattr(config, "workerinput"):
        items.sort(
            key=lambda item: FIRST.index(unit) if (unit := unit_of(item.nodeid)) in FIRST else len(FIRST)
        )
    for mark, is_there, reason in (
        ("gpu", _cuda_is_there, "no CUDA device"),
        ("tensorrt", _tensorrt_is_there, "no TensorRT library"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not is_there():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Set aside what was loaded: whatever measures collects garbage first, and went through all of torch each
    time.
    """
    gc.collect()
    gc.freeze()


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
