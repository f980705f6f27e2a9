"""The models around a network that takes raw samples: preprocessing, decoding, and ensembles of the steps."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sparse_export.errors import ArtefactError
from sparse_export.files import json_bytes, write_bytes
from sparse_export.formats.bundle import MODEL_FILE
from sparse_export.formats.listed import bytes_of
from sparse_export.formats.preparation import PREPROCESS_FILE, PreprocessInfo
from sparse_export.serving.label_file import LABELS_FILE, labelled_outputs, labels_text
from sparse_export.serving.model_config import check_config, config_text, ensemble_text
from sparse_export.serving.repository import CONFIG_FILE, Runtime, Served, model_document
from sparse_export.serving.settings import ModelSettings
from sparse_export.serving.tensors import Interface, TensorSpec, interface_of
from sparse_export.signature import Array, Signature

__all__ = [
    "PictureModels",
    "golden_samples",
    "picture_identity",
    "picture_models",
    "preprocess_signature",
    "write_picture_models",
]

_HERE = Path(__file__).parent
FILE = TensorSpec(name="file", dtype="UINT8", dims=(-1,))
"""The bytes of a picture file."""
_KEPT = ".keep"  # an ensemble has no files, and its version's folder would be lost in a copy
_BETWEEN = "preprocessed"


@dataclass(frozen=True, kw_only=True)
class PictureModels:
    """The names of these models.

    Attributes:
        network: the model that they surround.
        preprocess: makes the network's input of raw samples.
        raw: ensemble that takes raw samples.
        decode: decodes a picture file; None where samples are no pictures of any size, or nothing runs it.
        file: ensemble that takes a picture file; None likewise.
        takes_pictures: samples are pictures of any size.
    """

    network: str
    preprocess: str
    raw: str
    decode: str | None
    file: str | None
    takes_pictures: bool

    @property
    def names(self) -> tuple[str, ...]:
        """All but the network."""
        every = (self.preprocess, self.raw, self.decode, self.file)
        return tuple(name for name in every if name is not None)

    @property
    def single(self) -> tuple[str | None, ...]:
        """Those that take one sample at a time: files become pictures of different sizes."""
        return (self.decode, self.file)


def picture_models(served: Served, network: str, *, runs_python: bool) -> PictureModels | None:
    """Name the models around a network.

    Args:
        served: the bundle.
        network: name of the network's model.
        runs_python: whether the server has the Python backend, which decodes.

    Returns:
        The names; None for a bundle without `preprocess.onnx`, or whose requests are not merged.
    """
    info = served.bundle.info.preprocess
    if info is None or not served.interface.batched:
        return None
    takes_pictures = "height" in info.input.shape
    decodes = runs_python and takes_pictures
    return PictureModels(
        network=network,
        preprocess=f"{network}-preprocess",
        raw=f"{network}-{info.input.name}",
        decode=f"{network}-decode" if decodes else None,
        file=f"{network}-file" if decodes else None,
        takes_pictures=takes_pictures,
    )


def preprocess_signature(served: Served) -> Signature:
    """Return what `preprocess.onnx` takes and gives, with the sizes of its golden samples as examples."""
    info = _info(served)
    shape = golden_samples(served)[0].shape
    free = {size: n for size, n in zip(info.input.shape, shape, strict=True) if isinstance(size, str)}
    batch = str(served.signature.batch)
    return Signature(
        inputs=(info.input,),
        outputs=(served.signature.inputs[0],),
        batch=batch,
        sizes={size: n for size, n in free.items() if size != batch},
    )


def golden_samples(served: Served) -> tuple[Array, Array]:
    """Read the raw samples of a bundle, and what the training's loader makes of them.

    Raises:
        ArtefactError: a file is damaged.
    """
    info = _info(served)
    found = []
    for file, wanted in ((info.golden_input, info.input), (info.golden_output, served.signature.inputs[0])):
        try:
            array: Array = np.load(io.BytesIO(bytes_of(served.bundle, file)), allow_pickle=False)
        except (ValueError, EOFError) as cause:
            raise ArtefactError(
                f"{served.bundle.path / file} cannot be read: {cause}.", do="Build the bundle again."
            ) from cause
        problem = wanted.problem(array, {})
        if problem is not None or not array.size:
            raise ArtefactError(
                f"{served.bundle.path / file} is damaged: {problem or 'it is empty'}.",
                do="Build the bundle again.",
            )
        found.append(array)
    return found[0], found[1]


def picture_identity(served: Served) -> tuple[object, ...]:
    """What these models hold of a bundle; another version of it with the same needs no others."""
    info = served.bundle.info
    file = info.files.get(PREPROCESS_FILE)
    return None if file is None else file.sha256, info.task.labels, info.class_scores


def _info(served: Served) -> PreprocessInfo:
    info = served.bundle.info.preprocess
    assert info is not None, "only bundles with `preprocess.onnx` come here"
    return info


def write_picture_models(
    repository: Path,
    served: Served,
    models: PictureModels,
    runtime: Runtime,
    settings: ModelSettings,
    *,
    max_batch: int,
    activity: str | None = None,
) -> None:
    """Write the models around a network into a repository, each configuration parsed by Triton's schema.

    Args:
        repository: that the network's model is in, or will be.
        served: the bundle.
        models: their names.
        runtime: `onnxruntime` or `python`, which runs the preprocessing, on the CPU.
        settings: how they are served.
        max_batch: of the network.
        activity: as of `write_version`.

    Raises:
        ArtefactError: Triton does not read a configuration.
        OutputError: a file cannot be written.
    """
    signature = preprocess_signature(served)
    interface = interface_of(signature)
    content = bytes_of(served.bundle, PREPROCESS_FILE)
    folder = repository / models.preprocess
    write_bytes(folder / "1" / MODEL_FILE, content)
    if runtime == "python":
        document = model_document(
            signature, interface, settings, {MODEL_FILE: hashlib.sha256(content).hexdigest()}
        )
        write_bytes(folder / "1" / "model.json", json_bytes(document | _told(activity)))
        write_bytes(folder / "1" / "model.py", (_HERE / "triton_model.py").read_bytes())
    one_sample = golden_samples(served)[0][:1]
    parameters = {"manifest_sha256": served.manifest_sha256}
    text = config_text(
        models.preprocess,
        runtime=runtime,
        interface=interface,
        sizes={interface.inputs[0].name: one_sample.shape[1:]},
        settings=settings,
        max_batch=max_batch,
        parameters=parameters,
        kind="KIND_CPU",
    )
    _write_config(folder, text, activity)
    network = served.interface
    steps = [
        (
            models.preprocess,
            {interface.inputs[0].name: interface.inputs[0].name},
            {network.inputs[0].name: _BETWEEN},
        ),
        (
            models.network,
            {network.inputs[0].name: _BETWEEN},
            {one.name: one.name for one in network.outputs},
        ),
    ]
    raw = replace(network, inputs=interface.inputs)
    _write_ensemble(repository / models.raw, served, raw, steps, max_batch, parameters)
    if models.decode is None or models.file is None:
        return
    folder = repository / models.decode
    write_bytes(folder / "1" / "model.py", (_HERE / "triton_decode.py").read_bytes())
    picture = interface.inputs[0]
    decoding = Interface(inputs=(FILE,), outputs=(picture,), batched=True)
    text = config_text(
        models.decode,
        runtime="python",
        interface=decoding,
        sizes={},
        settings=replace(settings, warmup=False, batching=False),
        max_batch=1,
        parameters=parameters,
        kind="KIND_CPU",
    )
    _write_config(folder, text, activity)
    first = (models.decode, {FILE.name: FILE.name}, {picture.name: picture.name})
    from_file = replace(network, inputs=(FILE,))
    _write_ensemble(repository / models.file, served, from_file, [first, *steps], 1, parameters)


def _told(activity: str | None) -> dict[str, object]:
    return {} if activity is None else {"activity": activity}


def _write_config(folder: Path, text: str, activity: str | None) -> None:
    check_config(text, folder / CONFIG_FILE)
    if activity is not None:  # see `write_version`
        write_bytes(folder / "1" / "__pycache__", b"")
    write_bytes(folder / CONFIG_FILE, text.encode())


def _write_ensemble(
    folder: Path,
    served: Served,
    interface: Interface,
    steps: Sequence[tuple[str, Mapping[str, str], Mapping[str, str]]],
    max_batch: int,
    parameters: Mapping[str, str],
) -> None:
    """Write a model that is a chain of others. steps: name, and the names inside for inputs and outputs."""
    names = served.bundle.info.task.labels
    labelled = labelled_outputs(interface, names, served.bundle.info.class_scores)
    text = ensemble_text(
        folder.name,
        interface=interface,
        steps=steps,
        max_batch=max_batch,
        parameters=parameters,
        label_files=dict.fromkeys(labelled, LABELS_FILE),
    )
    check_config(text, folder / CONFIG_FILE)
    write_bytes(folder / "1" / _KEPT, b"")
    if labelled:
        write_bytes(folder / LABELS_FILE, labels_text(names).encode())
    write_bytes(folder / CONFIG_FILE, text.encode())
