"""The layers of a network that sparse training can mask, and the record of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from sparse_export.errors import UsageError
from sparse_export.formats.run import LayerInfo

_ATTENTION_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile, in whatever order."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def maskable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of Linear and Conv layers and the input projections of MultiheadAttention, by name.

    In the order of `named_parameters()`. Never biases, norms or embeddings, nor a weight that an embedding
    shares; a weight that two layers share appears once.

    Raises:
        UsageError: a lazy layer has not seen an input yet.
    """
    chosen: set[int] = set()
    embedded: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear | _ConvNd):
            chosen.add(id(module.weight))
        elif isinstance(module, nn.MultiheadAttention):
            chosen |= {id(getattr(module, name)) for name in _ATTENTION_PROJECTIONS}
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embedded.add(id(module.weight))
    chosen -= embedded
    parameters = {name: value for name, value in model.named_parameters() if id(value) in chosen}
    for name, value in parameters.items():
        if isinstance(value, UninitializedParameter):
            raise UsageError(
                f"{name} has no shape yet.",
                expected="Every layer of the network was expected to be initialised.",
                do="Run one batch through the network before training starts.",
            )
    return parameters


def computed_weights(model: nn.Module, keep_dense: Sequence[str] = ()) -> dict[str, tuple[Tensor, str]]:
    """Weights of the same kinds of layers that are no parameters, by name, each with the reason why it gets
    no mask.

    They are made at each call from other parameters, as hooks of `torch.nn.utils.prune` and parametrizations
    do. Those that a pattern of `keep_dense` names are left out.
    """
    found = {}
    parameters = {id(value) for value in model.parameters()}
    for owner, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            kinds: tuple[str, ...] = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            kinds = _ATTENTION_PROJECTIONS
        else:
            continue
        for kind in kinds:
            value = None if kind in module._parameters else getattr(module, kind, None)
            if isinstance(value, Tensor) and id(value) not in parameters:
                made_of = [name for name, _ in module.named_parameters() if _belongs_to(name, kind)]
                reason = (
                    f"it is computed at each call, from {' and '.join(made_of) or 'no parameter'}, so that "
                    "no mask on it would last; make it a parameter first"
                    f"{_how_to_undo(module, kind, made_of)}"
                )
                found[f"{owner}.{kind}".lstrip(".")] = (value.detach(), reason)
    return {
        name: value
        for name, value in found.items()
        if not any(_matches(name, pattern) for pattern in keep_dense)
    }


def _belongs_to(name: str, kind: str) -> bool:
    """Is a parameter of a layer, like `weight_orig` or `parametrizations.weight.original`, what its weight is
    made of?
    """
    return name.startswith((f"{kind}_", f"parametrizations.{kind}."))


def _how_to_undo(module: nn.Module, kind: str, made_of: Sequence[str]) -> str:
    """What makes a computed weight a parameter again, as a part of a sentence."""
    where = "torch.nn.utils"
    if f"{kind}_mask" in module._buffers:
        return f", by {where}.prune.remove"
    if any(name.startswith("parametrizations.") for name in made_of):
        return f", by {where}.parametrize.remove_parametrizations"
    if f"{kind}_g" in made_of:
        return f", by {where}.remove_weight_norm"
    return f", by {where}.remove_spectral_norm" if f"{kind}_u" in module._buffers else ""


def masked_parameters(model: nn.Module, keep_dense: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The maskable parameters, without those that a pattern of `keep_dense` names.

    Args:
        model: the network.
        keep_dense: shell patterns for a parameter (`fc3.weight`) or its layer (`fc3`, `classifier.*`).

    Raises:
        UsageError: a pattern names no maskable parameter, or nothing is left.
    """
    parameters = maskable_parameters(model)
    _require_known(model, parameters, keep_dense)
    left = {
        name: value
        for name, value in parameters.items()
        if not any(_matches(name, pattern) for pattern in keep_dense)
    }
    if not left:
        computed = [f"{name}: {reason}" for name, (_, reason) in computed_weights(model).items()]
        raise UsageError(
            f"{type(model).__name__} has no layer to make sparse"
            f"{': ' if computed else ''}{'; '.join(computed)}.",
            expected="At least one Linear or Conv layer that keep_dense does not name was expected.",
            do="Train it dense, or name fewer layers in keep_dense.",
        )
    return left


def named_dense(model: nn.Module, keep_dense: Sequence[str]) -> set[str]:
    """The maskable parameters that `keep_dense` names.

    Raises as `masked_parameters` does, save when none is left.
    """
    parameters = maskable_parameters(model)
    if not keep_dense:
        return set()
    _require_known(model, parameters, keep_dense)
    return {name for name in parameters if any(_matches(name, pattern) for pattern in keep_dense)}


def output_layers(model: nn.Module, forward: Callable[[], object] | None = None) -> tuple[str, ...]:
    """The maskable parameters of the layer that gives the network's outputs.

    Args:
        model: the network.
        forward: runs the network once; the layer that it calls last is the one. None for the layer registered
            last.
    """
    parameters = maskable_parameters(model)
    owners: dict[nn.Module, list[str]] = {}
    for name in parameters:
        owners.setdefault(model.get_submodule(name.rpartition(".")[0]), []).append(name)
    last = next(reversed(owners), None)
    if forward is not None:
        called: list[nn.Module] = []
        handles = [
            owner.register_forward_hook(lambda module, _inputs, _output: called.append(module))
            for owner in owners
        ]
        try:
            forward()
        finally:
            for handle in handles:
                handle.remove()
        last = called[-1] if called else last
    return tuple(owners[last]) if last is not None else ()


def layer_facts(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    promised: Mapping[str, str] | None = None,
    why_dense: Mapping[str, str] | None = None,
) -> tuple[LayerInfo, ...]:
    """Every maskable weight of a network: kept entries by its mask, all of them where there is none.

    Then the computed ones, whose kept entries are those that are not zero.

    Args:
        model: the network.
        masks: bool, by parameter name.
        promised: the patterns that weights satisfy, by name.
        why_dense: the reasons of those that satisfy none, by name.
    """
    facts = [
        LayerInfo(
            name=name,
            shape=tuple(value.shape),
            n_weights=value.numel(),
            n_active=int(masks[name].sum()) if name in masks else value.numel(),
            masked=name in masks,
            pattern=(promised or {}).get(name),
            why_dense=(why_dense or {}).get(name),
        )
        for name, value in maskable_parameters(model).items()
    ]
    facts += [
        LayerInfo(
            name=name,
            shape=tuple(value.shape),
            n_weights=value.numel(),
            n_active=int(value.count_nonzero()),
            masked=False,
            pattern=None,
            why_dense=reason,
        )
        for name, (value, reason) in computed_weights(model).items()
    ]
    return tuple(facts)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def _require_known(model: nn.Module, parameters: Collection[str], keep_dense: Sequence[str]) -> None:
    """Raise UsageError for a pattern of `keep_dense` that names no weight; a computed one is dense anyway."""
    for pattern in keep_dense:
        if not any(_matches(name, pattern) for name in parameters):
            computed = computed_weights(model)
            if any(_matches(name, pattern) for name in computed):
                continue
            raise UsageError(
                f"keep_dense names {pattern!r}, which is no weight of a Linear or Conv layer here.",
                expected=f"One of these, or a pattern, was expected: {', '.join(parameters) or 'none'}.",
            )
