"""Restores the network of a finished run and its masks, checked against each other and `run.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from sparse_export import models, trust
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import sha256_file
from sparse_export.formats.listed import bytes_of
from sparse_export.formats.run import MASKS_FILE, RUN_FILE, WEIGHTS_FILE, Run
from sparse_export.graph.copies import copy_of
from sparse_export.models.lazy import give_shapes
from sparse_export.models.weights import load_unversioned
from sparse_export.trust import TrustedDigests

__all__ = ["code_of_run", "density_of", "differences", "masks_of_run", "network_of_run"]

_SHOWN = 8  # differences between two networks


def network_of_run(run: Run, *, trusted: TrustedDigests = None) -> nn.Module:
    """Restore the trained network of a finished run. Nothing is unpickled.

    Args:
        run: the run; its network in memory is copied, if there is one.
        trusted: digests passed with --trust; without that of `run.json` a factory that this user does not
            vouch for is not imported.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        NotTrustedError: this user does not vouch for the factory.
        UsageError: the run does not say how to create the network, or holds a graph; or its network
            in memory cannot be copied.
        ArtefactError: the weights are another network's.
    """
    if run.info.model.form == "onnx":
        raise UsageError(
            f"The run in {run.path} holds an ONNX graph, and a torch network is needed here.",
            do="Take a run that was trained, or the network by its name.",
        )
    _require_makeable(run, trusted)
    state = _tensors(run, WEIGHTS_FILE)  # first: reading holds them twice
    network = copy_of(run.module) if run.module is not None else _fresh_network(run)
    network = network.cpu().eval()
    if run.info.signature.only_input is not None:
        give_shapes(network, run.info.signature.input_shape)
    wanted = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    name = run.info.model.name or type(network).__name__
    problems = differences(state, wanted)
    if problems:
        raise ArtefactError(
            f"{run.path / WEIGHTS_FILE} holds the weights of another network than {name}: {problems}.",
            do="Use the code that the run was trained with, or the run that belongs to this code.",
        )
    load_unversioned(network, state)
    return network


def differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """What keeps the tensors of a state from being those of a network, the first few; empty for nothing.

    Args:
        state: by name.
        wanted: those that the network has.
    """
    problems = [
        *(f"it lacks {key}" for key in wanted.keys() - state.keys()),
        *(f"it has {key}, which the network has not" for key in state.keys() - wanted.keys()),
        *(
            f"{key} has shape {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ),
    ]
    shown = sorted(problems)[:_SHOWN]
    more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return "; ".join(shown) + more


def code_of_run(run: Run) -> tuple[trust.RunsCode, ...]:
    """List the code that making the network of a run would run: its factory, where it names one.

    Args:
        run: the run; one whose network is in memory needs no factory.
    """
    name = run.info.model.name
    if run.module is not None or name is None or not models.is_factory(name):
        return ()
    what = f"The factory {name} in {run.path}"
    return (trust.RunsCode(sha256=sha256_file(run.path / RUN_FILE), what=what),)


def _require_makeable(run: Run, trusted: TrustedDigests) -> None:
    """Raise UsageError for a run that does not say how its network is made, NotTrustedError for a factory."""
    if run.module is not None:
        return
    if run.info.model.name is None:
        raise UsageError(
            f"The run in {run.path} does not say how its network is made: it was passed in memory.",
            do="Build it in the process that trained it, or train it with a factory, package.module:factory.",
        )
    trust.require_all(code_of_run(run), trusted=trusted)


def _fresh_network(run: Run) -> nn.Module:
    """Create the network of a run with fresh weights."""
    assert run.info.model.name is not None, "it was checked"
    with torch.no_grad():  # weights that a layer computes from others must be copied like the others
        return models.create(run.info.model.name, run.info.signature.n_classes)


def _tensors(run: Run, name: str) -> dict[str, Tensor]:
    """The tensors of a file of a run, by name."""
    content = bytes_of(run, name)
    try:
        return load(content)
    except SafetensorError as cause:
        raise ArtefactError(
            f"{run.path / name} cannot be read as safetensors: {cause}.",
            do="Copy the run again, or train it again.",
        ) from cause


def masks_of_run(run: Run, network: nn.Module) -> dict[str, Tensor]:
    """Read the masks of a finished run.

    Args:
        run: the run.
        network: the trained one.

    Returns:
        By parameter name, bool of the weight's shape, True = kept; empty for a dense run.

    Raises:
        ArtefactError: masks, weights and `run.json` contradict each other.
    """
    masks = {name: mask.bool() for name, mask in _tensors(run, MASKS_FILE).items()}
    file = f"{run.path / MASKS_FILE}"  # for messages alone
    parameters = dict(network.named_parameters(remove_duplicate=False))
    layers = {layer.name: layer for layer in run.info.layers if layer.masked}
    if masks.keys() != layers.keys():
        raise ArtefactError(
            f"{file} has masks for {', '.join(sorted(masks)) or 'nothing'}.",
            expected=f"{RUN_FILE} has masks for {', '.join(sorted(layers)) or 'nothing'}.",
            do="Copy the run again, or train it again.",
        )
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            raise ArtefactError(
                f"The mask for {name} in {file} has shape {tuple(mask.shape)}.",
                expected=f"The network has: {found}.",
                do="Copy the run again, or train it again.",
            )
        n_active = int(mask.count_nonzero())
        if n_active != layers[name].n_active:
            raise ArtefactError(
                f"The mask for {name} in {file} keeps {n_active} weights, "
                f"and {layers[name].n_active} by {RUN_FILE}.",
                do="Copy the run again, or train it again.",
            )
        if bool(((parameters[name] != 0) & ~mask).any()):  # the weights that it leaves out take more memory
            raise ArtefactError(
                f"{name} in {run.path} has nonzero weights where its mask is False, "
                "so that the recorded score is not that of the masked network.",
                do="Train it again.",
            )
    density = density_of(masks)
    if not math.isclose(density, run.info.density, rel_tol=0.0, abs_tol=1e-9):
        raise ArtefactError(
            f"The masks in {file} have density {density:.6f}, and {run.info.density:.6f} by {RUN_FILE}.",
            do="Copy the run again, or train it again.",
        )
    return masks


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Compute kept / total over all masks.

    Args:
        masks: bool, True = kept.

    Returns:
        The density, 1 without masks.
    """
    n_masked = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / n_masked if n_masked else 1.0
