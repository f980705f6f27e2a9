"""The processes that train one network together, started by torchrun; or one process alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparse_export.errors import ProcessLost, RanksDiverged, UsageError

_TIMEOUT = timedelta(minutes=10)  # longer than any pause between two steps, an evaluation included


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among those that train together.

    Args:
        rank: 0 to size - 1; rank 0 writes the run.
        size: number of processes.
        local_rank: among the processes of this machine.
        control: a group on the CPU for what must not wait for a device; None when alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch, as even as can be, in order. rows: (N, ...), N at least `size`."""
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, in float64, the same bits in each."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return list(tensor.tolist())

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes, in their order; empty ones are left out."""
        if self.size == 1:
            return [array]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, array, group=self.control)
        return [one for one in found if len(one)]

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite the tensors, in place, with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


ALONE = World()


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What the processes decided together. loss: the sum over them."""

    stop: bool = False
    save: bool = False
    loss: float = 0.0


class Agreement:
    """Decisions that every process takes after the same step, without waiting for the others.

    What is put in after one step is agreed on after the next; alone, at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def exchange(self, *, stop: bool, save: bool, loss: float) -> Agreed:
        if self._world.size == 1:
            return Agreed(stop=stop, save=save, loss=loss)
        before = self.finish()
        tensor = torch.tensor([stop, save, loss], dtype=torch.float64)
        self._pending = dist.all_reduce(tensor, group=self._world.control, async_op=True), tensor
        return before

    def finish(self) -> Agreed:
        """What was put in last and not agreed on yet; nothing when there is none."""
        if self._pending is None:
            return Agreed()
        (work, tensor), self._pending = self._pending, None
        work.wait()
        stop, save, loss = tensor.tolist()
        return Agreed(stop=stop > 0, save=save > 0, loss=loss)


def torchrun_world_size() -> int:
    """How many processes torchrun says there are; 1 outside of it.

    Raises UsageError for what is no number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(
            f"The environment has WORLD_SIZE={text!r}.",
            expected="A number of processes, as torchrun sets it, was expected.",
            do="Start with torchrun, or unset it.",
        )
    return int(text)


def is_first_process() -> bool:
    """Is this the process that writes the run?

    Known before `joined`. Raises UsageError as `torchrun_world_size` does.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return torchrun_world_size() == 1 or os.environ.get("RANK", "0") == "0"


def was_restarted() -> bool:
    """Did torchrun start these processes again after some of them failed (--max-restarts)?"""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


@contextmanager
def joined(device_type: str) -> Iterator[World]:
    """The world that torchrun made, or that the caller has initialised already; alone where neither is so.

    What is opened here is closed again.

    Args:
        device_type: `cuda` exchanges gradients by NCCL, anything else by gloo.

    Raises:
        UsageError: torchrun's variables are not whole.
        ProcessLost: the others cannot be reached.
    """
    mine = not (dist.is_available() and dist.is_initialized())
    size = torchrun_world_size() if mine else dist.get_world_size()
    if size == 1:
        yield ALONE
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if mine:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set.",
                expected="All the variables that torchrun sets were expected.",
                do="Start with `torchrun --nproc-per-node N -m sparse_export train ...`.",
            )
        with others_reachable():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        on_cpu = dist.get_backend() == "gloo"
        control: Any = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=_TIMEOUT)
        yield World(rank=dist.get_rank(), size=size, local_rank=local_rank, control=control)
    except ProcessLost:
        raise  # closing would wait for those that are gone, and hold back the message
    except BaseException:
        _close(mine)
        raise
    else:
        dist.barrier(group=control)  # nobody hangs up while another still listens
        _close(mine)


def _close(mine: bool) -> None:
    if mine:
        dist.destroy_process_group()


@contextmanager
def others_reachable(do: str = "") -> Iterator[None]:
    """Turn a failure to exchange with the other processes into ProcessLost. do: how to go on."""
    try:
        yield
    except RuntimeError as cause:  # gloo's failures have no type of their own
        if not (isinstance(cause, dist.DistError) or "gloo" in str(cause).lower()):
            raise
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no reason given")
        raise ProcessLost(
            f"Another process of this training ended or cannot be reached: {reason[:300].rstrip('.')}.",
            expected="All the processes that torchrun started were expected to go on together.",
            do=do,
        ) from cause


def masks_sha256(masks: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of masks: for each layer in order its name, its shape and its bits, packed.

    Reads the device.
    """
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {tuple(mask.shape)}\n".encode())
        digest.update(np.packbits(mask.cpu().contiguous().numpy()).data)
    return digest.hexdigest()


def train_together(group: Any = None) -> bool:
    """Are there several processes, of all or of a group, that torch.distributed has joined?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def require_same_masks(digest: str, group: Any = None) -> None:
    """Hold the masks of all processes to each other.

    Args:
        digest: of `masks_sha256`.
        group: the processes that hold the same weights; None for all.

    Raises:
        RanksDiverged: in every process, where not all came with the same digest.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, digest, group=group)
    if len(set(gathered)) > 1:
        odd = [rank for rank, other in enumerate(gathered) if other != gathered[0]]
        raise RanksDiverged(
            f"The masks of rank {', '.join(map(str, odd))} differ from those of rank 0.",
            expected="Every process was expected to hold the same weights, momentum and masks.",
            do="Give every process the same network and optimizer, reduce all gradients before the step, and "
            "use one release of torch on one kind of device.",
        )
