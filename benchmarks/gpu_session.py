"""Everything that is to be known of one CUDA card, by one command, in at most nine minutes and without a
network.

    python -m benchmarks.gpu_session [--out FOLDER] [--parts NAMES] [--minutes N] [--data-dir FOLDER]
    [--rehearse]

Parts, in order: `tests` (all tests marked gpu), `ceilings` (copying, dense and 2:4 matrix rates), `products`
(Linear sizes of vision transformers and language models), `inference` (networks dense, 2:4 wherever possible,
and planned), `training` (steps dense and 2:4, forward only and with the gradient of the input), `masks` (what
sparse momentum adds to a step, and a mask update), `trained` (short trainings on CIFAR-10, with --data-dir).
Each runs in a process of its own with its own share of the time, and writes what it has after every case, so
that a part which is stopped or fails loses one case. Writes DATE-CARD.json (everything, raw samples left
out), DATE-CARD.md (a table), DATE-CARD-samples.json.gz (every round) and DATE-CARD-tests.txt.

--rehearse runs all of it but `tests` on the CPU, with the dense reference in place of the hardware's
products, in small sizes: its figures mean nothing, and its files say so. It shows that the program runs to
its end.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import SparseExportError
from sparse_export.evaluate.bench_train import bench_training_step
from sparse_export.formats.timings import Size
from sparse_export.instruments.card import watched_cards
from sparse_export.instruments.device import CudaStamps, replayed, stamps_for
from sparse_export.instruments.interleave import LatencyResult, measure_interleaved
from sparse_export.instruments.machine import machine_facts
from sparse_export.instruments.statistics import location, paired_ratio, resolution
from sparse_export.models.search24 import best_algorithms
from sparse_export.plan.layers import products_of
from sparse_export.plan.planning import make_plan
from sparse_export.plan.timing import ProductCalls, measure_timings, product_calls
from sparse_export.plan.whole import compile_blocks, measure_whole, prepare
from sparse_export.sparsity.product24 import Backend, why_not
from sparse_export.sparsity.transposable import transposable_mask
from sparse_export.train.loop import train
from sparse_export.train.mask_pass import MaskPass
from sparse_export.train.recipe import load_recipe
from sparse_export.train.step24 import Step24
from sparse_export.version import command_line, library_versions, now

Case = dict[str, Any]

# Share of the time that each part gets.
# What a part leaves over goes to those behind it.
SHARES = {
    "tests": 0.17,
    "ceilings": 0.05,
    "products": 0.15,
    "inference": 0.3,
    "training": 0.21,
    "masks": 0.07,
    "trained": 0.05,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured, and on what.

    networks: (name, input shape, type, batches) each.  training: (name, input shape, batch, compiled, as one
    CUDA graph) each.  recipes: (recipe, batch) each.  trained: (recipe, epochs) each.  bandwidth_mib: of one
    copy.
    """

    device: str
    backends: tuple[Backend, ...]
    dtypes: tuple[torch.dtype, ...]
    products: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    square: int
    bandwidth_mib: int
    networks: tuple[tuple[str, tuple[int, ...], torch.dtype, tuple[int, ...]], ...]
    training: tuple[tuple[str, tuple[int, ...], int, bool, bool], ...]
    recipes: tuple[tuple[str, int], ...]
    trained: tuple[tuple[str, int], ...]
    rounds: int
    block_s: float
    warmup_limit_s: float


_PICTURE = (3, 224, 224)
CARD = Setting(
    device="cuda",
    backends=("cusparselt",),
    dtypes=(torch.bfloat16,),
    products=(
        (768, 768),
        (3072, 768),
        (4096, 1024),
        (1024, 4096),
        (4096, 4096),
        (14336, 4096),
        (3072, 10240),
    ),
    rows=(1, 32, 1024, 6304, 16384),
    square=8192,
    bandwidth_mib=2048,
    networks=(
        ("vit-l-16", _PICTURE, torch.bfloat16, (256, 32, 1)),
        ("vit-l-16", _PICTURE, torch.float16, (256,)),
        ("vit-b-16", _PICTURE, torch.bfloat16, (256, 32, 1)),
        ("resnet50", _PICTURE, torch.bfloat16, (256, 32, 1)),
    ),
    training=(
        ("vit-l-16", _PICTURE, 64, True, True),
        ("vit-l-16", _PICTURE, 64, True, False),
        ("vit-b-16", _PICTURE, 128, True, True),
    ),
    recipes=(("imagenet-resnet50-10", 128), ("cifar10-wrn-28-2", 128)),
    trained=(("cifar10-vgg-like", 5), ("cifar10-wrn-28-2", 5)),
    rounds=20,
    block_s=0.01,
    warmup_limit_s=0.6,
)
REHEARSAL = Setting(
    device="cpu",
    backends=("reference",),
    dtypes=(torch.float32,),
    products=((32, 64),),
    rows=(1, 8),
    square=64,
    bandwidth_mib=1,
    networks=(("lenet300-100", (1, 28, 28), torch.float32, (2,)),),
    training=(("lenet300-100", (1, 28, 28), 2, False, False),),
    recipes=(("digits", 4),),
    trained=(("digits", 2),),
    rounds=20,
    block_s=0.0005,
    warmup_limit_s=0.02,
)


def measured(
    setting: Setting, calls: Mapping[str, Callable[[], object]], batch: int
) -> dict[str, LatencyResult]:
    """Interleaved times, the device's own on a card."""
    stamps = stamps_for(setting.device)
    return measure_interleaved(
        calls,
        batch=batch,
        rounds=setting.rounds,
        block_s=setting.block_s,
        warmup_limit_s=setting.warmup_limit_s,
        time_calls=stamps.time_calls if isinstance(stamps, CudaStamps) else None,
    )


def ratios(found: Mapping[str, LatencyResult], base: str = "dense", n_inside: int = 1) -> Case:
    """base / each of the others, with intervals, and the samples, of one of the n_inside things that a call
    does.
    """
    case: Case = {
        "samples_ms": {name: [ms / n_inside for ms in one.samples_ms] for name, one in found.items()}
    }
    case["steady"] = all(one.steady for one in found.values())
    case["ms"] = {name: location(samples).estimate for name, samples in case["samples_ms"].items()}
    for name, one in found.items():
        if name != base:
            case[f"{base} / {name}"] = asdict(paired_ratio(found[base].samples_ms, one.samples_ms))
    if f"{base} again" in found:
        case["floor"] = resolution(paired_ratio(found[base].samples_ms, found[f"{base} again"].samples_ms))
    return case


def ceilings(setting: Setting) -> Iterator[Case]:
    """What the card can do at best."""
    source = torch.zeros(setting.bandwidth_mib * 2**20, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    found = measured(setting, {"copy": lambda: target.copy_(source)}, 1)["copy"]
    ms = location(found.samples_ms).estimate
    yield {"what": "copy", "gb_per_s": 2 * source.numel() / ms / 1e6, "samples_ms": list(found.samples_ms)}
    n = setting.square
    for dtype in setting.dtypes:
        for backend in setting.backends:
            made = product_calls((n, n, n), dtype, backend, torch.device(setting.device))
            case = ratios(measured(setting, made.calls, n), n_inside=made.n_inside)
            rates = {name: 2 * n**3 / ms / 1e9 for name, ms in case["ms"].items()}  # of dense work, 2:4's too
            yield (
                {"what": "matrix rate", "dtype": str(dtype), "backend": backend, "size": n}
                | case
                | {"tflops": rates, "algorithm": made.algorithm, "how": made.how}
            )


def products(setting: Setting) -> Iterator[Case]:
    """Linear sizes at several numbers of rows."""
    dtype = setting.dtypes[0]
    for backend in setting.backends:
        sizes = [(shape, n_rows) for shape in setting.products for n_rows in setting.rows]
        best_algorithms(sizes, dtype, backend, torch.device(setting.device))  # all by one search
        for n_outputs, n_inputs in setting.products:
            reason = why_not((n_outputs, n_inputs), dtype, backend)
            if reason is not None:
                yield {"outputs": n_outputs, "inputs": n_inputs, "backend": backend, "why_dense": reason}
                continue
            for n_rows in setting.rows:
                size: Size = (n_outputs, n_inputs, n_rows)
                made = product_calls(size, dtype, backend, torch.device(setting.device))
                yield {
                    "outputs": n_outputs,
                    "inputs": n_inputs,
                    "rows": n_rows,
                    "backend": backend,
                    "dtype": str(dtype),
                    "relative_difference": difference(made),
                    "algorithm": made.algorithm,
                    "copies": made.n_inside,
                    "how": made.how,
                } | ratios(measured(setting, made.calls, n_rows), n_inside=made.n_inside)


def difference(made: ProductCalls) -> float:
    """Of the 2:4 product from the dense one, relative to its norm."""
    wanted, found = made.outputs["dense"]().double(), made.outputs["sparse"]().double()
    return float((found - wanted).norm() / wanted.norm())


def inference(setting: Setting) -> Iterator[Case]:
    """Networks with random weights: dense, 2:4 wherever possible, and as a plan chooses."""
    for name, shape, dtype, batches in setting.networks:
        for batch in batches:
            torch._dynamo.reset()  # or the next batch size is compiled for any
            yield of_network(setting, name, shape, dtype, batch, compiled=batch == max(batches))


def of_network(
    setting: Setting, name: str, shape: tuple[int, ...], dtype: torch.dtype, batch: int, *, compiled: bool
) -> Case:
    """One network at one batch size."""
    device, backend = torch.device(setting.device), setting.backends[0]
    torch.manual_seed(0)
    network = models.create(name)
    layers = products_of(network.eval(), shape, batch, dtype, backend)
    possible = [one.name for one in layers if one.reason is None]
    prepare(network, possible, shape)
    timings = measure_timings(
        network,
        shape,
        {(one.n_outputs, one.n_inputs, one.n_rows or 0) for one in layers if one.reason is None},
        name=name,
        batch=batch,
        dtype=dtype,
        backend=backend,
        device=device,
        rounds=setting.rounds,
        block_s=setting.block_s / 2,
        warmup_limit_s=setting.warmup_limit_s / 4,
    )
    plan = make_plan(layers, timings, model=name, batch=batch, weights="random weights")
    found = measure_whole(
        network,
        shape,
        possible,
        plan.sparse,
        name=name,
        batch=batch,
        dtype=dtype,
        backend=backend,
        device=device,
        expected=plan.expected_speedup,
        compiled=compiled,
        rounds=setting.rounds,
        block_s=setting.block_s,
        warmup_limit_s=setting.warmup_limit_s,
    )
    ratios_found = {"dense again": found.control, "everywhere": found.everywhere, "planned": found.planned}
    return {
        "network": name,
        "batch": batch,
        "dtype": str(dtype),
        "backend": backend,
        "how": found.how,
        "compiled": found.compiled,
        "layers_24": found.n_possible,
        "layers_planned": found.n_planned,
        "expected_speedup": found.expected,
        "products": {
            " x ".join(map(str, product.size)): paired_ratio(product.dense_ms, product.sparse_ms).estimate
            for product in timings.products
        },
        "relative_difference": found.relative_difference,
        "samples_ms": found.samples_ms,
        "steady": found.steady,
        "ms": {kind: location(samples).estimate for kind, samples in found.samples_ms.items()},
        "floor": found.floor,
    } | {f"dense / {kind}": asdict(ratio) for kind, ratio in ratios_found.items() if ratio is not None}


class FixedMasks:
    """Masks that stand still: transposable ones of largest magnitude."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.masks = {
            name: transposable_mask(model.get_parameter(name).detach().flatten(1)).view(
                model.get_parameter(name).shape
            )
            for name in names
        }
        self.n_updates = 0


class Loop:
    """One network in training on one batch, by whatever products."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        dtype: torch.dtype,
        backend: Backend,
        kind: str,
        compiled: bool,
    ) -> None:
        self.x, self.y, self.dtype = x, y, dtype
        self.model = model
        self.after: Callable[[], object] = lambda: None
        if not kind.startswith("dense"):
            names = [
                name
                for name, value in model.named_parameters()
                if value.ndim == 2
                and all(n % 128 == 0 or (backend == "reference" and n % 4 == 0) for n in value.shape)
            ]
            masks = FixedMasks(model, names)
            weights = {name: model.get_parameter(name) for name in names}
            mask_pass = MaskPass(weights, masks.masks)
            mask_pass.apply()
            products24 = Step24(model, masks, dtype=dtype, backend=backend, sparse_backward=kind == "both")
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                products24.tune(model, x)

            def after() -> None:
                mask_pass.apply()
                products24.after_step()

            self.after = after
            self.masks, self.products = masks, products24
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=True)
        self.forward: Any = model
        if compiled and not compile_blocks(model):
            self.forward = torch.compile(model)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.after()


def training(setting: Setting) -> Iterator[Case]:
    """Training steps with SGD: dense, 2:4 forward only, and 2:4 with the gradient of the input."""
    dtype = torch.bfloat16 if torch.bfloat16 in setting.dtypes else setting.dtypes[0]
    for name, shape, batch, compiled, as_graph in setting.training:
        for backend in setting.backends:
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = models.create(name).to(setting.device).train()
            x = torch.randn((batch, *shape), device=setting.device)
            y = torch.zeros(batch, dtype=torch.int64, device=setting.device)
            loops = {
                kind: Loop(copy.deepcopy(model), x, y, dtype, backend, kind, compiled)
                for kind in ("dense", "dense again", "forward", "both")
            }
            pool = torch.cuda.graph_pool_handle() if as_graph else None
            calls = {
                kind: replayed(loop.step, pool) if as_graph else loop.step for kind, loop in loops.items()
            }
            case = ratios(measured(setting, calls, batch))
            both = loops["both"]
            both.masks.n_updates += 1
            torch.cuda.synchronize() if setting.device == "cuda" else None
            began = time.perf_counter()
            both.products.after_step()
            torch.cuda.synchronize() if setting.device == "cuda" else None
            yield {
                "network": name,
                "batch": batch,
                "dtype": str(dtype),
                "backend": backend,
                "compiled": compiled,
                "how": {
                    kind: "eager" if calls[kind] == loop.step else "cuda graph"
                    for kind, loop in loops.items()
                },
                "layers_24": len(both.products.layers),
                "compress_ms": 1e3 * (time.perf_counter() - began),
            } | case


def masks(setting: Setting) -> Iterator[Case]:
    """What sparse momentum adds to a step with dense products, and a mask update."""
    for recipe, batch in setting.recipes:
        result = bench_training_step(
            recipe,
            rounds=setting.rounds,
            block_s=setting.block_s,
            warmup_limit_s=setting.warmup_limit_s,
            device=setting.device,
            batch_size=batch,
        )
        yield {
            "recipe": recipe,
            "batch": batch,
            "dense / sparse": asdict(result.ratio),
            "floor": result.floor,
            "part_ms": {"dense": result.dense.part_ms, "sparse": result.sparse.part_ms},
            "update_median_ms": sorted(result.update_ms)[len(result.update_ms) // 2]
            if result.update_ms
            else None,
            "samples_ms": {
                "dense": list(result.dense.latency.samples_ms),
                "sparse": list(result.sparse.latency.samples_ms),
                "update": list(result.update_ms),
            },
        }


def trained(setting: Setting) -> Iterator[Case]:
    """Short trainings on real data, sparse and dense, and sparse without a CUDA graph: that they learn, and
    how fast.

    The data folder is in the variable SPARSE_EXPORT_DATA.
    """
    graph = setting.device == "cuda"
    kinds = ((False, graph), (True, graph), *(((False, False),) if graph else ()))
    for recipe, epochs in setting.trained:
        for dense, cuda_graph in kinds:
            with tempfile.TemporaryDirectory() as folder:
                changes = {"epochs": epochs, "dense": dense, "cuda_graph": cuda_graph}
                run = train(load_recipe(recipe, changes=changes), Path(folder) / "run", device=setting.device)
                info = run.info
                assert info.test is not None
                assert info.data is not None
                n_steps = epochs * (info.data.n_train // info.recipe["batch_size"])
                yield {
                    "recipe": recipe,
                    "dense": dense,
                    "cuda_graph": cuda_graph,
                    "epochs": epochs,
                    "n_weights": sum(layer.n_weights for layer in info.layers),
                    "n_active": sum(layer.n_active for layer in info.layers),
                    "test_percent": info.test.figure,
                    "steps_per_s": n_steps / info.seconds,
                    "seconds": info.seconds,
                }


PARTS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "ceilings": ceilings,
    "products": products,
    "inference": inference,
    "training": training,
    "masks": masks,
    "trained": trained,
}


def run_part(name: str, setting: Setting, file: Path) -> None:
    """Run one part, writing its cases after each of them."""
    cases: list[Case] = []
    torch.backends.cudnn.benchmark = True  # the dense networks are to be as fast as they can be
    with watched_cards() as cards:
        for case in PARTS[name](setting):
            cases.append(case)
            document = {"cases": cases, "throttled": cards.throttled, "cards_why_empty": cards.why_empty}
            file.write_text(json.dumps(document))


def summary(document: Mapping[str, Any]) -> str:
    """A table of every ratio, for people."""
    lines = [f"# {document['card']}, {document['date']}", "", document["note"], ""]
    lines += ["| part | case | ratio | 95 % | floor |", "|---|---|---|---|---|"]
    for part, found in document["parts"].items():
        if found["problem"]:
            lines.append(f"| {part} | {found['problem'].splitlines()[-1]} | | | |")
        for case in found["cases"]:
            what = ", ".join(
                f"{key} {value}"
                for key, value in case.items()
                if isinstance(value, str | int | bool) and (key != "steady" or not value)
            )
            if isinstance(case.get("how"), dict):
                what += f", {' and '.join(sorted(set(case['how'].values())))}"
            shown = {key: value for key, value in case.items() if key.startswith("dense / ")}
            floor = f"{case['floor']:.3f}" if "floor" in case else ""
            for key, ratio in shown.items():
                interval = f"[{ratio['low']:.3f}, {ratio['high']:.3f}]"
                lines.append(f"| {part} | {what}: {key} | {ratio['estimate']:.3f} | {interval} | {floor} |")
            if not shown:
                rate = f"{case['gb_per_s']:.0f} GB/s" if "gb_per_s" in case else ""
                lines.append(f"| {part} | {what} | {rate} | | |")
    return "\n".join(lines) + "\n"


def without_samples(value: Any, taken: list[Any]) -> Any:
    """The value with each `samples_ms` replaced by its place in `taken`."""
    if isinstance(value, dict):
        result = {}
        for key, below in value.items():
            if key == "samples_ms":
                result["samples"] = len(taken)
                taken.append(below)
            else:
                result[key] = without_samples(below, taken)
        return result
    if isinstance(value, list):
        return [without_samples(below, taken) for below in value]
    return value


def write(folder: Path, stem: str, document: dict[str, Any]) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: list[Any] = []
    light = without_samples(document, taken)
    (folder / f"{stem}.json").write_text(json.dumps(light, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(summary(document))
    with gzip.open(folder / f"{stem}-samples.json.gz", "wt") as stream:
        json.dump(taken, stream)


def run_tests(limit_s: float, log: Path) -> str | None:
    """Run every gpu test; what went wrong, or None."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        log.write_text(f"stopped after {limit_s:.0f} s\n{_text(cause.stdout)}")
        return f"stopped after {limit_s:.0f} s"
    log.write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1:] or ["nothing was said"]
    return None if done.returncode == 0 else f"exit {done.returncode}: {last[0]}"


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else str(output or "")


def session(folder: Path, parts: Sequence[str], minutes: float, *, rehearse: bool) -> Path:
    """Run the parts one after another in processes of their own; the path of the document."""
    card = "rehearsal" if rehearse else torch.cuda.get_device_name(0)
    date = now()
    stem = f"{date[:16].replace(':', '')}-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-').lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        "A rehearsal on the CPU with dense products in place of 2:4 ones: these figures mean nothing."
        if rehearse
        else "Times of the device by CUDA events; ratios above 1 mean that 2:4 is faster. Through torch, not TensorRT."
    )
    document: dict[str, Any] = {
        "card": card,
        "date": date,
        "note": note,
        "command": command_line(),
        "machine": machine_facts(),
        "versions": library_versions(),
        "parts": {},
    }
    end = time.monotonic() + 60 * minutes
    for place, name in enumerate(parts):
        limit_s = max(1.0, end - time.monotonic()) * SHARES[name] / sum(SHARES[one] for one in parts[place:])
        print(f"{name}: at most {limit_s:.0f} s", flush=True)
        began = time.monotonic()
        part: dict[str, Any] = {"cases": [], "problem": None}
        if name == "tests":
            part["problem"] = run_tests(limit_s, folder / f"{stem}-tests.txt")
        else:
            file = folder / f".{stem}-{name}.json"
            words = [sys.executable, "-m", "benchmarks.gpu_session", "--part", name, "--part-file", str(file)]
            try:
                done = subprocess.run(
                    [*words, *(["--rehearse"] if rehearse else [])],
                    timeout=limit_s,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    part["problem"] = done.stderr.strip() or f"exit {done.returncode}"
            except subprocess.TimeoutExpired:
                part["problem"] = f"stopped after {limit_s:.0f} s"
            if file.is_file():
                part |= json.loads(file.read_text())
                file.unlink()
        part["seconds"] = time.monotonic() - began
        document["parts"][name] = part
        write(folder, stem, document)
        print(
            f"  {len(part['cases'])} cases, {part['seconds']:.0f} "
            f"s{', ' + part['problem'].splitlines()[-1] if part['problem'] else ''}"
        )
    return folder / f"{stem}.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--parts", default=",".join(SHARES), help="default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--data-dir", type=Path, help="with CIFAR-10; without it nothing is trained")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without meaning")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = REHEARSAL if arguments.rehearse else CARD
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device. --rehearse runs on the CPU.", file=sys.stderr)
        return 5
    if arguments.part:
        run_part(arguments.part, setting, arguments.part_file)
        return 0
    parts = arguments.parts.split(",")
    unknown = [name for name in parts if name not in SHARES]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(SHARES)}")
    if arguments.data_dir is not None:
        os.environ["SPARSE_EXPORT_DATA"] = str(arguments.data_dir.resolve())
    elif not arguments.rehearse and "SPARSE_EXPORT_DATA" not in os.environ:
        parts = [name for name in parts if name != "trained"]
    if arguments.rehearse:
        parts = [name for name in parts if name != "tests"]
    try:
        written = session(arguments.out, parts, arguments.minutes, rehearse=arguments.rehearse)
    except SparseExportError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    print(written)
    problems = [name for name, part in json.loads(written.read_text())["parts"].items() if part["problem"]]
    if problems:
        print(f"Not whole: {', '.join(problems)}. The document says why.", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
