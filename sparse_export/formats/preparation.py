"""How raw samples become the input of a network: by a graph of its own, or inside the network's graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_export.formats.document import Amount, Share
from sparse_export.signature import TensorInfo

__all__ = ["PREPROCESS_FILE", "FoldedInfo", "FoldedPlace", "PreprocessInfo", "RawType"]

PREPROCESS_FILE = "preprocess.onnx"

RawType = Literal["float32", "uint8"]
"""The types in which a graph may take raw samples."""

FoldedPlace = Literal["weight and bias", "weight, behind a Sub", "Sub and Mul"]
"""Where raw samples are normalized in a graph: inside its first layer; inside the weight of that and in a Sub
before it; or in two nodes before the network."""


@dataclass(frozen=True, kw_only=True)
class PreprocessInfo:
    """The graph `preprocess.onnx`, which makes the network's input of raw samples.

    Attributes:
        input: what it takes; it gives the network's only input.
        golden_input: file of raw samples.
        golden_output: file of what the training's loader makes of them.
        largest_difference: of the graph from that, by onnxruntime on the CPU.
        allowed_difference: of any runtime.
    """

    input: TensorInfo
    golden_input: str
    golden_output: str
    largest_difference: Amount
    allowed_difference: Amount

    @property
    def files(self) -> tuple[str, ...]:
        """All that belong to it."""
        return (PREPROCESS_FILE, self.golden_input, self.golden_output)


@dataclass(frozen=True, kw_only=True)
class FoldedInfo:
    """Scaling and normalization of raw samples as a part of the graph.

    Attributes:
        dtype: of the raw samples, which have the shape of the network's input.
        levels: they are pictures of 0 to 255, divided by 255 before the mean is subtracted.
        mean: of each channel.
        std: likewise.
        place: where in the graph that is done.
        weight: name of the weight that was scaled; empty where none was.
        largest_difference: of the outputs of the graph in float32 from those of the network behind the
            training's normalization, as a share of the spread of an output.
        allowed_difference: likewise, the most that was allowed.
    """

    dtype: RawType
    levels: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    place: FoldedPlace
    weight: str
    largest_difference: Amount
    allowed_difference: Share

    @property
    def taken(self) -> str:
        """What the graph takes, as `raw uint8 samples, 0 to 255`."""
        return f"raw {self.dtype} samples{', 0 to 255' if self.levels else ''}"

    @property
    def words(self) -> str:
        """What the graph takes, where it normalizes that, and how well."""
        where = {
            "weight and bias": f"in the weight and bias of its first layer, {self.weight}",
            "weight, behind a Sub": f"in {self.weight}, behind a Sub of the mean, as this layer pads",
            "Sub and Mul": "by a Sub and a Mul before the network",
        }[self.place]
        return (
            f"{self.taken}, normalized {where}; its outputs differ by {self.largest_difference:.2g} of their "
            f"spread, {self.allowed_difference:g} is allowed"
        )
