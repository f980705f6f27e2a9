"""What networks are timed on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparse_export.errors import UsageError
from sparse_export.evaluate.sessions import timed_inputs
from sparse_export.formats.bundle import Bundle
from sparse_export.signature import Signature, TensorInfo
from tests.engines.making import bundle_info
from tests.tagging import SIGNATURE, tagger_bundle


def _of(signature: Signature) -> Bundle:
    return Bundle(path=Path("b"), info=bundle_info(signature=signature))


def test_floats_are_normal_and_integers_within_their_range() -> None:
    found = timed_inputs(_of(SIGNATURE), 32, seed=3)
    assert {name: one.shape for name, one in found.items()} == {"ids": (32, 6), "mask": (32, 6)}
    assert set(found["ids"].ravel().tolist()) == {0, 1, 2, 3, 4}
    assert abs(float(found["mask"].std()) - 1) < 0.2
    again, other = (timed_inputs(_of(SIGNATURE), 32, seed=seed) for seed in (3, 4))
    for name in found:
        np.testing.assert_array_equal(again[name], found[name])
        assert not np.array_equal(other[name], found[name])


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_where_the_range_of_an_integer_is_not_known_the_golden_inputs_are_repeated(
    batch: int, tmp_path: Path
) -> None:
    bundle = tagger_bundle(tmp_path / "b")
    ids, mask = SIGNATURE.inputs
    unknown = replace(SIGNATURE, inputs=(replace(ids, high=None), mask))
    bundle = replace(bundle, info=replace(bundle.info, signature=unknown))
    found = timed_inputs(bundle, batch, seed=3)
    for name, file in bundle.info.golden.inputs.items():
        golden = np.load(bundle.path / file)
        np.testing.assert_array_equal(found[name], golden[np.arange(batch) % 8])


def test_without_a_batch_axis_one_sample_is_timed_and_no_more() -> None:
    fixed = Signature(inputs=(TensorInfo(name="x", dtype="float32", shape=(1, 3)),), outputs=(), batch=None)
    assert timed_inputs(_of(fixed), 1, seed=0)["x"].shape == (1, 3)
    with pytest.raises(UsageError, match="takes one sample a call, and batch 8 was asked for"):
        timed_inputs(_of(fixed), 8, seed=0)


def test_samples_along_another_axis_are_counted_there() -> None:
    state = Signature(inputs=(TensorInfo(name="state", dtype="float32", shape=(2, "batch", 4)),), outputs=())
    assert timed_inputs(_of(state), 5, seed=0)["state"].shape == (2, 5, 4)
