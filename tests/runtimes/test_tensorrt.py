"""A session of an engine, on a card that is none: what the library may do, which profile, and which stream
waits.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparse_export.engines import tensorrt_import
from sparse_export.engines.tensorrt_import import Gpu
from sparse_export.errors import ArtefactError, NotTrustedError, UsageError
from sparse_export.formats.bundle import Bundle
from sparse_export.runtimes.tensorrt import open_engine
from sparse_export.signature import Array, Signature, TensorInfo
from tests.card import Card, Profiles, Stream, batches, pretend_torch_cuda, vectors
from tests.engines.making import VERSION, bundle_with_engine

CURRENT = 3
SIXTEEN = vectors(16)
ONE = batches((1, 8, 32))
X = {"input": np.zeros((1, 16), dtype=np.float32)}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card(capability=(9, 0), profiles=batches((1, 8, 32)), signature=SIXTEEN)
    module = card.tensorrt()
    monkeypatch.setattr(tensorrt_import, "library", lambda target: module)
    monkeypatch.setattr(tensorrt_import, "version", lambda target: module.__version__)
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: Gpu(name="a card", architecture="sm90"))
    return card


@pytest.fixture
def streams(card: Card, monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    return pretend_torch_cuda(monkeypatch, Stream(CURRENT), card)


def _bundle(folder: Path, *, known: bool = True, profiles: Profiles = ONE, **changes: Any) -> Bundle:
    return bundle_with_engine(
        folder,
        b"an engine of nobody's",
        known=known,
        target="tensorrt",
        version="11.1.0",
        architecture="sm90",
        architectures=(),
        profiles=tuple(profiles),
        **{"signature": SIXTEEN, **changes},
    )


@pytest.mark.parametrize("version_compatible", [False, True])
def test_only_a_version_compatible_engine_may_run_code_that_it_brings_along(
    version_compatible: bool, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, version_compatible=version_compatible)
    open_engine(bundle, bundle.info.engines[0]).close()
    assert card.host_code_allowed == [version_compatible]


def test_no_code_is_allowed_before_the_engine_is_trusted(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, known=False, version_compatible=True, onnx_sha256="f" * 64)
    with pytest.raises(NotTrustedError):
        open_engine(bundle, bundle.info.engines[0])
    assert card.host_code_allowed == []


def test_an_engine_that_the_library_refuses_ends_with_6(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    card.loads = False
    bundle = _bundle(tmp_path)
    with pytest.raises(ArtefactError, match="cannot load"):
        open_engine(bundle, bundle.info.engines[0])


def test_each_batch_runs_in_the_profile_that_is_tuned_nearest_to_it(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    card.profiles = batches((1, 1, 4), (2, 8, 16), (16, 32, 32))
    bundle = _bundle(tmp_path, profiles=card.profiles)
    with open_engine(bundle, bundle.info.engines[0]) as session:
        assert session.max_batch == 32
        for n in (1, 5, 20, 2):
            x = torch.randn(n, 16)
            assert torch.equal(session.run_torch({"input": x})["logits"], 2 * x)
        with pytest.raises(
            UsageError, match=r"batch 33 fits no profile.*batch 1 to 4; batch 2 to 16; batch 16 to 32"
        ):
            session.run_torch({"input": torch.randn(33, 16)})
    assert card.executed == [(1, 0), (5, 1), (20, 2), (2, 0)]


def test_outputs_that_were_appended_behind_the_network_are_written_and_not_given(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    best = TensorInfo(name="class", dtype="int64", shape=("batch",))
    bundle = _bundle(tmp_path, signature=replace(SIXTEEN, appended=(best,)))
    card.signature = bundle.info.signature.whole
    card.function = lambda feeds: {"logits": 2 * feeds["input"], "class": feeds["input"].argmax(1)}
    x = np.random.default_rng(0).standard_normal((3, 16), dtype=np.float32)
    with open_engine(bundle, bundle.info.engines[0]) as session:
        found = session.run({"input": x})
    assert found.keys() == {"logits"}
    np.testing.assert_array_equal(found["logits"], 2 * x)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_run_waits_for_the_stream_that_its_input_comes_from(
    cuda_graphs: bool, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path)
    with open_engine(bundle, bundle.info.engines[0], cuda_graphs=cuda_graphs) as session:
        session.run_torch({"input": torch.randn(2, 16)})
        (own,) = streams
        own.done.clear()
        session.run_torch({"input": torch.randn(2, 16)})
    assert own.done == [f"wait for {CURRENT}", "synchronize"]


def test_a_recorded_graph_reads_each_new_input_and_gives_a_result_of_its_own(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path)
    with open_engine(bundle, bundle.info.engines[0], cuda_graphs=True) as session:
        inputs = [torch.randn(n, 16) for n in (2, 2, 3, 2)]
        outputs = [session.run_torch({"input": x})["logits"] for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        assert torch.equal(y, 2 * x)
    assert [n for n, _ in card.executed] == [
        2,
        2,
        2,
        2,
        2,
        3,
        3,
        3,
        3,
        2,
    ]  # twice before, recorded, then replayed


def test_tensorrt_for_rtx_captures_graphs_by_itself(
    card: Card, streams: list[Stream], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_import, "gpu", lambda: Gpu(name="a card", architecture="sm89"))
    monkeypatch.setattr(tensorrt_import, "version", lambda target: VERSION)
    for cuda_graphs in (False, True):
        bundle = bundle_with_engine(tmp_path, signature=SIXTEEN)
        with open_engine(bundle, bundle.info.engines[0], cuda_graphs=cuda_graphs) as session:
            x = torch.randn(2, 16)
            assert torch.equal(session.run_torch({"input": x})["logits"], 2 * x)
    assert card.strategies == ["WHOLE_GRAPH_CAPTURE"]
    assert len(card.executed) == 2


def test_no_layer_is_profiled_of_a_session_that_replays(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path)
    with (
        open_engine(bundle, bundle.info.engines[0], cuda_graphs=True) as session,
        pytest.raises(UsageError, match="replays CUDA graphs"),
    ):
        session.profiled_pass(X)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_launcher_launches_on_the_stream_that_is_current_and_waits_for_nothing(
    cuda_graphs: bool, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path)
    with open_engine(bundle, bundle.info.engines[0], cuda_graphs=cuda_graphs) as session:
        launch = session.launcher({"input": np.zeros((4, 16), dtype=np.float32)})
        (own,) = streams
        own.done.clear()
        card.executed.clear()
        card.streams.clear()
        launch()
        launch()
        assert card.executed == [(4, 0)] * 2
        assert cuda_graphs or card.streams == [CURRENT] * 2  # a replay goes where torch puts it
        assert own.done == []
        with pytest.raises(UsageError, match="shape"):
            session.launcher({"input": np.zeros((4, 15), dtype=np.float32)})


def test_a_closed_session_is_told_to_be_one(card: Card, streams: list[Stream], tmp_path: Path) -> None:
    bundle = _bundle(tmp_path)
    session = open_engine(bundle, bundle.info.engines[0])
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run(np.zeros((1, 16), dtype=np.float32))


def test_numpy_goes_in_and_comes_out(card: Card, streams: list[Stream], tmp_path: Path) -> None:
    bundle = _bundle(tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 16), dtype=np.float32)
    with open_engine(bundle, bundle.info.engines[0]) as session:
        np.testing.assert_array_equal(session.run(x), 2 * x)
        with pytest.raises(UsageError, match="float64"):
            session.run(x.astype(np.float64))


SEVERAL = Signature(
    inputs=(
        TensorInfo(name="ids", dtype="int64", shape=("batch", "sequence")),
        TensorInfo(name="kept", dtype="bool", shape=("batch", "sequence")),
        TensorInfo(name="state", dtype="bfloat16", shape=(2, "batch")),
        TensorInfo(name="scale", dtype="float32", shape=()),
    ),
    outputs=(
        TensorInfo(name="sums", dtype="int64", shape=("batch",)),
        TensorInfo(name="next_state", dtype="bfloat16", shape=(2, "batch")),
        TensorInfo(name="scaled", dtype="float32", shape=("batch", "sequence")),
    ),
)
ROOMY = ({"batch": (1, 1, 8), "sequence": (1, 64, 512)}, {"batch": (1, 8, 8), "sequence": (1, 8, 16)})


def _several(feeds: dict[str, Array]) -> dict[str, Array]:
    return {
        "sums": (feeds["ids"] * feeds["kept"]).sum(1),
        "next_state": feeds["state"] + feeds["state"].dtype.type(1),
        "scaled": feeds["ids"] * feeds["scale"],
    }


def _feeds(batch: int, sequence: int) -> dict[str, Array]:
    feeds = replace(SEVERAL, inputs=tuple(replace(one, low=0, high=9) for one in SEVERAL.inputs)).draw(
        batch, 0, {"sequence": sequence}
    )
    return feeds | {"scale": np.array(0.5, np.float32)}


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tensors_of_any_type_go_in_and_out_by_name_at_every_size(
    cuda_graphs: bool, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    card.signature, card.function, card.profiles = SEVERAL, _several, ROOMY
    bundle = _bundle(tmp_path, signature=SEVERAL, profiles=ROOMY)
    with open_engine(bundle, bundle.info.engines[0], cuda_graphs=cuda_graphs) as session:
        assert session.max_batch == 8
        for sizes in ((1, 100), (8, 9), (2, 16), (1, 100)):
            feeds = _feeds(*sizes)
            found, wanted = session.run(feeds), _several(feeds)
            assert found.keys() == wanted.keys()
            for name, one in wanted.items():
                assert found[name].dtype == one.dtype or name == "scaled"
                np.testing.assert_array_equal(found[name], one.astype(found[name].dtype))
        with pytest.raises(UsageError, match=r"batch 8, sequence 600 fits no profile.*sequence 1 to 512;"):
            session.run(_feeds(8, 600))
    profiles = [profile for _, profile in card.executed]
    assert profiles[0] == profiles[-1] == 0
    assert 1 in profiles


def test_an_output_whose_length_depends_on_the_values_is_refused(
    card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    found = TensorInfo(name="found", dtype="int64", shape=("n_found", 2))
    card.signature = replace(SIXTEEN, outputs=(found,))
    bundle = _bundle(tmp_path, signature=card.signature)
    with (
        open_engine(bundle, bundle.info.engines[0]) as session,
        pytest.raises(UsageError, match="How long found is depends on the values"),
    ):
        session.run(X)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"signature": vectors(15), "profiles": ({"batch": (1, 1, 1), "n": (1, 1, 1)},)}, "bounds batch, n"),
        (
            {"signature": replace(SIXTEEN, inputs=SEVERAL.inputs[:1]), "profiles": ROOMY},
            "has the inputs input",
        ),
        ({"signature": replace(SIXTEEN, outputs=SEVERAL.outputs[:1])}, "outputs logits float32.*sums int64"),
    ],
)
def test_an_engine_of_other_inputs_and_outputs_than_its_bundles_is_refused(
    changes: dict[str, Any], said: str, card: Card, streams: list[Stream], tmp_path: Path
) -> None:
    bundle = _bundle(tmp_path, **changes)
    with pytest.raises(ArtefactError, match=said):
        open_engine(bundle, bundle.info.engines[0])
