"""Networks that nobody here wrote go through every link."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from benchmarks.networks import Result
from sparse_export.engines.options import engine_options
from sparse_export.errors import SparseExportError
from sparse_export.evaluate.gate import check_gate, gate
from sparse_export.formats.bundle import open_bundle
from tests.networks.conftest import Open


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known of a network.

    Attributes:
        n_layers: that have weights.
        n_two_four: of them that get 2:4 by default.
        least: percent of agreement with the dense network, at least.
        method: that is tried; reconstruction of large layers takes minutes.
        n: samples that it is calibrated on, and as many that agreement is measured on.
    """

    n_layers: int
    n_two_four: int
    least: float
    method: str = "magnitude"
    n: int = 10


ON_REQUEST = pytest.mark.skipif(
    "SPARSE_EXPORT_NETWORKS" not in os.environ,
    reason="downloads 145 MB and takes long: set SPARSE_EXPORT_NETWORKS=1, or run `make networks`",
)

NETWORKS = {
    "magika": Expected(n_layers=3, n_two_four=1, least=80),
    "minilm": Expected(n_layers=18, n_two_four=18, least=75),
    "nudenet": Expected(n_layers=64, n_two_four=51, least=50, n=5),
    "open-nsfw": Expected(n_layers=54, n_two_four=43, least=50, n=5),
    "ocr-det": Expected(n_layers=85, n_two_four=51, least=20, n=5),
    "ocr-rec": Expected(n_layers=66, n_two_four=45, least=20, n=5),
    "silero-16k": Expected(n_layers=8, n_two_four=3, least=80, method="reconstruction"),
}
WITH_BRANCHES = {
    "silero-flat": Expected(n_layers=16, n_two_four=10, least=40),
    "silero-branches": Expected(n_layers=16, n_two_four=6, least=40),
}


def through_every_link(opened: Open, name: str, expected: Expected) -> Result:
    """Sparsify, build dense and packed and in float16, inspect, validate, gate and package; the figures."""
    work = opened(name, n=expected.n)
    work.sparsify(expected.method)
    work.build(f"{expected.method}-dense", "dense")
    work.build(expected.method, "packed", onnx="packed")
    if name != "silero-16k":  # which has a choice, though not between layers
        work.build(expected.method, "half", precision="fp16")
    work.look()
    work.validate("packed")
    check_gate(gate(work.folder / "packed", work.folder / "dense", inputs=work.held, max_drop=100))
    work.package()
    assert (work.folder / "package" / "model_repository").is_dir()
    result = work.result
    assert (result.n_layers, result.n_two_four) == (expected.n_layers, expected.n_two_four)
    assert result.dense_bytes is not None
    assert result.packed_bytes is not None
    assert result.packed_bytes < result.dense_bytes
    assert result.difference["packed"] <= 1e-5
    assert result.agreement["packed"][0] >= expected.least
    promised = open_bundle(work.folder / "packed").info.layers
    assert sum(layer.pattern == "2:4" for layer in promised) == expected.n_two_four
    return result


def test_a_network_with_weights_in_constants_goes_through_every_link(opened: Open) -> None:
    """All its weights stand in Constant nodes, and its sizes are named -1 and ?."""
    result = through_every_link(
        opened, "ocr-cls", Expected(n_layers=54, n_two_four=29, least=40, method="magnitude", n=5)
    )
    assert result.left_dense["gives the outputs"] == 1
    assert result.n_eligible is not None


@pytest.mark.full
@ON_REQUEST
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_goes_through_every_link(name: str, opened: Open) -> None:
    through_every_link(opened, name, NETWORKS[name])


@pytest.mark.full
@ON_REQUEST
@pytest.mark.parametrize("name", WITH_BRANCHES)
def test_a_network_with_its_layers_in_branches_is_built_dense_in_float32_only(
    name: str, opened: Open
) -> None:
    """And every link after that passes; the others are refused by one sentence."""
    expected = WITH_BRANCHES[name]
    work = opened(name, n=expected.n)
    work.sparsify("magnitude")
    with pytest.raises(SparseExportError, match=r"^The graph holds subgraphs of .*Build it as fp32\."):
        work.build("magnitude", "half", precision="fp16")
    with pytest.raises(SparseExportError, match="but for those in branches and loops"):
        work.build("magnitude", "packed", onnx="packed")
    work.build("magnitude-dense", "dense")
    work.build("magnitude", "sparse")
    work.validate("sparse")
    check_gate(gate(work.folder / "sparse", work.folder / "dense", inputs=work.held, max_drop=100))
    assert (work.result.n_layers, work.result.n_two_four) == (expected.n_layers, expected.n_two_four)
    assert work.result.agreement["sparse"][0] >= expected.least


@pytest.mark.full
@ON_REQUEST
@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ["magika", "ocr-cls"])
def test_an_engine_is_built_for_the_bounds_of_every_free_size(name: str, opened: Open) -> None:
    work = opened(name, n=5)
    work.sparsify("magnitude")
    work.build(
        "magnitude",
        "engine",
        precision="fp16",
        targets=("tensorrt-rtx",),
        engines=engine_options(("tensorrt-rtx",), architectures="sm89", profiles=work.network.profiles),
    )
    (engine,) = open_bundle(work.folder / "engine").info.engines
    assert engine.architectures == ("sm89",)
