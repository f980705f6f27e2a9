"""The golden pair of a bundle as a package has it: arrays as clients send them, and an index."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from sparse_export.files import write_bytes, write_json
from sparse_export.runtimes.tolerance import spread
from sparse_export.serving.repository import Served, golden_output_files
from sparse_export.serving.tensors import TensorSpec
from sparse_export.signature import Array

__all__ = ["GOLDEN_INDEX", "write_golden_files"]

GOLDEN_INDEX = "golden.json"


def write_golden_files(folder: Path, served: Served) -> None:
    """Write the golden pair of a bundle, with the index that the client scripts read.

    Args:
        folder: where to write; it is made.
        served: the bundle.

    Raises:
        OutputError: it cannot be written.
    """
    info, golden = served.bundle.info, served.bundle.info.golden
    output_files = golden_output_files(served.bundle)
    inputs = [
        _written(folder, one, golden.inputs[one.name], served.golden_inputs[one.name])
        for one in served.interface.inputs
    ]
    outputs = []
    for one in served.interface.outputs:
        if one.name not in served.golden_outputs:
            continue
        array = served.golden_outputs[one.name]
        entry = _written(folder, one, output_files[one.name], array)
        if one.dtype.startswith(("FP", "BF")):
            entry["largest_difference"] = info.atol + info.rtol * spread(array)
        else:
            entry["largest_unequal_share"] = info.rtol
        outputs.append(entry)
    write_json(folder / GOLDEN_INDEX, {"inputs": inputs, "outputs": outputs})


def _written(folder: Path, spec: TensorSpec, file: str, array: Array) -> dict[str, object]:
    """Write an array, and give its entry of the index. bfloat16 is float32 there, which clients send."""
    on_wire = spec.to_wire(array)
    stream = io.BytesIO()
    np.save(stream, on_wire.astype(np.float32) if spec.dtype == "BF16" else on_wire, allow_pickle=False)
    name = Path(file).name
    write_bytes(folder / name, stream.getvalue())
    return {"name": spec.name, "datatype": spec.dtype, "file": name}
