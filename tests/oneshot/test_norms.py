"""Batch norms that are re-estimated in the walk: what they get, and whether it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import nn

from sparse_export.errors import UsageError
from sparse_export.graph.example import example_of_shape
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import prepared, signature_of
from sparse_export.oneshot import sparsify
from sparse_export.oneshot.costs import LayerDone
from sparse_export.oneshot.graph_pruning import NOT_ASKED_FOR, PrunedGraph, sparsify_graph
from sparse_export.oneshot.norms import Norm, NormSums, norms_of
from sparse_export.oneshot.recovering import sparsify_recovering
from sparse_export.oneshot.recovery import Recovery, recovery_from_text
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.signature import Array, Feeds
from sparse_export.sparsity.pattern import NMPattern
from tests.oneshot.graphs import drawn, model_from, outputs_of
from tests.oneshot.norms import mobile, of_digits, vectors

TWO_FOUR = NMPattern(n=2, m=4)


def graph_of(network: nn.Module, shape: Sequence[int]) -> onnx.ModelProto:
    return prepared(onnx_from_module(network, example_of_shape(shape), masks={}, fold=False))


@pytest.fixture(scope="module")
def pictures() -> onnx.ModelProto:
    return graph_of(mobile(), (1, 8, 8))


@pytest.fixture(scope="module")
def of_vectors() -> onnx.ModelProto:
    return graph_of(vectors(), (32,))


def pictures_drawn(n: int, seed: int) -> Feeds:
    return {"input": np.random.default_rng(seed).random((n, 1, 8, 8)).astype(np.float32)}


def pruned(model: onnx.ModelProto, batches: Sequence[Feeds], **options: Any) -> PrunedGraph:
    given: dict[str, Any] = {"method": "reconstruction", "norms": True, "planned_dense": {}} | options
    return sparsify_graph(model, signature=signature_of(model), batches=batches, pattern=TWO_FOUR, **given)


def recovering(model: onnx.ModelProto, batches: Sequence[Feeds], **options: Any) -> PrunedGraph:
    given: dict[str, Any] = {"method": "magnitude", "norms": True, "planned_dense": {}, "recovery": None}
    given |= options
    return sparsify_recovering(
        model, signature=signature_of(model), batches=batches, pattern=TWO_FOUR, **given
    )


def stored(model: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name))


def met(model: onnx.ModelProto, norm: Norm, batches: Sequence[Feeds]) -> Array:
    """All that a norm gets, (C, values)."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    made.graph.output.add(name=norm.value)
    found = np.concatenate([outputs_of(made, feeds)[0] for feeds in batches])
    return np.moveaxis(found, 1, 0).reshape(found.shape[1], -1).astype(np.float64)


@pytest.mark.parametrize("method", ["magnitude", "reconstruction"])
@pytest.mark.parametrize("text", ["none", "auto"])
def test_each_norm_has_the_statistics_of_what_it_meets_in_the_pruned_network(
    pictures: onnx.ModelProto, method: str, text: str
) -> None:
    batches = [pictures_drawn(30, 1), pictures_drawn(20, 2)]
    done = pruned(pictures, batches, method=method, recovery=recovery_from_text(text), errors=text == "auto")
    norms = norms_of(done.model, wiring_of(done.model))
    assert len(norms) == 4
    assert set(done.norms) == {name for norm in norms for name in (norm.mean, norm.variance)}
    for norm in norms:
        values = met(done.model, norm, batches)
        np.testing.assert_allclose(stored(done.model, norm.mean), values.mean(1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            stored(done.model, norm.variance), values.var(1, ddof=1), rtol=1e-4, atol=1e-6
        )
    moved = [not np.allclose(stored(pictures, n.variance), stored(done.model, n.variance)) for n in norms]
    assert all(moved[1:])


def test_magnitude_measures_no_errors_for_it(pictures: onnx.ModelProto) -> None:
    done = pruned(pictures, [pictures_drawn(30, 1)], method="magnitude")
    sparse = [layer for layer in done.layers if layer.pattern]
    assert len(done.norms) == 8
    assert sparse
    assert all((layer.error, layer.reason) == (None, NOT_ASKED_FOR) for layer in sparse)
    plain = pruned(pictures, [pictures_drawn(30, 1)], method="magnitude", norms=False)
    assert all(np.array_equal(stored(done.model, n.name), stored(plain.model, n.name)) for n in sparse)
    assert not plain.norms


def test_they_are_kept_where_they_help(pictures: onnx.ModelProto) -> None:
    batches = [pictures_drawn(64, seed) for seed in range(3)]
    done = recovering(pictures, batches)
    assert done.settled is not None
    assert done.settled.kept
    assert done.settled.n_norms == 4
    assert done.settled.n_samples == 38
    assert done.settled.change_with < done.settled.change_without
    others = pictures_drawn(200, 9)
    dense, plain = outputs_of(pictures, others)[0], recovering(pictures, batches, norms=False).model
    changes = [np.square(outputs_of(one, others)[0] - dense).mean() for one in (plain, done.model)]
    assert changes[1] < 0.9 * changes[0]


def test_they_are_not_kept_where_they_harm(of_vectors: onnx.ModelProto) -> None:
    batches: list[Feeds] = [{"input": drawn(10, 32, seed=3)}]
    done = recovering(of_vectors, batches)
    assert done.settled is not None
    assert not done.settled.kept
    assert done.settled.n_norms == 4
    assert done.settled.change_with >= done.settled.change_without
    assert not done.norms
    rest: list[Feeds] = [{"input": batches[0]["input"][:8]}]
    assert done.model == pruned(of_vectors, rest, method="magnitude", norms=False).model
    others: Feeds = {"input": drawn(500, 32, seed=8)}
    dense, harmed = outputs_of(of_vectors, others)[0], pruned(of_vectors, rest, method="magnitude").model
    changes = [np.square(outputs_of(one, others)[0] - dense).mean() for one in (done.model, harmed)]
    assert changes[0] < 0.9 * changes[1]


def test_they_stand_beside_a_recovery_that_was_kept(pictures: onnx.ModelProto) -> None:
    batches = [pictures_drawn(64, seed) for seed in range(3)]
    done = recovering(pictures, batches, method="reconstruction", recovery=recovery_from_text("auto"))
    assert done.recovery is not None
    assert done.settled is not None
    before = done.recovery.change_with if done.recovery.kept else done.recovery.change_without
    assert done.settled.change_without == pytest.approx(before, rel=1e-3)


FOLDED = """(float[N,16] x) => (float[N,16] y) {
    a = Gemm(x, w0, b0) r = Relu(a) b = Gemm(r, w1, b1) s = Relu(b) y = MatMul(s, w2)
}"""


def test_without_norms_bias_and_scale_are_corrected() -> None:
    weights = {f"w{i}": drawn(16, 16, seed=i) for i in range(3)} | {f"b{i}": drawn(16) for i in range(2)}
    model = prepared(model_from(FOLDED, **weights))
    done = recovering(model, [{"x": drawn(200, 16, seed=5)}])
    assert done.settled is None
    assert done.recovery is not None
    assert done.recovery.steps == ("bias", "variance")
    asked = recovering(model, [{"x": drawn(200, 16, seed=5)}], recovery=Recovery(bias=True))
    assert asked.recovery is not None
    assert asked.recovery.steps == ("bias",)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("n_before", [1, 2])
def test_a_killed_walk_goes_on_to_the_same_bits(
    pictures: onnx.ModelProto, n_before: int, tmp_path: Path
) -> None:
    batches = [pictures_drawn(20, 1), pictures_drawn(20, 2)]
    whole = pruned(pictures, batches)

    def kill(done: LayerDone) -> None:
        if done.number == n_before:
            raise KilledError

    with pytest.raises(KilledError):
        pruned(pictures, batches, state=tmp_path, observer=kill)
    again = pruned(pictures, batches, state=tmp_path)
    assert again.n_resumed == n_before
    assert again.model == whole.model
    assert pruned(pictures, batches, state=tmp_path).model == whole.model
    assert pruned(pictures, batches, state=tmp_path, norms=False).n_resumed == 0


def test_a_norm_that_is_shared_or_trains_is_left() -> None:
    text = """(float[N,4,3] x) => (float[N,4,3] y) {
        a = BatchNormalization(x, s, b, m, v)
        c = BatchNormalization(a, s, b, m, own)
        y = BatchNormalization(c, s, b, m2, v2)
    }"""
    vectors_of = {name: np.ones(4, np.float32) for name in ("s", "b", "m", "v", "own", "m2", "v2")}
    model = prepared(model_from(text, **vectors_of))
    assert [norm.mean for norm in norms_of(model, wiring_of(model))] == ["m2"]


def test_sums_lose_no_digits_far_from_zero_and_name_what_is_not_finite() -> None:
    x = (1000 + np.random.default_rng(0).standard_normal((4000, 3))).astype(np.float32)
    sums = NormSums(np.full(3, 1000, np.float32))
    assert sums.statistics("norm") is None
    for part in np.split(x, 4):
        sums.add(part)
    found = sums.statistics("norm")
    assert found is not None
    np.testing.assert_allclose(found[0].numpy(), x.mean(0, dtype=np.float64), rtol=1e-9)
    np.testing.assert_allclose(found[1].numpy(), x.astype(np.float64).var(0, ddof=1), rtol=1e-6)
    sums.add(np.full((2, 3), np.nan, np.float32))
    with pytest.raises(UsageError, match=r"batch norm stem\.mean are NaN"):
        sums.statistics("stem.mean")


def test_too_few_samples_are_told() -> None:
    with pytest.raises(UsageError, match="4 samples are too few for --norms"):
        recovering(graph_of(vectors(), (32,)), [{"input": drawn(4, 32)}])


@pytest.mark.parametrize("method", ["magnitude", "reconstruction"])
@pytest.mark.parametrize("factory", ["mobile", "of_digits"])
def test_a_torch_network_gets_them_back_where_they_help(factory: str, method: str, tmp_path: Path) -> None:
    """The statistics of one come from other pictures than it is calibrated on, and it loses by new ones."""
    done = sparsify(
        f"tests.oneshot.norms:{factory}",
        tmp_path / "run",
        data="digits",
        method=method,
        norms=True,
        calibration_samples=256,
        device="cpu",
    )
    result = done.report.norms
    assert result is not None
    assert result.n_norms == 4
    assert result.kept == (factory == "of_digits")
    assert done.report.n_norms == (4 if result.kept else 0)
    assert ("were kept" if result.kept else "were not kept") in str(done.report)
    dense = (of_digits() if result.kept else mobile()).state_dict()
    sparse = load_file(done.run.path / "model.safetensors")
    for name in dense:
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(dense[name], sparse[name]) != result.kept


@pytest.mark.parametrize(("name", "kept"), [("pictures", True), ("of_vectors", False)])
def test_norms_of_an_onnx_file_are_re_estimated_too(
    name: str, kept: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: onnx.ModelProto = request.getfixturevalue(name)
    onnx.save(model, tmp_path / "m.onnx")
    inputs = pictures_drawn(80, 1)["input"] if kept else drawn(12, 32, seed=3)
    np.savez(tmp_path / "in.npz", input=inputs)
    done = sparsify(
        str(tmp_path / "m.onnx"),
        tmp_path / "run",
        weights=None,
        inputs=tmp_path / "in.npz",
        method="magnitude",
        norms=True,
    )
    result = done.report.norms
    assert result is not None
    assert (result.n_norms, result.kept) == (4, kept)
    assert done.report.n_norms == (4 if kept else 0)
    made = onnx.load(done.run.graph_path)
    names = [norm.variance for norm in norms_of(made, wiring_of(made))]
    assert len(names) == 4
    assert any(not np.array_equal(stored(made, one), stored(model, one)) for one in names) == kept
