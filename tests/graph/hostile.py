"""ONNX files that are small or plain, and ask whoever opens them for much time or memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Made = Callable[[], onnx.ModelProto | bytes]

F = TensorProto.FLOAT
I64 = TensorProto.INT64
HUGE = 10**12


def model(
    nodes: Sequence[onnx.NodeProto],
    stored: Iterable[onnx.TensorProto] = (),
    *,
    inputs: Iterable[tuple[str, int, Sequence[int | str] | None]] = (("x", F, ("n", 8)),),
    outputs: Iterable[tuple[str, int, Sequence[int | str] | None]] = (("y", F, None),),
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "hostile",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info(*one) for one in outputs],
        list(stored),
    )
    opsets = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return helper.make_tensor(name, I64, [len(values)], values)


def scalar(name: str, value: float, kind: int = I64) -> onnx.TensorProto:
    return helper.make_tensor(name, kind, [], [value])


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype=np.float32), name)


def declared(name: str, *shape: int, kind: int = F) -> onnx.TensorProto:
    """A stored tensor that says a size and has no data."""
    return TensorProto(name=name, data_type=kind, dims=shape)


def _last(names: Sequence[str]) -> onnx.NodeProto:
    return node("MatMul", ["x", names[-1]], ["y"])


def range_of(limit: int) -> onnx.ModelProto:
    nodes = [
        node("Range", ["start", "limit", "delta"], ["many"]),
        node("Cast", ["many"], ["floats"], to=F),
        node("Reshape", ["floats", "shape"], ["w"]),
        _last(["w"]),
    ]
    stored = [scalar("start", 0), scalar("limit", limit), scalar("delta", 1), ints("shape", 8, -1)]
    return model(nodes, stored)


def range_as_shape() -> onnx.ModelProto:
    """A shape is computed from a Range, which inference with data propagation works out."""
    nodes = [
        node("Range", ["start", "limit", "delta"], ["many"]),
        node("ReduceSum", ["many"], ["sum"]),
        node("Expand", ["x", "sum"], ["y"]),
    ]
    return model(nodes, [scalar("start", 0), scalar("limit", HUGE), scalar("delta", 1)])


def range_of_small_steps() -> onnx.ModelProto:
    nodes = [node("Range", ["start", "limit", "delta"], ["many"]), node("Add", ["x", "many"], ["y"])]
    stored = [scalar("start", 0, F), scalar("limit", 1e30, F), scalar("delta", 1e-30, F)]
    return model(nodes, stored)


def filled(*shape: int) -> onnx.ModelProto:
    return model([node("ConstantOfShape", ["shape"], ["w"]), _last(["w"])], [ints("shape", *shape)])


def expanded(*shape: int) -> onnx.ModelProto:
    return model(
        [node("Expand", ["one", "shape"], ["w"]), _last(["w"])], [weight("one", 1), ints("shape", *shape)]
    )


def tiled(repeats: int) -> onnx.ModelProto:
    return model(
        [node("Tile", ["w0", "repeats"], ["w"]), _last(["w"])],
        [weight("w0", 8, 8), ints("repeats", 1, repeats)],
    )


def doubled(op: str, times: int) -> onnx.ModelProto:
    """A weight that doubles in size again and again."""
    nodes = []
    for i in range(times):
        inputs = [f"w{i}", f"w{i}"] if op == "Concat" else [f"w{i}", "twice"]
        attributes = {"axis": 1} if op == "Concat" else {}
        nodes.append(node(op, inputs, [f"w{i + 1}"], **attributes))
    return model([*nodes, _last([f"w{times}"])], [weight("w0", 8, 8), ints("twice", 1, 2)])


def outer(times: int) -> onnx.ModelProto:
    """Products of a column and a row, each a weight of its own."""
    nodes, stored = [], []
    for i in range(times):
        stored += [weight(f"column{i}", 8, 1), weight(f"row{i}", 1, 2**16)]
        nodes += [
            node("Mul", [f"column{i}", f"row{i}"], [f"w{i}"]),
            node("MatMul", ["x", f"w{i}"], [f"y{i}"]),
        ]
    return model(nodes, stored, outputs=[(f"y{i}", F, None) for i in range(times)])


def many_expanded(times: int, *shape: int) -> onnx.ModelProto:
    """Large weights, each computed from a number of its own."""
    nodes, stored = [], [ints("shape", *shape)]
    for i in range(times):
        stored.append(weight(f"one{i}", 1))
        nodes += [node("Expand", [f"one{i}", "shape"], [f"w{i}"]), node("MatMul", ["x", f"w{i}"], [f"y{i}"])]
    return model(nodes, stored, outputs=[(f"y{i}", F, None) for i in range(times)])


def shared(times: int, rows: int = 8, *, through: str = "") -> onnx.ModelProto:
    """Layers one after the other that share a weight."""
    before = [node(through, ["w0"], ["w"])] if through else []
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    nodes = [node("MatMul", [names[i], "w"], [names[i + 1]]) for i in range(times)]
    stored = weight("w0" if through else "w", rows, rows)
    return model([*before, *nodes], [stored], inputs=[("x", F, ("n", rows))])


def shared_by_turns(times: int, rows: int = 64) -> onnx.ModelProto:
    """As `shared`, but that each layer turns the weight by a node of its own."""
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    nodes = []
    for i in range(times):
        nodes += [node("Transpose", ["w"], [f"w{i}"]), node("MatMul", [names[i], f"w{i}"], [names[i + 1]])]
    return model(nodes, [weight("w", rows, rows)], inputs=[("x", F, ("n", rows))])


def shared_way(times: int, length: int) -> onnx.ModelProto:
    """Layers whose weights come out of one long row of nodes, each of another of them."""
    row = [node("Neg", [f"w{i}"], [f"w{i + 1}"]) for i in range(length)]
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    layers = [node("MatMul", [names[i], f"w{1 + i % length}"], [names[i + 1]]) for i in range(times)]
    return model([*row, *layers], [weight("w0", 8, 8)])


def chain(times: int, op: str = "Relu", name: str | None = None) -> onnx.ModelProto:
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    return model([node(op, [names[i]], [names[i + 1]], name=name) for i in range(times)])


def backwards(times: int) -> onnx.ModelProto:
    made = chain(times)
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def named_with_underscores(times: int) -> onnx.ModelProto:
    """Every name that could be free is taken."""
    names = ["x", *("v" + "_" * i for i in range(times - 1)), "y"]
    return model([node("Relu", [names[i]], [names[i + 1]], name="v") for i in range(times)])


def same_names_with_numbers(times: int) -> onnx.ModelProto:
    made = chain(times, name="a")
    for i, one in enumerate(made.graph.node):
        one.name = f"a#{i}" if i % 2 else "a"
    return made


def wide(times: int) -> onnx.ModelProto:
    """One node with many inputs."""
    return model([node("Concat", ["x"] * times, ["y"], axis=0)])


def many_inputs(times: int) -> onnx.ModelProto:
    inputs = [(f"x{i}", F, (f"n{i}", f"m{i}")) for i in range(times)]
    return model([node("Concat", [one[0] for one in inputs], ["y"], axis=0)], inputs=inputs)


def many_outputs(times: int) -> onnx.ModelProto:
    nodes = [node("Relu", ["x"], [f"y{i}"]) for i in range(times)]
    return model(nodes, outputs=[(f"y{i}", F, (f"a{i}", f"b{i}")) for i in range(times)])


def many_axes(rank: int) -> onnx.ModelProto:
    return model([node("Relu", ["x"], ["y"])], inputs=[("x", F, [f"n{i}" for i in range(rank)])])


def many_tensors(times: int) -> onnx.ModelProto:
    stored = [scalar(f"c{i}", 1.0, F) for i in range(times)]
    return model([node("Add", ["x", "c0"], ["y"])], stored)


def many_constants(times: int) -> onnx.ModelProto:
    nodes = [node("Constant", [], [f"c{i}"], value_float=1.0) for i in range(times)]
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    nodes += [node("Add", [names[i], f"c{i}"], [names[i + 1]]) for i in range(times)]
    return model(nodes)


def many_attributes(times: int) -> onnx.ModelProto:
    return model([node("Split", ["x"], ["y"], axis=0, **{f"a{i}": i for i in range(times)})])


def long_attribute(times: int) -> onnx.ModelProto:
    return model([node("Constant", [], ["y"], value_ints=[0] * times)], outputs=[("y", I64, None)])


def nested_ifs(depth: int) -> onnx.ModelProto:
    def below(left: int) -> onnx.GraphProto:
        body = [node("Relu", ["x"], [f"r{left}"])] if left == 0 else [_if(f"r{left}", below(left - 1))]
        return helper.make_graph(body, f"g{left}", [], [helper.make_tensor_value_info(f"r{left}", F, None)])

    def _if(output: str, graph: onnx.GraphProto) -> onnx.NodeProto:
        return node("If", ["flag"], [output], then_branch=graph, else_branch=graph)

    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    return model([_if("y", below(depth))], [flag])


def nested_alone(depth: int) -> onnx.ModelProto:
    """Loops within loops, one a level."""
    graph = None
    for left in range(depth):
        body = [node("Identity", ["c"], [f"k{left}"])]
        if graph is None:
            body.append(node("Relu", ["x"], [f"r{left}"]))
        else:
            body.append(node("Loop", ["times", "flag"], [f"r{left}"], body=graph))
        graph = helper.make_graph(
            body,
            f"g{left}",
            [helper.make_tensor_value_info("i", I64, []), helper.make_tensor_value_info("c", 9, [])],
            [
                helper.make_tensor_value_info(f"k{left}", 9, []),
                helper.make_tensor_value_info(f"r{left}", F, None),
            ],
        )
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    return model([node("Loop", ["times", "flag"], ["y"], body=graph)], [flag, scalar("times", HUGE)])


def many_branches(times: int) -> onnx.ModelProto:
    nodes = []
    names = ["x", *(f"v{i}" for i in range(times - 1)), "y"]
    for i in range(times):
        graphs = []
        for side in ("t", "e"):
            inner = [node("MatMul", [names[i], "w"], [f"{side}{i}"])]
            out = helper.make_tensor_value_info(f"{side}{i}", F, None)
            graphs.append(helper.make_graph(inner, f"{side}{i}", [], [out]))
        nodes.append(node("If", ["flag"], [names[i + 1]], then_branch=graphs[0], else_branch=graphs[1]))
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    return model(nodes, [flag, weight("w", 8, 8)])


def functions(depth: int, calls: int = 2) -> onnx.ModelProto:
    """Functions that call the next one, so that there are calls ** depth nodes."""
    made = []
    for left in range(depth):
        op = ("Relu", "") if left == depth - 1 else (f"f{left + 1}", "own")
        names = ["a", *(f"v{i}" for i in range(calls - 1)), "b"]
        body = [helper.make_node(op[0], [names[i]], [names[i + 1]], domain=op[1]) for i in range(calls)]
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
        made.append(helper.make_function("own", f"f{left}", ["a"], ["b"], body, opsets))
    call = helper.make_node("f0", ["x"], ["y"], domain="own")
    return model([call], functions=made, domains=["own"])


def circle_of_functions() -> onnx.ModelProto:
    made = functions(2)
    made.functions[1].node[0].op_type, made.functions[1].node[0].domain = "f0", "own"
    return made


def circle() -> onnx.ModelProto:
    return model([node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])])


def circle_of_constants(length: int) -> onnx.ModelProto:
    names = [f"w{i}" for i in range(length)]
    nodes = [node("Neg", [names[i - 1]], [names[i]]) for i in range(length)]
    return model([*nodes, _last(names)])


def convolution(**attributes: Any) -> onnx.ModelProto:
    return model(
        [node("Conv", ["x", "w"], ["y"], **attributes)],
        [weight("w", 8, 8, 3, 3)],
        inputs=[("x", F, ("n", 8, 32, 32))],
    )


def padded(by: int, mode: str = "constant") -> onnx.ModelProto:
    return model(
        [node("Pad", ["w0", "pads"], ["w"], mode=mode), _last(["w"])],
        [weight("w0", 8, 8), ints("pads", 0, 0, 0, by)],
    )


def one_hot(depth: int) -> onnx.ModelProto:
    nodes = [node("OneHot", ["at", "depth", "values"], ["w"], axis=0), _last(["w"])]
    stored = [ints("at", *range(8)), scalar("depth", depth), helper.make_tensor("values", F, [2], [0, 1])]
    return model(nodes, stored)


def resized(size: int) -> onnx.ModelProto:
    return model(
        [node("Resize", ["x", "", "", "sizes"], ["y"])],
        [ints("sizes", 1, 8, size, size)],
        inputs=[("x", F, (1, 8, 8, 8))],
    )


def reshaped(*shape: int) -> onnx.ModelProto:
    return model([node("Reshape", ["x", "shape"], ["y"])], [ints("shape", *shape)])


def einsum(equation: str) -> onnx.ModelProto:
    return model([node("Einsum", ["x"] * (equation.count(",") + 1), ["y"], equation=equation)])


def sparse(size: int) -> onnx.ModelProto:
    made = model([_last(["w"])])
    values = helper.make_tensor("w", F, [1], [1.0])
    at = helper.make_tensor("at", I64, [1], [0])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [8, size]))
    return made


def loop(times: int) -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", ["c"], ["k"]), node("Concat", ["a", "a"], ["b"], axis=0)],
        "body",
        [
            helper.make_tensor_value_info("i", I64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("a", F, None),
        ],
        [
            helper.make_tensor_value_info("k", TensorProto.BOOL, []),
            helper.make_tensor_value_info("b", F, None),
        ],
    )
    flag = helper.make_tensor("flag", TensorProto.BOOL, [], [True])
    return model([node("Loop", ["times", "flag", "x"], ["y"], body=body)], [scalar("times", times), flag])


def packed(*shape: int) -> onnx.ModelProto:
    unpack = helper.make_node("Unpack24", ["values", "places"], ["w"], domain="sparse24")
    stored = [declared("values", *shape), declared("places", *shape, kind=TensorProto.UINT8)]
    return model([unpack, _last(["w"])], stored, domains=["sparse24"])


def growing_shape(times: int) -> onnx.ModelProto:
    """Shapes that are made of shapes, each twice as long."""
    nodes = [node("Shape", ["x"], ["s0"])]
    nodes += [node("Concat", [f"s{i}", f"s{i}"], [f"s{i + 1}"], axis=0) for i in range(times)]
    nodes.append(node("Expand", ["x", f"s{times}"], ["y"]))
    return model(nodes)


def growing_numbers(times: int) -> onnx.ModelProto:
    """A size that is multiplied by itself."""
    nodes = [node("Shape", ["x"], ["s0"])]
    nodes += [node("Mul", [f"s{i}", f"s{i}"], [f"s{i + 1}"]) for i in range(times)]
    nodes.append(node("Expand", ["x", f"s{times}"], ["y"]))
    return model(nodes)


def nested_types(depth: int) -> onnx.ModelProto:
    made = model([node("Identity", ["x"], ["y"])])
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = F
    for _ in range(depth):
        outer_kind = onnx.TypeProto()
        outer_kind.sequence_type.elem_type.CopyFrom(kind)
        kind = outer_kind
    made.graph.input[0].type.CopyFrom(kind)
    return made


def long_names(length: int) -> onnx.ModelProto:
    made = chain(8)
    for one in made.graph.node:
        one.name = "n" * length
        one.op_type = "O" * length
    return made


def split(times: int) -> onnx.ModelProto:
    names = [f"p{i}" for i in range(times)]
    return model(
        [node("Split", ["x"], names, axis=1, num_outputs=times), node("Concat", names, ["y"], axis=1)]
    )


def reduced_far(times: int) -> onnx.ModelProto:
    """Constants through a row of broadcasts that give 2^24 values each."""
    nodes = [node("Expand", ["one", "shape"], ["w0"])]
    nodes += [node("Add", [f"w{i}", "one"], [f"w{i + 1}"]) for i in range(times)]
    return model([*nodes, _last([f"w{times}"])], [weight("one", 1), ints("shape", 8, 2**21)])


HOSTILE: dict[str, Made] = {
    "range of 10^12 as a weight": lambda: range_of(HUGE),
    "range of 10^8 as a weight": lambda: range_of(10**8),
    "range of 2^62": lambda: range_of(2**62),
    "range whose sum is a shape": range_as_shape,
    "range of small steps": range_of_small_steps,
    "filled 10^12": lambda: filled(8, HUGE),
    "filled 2^31": lambda: filled(8, 2**28),
    "filled 2^27": lambda: filled(8, 2**24),
    "filled with a negative size": lambda: filled(8, -5),
    "filled with sizes whose product is 0 modulo 2^64": lambda: filled(2**32, 2**32),
    "expanded 10^12": lambda: expanded(8, HUGE),
    "expanded 2^27": lambda: expanded(8, 2**24),
    "expanded over 64 axes": lambda: expanded(*([2] * 64)),
    "tiled 10^10": lambda: tiled(10**10),
    "tiled 2^22": lambda: tiled(2**22),
    "tiled a negative number of times": lambda: tiled(-1),
    "doubled 60 times": lambda: doubled("Concat", 60),
    "doubled 20 times": lambda: doubled("Concat", 20),
    "doubled 200 times by Tile": lambda: doubled("Tile", 200),
    "doubled 20 times by Tile": lambda: doubled("Tile", 20),
    "a column times a row, thrice": lambda: outer(3),
    "1,000 weights of 2^20 values": lambda: many_expanded(1000, 8, 2**17),
    "100 weights of 2^24 values": lambda: many_expanded(100, 8, 2**21),
    "10,000 weights of 2^12 values": lambda: many_expanded(6000, 8, 2**9),
    "20 weights of 2^27 values": lambda: many_expanded(20, 8, 2**24),
    "16,000 layers share a weight": lambda: shared(16_000),
    "16,000 layers share a weight behind a node": lambda: shared(16_000, through="Neg"),
    "10,000 layers share a weight of 2^16 values": lambda: shared(10_000, 256),
    "10,000 layers share a turned weight of 2^16 values": lambda: shared(10_000, 256, through="Transpose"),
    "6,000 layers turn a shared weight themselves": lambda: shared_by_turns(6_000, 64),
    "5,000 layers along a row of 200 nodes": lambda: shared_way(5_000, 200),
    "5,000 layers along a row of 5,000 nodes": lambda: shared_way(5_000, 5_000),
    "20,000 nodes": lambda: chain(20_000),
    "20,000 nodes of one name": lambda: chain(20_000, name="same"),
    "10,000 nodes backwards": lambda: backwards(10_000),
    "1,000 names that differ in underscores": lambda: named_with_underscores(1_000),
    "10,000 names that look numbered": lambda: same_names_with_numbers(10_000),
    "a node of 300,000 inputs": lambda: wide(300_000),
    "8,000 inputs with 16,000 free sizes": lambda: many_inputs(8_000),
    "8,000 outputs with 16,000 free sizes": lambda: many_outputs(8_000),
    "an input of 50,000 axes": lambda: many_axes(50_000),
    "30,000 stored tensors": lambda: many_tensors(30_000),
    "8,000 constants": lambda: many_constants(8_000),
    "30,000 attributes": lambda: many_attributes(30_000),
    "an attribute of 10^6 numbers": lambda: long_attribute(10**6),
    "branches 12 deep, both taken": lambda: nested_ifs(12),
    "loops 20 deep": lambda: nested_alone(20),
    "loops 30 deep": lambda: nested_alone(30),
    "50,000 small nodes": lambda: chain(42_000),
    "30,000 layers share a weight": lambda: shared(30_000),
    "4,000 branches": lambda: many_branches(4_000),
    "functions that double 60 times": lambda: functions(60),
    "functions that double 16 times": lambda: functions(16),
    "functions with 100,000 nodes": lambda: functions(5, 10),
    "functions 99 deep": lambda: functions(99, 1),
    "functions in a circle": circle_of_functions,
    "a circle": circle,
    "a circle of 1,000 constants": lambda: circle_of_constants(1_000),
    "pads of 2^60": lambda: convolution(pads=[2**60] * 4),
    "dilations of 2^60": lambda: convolution(dilations=[2**60, 2**60]),
    "strides of 0": lambda: convolution(strides=[0, 0]),
    "no groups": lambda: convolution(group=0),
    "negative groups": lambda: convolution(group=-(2**60)),
    "padded by 10^12": lambda: padded(HUGE),
    "padded by 2^24": lambda: padded(2**24),
    "padded by reflection": lambda: padded(2**40, "reflect"),
    "padded by a negative number": lambda: padded(-(2**40)),
    "one-hot of depth 10^12": lambda: one_hot(HUGE),
    "one-hot of depth 2^27": lambda: one_hot(2**27),
    "resized to 2^40 pixels": lambda: resized(2**20),
    "resized to 2^60 pixels": lambda: resized(2**30),
    "reshaped to a product of 0 modulo 2^64": lambda: reshaped(2**32, 2**32),
    "reshaped with a negative size": lambda: reshaped(-7, 8),
    "reshaped to 1,000 axes": lambda: reshaped(*([1] * 1000)),
    "reshaped to 500 axes of 2": lambda: reshaped(*([2] * 500)),
    "an einsum of 26 letters": lambda: einsum("ab,bc,cd,de,ef,fg,gh,hi,ij,jk->ak"),
    "an einsum that makes 2^60 values": lambda: einsum("ab,cd,ef,gh,ij->abcdefghij"),
    "an einsum of 100,000 commas": lambda: einsum("," * 100_000),
    "a sparse tensor of 10^12 values": lambda: sparse(HUGE),
    "a sparse tensor of 2^27 values": lambda: sparse(2**24),
    "a loop of 10^12 rounds that double": lambda: loop(HUGE),
    "a loop of 40 rounds that double": lambda: loop(40),
    "packed weights without data": lambda: packed(8, 2**40),
    "packed weights of negative sizes": lambda: packed(-8, 8),
    "a shape of 2^21 sizes": lambda: growing_shape(20),
    "a shape of 2^61 sizes": lambda: growing_shape(60),
    "sizes squared 100 times": lambda: growing_numbers(100),
    "types 50 deep": lambda: nested_types(50),
    "names of 30,000 letters": lambda: long_names(30_000),
    "a split into 20,000": lambda: split(20_000),
    "200 sums of 2^24 values": lambda: reduced_far(200),
    "a tensor of 10^12 values without data": lambda: model([_last(["w"])], [declared("w", 8, HUGE)]),
    "a tensor of negative sizes": lambda: model([_last(["w"])], [declared("w", 8, -1)]),
    "a tensor of sizes whose product is 0 modulo 2^64": lambda: model(
        [_last(["w"])], [declared("w", 2**32, 2**32)]
    ),
    "an int4 tensor of 10^12 values": lambda: model(
        [_last(["w"])], [declared("w", 8, HUGE, kind=TensorProto.INT4)]
    ),
    "a tensor of 2^31 text values": lambda: model(
        [_last(["w"])], [declared("w", 2**31, kind=TensorProto.STRING)]
    ),
    "a tensor of 1,000 axes": lambda: model([_last(["w"])], [declared("w", *([1] * 1000))]),
    "zeros only": lambda: bytes(10**6),
    "ones only": lambda: b"\xff" * 10**6,
    "a length of 2^60": lambda: b"\x3a" + b"\xff\xff\xff\xff\xff\xff\xff\xff\x0f" + bytes(100),
    "groups 100,000 deep": lambda: b"\x3b" * 100_000,
    "empty": lambda: b"",
    "messages 5,000 deep": lambda: _deep(5_000),
}


def _deep(depth: int) -> bytes:
    """Graphs within attributes within nodes within graphs, as raw protobuf."""
    inside = b""
    for _ in range(depth):
        for field in (6, 5, 1):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            inside = bytes([field << 3 | 2]) + _varint(len(inside)) + inside
    return b"\x08\x0a\x3a" + _varint(len(inside)) + inside


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def written(made: onnx.ModelProto | bytes) -> bytes:
    return made if isinstance(made, bytes) else made.SerializeToString()
