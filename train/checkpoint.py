"""The state of an unfinished training run, in one file that is written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import write_bytes
from sparse_export.models.weights import load_unversioned
from sparse_export.train.ema import Ema
from sparse_export.train.sparsifier import Sparsifier

FORMAT = "3"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in its run the training stands.

    Args:
        step: optimizer steps done.
        epoch: epochs finished.
        step_in_epoch: steps done in the current one.
        n_updates_before: mask updates before the current epoch.
        loss_sum: of the current epoch's steps so far, over all processes.
        seconds: trained so far.
        metrics_bytes: length of `metrics.jsonl` that belongs to this state; what lies beyond was written
            after it.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    n_updates_before: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    metrics_bytes: int = 0


def state_path(run: Path) -> Path:
    return run / "resume" / "state.safetensors"


def save_state(
    run: Path,
    position: Position,
    model: nn.Module,
    optimizer: Optimizer,
    sparse: Sparsifier | None,
    ema: Ema | None = None,
) -> None:
    """Write `resume/state.safetensors`: weights, optimizer, masks, average and position.

    No random state: what training draws follows from the seed and the step. So the state can be taken up on
    another kind of device and by another number of processes.

    Args:
        run: its folder.
        position: where the training stands.
        model, optimizer, sparse, ema: of the training; None where there is none.

    Raises:
        OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    scalars: dict[str, Any] = {}
    for index, entries in optimizer_state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = value
    sparse_scalars: dict[str, Any] = {}
    for key, entry in (sparse.state_dict() if sparse is not None else {}).items():
        if isinstance(entry, Mapping):
            tensors |= {f"sparse.{key}.{name}": value for name, value in entry.items()}
        else:
            sparse_scalars[key] = entry
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.average.items()}
    header = {
        "format": FORMAT,
        "position": json.dumps(asdict(position)),
        "optimizer": json.dumps(
            {"param_groups": optimizer_state["param_groups"], "scalars": scalars},
            default=float,  # a learning rate that lies on the device
        ),
        "sparse": json.dumps(sparse_scalars),
        "ema": json.dumps(ema and {"n_steps": ema.n_steps}),
    }
    # Copies: tied weights share memory, which safetensors refuses.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    write_bytes(state_path(run), save(plain, header))


def load_state(
    run: Path,
    model: nn.Module,
    optimizer: Optimizer,
    sparse: Sparsifier | None,
    ema: Ema | None = None,
) -> Position:
    """Put a saved state back in place.

    Args:
        run: its folder.
        model, optimizer, sparse, ema: of the training, as at its start; changed in place.

    Returns:
        Where the training stands.

    Raises:
        ArtefactError: the file cannot be read, or belongs to another network.
    """
    path = state_path(run)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as cause:
        raise ArtefactError(
            f"{path} cannot be read: {cause}.",
            expected="The saved state of an unfinished run was expected.",
            do="Start the run again in another folder.",
        ) from cause
    if header.get("format") != FORMAT:
        raise ArtefactError(
            f"{path} has format {header.get('format')!r}.",
            expected=f"Format {FORMAT} was expected.",
            do="Resume with the release of sparse-export that started the run.",
        )
    try:
        load_unversioned(model, _below(tensors, "model."))
        _load_optimizer(optimizer, json.loads(header["optimizer"]), _below(tensors, "optimizer."))
        if sparse is not None:
            sparse.load_state_dict(json.loads(header["sparse"]) | _tables(_below(tensors, "sparse.")))
        if ema is not None:
            ema.load(_below(tensors, "ema."), json.loads(header["ema"])["n_steps"])
        position = Position(**json.loads(header["position"]))
    except (RuntimeError, ValueError, KeyError, TypeError, UsageError) as cause:
        raise ArtefactError(
            f"{path} does not belong to this network: {cause}.",
            expected="The state that this run saved was expected.",
            do="Start the run again in another folder.",
        ) from cause
    return position


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _tables(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`masks.fc.weight` and its like as {"masks": {"fc.weight": ...}}."""
    tables: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        table, _, key = name.partition(".")
        tables.setdefault(table, {})[key] = value
    return tables


def _load_optimizer(optimizer: Optimizer, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for source in (tensors, header["scalars"]):
        for name, value in source.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": header["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                order_like = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                entries[key] = order_like.copy_(value)  # in the memory order of its weight
