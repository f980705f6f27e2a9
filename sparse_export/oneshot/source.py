"""The network that is to be made sparse: a finished run, a known one, or a factory of the user's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_export import models
from sparse_export.errors import UsageError
from sparse_export.files import put_back, sha256_file
from sparse_export.formats.run import RUN_FILE, Run, open_run
from sparse_export.models.run_network import masks_of_run, network_of_run
from sparse_export.models.weights import load_weights, pretrained


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network with its weights, on the CPU, in eval mode.

    masks: of a run that was trained sparse, by parameter name; else empty.  origin: where the weights came
    from.
    """

    name: str
    network: nn.Module = field(repr=False)
    masks: dict[str, Tensor] = field(repr=False)
    origin: dict[str, str]


def run_of(model: str, *, any_form: bool = False) -> Run | None:
    """The finished run that MODEL is the folder of; None for a network's name.

    any_form: one that holds a graph, or whose network cannot be made again, is taken too.
    Raises UsageError when it is neither, ArtefactError for a run that is damaged or not finished.
    """
    folder = Path(model)
    put_back(folder)
    if (folder / RUN_FILE).is_file():
        run = open_run(folder)
        if run.info.model.name is None and not any_form:
            raise UsageError(
                f"The run in {folder} does not say how its network is made.",
                expected="A run of a known network or of a package.module:factory was expected.",
                do="Train it with a factory.",
            )
        return run
    if model in models.names() or ":" in model:
        return None
    if folder.exists() or "/" in model:
        return open_run(folder)  # whose errors say what a run is
    models.spec(model)  # whose error lists the names
    return None


def name_of(model: str) -> str | None:
    """The network's name, that of a run's for a run. Raises as `run_of` does."""
    run = run_of(model)
    return model if run is None else run.info.model.name


def require_weights(model: str, run: Run | None, weights: str | None) -> None:
    """Raise UsageError where `weights` is invalid for this kind of network."""
    if run is not None:
        if weights is not None:
            raise UsageError(
                f"--weights {weights} was given for the run {run.path}, which has weights of its own.",
                expected="A run alone, or a network's name with --weights, was expected.",
                do="Leave out --weights, or name the network.",
            )
        return
    if models.is_factory(model):
        if weights in ("pretrained", "random"):
            raise UsageError(
                f"--weights {weights} was given for the factory {model}, which decides about its weights "
                "itself.",
                expected="No --weights, or a file of them, was expected.",
                do="Leave out --weights, or give a file.",
            )
    elif weights is None:
        raise UsageError(
            f"The network {model} comes without weights.",
            expected="--weights pretrained, random or FILE was expected.",
            do="Give --weights, or in place of the network's name the folder of a finished run.",
        )


def open_source(
    model: str, run: Run | None, weights: str | None, *, n_classes: int | None, seed: int, trust: str | None
) -> Source:
    """Make the network. n_classes: of the data, None to take the network's own number.  seed: of random
    weights.

    Raises what `network_of_run`, `load_weights`, `pretrained` and `models.create` raise.
    """
    require_weights(model, run, weights)
    if run is not None:
        network = network_of_run(run, trusted=trust)
        origin = {"from": "run", "path": str(run.path.resolve()), "sha256": sha256_file(run.path / RUN_FILE)}
        masks = masks_of_run(run, network)
        return Source(name=str(run.info.model.name), network=network, masks=masks, origin=origin)
    if weights == "pretrained":
        network, origin = pretrained(model), {"from": "pretrained"}
    else:
        torch.manual_seed(seed)
        network, origin = models.create(model, n_classes), {"from": "factory"}
        if weights == "random":
            origin = {"from": "random"}
        elif weights is not None:
            load_weights(network, Path(weights))
            origin = {
                "from": "file",
                "path": str(Path(weights).resolve()),
                "sha256": sha256_file(Path(weights)),
            }
    return Source(name=model, network=network.cpu().eval(), masks={}, origin=origin)
