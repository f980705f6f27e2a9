"""Random ONNX graphs of small sizes, with dead and constant channels, several inputs and several outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["RandomGraph", "random_feeds", "random_graph"]

Array = np.ndarray[Any, Any]
_SIDE = 4
_TOKENS = 6
_WORDS = 11


class RandomGraph:
    """A graph on its way: pictures (batch, C, 4, 4) and texts (batch, 6, C)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, Array] = {}
        self.pictures: list[tuple[str, int]] = [("x", 3)]
        self.texts: list[tuple[str, int]] = []
        self.uses_ids = False

    def node(self, op: str, inputs: list[str], n_outputs: int = 1, **attributes: Any) -> list[str]:
        at = len(self.nodes)
        outputs = [f"v{at}" if i == 0 else f"v{at}_{i}" for i in range(n_outputs)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{at}", **attributes))
        return outputs

    def one(self, op: str, inputs: list[str], **attributes: Any) -> str:
        return self.node(op, inputs, **attributes)[0]

    def stored(self, array: Array) -> str:
        name = f"w{len(self.arrays)}"
        self.arrays[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        return name

    def vector(self, *shape: int) -> str:
        return self.stored(self.rng.normal(1.0, 0.3, shape))

    def weight(self, *shape: int, out: int = 0) -> str:
        """Some outputs have no weights, and some inputs none: dead and constant channels."""
        w = self.rng.normal(0, 1 / np.sqrt(np.prod(shape) / shape[out]), shape)
        for axis in range(2):
            if self.rng.random() < 0.5:
                gone = self.rng.random(shape[axis]) < 0.3
                w[(slice(None),) * axis + (gone,)] = 0
        return self.stored(w)

    def width(self) -> int:
        return int(self.rng.choice([4, 8]))

    def pick(self, values: list[tuple[str, int]]) -> tuple[str, int]:
        return values[int(self.rng.integers(max(0, len(values) - 3), len(values)))]

    # pictures

    def conv(self, x: str, n: int) -> tuple[str, int]:
        m = self.width()
        k = int(self.rng.choice([1, 3]))
        inputs = [x, self.weight(m, n, k, k)] + ([self.vector(m)] if self.rng.random() < 0.7 else [])
        return self.one("Conv", inputs, pads=[k // 2] * 4), m

    def grouped(self, x: str, n: int) -> tuple[str, int]:
        groups = n if self.rng.random() < 0.6 or n % 2 else 2
        m = n * int(self.rng.choice([1, 2]))
        return self.one("Conv", [x, self.weight(m, n // groups, 1, 1), self.vector(m)], group=groups), m

    def transposed(self, x: str, n: int) -> tuple[str, int]:
        m = self.width()
        y = self.one("ConvTranspose", [x, self.weight(n, m, 1, 1, out=1), self.vector(m)])
        return y, m

    def batch_norm(self, x: str, n: int) -> tuple[str, int]:
        return self.one(
            "BatchNormalization",
            [x, *(self.vector(n) for _ in range(3)), self.stored(self.rng.uniform(0.5, 2, n))],
        ), n

    def activation(self, x: str, n: int) -> tuple[str, int]:
        op = str(self.rng.choice(["Relu", "Sigmoid", "HardSwish", "PRelu", "Clip"]))
        if op == "PRelu":
            return self.one(op, [x, self.vector(n, 1, 1)]), n
        if op == "Clip":
            return self.one(op, [x, self.stored(np.array(-0.7)), self.stored(np.array(1.5))]), n
        return self.one(op, [x]), n

    def pool(self, x: str, n: int) -> tuple[str, int]:
        op = str(self.rng.choice(["MaxPool", "AveragePool"]))
        return self.one(op, [x], kernel_shape=[3, 3], pads=[1] * 4), n

    def residual(self, x: str, n: int) -> tuple[str, int]:
        other = [name for name, width in self.pictures if width == n]
        return self.one(str(self.rng.choice(["Add", "Mul", "Max"])), [x, str(self.rng.choice(other))]), n

    def joined(self, x: str, n: int) -> tuple[str, int]:
        y, m = self.pick(self.pictures)
        return self.one("Concat", [x, y], axis=1), n + m

    def halves(self, x: str, n: int) -> tuple[str, int]:
        if n % 2:
            return x, n
        a, b = self.node("Split", [x, self.stored(np.array([n // 2, n // 2]))], 2, axis=1)
        if self.rng.random() < 0.5:
            return self.one("Mul", [a, self.one("Sigmoid", [b])]), n // 2
        return self.one("Concat", [b, a], axis=1), n

    def chosen(self, x: str, n: int) -> tuple[str, int]:
        index = self.rng.integers(0, n, self.width())
        return self.one("Gather", [x, self.stored(index)], axis=1), len(index)

    def part(self, x: str, n: int) -> tuple[str, int]:
        if n < 4:
            return x, n
        ends = [self.stored(np.array([value])) for value in (1, n - 1, 1)]
        return self.one("Slice", [x, *ends]), n - 2

    def shuffled(self, x: str, n: int) -> tuple[str, int]:
        if n % 2:
            return x, n
        y = self.one("Reshape", [x, self.stored(np.array([0, 2, n // 2, _SIDE, _SIDE]))])
        y = self.one("Transpose", [y], perm=[0, 2, 1, 3, 4])
        return self.one("Reshape", [y, self.stored(np.array([0, -1, _SIDE, _SIDE]))]), n

    def spread(self, x: str, n: int) -> tuple[str, int]:
        if n % 4:
            return x, n
        y = self.one("DepthToSpace", [x], blocksize=2)
        return self.one("SpaceToDepth", [y], blocksize=2), n

    def squeezed(self, x: str, n: int) -> tuple[str, int]:
        m = self.width()
        y = self.one("GlobalAveragePool", [x])
        y = self.one("Relu", [self.one("Conv", [y, self.weight(m, n, 1, 1)])])
        y = self.one("Sigmoid", [self.one("Conv", [y, self.weight(n, m, 1, 1), self.vector(n)])])
        return self.one("Mul", [x, y]), n

    def group_norm(self, x: str, n: int) -> tuple[str, int]:
        if n % 2:
            return x, n
        y = self.one("Reshape", [x, self.stored(np.array([0, 2, -1]))])
        y = self.one("InstanceNormalization", [y, self.stored(np.ones(2)), self.stored(np.zeros(2))])
        y = self.one("Reshape", [y, self.stored(np.array([0, n, _SIDE, _SIDE]))])
        return self.one("Add", [self.one("Mul", [y, self.vector(n, 1, 1)]), self.vector(n, 1, 1)]), n

    def mean_taken_off(self, x: str, n: int) -> tuple[str, int]:
        mean = self.one("ReduceMean", [x, self.stored(np.array([1]))])
        return self.one("Sub", [x, mean]), n

    def padded(self, x: str, n: int) -> tuple[str, int]:
        pads = np.zeros(8, np.int64)
        pads[1], pads[5] = int(self.rng.integers(0, 2)), 1
        return self.one("Pad", [x, self.stored(pads)]), n + int(pads[1] + pads[5])

    def unknown(self, x: str, n: int) -> tuple[str, int]:
        return self.one("LRN", [x], size=3), n

    # texts

    def as_text(self, x: str, n: int) -> tuple[str, int]:
        y = self.one("Reshape", [x, self.stored(np.array([0, n, -1]))])
        y = self.one("Transpose", [y], perm=[0, 2, 1])
        ends = [self.stored(np.array([value])) for value in (0, _TOKENS, 1)]
        return self.one("Slice", [y, *ends]), n

    def words(self) -> tuple[str, int]:
        self.uses_ids = True
        n = self.width()
        y = self.one("Gather", [self.stored(self.rng.normal(0, 1, (_WORDS, n))), "ids"])
        return self.one("Add", [y, self.stored(self.rng.normal(0, 1, (1, _TOKENS, n)))]), n

    def linear(self, x: str, n: int) -> tuple[str, int]:
        m = self.width()
        if self.rng.random() < 0.3:
            y = self.one("MatMul", [x, self.one("Transpose", [self.weight(m, n)], perm=[1, 0])])
        else:
            y = self.one("MatMul", [x, self.weight(n, m, out=1)])
        if self.rng.random() < 0.7:
            y = self.one("Add", [self.vector(m), y])
        return y, m

    def layer_norm(self, x: str, n: int) -> tuple[str, int]:
        if self.rng.random() < 0.5:
            return self.one("LayerNormalization", [x, self.vector(n), self.vector(n)], axis=-1), n
        last = self.stored(np.array([-1]))
        centred = self.one("Sub", [x, self.one("ReduceMean", [x, last])])
        square = self.one("ReduceMean", [self.one("Mul", [centred, centred]), last])
        scale = self.one("Sqrt", [self.one("Add", [square, self.stored(np.array(1e-2))])])
        scale = self.one("Mul", [self.one("Reciprocal", [scale]), self.vector(n)])
        return self.one("Mul", [centred, scale]), n

    def text_activation(self, x: str, n: int) -> tuple[str, int]:
        return self.one(str(self.rng.choice(["Relu", "Tanh", "Erf"])), [x]), n

    def text_residual(self, x: str, n: int) -> tuple[str, int]:
        other = [name for name, width in self.texts if width == n]
        return self.one("Add", [x, str(self.rng.choice(other))]), n

    def attention(self, x: str, n: int) -> tuple[str, int]:
        heads, size = 2, 4
        width = heads * size
        joint = self.rng.random() < 0.5
        if joint:
            whole = self.one("MatMul", [x, self.weight(n, 3 * width, out=1)])
            parts = self.node("Split", [whole, self.stored(np.array([width] * 3))], 3, axis=2)
        else:
            parts = [self.one("MatMul", [x, self.weight(n, width, out=1)]) for _ in range(3)]
        split = self.stored(np.array([0, _TOKENS, heads, size]))
        q, k, v = (
            self.one("Transpose", [self.one("Reshape", [one, split])], perm=perm)
            for one, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
        )
        shares = self.one("Softmax", [self.one("MatMul", [q, k])], axis=-1)
        y = self.one("Transpose", [self.one("MatMul", [shares, v])], perm=[0, 2, 1, 3])
        y = self.one("Reshape", [y, self.stored(np.array([0, 0, width]))])
        return self.one("MatMul", [y, self.weight(width, n, out=1)]), n

    def lstm(self, x: str, n: int) -> tuple[str, int]:
        h, dirs = 4, int(self.rng.choice([1, 2]))
        op, gates = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][int(self.rng.integers(0, 3))]
        y = self.one("Transpose", [x], perm=[1, 0, 2])
        inputs = [
            y,
            self.weight(dirs, gates * h, n),
            self.weight(dirs, gates * h, h),
            self.vector(dirs, 2 * gates * h),
        ]
        y = self.one(op, inputs, hidden_size=h, direction="forward" if dirs == 1 else "bidirectional")
        y = self.one("Transpose", [y], perm=[2, 0, 1, 3])
        return self.one("Reshape", [y, self.stored(np.array([0, _TOKENS, dirs * h]))]), dirs * h

    def padded_text(self, x: str, n: int) -> tuple[str, int]:
        """A token of zeros more, and one token fewer."""
        y = self.one("Pad", [x, self.stored(np.array([0, 1, 0, 0, 0, 0]))])
        ends = [self.stored(np.array([value])) for value in (0, _TOKENS, 1)]
        return self.one("Slice", [y, *ends]), n

    def text_softmax(self, x: str, n: int) -> tuple[str, int]:
        return self.one("Softmax", [x], axis=-1), n

    def mixed_tokens(self, x: str, n: int) -> tuple[str, int]:
        return self.one("MatMul", [self.weight(_TOKENS, _TOKENS), x]), n

    # the whole

    def built(self) -> onnx.ModelProto:
        of_picture: list[Callable[[str, int], tuple[str, int]]] = [
            *(self.conv, self.conv, self.conv, self.grouped, self.transposed, self.batch_norm),
            *(self.activation, self.pool, self.residual, self.residual, self.joined, self.halves),
            *(self.chosen, self.part, self.shuffled, self.spread, self.squeezed, self.group_norm),
            *(self.mean_taken_off, self.padded, self.unknown),
        ]
        of_text: list[Callable[[str, int], tuple[str, int]]] = [
            *(self.linear, self.linear, self.linear, self.layer_norm, self.text_activation),
            *(self.text_residual, self.attention, self.lstm, self.text_softmax, self.mixed_tokens),
            self.padded_text,
        ]
        self.pictures.append(self.conv("x", 3))
        for _ in range(int(self.rng.integers(1, 7))):
            rule = of_picture[int(self.rng.integers(len(of_picture)))]
            self.pictures.append(rule(*self.pick(self.pictures)))
        if self.rng.random() < 0.6:
            self.texts.append(
                self.words() if self.rng.random() < 0.5 else self.as_text(*self.pick(self.pictures))
            )
            for _ in range(int(self.rng.integers(1, 6))):
                rule = of_text[int(self.rng.integers(len(of_text)))]
                self.texts.append(rule(*self.pick(self.texts)))
        outputs = [self.one("Conv", [self.pictures[-1][0], self.weight(3, self.pictures[-1][1], 1, 1)])]
        if self.texts:
            outputs.append(self.one("MatMul", [self.texts[-1][0], self.weight(self.texts[-1][1], 3, out=1)]))
        if self.rng.random() < 0.2:
            outputs.append(self.one("Identity", [self.pick(self.pictures)[0]]))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, _SIDE, _SIDE])]
        if self.uses_ids:
            inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", _TOKENS]))
        graph = helper.make_graph(
            self.nodes,
            "random",
            inputs,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def random_graph(seed: int) -> onnx.ModelProto:
    """A graph that is drawn anew for each seed."""
    return RandomGraph(seed).built()


def random_feeds(model: onnx.ModelProto, n: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of n samples for a random graph."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {"x": rng.standard_normal((n, 3, _SIDE, _SIDE)).astype(np.float32)}
    if len(model.graph.input) > 1:
        feeds["ids"] = rng.integers(0, _WORDS, (n, _TOKENS))
    return feeds
