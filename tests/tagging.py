"""A network with two inputs, one of integers, and two outputs, one of integers; and bundles of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from sparse_export.building.golden import ATOL, golden_pair, write_golden
from sparse_export.formats.bundle import Bundle, open_bundle, save_bundle_info
from sparse_export.formats.listed import file_infos
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Signature, TensorInfo
from tests.engines.making import bundle_info

_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
tagger (int64[batch, sequence] ids, float[batch, sequence] mask)
    => (float[batch, sequence, 3] scores, int64[batch, sequence] tags)
<int64[1] last = {2}>
{
    words = Gather (table, ids)
    column = Unsqueeze (mask, last)
    scores = Mul (words, column)
    tags = ArgMax <axis: int = 2, keepdims: int = 0> (TAGGED)
}
"""
TABLE = np.array([[0, 1, 2], [12, 10, 11], [21, 22, 20], [30, 31, 32], [42, 40, 41]], np.float32)
SIGNATURE = Signature(
    inputs=(
        TensorInfo(name="ids", dtype="int64", shape=("batch", "sequence"), low=0, high=4),
        TensorInfo(name="mask", dtype="float32", shape=("batch", "sequence")),
    ),
    outputs=(
        TensorInfo(name="scores", dtype="float32", shape=("batch", "sequence", 3)),
        TensorInfo(name="tags", dtype="int64", shape=("batch", "sequence")),
    ),
    sizes={"sequence": 6},
)


def save_tagger(file: Path, *, tagged: str = "scores", table: np.ndarray = TABLE) -> Path:
    """Write the network. tagged: what the tags are taken of; of `words` they do not depend on the mask."""
    model = parser.parse_model(_GRAPH.replace("TAGGED", tagged))
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    onnx.save(model, file)
    return file


def tagger_bundle(
    folder: Path, *, tagged: str = "scores", table: np.ndarray = TABLE, signature: Signature = SIGNATURE
) -> Bundle:
    """A bundle of the network without data, from elsewhere. tagged, table: of its file, not its golden pair."""
    folder.mkdir()
    with open_session(save_tagger(folder / "model.onnx"), signature=SIGNATURE) as session:
        golden = write_golden(folder, golden_pair(session))
    save_tagger(folder / "model.onnx", tagged=tagged, table=table)
    (folder / "layers.json").write_text("{}")
    info = bundle_info(
        signature=signature,
        golden=golden,
        atol=ATOL,
        rtol=3e-4,
        command=(str(folder),),  # so that no two have the same manifest
        files=file_infos(folder, ("model.onnx", "layers.json", *golden.files)),
    )
    save_bundle_info(folder, info)
    return open_bundle(folder)
