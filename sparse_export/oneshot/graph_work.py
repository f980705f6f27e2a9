"""The weights of a graph on their way: pruned one by one, stored, and noted for a call that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from sparse_export.errors import ArtefactError
from sparse_export.oneshot.costs import Finished, LayerDone
from sparse_export.oneshot.graph_state import FinishedWeight, State
from sparse_export.oneshot.graph_weights import GraphWeight
from sparse_export.oneshot.layers import Method, PrunedWeight, prune_weight
from sparse_export.oneshot.links import Link, Place
from sparse_export.oneshot.norms import Norm
from sparse_export.oneshot.paired_sums import PairedStatistics
from sparse_export.oneshot.parted import Parted
from sparse_export.oneshot.recovered import recovered_weight
from sparse_export.oneshot.recovery import Recovery
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.oneshot.unfolding import InputStatistics, gram_too_large, require_finite
from sparse_export.oneshot.weights import kept_share
from sparse_export.signature import Array

__all__ = ["GraphWork", "too_large"]


class GraphWork:
    """The graph on its way, and what was found out on it."""

    def __init__(
        self,
        pruned: Parted,
        walked: Parted,
        weights: Sequence[GraphWeight],
        method: Method,
        state: State | None,
        observer: Finished | None,
        *,
        has_inputs: bool,
        why_no_error: str,
        costs: Mapping[str, float],
        allowed: Mapping[str, Tensor],
        recovery: Recovery | None = None,
        links: Mapping[str, Link] | None = None,
    ) -> None:
        """Make ready, and take the weights that an earlier process had finished.

        Args:
            pruned: the graph that is made.
            walked: the one that is walked, which may be a copy.
            weights: that get the pattern.
            method: how they are chosen.
            state: what an earlier process left, and where finished weights are noted.
            observer: told of each.
            has_inputs: there are calibration inputs.
            why_no_error: why errors are not measured without any.
            costs: of each weight, for the observer.
            allowed: by name, False where a zero stays one.
            recovery: the steps for weights with paired statistics.
            links: what stands behind these.
        """
        graphs = [pruned] if walked is pruned else [pruned, walked]
        self._graphs = [(one, {t.name: t for t in one.model.graph.initializer}) for one in graphs]
        self._numbers = {weight.name: i for i, weight in enumerate(weights)}
        self._method, self._state, self._observer = method, state, observer
        self._costs, self._cost_done = costs, 0.0
        self._has_inputs, self._why_no_error, self._allowed = has_inputs, why_no_error, allowed
        self._recovery, self._links = recovery or Recovery(), links or {}
        self.checks = self._recovery.damping
        self.masks: dict[str, Tensor] = {}
        self.beside: dict[str, dict[str, Tensor]] = {}
        self.layers: dict[str, SparsifiedLayer] = {}
        self.norms: dict[str, Tensor] = {}
        for weight in weights:
            _require_finite_weight(weight.name, self.values_of(weight.name))
        for weight in weights:
            earlier = None if state is None else state.load(self._numbers[weight.name], weight.name)
            if earlier is not None and tuple(earlier.weight.shape) == weight.form.stored:
                self._set(earlier, resumed=True)
        self.n_resumed = len(self.layers)

    def finish(
        self,
        weight: GraphWeight,
        statistics: InputStatistics | None,
        paired: PairedStatistics | None = None,
        check: PairedStatistics | None = None,
    ) -> None:
        """Prune a weight and store it.

        Args:
            weight: which.
            statistics: of its inputs, None where they are not seen.
            paired: the same with the wanted outputs; None where they are not known.
            check: of a part of these.
        """
        stored = _tensor(self.values_of(weight.name))
        method, reason = self._method_for(weight, statistics)
        if statistics is not None:
            require_finite(weight.name, statistics)
        before = weight.form.weight_of(stored)
        may = self._allowed.get(weight.name)
        allowed = None if may is None else weight.form.weight_of(may)
        beside: dict[str, Tensor] = {}
        if paired is None:
            after = prune_weight(before, weight.cap, method, statistics, allowed=allowed)
        else:
            place = self._links[weight.name].place
            found = recovered_weight(
                before,
                weight.cap,
                method,
                paired,
                check,
                self._recovery,
                has_bias=place is not None,
                allowed=allowed,
            )
            after = PrunedWeight(weight=found.weight, mask=found.mask, error=found.error)
            if place is not None and self._recovery.bias:
                beside = {place.name: self._shifted(place, found.shift)}
        layer = SparsifiedLayer(
            name=weight.name,
            shape=tuple(stored.shape),
            n_weights=stored.numel(),
            n_active=int(after.mask.sum()),
            pattern=str(weight.cap.pattern),
            reason=reason,
            magnitude=float(stored.double().abs().sum()),
            kept_in_order=None,
            kept_share=kept_share(before, after.mask),
            error=after.error,
        )
        finished = FinishedWeight(
            weight=weight.form.stored_of(after.weight),
            mask=weight.form.stored_of(after.mask),
            layer=layer,
            beside=beside,
        )
        if self._state is not None:
            self._state.save(self._numbers[weight.name], finished)
        self._set(finished)

    def values_of(self, name: str) -> Array:
        """The present values of a stored tensor."""
        graph, stored = self._graphs[0]
        return graph.read(stored[name])

    def settle(self, norm: Norm, statistics: tuple[Tensor, Tensor] | None) -> None:
        """Give a batch norm the mean and variance of what it meets; None leaves it as it is."""
        if statistics is None:
            return
        for name, values in zip((norm.mean, norm.variance), statistics, strict=True):
            for graph, stored in self._graphs:
                graph.put(stored[name], _of_type(values, stored[name].data_type))
            self.norms[name] = _tensor(self.values_of(name))

    def _shifted(self, place: Place, shift: Tensor) -> Tensor:
        """The stored tensor that shifts the outputs, shifted once more."""
        old = _tensor(self.values_of(place.name))
        return (old.double() + place.sign * shift.reshape(old.shape)).to(old.dtype)

    def _method_for(self, weight: GraphWeight, statistics: InputStatistics | None) -> tuple[Method, str]:
        """The method that the inputs of a weight allow, and a note where it is another, or no error is known."""
        if not self._has_inputs:
            return self._method, self._why_no_error
        if statistics is None:
            why = weight.unseen or "nothing reached it"
            return "magnitude", f"{_instead('magnitude', self._method)}: {why}"
        why = too_large(weight)
        if not why:
            return self._method, ""
        method: Method = "activation" if self._method == "reconstruction" else self._method
        return method, f"{_instead(method, self._method)}: {why}"

    def _set(self, finished: FinishedWeight, *, resumed: bool = False) -> None:
        for graph, stored in self._graphs:
            for name, values in {finished.layer.name: finished.weight, **finished.beside}.items():
                graph.put(stored[name], _of_type(values, stored[name].data_type))
        self.beside[finished.layer.name] = finished.beside
        self.masks[finished.layer.name] = finished.mask
        self.layers[finished.layer.name] = finished.layer
        self._cost_done += self._costs[finished.layer.name]
        if self._observer is not None:
            n_done, n_all = len(self.layers), len(self._numbers)
            share = 1.0 if n_done == n_all else self._cost_done / sum(self._costs.values())
            self._observer(
                LayerDone(layer=finished.layer, number=n_done, n_layers=n_all, share=share, resumed=resumed)
            )


def _instead(method: Method, asked: Method) -> str:
    return "error not measured" if method == asked else f"pruned by {method}, error not measured"


def _tensor(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _of_type(weight: Tensor, data_type: int) -> Array:
    """The values of a weight, rounded to a type of ONNX."""
    if data_type == TensorProto.BFLOAT16:
        return weight.bfloat16().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    wide = weight.float() if weight.dtype == torch.bfloat16 else weight
    array: Array = wide.numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(data_type), copy=False)
    return array


def _require_finite_weight(name: str, array: Array) -> None:
    if not bool(np.isfinite(array).all()):
        raise ArtefactError(
            f"The weight {name} holds NaN or infinity.",
            expected="Finite weights were expected.",
            do="Look at the training that it comes from, which may have diverged; or leave it dense with "
            "--keep-dense.",
        )


def too_large(weight: GraphWeight) -> str:
    """Why the Gram matrices of a weight's inputs are too large to ask for; empty where they are not."""
    return gram_too_large(weight.form.n_groups, weight.form.n_columns)
