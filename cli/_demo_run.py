"""The whole road once: train dense and sparse, build, validate, compare."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.building import build
from sparse_export.engines import tensorrt_import
from sparse_export.errors import MissingCapability, UsageError
from sparse_export.evaluate.compare import compare
from sparse_export.evaluate.comparison import Comparison, write_results
from sparse_export.evaluate.deciding import Round
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import Validation, check_gates
from sparse_export.files import claimed, require_writable
from sparse_export.formats.bundle import Bundle
from sparse_export.formats.run import Run
from sparse_export.report import write_report
from sparse_export.tasks import data
from sparse_export.train.loop import train
from sparse_export.train.observer import Observer
from sparse_export.train.recipe import load_recipe

RECIPE = "digits"
DENSITY = 0.2
PATTERN = "2:4"
REPORT_FILE = "report.html"
_ENGINE_DROP = 1.0  # percentage points
_MARK = ".sparse-export-demo"


# Name of a network in the demo -> changes to the recipe, and the form of its ONNX file.
_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"dense": True}, "dense"),
    "sparse": ({"sparsity": {"density": DENSITY}}, "dense"),
    "two-four": ({"sparsity": {"pattern": PATTERN, "density": None}}, "packed"),
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo made, by the names `dense`, `sparse` and `two-four`.

    validations: have passed their gates.  comparisons: of the last two with the first; each is written to a
    folder of its name under `results`, with its page for people, of `reports`.
    """

    bundles: dict[str, Bundle]
    validations: dict[str, Validation]
    comparisons: dict[str, Comparison]
    reports: dict[str, Path]
    results: Path


def demo(
    out: Path,
    *,
    observe: Callable[[str], AbstractContextManager[Observer]],
    observe_rounds: Callable[[], AbstractContextManager[Round | None]] = nullcontext,
    say: Callable[[str], None],
) -> Demo:
    """Train `digits` dense, at 20 % density and to 2:4 on the embedded scans, and carry all to the
    comparison.

    out: folder for everything; one that an earlier demo made is replaced, any other must be new or empty.
    observe: gives the observer of a training run, by its label.  observe_rounds: that of the rounds of a
    measurement.  say: is told of each stage.
    Raises UsageError, FolderInUse, OutputError, GateFailed.
    """
    with claimed(out):
        _prepare(out)
        bundles: dict[str, Bundle] = {}
        validations: dict[str, Validation] = {}
        for kind, (changes, form) in _KINDS.items():
            recipe = load_recipe(RECIPE, changes=changes)
            with observe(kind) as observer:
                run: Run = train(recipe, out / "runs" / kind, device="cpu", observer=observer)
            say(f"building {kind}")
            targets = ["onnx", *(_engine_targets(say) if form == "packed" else ())]
            bundles[kind] = build(run, out / "bundles" / kind, targets=targets, onnx=form)
            say(f"validating {kind}")
            # A graph on the CPU flips no sample; an engine may flip one or another.
            engine_runs = bool(bundles[kind].info.engines) and tensorrt_import.gpu() is not None
            validations[kind] = validate(bundles[kind], max_drop=_ENGINE_DROP if engine_runs else 0.0)
            check_gates(validations[kind])
        info = bundles["dense"].info
        samples = None if info.data is None else data.load_test_set(info.data, info.signature.input_shape)
        comparisons: dict[str, Comparison] = {}
        reports: dict[str, Path] = {}
        for kind in _KINDS:
            if kind != "dense":
                say(f"comparing dense with {kind}")
                with observe_rounds() as on_round:
                    comparisons[kind] = compare(
                        bundles["dense"],
                        bundles[kind],
                        samples=samples,
                        n_threads=1,
                        runtime="onnxruntime-cpu",
                        on_round=on_round,
                    )
                folder = out / "results" / kind
                write_results(folder, comparisons[kind])
                reports[kind] = write_report(
                    folder / REPORT_FILE, comparisons[kind], bundles["dense"], bundles[kind]
                )
        return Demo(
            bundles=bundles,
            validations=validations,
            comparisons=comparisons,
            reports=reports,
            results=out / "results",
        )


def _engine_targets(say: Callable[[str], None]) -> tuple[str, ...]:
    """The engine that is built without a GPU, where its library works; else it is said why there is none."""
    try:
        tensorrt_import.library("tensorrt-rtx")
    except MissingCapability as cause:
        say(f"without an engine: {cause.what}")
        return ()
    return ("tensorrt-rtx",)


def _prepare(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise UsageError(
                f"{out} holds something that no demo made.",
                expected="A new or empty folder, or an earlier demo's, was expected.",
                do="Choose another one with --out.",
            )
        shutil.rmtree(out)
    require_writable(out)
    (out / _MARK).touch()
