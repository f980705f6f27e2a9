"""Write bundles as a model repository of Triton, with the files to deploy it."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparse_export.building.replaceable import require_replaceable
from sparse_export.errors import ArtefactError, UnknownNameError, UsageError
from sparse_export.files import claimed, staged_folder, write_bytes, write_json
from sparse_export.formats.listed import file_infos
from sparse_export.serving.deployment import deployment_files, files_left_out
from sparse_export.serving.exposure import UNPATCHED, image_is_patched
from sparse_export.serving.golden_files import write_golden_files
from sparse_export.serving.images import require_image
from sparse_export.serving.label_file import LABELS_FILE
from sparse_export.serving.picture_models import PictureModels, picture_models, write_picture_models
from sparse_export.serving.readme_file import readme
from sparse_export.serving.repository import (
    RUNTIMES,
    Runtime,
    Served,
    largest_batch,
    open_served,
    require_distinct,
    require_distinct_models,
    require_served,
    require_trusted_engines,
    why_not_served,
    write_config,
    write_version,
)
from sparse_export.serving.settings import ModelSettings
from sparse_export.serving.workload import Workload
from sparse_export.trust import TrustedDigests
from sparse_export.version import command_line, now

__all__ = ["Package", "PackagedModel", "package"]

PACKAGE_FILE = "package.json"
SCHEMA_VERSION = 2
REPOSITORY = "model_repository"
_HERE = Path(__file__).parent
_CLIENTS = {"client/example.py": "client_example.py", "client/load.py": "client_load.py"}
_PICTURE_CLIENT = {"client/picture.py": "client_picture.py"}
_LARGEST_BODY_MB = 2047
_PILLOW = "pillow>=10"
# Versions go into the words of a shell.
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]*")
_TENSORRT_VERSION = re.compile(r"\d+\.\d+\.\d+(\.\d+)?(?![\d])")


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model of the repository.

    Attributes:
        name: name that clients use.
        runtime: backend of Triton that runs it.
        max_batch: samples in one execution, at most; 0 where requests are not merged and may be of any size.
        bundle: folder that it comes from.
        manifest_sha256: digest of that bundle's manifest.
        golden: folder in the package with its stored inputs and outputs.
        task: name of what it is for.
        labels: file in the package with the names of its classes, in their order; None where they have none.
        raw: what it takes where it normalizes that itself, as `raw uint8 samples, 0 to 255`; else None.
    """

    name: str
    runtime: str
    max_batch: int
    bundle: str
    manifest_sha256: str
    golden: str
    task: str
    labels: str | None
    raw: str | None = None


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written.

    Attributes:
        path: folder of the package.
        models: models of the repository.
        base_image: image that the Dockerfile begins from, None where none was given.
        image: image that the files deploy, None where none can be built or was named.
        tensorrt: version of TensorRT that the image needs, None without engines.
        left_out: reason for each deployment file that was not written, by its path.
        notes: other things to know, as engines that were left out.
    """

    path: Path
    models: tuple[PackagedModel, ...]
    base_image: str | None
    image: str | None
    tensorrt: str | None
    left_out: dict[str, str]
    notes: tuple[str, ...]


def package(
    bundles: Sequence[Path],
    names: Sequence[str | None],
    out: Path,
    *,
    runtimes: Sequence[str] = (),
    settings: ModelSettings | None = None,
    base_image: str | None = None,
    image: str | None = None,
    max_body_mb: int = 64,
    trust: TrustedDigests = None,
) -> Package:
    """Write the package of one or more bundles, whole or not at all; a package at `out` is replaced.

    Triton's own schema parses every config.pbtxt before anything takes its name.

    Args:
        bundles: folders of the bundles.
        names: a name for the models of each bundle, None for that of its folder.
        out: folder to write.
        runtimes: some of `tensorrt`, `onnxruntime` and `python`, by default all that the bundles have; each
            makes a model. The first of these is called NAME, as `serve` calls it, the others `NAME-RUNTIME`.
        settings: how the models are served.
        base_image: image of Triton that the Dockerfile begins from. Without it no Dockerfile is written.
        image: reference of the image that the Dockerfile builds, by default the workload's name and a hash
            of the manifests. Without a base image it is an image of the user's own that holds the models.
        max_body_mb: size limit of a request at the ingress.
        trust: SHA-256 of the manifests of bundles from elsewhere whose engines may be packaged.

    Raises:
        UsageError: an argument is out of range, or the bundles do not fit into one package.
        FolderInUse: another process writes the folder.
        ArtefactError: a bundle is damaged.
        NotTrustedError: an engine comes from elsewhere, and nobody vouched for it.
        MissingCapability: Triton's client, which has the schema, is not installed.
        OutputError: the folder cannot be written.
    """
    settings = settings or ModelSettings()
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UnknownNameError("runtime", runtime, RUNTIMES)
    _require_images(base_image, image)
    if not 1 <= max_body_mb <= _LARGEST_BODY_MB:
        raise UsageError(f"--max-body-mb is {max_body_mb}.", do=f"Give 1 to {_LARGEST_BODY_MB}.")
    out = Path(out)
    with claimed(out):
        require_replaceable(out, kind="package", description=PACKAGE_FILE, own=())
        served = [open_served(path, name) for path, name in zip(bundles, names, strict=True)]
        require_distinct(served)
        if not runtimes or {"tensorrt", "python"} & set(runtimes):
            require_trusted_engines(served, trust)
        notes = [f"{one.name}: left out {reason}" for one in served for reason in one.left_out]
        chosen = {one.name: _runtimes(one, runtimes, notes) for one in served}
        around = {one.name: _picture_models(one, chosen[one.name], notes) for one in served}
        names_around = [name for models in around.values() if models is not None for name in models.names]
        require_distinct_models(
            [*(name for one in served for name in _model_names(one.name, chosen[one.name])), *names_around]
        )
        workload = _workload(
            served,
            chosen,
            name=_workload_name(served[0].name if len(served) == 1 else out.absolute().name),
            decodes=any(one is not None and one.decode is not None for one in around.values()),
            base_image=base_image,
            image=image,
            max_body_mb=max_body_mb,
        )
        if workload.tensorrt is not None:
            notes.append(
                f"the engines were built by TensorRT {workload.tensorrt}, and the image needs that version"
            )
        if base_image is not None and image_is_patched(base_image) is None:
            notes.append(
                f"the tag of {base_image} names no release of Triton: whether it is 25.07 or newer was not "
                "checked"
            )
        left_out = files_left_out(workload)
        with staged_folder(out) as stage:
            models = [
                _write_model(stage, one, name, runtime, settings)
                for one in served
                for name, runtime in _model_names(one.name, chosen[one.name]).items()
            ]
            for one in served:
                models += _write_around(stage, one, around[one.name], chosen[one.name], settings)
                write_golden_files(stage / "golden" / one.name, one)
            deployment = deployment_files(workload)
            deployment["README.md"] = readme(
                workload, models, deployment, left_out, {one.name: one.left_out for one in served}
            )
            for name, text in deployment.items():
                write_bytes(stage / name, text.encode())
            clients = _CLIENTS | (
                _PICTURE_CLIENT if any(name.endswith("-picture") for name in names_around) else {}
            )
            for name, source_name in clients.items():
                (stage / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(_HERE / source_name, stage / name)
            files = [str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()]
            document = {
                "kind": "package",
                "schema_version": SCHEMA_VERSION,
                "models": [asdict(model) for model in models],
                "base_image": workload.base_image,
                "image": workload.image,
                "tensorrt": workload.tensorrt,
                "left_out": left_out,
                "settings": asdict(settings),
                "notes": notes,
                "command": command_line(),
                "created": now(),
                "files": {name: asdict(fact) for name, fact in file_infos(stage, files).items()},
            }
            write_json(stage / PACKAGE_FILE, document)
            require_replaceable(out, kind="package", description=PACKAGE_FILE, own=())
        return Package(
            path=out,
            models=tuple(models),
            base_image=workload.base_image,
            image=workload.image,
            tensorrt=workload.tensorrt,
            left_out=left_out,
            notes=tuple(notes),
        )


def _require_images(base_image: str | None, image: str | None) -> None:
    if base_image is not None:
        require_image(base_image, "--base-image")
        if image_is_patched(base_image) is False:
            raise UsageError(
                f"--base-image {base_image} is older than 25.07. {UNPATCHED}.",
                do="Choose a release from 25.07 on.",
            )
    if image is not None:
        require_image(image, "--image")
        if base_image is not None and "@" in image:
            raise UsageError(
                f"--image {image!r} has a digest, which an image gets only when it is built.",
                do="Give a repository and a tag, or leave --base-image out to deploy an image that is built.",
            )


def _runtimes(served: Served, requested: Sequence[str], notes: list[str]) -> tuple[Runtime, ...]:
    found: list[Runtime] = []
    for runtime in RUNTIMES:
        why = why_not_served(served, runtime)
        if runtime in requested:
            require_served(served, runtime)
        if why is not None:
            notes.append(f"{served.name}: no model for {runtime}, {why}")
        elif runtime in requested or not requested:
            found.append(runtime)
    if not found:
        raise UsageError(f"{served.bundle.path} has no model that can be served: {notes[-1]}.")
    return tuple(found)


def _tensorrt_version(served: Sequence[Served]) -> str:
    """Return the version of TensorRT that built all engines."""
    versions = set()
    for bundle, engine in ((one.bundle, engine) for one in served for engine in one.engines):
        match = _TENSORRT_VERSION.match(engine.tensorrt)
        if match is None:
            raise ArtefactError(
                f"The manifest of {bundle.path} names, for {engine.file}, {engine.tensorrt[:100]!r} as the "
                "version of TensorRT.",
                do="Build the bundle again.",
            )
        versions.add(match[0])
    if len(versions) > 1:
        raise UsageError(
            f"The engines were built by TensorRT {' and '.join(sorted(versions))}, and an image has one "
            "version.",
            do="Package them apart, or build them again by one version.",
        )
    return versions.pop()


def _workload(
    served: Sequence[Served],
    chosen: dict[str, tuple[Runtime, ...]],
    *,
    name: str,
    decodes: bool,
    base_image: str | None,
    image: str | None,
    max_body_mb: int,
) -> Workload:
    has_python_models = any("python" in runtimes for runtimes in chosen.values())
    has_engines = any("tensorrt" in runtimes for runtimes in chosen.values())
    tensorrt = _tensorrt_version(served) if has_engines else None
    onnxruntime = _onnxruntime_version(served[0])
    requirements = ["numpy>=1.26", f"onnxruntime=={onnxruntime}" if onnxruntime else "onnxruntime"]
    if tensorrt is not None and has_python_models:
        requirements += [f"tensorrt-cu13=={tensorrt}", "cuda-python>=12.8"]
    if has_python_models and decodes:
        requirements.append(_PILLOW)
    if image is None and base_image is not None:
        image = f"{name}:{_tag([one.manifest_sha256 for one in served])}"
    return Workload(
        name=name,
        base_image=base_image,
        image=image,
        tensorrt=tensorrt,
        has_python_models=has_python_models,
        requirements=tuple(requirements),
        loads_host_code=has_engines and any(one.holds_host_code for one in served),
        max_body_mb=max_body_mb,
    )


def _model_names(bundle: str, runtimes: Sequence[Runtime]) -> dict[str, Runtime]:
    """Name the models of a bundle, each with its runtime. The first is the one that `serve` would choose."""
    return {bundle if at == 0 else f"{bundle}-{runtime}": runtime for at, runtime in enumerate(runtimes)}


def _picture_models(served: Served, runtimes: Sequence[Runtime], notes: list[str]) -> PictureModels | None:
    """Name the models around the first one of a bundle; None where it has none."""
    models = picture_models(served, served.name, runs_python="python" in runtimes)
    if models is not None and models.takes_pictures and models.decode is None:
        notes.append(f"{served.name}: no model for picture files, which the runtime python decodes")
    return models


def _write_around(
    stage: Path,
    served: Served,
    models: PictureModels | None,
    runtimes: Sequence[Runtime],
    settings: ModelSettings,
) -> list[PackagedModel]:
    """Write the models around the first one of a bundle."""
    if models is None:
        return []
    runtime: Runtime = (
        "python" if "onnxruntime" not in runtimes and "tensorrt" not in runtimes else "onnxruntime"
    )
    max_batch = largest_batch(served, runtimes[0], settings)
    write_picture_models(stage / REPOSITORY, served, models, runtime, settings, max_batch=max_batch)
    runs_by = {models.preprocess: runtime, models.decode: "python"}
    return [
        _packaged(
            stage,
            served,
            name,
            runs_by.get(name, "ensemble"),
            max_batch=1 if name in models.single else max_batch,
        )
        for name in models.names
    ]


def _tag(manifests: Sequence[str]) -> str:
    """Return the tag of an image from the digests of the bundles in it."""
    return (manifests[0] if len(manifests) == 1 else hashlib.sha256("".join(manifests).encode()).hexdigest())[
        :12
    ]


def _workload_name(name: str) -> str:
    """Return a DNS label from a name. It begins with a letter, as names of Services have to."""
    name = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-") or "model"
    name = name if name[0].isalpha() else f"model-{name}"
    return f"{name[:50].rstrip('-')}-triton"


def _onnxruntime_version(served: Served) -> str | None:
    versions = served.bundle.info.versions
    version = versions.get("onnxruntime-gpu") or versions.get("onnxruntime")
    if version is not None and not _VERSION.fullmatch(version):
        raise ArtefactError(
            f"{served.bundle.path} names {version[:100]!r} as its version of onnxruntime.",
            do="Build the bundle again.",
        )
    return version


def _write_model(
    stage: Path, served: Served, name: str, runtime: Runtime, settings: ModelSettings
) -> PackagedModel:
    folder = stage / REPOSITORY / name
    write_version(folder / "1", served, runtime, settings, None)
    write_config(folder, name, served, runtime, settings)
    return _packaged(stage, served, name, runtime, max_batch=largest_batch(served, runtime, settings))


def _packaged(stage: Path, served: Served, name: str, runtime: str, *, max_batch: int) -> PackagedModel:
    """The record of a model that was written."""
    folder, folded = stage / REPOSITORY / name, served.bundle.info.folded
    return PackagedModel(
        name=name,
        runtime=runtime,
        max_batch=max_batch,
        bundle=str(served.bundle.path),
        manifest_sha256=served.manifest_sha256,
        golden=f"golden/{served.name}",
        task=served.bundle.info.task.name,
        labels=f"{REPOSITORY}/{name}/{LABELS_FILE}" if (folder / LABELS_FILE).is_file() else None,
        raw=None if folded is None else folded.taken,
    )
