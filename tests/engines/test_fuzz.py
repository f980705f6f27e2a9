"""Bytes of anybody's making: no crash, no hang, nothing written outside the output folder.

ONNX files, packed tensors, manifests and engines; none of them may reach a native library in this process.
Ten thousand cases, a quarter for each of the four; FUZZ_CASES in the environment is another number for each,
and in `make test` there are at most 200 of each. What native libraries make of files is tried in processes of
their own, with fewer cases: onnxruntime with an eighth of that number, the builder of TensorRT for RTX with
ten, or two. Engines are not loaded: whoever vouches for one runs its code.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from onnx import TensorProto

from sparse_export.engines.build import build_engine, engine_from_file
from sparse_export.engines.header import read_header, require_whole
from sparse_export.engines.options import EngineOptions
from sparse_export.errors import SparseExportError
from sparse_export.formats.bundle import open_bundle, read_bundle_info
from sparse_export.formats.layers import read_engine_layers
from sparse_export.graph.dense_file import dense_from_file
from sparse_export.graph.layers import count_parameters, graph_layers
from sparse_export.graph.passes.expand24 import expand
from sparse_export.graph.passes.pack24 import pack
from sparse_export.graph.passes.weight24 import PackedWeight, unpack_weight
from sparse_export.inspect import inspect
from tests.engines.conftest import SMALL, small_graph
from tests.engines.opener import (
    DIED,
    RAN,
    REFUSED,
    Opener,
)
from tests.graph.dividing import with_division
from tests.many import many

N = int(os.environ.get("FUZZ_CASES", "2500"))
EVERY_DAY = min(N, 200)
damaged = many(N, every_day=EVERY_DAY, suppress_health_check=list(HealthCheck))

Damage = list[tuple[float, int]]
DAMAGE: st.SearchStrategy[Damage] = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
)
LENGTH = st.none() | st.floats(0, 1)


def _damaged(content: bytes, damage: Damage, length: float | None) -> bytes:
    """Some bytes changed, and perhaps the end cut off."""
    changed = bytearray(content)
    for place, value in damage:
        changed[int(place * len(changed))] = value
    return bytes(changed if length is None else changed[: int(length * len(changed))])


@contextmanager
def _alone(name: str, content: bytes) -> Iterator[Path]:
    """A file in a folder that must hold nothing else afterwards, inside one that must not either."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / "inner"
        folder.mkdir()
        path = folder / name
        path.write_bytes(content)
        yield path
        assert [one.name for one in folder.iterdir()] == [name]
        assert [one.name for one in Path(outer).iterdir()] == ["inner"]


@functools.cache
def _packed() -> bytes:
    content: bytes = pack(small_graph()).SerializeToString(deterministic=True)
    return content


@functools.cache
def _graphs() -> tuple[bytes, ...]:
    """Dense ones, which no hash guards, of few weights, so that damage meets the rest."""
    dividing = small_graph(n_hidden=4)
    with_division(dividing, 2)
    return small_graph(n_hidden=4, op="Sigmoid").SerializeToString(), dividing.SerializeToString()


@functools.cache
def _engine() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        build_engine(small_graph(), Path(folder) / "x", EngineOptions(target="tensorrt-rtx"), SMALL)
        return (Path(folder) / "x").read_bytes()


@damaged
@example(1, [(0.125, 0), (0.078125, 0)], None)  # what onnx_ir reads and cannot write
@given(st.sampled_from([0, 1, 2]), DAMAGE, LENGTH)
def test_onnx_files(which: int, damage: Damage, length: float | None) -> None:
    content = _damaged((_packed(), *_graphs())[which], damage, length)
    with _alone("m.onnx", content) as path, suppress(SparseExportError):
        model = dense_from_file(path)
        graph_layers(model)
        count_parameters(model)


@damaged
@given(
    st.binary(max_size=64),
    st.binary(max_size=16),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 16), max_size=5),
    st.sampled_from([np.float32, np.float16, np.int8, np.int64]),
    st.booleans(),
)
def test_packed_tensors(
    values: bytes, meta: bytes, shape: list[int], dtype: type[np.generic], paired: bool
) -> None:
    size = np.dtype(dtype).itemsize
    array = np.frombuffer(values[: len(values) // (2 * size) * 2 * size], dtype=dtype)
    array = array.reshape(-1, 2) if paired else array
    packed = PackedWeight(values=array, meta=np.frombuffer(meta, dtype=np.uint8), shape=tuple(shape))
    with suppress(SparseExportError):
        assert unpack_weight(packed).shape == tuple(shape)


MANIFEST = json.dumps(
    {
        "kind": "bundle",
        "schema_version": 1,
        "files": {
            "../../x": {"size_bytes": 1, "sha256": "0"},
            "model.onnx": {"size_bytes": 3, "sha256": "1"},
        },
        "engines": [{"file": "/etc/passwd", "target": "tensorrt", "profiles": [[1, 2, 3]]}],
        "targets": ["onnx"],
    }
).encode()


@damaged
@given(DAMAGE, LENGTH)
def test_manifests(damage: Damage, length: float | None) -> None:
    with _alone("manifest.json", _damaged(MANIFEST, damage, length)) as path:
        for read in (read_bundle_info, open_bundle):
            with suppress(SparseExportError):
                read(path.parent)
        with suppress(SparseExportError):
            read_engine_layers(path, "model.onnx")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@damaged
@given(DAMAGE, LENGTH)
def test_engines(damage: Damage, length: float | None) -> None:
    """None is loaded, whatever it holds."""
    with _alone("x.engine", _damaged(_engine(), damage, length)) as path:
        header = read_header(path)
        for look in (lambda: require_whole(path, header), lambda: inspect(path)):
            with suppress(SparseExportError):
                look()


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@many(10, every_day=2, suppress_health_check=list(HealthCheck))
@given(DAMAGE)
def test_graphs_that_reach_the_builder(damage: Damage) -> None:
    """A dense graph has no hash of its own: its process may fail as it likes, and this one tells of it."""
    content = _damaged(small_graph().SerializeToString(), damage, None)
    with _alone("m.onnx", content) as path, tempfile.TemporaryDirectory() as out, suppress(SparseExportError):
        engine_from_file(path, Path(out) / "x", EngineOptions(target="tensorrt-rtx"), SMALL)


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    with Opener() as opener:
        yield opener


@many(max(1, N // 8), every_day=max(1, EVERY_DAY // 8), suppress_health_check=list(HealthCheck))
@given(st.sampled_from([0, 1]), DAMAGE, LENGTH)
def test_graphs_that_reach_onnxruntime(
    opener: Opener, which: int, damage: Damage, length: float | None
) -> None:
    """They may be run, be refused by an error that says why, or end the process that opens them, which is not
    this.
    """
    with _alone("m.onnx", _damaged(_graphs()[which], damage, length)) as path:
        state, told = opener.open(path)
        assert state in (RAN, REFUSED, DIED), told


def test_a_graph_that_ends_its_process_is_told_from_others(opener: Opener, tmp_path: Path) -> None:
    """The fuzzing above sees an end, and goes on."""
    path = tmp_path / "m.onnx"
    found = []
    for divisor in (2, -1, 0, 3):
        model = small_graph()
        with_division(model, divisor)
        onnx.save(model, path)
        found.append(opener.open(path))
    assert found == [
        (RAN, ""),
        (DIED, str(-signal.SIGFPE)),
        (REFUSED, "ArtefactError"),
        (RAN, ""),
    ]


def _external(location: str) -> onnx.ModelProto:
    model = small_graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "2048")):
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize(
    ("use", "location"),
    [
        *(
            (use, to)
            for use in (dense_from_file, inspect)
            for to in ("../secret", "/etc/passwd", "a/../../secret")
        ),
        (dense_from_file, "link"),  # `inspect` follows links, as a model in a cache has them
    ],
)
def test_weights_outside_the_folder_of_a_graph_are_refused(
    location: str, use: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "inner" / "a").mkdir(parents=True)
    (tmp_path / "inner" / "link").symlink_to(tmp_path / "secret")
    path = tmp_path / "inner" / "m.onnx"
    path.write_bytes(_external(location).SerializeToString())
    with pytest.raises(SparseExportError):
        use(path)


def test_a_packed_graph_of_nothing_is_a_graph() -> None:
    """The fuzzing above starts from a file that is whole."""
    assert expand(onnx.load_from_string(_packed())).graph.node
