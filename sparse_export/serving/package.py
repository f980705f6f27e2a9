"""Writes bundles as a model repository of Triton, with what it takes to deploy it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.files import claimed, staged_folder, write_bytes, write_json
from sparse_export.formats.bundle import GOLDEN_INPUT, GOLDEN_OUTPUT
from sparse_export.formats.listed import bytes_of, file_facts
from sparse_export.serving.containers import Container, container_for
from sparse_export.serving.deployment import Deployment, deployment_files
from sparse_export.serving.manifests import check_deployment
from sparse_export.serving.repository import (
    RUNTIMES,
    Runtime,
    Served,
    largest_batch,
    open_served,
    require_distinct,
    require_engine,
    require_trusted_engines,
    write_config,
    write_version,
)
from sparse_export.serving.settings import ModelSettings
from sparse_export.trust import Given
from sparse_export.version import command_line, now

__all__ = ["Package", "PackagedModel", "package"]

PACKAGE_FILE = "package.json"
REPOSITORY = "model_repository"
_HERE = Path(__file__).parent
_CLIENTS = {"client/example.py": "client_example.py", "client/load.py": "client_load.py"}
_TENSORRT = ("tensorrt-cu13", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A model of the repository.

    max_batch: samples in one execution.  golden: folder in the package with its stored input and output.
    """

    name: str
    runtime: str
    max_batch: int
    bundle: str
    manifest_sha256: str
    golden: str


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written. container: that it is to be deployed in.  notes: what was left out, and warnings."""

    path: Path
    models: tuple[PackagedModel, ...]
    container: Container
    image: str
    notes: tuple[str, ...]


def package(
    bundles: Sequence[Path],
    names: Sequence[str | None],
    out: Path,
    *,
    runtimes: Sequence[str] = (),
    settings: ModelSettings | None = None,
    image: str | None = None,
    max_body_mb: int = 64,
    trust: Given = None,
) -> Package:
    """Write the package of one or more bundles, whole or not at all; a package that stands at `out` is replaced.

    runtimes: some of `tensorrt`, `onnxruntime` and `python`, by default all that the bundles have; each makes a model
    `NAME-RUNTIME`.  image: reference that the Docker image gets, default the first bundle's name and manifest.
    trust: SHA-256 of the manifests of bundles from elsewhere whose engines may be packaged.
    Every config.pbtxt is parsed by Triton's own schema and every manifest checked before anything takes its name.
    Raises UsageError, FolderInUse, ArtefactError, NotTrustedError, MissingCapability or OutputError.
    """
    settings = settings or ModelSettings()
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise UnknownNameError("runtime", runtime, RUNTIMES)
    out = Path(out)
    with claimed(out):
        _require_replaceable(out)
        served = [open_served(path, name) for path, name in zip(bundles, names, strict=True)]
        require_distinct(served)
        for one in served:
            if not runtimes or {"tensorrt", "python"} & set(runtimes):
                require_trusted_engines(one, trust)
        notes = [f"{one.name}: left out {reason}" for one in served for reason in one.left_out]
        chosen = {one.name: _chosen(one, runtimes, notes) for one in served}
        container = (
            _container(served, notes)
            if any("tensorrt" in c for c in chosen.values())
            else container_for(None)
        )
        facts = _deployment(served, chosen, container, image, max_body_mb)
        with staged_folder(out) as stage:
            models = [
                _write_model(stage, one, runtime, settings) for one in served for runtime in chosen[one.name]
            ]
            for one in served:
                for name in (GOLDEN_INPUT, GOLDEN_OUTPUT):
                    target = stage / "golden" / one.name / Path(name).name
                    write_bytes(target, bytes_of(one.bundle, name))
            for name, text in deployment_files(facts).items():
                check_deployment(name, text)
                write_bytes(stage / name, text.encode())
            for name, source_name in _CLIENTS.items():
                (stage / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(_HERE / source_name, stage / name)
            files = [str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()]
            document = {
                "kind": "package",
                "schema_version": 1,
                "models": [asdict(model) for model in models],
                "container": asdict(container),
                "image": facts.image,
                "settings": asdict(settings),
                "notes": notes,
                "command": command_line(),
                "created": now(),
                "files": {name: asdict(fact) for name, fact in file_facts(stage, files).items()},
            }
            write_json(stage / PACKAGE_FILE, document)
        return Package(
            path=out, models=tuple(models), container=container, image=facts.image, notes=tuple(notes)
        )


def _require_replaceable(out: Path) -> None:
    if not out.exists() or (out.is_dir() and (not any(out.iterdir()) or (out / PACKAGE_FILE).is_file())):
        return
    raise UsageError(
        f"{out} exists and is not a package.",
        expected="A new or empty folder, or a package to replace, was expected.",
        do="Choose another place with --out.",
    )


def _chosen(served: Served, asked: Sequence[str], notes: list[str]) -> tuple[Runtime, ...]:
    has_engine = bool(served.engines)
    if "tensorrt" in asked:
        require_engine(served)
    if not has_engine:
        notes.append(f"{served.name}: no model for tensorrt, the bundle has no engine of it")
    wanted = asked or RUNTIMES
    return tuple(
        runtime for runtime in RUNTIMES if runtime in wanted and (has_engine or runtime != "tensorrt")
    )


def _container(served: Sequence[Served], notes: list[str]) -> Container:
    versions = {_tensorrt_version(one) for one in served if one.engines}
    if len(versions) > 1:
        raise UsageError(
            f"The engines were built by TensorRT {' and '.join(sorted(str(version) for version in versions))}.",
            expected="One version was expected: a container has one.",
            do="Package them apart, or build them again by one version.",
        )
    container = container_for(versions.pop())
    if container.warning:
        notes.append(container.warning)
    return container


def _tensorrt_version(served: Served) -> str:
    found = served.bundle.info.versions
    return next((found[name] for name in _TENSORRT if name in found), "unknown")


def _deployment(
    served: Sequence[Served],
    chosen: dict[str, tuple[Runtime, ...]],
    container: Container,
    image: str | None,
    max_body_mb: int,
) -> Deployment:
    name = re.sub(r"[^a-z0-9-]", "-", served[0].name.lower()).strip("-")[:50].strip("-") or "model"
    versions = served[0].bundle.info.versions
    onnxruntime = versions.get("onnxruntime-gpu") or versions.get("onnxruntime")
    requirements = ["numpy>=1.26", f"onnxruntime=={onnxruntime}" if onnxruntime else "onnxruntime"]
    python_models = any("python" in runtimes for runtimes in chosen.values())
    needs_gpu = any("tensorrt" in runtimes for runtimes in chosen.values())
    if needs_gpu and python_models:
        requirements += [f"tensorrt-cu13=={container.tensorrt}", "cuda-python>=12.8"]
    return Deployment(
        name=f"{name}-triton",
        image=image or f"{name}-triton:{served[0].manifest_sha256[:12]}",
        container=container,
        python_models=python_models,
        requirements=tuple(requirements),
        needs_gpu=needs_gpu,
        host_code=needs_gpu and any(one.holds_host_code for one in served),
        max_body_mb=max_body_mb,
    )


def _write_model(stage: Path, served: Served, runtime: Runtime, settings: ModelSettings) -> PackagedModel:
    name = f"{served.name}-{runtime}"
    folder = stage / REPOSITORY / name
    write_version(folder / "1", served, runtime, settings, None)
    write_config(folder, name, served, runtime, settings)
    return PackagedModel(
        name=name,
        runtime=runtime,
        max_batch=largest_batch(served, runtime, settings),
        bundle=str(served.bundle.path),
        manifest_sha256=served.manifest_sha256,
        golden=f"golden/{served.name}",
    )
