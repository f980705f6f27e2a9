"""`preprocess.onnx` of a bundle, held against the loader that the network was trained with."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparse_export.errors import GateFailed, UsageError
from sparse_export.files import temporary_folder, write_bytes
from sparse_export.formats.preparation import PREPROCESS_FILE, PreprocessInfo
from sparse_export.formats.run import DataInfo, RunInfo
from sparse_export.graph.preprocess import array_graph, picture_graph
from sparse_export.runtimes.onnxruntime import open_session
from sparse_export.signature import Array, TensorInfo
from sparse_export.tasks import data
from sparse_export.tasks.data import imagefolder

__all__ = ["holds_uint8", "require_preprocessable", "write_preprocess"]

_GOLDEN_INPUT, _GOLDEN_OUTPUT = "golden/picture.npy", "golden/preprocessed.npy"
_N_SAMPLES = 2
_SEED = 31
_CELLS = 9  # of the pattern that a golden picture is a smooth enlargement of
_LEVELS = 2  # of 255, that scaling in two steps may round away
_ATOL = 1e-5
_PICTURES = "imagefolder:"


def require_preprocessable(info: RunInfo) -> TensorInfo:
    """Check that a run says how its inputs are made of raw samples.

    Args:
        info: of the run.

    Returns:
        The input of its network.

    Raises:
        UsageError: it names no data set, or one whose samples are taken as they are, or its network has other
            inputs than one of floats.
    """
    if info.data is None:
        raise UsageError(
            "--preprocess was given, and the run names no data set, whose mean and deviation it needs.",
            do="Give --data with a network by name, or leave --preprocess out.",
        )
    if not info.data.mean:
        raise UsageError(
            f"--preprocess was given, and the samples of {info.data.name} are taken as they are.",
            do="Leave it out: there is nothing to prepare that this program knows of.",
        )
    taken = info.signature.only_input
    if taken is None or taken.dtype != "float32" or not all(isinstance(one, int) for one in taken.shape[1:]):
        raise UsageError(
            f"--preprocess was given, and the network takes {', '.join(map(str, info.signature.inputs))}.",
            do="Leave it out: it makes one input of float32 samples of fixed size.",
        )
    return taken


def write_preprocess(stage: Path, info: RunInfo, data_dir: str | Path | None) -> PreprocessInfo:
    """Write the graph that makes the network's input, with raw samples and what the training's loader makes
    of them.

    Args:
        stage: folder of the bundle.
        info: of a run that `require_preprocessable` lets pass.
        data_dir: where the data sets lie; it is looked at for `npz:` alone, whose type the run does not tell.

    Returns:
        The record.

    Raises:
        DataNotFound: that data set is not there.
        GateFailed: the graph makes something else than the loader.
        OutputError: a file cannot be written.
    """
    taken, source = require_preprocessable(info), info.data
    assert source is not None
    mean, std = source.mean, source.std
    if source.name.startswith(_PICTURES):
        model, raw = picture_graph(
            taken, crop_ratio=source.crop_ratio, mean=mean, std=std, interpolation=source.interpolation
        )
        samples = _drawn_pictures(info.signature.input_shape[1:])
        wanted = _by_loader(samples, source, info.signature.input_shape)
        allowed = _LEVELS / 255 / min(std) + _ATOL
    else:
        is_uint8 = holds_uint8(source.name, data_dir)
        model, raw = array_graph(taken, is_uint8=is_uint8, mean=mean, std=std)
        generator = np.random.default_rng(_SEED)
        shape = (_N_SAMPLES, *(size for size in raw.shape[1:] if isinstance(size, int)))
        samples = (
            generator.integers(0, 256, shape, dtype=np.uint8)
            if is_uint8
            else generator.standard_normal(shape, dtype=np.float32)
        )
        channels_first = np.moveaxis(samples, -1, 1) if is_uint8 else samples
        wanted = data.normalise(torch.from_numpy(channels_first.copy()), mean, std).numpy()
        allowed = _ATOL
    write_bytes(stage / PREPROCESS_FILE, model.SerializeToString(deterministic=True))
    with open_session(stage / PREPROCESS_FILE, n_threads=1) as session:
        found = session.run({raw.name: samples})[taken.name]
    difference = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    if not difference <= allowed:
        raise GateFailed(
            f"{PREPROCESS_FILE} differs from the training's loader by {difference:.3g}.",
            expected=f"At most {allowed:.3g} is allowed.",
            do="Use the onnxruntime of constraints.txt; nothing was written.",
        )
    for name, array in ((_GOLDEN_INPUT, samples), (_GOLDEN_OUTPUT, wanted)):
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        write_bytes(stage / name, stream.getvalue())
    return PreprocessInfo(
        input=raw,
        golden_input=_GOLDEN_INPUT,
        golden_output=_GOLDEN_OUTPUT,
        largest_difference=difference,
        allowed_difference=allowed,
    )


def holds_uint8(name: str, data_dir: str | Path | None) -> bool:
    """Are the samples of a data set uint8 pictures? Those of a named set, and of a folder, are.

    Args:
        name: of the data set.
        data_dir: where a relative `npz:FILE` starts.

    Raises:
        DataNotFound: an `npz:FILE` is not there.
    """
    if name in data.names() or name.startswith(_PICTURES):
        return True
    found = data.load(name, None if data_dir is None else Path(data_dir), classes=False)
    return found.x_test.dtype == torch.uint8


def _drawn_pictures(size: tuple[int, ...]) -> Array:
    """Smooth pictures, uint8 (samples, height, width, 3), larger than the network's, of other proportions."""
    height, width = size
    cells = np.random.default_rng(_SEED).integers(0, 256, (_N_SAMPLES, _CELLS, _CELLS, 3), dtype=np.uint8)
    larger = (2 * width + 5, height + height // 2 + 3)
    pictures = [Image.fromarray(one).resize(larger, Image.Resampling.BICUBIC) for one in cells]
    return np.stack([np.asarray(one) for one in pictures])


def _by_loader(pictures: Array, source: DataInfo, shape: tuple[int, ...]) -> Array:
    """What training reads of these pictures, from files."""
    with temporary_folder() as folder:
        crops = []
        for number, picture in enumerate(pictures):
            file = folder / f"{number}.png"
            Image.fromarray(picture).save(file)
            crops.append(
                imagefolder.center_crop(file, (shape[1], shape[2]), source.crop_ratio, source.interpolation)
            )
    found: Array = data.normalise(torch.stack(crops), source.mean, source.std).numpy()
    return found
