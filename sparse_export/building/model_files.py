"""The model files of a bundle: the graph dense, its 2:4 weights packed, or both."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx

from sparse_export.errors import GateFailed, UnknownNameError, output_error
from sparse_export.formats.bundle import MODEL_FILE
from sparse_export.graph.foreign import external_files
from sparse_export.graph.passes.pack24 import pack
from sparse_export.graph.passes.packable import pack_choices

__all__ = ["DENSE_MODEL_FILE", "MODEL_FILE", "graph_files", "model_files", "require_form"]

DENSE_MODEL_FILE = "model-dense.onnx"

_FORMS = ("dense", "packed", "both")
_REASONS_SHOWN = 8


def require_form(form: str) -> None:
    """Check the name of a form.

    Raises:
        UnknownNameError: `model_files` does not know it.
    """
    if form not in _FORMS:
        raise UnknownNameError("form of the ONNX file", form, _FORMS)


def graph_files(source: Path, folder: Path) -> tuple[str, ...]:
    """Copy an ONNX file as `model.onnx` into the folder of a bundle, with the data that lie beside it.

    Args:
        source: the file.
        folder: of the bundle.

    Returns:
        Paths of the files within the bundle.

    Raises:
        OutputError: one cannot be written.
    """
    names = {MODEL_FILE: source} | {name: source.parent / name for name in external_files(source)}
    for name, file in names.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
        except OSError as cause:
            raise output_error(folder / name, cause) from cause
    return tuple(names)


def model_files(model: onnx.ModelProto, form: str) -> dict[str, onnx.ModelProto]:
    """Make the graphs of the form that was requested.

    Args:
        model: the dense graph.
        form: `dense`, `packed` or `both`.

    Returns:
        The model of each file, by its name.

    Raises:
        GateFailed: a packed form was requested, and no weight can be packed.
    """
    if form == "dense":
        return {MODEL_FILE: model}
    choices = pack_choices(model)
    if all(choice.reason is not None for choice in choices):
        reasons = "; ".join(f"{choice.weight}: {choice.reason}" for choice in choices[:_REASONS_SHOWN])
        more = f"; and {len(choices) - _REASONS_SHOWN} more" if len(choices) > _REASONS_SHOWN else ""
        raise GateFailed(
            f"No weight can be packed: {reasons or 'no layer has a stored weight'}{more}.",
            do="Train with a 2:4 pattern, or build with the dense ONNX file.",
        )
    return {MODEL_FILE: pack(model)} | ({DENSE_MODEL_FILE: model} if form == "both" else {})
