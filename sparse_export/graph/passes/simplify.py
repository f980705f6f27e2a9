"""An exported graph made small, while its parameters keep their names."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

from sparse_export.graph.layer_uses import LAYOUT

__all__ = ["remove_unused", "simplify", "transpose_weights"]

_ROUNDS = 2
# Operators that move or pick entries: a parameter stands under its own name before them, whatever its size.
_PICKING = LAYOUT | {"Concat", "Expand", "Gather", "Slice", "Split"}

# onnxscript's default rules, without those that fold batch norms: they do not keep names.
_RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


def simplify(model: ir.Model, parameters: Collection[str], *, whole: Collection[str]) -> None:
    """Fold constants and take out what has no effect, in place.

    Args:
        model: as exported.
        parameters: initializers that keep their names where entries are only moved or picked. One that is
            computed with may become part of a small constant.
        whole: those that nothing is folded into at all.
    """
    kept, untouched = set(parameters), set(whole)

    def should_fold(node: ir.Node) -> bool | None:
        read = {value.name for value in node.inputs if value is not None and value.is_initializer()}
        if read & untouched or (node.op_type in _PICKING and read & kept):
            return False
        return None  # by size

    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        rewriter.RewritePass(_RULES)(model)
        remove_unused(model)
    common.CommonSubexpressionEliminationPass()(model)


def remove_unused(model: ir.Model) -> None:
    """Remove nodes, initializers, functions and opsets that nothing uses, in place."""
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)


def transpose_weights(model: ir.Model, names: Collection[str]) -> set[str]:
    """Store matrices as MatMul multiplies by them, in place of a Transpose before it.

    Args:
        model: changed in place.
        names: of initializers.

    Returns:
        Those that are stored transposed now; each is used by MatMul and Gemm alone.
    """
    done = set()
    for name in names:
        weight = model.graph.initializers.get(name)
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        users = [(use.node, use.idx) for use in weight.uses()]
        turns = [node for node, _ in users if _is_turn(node)]
        products = [node for node, position in users if _is_gemm(node, position)]
        if not turns or len(turns) + len(products) < len(users) or weight.is_graph_output():
            continue
        for node in turns:
            node.outputs[0].replace_all_uses_with(weight)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        for node in products:
            node.attributes.add(ir.AttrInt64("transB", 1 - node.attributes.get_int("transB", 0)))
        weight.const_value = _turned(weight.const_value, name)
        weight.shape = weight.const_value.shape
        done.add(name)
    return done


def _turned(matrix: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """A matrix transposed when it is looked at, so that not all weights are there twice."""
    return ir.LazyTensor(
        lambda: ir.tensor(matrix.numpy().T.copy(), name=name),
        dtype=matrix.dtype,
        shape=ir.Shape(matrix.shape.numpy()[::-1]),
        name=name,
    )


def _is_turn(node: ir.Node) -> bool:
    """Is it the Transpose of a matrix that only products read?"""
    if node.op_type != "Transpose" or node.domain or node.attributes.get_ints("perm", (1, 0)) != (1, 0):
        return False
    output = node.outputs[0]
    users = [(use.node.op_type, use.node.domain) for use in output.uses()]
    return not output.is_graph_output() and all(user == ("MatMul", "") for user in users)


def _is_gemm(node: ir.Node, position: int) -> bool:
    return node.op_type == "Gemm" and not node.domain and position == 1
