"""How much each layer changes what the network gives, if it alone is 2:4.

Outputs are held against the dense network's, not against targets: on the few samples that there is time for,
the loss on targets rises and falls by what the samples happen to be, and the change of outputs is 0 only where
nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sparse_export.oneshot.held_back import HeldBack
from sparse_export.oneshot.switchable import SwitchableSession, Weights
from sparse_export.runtimes.outputs import output_batches
from sparse_export.signature import FLOATS, Array, Signature
from sparse_export.tasks.shipped import Classification

__all__ = ["change_of_outputs", "change_words"]

_TINY = 1e-12


def change_words(held: HeldBack, signature: Signature) -> str:
    """What `change_of_outputs` measures, in words."""
    if _is_classes(held, signature):
        return "KL divergence of the classes from the dense network's, in nats a sample"
    return "squared change of the outputs, by their variance"


def change_of_outputs(
    session: SwitchableSession, held: HeldBack, weights: Mapping[str, Weights]
) -> dict[str, float]:
    """How much each change of weights changes the outputs by itself.

    Args:
        session: stays open.
        held: some samples.
        weights: of each change, see `SwitchableSession.use`.

    Returns:
        Of each change 0 where nothing changes; see `change_words`.
    """
    signature = session.signature
    session.use({})
    dense = [outputs for _, outputs in output_batches(session, held.samples, who="The dense network")]
    measure = _divergence if _is_classes(held, signature) else _relative_change
    found = {}
    for name, one in weights.items():
        session.use(one)
        batches = output_batches(session, held.samples, who="The sparse network")
        pairs = [(before, after) for before, (_, after) in zip(dense, batches, strict=True)]
        found[name] = max(0.0, measure(pairs, signature))
    return found


_Pairs = list[tuple[dict[str, Array], dict[str, Array]]]


def _is_classes(held: HeldBack, signature: Signature) -> bool:
    return isinstance(held.task, Classification) and signature.n_classes is not None


def _divergence(pairs: _Pairs, signature: Signature) -> float:
    """Mean over the samples of KL(dense ‖ sparse) of the softmax."""
    name = signature.output_names[0]
    total, n = 0.0, 0
    for dense, sparse in pairs:
        a, b = _log_softmax(dense[name]), _log_softmax(sparse[name])
        total += float((np.exp(a) * (a - b)).sum())
        n += len(a)
    return total / max(1, n)


def _log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    found: Array = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return found


def _relative_change(pairs: _Pairs, signature: Signature) -> float:
    """Mean over the outputs of the squared change by the variance, of integers of the share that changed."""
    found = []
    for one in signature.outputs:
        alike = [(a[one.name], b[one.name]) for a, b in pairs if a[one.name].shape == b[one.name].shape]
        if not alike or not sum(a.size for a, _ in alike):
            continue
        if one.dtype not in FLOATS:
            changed = sum(int((a != b).sum()) for a, b in alike)
            found.append(changed / sum(a.size for a, _ in alike))
            continue
        n = sum(a.size for a, _ in alike)
        mean = sum(float(a.sum(dtype=np.float64)) for a, _ in alike) / n
        spread = sum(float(np.square(a.astype(np.float64) - mean).sum()) for a, _ in alike)
        change = sum(float(np.square(b.astype(np.float64) - a.astype(np.float64)).sum()) for a, b in alike)
        found.append(change / max(spread, _TINY))
    return sum(found) / len(found) if found else 0.0
