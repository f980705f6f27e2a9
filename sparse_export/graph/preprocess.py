"""The graph that makes a network's input of raw samples: what the training's loader does, as ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sparse_export.formats.run import Interpolation
from sparse_export.signature import TensorInfo

__all__ = ["array_graph", "picture_graph"]

_OPSET, _IR_VERSION = 20, 10
_UINT8_MAX = 255
_RESIZE: dict[Interpolation, dict[str, Any]] = {
    "bilinear": {"mode": "linear"},
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
}
_TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}


def picture_graph(
    output: TensorInfo,
    *,
    crop_ratio: float,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: Interpolation = "bilinear",
) -> tuple[onnx.ModelProto, TensorInfo]:
    """Scale, crop and normalise pictures of any size.

    onnxruntime's Resize of uint8 with these attributes is Pillow's bilinear one: weights of fixed point, none
    for what lies outside, columns before rows, each rounded. It computes the weights in float32 and Pillow in
    float64, so that some values differ by 1 of 255, or 2. Of 250 photographs of 160 pixels, 0.01 % did at 128
    x 128, 2.3 % at 224 x 224, none at 64 x 64 (onnxruntime 1.31.1, Pillow 13.0, on a CPU, 2026-11-30).
    Without exclude_outside, borders differ by up to 23.

    Args:
        output: the input of the network, float32 (batch, 3, H, W).
        crop_ratio: the picture is scaled, with its proportions, to just cover (H, W) / crop_ratio.
        mean: of each channel, subtracted after scaling to 0..1.
        std: of each channel.
        interpolation: how it is scaled; bicubic with Pillow's a = -0.5.

    Returns:
        The graph, and its input: `picture`, uint8 (batch, height, width, 3) in RGB.
    """
    picture = TensorInfo(name="picture", dtype="uint8", shape=(output.shape[0], "height", "width", 3))
    graph = _Graph()
    n, size, covering = graph.constant("size", np.array(output.shape[2:], np.float64)), "hw", "covering"
    graph.node("Shape", ["picture"], ["batch"], start=0, end=1)
    graph.node("Shape", ["picture"], ["int_hw"], start=1, end=3)
    graph.node("Cast", ["int_hw"], [size], to=TensorProto.DOUBLE)
    graph.node("Div", [n, size], ["ratios"])
    graph.node("ReduceMax", ["ratios"], ["larger_ratio"], keepdims=1)
    graph.node("Div", ["larger_ratio", graph.constant("crop_ratio", np.float64(crop_ratio))], ["scale"])
    graph.node("Mul", [size, "scale"], ["scaled"])
    graph.node("Round", ["scaled"], ["whole"])  # half to even, as Python's round
    graph.node("Max", ["whole", n], ["float_covering"])
    graph.node("Cast", ["float_covering"], [covering], to=TensorProto.INT64)
    graph.node("Concat", ["batch", covering, graph.constant("channels", np.array([3]))], ["sizes"], axis=0)
    graph.node(
        *("Resize", ["picture", "", "", "sizes"], ["resized"]),
        **_RESIZE[interpolation],
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )
    crop = graph.constant("crop", np.array(output.shape[2:], np.int64))
    graph.node("Sub", [covering, crop], ["margins"])
    graph.node("Div", ["margins", graph.constant("two", np.int64(2))], ["first"])
    graph.node("Add", ["first", crop], ["last"])
    graph.node("Slice", ["resized", "first", "last", graph.constant("axes", np.array([1, 2]))], ["cropped"])
    graph.node("Transpose", ["cropped"], ["channels_first"], perm=(0, 3, 1, 2))
    graph.normalised("channels_first", output, mean, std, is_uint8=True)
    return graph.model(picture, output), picture


def array_graph(
    output: TensorInfo, *, is_uint8: bool, mean: Sequence[float], std: Sequence[float]
) -> tuple[onnx.ModelProto, TensorInfo]:
    """Normalise samples of the network's own size.

    Args:
        output: the input of the network, float32 (batch, C, ...).
        is_uint8: samples are uint8 pictures and not floats.
        mean: of each channel, subtracted, of uint8 after scaling to 0..1.
        std: of each channel.

    Returns:
        The graph, and its input: `picture`, uint8 (batch, H, W, C), or `sample`, float32 as the output.
    """
    batch, *shape = output.shape
    graph = _Graph()
    if not is_uint8:
        sample = TensorInfo(name="sample", dtype="float32", shape=output.shape)
        graph.normalised("sample", output, mean, std, is_uint8=False)
        return graph.model(sample, output), sample
    picture = TensorInfo(name="picture", dtype="uint8", shape=(batch, *shape[1:], shape[0]))
    last = len(shape)
    graph.node("Transpose", ["picture"], ["channels_first"], perm=(0, last, *range(1, last)))
    graph.normalised("channels_first", output, mean, std, is_uint8=True)
    return graph.model(picture, output), picture


class _Graph:
    """A graph in the making; each node is called after its output."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: object
    ) -> None:
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))  # type: ignore[arg-type]

    def normalised(
        self, source: str, output: TensorInfo, mean: Sequence[float], std: Sequence[float], *, is_uint8: bool
    ) -> None:
        """As `normalise` of the data sets: float32, divided and subtracted in the same order."""
        if is_uint8:
            self.node("Cast", [source], ["levels"], to=TensorProto.FLOAT)
            self.node("Div", ["levels", self.constant("largest", np.float32(_UINT8_MAX))], ["unit"])
            source = "unit"
        per_channel = (-1, *(1 for _ in output.shape[2:]))
        values = (np.array(one, np.float32).reshape(per_channel) for one in (mean, std))
        means, stds = (self.constant(name, one) for name, one in zip(("mean", "std"), values, strict=True))
        self.node("Sub", [source, means], ["centred"])
        self.node("Div", ["centred", stds], [output.name])

    def model(self, taken: TensorInfo, given: TensorInfo) -> onnx.ModelProto:
        inner = {name for node in self._nodes for name in node.output} | {one.name for one in self._constants}
        new = {name: f"preprocess/{name}" for name in inner - {given.name}}
        for node in self._nodes:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]
        for constant in self._constants:
            constant.name = new[constant.name]
        ends = [
            helper.make_tensor_value_info(one.name, _TYPES[one.dtype], list(one.shape))
            for one in (taken, given)
        ]
        graph = helper.make_graph(self._nodes, "preprocess", ends[:1], ends[1:], self._constants)
        opsets = [helper.make_opsetid("", _OPSET)]
        made = helper.make_model(
            graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="sparse-export"
        )
        onnx.checker.check_model(made, full_check=True)
        return made
