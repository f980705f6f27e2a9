"""Looking at a large file costs little more than loading it, and the memory of its largest tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

N_LAYERS, INPUTS, OUTPUTS = 32, 1024, 2048  # 8 MiB a layer
FILE_BYTES = N_LAYERS * INPUTS * OUTPUTS * 4

MEASURED = """
import json, sys, time
from pathlib import Path
import numpy as np, onnx
from onnx import numpy_helper
from sparse_export.graph.model import open_model
from sparse_export.inspect import inspect

def counted(path):
    tensors = onnx.load(path).graph.initializer
    return sum(int(np.count_nonzero(numpy_helper.to_array(one))) for one in tensors)

def looked(path):
    return inspect(path).n_nonzero

def opened(path):
    return len(open_model(path).graph.initializer)

def most_bytes():  # of this program; what getrusage gives is never less than of the process that started it
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) * 1024

def seconds(work, path):
    began = time.process_time()
    result = work(path)
    return time.process_time() - began, result

names, n_times, small, path = sys.argv[1].split(), int(sys.argv[2]), *sys.argv[3:]
works = {name: {"counted": counted, "looked": looked, "opened": opened}[name] for name in names}
for work in works.values():
    work(small)  # loads the libraries
before = most_bytes()
taken = {}
for _ in range(n_times):
    for name, work in works.items():
        taken.setdefault(name, []).append(seconds(work, path))
print(json.dumps({
    "results": {name: found[0][1] for name, found in taken.items()},
    "seconds": {name: min(one for one, _ in found) for name, found in taken.items()},
    "bytes": most_bytes() - before,
}))
"""


def network(n_layers: int, inputs: int, outputs: int) -> onnx.ModelProto:
    """Matrix products one after the other, half of whose weights are zero."""
    values = np.random.default_rng(0).standard_normal((inputs, outputs)).astype(np.float32)
    values[::2] = 0
    names = ["x", *(f"v{i}" for i in range(n_layers))]
    nodes, stored = [], []
    for i in range(n_layers):
        stored.append(numpy_helper.from_array(values if i % 2 == 0 else values.T, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])],
        [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, ["n", inputs])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("large")
    onnx.save(network(2, 16, 16), folder / "small.onnx")
    model = network(N_LAYERS, INPUTS, OUTPUTS)
    onnx.save(model, folder / "inside.onnx")
    onnx.save(model, folder / "beside.onnx", save_as_external_data=True, location="beside.data")
    return {name: folder / f"{name}.onnx" for name in ("small", "inside", "beside")}


def measured(works: str, files: dict[str, Path], name: str, n_times: int = 1) -> dict[str, Any]:
    """Results, least seconds of a core and bytes of memory beyond the libraries, of what is done to a file."""
    words = [sys.executable, "-c", MEASURED, works, str(n_times), str(files["small"]), str(files[name])]
    found: dict[str, Any] = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inside", "beside"])
def test_a_large_file_is_looked_at_in_the_memory_of_a_tenth_of_it(name: str, files: dict[str, Path]) -> None:
    found = measured("looked", files, name)
    assert found["results"] == {"looked": N_LAYERS * INPUTS * OUTPUTS // 2}
    assert 0 < found["bytes"] < FILE_BYTES / 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inside", "beside"])
def test_a_large_file_is_opened_in_little_more_memory_than_it_takes(
    name: str, files: dict[str, Path]
) -> None:
    found = measured("opened", files, name)
    assert found["results"] == {"opened": N_LAYERS}
    assert FILE_BYTES <= found["bytes"] < 1.1 * FILE_BYTES


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("name", ["inside", "beside"])
def test_looking_at_a_file_takes_little_more_time_than_loading_it_and_counting_its_zeros(
    name: str, files: dict[str, Path]
) -> None:
    took = measured("looked counted", files, name, n_times=3)["seconds"]
    assert took["looked"] < 1.3 * took["counted"]
