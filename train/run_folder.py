"""The finished run on disk: weights, masks and `run.json`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from sparse_export import trust
from sparse_export.errors import SparseExportError, UsageError
from sparse_export.files import claimed, is_leftover, remove_leftovers, write_bytes
from sparse_export.formats.listed import file_infos
from sparse_export.formats.run import (
    MASKS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    Run,
    RunInfo,
    read_run_info,
    run_digest,
    save_run_info,
)
from sparse_export.train.checkpoint import state_path
from sparse_export.train.metrics import EVENTS_FOLDER, METRICS_FILE
from sparse_export.train.recipe import own_code_of


def require_empty(folder: Path) -> None:
    """Raise UsageError when the folder holds more than what a killed process left of a file."""
    if folder.exists() and (
        not folder.is_dir() or any(not is_leftover(entry.name) for entry in folder.iterdir())
    ):
        found, unfinished = "something else", False
        if (folder / RUN_FILE).is_file():
            found, unfinished = "a run", _is_unfinished(folder)
        raise UsageError(
            f"{folder} already holds {found}.",
            expected="A new or empty folder was expected, so that nothing is lost.",
            do="Choose another one with --out"
            + (", or go on with this run by --resume." if unfinished else "."),
        )


def remove_unstarted(folder: Path) -> None:
    """Remove a run that ended before its first state was saved, as by an error in the network's forward.

    There is nothing in it to go on with. A folder that holds anything else, or an epoch's figures, stays.
    """
    if not _is_unfinished(folder) or state_path(folder).exists():
        return
    own = {RUN_FILE, METRICS_FILE, EVENTS_FOLDER}
    entries = [entry for entry in folder.iterdir() if not is_leftover(entry.name)]
    metrics = folder / METRICS_FILE
    if {entry.name for entry in entries} <= own and not (metrics.exists() and metrics.stat().st_size):
        for entry in entries:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _is_unfinished(folder: Path) -> bool:
    """Is this a run that `train --resume` goes on with?"""
    try:
        return read_run_info(folder).status != "complete"
    except SparseExportError:
        return False


@contextmanager
def claimed_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder that is to be written, without the files that killed processes left in it
    unfinished.

    Raises FolderInUse where another process is writing it, and OutputError.
    """
    with claimed(folder):
        for place in (folder, state_path(folder).parent):
            remove_leftovers(place)
        yield


def write_run_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`; one that names code to import is entered first in this user's
    own trust store.
    """
    named = {"model": info.model.name, "task": info.task.name, "data": info.data and info.data.name}
    if own_code_of(info.recipe) or own_code_of(named):
        trust.remember(run_digest(info))
    save_run_info(folder, info)


def finish_run(folder: Path, module: nn.Module, masks: Mapping[str, Tensor], info: RunInfo) -> Run:
    """Write weights and masks, then `run.json` over them with status `complete`.

    Masked-out weights are written as +0.0, whatever sign their zero had, under every name that they have.

    Args:
        folder: of the run.
        module: whose weights are written.
        masks: bool, by parameter name.
        info: the record, without files.

    Returns:
        The finished run, which holds the module.

    Raises:
        OutputError: it cannot be written.
    """
    mask_of = {id(value): masks[name] for name, value in module.named_parameters() if name in masks}
    names = module.named_parameters(remove_duplicate=False)
    every = {name: mask_of[id(value)] for name, value in names if id(value) in mask_of}
    state = {name: _plain(value, every.get(name)) for name, value in module.state_dict().items()}
    write_bytes(folder / WEIGHTS_FILE, save(state))
    write_bytes(folder / MASKS_FILE, save({name: mask.cpu().contiguous() for name, mask in masks.items()}))
    files = file_infos(folder, (WEIGHTS_FILE, MASKS_FILE))
    info = replace(info, status="complete", files=files)
    write_run_info(folder, info)
    return Run(path=folder, info=info, module=module)


def weights_sha256(module: nn.Module) -> str:
    """Compute the hex SHA-256 of the weights and buffers of a network, by name and order."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_plain(value, None).flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of its own on the CPU: tied weights would share memory, which safetensors refuses."""
    value = value.detach()
    if mask is not None:
        value = torch.where(mask, value, 0)
    return value.cpu().clone(memory_format=torch.contiguous_format)
