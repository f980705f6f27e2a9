"""The programs that are compared, each in a process of its own: python -m benchmarks.peers.tools TOOL WORK

The folder holds `network.json`, `dense.onnx`, `weights.pt` and `calibration.npz`. What the program makes is left
there as TOOL.onnx, and its cost is printed as the last line, in JSON. To add a program, add an entry to `TOOLS`.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SIMPLIFIES", "TOOLS", "Tool"]

Work = Callable[[Path, Path], None]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A program, or one of its methods.

    Attributes:
        name: in the table.
        is_ours: runs in this program's environment; else in that of `make bench-peers`.
        prepare: imports, and reads what is given; returns what is timed, which is then called once and leaves
            its graph at the second path. It returns what is left to do outside the time.
    """

    name: str
    is_ours: bool
    prepare: Callable[[Path, Path], Callable[[], Callable[[], None]]]


def _nothing() -> None:
    """All is done."""


def _sparsify(method: str) -> Callable[[Path, Path], Callable[[], Callable[[], None]]]:
    def prepare(work: Path, out: Path) -> Callable[[], Callable[[], None]]:
        from sparse_export.oneshot import sparsify
        from sparse_export.oneshot.steps import CALIBRATION_SAMPLES

        n = len(next(iter(_calibration(work).values())))
        assert n <= CALIBRATION_SAMPLES
        run = work / f"{method}-run"

        def timed() -> Callable[[], None]:
            inputs = work / "calibration.npz"
            sparsify(work / "dense.onnx", run, method=method, inputs=inputs, device="cpu")
            return lambda: _copy(run / "model.onnx", out)

        return timed

    return prepare


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _modelopt(mode: str) -> Callable[[Path, Path], Callable[[], Callable[[], None]]]:
    def prepare(work: Path, out: Path) -> Callable[[], Callable[[], None]]:
        import modelopt.torch.sparsity as mts
        import torch

        from benchmarks.peers.networks import BATCH, NETWORKS, export, tensors

        torch.set_num_threads(1)
        network: Any = NETWORKS[json.loads((work / "network.json").read_text())["name"]].make().eval()
        network.load_state_dict(torch.load(work / "weights.pt", weights_only=True))
        arrays = _calibration(work)
        batches = list(zip(*(one.split(BATCH) for one in tensors(arrays)), strict=True))

        def forward(module: Any) -> None:
            with torch.no_grad():
                for batch in batches:
                    module(*batch)

        def timed() -> Callable[[], None]:
            sparse = mts.export(mts.sparsify(network, mode, {"forward_loop": forward, "verbose": False}))
            return lambda: export(sparse, arrays, out)

        return timed

    return prepare


def _polygraphy(work: Path, out: Path) -> Callable[[], Callable[[], None]]:
    import onnx_graphsurgeon  # noqa: F401 - its import is not timed
    from polygraphy.tools import main

    def timed() -> Callable[[], None]:
        main(["surgeon", "prune", "--silent", str(work / "dense.onnx"), "-o", str(out)])
        return _nothing

    return timed


def _onnxsim(work: Path, out: Path) -> Callable[[], Callable[[], None]]:
    import onnx
    import onnxsim

    def timed() -> Callable[[], None]:
        model, is_right = onnxsim.simplify(onnx.load(work / "dense.onnx"))
        assert is_right
        onnx.save(model, out)
        return _nothing

    return timed


def _build(work: Path, out: Path) -> Callable[[], Callable[[], None]]:
    from sparse_export.building import build
    from sparse_export.building.from_source import run_at

    def timed() -> Callable[[], None]:
        run = run_at(work / "dense.onnx", run_folder=work / "build-run")
        bundle = build(run, work / "bundle")
        return lambda: _copy(bundle.onnx_path, out)

    return timed


_ALL = (
    Tool(name="sparse-export magnitude", is_ours=True, prepare=_sparsify("magnitude")),
    Tool(name="sparse-export reconstruction", is_ours=True, prepare=_sparsify("reconstruction")),
    Tool(name="modelopt magnitude", is_ours=False, prepare=_modelopt("sparse_magnitude")),
    Tool(name="modelopt sparsegpt", is_ours=False, prepare=_modelopt("sparsegpt")),
    Tool(name="polygraphy prune", is_ours=False, prepare=_polygraphy),
    Tool(name="sparse-export build", is_ours=True, prepare=_build),
    Tool(name="onnxsim", is_ours=False, prepare=_onnxsim),
)
TOOLS = {one.name.replace(" ", "-"): one for one in _ALL}
SIMPLIFIES = ("sparse-export-build", "onnxsim")
"""Those that leave every weight as it is, and are compared with each other."""


def _calibration(work: Path) -> dict[str, np.ndarray]:
    with np.load(work / "calibration.npz") as found:
        return dict(found)


def _cpu_s() -> float:
    """Of this process and of those that it started and that ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _peak_mb() -> float:
    """Of the largest of these processes so far. `ru_maxrss` of this one would begin with its parent's size."""
    status = Path("/proc/self/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def main(key: str, work: Path) -> None:
    """Run a program on the network of a folder."""
    timed = TOOLS[key].prepare(work, work / f"{key}.onnx")
    before_mb, cpu_s, wall_s = _peak_mb(), _cpu_s(), time.perf_counter()
    finish = timed()
    cost = {
        "cpu_s": round(_cpu_s() - cpu_s, 3),
        "wall_s": round(time.perf_counter() - wall_s, 3),
        "peak_mb": round(_peak_mb(), 1),
        "peak_before_mb": round(before_mb, 1),
    }
    finish()
    print(json.dumps(cost), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
