"""What is known of one of two compared bundles: its graph, its engines, and the run that it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from sparse_export.errors import SparseExportError, UsageError
from sparse_export.evaluate.references import run_of_bundle
from sparse_export.formats.bundle import Bundle, BundleInfo
from sparse_export.formats.run import RunInfo
from sparse_export.inspect import inspect
from sparse_export.inspection import Inspection, require_unchanged
from sparse_export.oneshot.choice import Choice
from sparse_export.oneshot.report import REPORT_FILE
from sparse_export.train.metrics import read_metrics

__all__ = ["BundleSide", "side_of"]


@dataclass(frozen=True, kw_only=True)
class BundleSide:
    """One of the two bundles, with what else is known of it.

    Attributes:
        name: `dense` or `sparse`.
        run: None where it is no longer there, or is not the one; missing then says so.
        metrics: the lines of its `metrics.jsonl`, none where that cannot be read.
        choice: how `sparsify` chose its layers; None where it did not, or that cannot be read.
    """

    name: str
    info: BundleInfo
    inspection: Inspection
    run: RunInfo | None
    metrics: Sequence[dict[str, Any]]
    missing: str | None
    choice: Choice | None = None


def side_of(name: str, bundle: Bundle) -> BundleSide:
    """Read what a report shows of a bundle.

    Raises:
        UsageError: the bundle is none. Nothing is raised for its run.
        ArtefactError: the bundle is damaged.
    """
    run, metrics, missing, choice = None, [], None, None
    try:
        found = run_of_bundle(bundle)
    except SparseExportError as cause:
        found, missing = None, cause.what
    if found is not None:
        run, choice = found.info, _choice(Path(found.path))
        try:
            metrics = read_metrics(Path(found.path))
        except (OSError, ValueError):
            trained = found.info.epochs > 0
            missing = (
                f"The run {found.path} has no record of its epochs that can be read."
                if trained
                else f"The run {found.path} was not trained here."
            )
    elif missing is None:
        missing = f"The run {bundle.info.run.path} is no longer there."
    inspection = inspect(bundle.path)
    require_unchanged(inspection)
    return BundleSide(
        name=name,
        info=bundle.info,
        inspection=inspection,
        run=run,
        metrics=metrics,
        missing=missing,
        choice=choice,
    )


def _choice(run: Path) -> Choice | None:
    try:
        found = json.loads((run / REPORT_FILE).read_bytes())["choice"]
        return None if found is None else pydantic.TypeAdapter(Choice).validate_python(found)
    except (OSError, ValueError, KeyError, TypeError, UsageError):  # none, or of another version
        return None
