"""Batch norms of a graph, and the mean and variance of what each meets on its way.

Legend: N samples, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from sparse_export.errors import UsageError
from sparse_export.graph.layers import FLOATS
from sparse_export.graph.nodes import is_standard
from sparse_export.oneshot.segments import Stop
from sparse_export.oneshot.wiring import Wiring
from sparse_export.signature import Array

__all__ = ["Norm", "NormSums", "norms_of"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A batch norm with statistics of its own.

    Attributes:
        node: its index among the nodes of the graph.
        value: what it normalises, (N, C, …).
        mean, variance: the stored tensors, which nothing else reads.
    """

    node: int
    value: str
    mean: str
    variance: str

    @property
    def stop(self) -> Stop:
        """The norm as the walk sees it: it runs once its statistics are settled."""
        return Stop(nodes=frozenset((self.node,)), values=(self.value,))


def norms_of(model: onnx.ModelProto, wiring: Wiring) -> tuple[Norm, ...]:
    """The batch norms of a graph whose statistics are stored for each alone, and that an input reaches.

    Args:
        model: the graph.
        wiring: of it.
    """
    stored = {one.name for one in model.graph.initializer if one.data_type in FLOATS}
    n_readers: dict[str, int] = {}
    for names in wiring.reads:
        for name in names:
            n_readers[name] = n_readers.get(name, 0) + 1
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type != "BatchNormalization" or not is_standard(node) or index in wiring.constant:
            continue
        training = any(
            one.name == "training_mode" and helper.get_attribute_value(one) for one in node.attribute
        )
        value, _, _, mean, variance = node.input
        own = {mean, variance} <= stored and n_readers[mean] == n_readers[variance] == 1
        if own and not training and mean != variance and not {mean, variance} & set(wiring.outputs):
            found.append(Norm(node=index, value=value, mean=mean, variance=variance))
    return tuple(found)


class NormSums:
    """Sums over the values that a batch norm meets, by channel, in float64."""

    def __init__(self, around: Array) -> None:
        """Begin.

        Args:
            around: (C,), taken off before values are squared, so that a mean far from 0 costs no digits.
        """
        self._around = torch.from_numpy(around.astype(np.float32))
        self._n = 0
        self._sums = torch.zeros(len(around), dtype=torch.float64)
        self._squares = torch.zeros(len(around), dtype=torch.float64)

    def add(self, value: Array) -> None:
        """Add a batch, (N, C, …)."""
        x = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))
        x = x - self._around.reshape(1, -1, *(1,) * (x.dim() - 2))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        self._n += x.numel() // max(1, len(self._around))
        self._sums += x.sum(axes, dtype=torch.float64)
        self._squares += x.square().sum(axes, dtype=torch.float64)

    def statistics(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Mean and unbiased variance, float64 (C,); None where there were fewer than two values.

        Args:
            name: of the norm, for people.

        Raises:
            UsageError: values were NaN or infinite.
        """
        if self._n < 2:
            return None
        mean = self._sums / self._n
        variance = (self._squares - self._n * mean.square()).clamp(min=0) / (self._n - 1)
        if not bool(torch.isfinite(variance).all() and torch.isfinite(mean).all()):
            raise UsageError(
                f"On the calibration data the inputs of the batch norm {name} are NaN or infinite.",
                do="Look at the weights of the layers before it, and at the data.",
            )
        return mean + self._around, variance
