"""What weights of a graph are multiplied by, against onnxruntime's own arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from sparse_export.graph.layer_uses import LayerUse, layer_uses
from sparse_export.oneshot import unfolding
from sparse_export.oneshot.graph_statistics import factor_of, inputs_of
from sparse_export.oneshot.unfolding import InputStatistics, InputSums
from sparse_export.oneshot.weight_form import WeightForm, form_of
from sparse_export.oneshot.weights import columns_from_weight
from sparse_export.signature import Array
from tests.oneshot.graphs import drawn, model_from, outputs_of

CONV = "(float[N,8,{}] x) => (float[N,M,{}] y) {{ y = Conv <{}> (x, w) }}"
ONE, TWO, THREE = ("A", "B"), ("A,B", "C,D"), ("A,B,C", "D,E,F")
CASES = {
    "conv 1d": (CONV.format(*ONE, "strides=[2], pads=[1,2]"), (6, 8, 3), (3, 8, 9)),
    "conv 2d": (
        CONV.format(*TWO, "strides=[2,1], dilations=[1,2], pads=[0,1,2,3]"),
        (6, 8, 3, 2),
        (3, 8, 9, 7),
    ),
    "conv 3d": (CONV.format(*THREE, "group=1"), (6, 8, 1, 3, 2), (2, 8, 4, 5, 6)),
    "grouped": (CONV.format(*TWO, "group=2"), (6, 4, 3, 3), (2, 8, 6, 5)),
    "upper": (CONV.format(*TWO, 'auto_pad="SAME_UPPER", strides=[2,2]'), (6, 8, 3, 2), (2, 8, 6, 5)),
    "lower": (CONV.format(*TWO, 'auto_pad="SAME_LOWER", strides=[2,1]'), (6, 8, 2, 4), (2, 8, 6, 5)),
    "valid": (CONV.format(*TWO, 'auto_pad="VALID"'), (6, 8, 3, 3), (2, 8, 6, 5)),
    # The places of these do not overlap, so that the sizes of outputs are those of the products.
    "transposed": (
        "(float[N,8,A,B] x) => (float[N,6,C,D] y) { y = ConvTranspose <strides=[3,2]> (x, w) }",
        (8, 6, 3, 2),
        (2, 8, 4, 5),
    ),
    "transposed, grouped": (
        "(float[N,8,A] x) => (float[N,6,B] y) { y = ConvTranspose <group=2, strides=[2]> (x, w) }",
        (8, 3, 2),
        (2, 8, 5),
    ),
    "right": ("(float[N,T,8] x) => (float[N,T,6] y) { y = MatMul(x, w) }", (8, 6), (3, 5, 8)),
    "left": ("(float[N,8,T] x) => (float[N,6,T] y) { y = MatMul(w, x) }", (6, 8), (3, 8, 5)),
    "a vector": ("(float[8] x) => (float[6] y) { y = MatMul(x, w) }", (8, 6), (8,)),
    "left of a vector": ("(float[8] x) => (float[6] y) { y = MatMul(w, x) }", (6, 8), (8,)),
    "a stack": ("(float[N,3,T,8] x) => (float[N,3,T,6] y) { y = MatMul(x, w) }", (3, 8, 6), (2, 3, 5, 8)),
    "a stack for one": ("(float[T,8] x) => (float[3,T,6] y) { y = MatMul(x, w) }", (3, 8, 6), (5, 8)),
    "a stack of one": (
        "(float[N,2,T,8] x) => (float[N,2,T,6] y) { y = MatMul(x, w) }",
        (1, 8, 6),
        (3, 2, 5, 8),
    ),
    "a stack of stacks": (
        "(float[N,2,T,8] x) => (float[3,2,T,6] y) { y = MatMul(x, w) }",
        (3, 1, 8, 6),
        (1, 2, 5, 8),
    ),
    "a stack on the left": (
        "(float[N,8,T] x) => (float[N,6,T] y) { y = MatMul(w, x) }",
        (2, 6, 8),
        (2, 8, 5),
    ),
    "gemm": ("(float[N,8] x) => (float[N,6] y) { y = Gemm <alpha=0.5> (x, w) }", (8, 6), (5, 8)),
    "gemm, w turned": ("(float[N,8] x) => (float[N,6] y) { y = Gemm <transB=1> (x, w) }", (6, 8), (5, 8)),
    "gemm, x turned": ("(float[8,N] x) => (float[N,6] y) { y = Gemm <transA=1> (x, w) }", (8, 6), (8, 5)),
    "gemm, w first": ("(float[8,N] x) => (float[6,N] y) { y = Gemm (w, x) }", (6, 8), (8, 5)),
    "gemm, both turned": (
        "(float[N,8] x) => (float[6,N] y) { y = Gemm <transA=1, transB=1> (w, x) }",
        (8, 6),
        (5, 8),
    ),
    "through a transpose": (
        "(float[N,8] x) => (float[N,6] y) { t = Transpose(w) y = MatMul(x, t) }",
        (6, 8),
        (5, 8),
    ),
}


def the_use(model: onnx.ModelProto) -> LayerUse:
    (use,) = layer_uses(model)
    assert isinstance(use, LayerUse)
    return use


def the_form(use: LayerUse) -> WeightForm:
    form = form_of(use)
    assert not isinstance(form, str)
    return form


def summed(use: LayerUse, x: Array) -> InputStatistics:
    sums = InputSums(gram=True)
    for part in inputs_of(factor_of(use), x):
        sums.add(part)
    found = sums.statistics()
    assert found is not None
    return found


@pytest.mark.parametrize("chunk", [1, 1 << 25])
@pytest.mark.parametrize("case", CASES)
def test_the_gram_matrix_tells_the_size_of_the_outputs(
    case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights, other inputs or columns in another order than the weight's would not."""
    monkeypatch.setattr(unfolding, "_CHUNK", chunk)
    text, shape, of_x = CASES[case]
    model, x = model_from(text, w=drawn(*shape)), drawn(*of_x, seed=1)
    use = the_use(model)
    form, found = the_form(use), summed(use, x)
    weight = columns_from_weight(form.weight_of(torch.from_numpy(drawn(*shape)))).double()
    assert found.gram is not None
    assert found.gram.shape == (form.n_groups, form.n_columns, form.n_columns)
    blocks = weight.reshape(form.n_groups, -1, form.n_columns)
    (y,) = outputs_of(model, {"x": x})
    assert float(((blocks @ found.gram) * blocks).sum()) == pytest.approx(
        np.square(y, dtype=float).sum(), rel=1e-5
    )
    assert torch.allclose(found.gram.diagonal(dim1=1, dim2=2), found.squares, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_weight_comes_back_from_its_form_as_it_was_stored(case: str) -> None:
    text, shape, _ = CASES[case]
    stored = torch.from_numpy(drawn(*shape))
    form = the_form(the_use(model_from(text, w=stored.numpy())))
    there = form.weight_of(stored)
    assert (there.shape, form.stored) == (form.shape, stored.shape)
    assert torch.equal(form.stored_of(there.clone()), stored)


def test_half_precision_and_arrays_that_may_not_be_written_are_read() -> None:
    use = the_use(model_from(CASES["right"][0], w=drawn(8, 6)))
    x = drawn(3, 5, 8).astype(np.float16)
    x.flags.writeable = False
    assert torch.allclose(summed(use, x).squares, summed(use, x.astype(np.float32)).squares)
    brain = torch.from_numpy(x.astype(np.float32)).bfloat16()
    as_numpy = brain.view(torch.int16).numpy().view("V2")
    import ml_dtypes

    found = summed(use, as_numpy.view(ml_dtypes.bfloat16))
    assert torch.allclose(found.squares, summed(use, brain.float().numpy()).squares)
