"""Finds the fastest of cuSPARSELt's algorithms for a product, in child processes, and caches it for the GPU.

Some algorithms crash the process that runs them: on an H100, cuSPARSELt 0.8.0's own search ended in an
illegal instruction for every float16 size. So a child process runs them, and reports each before it runs;
when it crashes, that algorithm is left out and another child goes on with the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from sparse_export import child
from sparse_export.errors import SparseExportError
from sparse_export.files import cache_folder, write_json
from sparse_export.sparsity import cusparselt
from sparse_export.sparsity.product24 import DEFAULT, Backend, row_multiple

__all__ = ["ProductSize", "best_algorithms", "fastest", "search"]

_MOST_CHILDREN = 12
_LIMIT_S = 300.0
_LAUNCHES = 10

Lines = Callable[[Sequence["ProductSize"], Sequence[tuple[int, int]]], Iterator[str]]
"""The lines of a child, for the sizes and the (size, algorithm) pairs to leave out."""


@dataclass(frozen=True, kw_only=True)
class ProductSize:
    """The size of a product y (N, O) = x (N, I) Wᵀ.

    Attributes:
        n_outputs: O.
        n_inputs: I.
        n_rows: N.
        dtype: float16, bfloat16 or int8.
    """

    n_outputs: int
    n_inputs: int
    n_rows: int
    dtype: str


_known: dict[tuple[str, ProductSize], int] = {}
_failed: set[tuple[str, ProductSize]] = set()  # in this process: a search that failed takes minutes


def best_algorithms(
    products: Sequence[tuple[tuple[int, int], int]],
    dtype: torch.dtype,
    backend: Backend,
    device: torch.device,
) -> list[int]:
    """Find cuSPARSELt's fastest algorithms. This times the device, once for a size, dtype and kind of GPU.

    Args:
        products: shape (O, I) of the weight, and number of rows, of each.
        dtype: of the products.
        backend: of the products.
        device: to time.

    Returns:
        An algorithm for each product; DEFAULT for other backends than cuSPARSELt.
    """
    if backend != "cusparselt" or not cusparselt.is_there():
        return [DEFAULT] * len(products)
    multiple = row_multiple(dtype, backend)
    sizes = [
        ProductSize(
            n_outputs=shape[0],
            n_inputs=shape[1],
            n_rows=n_rows + -n_rows % multiple,
            dtype=str(dtype).removeprefix("torch."),
        )
        for shape, n_rows in products
    ]
    index = torch.cuda.current_device() if device.index is None else device.index
    found = fastest(sizes, torch.cuda.get_device_name(index), index)
    return [found[size] for size in sizes]


def fastest(sizes: Sequence[ProductSize], card: str, device: int = 0) -> dict[ProductSize, int]:
    """Find the fastest algorithms for some sizes; each is searched for once.

    They are kept in the user's cache folder, where that can be written. A size whose search failed is DEFAULT
    in this process, with a warning, and is searched for again by the next one.

    Args:
        sizes: of the products.
        card: name of the GPU.
        device: its number.

    Returns:
        An algorithm for each size.
    """
    key = f"{card}, cuSPARSELt {cusparselt.version()}"
    path = _cache_file()
    _known.update(_read(path))
    missing = [
        size for size in dict.fromkeys(sizes) if (key, size) not in _known and (key, size) not in _failed
    ]
    found = search(missing, partial(_child, device)) if missing else {}
    _failed.update((key, size) for size in missing if size not in found)
    if found:
        _known.update({(key, size): algorithm for size, algorithm in found.items()})
        _write(path)
    return {size: _known.get((key, size), DEFAULT) for size in sizes}


def search(sizes: Sequence[ProductSize], lines: Lines) -> dict[ProductSize, int]:
    """Run every algorithm for every size, in as many children as it takes, with a warning where that fails.

    Args:
        sizes: of the products.
        lines: starts a child and yields its lines.

    Returns:
        The fastest algorithm for each size whose search was completed; DEFAULT where that is the library's
        own choice or none works.
    """
    times: dict[tuple[int, int], float] = {}
    left_out: list[tuple[int, int]] = []
    ended: set[int] = set()
    failure = ""
    for _ in range(_MOST_CHILDREN):
        running: tuple[int, int] | None = None
        for line in lines(sizes, [*times, *left_out]):
            word, _, rest = line.partition(" ")
            if word == "try":
                of, _, algorithm = rest.partition(" ")
                running = int(of), int(algorithm)
            elif word == "took" and running is not None:
                times[running], running = float(rest), None
            elif word == "refused" and running is not None:
                left_out.append(running)
                running = None
            elif word == "ended":
                ended.add(int(rest))
            elif word == "failed":
                failure = rest
        if running is None:
            break
        left_out.append(running)
    missed = len(sizes) - len(ended)
    if missed:
        warnings.warn(
            f"For {missed} of {len(sizes)} sizes of 2:4 products no fastest algorithm was found"
            f"{f' ({failure})' if failure else ''}; they run by the library's own choice, which can be slow.",
            stacklevel=3,
        )
    found = {}
    for place in sorted(ended):
        timed = {one: ms for (owner, one), ms in times.items() if owner == place}
        found[sizes[place]] = min(timed, key=lambda one: timed[one]) if timed else DEFAULT
    return found


def _child(device: int, sizes: Sequence[ProductSize], done: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yield the lines of a child in an empty folder, so that it imports nothing from the user's folder."""
    request = json.dumps({"device": device, "sizes": [asdict(size) for size in sizes], "done": list(done)})
    with tempfile.TemporaryDirectory() as empty:
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "sparse_export.models.search24"],
                input=request,
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT_S,
                cwd=empty,
                env=child.environment(),
            )
        except subprocess.TimeoutExpired as cause:
            output = cause.stdout or b""
            yield from (output.decode() if isinstance(output, bytes) else output).splitlines()
            yield f"failed it took longer than {_LIMIT_S:.0f} s"
            return
    yield from ended.stdout.splitlines()
    if ended.returncode:
        yield f"failed {(ended.stderr.strip().splitlines() or [f'exit {ended.returncode}'])[-1]}"


def _try_all(request: str) -> None:
    """The child: run every algorithm, with a line before and after each."""
    document = json.loads(request)
    torch.cuda.set_device(document["device"])
    done = {(place, algorithm) for place, algorithm in document["done"]}
    for place, one in enumerate(document["sizes"]):
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
                took = _milliseconds(
                    lambda: cusparselt.product(x, packed, None, size.n_outputs, algorithm)  # noqa: B023
                )
            except RuntimeError as cause:
                if "status" not in str(cause):
                    raise
                print("refused", flush=True)
            else:
                print("took", took, flush=True)
        print("ended", place, flush=True)


def _milliseconds(call: Callable[[], object]) -> float:
    """The ms of one launch: the shortest of several replays of a graph of launches."""
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
    """Where algorithms are kept; None without a cache folder."""
    folder = cache_folder()
    return None if folder is None else folder / "algorithms24.json"


def _read(path: Path | None) -> dict[tuple[str, ProductSize], int]:
    """The kept algorithms; none where the file cannot be read, since they can be found again."""
    try:
        kept = json.loads(path.read_text()) if path is not None else []
        return {(one["where"], ProductSize(**one["size"])): int(one["algorithm"]) for one in kept}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _write(path: Path | None) -> None:
    """Keep all known algorithms, where that is possible."""
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
