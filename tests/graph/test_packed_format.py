"""A reader written from docs/packed-format.md alone reads what is packed, and the document's example is
true.
"""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from sparse_export.graph.passes.pack24 import pack
from tests.conftest import CHECKOUT
from tests.graph.packed import BF16, convolutional, gemm, initializer, quantized, two_four

DOCUMENT = (CHECKOUT / "docs" / "packed-format.md").read_text()
WIDTHS = {"FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2, "INT8": 1}


def read_packed(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every packed weight. Nothing of sparse_export is used here."""
    lines = {prop.key: prop.value for prop in model.metadata_props}
    assert lines["sparse24.format"] == "1"
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for call in [node for node in model.graph.node if node.domain == "sparse24"]:
        values, meta, shape = (tensors[name] for name in call.input)
        weight, perm = call.output[0], None
        if f"sparse24.tensor:{weight}" not in lines:
            (step,) = [node for node in model.graph.node if weight in node.input]
            weight, perm = step.output[0], list(step.attribute[0].ints)
        kind = onnx.TensorProto.DataType.Name(values.data_type)
        width = WIDTHS[kind]
        moved = struct.unpack(f"<{shape.dims[0]}q", shape.raw_data)
        dense = bytearray(4 * values.dims[0] * width)
        for group in range(values.dims[0]):
            nibble = meta.raw_data[group // 2] >> 4 * (group % 2) & 15
            for column, index in enumerate((nibble & 3, nibble >> 2)):
                source, target = (2 * group + column) * width, (4 * group + index) * width
                dense[target : target + width] = values.raw_data[source : source + width]
        entries = np.frombuffer(bytes(dense), dtype=f"V{width}").reshape(moved)
        stored = entries if perm is None else entries.transpose(perm)
        line = lines[f"sparse24.tensor:{weight}"].split(" ")
        assert line[:2] == [kind, ",".join(map(str, stored.shape))]
        assert line[2] == hashlib.sha256(stored.tobytes()).hexdigest()
        found[weight] = (kind, stored.shape, stored.tobytes())
    return found


@pytest.mark.parametrize(
    ("model", "n_packed"),
    [
        (convolutional(np.float32), 5),
        (convolutional(np.float16), 5),
        (quantized(), 2),
        (gemm(two_four((3, 4), 1, BF16)), 1),
    ],
)
def test_a_reader_written_from_the_document_gets_every_weight(model: onnx.ModelProto, n_packed: int) -> None:
    found = read_packed(pack(model))
    assert len(found) == n_packed
    for weight, (kind, shape, raw) in found.items():
        tensor = initializer(model, weight)
        assert (kind, shape) == (onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims))
        assert raw == numpy_helper.to_array(tensor).tobytes()


def example(label: str) -> str:
    """The hex words that the document's example gives under a label."""
    (line,) = re.findall(
        rf"^    {re.escape(label)} +((?:[0-9a-f]{{2}} +)*[0-9a-f]{{2}})\b", DOCUMENT, re.MULTILINE
    )
    return str(line).replace(" ", "")


def test_the_documents_example_is_what_is_written() -> None:
    dense = np.array([[0, 1.5, 0, -2], [0, 0, 0, 0], [3, 0, 0, 0]], dtype=np.float16)
    model = pack(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("Gemm", ["x", "W"], ["y"], transB=1)],
                "example",
                [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT16, ["n", 4])],
                [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT16, ["n", 3])],
                [numpy_helper.from_array(dense, "W")],
            ),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )
    )
    assert example("dense") == dense.tobytes().hex()
    for part in ("values", "meta", "shape"):
        assert example(f"W.{part}") == initializer(model, f"W.{part}").raw_data.hex()
    for prop in model.metadata_props:
        assert re.search(rf"{re.escape(prop.key)} +{re.escape(prop.value)}\n", DOCUMENT), prop.key


def test_the_documents_body_is_the_functions() -> None:
    body = re.search(r"    n_groups = .*?dense    = [^\n]*\n", DOCUMENT, re.DOTALL)
    assert body is not None
    (function,) = pack(gemm(two_four((8, 8), 1))).functions
    used: list[Any] = sorted(node.op_type for node in function.node if node.op_type != "Constant")
    assert sorted(re.findall(r"\b([A-Z][A-Za-z]+)\(", body[0])) == used
