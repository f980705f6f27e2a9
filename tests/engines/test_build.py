"""Engines are really built, in a process of their own, and whatever goes wrong there costs nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from benchmarks.bench_engine import SHAPES, two_four_graph
from sparse_export.engines.build import BuiltEngine, build_engine, engine_from_file
from sparse_export.engines.options import EngineOptions, Profile
from sparse_export.engines.progress import BuildProgress
from sparse_export.errors import EngineBuildFailed, MissingCapability, OutputError, UsageError
from sparse_export.graph.layers import graph_layers
from sparse_export.graph.passes.pack24 import pack
from sparse_export.signature import Signature, TensorInfo, class_signature
from tests.engines.conftest import SMALL, small_graph
from tests.named_graphs import WORDS, model_of, words_graph

pytestmark = [pytest.mark.tensorrt, pytest.mark.usefixtures("rtx")]
RTX = EngineOptions(target="tensorrt-rtx")
FULL = EngineOptions(target="tensorrt")


def _build(out: Path, options: EngineOptions = RTX, **more: Any) -> BuiltEngine:
    return build_engine(small_graph(), out, options, SMALL, **more)


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "stand-in"}


def test_an_engine_is_built_and_told_of(tmp_path: Path) -> None:
    built = _build(
        tmp_path / "x.engine", EngineOptions(target="tensorrt-rtx", architectures=("sm80", "sm120"))
    )
    assert (tmp_path / "x.engine").stat().st_size > 1000
    assert _left(tmp_path) == {"x.engine"}
    assert built.version.startswith("1.")
    assert built.n_layers >= 3
    assert built.build_s > 0
    assert "[I]" in built.log


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _build(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_packed_graph_gives_the_engine_of_the_dense_one(tmp_path: Path) -> None:
    model = small_graph()
    (tmp_path / "dense.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "packed.onnx").write_bytes(pack(model).SerializeToString())
    assert (tmp_path / "packed.onnx").read_bytes() != (tmp_path / "dense.onnx").read_bytes()
    for name in ("dense", "packed"):
        engine_from_file(tmp_path / f"{name}.onnx", tmp_path / name, RTX, SMALL)
    assert (tmp_path / "dense").read_bytes() == (tmp_path / "packed").read_bytes()


def test_the_flag_for_sparse_kernels_changes_no_byte_of_an_engine_for_rtx(tmp_path: Path) -> None:
    """Why the table of layers says `unknown` for that target; should it fail one day, the table can say
    more.
    """
    _build(tmp_path / "with")
    _build(tmp_path / "without", EngineOptions(target="tensorrt-rtx", sparse=False))
    assert (tmp_path / "with").read_bytes() == (tmp_path / "without").read_bytes()


def test_several_profiles_and_every_option_are_taken(tmp_path: Path) -> None:
    profiles = (Profile(sizes={"batch": (1, 1, 1)}), Profile(sizes={"batch": (2, 4, 64)}))
    options = EngineOptions(
        target="tensorrt-rtx", profiles=profiles, workspace_bytes=1 << 24, optimization_level=1
    )
    assert _build(tmp_path / "x", options).build_s > 0


def test_progress_is_told(tmp_path: Path) -> None:
    states: list[BuildProgress] = []
    _build(tmp_path / "x", progress=states.append)
    assert len(states) > 10
    assert all(0 <= state.fraction <= 1 for state in states)
    assert states[-1].fraction == 1


def test_an_interruption_cancels_the_build_and_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(state: BuildProgress) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path / "x", progress=interrupt)
    assert time.monotonic() - start < 10  # asked, not killed after a while
    assert _left(tmp_path) == set()


# ---- the target tensorrt, by a stand-in


def test_tensorrt_11_goes_the_same_way(stand_in: Path, tmp_path: Path) -> None:
    built = _build(tmp_path / "x", FULL)
    assert (built.version, built.cache_used) == ("11.1.0", False)
    assert built.timing_cache


def test_a_timing_cache_is_taken_up_again(stand_in: Path, tmp_path: Path) -> None:
    first = _build(tmp_path / "x", FULL)
    assert _build(tmp_path / "x", FULL, timing_cache=first.timing_cache).cache_used


@pytest.mark.parametrize(
    "refusal",
    [
        (
            "_create = IBuilderConfig.create_timing_cache\n"
            "IBuilderConfig.create_timing_cache = lambda self, content: None if content else _create(self, "
            "content)\n"
        ),
        (
            "_takes = iter((False, True))\n"
            "IBuilderConfig.set_timing_cache = lambda self, cache, ignore_mismatch: next(_takes)\n"
        ),
    ],
)
def test_a_timing_cache_that_the_library_refuses_is_replaced(
    refusal: str, stand_in: Path, tmp_path: Path
) -> None:
    stand_in.write_text(stand_in.read_text() + refusal)
    built = _build(tmp_path / "x", FULL, timing_cache=b"of another device")
    assert not built.cache_used
    assert (tmp_path / "x").is_file()


def test_lines_on_sparsity_are_kept_however_quiet(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(
        stand_in.read_text()
        + "_Builder = Builder\n"
        + "class Builder(_Builder):\n"
        + "    def __init__(self, logger):\n"
        + "        super().__init__(logger)\n"
        + "        logger.log(ILogger.Severity.VERBOSE, '(Sparsity) Chose 1 layer(s) using sparse tactics: first')\n"
        + "        logger.log(ILogger.Severity.VERBOSE, 'of no interest')\n"
    )
    built = _build(tmp_path / "x", FULL)
    assert built.sparsity_lines == ("(Sparsity) Chose 1 layer(s) using sparse tactics: first",)
    assert "of no interest" not in built.log


# ---- what goes wrong


def test_an_absent_library_ends_with_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingCapability, match="Installation Guide"):
        _build(tmp_path / "x", FULL)
    assert not (tmp_path / "x").exists()


def test_an_operator_that_is_unknown_is_named_with_its_node(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildFailed, match="cannot read the graph: node 'activation' of type Nonsense"):
        build_engine(small_graph(op="Nonsense"), tmp_path / "x", RTX, SMALL)


def test_a_gpu_that_the_release_does_not_know_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not build for sm90"):
        _build(tmp_path / "x", EngineOptions(target="tensorrt-rtx", architectures=("sm90",)))
    assert _left(tmp_path) == set()


@pytest.mark.parametrize(
    ("crash", "said"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("os._exit(7)", "ended with 7, without a word"),
        ("os.abort()", "SIGABRT"),
    ],
)
def test_a_crash_is_told_with_the_end_of_the_log_and_a_script_that_repeats_it(
    crash: str, said: str, stand_in: Path, tmp_path: Path
) -> None:
    stand_in.write_text(
        f"import os, sys\n{stand_in.read_text()}"
        "def OnnxParser(*_):\n"
        "    print('the last words', file=sys.stderr, flush=True)\n"
        f"    {crash}\n"
    )
    with pytest.raises(EngineBuildFailed) as caught:
        _build(tmp_path / "x", FULL)
    assert said in caught.value.what
    assert "the last words" in str(caught.value)
    assert _left(tmp_path) == {"x.failed"}
    script = tmp_path / "x.failed" / "repeat.sh"
    assert str(script) in str(caught.value)
    done = subprocess.run([script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "the last words" in done.stderr


def test_a_builder_that_gives_nothing_is_a_failure(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(
        f"{stand_in.read_text()}"
        "_Builder = Builder\n"
        "class Builder(_Builder):\n"
        "    def __init__(self, logger):\n"
        "        super().__init__(logger)\n"
        "        logger.log(ILogger.Severity.ERROR, 'Assertion failed at scope.cpp:4.')\n"
        "    def build_serialized_network(self, network, config):\n"
        "        return None\n"
    )
    with pytest.raises(EngineBuildFailed, match=r"returned no engine: Assertion failed at scope\.cpp:4\. "):
        _build(tmp_path / "x", FULL)


def test_a_builder_that_misses_a_gpu_ends_with_5(stand_in: Path, tmp_path: Path) -> None:
    stand_in.write_text(
        f"{stand_in.read_text()}"
        "def Builder(logger):\n"
        "    logger.log(ILogger.Severity.ERROR, 'CUDA initialization failure with error: 100')\n"
        "    raise TypeError('pybind11::init(): factory function returned nullptr')\n"
    )
    with pytest.raises(MissingCapability, match=r"without a GPU: .*error: 100"):
        _build(tmp_path / "x", FULL)


def test_a_script_that_repeats_a_build_can_build(stand_in: Path, tmp_path: Path) -> None:
    """It is the same build: where nothing is wrong any more it makes the engine."""
    healthy = stand_in.read_text()
    stand_in.write_text(f"{healthy}def OnnxParser(*_): raise SystemExit(3)\n")
    with pytest.raises(EngineBuildFailed):
        _build(tmp_path / "x", FULL)
    stand_in.write_text(healthy)
    done = subprocess.run(
        [tmp_path / "x.failed" / "repeat.sh"], check=True, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "built"
    assert (tmp_path / "x.failed" / "model.engine").is_file()


def test_an_engine_takes_several_inputs_of_free_sizes_in_several_profiles(tmp_path: Path) -> None:
    profiles = (
        Profile(sizes={"batch": (1, 1, 1), "sequence": (4, 12, 64)}),
        Profile(sizes={"sequence": (1, 8, 8)}),
    )
    options = EngineOptions(target="tensorrt-rtx", profiles=profiles)
    built = build_engine(words_graph(), tmp_path / "x", options, WORDS)
    assert (tmp_path / "x").stat().st_size > 1000
    assert "[E]" not in built.log


def test_a_free_size_without_bounds_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No profile bounds sequence.*--profile batch=1:8:32,sequence=12\."):
        build_engine(words_graph(), tmp_path / "x", RTX, WORDS)
    assert _left(tmp_path) == set()


def test_bounds_that_the_graph_cannot_have_end_the_build(tmp_path: Path) -> None:
    model = small_graph()
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "n"
    free = replace(SMALL, inputs=(replace(SMALL.inputs[0], shape=("batch", "n")),))
    options = EngineOptions(target="tensorrt-rtx", profiles=(Profile(sizes={"n": (4, 4, 4)}),))
    with pytest.raises((EngineBuildFailed, UsageError)):
        build_engine(model, tmp_path / "x", options, free)


def test_a_graph_of_fixed_sizes_needs_no_profile(tmp_path: Path) -> None:
    model = small_graph()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    fixed = replace(SMALL, inputs=(replace(SMALL.inputs[0], shape=(3, 16)),), batch=None)
    assert build_engine(model, tmp_path / "x", RTX, fixed).n_layers >= 3


def test_an_input_whose_values_are_sizes_is_refused(tmp_path: Path) -> None:
    signature = Signature(
        inputs=(
            TensorInfo(name="x", dtype="float32", shape=("batch", 4)),
            TensorInfo(name="times", dtype="int64", shape=(2,)),
        ),
        outputs=(TensorInfo(name="y", dtype="float32", shape=("rows", "columns")),),
    )
    model = model_of(signature, [onnx.helper.make_node("Tile", ["x", "times"], ["y"])], {})
    with pytest.raises(UsageError, match="The values of the input times decide about sizes"):
        build_engine(model, tmp_path / "x", RTX, signature)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        _build(tmp_path / "file" / "x")


def test_a_file_that_is_no_onnx_never_reaches_the_library(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(os.urandom(300))
    with pytest.raises(Exception, match="cannot be read as ONNX"):
        engine_from_file(tmp_path / "x.onnx", tmp_path / "x", RTX, SMALL)


def test_a_float_graph_is_whole_afterwards(tmp_path: Path) -> None:
    model = small_graph()
    before = model.SerializeToString()
    build_engine(model, tmp_path / "x", RTX, SMALL)
    assert onnx.load_from_string(before) == model


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        "lenet5",
        pytest.param("resnet18", marks=pytest.mark.full),
        pytest.param("resnet50", marks=pytest.mark.full),
    ],
)
def test_a_whole_networks_packed_file_gives_the_engine_of_its_graph(network: str, tmp_path: Path) -> None:
    model = two_four_graph(network)  # float16, 2:4, any batch from 1 to 32
    (tmp_path / "packed.onnx").write_bytes(pack(model).SerializeToString())
    signature = class_signature(SHAPES[network], 10)
    built = build_engine(model, tmp_path / "engine", RTX, signature)
    engine_from_file(tmp_path / "packed.onnx", tmp_path / "from-packed", RTX, signature)
    assert (tmp_path / "engine").read_bytes() == (tmp_path / "from-packed").read_bytes()
    n_weights = sum(layer.n_weights for layer in graph_layers(model))
    assert (tmp_path / "engine").stat().st_size > n_weights  # it holds them, two bytes each, or half of them
    assert built.n_layers >= 5
