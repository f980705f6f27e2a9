"""Networks of several inputs and outputs, of any type and with free sizes, as Triton itself serves them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tritonclient import grpc, http

from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.serving.golden_files import GOLDEN_INDEX, write_golden_files
from sparse_export.serving.repository import open_served
from sparse_export.signature import DTYPES, Signature, TensorInfo
from tests.named_graphs import (
    PICTURES,
    SPOKEN,
    WORDS,
    model_of,
    pictures_graph,
    spoken_graph,
    words_graph,
)
from tests.serving.named_bundles import named_bundle
from tests.serving.serving import CHECKOUT, Serving, serving

SCRIPTS = CHECKOUT / "sparse_export" / "serving"
_KINDS = [name for name in DTYPES if name != "bfloat16"]
# One size a sample, none beside the batch; names that other programs give to their tensors.
EVERY = Signature(
    inputs=tuple(
        TensorInfo(name=f"in/{one}:0", dtype=one, shape=("batch",), low=0, high=9) for one in _KINDS
    ),
    outputs=tuple(TensorInfo(name=f'the "{one}"', dtype=one, shape=("batch",)) for one in _KINDS),
)
SINGLE = Signature(
    inputs=(
        TensorInfo(name="x", dtype="float32", shape=(3,)),
        TensorInfo(name="rate", dtype="int64", shape=(), low=1, high=5),
    ),
    outputs=(
        TensorInfo(name="y", dtype="float32", shape=(3,)),
        TensorInfo(name="sum", dtype="float32", shape=()),
    ),
    batch=None,
)

# A divisor of 0 ends the process that divides by it, so that the server must not warm up with it.
SHARED = Signature(
    inputs=(
        TensorInfo(name="things", dtype="int64", shape=("batch", 3), low=0, high=99),
        TensorInfo(name="people", dtype="int64", shape=("batch", 1), low=1, high=9),
    ),
    outputs=(TensorInfo(name="each", dtype="int64", shape=("batch", 3)),),
)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each network, by its name."""
    same = [
        helper.make_node("Identity", [one.name], [other.name])
        for one, other in zip(EVERY.inputs, EVERY.outputs, strict=True)
    ]
    single = [
        helper.make_node("Cast", ["rate"], ["factor"], to=1),
        helper.make_node("Mul", ["x", "factor"], ["y"]),
        helper.make_node("ReduceSum", ["y"], ["sum"], keepdims=0),
    ]
    networks = {
        "words": (words_graph(), WORDS),
        "pictures": (pictures_graph(), PICTURES),
        "spoken": (spoken_graph(), SPOKEN),
        "every": (model_of(EVERY, same, {}), EVERY),
        "single": (model_of(SINGLE, single, {}), SINGLE),
        "shared": (
            model_of(SHARED, [helper.make_node("Div", ["things", "people"], ["each"])], {}),
            SHARED,
        ),
    }
    folder = tmp_path_factory.mktemp("named")
    return {name: named_bundle(folder / name, *network) for name, network in networks.items()}


@pytest.fixture(scope="module")
def served(
    server: Path, named: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    log = tmp_path_factory.mktemp("served-named") / "log"
    with serving(*named.values(), "--instances", 1, log=log) as one:
        yield one


def _asked(protocol: Any, served: Serving, model: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    tensors = []
    for name, array in arrays.items():
        kind = {"int64": "INT64", "float32": "FP32"}[array.dtype.name]
        tensor = protocol.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    port = served.http_port if protocol is http else served.grpc_port
    with protocol.InferenceServerClient(f"127.0.0.1:{port}") as client:
        answer = client.infer(model, tensors)
    names = {"words": WORDS, "spoken": SPOKEN, "pictures": PICTURES}[model].output_names
    return {name: answer.as_numpy(name) for name in names}


def test_each_is_ready_once_its_golden_outputs_are_right(served: Serving) -> None:
    models = {model["name"]: model for model in served.document["models"]}
    assert models["words"]["compared"] == ["hidden", "best"]
    assert models["every"]["compared"] == list(EVERY.output_names)
    assert len(models) == 6
    assert served.log.count("golden answer right") == 6


@pytest.mark.parametrize("model", ["words", "pictures", "spoken", "every", "single", "shared"])
def test_the_scripts_ask_with_every_input_and_compare_every_output(
    model: str, served: Serving, named: dict[str, Path], tmp_path: Path
) -> None:
    write_golden_files(tmp_path, open_served(named[model]))
    index = json.loads((tmp_path / GOLDEN_INDEX).read_text())
    http_url, grpc_url = f"127.0.0.1:{served.http_port}", f"127.0.0.1:{served.grpc_port}"
    words = [sys.executable, str(SCRIPTS / "client_example.py"), "--model", model, "--golden", str(tmp_path)]
    words += ["--http", http_url, "--grpc", grpc_url]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(", right\n") == 2 * len(index["outputs"])
    last = index["outputs"][-1]
    wrong = np.load(tmp_path / last["file"])
    np.save(tmp_path / last["file"], ~wrong if wrong.dtype == bool else wrong + 1)
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.count("WRONG")) == (1, 2)
    load = [sys.executable, str(SCRIPTS / "client_load.py"), "--model", model, "--golden", str(tmp_path)]
    load += ["--url", grpc_url, "--clients", "2", "--seconds", "0.5"]
    done = subprocess.run(load, check=False, capture_output=True, text=True, timeout=60)
    told = json.loads(done.stdout)
    assert (done.returncode, told["errors"]) == (0, 0)
    assert told["requests"] > 2


@pytest.mark.parametrize("protocol", [http, grpc])
def test_requests_of_different_lengths_at_one_time_get_their_own_answers(
    protocol: Any, served: Serving, named: dict[str, Path]
) -> None:
    drawn = [WORDS.draw(1 + at % 3, at, {"sequence": (5, 9, 31)[at % 3]}) for at in range(24)]
    found: list[Any] = [None] * len(drawn)

    def ask(at: int) -> None:
        found[at] = _asked(protocol, served, "words", drawn[at])

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(len(drawn))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_session(named["words"] / "model.onnx", signature=WORDS, n_threads=1) as session:
        for feeds, answer in zip(drawn, found, strict=True):
            wanted = session.run(feeds)
            np.testing.assert_allclose(answer["hidden"], wanted["hidden"], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(answer["best"], wanted["best"])


@pytest.mark.parametrize("protocol", [http, grpc])
def test_a_state_with_the_batch_on_its_second_axis_goes_in_and_out(
    protocol: Any, served: Serving, named: dict[str, Path]
) -> None:
    feeds = SPOKEN.draw(3, 1, {"samples": 40})
    found = _asked(protocol, served, "spoken", feeds)
    with open_session(named["spoken"] / "model.onnx", signature=SPOKEN, n_threads=1) as session:
        for name, wanted in session.run(feeds).items():
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_only_where_samples_come_first_in_everything_are_requests_merged(served: Serving) -> None:
    with http.InferenceServerClient(f"127.0.0.1:{served.http_port}") as client:
        configs = {
            model: client.get_model_config(model)
            for model in ("words", "pictures", "spoken", "every", "single")
        }
    assert {name: one["max_batch_size"] for name, one in configs.items()} == {
        "words": 64,
        "pictures": 64,
        "spoken": 0,
        "every": 64,
        "single": 0,
    }
    assert {name for name, one in configs.items() if "dynamic_batching" in one} == {
        "words",
        "pictures",
        "every",
    }
    dims = {name: [tensor["dims"] for tensor in one["input"]] for name, one in configs.items()}
    assert dims["words"] == [[-1], [-1]]
    assert dims["pictures"] == [[6, 5, 4]]
    assert dims["spoken"] == [[-1, -1], [2, -1, 4]]
    assert dims["single"] == [[3], [1]]
