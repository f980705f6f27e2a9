"""The fastest of cuSPARSELt's algorithms for a product, found in a process of its own and remembered for the card.

Some algorithms break the process that tries them: on an H100, cuSPARSELt 0.8.0's own search ended in an illegal
instruction for every float16 size. So each is tried by a child, which says what it is about to do; when it breaks, that
algorithm is left out and another child goes on behind it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparse_export.errors import SparseExportError
from sparse_export.files import write_json
from sparse_export.sparsity import cusparselt

__all__ = ["DEFAULT", "ProductSize", "fastest", "search"]

DEFAULT = -1
"""The library's own choice."""

_MOST_CHILDREN = 12
_LIMIT_S = 300.0
_LAUNCHES = 10

Lines = Callable[[Sequence["ProductSize"], Sequence[tuple[int, int]]], Iterator[str]]


@dataclass(frozen=True, kw_only=True)
class ProductSize:
    """y (N, O) = x (N, I) Wᵀ.  dtype: float16, bfloat16 or int8."""

    n_outputs: int
    n_inputs: int
    n_rows: int
    dtype: str


_known: dict[tuple[str, ProductSize], int] = {}


def fastest(sizes: Sequence[ProductSize], card: str) -> dict[ProductSize, int]:
    """Algorithms for these sizes on the card of this name, which is the current device; each is searched for once.

    What was found is kept in the user's cache folder, where that can be written.
    """
    key = f"{card}, cuSPARSELt {cusparselt.version()}"
    path = _cache_file()
    _known.update(_read(path))
    missing = [size for size in dict.fromkeys(sizes) if (key, size) not in _known]
    if missing:
        _known.update({(key, size): found for size, found in search(missing).items()})
        _write(path)
    return {size: _known[key, size] for size in sizes}


def search(sizes: Sequence[ProductSize], lines: Lines | None = None) -> dict[ProductSize, int]:
    """Try every algorithm for every size; DEFAULT where none could be tried, or all are slower than it.

    lines: of a child that is given the sizes and the (size, algorithm) pairs to leave out; for tests.
    """
    times: dict[tuple[int, int], float] = {}
    left_out: list[tuple[int, int]] = []
    for _ in range(_MOST_CHILDREN):
        trying: tuple[int, int] | None = None
        for line in (lines or _child)(sizes, [*times, *left_out]):
            word, *numbers = line.split()
            if word == "try":
                trying = int(numbers[0]), int(numbers[1])
            elif word == "took" and trying is not None:
                times[trying], trying = float(numbers[0]), None
            elif word == "refused" and trying is not None:
                left_out.append(trying)
                trying = None
        if trying is None:
            break
        left_out.append(trying)
    found = {}
    for place, size in enumerate(sizes):
        tried = {algorithm: ms for (of, algorithm), ms in times.items() if of == place}
        found[size] = min(tried, key=lambda one: tried[one]) if tried else DEFAULT
    return found


def _child(sizes: Sequence[ProductSize], done: Sequence[tuple[int, int]]) -> Iterator[str]:
    request = json.dumps({"sizes": [asdict(size) for size in sizes], "done": list(done)})
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "sparse_export.sparsity.search24"],
            input=request,
            capture_output=True,
            text=True,
            check=False,
            timeout=_LIMIT_S,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as cause:
        output = cause.stdout or b""
        yield from (output.decode() if isinstance(output, bytes) else output).splitlines()
        return
    yield from ended.stdout.splitlines()


def _try_all(request: str) -> None:
    """The child's work: a line before and after every algorithm."""
    asked = json.loads(request)
    done = {(place, algorithm) for place, algorithm in asked["done"]}
    for place, one in enumerate(asked["sizes"]):
        size = ProductSize(**one)
        dtype: torch.dtype = getattr(torch, size.dtype)
        weight = torch.zeros((size.n_outputs, size.n_inputs), device="cuda").view(size.n_outputs, -1, 4)
        weight[:, :, :2] = torch.randn((*weight.shape[:2], 2), device="cuda").clamp(-3, 3) * 9
        packed = torch._cslt_compress(weight.view(size.n_outputs, -1).to(dtype))
        x = (torch.randn((size.n_rows, size.n_inputs), device="cuda").clamp(-3, 3) * 9).to(dtype)
        n_algorithms = cusparselt.n_algorithms(
            size.n_outputs, size.n_inputs, size.n_rows, dtype, has_bias=False
        )
        for algorithm in range(DEFAULT, n_algorithms):
            if (place, algorithm) in done:
                continue
            print("try", place, algorithm, flush=True)
            try:
                took = _milliseconds(lambda: cusparselt.product(x, packed, None, size.n_outputs, algorithm))  # noqa: B023 - called at once
            except RuntimeError as cause:
                if "status" not in str(cause):
                    raise
                print("refused", flush=True)
            else:
                print("took", took, flush=True)
        cusparselt.forget_plans()


def _milliseconds(call: Callable[[], object]) -> float:
    """The least of several replays of a graph of launches, for one of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_LAUNCHES):
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(3):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return min(times) / _LAUNCHES


def _cache_file() -> Path | None:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "sparse-export" / "algorithms24.json"


def _read(path: Path | None) -> dict[tuple[str, ProductSize], int]:
    """What was kept; nothing where that cannot be read, for it can be found again."""
    try:
        kept = json.loads(path.read_text()) if path is not None else []
        return {(one["where"], ProductSize(**one["size"])): int(one["algorithm"]) for one in kept}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(path: Path | None) -> None:
    if path is None:
        return
    kept = [
        {"where": where, "size": asdict(size), "algorithm": algorithm}
        for (where, size), algorithm in sorted(_known.items(), key=lambda item: (item[0][0], str(item[0][1])))
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, kept)
    except (OSError, SparseExportError):
        return  # it is only a cache


if __name__ == "__main__":
    _try_all(sys.stdin.read())
