"""What to do next is read off the layers of a graph."""

from __future__ import annotations

from dataclasses import replace

from sparse_export.formats.layers import Eligible, GraphLayer
from sparse_export.graph.advice import advice_of
from sparse_export.graph.eligibility import reason


def layer(*codes: str, share: float = 0.5, eligible: Eligible = "no", macs: int | None = 100) -> GraphLayer:
    return GraphLayer(
        node="n",
        op_type="MatMul",
        weight="w",
        shape=(16, 16),
        reduction_axis=0,
        n_weights=256,
        n_nonzero=int(256 * share),
        macs=macs,
        nonzero_macs=macs,
        eligible=eligible,
        reasons=tuple(reason(code) for code in codes),  # type: ignore[arg-type]
    )


def test_layers_of_a_type_that_hardware_does_not_take_are_counted_with_their_work() -> None:
    (text,) = advice_of([layer("float32"), layer("float32", macs=200), layer("indivisible", share=1.0)])
    assert text.startswith(
        "2 of 3 layers (75 % of the multiply-adds) are 2:4, but sparse kernels need float16, "
    )
    assert "`sparse-export build --precision fp16` or int8 gives that" in text


def test_zeros_that_are_stored_in_a_way_that_hides_them_are_sent_to_another_export() -> None:
    (text,) = advice_of([layer("zero-point")])
    assert text.endswith("is 2:4, but sparse kernels need symmetric quantization too. Export it so.")


def test_zeros_that_no_kernel_skips_are_told_apart_from_those_of_a_wrong_type() -> None:
    first, second = advice_of([layer("float32"), layer("groups-over", "float32")])
    assert first.startswith("1 of 2 layers (50 % of the multiply-adds) is 2:4")
    assert second.startswith("1 of 2 layers (50 % of the multiply-adds) has zeros outside of 2:4")


def test_a_dense_network_is_sent_to_sparsify() -> None:
    assert advice_of([layer("groups-over", share=1.0)]) == [
        "No layer has zeros. `sparse-export sparsify FILE.onnx` makes layers 2:4."
    ]


def test_a_few_zeros_by_chance_do_not_make_a_network_sparse() -> None:
    stray = replace(layer("groups-over", share=1.0), n_weights=10_000, n_nonzero=9_990)
    tiny = replace(layer("groups-over", share=1.0), n_weights=100, n_nonzero=95)
    (text,) = advice_of([stray, tiny])
    assert text.startswith(
        "The network is dense: 15 of 10,100 weights are zero. `sparse-export sparsify FILE"
    )
    (text,) = advice_of([stray, replace(tiny, n_weights=1000, n_nonzero=500)])
    assert text.startswith("1 of 2 layers (50 % of the multiply-adds) has zeros outside of 2:4")
    (text,) = advice_of([stray, layer("float32")])
    assert text.startswith("1 of 2 layers (50 % of the multiply-adds) is 2:4")


def test_layers_that_are_ready_are_sent_to_a_measurement() -> None:
    layers = [layer("unaligned", eligible="unproven"), layer(eligible="yes", macs=None)]
    (text,) = advice_of(layers)
    assert text.startswith("2 of 2 layers are ready for sparse kernels. Build an engine: ")
    (text,) = advice_of(layers, has_engine=True)
    assert text.startswith("2 of 2 layers are ready for sparse kernels. Measure on the GPU that will serve: ")


def test_a_graph_without_weights_is_told_nothing() -> None:
    assert advice_of([]) == []
    assert advice_of([replace(layer("activations"), constant=False)]) == []
