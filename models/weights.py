"""Loads the weights of a network from a file, or as its library publishes them."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.models import torchvision_constructor
from sparse_export.models.names import TIMM, is_factory
from sparse_export.models.published import weights_unavailable

if TYPE_CHECKING:
    import torch

_NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts put the weights in their files
_FORBIDDEN = re.compile(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)")
_SHOWN = 8


def load_weights(module: torch.nn.Module, file: Path) -> None:
    """Load all weights and buffers of a network from a file.

    Args:
        module: the network, changed in place.
        file: safetensors, or what `torch.save` wrote of a mapping of tensors (or of one with such a mapping
            under `state_dict`, `model` or `model_state_dict`). It is read with weights_only: nothing in it is
            run.

    Raises:
        UsageError: there is no such file, or a layer of the network has no shape yet.
        ArtefactError: the file cannot be read, or holds other names or shapes than the network's.
    """
    import torch

    from sparse_export.models.lazy import require_shapes

    require_shapes(module)
    state = _tensors(file)
    wanted = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    problems = sorted(
        [
            *(f"it lacks {name}" for name in wanted.keys() - state.keys()),
            *(f"it has {name}, which the network has not" for name in state.keys() - wanted.keys()),
            *(
                f"{name} has shape {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
                for name in wanted.keys() & state.keys()
                if state[name].shape != wanted[name].shape
            ),
        ]
    )
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ArtefactError(
            f"{file} holds the weights of another network: {'; '.join(problems[:_SHOWN])}{more}.",
            do="Choose the network that they belong to, or rename them in the file.",
        )
    unfit = [f"{name} is {kind}" for name in sorted(wanted) if (kind := _unfit(state[name], wanted[name]))]
    if unfit:
        more = f"; and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
        raise ArtefactError(
            f"{file} holds tensors that are no plain numbers of the network's kind: "
            f"{'; '.join(unfit[:_SHOWN])}{more}.",
            do="Save plain, dense tensors of the network's types.",
        )
    load_unversioned(module, state)


def _unfit(value: torch.Tensor, wanted: torch.Tensor) -> str:
    """What is wrong with a tensor that a plain one is to be filled from; empty where nothing is."""
    import torch

    if value.is_meta:
        return "a meta tensor, which has no data"
    if value.is_quantized:
        return "quantized; dequantize it"
    if value.layout is not torch.strided:
        return "stored as a sparse tensor; make it dense"
    kinds = [
        "complex" if one.is_complex() else "float" if one.is_floating_point() else "int"
        for one in (value, wanted)
    ]
    return f"of type {str(value.dtype).removeprefix('torch.')}" if kinds[0] != kinds[1] else ""


def load_unversioned(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Call `load_state_dict` with tensors of a file that does not hold the layers' versions.

    The versions of the network's own layers are assumed: some layers, like torchvision's MNASNet, refuse
    tensors of an unknown version.

    Args:
        module: the network, changed in place.
        state: its tensors, by name.

    Raises:
        RuntimeError: as `load_state_dict`.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned)


def pretrained(name: str) -> torch.nn.Module:
    """Create a network of torchvision or timm with its published weights, downloaded where needed.

    Args:
        name: of the network.

    Raises:
        UsageError: no weights are published for it.
        MissingCapability: they cannot be downloaded.
    """
    if name.startswith(TIMM):
        from sparse_export.models import timm_networks

        return timm_networks.pretrained(name.removeprefix(TIMM))
    constructor = None if is_factory(name) else torchvision_constructor(name)
    if constructor is None:
        raise UsageError(
            f"There are no published weights of {name}.",
            do="Use --weights pretrained with a network of torchvision or timm; a factory loads its own, "
            "and for another network give a file with --weights.",
        )
    from torchvision import models

    try:
        module: torch.nn.Module = getattr(models, constructor)(weights="DEFAULT")
    except Exception as cause:  # the library passes on any error of the network, a proxy or the disk
        raise weights_unavailable(name, cause) from cause
    return module


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name."""
    if not file.is_file():
        raise UsageError(
            f"There is no file {file}.",
            do="Give pretrained, random or the path of a file of weights with --weights.",
        )
    with file.open("rb") as stream:
        start = stream.read(9)
    # A safetensors file begins with eight bytes of length and then JSON.
    return _from_safetensors(file) if start[8:9] == b"{" else _from_torch(file)


def _from_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises ArtefactError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as cause:
        raise _unreadable(file, str(cause)) from cause


def _from_torch(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save, without running its code. Raises ArtefactError."""
    import torch

    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged pickle can raise anything
        raise _unreadable(file, _why_not_torch(cause)) from cause
    if isinstance(content, Mapping):
        nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
        found = {str(key): value for key, value in nested.items() if isinstance(value, torch.Tensor)}
        if found and len(found) == len(nested):
            return found
    raise _unreadable(file, f"it holds a {type(content).__name__} that is no mapping of names to tensors")


def _why_not_torch(cause: Exception) -> str:
    """The reason, in place of torch's hint to load without weights_only, which would run code in the file."""
    if isinstance(cause, OSError):
        return cause.strerror or str(cause)
    found = _FORBIDDEN.search(str(cause))
    if found is not None:
        return f"it holds a {found[1]}, which is no tensor"
    return "it is neither safetensors nor a whole file of torch.save"


def _unreadable(file: Path, reason: str) -> ArtefactError:
    """The error for a file that holds no weights."""
    return ArtefactError(
        f"{file} cannot be read as weights: {reason.rstrip('.')}.",
        do="Save the network's state_dict() alone, best with safetensors; other objects are never unpickled.",
    )
