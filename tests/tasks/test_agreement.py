"""Without labels the outputs of the dense network are what a sparse one is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_export.errors import GateFailed, UsageError
from sparse_export.evaluate.validate import validate
from sparse_export.evaluate.validation import check_gates
from sparse_export.signature import Array, Feeds, Signature, TensorInfo
from sparse_export.tasks.agreement import (
    Agreement,
    agreement_of,
    agreement_text,
    lost_channels_text,
    output_text,
)
from tests.tagging import TABLE, tagger_bundle


def _output(name: str, *shape: int | str, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def _agreement(
    pairs: Sequence[tuple[Feeds, Feeds]], *ends: TensorInfo, batch: str | None = "batch"
) -> Agreement:
    return agreement_of(pairs, Signature(inputs=(), outputs=ends, batch=batch), inputs="4 samples of x.npz")


def test_equal_outputs_agree_wholly() -> None:
    generator = np.random.default_rng(0)
    given: dict[str, Array] = {
        "y": generator.standard_normal((4, 3), dtype=np.float32),
        "tags": generator.integers(0, 9, (4, 5)),
        "nothing": np.zeros((4, 2), np.float32),
    }
    ends = (
        _output("y", "batch", 3),
        _output("tags", "batch", 5, dtype="int64"),
        _output("nothing", "batch", 2),
    )
    found = _agreement([(given, given)], *ends)
    assert (found.percent, found.low, found.high) == pytest.approx((100.0, 100.0, 100.0))
    assert [one.relative_distance for one in found.outputs] == [0.0, None, 0.0]
    assert [one.equal_share for one in found.outputs] == [None, 1.0, None]
    assert found.n_samples == 4
    assert found.left_out == {}


def test_of_floats_the_cosine_of_each_sample_counts() -> None:
    dense = {"y": np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])}
    sparse = {"y": np.array([[2.0, 0.0], [4.0, 3.0], [0.0, 5.0], [0.0, -2.0]])}
    found = _agreement([(dense, sparse)], _output("y", "batch", 2))
    cosines = [1.0, 24 / 25, 0.0, -1.0]
    assert found.percent == pytest.approx(100 * sum(cosines) / 4)
    (y,) = found.outputs
    assert y.cosine == pytest.approx(sum(cosines) / 4)
    distance = np.sqrt((1 + 2 + 26 + 16) / (1 + 25 + 1 + 4))
    assert y.relative_distance == pytest.approx(distance)
    half = 3.182446 * np.std(cosines, ddof=1) / 2  # Student's t, 95 %, 3 degrees of freedom
    assert found.low == pytest.approx(100 * (0.24 - half), rel=1e-5)
    assert found.high == 100.0
    assert output_text(y) == f"relative distance {distance:.4g}, cosine 0.24000"
    assert agreement_text(found).startswith("24.00 % [")
    assert agreement_text(found).endswith("100.00], 95 % interval, on 4 samples of x.npz")


def test_of_one_value_a_sample_the_distance_counts_for_its_cosine_would_be_its_sign() -> None:
    """In parts of the root of the dense network's mean square, over all batches."""
    pairs: list[tuple[Feeds, Feeds]] = [
        ({"y": np.array([[3.0], [0.0]])}, {"y": np.array([[2.5], [0.0]])}),
        ({"y": np.array([[4.0]])}, {"y": np.array([[20.0]])}),
    ]
    found = _agreement(pairs, _output("y", "batch", 1))
    scale = np.sqrt(25 / 3)
    assert found.percent == pytest.approx(100 * ((1 - 0.5 / scale) + 1 + 0) / 3)
    (y,) = found.outputs
    assert y.cosine is None
    assert y.relative_distance == pytest.approx(np.sqrt((0.25 + 256) / 25))
    assert output_text(y) == f"relative distance {y.relative_distance:.4g}"
    nothing: Feeds = {"y": np.zeros((2, 1))}
    assert _agreement([(nothing, nothing)], _output("y", "batch", 1)).percent == 100.0
    assert _agreement([(nothing, {"y": np.ones((2, 1))})], _output("y", "batch", 1)).percent == 0.0


def test_of_integers_and_truth_values_the_share_that_is_equal_counts() -> None:
    dense = {"tags": np.array([[1, 2], [3, 4]]), "kept": np.array([True, True])}
    sparse = {"tags": np.array([[1, 2], [3, 5]]), "kept": np.array([True, False])}
    found = _agreement(
        [(dense, sparse)],
        _output("tags", "batch", 2, dtype="int64"),
        _output("kept", "batch", dtype="bool"),
    )
    assert [one.equal_share for one in found.outputs] == [0.75, 0.5]
    assert [one.cosine for one in found.outputs] == [None, None]
    assert found.percent == pytest.approx(100 * (1.0 + 0.25) / 2)  # of the samples: both whole; a half, none
    assert output_text(found.outputs[0]) == "75.00 % equal"


def test_lost_channels_of_small_values_are_told_though_the_agreement_hides_them() -> None:
    generator = np.random.default_rng(2)
    boxes = 100 + 50 * generator.standard_normal((4, 4, 30))
    scores = generator.random((4, 18, 30))
    dense = np.concatenate([boxes, scores], axis=1)
    sparse = np.concatenate([boxes, np.full_like(scores, 0.5)], axis=1)
    sparse[:, 4] = dense[:, 4] + 0.1 * generator.standard_normal((4, 30))  # keeps most of its variance
    output = _output("y", "batch", 22, 30)
    found = _agreement([({"y": dense[:2]}, {"y": sparse[:2]}), ({"y": dense[2:]}, {"y": sparse[2:]})], output)
    assert found.percent > 99.9
    assert (found.outputs[0].n_channels, found.outputs[0].n_channels_lost) == (22, 17)
    assert "17 of 22 channels of y keep less than half of their variance" in lost_channels_text(found)
    same = _agreement([({"y": dense}, {"y": dense})], output)
    assert (same.outputs[0].n_channels, same.outputs[0].n_channels_lost) == (22, 0)
    assert lost_channels_text(same) == lost_channels_text(None) == ""


def test_channels_that_do_not_vary_and_outputs_without_a_fixed_axis_are_not_counted() -> None:
    dense = np.tile([[1.0, 0.0]], (6, 1)) + np.array([[0, 1]]) * np.arange(6)[:, None]
    found = _agreement([({"y": dense}, {"y": dense + 10})], _output("y", "batch", 2))
    assert (found.outputs[0].n_channels, found.outputs[0].n_channels_lost) == (1, 1)
    found = _agreement([({"y": dense}, {"y": dense + 10})], _output("y", "batch", "tokens"))
    assert found.outputs[0].n_channels is None


def test_batches_and_other_axes_of_the_samples_change_nothing() -> None:
    generator = np.random.default_rng(1)
    dense, sparse = (generator.standard_normal((5, 3)) for _ in range(2))
    whole = _agreement([({"y": dense}, {"y": sparse})], _output("y", "batch", 3))
    parts = [({"y": dense[part].T}, {"y": sparse[part].T}) for part in (slice(0, 2), slice(2, 5))]
    turned = _agreement(parts, _output("y", 3, "batch"))
    assert turned.percent == pytest.approx(whole.percent)
    assert turned.outputs[0].relative_distance == pytest.approx(whole.outputs[0].relative_distance)
    assert turned.n_samples == 5


def test_without_a_batch_axis_each_call_is_one_sample() -> None:
    calls: Any = [({"y": np.array([1.0, 0.0])}, {"y": np.array([float(n), 1.0])}) for n in (0, 1)]
    found = _agreement(calls, _output("y", 2), batch=None)
    assert found.n_samples == 2
    assert found.percent == pytest.approx(50 / np.sqrt(2))
    one = _agreement(calls[1:], _output("y", 2), batch=None)
    assert one.low == one.percent == one.high == pytest.approx(100 / np.sqrt(2))


def test_an_output_whose_size_depends_on_the_data_is_left_out_with_the_reason() -> None:
    first = {"y": np.ones((1, 2)), "boxes": np.ones((3, 4))}
    second = {"y": np.ones((1, 2)), "boxes": np.ones((2, 4))}
    ends = (_output("y", "batch", 2), _output("boxes", "n_boxes", 4))
    found = _agreement([(first, first), (first, second), (first, first)], *ends)
    assert [one.name for one in found.outputs] == ["y"]
    assert found.left_out == {"boxes": "its size depends on what the network finds"}
    assert found.percent == pytest.approx(100.0)
    with pytest.raises(UsageError, match=r"No output .* can be compared: boxes: its size depends"):
        _agreement([(first, second)], ends[1])


def test_no_samples_are_no_agreement() -> None:
    with pytest.raises(UsageError, match="there are no samples"):
        _agreement([], _output("y", "batch", 2))


# ---- of bundles


def test_the_agreement_with_dense_is_the_gate_where_there_are_no_labels(tmp_path: Path) -> None:
    dense = tagger_bundle(tmp_path / "dense")
    table = TABLE.copy()
    table[:, 0] = 0  # pruned
    sparse = tagger_bundle(tmp_path / "sparse", table=table)
    found = validate(sparse, against=dense.path, max_drop=1.0)
    assert found.agreement is not None
    assert found.against is None
    scores, tags = found.agreement.outputs
    assert scores.cosine is not None
    assert tags.equal_share is not None
    assert 0.5 < scores.cosine < 0.95
    assert 0.2 < tags.equal_share < 0.9
    assert found.agreement.percent == pytest.approx(50 * (scores.cosine + tags.equal_share))
    lost = 100 - found.agreement.percent
    with pytest.raises(
        GateFailed, match=f"agreement is {lost:.2f} points below the dense bundle's own, more"
    ):
        check_gates(found)
    text = str(found)
    assert f"agreement with dense {found.agreement.percent:.2f} % [" in " ".join(text.split())
    assert "on the 8 samples of the golden pair" in text
    assert "at most 1 points may be lost" in text


def test_a_bundle_agrees_with_itself_on_given_inputs(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "dense")
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "inputs.npz",
        ids=generator.integers(0, 5, (20, 4)),
        mask=generator.random((20, 4), dtype=np.float32),
    )
    found = validate(bundle, against=bundle.path, inputs=tmp_path / "inputs.npz", max_drop=0.0)
    check_gates(found)
    assert found.agreement is not None
    assert found.agreement.inputs == "20 samples of inputs.npz"
    assert found.agreement.percent == pytest.approx(100.0)
    assert found.agreement.n_samples == 20


def test_inputs_that_nothing_would_be_compared_on_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    monkeypatch.setattr(
        "sparse_export.evaluate.validate.require_probed", lambda *_, **__: pytest.fail("the file was run")
    )
    with pytest.raises(UsageError, match=r"no dense bundle .* Give --against DENSE"):
        validate(bundle, inputs=tmp_path / "inputs.npz")
    with pytest.raises(UsageError, match=r"names no data set.*Give --against DENSE"):
        validate(bundle, max_drop=1.0)


def test_a_dense_bundle_of_another_signature_is_refused(tmp_path: Path) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    other = tagger_bundle(
        tmp_path / "other",
        signature=Signature(
            inputs=bundle.info.signature.inputs,
            outputs=bundle.info.signature.outputs[:1],
            sizes={"sequence": 6},
        ),
    )
    with pytest.raises(UsageError, match=r"other has the signature .*ids int64 .* was expected"):
        validate(bundle, against=other.path)
