"""What a killed sparsify leaves of the layers that it had finished, for the next one to go on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_export.files import is_leftover, remove_leftovers, require_writable, write_bytes
from sparse_export.oneshot.parted import Parted
from sparse_export.oneshot.report import SparsifiedLayer
from sparse_export.signature import Array, Feeds
from sparse_export.train.run_folder import require_empty

__all__ = ["FinishedWeight", "State", "bits_of", "digest_of", "remove_state", "state_folder"]

_FOLDER = "resume-sparsify"
_FORMAT = "5"
_WEIGHT, _MASK = "weight", "mask"
_BESIDE = "beside:"


@contextlib.contextmanager
def state_folder(out: Path) -> Iterator[Path]:
    """Where a call notes finished layers that writes a run to `out`.

    When the block ends with an error, what no layer was left in is removed.

    Args:
        out: folder of the run, in which nothing but such notes may stand.

    Yields:
        A folder in it, which need not be there.

    Raises:
        UsageError: something else stands in `out`.
    """
    folder = out / _FOLDER
    others = (
        [one for one in out.iterdir() if one != folder and not is_leftover(one.name)] if out.is_dir() else []
    )
    if others or not folder.is_dir():
        require_empty(out)
    try:
        yield folder
    except BaseException:
        for one in (folder, out):
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def remove_state(folder: Path) -> None:
    """Remove the notes of finished layers, which are needed no more."""
    if folder.is_dir():
        for one in folder.iterdir():
            one.unlink()
        folder.rmdir()


@dataclass(frozen=True, kw_only=True)
class FinishedWeight:
    """A weight after pruning, as it is stored in the graph.

    Attributes:
        weight: its values.
        mask: of them.
        layer: what the report says.
        beside: other stored tensors that were changed with it, by name.
    """

    weight: Tensor
    mask: Tensor
    layer: SparsifiedLayer
    beside: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class State:
    """Finished weights in a folder.

    Attributes:
        folder: one file a weight; what stands there of other graphs, inputs or options is not looked at.
        digest: of everything that the values depend on, see `digest_of`.
    """

    folder: Path
    digest: str

    def open(self) -> None:
        """Make the folder, and remove what was half written.

        Raises:
            OutputError: nothing can be written there.
        """
        require_writable(self.folder)
        remove_leftovers(self.folder)

    def save(self, number: int, finished: FinishedWeight) -> None:
        """Write a weight, whole or not at all.

        Args:
            number: of the weight among those that are pruned.
            finished: of it.

        Raises:
            OutputError: it cannot be written.
        """
        notes = {
            "format": _FORMAT,
            "digest": self.digest,
            "layer": json.dumps(asdict(finished.layer)),
            "sha256": bits_of(finished.weight, finished.mask, *finished.beside.values()),
        }
        tensors = {_WEIGHT: finished.weight, _MASK: finished.mask}
        tensors |= {_BESIDE + name: one for name, one in finished.beside.items()}
        write_bytes(self._file(number), save(tensors, notes))

    def load(self, number: int, name: str) -> FinishedWeight | None:
        """Read a weight that an earlier process finished.

        Args:
            number: as of `save`.
            name: of the weight.

        Returns:
            The weight; None where there is none, or none that can be read.
        """
        try:
            with safe_open(self._file(number), framework="pt") as stored:
                notes: Mapping[str, str] = stored.metadata() or {}
                if (notes.get("format"), notes.get("digest")) != (_FORMAT, self.digest):
                    return None
                layer = pydantic.TypeAdapter(SparsifiedLayer).validate_json(notes["layer"])
                weight, mask = stored.get_tensor(_WEIGHT), stored.get_tensor(_MASK)
                names = sorted(key for key in stored.keys() if key.startswith(_BESIDE))  # noqa: SIM118
                beside = {key.removeprefix(_BESIDE): stored.get_tensor(key) for key in names}
                if notes["sha256"] != bits_of(weight, mask, *beside.values()):
                    return None
        except (OSError, SafetensorError, KeyError, ValueError):  # a damaged file is made again
            return None
        if layer.name != name:
            return None
        return FinishedWeight(weight=weight, mask=mask, layer=layer, beside=beside)

    def _file(self, number: int) -> Path:
        return self.folder / f"{self.digest[:12]}-{number:05}.safetensors"


def bits_of(*tensors: Tensor) -> str:
    """The SHA-256 of the values of tensors."""
    digest = hashlib.sha256()
    for one in tensors:
        # A copy: an axis of one entry may have any stride, and yet count as contiguous.
        plain = one.clone(memory_format=torch.contiguous_format).reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of(graph: Parted, batches: Iterable[Feeds], options: Mapping[str, Any]) -> str:
    """The SHA-256 of a graph with its weights, inputs and options.

    Args:
        graph: with the values of its weights.
        batches: the calibration inputs.
        options: made of what JSON has.
    """
    model = graph.model
    found = hashlib.sha256(json.dumps([_FORMAT, options], sort_keys=True).encode())
    bare = onnx.GraphProto()
    bare.node.extend(model.graph.node)
    bare.input.extend(model.graph.input)
    bare.output.extend(model.graph.output)
    bare.sparse_initializer.extend(model.graph.sparse_initializer)
    found.update(bare.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        found.update(hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest())
        if tensor.name in graph.values:
            found.update(hashlib.sha256(_contiguous(graph.values[tensor.name]).data).digest())
    for number, feeds in enumerate(batches):
        for name, array in feeds.items():
            found.update(f"{number} {name} {array.dtype} {array.shape} ".encode())
            found.update(hashlib.sha256(_contiguous(array).data).digest())
    return found.hexdigest()


def _contiguous(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
