"""Write the models of a bundle into a model repository: `NAME/config.pbtxt`, and the files in
`NAME/VERSION/`.
"""

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
from sparse_export.signature import BATCH

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
    """A TensorRT engine of a bundle.

    Attributes:
        file: as the manifest lists it.
        tensorrt: version that built it.
        precision: as in its file name.
        capability: compute capability of the GPU it was built for, as `9.0`.
        profiles: batch sizes (min, opt, max) of each profile.
        version_compatible: whether it holds a runtime of its own, which is code for the host.
    """

    file: str
    tensorrt: str
    precision: str
    capability: str
    profiles: tuple[tuple[int, int, int], ...]
    version_compatible: bool

    @property
    def plan_name(self) -> str:
        """File name in a repository."""
        return f"model-sm{self.capability.replace('.', '')}.plan"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A bundle to serve, whose files were checked.

    Attributes:
        name: name of its model.
        bundle: the bundle.
        manifest_sha256: digest of its `manifest.json`, which identifies it.
        inputs: input of the model.
        outputs: output of the model.
        golden_input: stored input that a server's answer is checked with.
        golden_output: stored output for it.
        engines: its TensorRT engines that can be served.
        left_out: other engines, each with the reason.
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
        """Whether an engine is version compatible, so that it holds code for the host."""
        return any(engine.version_compatible for engine in self.engines)


def model_name(folder: Path) -> str:
    """Return the default name of a bundle's model: its folder's, with `-` for characters outside
    [A-Za-z0-9_.-].

    Raises:
        UsageError: the name is too long.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", folder.absolute().name).lstrip("-._")
    return require_name(name or "model")


def require_name(name: str) -> str:
    """Return the name of a model.

    Raises:
        UsageError: it is not 1 to 100 of A-Z, a-z, 0-9, `_`, `.` and `-`, beginning with a letter or a digit.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not the name of a model: up to 100 of A-Z, a-z, 0-9, _, . and -, a letter or digit "
            "first.",
            do="Give another name with --name.",
        )
    return name


def open_served(folder: Path, name: str | None = None) -> Served:
    """Open a bundle for serving, and check every file against its hash.

    Args:
        folder: the bundle.
        name: name of its model, None for that of the folder.

    Raises:
        UsageError: there is no bundle, or the name is invalid.
        ArtefactError: a file is damaged, or the golden pair is missing.
    """
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
        inputs=_spec(info.signature.input_names[0], golden_input),
        outputs=_spec(info.signature.output_names[0], golden_output),
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
            f"{path} holds {array.dtype} of shape {array.shape}, not a batch of finite floating-point "
            "samples.",
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
            left_out.append(f"{name}: the manifest does not say which batches it takes")
            continue
        profiles = tuple(one[BATCH] for one in facts[name].profiles)
        if not _taken(profiles):
            sizes = ", ".join(f"{least} to {most}" for least, _, most in profiles)
            left_out.append(f"{name}: its profiles, {sizes}, take no batch of 1, which requests bring")
            continue
        capability = f"{match['major']}.{match['minor']}"
        engine = Engine(
            file=name,
            tensorrt=facts[name].version,
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
    """Return the largest M such that each batch of 1 to M fits a profile.

    A server merges requests to any of them.
    """
    taken = 0
    for least, _, most in sorted(profiles):
        if least > taken + 1:
            break
        taken = max(taken, most)
    return taken


def _n_profiles(served: Served) -> int:
    """Return the number of profiles that every engine has."""
    return min((len(engine.profiles) for engine in served.engines), default=1)


def largest_batch(served: Served, runtime: Runtime, settings: ModelSettings) -> int:
    """Return the maximum number of samples in one execution of a bundle's model.

    Raises:
        UsageError: the settings ask for more than its engines take.
    """
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
            f"--max-batch is {settings.max_batch}, and {narrowest.file} takes up to {most}: its profiles are "
            f"{profiles}.",
            do="Give less to --max-batch, serve by onnxruntime, or build with another --profile.",
        )
    return settings.max_batch


def _preferred(precisions: set[str]) -> str:
    """Return the precision to serve where a bundle has several: the widest, nearest to the golden output."""
    order = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8")
    return min(precisions, key=lambda name: (order.index(name) if name in order else len(order), name))


def require_trusted_engines(served: Served, trusted: trust.TrustedDigests) -> None:
    """Check that this user vouches for a bundle with engines, which are native code.

    Args:
        served: the bundle.
        trusted: digests that the user vouches for from now on; that of the bundle's manifest counts.

    Raises:
        NotTrustedError: the user has not vouched for the bundle's manifest.
    """
    if served.engines:
        trust.require(
            served.manifest_sha256,
            f"The engine {served.bundle.path / served.engines[0].file}",
            trusted=trusted,
        )


def _dense_onnx(served: Served) -> bytes:
    """Return the ONNX file with dense weights, for the native backends."""
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
    """Write the files of one version of a model.

    Args:
        folder: where to write; it is made.
        served: the bundle.
        runtime: backend of Triton that runs the model.
        settings: how it is served.
        activity: under `serve`, folder where the Python backend counts its executions.

    Raises:
        UsageError: the bundle has nothing for the runtime.
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
    document: dict[str, object] = {
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
        document["activity"] = activity
        # A file of this name keeps Python from caching its bytecode there. The server, which polls under
        # `serve`, would take that for a change and load the model again.
        write_bytes(folder / "__pycache__", b"")
    write_bytes(folder / "model.json", json_bytes(document))
    write_bytes(folder / "model.py", _TEMPLATE.read_bytes())


def require_engine(served: Served) -> None:
    """Check that a bundle has a TensorRT engine that can be served.

    Raises:
        UsageError: it has none; the error says which engines were left out and why.
    """
    if not served.engines:
        left_out = f" Left out: {'; '.join(served.left_out)}." if served.left_out else ""
        raise UsageError(
            f"{served.bundle.path} has no TensorRT engine that can be served.{left_out}",
            do=(
                "Build one with `--target tensorrt` and a profile that begins at 1, or choose another "
                "runtime."
            ),
        )


def write_config(
    folder: Path,
    name: str,
    served: Served,
    runtime: Runtime,
    settings: ModelSettings,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Write the `config.pbtxt` of a model, after Triton's own schema parsed it.

    Args:
        folder: folder of the model.
        name: its name.
        served: the bundle.
        runtime: backend of Triton that runs it.
        settings: how it is served.
        parameters: strings to store in the configuration.

    Raises:
        UsageError: the settings ask for larger batches than an engine takes.
        ArtefactError: the schema reads other names or shapes than the bundle's.
        MissingCapability: Triton's client, which has the schema, is not installed.
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
    parsed = (message.name, message.input[0].name, tuple(message.input[0].dims), message.output[0].name)
    expected = (name, served.inputs.name, served.inputs.dims, served.outputs.name)
    if parsed != expected:
        raise ArtefactError(
            f"Triton reads {parsed} from {path}, and the bundle has {expected}.", do="Rename the tensors."
        )
    write_bytes(path, text.encode())


def require_distinct(served: Sequence[Served]) -> None:
    """Check that every bundle has a name of its own.

    Raises:
        UsageError: two have the same name.
    """
    names = [one.name for one in served]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"Two bundles have the name {name!r}.",
                do="Give each a name, in their order: --name dense --name sparse.",
            )
