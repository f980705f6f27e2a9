"""What to do next so that hardware can use more of a graph's zeros."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_export.formats.layers import GraphLayer
from sparse_export.graph.eligibility import MISSING, could_be_used

__all__ = ["advice_of"]

_DENSE = 0.01
"""Below this share of zeros a layer, or a network, counts as dense: training leaves some by chance."""

_TYPES = MISSING["float32"]
_BUILD = (
    "`sparse-export build --precision fp16` or int8 gives that; NVIDIA GPUs have such kernels from Ampere on."
)


def advice_of(layers: Sequence[GraphLayer], *, has_engine: bool = False) -> list[str]:
    """What would let 2:4 hardware use more layers, the step that reaches most first.

    Args:
        layers: of one graph, as `inspect` found them.
        has_engine: one was built of the graph already.

    Returns:
        Sentences; none where every layer that can be used is used.
    """
    weights = [layer for layer in layers if layer.constant and layer.n_weights]
    sparse = [layer for layer in weights if _zeros([layer]) >= _DENSE * layer.n_weights]
    ready = [layer for layer in sparse if layer.eligible != "no"]
    # 2:4 already, and nothing against it but how the values are stored.
    stored = [layer for layer in sparse if layer.eligible == "no" and could_be_used(layer.reasons)]
    scattered = [layer for layer in sparse if any(one.code == "groups-over" for one in layer.reasons)]
    n_weights, n_zeros = sum(layer.n_weights for layer in weights), _zeros(weights)
    if weights and not ready and not stored and n_zeros < _DENSE * n_weights:
        what = f"The network is dense: {n_zeros:,} of {n_weights:,} weights" if n_zeros else "No layer"
        has = "are zero" if n_zeros else "has zeros"
        return [f"{what} {has}. `sparse-export sparsify FILE.onnx` makes layers 2:4."]
    found: list[str] = []
    missing = [
        text
        for code, text in MISSING.items()
        if any(one.code == code for layer in stored for one in layer.reasons)
    ]
    if missing:
        needed = " and ".join(dict.fromkeys(missing))
        do = "Export it so." if _TYPES not in needed else _BUILD
        found.append(
            f"{_counted(stored, weights)} {_is(stored)} 2:4, but sparse kernels need {needed} too. {do}"
        )
    if scattered:
        found.append(
            f"{_counted(scattered, weights)} {_has(scattered)} zeros outside of 2:4, which no sparse kernel "
            "skips. Prune or train with the pattern 2:4, or try `build --compact`, which cuts channels that "
            "are empty."
        )
    if ready and not stored and not scattered:
        first = "" if has_engine else "Build an engine: `build --target tensorrt`. "
        found.append(
            f"{_counted(ready, weights)} {_is(ready)} ready for sparse kernels. {first}Measure on the GPU "
            "that will serve: `compare --runtime tensorrt`."
        )
    return found


def _zeros(layers: Sequence[GraphLayer]) -> int:
    return sum(layer.n_weights - layer.n_nonzero for layer in layers)


def _counted(some: Sequence[GraphLayer], of: Sequence[GraphLayer]) -> str:
    """Like `12 of 14 layers (96 % of the multiply-adds)`."""
    total = sum(layer.macs or 0 for layer in of)
    share = sum(layer.macs or 0 for layer in some)
    known = total and all(layer.macs is not None for layer in of)
    work = f" ({100 * share / total:.0f} % of the multiply-adds)" if known else ""
    return f"{len(some)} of {len(of)} layers{work}"


def _is(layers: Sequence[GraphLayer]) -> str:
    return "is" if len(layers) == 1 else "are"


def _has(layers: Sequence[GraphLayer]) -> str:
    return "has" if len(layers) == 1 else "have"
