"""What the sessions of all runtimes have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_export.errors import UsageError
from sparse_export.runtimes.outputs import output_batches
from sparse_export.runtimes.session import BaseSession
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.signature import Array, Feeds, Signature, TensorInfo, class_signature
from sparse_export.tasks.samples import SingleInput


class _Doubling(BaseSession):
    def __init__(self, most: int | None = None) -> None:
        super().__init__("doubling-cpu", class_signature((3,), 3, names=("x", "y")))
        self.n_freed, self._most = 0, most

    @property
    def max_batch(self) -> int | None:
        return self._most

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        return {"y": 2 * feeds["x"]}

    def _free(self) -> None:
        self.n_freed += 1


def test_memory_is_given_back_once_and_nothing_runs_afterwards() -> None:
    with _Doubling() as session:
        assert session.run(np.ones((2, 3), np.float32)).tolist() == [[2.0] * 3] * 2
    session.close()
    assert session.n_freed == 1
    with pytest.raises(UsageError, match="This session is closed"):
        session.run(np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    "x",
    [np.ones((2, 3)), np.ones((2, 4), np.float32), np.ones(3, np.float32), np.ones((2, 3, 1), np.float32)],
)
def test_a_batch_of_another_type_or_shape_is_not_run(x: np.ndarray) -> None:
    for given in (x, {"x": x}):
        with pytest.raises(UsageError, match=r"x float32 \(batch, 3\) was expected"):
            _Doubling().run(given)


def test_an_array_goes_for_the_one_input_and_a_mapping_gives_a_mapping() -> None:
    session, x = _Doubling(), np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], session.run(x))
    with pytest.raises(
        UsageError, match=r"x float32 .* is missing; the network has no input input\. x float32"
    ):
        session.run({"input": x})


@pytest.mark.parametrize(
    ("most", "beside", "sizes"),
    [(None, None, [8]), (3, None, [3, 3, 2]), (None, 5, [5, 3]), (3, 5, [3, 3, 2])],
)
def test_batches_are_those_that_this_session_takes_and_the_one_beside_it(
    most: int | None, beside: int | None, sizes: list[int]
) -> None:
    session = _Doubling(most)
    samples = SingleInput(name="x", inputs=np.arange(24, dtype=np.float32).reshape(8, 3))
    batches = list(output_batches(session, samples, beside=_Doubling(beside)))
    assert [len(feeds["x"]) for feeds, _ in batches] == sizes
    np.testing.assert_array_equal(np.concatenate([y["y"] for _, y in batches]), 2 * samples.inputs[:])


class _Tagger(torch.nn.Module):
    """Three numbers for each of the tokens but some."""

    def __init__(self, n_left_out: int) -> None:
        super().__init__()
        self.table, self.n_left_out = torch.nn.Embedding(9, 3), n_left_out

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.table(ids)[:, self.n_left_out :]
        return found


_TAGS = Signature(
    inputs=(TensorInfo(name="ids", dtype="int64", shape=("batch", "length"), low=0, high=8),),
    outputs=(TensorInfo(name="tags", dtype="float32", shape=("batch", "length", 3)),),
    batch="batch",
    sizes={"length": 21},
)


@pytest.mark.parametrize("length", [21, 9])
def test_outputs_are_as_long_as_the_inputs_and_not_as_the_example(length: int) -> None:
    ids = np.zeros((2, length), np.int64)
    with TorchSession(_Tagger(0), _TAGS) as session:
        assert session.run({"ids": ids})["tags"].shape == (2, length, 3)
    with (
        TorchSession(_Tagger(1), _TAGS) as session,
        pytest.raises(UsageError, match=rf"returns \(2, {length - 1}, 3\)"),
    ):
        session.run({"ids": ids})


class _Encoder(torch.nn.Module):
    """A stock encoder, which packs what its mask leaves, and so takes none that leaves nothing."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.table, self.encoder = torch.nn.Embedding(9, 8), torch.nn.TransformerEncoder(layer, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.encoder(self.table(ids), src_key_padding_mask=mask == 0)
        return found.sum(1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_network_is_tried_with_a_mask_that_leaves_something() -> None:
    inputs = tuple(
        TensorInfo(name=name, dtype="int64", shape=("batch", "length"), low=0, high=high)
        for name, high in (("ids", 8), ("mask", 1))
    )
    outputs = (TensorInfo(name="found", dtype="float32", shape=("batch", 8)),)
    signature = Signature(inputs=inputs, outputs=outputs, batch="batch", sizes={"length": 5})
    feeds = {"ids": np.ones((3, 7), np.int64), "mask": np.ones((3, 7), np.int64)}
    with TorchSession(_Encoder().eval(), signature) as session:
        assert session.run(feeds)["found"].shape == (3, 8)
