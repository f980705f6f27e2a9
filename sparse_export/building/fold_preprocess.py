"""The normalization of raw samples folded into the graph of a bundle, held against that of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx

from sparse_export.building.golden import ATOL, GOLDEN_SAMPLES, Golden
from sparse_export.building.preprocess import holds_uint8
from sparse_export.engines.precision import TOLERANCE
from sparse_export.errors import GateFailed, UsageError
from sparse_export.files import temporary_folder
from sparse_export.formats.preparation import FoldedInfo, RawType
from sparse_export.formats.run import RunInfo
from sparse_export.graph.passes.fold_preprocess import with_folded_preprocess
from sparse_export.graph.saved import save_model
from sparse_export.runtimes import Session
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.runtimes.prepared import PreparedSession
from sparse_export.runtimes.tolerance import differences
from sparse_export.signature import Array, Signature

__all__ = ["RawInput", "by_channel", "folded_graph", "raw_input_of", "require_foldable"]

_LEVELS = 255
_SEED = 37
_SMALLEST_STD = 1e-6


@dataclass(frozen=True, kw_only=True)
class RawInput:
    """The raw samples that a graph is to take.

    Attributes:
        mean: of each channel, after pictures were scaled to 0 to 1.
        std: of each channel.
        dtype: of the samples.
        levels: they are pictures of 0 to 255.
        signature: of the network, with raw samples in place of its input.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: RawType
    levels: bool
    signature: Signature

    def session(self, network: Session) -> Session:
        """A session that takes raw samples, of one that takes normalized ones."""
        return PreparedSession(network, self.signature, levels=self.levels, mean=self.mean, std=self.std)

    def drawn(self) -> dict[str, Array]:
        """Random raw samples, as many as a golden pair has."""
        (taken,) = self.signature.inputs
        shape = taken.sizes(self.signature.with_sizes(GOLDEN_SAMPLES))
        generator = np.random.default_rng(_SEED)
        if self.levels:
            return {taken.name: generator.integers(0, _LEVELS + 1, shape).astype(self.dtype)}
        per_channel = (-1, *(1,) * (len(shape) - 2))
        mean, std = (np.reshape(one, per_channel) for one in (self.mean, self.std))
        return {taken.name: (generator.standard_normal(shape) * std + mean).astype(np.float32)}

    def require_raw(self, samples: Sequence[Mapping[str, Array]], source: str | Path) -> None:
        """Check that floats which are given as raw pictures are no normalized ones.

        Args:
            samples: the batches, with the network's only input.
            source: where they are from.

        Raises:
            UsageError: some are outside 0 to 255, or none is above 1.
        """
        if not self.levels or self.dtype != "float32" or not samples:
            return
        name = self.signature.input_names[0]
        least = min(float(batch[name].min()) for batch in samples)
        most = max(float(batch[name].max()) for batch in samples)
        if least < 0 or not 1 < most <= _LEVELS:
            raise UsageError(
                f"The samples of {source} go from {least:.4g} to {most:.4g}.",
                expected="Raw pictures of 0 to 255 were expected, as the graph is to normalize them.",
                do="Give pictures that are neither scaled nor normalized.",
            )


def by_channel(name: str, values: object) -> tuple[float, ...]:
    """A mean or deviation of each channel, as numbers.

    Args:
        name: `mean` or `std`.
        values: a sequence or array of numbers, for pictures in 0 to 1; None for none.

    Raises:
        UsageError: it is something else, or a number is out of range.
    """
    if values is None:
        return ()
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # lists of several lengths; a tensor on another device
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iuf"):
        raise UsageError(
            f"{name} is {values!r}.",
            expected="A number for each channel was expected, as in (0.5, 0.5, 0.5).",
        )
    found = tuple(float(one) for one in array)
    if not all(math.isfinite(one) and (name == "mean" or one >= _SMALLEST_STD) for one in found):
        bounds = "Finite numbers were" if name == "mean" else f"Numbers of {_SMALLEST_STD:f} and more were"
        raise UsageError(f"{name} is {values!r}.", expected=f"{bounds} expected.")
    if any(abs(one) > 1 for one in found):
        raise UsageError(
            f"{name} is {values!r}, and pictures are scaled to 0 to 1 before.",
            do="Divide the numbers by 255.",
        )
    return found


def require_foldable(
    info: RunInfo, dtype: RawType, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> None:
    """Check that it is known how a network's only input is made of raw samples, before any work.

    Args:
        info: of the run.
        dtype: of the raw samples.
        mean: of each channel of pictures in 0 to 1, for a run that names no data set.
        std: likewise.

    Raises:
        UsageError: the type is none of raw samples; neither the run nor the caller says how samples are
            normalized, or both do; the data set's samples are taken as they are; the numbers do not fit the
            channels; or the network has other inputs than one of float32 with a free batch size.
    """
    if dtype not in get_args(RawType):
        raise UsageError(
            f"fold is {dtype!r}.", expected=f"One of {', '.join(get_args(RawType))} was expected."
        )
    option = f"--fold-preprocess {dtype} was given"
    if info.data is None and not (mean and std):
        raise UsageError(
            f"{option}, and nothing says how pictures become the network's input.",
            do="Give --mean and --std, as in (x / 255 - mean) / std by channel: --mean 0,0,0 --std 1,1,1 for "
            "a network that takes pictures in 0 to 1. Or give --data with a network by name, or leave "
            "--fold-preprocess out.",
        )
    if info.data is not None and (mean or std):
        raise UsageError(
            f"--mean or --std was given, and the run normalizes samples as {info.data.name} does.",
            do="Leave them out.",
        )
    if info.data is not None and not info.data.mean:
        raise UsageError(
            f"{option}, and the samples of {info.data.name} are taken as they are.",
            do="Leave it out: there is nothing to fold.",
        )
    taken = info.signature.only_input
    if info.signature.batch is None:
        raise UsageError(
            f"{option}, and the network takes {', '.join(map(str, info.signature.inputs))}: its batch size "
            "is fixed.",
            do="Export it with a free batch size, as by dynamic_axes of torch.onnx.export, or leave "
            "--fold-preprocess out.",
        )
    if taken is None or taken.dtype != "float32":
        raise UsageError(
            f"{option}, and the network takes {', '.join(map(str, info.signature.inputs))}.",
            do="Leave it out: it folds what makes one input of float32 samples.",
        )
    n_channels = taken.shape[1] if len(taken.shape) > 1 else None
    if info.data is None and not len(mean) == len(std) == n_channels:
        raise UsageError(
            f"--mean has {len(mean)} and --std {len(std)} numbers, and the network takes {taken}.",
            do="Give one for each channel, the second axis"
            + (f": {n_channels}." if isinstance(n_channels, int) else ", if that has a fixed size.")
            + " Channels along another axis cannot be folded.",
        )


def raw_input_of(
    info: RunInfo,
    dtype: RawType | None,
    data_dir: str | Path | None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> RawInput | None:
    """What a graph takes whose input is to be raw.

    Args:
        info: of a run that `require_foldable` lets pass.
        dtype: of the raw samples; None where nothing is to be folded.
        data_dir: where the data sets lie; it is looked at for `npz:` alone, whose type the run does not tell.
        mean: of each channel of pictures in 0 to 1, for a run that names no data set.
        std: likewise.

    Returns:
        None where nothing is to be folded.

    Raises:
        UsageError: samples that are floats are to be taken as uint8.
        DataNotFound: the data set is not there.
    """
    if dtype is None:
        return None
    (taken,) = info.signature.inputs
    signature = replace(info.signature, inputs=(replace(taken, dtype=dtype),))
    if info.data is None:
        return RawInput(mean=tuple(mean), std=tuple(std), dtype=dtype, levels=True, signature=signature)
    levels = holds_uint8(info.data.name, data_dir)
    if dtype == "uint8" and not levels:
        raise UsageError(
            f"--fold-preprocess uint8 was given, and the samples of {info.data.name} are floats.",
            do="Give --fold-preprocess float32.",
        )
    return RawInput(mean=info.data.mean, std=info.data.std, dtype=dtype, levels=levels, signature=signature)


def folded_graph(model: onnx.ModelProto, raw: RawInput, golden: Golden) -> tuple[onnx.ModelProto, FoldedInfo]:
    """Fold the normalization into a graph of float32, and hold its outputs against those of the network.

    Args:
        model: with its data; not changed.
        raw: what it is to take.
        golden: raw samples, and the outputs of the network behind the training's normalization.

    Returns:
        The graph that takes raw samples, and the record.

    Raises:
        GateFailed: its outputs differ by more than the tolerance of float32.
    """
    found = with_folded_preprocess(
        model, levels=_LEVELS if raw.levels else 1, mean=raw.mean, std=raw.std, dtype=raw.dtype
    )
    wanted = {name: one for name, one in golden.outputs.items() if name not in golden.inner}
    with temporary_folder() as folder:
        file = folder / "model.onnx"
        save_model(found.model, file)
        with open_session(file, signature=replace(raw.signature, appended=())) as session:
            outputs = session.run(golden.inputs)
    compared = differences(outputs, wanted, atol=ATOL, rtol=TOLERANCE["fp32"])
    largest = max((one.max_relative_difference or 0.0 for one in compared), default=0.0)
    wrong = [one.name for one in compared if not one.ok]
    if wrong:
        raise GateFailed(
            f"With the normalization folded into it, {wrong[0]} of the graph differs from the network's by "
            f"{largest:.3g} of its spread.",
            expected=f"At most {TOLERANCE['fp32']:g} is allowed.",
            do="Leave --fold-preprocess out, and normalize samples before the network; nothing was written.",
        )
    return found.model, FoldedInfo(
        dtype=raw.dtype,
        levels=raw.levels,
        mean=raw.mean,
        std=raw.std,
        place=found.place,
        weight=found.weight,
        largest_difference=largest,
        allowed_difference=TOLERANCE["fp32"],
    )
