"""No engine is loaded that was changed, is somebody else's, or is for another machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.engines import tensorrt_import
from sparse_export.engines.build import build_engine
from sparse_export.engines.header import read_header, require_whole
from sparse_export.engines.loadable import engine_of, require_loadable
from sparse_export.engines.options import EngineOptions
from sparse_export.engines.tensorrt_import import Gpu
from sparse_export.errors import ArtefactError, MissingCapability, NotTrustedError, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.bundle import BUNDLE_FILE, Bundle
from sparse_export.runtimes.choice import RUNTIMES, best_runtime, open_runtime, runtime_states
from tests.engines.conftest import SMALL, small_graph
from tests.engines.making import (
    FILE,
    VERSION,
    bundle_with_engine,
    engine_fact,
    header,
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Bundle]:
    """Write a bundle with one engine, vouched for unless `known` is false."""
    return partial(bundle_with_engine, tmp_path)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str], None]:
    """Pretend a GPU and a version of the library."""

    def pretend(architecture: str | None, version: str = VERSION) -> None:
        gpu = None if architecture is None else Gpu(name="a card", architecture=architecture)
        monkeypatch.setattr(tensorrt_import, "gpu", lambda: gpu)
        monkeypatch.setattr(tensorrt_import, "version", lambda _: version)

    pretend("sm89")
    return pretend


def _require(bundle: Bundle, trusted: str | None = None) -> None:
    require_loadable(bundle, bundle.info.engines[0], trusted=trusted)


Make = Callable[..., Bundle]
Machine = Callable[..., None]


def test_an_engine_of_ones_own_for_this_machine_may_be_loaded(make: Make, machine: Machine) -> None:
    _require(make())


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_changed_engine_ends_with_6(damage: bytes | None, make: Make, machine: Machine) -> None:
    bundle = make()
    (bundle.path / FILE).write_bytes(os.urandom(100) if damage is None else damage)
    with pytest.raises(ArtefactError) as caught:
        _require(bundle)
    assert caught.value.exit_code == 6


def test_an_engine_that_is_gone_ends_with_6(make: Make, machine: Machine) -> None:
    bundle = make()
    (bundle.path / FILE).unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        _require(bundle)


def test_an_engine_that_the_manifest_does_not_list_is_refused(make: Make, machine: Machine) -> None:
    bundle = make(file="engines/other.engine")
    with pytest.raises(ArtefactError, match="lists no engines/other"):
        _require(bundle)


def test_an_engine_that_climbs_out_of_its_bundle_is_refused(make: Make, machine: Machine) -> None:
    bundle = make()
    facts = {"../x.engine": bundle.info.files[FILE]}
    bundle = Bundle(
        path=bundle.path, info=replace(bundle.info, files=facts, engines=(engine_fact(file="../x.engine"),))
    )
    with pytest.raises(ArtefactError, match="lies outside"):
        _require(bundle)


def test_somebody_elses_bundle_needs_trust_once(make: Make, machine: Machine) -> None:
    bundle = make(
        known=False, build_s=float(int.from_bytes(os.urandom(4)))
    )  # a manifest that nobody has seen
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    with pytest.raises(NotTrustedError, match=f"--trust {digest}"):
        _require(bundle)
    with pytest.raises(NotTrustedError, match="not '1"):
        _require(bundle, trusted="1" * 64)
    _require(bundle, trusted=digest)
    _require(bundle)


def test_nothing_is_asked_of_the_library_before_the_file_is_trusted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: str) -> str:
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(tensorrt_import, "version", refuse)
    bundle = make(known=False, build_s=float(int.from_bytes(os.urandom(4))))
    with pytest.raises(NotTrustedError):
        _require(bundle)


@pytest.mark.parametrize(
    ("changes", "here", "fits"),
    [
        ({}, VERSION, True),
        ({}, "1.8.0.1", False),
        ({"version_compatible": True}, "1.8.0.1", True),
        ({"version_compatible": True}, "1.6.0.1", False),
    ],
)
def test_the_version_of_the_library_has_to_fit(
    changes: dict[str, object], here: str, fits: bool, make: Make, machine: Machine
) -> None:
    machine("sm89", here)
    bundle = make(**changes)
    if fits:
        _require(bundle)
        return
    with pytest.raises(ArtefactError, match=f"and {here} is here"):
        _require(bundle)


FULL = {"target": "tensorrt", "architectures": (), "architecture": "sm80"}


@pytest.mark.parametrize(
    ("changes", "here", "fits"),
    [
        ({}, "sm89", True),
        ({}, "sm86", False),
        ({"architectures": ()}, "sm120", True),
        ({"architectures": ()}, "sm75", False),  # Turing has to be named
        ({"architectures": ("sm75",)}, "sm75", True),
        ({"architectures": ("sm75", "sm89")}, "sm75", True),
        ({"architectures": ("sm75",)}, "sm89", False),
        ({}, "sm75", False),
        (FULL, "sm80", True),
        (FULL, "sm86", False),
        ({**FULL, "hardware": "ampere-plus"}, "sm120", True),
        ({**FULL, "hardware": "ampere-plus"}, "sm75", False),
        ({**FULL, "architecture": None}, "sm80", False),
    ],
)
def test_the_gpu_has_to_fit(
    changes: dict[str, object], here: str, fits: bool, make: Make, machine: Machine
) -> None:
    machine(here)
    bundle = make(os.urandom(100), **changes)
    if fits:
        _require(bundle)
        return
    with pytest.raises(ArtefactError, match=f"not for this GPU, a card \\({here}\\)"):
        _require(bundle)


@pytest.mark.parametrize("here", ["sm70", "sm90", "sm100"])
@pytest.mark.parametrize("architectures", [(), ("sm89",)])
def test_where_tensorrt_for_rtx_does_not_run_no_new_build_is_advised(
    architectures: tuple[str, ...], here: str, make: Make, machine: Machine
) -> None:
    machine(here)
    with pytest.raises(MissingCapability, match=f"does not support this GPU, a card \\({here}\\)") as caught:
        _require(make(os.urandom(100), architectures=architectures))
    assert "--target tensorrt " in caught.value.do


def test_on_turing_an_engine_that_does_not_name_it_is_to_be_built_anew_for_it(
    make: Make, machine: Machine
) -> None:
    machine("sm75")
    with pytest.raises(ArtefactError) as caught:
        _require(make(os.urandom(100), architectures=()))
    assert "--gpu-arch sm75" in caught.value.do


def test_without_a_gpu_an_engine_ends_with_5(make: Make, machine: Machine) -> None:
    machine(None)
    with pytest.raises(MissingCapability, match="no CUDA device") as caught:
        _require(make())
    assert caught.value.exit_code == 5


def test_an_engine_of_another_library_than_told_is_refused(make: Make, machine: Machine) -> None:
    with pytest.raises(ArtefactError, match=r"is an engine of tensorrt-rtx 1\.2\.0\.54"):
        _require(make(header(100, "1.2.0.54")))


def test_a_bundle_without_an_engine_for_a_target_says_which_it_has(make: Make) -> None:
    with pytest.raises(UsageError, match="its engines: tensorrt-rtx"):
        engine_of(make(), "tensorrt")


# ---- the header


@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_a_header_or_as_unknown(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(content)
        header = read_header(path)
        assert header.size_bytes == len(content)
        assert (header.target is None) == (len(content) < 64 or not content.startswith(b"vtrt"))


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_a_real_engine_tells_its_version_and_length_and_a_cut_one_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    build_engine(small_graph(), path, EngineOptions(target="tensorrt-rtx"), SMALL)
    header = read_header(path)
    assert (header.target, header.version) == ("tensorrt-rtx", tensorrt_import.version("tensorrt-rtx"))
    require_whole(path, header)
    for size in (0, 70, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ArtefactError, match=r"is empty|by its header"):
            require_whole(path, read_header(path))
        build_engine(small_graph(), path, EngineOptions(target="tensorrt-rtx"), SMALL)


# ---- the choice


def test_every_runtime_says_whether_it_works_here_or_why_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: None)
    states = {state.name: state.problem for state in runtime_states(make())}
    assert tuple(states) == RUNTIMES
    assert states["onnxruntime-cpu"] is None
    assert all(states[name] for name in RUNTIMES if name != "onnxruntime-cpu")
    assert best_runtime(make()) == "onnxruntime-cpu"


def test_a_runtime_that_was_named_is_never_replaced(make: Make, machine: Machine) -> None:
    machine(None)
    with pytest.raises(MissingCapability):
        open_runtime(make(), "tensorrt-rtx")
    with pytest.raises(UsageError, match="no engine for tensorrt"):
        open_runtime(make(), "tensorrt")
    with pytest.raises(UsageError, match="onnxruntime-cpu"):
        open_runtime(make(), "onnxrt")


def test_an_engine_goes_before_onnxruntime_where_it_can_run(make: Make, machine: Machine) -> None:
    assert best_runtime(make()) == "tensorrt-rtx"


def test_a_runtime_that_nobody_vouched_for_says_what_to_do_and_works_with_the_digest(
    make: Make, machine: Machine
) -> None:
    bundle = make(known=False, architectures=("sm89", "sm120"))
    digest = sha256_file(bundle.path / BUNDLE_FILE)
    assert best_runtime(bundle) == "onnxruntime-cpu"
    (problem,) = (one.problem for one in runtime_states(bundle) if one.name == "tensorrt-rtx")
    assert problem is not None
    assert f"--trust {digest}" in problem
    assert best_runtime(bundle, trust=("0" * 64, digest)) == "tensorrt-rtx"
