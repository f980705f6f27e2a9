"""Models of a bundle as Triton keeps them: `NAME/config.pbtxt` and `NAME/VERSION/` with the files."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sparse_export import trust
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.files import json_bytes, sha256_file, write_bytes
from sparse_export.formats.bundle import (
    BUNDLE_FILE,
    GOLDEN_INPUT,
    GOLDEN_OUTPUT,
    MODEL_FILE,
    Bundle,
    open_bundle,
)
from sparse_export.formats.listed import bytes_of
from sparse_export.serving.model_config import TensorSpec, check_config, config_text
from sparse_export.serving.settings import DEFAULT_MAX_BATCH, ModelSettings

__all__ = [
    "CONFIG_FILE",
    "RUNTIMES",
    "Engine",
    "Runtime",
    "Served",
    "largest_batch",
    "model_name",
    "open_served",
    "require_distinct",
    "require_engine",
    "require_trusted_engines",
    "write_config",
    "write_version",
]

Runtime = Literal["tensorrt", "onnxruntime", "python"]
RUNTIMES: tuple[Runtime, ...] = ("tensorrt", "onnxruntime", "python")
CONFIG_FILE = "config.pbtxt"

# Names become folders, and the Python backend puts the path of its model into the words of a shell.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_ENGINE = re.compile(r"tensorrt-(?P<precision>[a-z0-9]+)-sm(?P<major>\d{1,2})(?P<minor>\d)\.engine")
_DTYPES = {"float32": "FP32", "float16": "FP16", "float64": "FP64"}
_DENSE_MODEL = "model-dense.onnx"
_TEMPLATE = Path(__file__).with_name("triton_model.py")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A TensorRT engine of a bundle. file: as the manifest lists it.

    capability: of the GPU it was built for, as in `9.0`.  profiles: batch sizes (min, opt, max).
    version_compatible: it brings a runtime of its own along, code for the host.
    """

    file: str
    precision: str
    capability: str
    profiles: tuple[tuple[int, int, int], ...]
    version_compatible: bool

    @property
    def plan_name(self) -> str:
        """Its file name in a repository."""
        return f"model-sm{self.capability.replace('.', '')}.plan"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A bundle whose files were checked, and what a server has to know of it.

    manifest_sha256: of its `manifest.json`, which names it.  golden_input, golden_output: the pair that every answer
    path is held to.  engines: of TensorRT.  left_out: engines that cannot be used, each with its reason.
    """

    name: str
    bundle: Bundle
    manifest_sha256: str
    inputs: TensorSpec
    outputs: TensorSpec
    golden_input: np.ndarray
    golden_output: np.ndarray
    engines: tuple[Engine, ...]
    left_out: tuple[str, ...]

    @property
    def holds_host_code(self) -> bool:
        """Is an engine version compatible, which brings a runtime of its own along?"""
        return any(engine.version_compatible for engine in self.engines)


def model_name(folder: Path) -> str:
    """The name of a bundle's model where none is given: that of its folder, other characters than [A-Za-z0-9_.-] as `-`."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.absolute().name).lstrip("-._")
    return require_name(name or "model")


def require_name(name: str) -> str:
    """Return it. Raises UsageError for what cannot be the name of a model."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model.",
            expected="Up to 100 of A-Z, a-z, 0-9, _, . and -, a letter or digit first, were expected.",
            do="Give another one with --name.",
        )
    return name


def open_served(folder: Path, name: str | None = None) -> Served:
    """Open a bundle for serving: every file is held to its hash. Raises UsageError or ArtefactError."""
    folder = Path(folder)
    bundle = open_bundle(folder)
    name = model_name(folder) if name is None else require_name(name)
    golden_input, golden_output = (_golden(bundle, part) for part in ("input", "output"))
    info = bundle.info
    engines, left_out = _engines(bundle)
    return Served(
        name=name,
        bundle=bundle,
        manifest_sha256=sha256_file(folder / BUNDLE_FILE),
        inputs=_spec(info.input_name, golden_input),
        outputs=_spec(info.output_name, golden_output),
        golden_input=golden_input,
        golden_output=golden_output,
        engines=engines,
        left_out=left_out,
    )


def _golden(bundle: Bundle, part: str) -> np.ndarray:
    name = {"input": GOLDEN_INPUT, "output": GOLDEN_OUTPUT}[part]
    path = f"{bundle.path / name}"
    try:
        array: np.ndarray = np.load(io.BytesIO(bytes_of(bundle, name)), allow_pickle=False)
    except ValueError as cause:
        raise ArtefactError(f"{path} is damaged: {cause}.", do="Build the bundle again.") from cause
    if array.dtype.name not in _DTYPES or array.ndim < 2 or not len(array) or not np.isfinite(array).all():
        raise ArtefactError(
            f"{path} holds {array.dtype} of shape {array.shape}.",
            expected="A batch of finite floating point samples was expected.",
            do="Build the bundle again.",
        )
    return array


def _spec(name: str, batch: np.ndarray) -> TensorSpec:
    return TensorSpec(name=name, dtype=_DTYPES[batch.dtype.name], dims=batch.shape[1:])


def _engines(bundle: Bundle) -> tuple[tuple[Engine, ...], tuple[str, ...]]:
    found, left_out = [], []
    facts = {fact.file: fact for fact in bundle.info.engines}
    for name in sorted(bundle.info.files):
        if not name.endswith(".engine"):
            continue
        match = _ENGINE.fullmatch(Path(name).name)
        if match is None:
            left_out.append(f"{name}: Triton runs engines that are named tensorrt-PRECISION-smXX.engine")
            continue
        if name not in facts:
            left_out.append(f"{name}: the manifest does not tell which batches it takes")
            continue
        profiles = facts[name].profiles
        if not _taken(profiles):
            sizes = ", ".join(f"{least} to {most}" for least, _, most in profiles)
            left_out.append(f"{name}: its profiles, {sizes}, take no batch of 1, which requests bring")
            continue
        capability = f"{match['major']}.{match['minor']}"
        engine = Engine(
            file=name,
            precision=match["precision"],
            capability=capability,
            profiles=profiles,
            version_compatible=facts[name].version_compatible,
        )
        found.append(engine)
    precisions = {engine.precision for engine in found}
    if len(precisions) > 1:
        keep = _preferred(precisions)
        left_out += [f"{Path(e.file).name}: {keep} is served" for e in found if e.precision != keep]
        found = [engine for engine in found if engine.precision == keep]
    return tuple(found), tuple(left_out)


def _taken(profiles: Sequence[tuple[int, int, int]]) -> int:
    """The largest M such that each batch of 1 to M is in a profile: a server merges requests to any of them."""
    taken = 0
    for least, _, most in sorted(profiles):
        if least > taken + 1:
            break
        taken = max(taken, most)
    return taken


def _n_profiles(served: Served) -> int:
    """How many profiles each of the engines has."""
    return min((len(engine.profiles) for engine in served.engines), default=1)


def largest_batch(served: Served, runtime: Runtime, settings: ModelSettings) -> int:
    """Samples in one execution of a bundle's model. Raises UsageError for more than its engines take, if asked for."""
    if runtime == "onnxruntime" or not served.engines:
        return settings.max_batch or DEFAULT_MAX_BATCH
    n_profiles = _n_profiles(served)
    narrowest = min(served.engines, key=lambda engine: _taken(engine.profiles[:n_profiles]))
    most = _taken(narrowest.profiles[:n_profiles])
    if settings.max_batch is None:
        return min(DEFAULT_MAX_BATCH, most)
    if settings.max_batch > most:
        profiles = ", ".join(":".join(map(str, sizes)) for sizes in narrowest.profiles)
        raise UsageError(
            f"Batches of up to {settings.max_batch} were asked for, and {served.bundle.path / narrowest.file} takes up to {most}.",
            expected=f"At most that was expected: its profiles are {profiles}.",
            do="Ask for less with --max-batch, serve by onnxruntime, or build with another --profile.",
        )
    return settings.max_batch


def _preferred(precisions: set[str]) -> str:
    """The precision to serve where a bundle has several: the widest, whose answers are nearest to the golden ones."""
    order = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
    return min(precisions, key=lambda name: (order.index(name) if name in order else len(order), name))


def require_trusted_engines(served: Served, given: trust.Given) -> None:
    """An engine is native code. Raises NotTrustedError where this user has not vouched for the bundle's manifest.

    given: digests, of which that of the manifest vouches for it from now on.
    """
    if served.engines:
        trust.require(
            served.manifest_sha256,
            f"The engine {served.bundle.path / served.engines[0].file}",
            given=given,
        )


def _dense_onnx(served: Served) -> bytes:
    """The ONNX file with dense weights, which is what the servers' native backends read."""
    bundle = served.bundle
    if _DENSE_MODEL in bundle.info.files:
        return bytes_of(bundle, _DENSE_MODEL)
    if not _is_packed(served):
        return bytes_of(bundle, MODEL_FILE)
    from sparse_export.graph.passes.pack24 import dense_from_file

    content: bytes = dense_from_file(bundle.onnx_path).SerializeToString(deterministic=True)
    return content


def _is_packed(served: Served) -> bool:
    from sparse_export.graph.passes.pack24 import may_be_packed

    return may_be_packed(served.bundle.onnx_path)


def write_version(
    folder: Path, served: Served, runtime: Runtime, settings: ModelSettings, activity: str | None
) -> None:
    """Write the files of one version into `folder`, which is made.

    activity: for the Python backend under `serve`, where it counts its executions.
    Raises UsageError when the bundle has nothing for the runtime.
    """
    if runtime == "tensorrt":
        require_engine(served)
    if runtime == "onnxruntime":
        write_bytes(folder / MODEL_FILE, _dense_onnx(served))
        return
    for engine in served.engines:
        write_bytes(folder / engine.plan_name, bytes_of(served.bundle, engine.file))
    if runtime == "tensorrt":
        return
    content = bytes_of(served.bundle, MODEL_FILE)
    write_bytes(folder / MODEL_FILE, content)
    digests = {engine.plan_name: sha256_file(folder / engine.plan_name) for engine in served.engines}
    facts: dict[str, object] = {
        "input": served.inputs.name,
        "output": served.outputs.name,
        "threads": settings.threads,
        "model": MODEL_FILE,
        "packed": _is_packed(served),
        "engines": {engine.capability: engine.plan_name for engine in served.engines},
        "host_code": [engine.plan_name for engine in served.engines if engine.version_compatible],
        "sha256": {MODEL_FILE: hashlib.sha256(content).hexdigest(), **digests},
        "manifest_sha256": served.manifest_sha256,
    }
    if activity is not None:
        facts["activity"] = activity
        # A file of this name keeps Python from caching its bytecode there. The server, which polls under `serve`,
        # would take that for a change and load the model again.
        write_bytes(folder / "__pycache__", b"")
    write_bytes(folder / "model.json", json_bytes(facts))
    write_bytes(folder / "model.py", _TEMPLATE.read_bytes())


def require_engine(served: Served) -> None:
    """Raises UsageError for a bundle without an engine that can be served, and says what was left out and why."""
    if not served.engines:
        left_out = f" Left out: {'; '.join(served.left_out)}." if served.left_out else ""
        raise UsageError(
            f"{served.bundle.path} has no engine of TensorRT that can be served.{left_out}",
            expected="engines/tensorrt-PRECISION-smXX.engine, with a profile from 1 on, was expected.",
            do="Build it with `--target tensorrt`, or choose another runtime.",
        )


def write_config(
    folder: Path,
    name: str,
    served: Served,
    runtime: Runtime,
    settings: ModelSettings,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Write `config.pbtxt` into the folder of a model, after it was parsed by Triton's own schema.

    Raises UsageError for larger batches than an engine takes.
    """
    text = config_text(
        name,
        runtime=runtime,
        inputs=served.inputs,
        outputs=served.outputs,
        settings=settings,
        max_batch=largest_batch(served, runtime, settings),
        n_profiles=_n_profiles(served),
        parameters={"manifest_sha256": served.manifest_sha256, **(parameters or {})},
        plans={engine.capability: engine.plan_name for engine in served.engines}
        if runtime == "tensorrt"
        else None,
    )
    path = folder / CONFIG_FILE
    message = check_config(text, path)
    told = (message.name, message.input[0].name, tuple(message.input[0].dims), message.output[0].name)
    meant = (name, served.inputs.name, served.inputs.dims, served.outputs.name)
    if told != meant:
        raise ArtefactError(f"{path} says {told}.", expected=f"{meant} was meant.", do="Rename the tensors.")
    write_bytes(path, text.encode())


def require_distinct(served: Sequence[Served]) -> None:
    """Raises UsageError when two bundles would have one name."""
    names = [one.name for one in served]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"Two bundles would be served as {name!r}.",
                expected="One name for each was expected.",
                do="Give each a name, in their order: --name dense --name sparse.",
            )
