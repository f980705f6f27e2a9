"""What only a GPU can show: engines that are loaded and run. `python -m pytest -m gpu tests/engines`"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from sparse_export.building import build
from sparse_export.engines import tensorrt_import
from sparse_export.engines.loadable import engine_of
from sparse_export.engines.options import EngineOptions, Profile
from sparse_export.engines.tactics import kernels_from_inspection, read_sparsity
from sparse_export.evaluate.bench import bench
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.layers import read_engine_layers, read_engine_times
from sparse_export.formats.run import Run
from sparse_export.runtimes.choice import open_runtime
from sparse_export.runtimes.tensorrt import open_engine
from sparse_export.runtimes.tolerance import differences
from tests.exporting import exported_once
from tests.making_runs import digits_run

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]
PROFILES = (Profile(sizes={"batch": (1, 1, 4)}), Profile(sizes={"batch": (5, 64, 128)}))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with exported_once():
        yield digits_run(tmp_path_factory.mktemp("gpu") / "run")


@pytest.fixture(scope="module", params=tensorrt_import.TARGETS)
def bundle(request: pytest.FixtureRequest, run: Run) -> Bundle:
    """fp16, with two profiles."""
    target: tensorrt_import.Target = request.param
    if not tensorrt_import.is_installed(target):
        pytest.skip(f"{tensorrt_import.module_name(target)} is not installed")
    if target == "tensorrt-rtx" and torch.cuda.get_device_capability()[0] == 9:
        pytest.skip("TensorRT for RTX does not support Hopper")
    options = EngineOptions(target=target, profiles=PROFILES)
    out = run.path.with_name(target)
    return build(run.path, out, targets=[target], precision="fp16", engines=[options])


def _wanted(bundle: Bundle, x: np.ndarray) -> np.ndarray:
    with open_runtime(bundle, "onnxruntime-cpu") as session:
        return session.run(x)


def _near(found: np.ndarray, wanted: np.ndarray, bundle: Bundle) -> bool:
    (one,) = differences({"y": found}, {"y": wanted}, atol=bundle.info.atol, rtol=bundle.info.rtol)
    return one.ok


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_engine_computes_what_the_graph_does_at_every_batch_size(
    bundle: Bundle, cuda_graphs: bool
) -> None:
    (fact,) = bundle.info.engines
    generator = np.random.default_rng(0)
    with open_engine(bundle, fact, cuda_graphs=cuda_graphs) as session:
        assert session.name == fact.target
        assert session.max_batch == 128
        for n in (1, 4, 5, 128, 3, 1, 128):
            x = generator.standard_normal((n, 1, 8, 8), dtype=np.float32)
            assert _near(session.run(x), _wanted(bundle, x), bundle)


def test_validate_runs_the_engine(bundle: Bundle) -> None:
    found = validate(bundle)
    assert [one.name for one in found.runtimes] == [one.target for one in bundle.info.engines]
    check_gates(found)


def test_tensorrt_tells_of_sparse_kernels_in_a_wording_that_is_known(bundle: Bundle) -> None:
    (fact,) = bundle.info.engines
    if fact.target != "tensorrt":
        pytest.skip("TensorRT for RTX does not report it")
    log = read_sparsity((bundle.path / f"{fact.file}.log").read_text().splitlines())
    assert log.unread == ()
    assert log.n_picked is not None
    assert (bundle.path / f"{fact.file}.json").is_file()


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_onnxruntime_runs_the_graph_on_the_gpu(name: str, bundle: Bundle) -> None:
    provider = {"onnxruntime-cuda": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[name]
    if f"{provider}ExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime was made without {provider}")
    x = np.random.default_rng(1).standard_normal((8, 1, 8, 8), dtype=np.float32)
    with open_runtime(bundle, name) as session:
        assert session.name == name
        assert _near(session.run(x), _wanted(bundle, x), bundle)


def test_an_engine_for_the_machine_is_there_to_be_found(bundle: Bundle, tmp_path: Path) -> None:
    target = bundle.info.engines[0].target
    assert engine_of(bundle, target) == bundle.info.engines[0]
    with open_runtime(bundle) as session:
        assert session.name == target


def test_layers_are_timed_against_an_engine_without_sparse_kernels(bundle: Bundle, run: Run) -> None:
    (fact,) = bundle.info.engines
    options = EngineOptions(target=fact.target, profiles=PROFILES)
    out = bundle.path.with_name(f"{bundle.path.name}-timed")
    timed = build(run.path, out, targets=[fact.target], precision="fp16", engines=[options], time_layers=True)
    tables = read_engine_times(timed.path / "layers.json", timed.info.engines[0].file)
    assert [table.batch for table in tables] == [1, 64]
    for table in tables:
        if table.note:  # nothing to time: both engines are the same
            continue
        matched = [row for row in table.rows if row.ratio is not None]
        assert matched
        assert {row.outcome for row in table.rows} <= {"speed-up", "slow-down", "no speed-up", "not compared"}
        weights = {weight for row in matched for weight in row.weights}
        assert weights == {layer.weight for layer in read_engine_layers(out / "layers.json", fact.file)}


def test_a_profiled_pass_tells_of_the_layers_that_the_inspector_names(bundle: Bundle) -> None:
    (fact,) = bundle.info.engines
    with open_engine(bundle, fact) as session:
        once = session.profiled_pass({"input": np.zeros((4, 1, 8, 8), dtype=np.float32)})
        first, second = once(), once()
    assert [name for name, _ in first] == [name for name, _ in second]
    assert sum(ms for _, ms in second) > 0
    told = (bundle.path / f"{fact.file}.json").read_text()
    named = {one.layer for one in kernels_from_inspection(told)}
    assert named & {name for name, _ in second}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_engine_is_timed_on_its_device(cuda_graphs: bool, bundle: Bundle) -> None:
    target = bundle.info.engines[0].target
    found = bench(bundle, batches=(4, 64), runtimes=(target,), rounds=20, cuda_graphs=cuda_graphs)
    assert [row.batch for row in found.rows] == [4, 64]
    for row in found.rows:
        assert row.device is not None
        assert 0 < row.device.median_ms < row.latency.median_ms


def test_an_engine_sees_what_another_stream_is_still_writing(bundle: Bundle) -> None:
    (fact,) = bundle.info.engines
    x = np.random.default_rng(0).standard_normal((8, 1, 8, 8), dtype=np.float32)
    source, stream = torch.from_numpy(x).cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with open_engine(bundle, fact) as session, torch.cuda.stream(stream):
        late = torch.zeros(8, 1, 8, 8, device="cuda")
        torch.cuda._sleep(200_000_000)
        late.copy_(source)  # on the device, so that the host goes ahead
        found = session.run_torch({"input": late})["logits"].cpu().numpy()
    assert _near(found, _wanted(bundle, x), bundle)


def test_a_version_compatible_engine_is_inspected_and_runs(run: Run) -> None:
    if not tensorrt_import.is_installed("tensorrt"):
        pytest.skip("TensorRT is not installed")
    options = EngineOptions(target="tensorrt", version_compatible=True)
    out = run.path.with_name("version-compatible")
    bundle = build(run.path, out, targets=["tensorrt"], precision="fp16", engines=[options])
    (fact,) = bundle.info.engines
    assert (bundle.path / f"{fact.file}.json").is_file()
    x = np.random.default_rng(0).standard_normal((8, 1, 8, 8), dtype=np.float32)
    with open_engine(bundle, fact) as session:
        assert _near(session.run(x), _wanted(bundle, x), bundle)
