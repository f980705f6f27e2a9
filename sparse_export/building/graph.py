"""From a finished run to the graph that ships, with what was found on the way."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from sparse_export.building.calibration import calibration_batches
from sparse_export.building.golden import Golden, golden_input, golden_pair
from sparse_export.building.patterns import layer_facts, masks_with_promises, never_cut, rewritten
from sparse_export.building.request import BuildRequest
from sparse_export.engines.precision import at_precision
from sparse_export.formats.bundle import CompactInfo
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.run import LayerInfo, Run, RunInfo
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.layers import (
    count_parameters,
    graph_layers,
    promised_patterns,
    require_patterns,
)
from sparse_export.graph.passes.fit_pattern import Fitted, fit_pattern
from sparse_export.models.run_network import density_of, masks_of_run, network_of_run
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.trust import Given

__all__ = ["FittedNetwork", "MadeGraph", "graph_of_run"]


@dataclass(frozen=True, kw_only=True)
class FittedNetwork:
    """What was done to make layers obey a pattern. before: the network of the run, as it was."""

    pattern: NMPattern
    before: nn.Module
    fitted: Fitted


@dataclass(frozen=True, kw_only=True)
class MadeGraph:
    """The graph that ships, dense and in the precision that was asked for.

    layers: of the graph.  promising: the run's layers, with the patterns that they promise now.  density: of the
    masks, after cuts.  golden: samples, and what torch makes of them.
    n_parameters, n_nonzero: over the float initializers, before weights become integers.  n_calibration: samples.
    fit: None where no pattern was asked for.
    """

    model: onnx.ModelProto
    layers: tuple[GraphLayer, ...]
    promising: tuple[LayerInfo, ...]
    density: float
    golden: Golden
    n_parameters: int
    n_nonzero: int
    n_calibration: int
    compacted: CompactInfo | None
    fit: FittedNetwork | None


def graph_of_run(
    run: Run, asked: BuildRequest, wanted: NMPattern | None, *, data_dir: str | Path | None, trust: Given
) -> MadeGraph:
    """Export the network of a run, after it was made to obey the wanted pattern, and rewrite the graph as asked.

    Raises what `build` does but for files and engines.
    """
    info, shape = run.info, run.info.model.input_shape
    network = network_of_run(run, given=trust)
    masks = masks_of_run(run, network)
    fit = None if wanted is None else _fit(network, masks, info, wanted, asked)
    fitted = None if fit is None else fit.fitted
    samples = calibration_batches(info, asked.precision, asked.n_calibration, data_dir)
    golden = golden_pair(network, shape, samples)
    model = onnx_from_module(network, shape, masks=masks_with_promises(network, masks, fitted))
    promising = layer_facts(info.layers, network, masks, wanted, fitted)
    promised = promised_patterns(promising)
    model, compacted = rewritten(model, shape, promised, fitted, asked.compact)
    n_parameters, n_nonzero = count_parameters(model)  # before int8, whose weights are no floats
    model = at_precision(model, asked.precision, samples)
    require_patterns(model, promised)  # of the graph that ships: compacting and gathering move columns
    return MadeGraph(
        model=model,
        layers=graph_layers(model),
        promising=promising,
        density=density_of(masks),
        golden=golden,
        n_parameters=n_parameters,
        n_nonzero=n_nonzero,
        n_calibration=sum(map(len, samples)),
        compacted=compacted,
        fit=fit,
    )


def _fit(
    network: nn.Module, masks: Mapping[str, Tensor], info: RunInfo, wanted: NMPattern, asked: BuildRequest
) -> FittedNetwork:
    """Permute the network in place, and cut it and its masks where that is allowed, so that layers obey the pattern."""
    before = copy.deepcopy(network)
    sample = torch.from_numpy(golden_input(info.model.input_shape))
    names = [layer.name for layer in info.layers]
    small_share = SMALL_SHARE if asked.planned_dense is None else 0.0
    fitted = fit_pattern(
        network,
        sample,
        wanted,
        names,
        masks=masks,
        max_cut=asked.max_cut,
        gather=asked.gather,
        uncut=never_cut(network, sample, names, wanted, small_share=small_share),
        dense=asked.planned_dense,
        live_first=asked.compact,
    )
    return FittedNetwork(pattern=wanted, before=before, fitted=fitted)
