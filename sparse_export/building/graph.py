"""The graph that ships, from a finished run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from sparse_export.building.calibration import calibration_batches
from sparse_export.building.engine_form import EngineForm, engine_form
from sparse_export.building.fold_preprocess import RawInput, folded_graph, raw_input_of
from sparse_export.building.golden import Golden, golden_inputs, golden_pair
from sparse_export.building.patterns import (
    ineligible_weights,
    layer_infos,
    masks_with_promises,
    rewrite_graph,
    with_pattern,
)
from sparse_export.building.request import BuildRequest
from sparse_export.engines.precision import CALIBRATED, convert_precision
from sparse_export.errors import UsageError
from sparse_export.formats.bundle import CompactInfo
from sparse_export.formats.layers import GraphLayer
from sparse_export.formats.preparation import FoldedInfo
from sparse_export.formats.run import LayerInfo, Run, RunInfo
from sparse_export.graph.call_record import example_of_signature
from sparse_export.graph.copies import copy_of
from sparse_export.graph.export import onnx_from_module, positive_zeros, remove_source_notes
from sparse_export.graph.finite import naming_weights
from sparse_export.graph.layers import count_parameters, graph_layers
from sparse_export.graph.model import last_fixed_ancestors, load_mapped, open_mapped, signature_of
from sparse_export.graph.passes.fit_pattern import Fitted, fit_graph, fit_pattern
from sparse_export.graph.passes.fold_norms import with_folded_norms
from sparse_export.graph.passes.newer_opset import with_packable_opset
from sparse_export.graph.promises import promised_patterns, require_patterns
from sparse_export.graph.randomness import require_deterministic
from sparse_export.graph.stored_tensors import Read, array_of
from sparse_export.graph.weight_uses import why_no_axis
from sparse_export.models.run_network import density_of, masks_of_run, network_of_run
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.session import only_array
from sparse_export.runtimes.torch_session import TorchSession
from sparse_export.signature import Feeds, Signature
from sparse_export.sparsity.eligible import SMALL_SHARE
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.trust import TrustedDigests

__all__ = ["BuiltGraph", "PatternedNetwork", "build_graph", "golden_of_graph", "graph_as_it_is"]


@dataclass(frozen=True, kw_only=True)
class PatternedNetwork:
    """A network whose layers were made to satisfy a pattern.

    Attributes:
        pattern: the pattern.
        before: a copy of the run's network, unchanged; the file of a run that holds a graph.
        fitted: what was permuted and dropped.
    """

    pattern: NMPattern
    before: nn.Module | Path
    fitted: Fitted


@dataclass(frozen=True, kw_only=True)
class BuiltGraph:
    """The graph that ships.

    Attributes:
        model: dense, in the requested precision.
        signature: of it.
        layers: of the graph.
        promising: the run's layers, with the patterns that they promise now.
        density: of the masks, after weights were dropped for a pattern.
        golden: inputs, and torch's outputs for them.
        n_parameters: entries of the float initializers, before weights become integers.
        n_nonzero: the nonzero ones of these.
        n_calibration: number of samples for int8 and fp8.
        compacted: what was removed with dead channels; None for a graph that has all its channels.
        fit: None where no pattern was requested.
        engine: the graph that engines are built of, where that is another one.
        folded: how it takes raw samples; None where it takes the network's own input.
    """

    model: onnx.ModelProto
    signature: Signature
    layers: tuple[GraphLayer, ...]
    promising: tuple[LayerInfo, ...]
    density: float
    golden: Golden
    n_parameters: int
    n_nonzero: int
    n_calibration: int
    compacted: CompactInfo | None
    fit: PatternedNetwork | None
    engine: EngineForm | None = None
    folded: FoldedInfo | None = None

    @property
    def for_engines(self) -> onnx.ModelProto:
        """The graph that engines are built of."""
        return self.model if self.engine is None else self.engine.model


def build_graph(
    run: Run,
    request: BuildRequest,
    wanted: NMPattern | None,
    *,
    data_dir: str | Path | None,
    trust: TrustedDigests,
) -> BuiltGraph:
    """Make the run's network satisfy the pattern, export it, and rewrite the graph as requested.

    Args:
        run: a finished run.
        request: what to build.
        wanted: the pattern, None for none.
        data_dir: where the data sets lie.
        trust: digests passed with --trust, for a run that names a factory.

    Raises:
        SparseExportError: as `build`, but for files and engines.
    """
    if run.info.model.form == "onnx":
        return _from_graph(run, request, wanted, data_dir=data_dir)
    info = run.info
    network = network_of_run(run, trusted=trust)
    masks = masks_of_run(run, network)
    fit = None if wanted is None else _fit(network, masks, info, wanted, request)
    fitted = None if fit is None else fit.fitted
    raw = raw_input_of(info, request.fold, data_dir, request.mean, request.std)
    samples = calibration_batches(
        *(info, request.precision, request.n_calibration, data_dir, request.inputs),
        workers=request.workers,
        raw=raw,
    )
    example = example_of_signature(network, info.signature, info.call)
    with TorchSession(network, info.signature, example) as session:
        golden = _golden_of(  # first: its errors are the plainer
            session, samples, raw, partial(require_deterministic, network, example)
        )
        named = session.named
    model = onnx_from_module(network, example, masks=masks_with_promises(network, masks, fitted), named=named)
    promising = layer_infos(info.layers, network, masks, wanted, fitted)
    density = density_of(masks)
    del network, session, named, example, masks  # the graph has the weights now
    gc.collect()  # torch.export's program refers to the network in circles
    signature = info.signature.with_ranges_of(signature_of(model))
    promised = promised_patterns(promising)
    model, compacted = rewrite_graph(model, signature, promised, fitted, request.compact)
    folded = None
    if raw is not None:
        model, folded = folded_graph(model, raw, golden)
        signature = raw.signature
    n_parameters, n_nonzero = count_parameters(model)  # before int8, whose weights are no floats
    engine = _engine_form(model, signature, samples, request, promised)
    model = convert_precision(model, request.precision, samples)
    require_patterns(model, promised)  # of the graph that ships: compacting and gathering move columns
    return BuiltGraph(
        model=model,
        signature=signature,
        layers=graph_layers(model),
        promising=promising,
        density=density,
        golden=golden,
        n_parameters=n_parameters,
        n_nonzero=n_nonzero,
        n_calibration=sum(map(info.signature.n_samples, samples)),
        compacted=compacted,
        fit=fit,
        engine=engine,
        folded=folded,
    )


def _golden_of(
    session: Session, samples: Sequence[Feeds], raw: RawInput | None, suspected: Callable[[], None]
) -> Golden:
    """The golden pair of a network, of raw samples where the graph is to take these."""
    if raw is None:
        return golden_pair(session, samples[0] if samples else None, suspected=suspected)
    # The prepared session would close the network's, which stays its owner's.
    golden = golden_pair(raw.session(session), samples[0] if samples else raw.drawn(), suspected=suspected)
    return replace(golden, is_drawn=not samples)


def _engine_form(
    model: onnx.ModelProto,
    signature: Signature,
    samples: Sequence[Feeds],
    request: BuildRequest,
    promised: Mapping[str, NMPattern],
) -> EngineForm | None:
    """The graph for engines of one that is sparse already, held to the promised patterns."""
    found = engine_form(model, signature, samples, request.precision)
    if found is not None:
        require_patterns(found.model, promised)
    return found


def _from_graph(
    run: Run, request: BuildRequest, wanted: NMPattern | None, *, data_dir: str | Path | None
) -> BuiltGraph:
    """As `build_graph`, for a run that holds a graph."""
    info = run.info
    if wanted is not None and request.max_cut:
        raise UsageError(
            f"Layers may lose up to {request.max_cut:g} of sum |w|, and {run.path} holds an ONNX graph, of "
            "which nothing is cut.",
            do="Leave --max-cut out, or make the file sparse by `sparse-export sparsify --permute`.",
        )
    model, read = open_mapped(run.graph_path)
    raw = raw_input_of(info, request.fold, data_dir, request.mean, request.std)
    signature = info.signature if raw is None else raw.signature
    samples = calibration_batches(
        *(info, request.precision, request.n_calibration, data_dir, request.inputs),
        workers=request.workers,
        raw=raw,
    )
    golden = golden_of_graph(
        *(run.graph_path, model, info.signature, samples[0] if samples else None), raw=raw, read=read
    )
    load_mapped(model, run.graph_path)  # now that onnxruntime does not hold them too
    remove_source_notes(model)
    layers, fit = info.layers, None
    if wanted is not None:
        normal = golden.inputs if raw is None else golden_inputs(info.signature)
        model, fit = _fit_graph(run, model, normal, wanted, request)
        layers = with_pattern(layers, wanted, fit.fitted)
    promised = promised_patterns(layers)
    model = with_folded_norms(model)
    if request.onnx != "dense":
        model = with_packable_opset(model)
    fitted = None if fit is None else fit.fitted
    model, compacted = rewrite_graph(model, info.signature, promised, fitted, request.compact)
    folded = None
    if raw is not None:
        model, folded = folded_graph(model, raw, golden)
    counts = count_parameters(model)  # before int8, whose weights are no floats
    positive_zeros(model)
    engine = _engine_form(model, signature, samples, request, promised)
    model = convert_precision(model, request.precision, samples)
    positive_zeros(model)
    require_patterns(model, promised)
    used = samples if request.precision in CALIBRATED else []
    return replace(
        graph_as_it_is(layers, model, signature, golden, counts=counts),
        n_calibration=sum(map(info.signature.n_samples, used)),
        compacted=compacted,
        fit=fit,
        engine=engine,
        folded=folded,
    )


def graph_as_it_is(
    layers: Sequence[LayerInfo],
    model: onnx.ModelProto,
    signature: Signature,
    golden: Golden,
    *,
    counts: tuple[int, int] | None = None,
) -> BuiltGraph:
    """A graph that ships without being fitted to a pattern.

    Args:
        layers: the record of its weights.
        model: dense.
        signature: of it.
        golden: the pair that checks it.
        counts: entries of its float initializers, and those that are not zero; None to count them.
    """
    masked = [layer for layer in layers if layer.masked] or list(layers)
    n_parameters, n_nonzero = counts or count_parameters(model)
    return BuiltGraph(
        model=model,
        signature=signature,
        layers=graph_layers(model),
        promising=tuple(layers),
        density=sum(layer.n_active for layer in masked) / max(1, sum(layer.n_weights for layer in masked)),
        golden=golden,
        n_parameters=n_parameters,
        n_nonzero=n_nonzero,
        n_calibration=0,
        compacted=None,
        fit=None,
    )


def golden_of_graph(
    file: Path,
    model: onnx.ModelProto,
    signature: Signature,
    samples: Feeds | None,
    *,
    raw: RawInput | None = None,
    read: Read = array_of,
) -> Golden:
    """The golden pair of an ONNX file by onnxruntime on the CPU.

    For an output whose length depends on the data stand the last values of fixed size before it.

    Args:
        file: of the graph.
        model: the same graph.
        signature: of it.
        samples: real inputs; None for random ones.
        raw: what the samples are where they are to be normalized first.
        read: gives the values of what the model stores.

    Raises:
        SparseExportError: as `golden_pair`.
    """
    behind = {one.name: last_fixed_ancestors(model, one.name) for one in signature.outputs}
    inner = tuple({name: None for names in behind.values() for name in names})
    with naming_weights(model, read=read), open_session(file, signature=signature, inner=inner) as session:
        if raw is None:
            golden = golden_pair(session, samples, inner=inner)
        else:
            golden = golden_pair(raw.session(session), samples or raw.drawn(), inner=inner)
            golden = replace(golden, is_drawn=samples is None)
    fixed = [name for name in golden.outputs if not behind.get(name)]
    return replace(
        golden,
        outputs={name: golden.outputs[name] for name in fixed},
        smaller={n: {name: one[name] for name in fixed} for n, one in golden.smaller.items()},
    )


def _fit(
    network: nn.Module, masks: Mapping[str, Tensor], info: RunInfo, wanted: NMPattern, request: BuildRequest
) -> PatternedNetwork:
    """Permute the network in place, and drop weights where allowed, so that layers satisfy the pattern."""
    before = copy_of(network)
    sample = torch.from_numpy(only_array(golden_inputs(info.signature), "The golden pair"))
    parameters = dict(network.named_parameters(remove_duplicate=False))
    names = [layer.name for layer in info.layers if layer.name in parameters]  # not those that are computed
    small_share = SMALL_SHARE if request.planned_dense is None else 0.0
    fitted = fit_pattern(
        network,
        sample,
        wanted,
        names,
        masks=masks,
        max_cut=request.max_cut,
        gather=request.gather,
        uncut=ineligible_weights(network, sample, names, wanted, small_share=small_share),
        dense=why_no_axis(network, sample, names) | dict(request.planned_dense or {}),
        live_first=request.compact,
    )
    return PatternedNetwork(pattern=wanted, before=before, fitted=fitted)


def _fit_graph(
    run: Run, model: onnx.ModelProto, inputs: Feeds, wanted: NMPattern, request: BuildRequest
) -> tuple[onnx.ModelProto, PatternedNetwork]:
    """As `_fit`, for a graph, of which nothing is dropped."""
    model, fitted = fit_graph(
        model,
        [inputs],
        wanted,
        [layer.name for layer in run.info.layers],
        sizes=run.info.signature.sizes,
        gather=request.gather,
        dense=request.planned_dense,
        live_first=request.compact,
    )
    return model, PatternedNetwork(pattern=wanted, before=run.graph_path, fitted=fitted)
