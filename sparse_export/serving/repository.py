"""Write the models of a bundle into a model repository: `NAME/config.pbtxt`, and the files in
`NAME/VERSION/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparse_export import trust
from sparse_export.errors import ArtefactError, UsageError
from sparse_export.evaluate.parity import golden_inputs, golden_outputs
from sparse_export.files import json_bytes, write_bytes
from sparse_export.formats.bundle import MODEL_FILE, Bundle, open_bundle
from sparse_export.formats.listed import bytes_of
from sparse_export.serving.label_file import LABELS_FILE, labelled_outputs, labels_text
from sparse_export.serving.model_config import WARMUP_FOLDER, check_config, config_text
from sparse_export.serving.served_engines import Engine, largest_fitting, largest_merged, served_engines
from sparse_export.serving.settings import DEFAULT_MAX_BATCH, ModelSettings
from sparse_export.serving.tensors import Interface, interface_of
from sparse_export.signature import FLOATS, Array, Feeds, Signature, TensorInfo

__all__ = [
    "CONFIG_FILE",
    "RUNTIMES",
    "Runtime",
    "Served",
    "golden_batch",
    "largest_batch",
    "model_document",
    "model_name",
    "open_served",
    "require_distinct",
    "require_distinct_models",
    "require_served",
    "require_trusted_engines",
    "why_not_served",
    "write_config",
    "write_version",
]

Runtime = Literal["tensorrt", "onnxruntime", "python"]
RUNTIMES: tuple[Runtime, ...] = ("tensorrt", "onnxruntime", "python")
CONFIG_FILE = "config.pbtxt"

# Names become folders, and the Python backend puts the path of its model into the words of a shell.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DENSE_MODEL = "model-dense.onnx"
_TEMPLATE = Path(__file__).with_name("triton_model.py")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A bundle to serve, whose files were checked.

    Attributes:
        name: name of its model.
        bundle: the bundle.
        manifest_sha256: digest of its `manifest.json`, which identifies it.
        interface: what the model takes and gives.
        golden_inputs: stored inputs that a server's answer is checked with, by name.
        golden_outputs: stored outputs for them, but for those whose length depends on the inputs' values, and
            appended ones that rounding could change.
        engines: its TensorRT engines that can be served.
        left_out: other engines, each with the reason.
    """

    name: str
    bundle: Bundle
    manifest_sha256: str
    interface: Interface
    golden_inputs: dict[str, Array]
    golden_outputs: dict[str, Array]
    engines: tuple[Engine, ...]
    left_out: tuple[str, ...]

    @property
    def signature(self) -> Signature:
        """What the graph takes and gives, with the outputs that were appended to it."""
        return self.bundle.info.signature.whole

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
    signature, golden = bundle.info.signature.whole, bundle.info.golden
    output_files = golden_output_files(bundle)
    inputs, outputs = golden_inputs(bundle), golden_outputs(bundle)
    sizes: dict[str, int] = {}
    for one in signature.inputs:
        _require_golden(bundle, golden.inputs, inputs, one, sizes)
    for one in signature.outputs:
        if one.name in output_files:
            _require_golden(bundle, output_files, outputs, one, sizes)
    engines, left_out = served_engines(bundle, {size: sizes[size] for size in signature.free})
    return Served(
        name=name,
        bundle=bundle,
        manifest_sha256=bundle.manifest_sha256,
        interface=interface_of(signature),
        golden_inputs=inputs,
        golden_outputs={name: one for name, one in outputs.items() if name in output_files},
        engines=engines,
        left_out=left_out,
    )


def golden_output_files(bundle: Bundle) -> dict[str, str]:
    """Name the golden file of each output of the graph that has one, appended outputs included."""
    golden, names = bundle.info.golden, bundle.info.signature.whole.output_names
    return {name: file for name, file in {**golden.outputs, **golden.inner}.items() if name in names}


def _require_golden(
    bundle: Bundle, files: Mapping[str, str], arrays: Feeds, one: TensorInfo, sizes: dict[str, int]
) -> None:
    """Raise ArtefactError where a golden array is missing, or is not what the signature says."""
    if one.name not in arrays:
        raise ArtefactError(f"{bundle.path} has no golden {one.name}.", do="Build the bundle again.")
    array = arrays[one.name]
    problem = one.problem(array, sizes)
    if problem is None and not array.size:
        problem = f"{one.name} is empty"
    if problem is None and one.dtype in FLOATS and not np.isfinite(array.astype(np.float64)).all():
        problem = f"{one.name} holds NaN or infinity"
    if problem is not None:
        raise ArtefactError(
            f"{bundle.path / files[one.name]} is damaged: {problem}.",
            expected=f"{one} of finite numbers was expected.",
            do="Build the bundle again.",
        )


def _n_profiles(served: Served) -> int:
    """Return the number of profiles that every engine has."""
    return min((len(engine.profiles) for engine in served.engines), default=1)


def largest_batch(served: Served, runtime: Runtime, settings: ModelSettings) -> int:
    """Return the maximum number of samples in one execution of a bundle's model.

    Returns:
        0 where the server merges no requests: whatever a request brings is one execution.

    Raises:
        UsageError: the settings ask for more than its engines take, or for a model that is not batched.
    """
    if not served.interface.batched:
        if settings.max_batch is not None:
            raise UsageError(
                f"--max-batch is {settings.max_batch}, and the samples of {served.bundle.path} are not the "
                f"first axis of everything that it takes and gives: {served.signature}.",
                expected="Its requests are not merged, and each may be of any size.",
                do="Leave --max-batch out.",
            )
        return 0
    if runtime == "onnxruntime" or not served.engines:
        return settings.max_batch or DEFAULT_MAX_BATCH
    n_profiles, batch = _n_profiles(served), str(served.signature.batch)

    def taken(engine: Engine) -> int:
        return largest_merged(engine.profiles[:n_profiles], batch)

    narrowest = min(served.engines, key=taken)
    most = taken(narrowest)
    if settings.max_batch is None:
        return min(DEFAULT_MAX_BATCH, most)
    if settings.max_batch > most:
        raise UsageError(
            f"--max-batch is {settings.max_batch}, and {narrowest.file} takes up to {most}: its profiles are "
            f"{narrowest.profiles_text}.",
            do="Give less to --max-batch, serve by onnxruntime, or build with another --profile.",
        )
    return settings.max_batch


def golden_batch(served: Served, runtime: Runtime, settings: ModelSettings) -> int:
    """Return the number of samples of the golden input that one request may bring.

    Raises:
        UsageError: as `largest_batch`.
    """
    n_samples = served.signature.n_samples(served.golden_inputs)
    most = largest_batch(served, runtime, settings) or n_samples
    if runtime == "onnxruntime":
        return most
    sizes = golden_sizes(served)
    fitting = [largest_fitting(one.profiles, served.signature.batch, sizes) for one in served.engines]
    return min([most, *fitting])


def golden_sizes(served: Served) -> dict[str, int]:
    """Return the free sizes of the golden input, by name."""
    return {
        size: found
        for one in served.signature.inputs
        for size, found in zip(one.shape, served.golden_inputs[one.name].shape, strict=True)
        if isinstance(size, str)
    }


def why_not_served(served: Served, runtime: Runtime) -> str | None:
    """Say why a bundle has no model for a runtime; None where it has one."""
    if runtime != "python" and served.interface.bare_scalars:
        return (
            f"{served.interface.bare_scalars[0]} is a single number, which Triton's {runtime} does not take"
        )
    if runtime == "tensorrt":
        return None if served.engines else "the bundle has no TensorRT engine"
    for one in (*served.interface.inputs, *served.interface.outputs):
        if one.dtype == "BF16":
            return f"{one.name} is bfloat16, which onnxruntime does not exchange with Triton"
    return None


def require_trusted_engines(served: Sequence[Served], trusted: trust.TrustedDigests) -> None:
    """Check that this user vouches for the bundles with engines, which are native code.

    Args:
        served: the bundles; those without an engine need nobody.
        trusted: digests that the user vouches for from now on; those of the bundles' manifests count.

    Raises:
        NotTrustedError: the user has not vouched for the manifests that the message names.
    """
    trust.require_all(
        [
            trust.RunsCode(
                sha256=one.manifest_sha256, what=f"The engine {one.bundle.path / one.engines[0].file}"
            )
            for one in served
            if one.engines
        ],
        trusted=trusted,
    )


def _write_dense_onnx(folder: Path, served: Served) -> None:
    """Write the ONNX file with dense weights, for the native backends."""
    bundle = served.bundle
    if _DENSE_MODEL in bundle.info.files:
        bundle.copy_graph(_DENSE_MODEL, folder / MODEL_FILE)
        return
    written = bundle.copy_graph(MODEL_FILE, folder / MODEL_FILE)
    from sparse_export.graph.dense_file import dense_from_file, may_be_packed

    if may_be_packed(folder / MODEL_FILE):
        from sparse_export.graph.saved import save_model

        model = dense_from_file(folder / MODEL_FILE)
        for name in written:
            (folder / name).unlink()
        save_model(model, folder / MODEL_FILE)


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
    require_served(served, runtime)
    if runtime == "onnxruntime":
        _write_dense_onnx(folder, served)
        return
    digests = {}
    for engine in served.engines:
        plan = bytes_of(served.bundle, engine.file)
        digests[engine.plan_name] = hashlib.sha256(plan).hexdigest()
        write_bytes(folder / engine.plan_name, plan)
        del plan
    if runtime == "tensorrt":
        return
    from sparse_export.graph.dense_file import may_be_packed

    digests |= served.bundle.copy_graph(MODEL_FILE, folder / MODEL_FILE)
    document = model_document(served.signature, served.interface, settings, digests) | {
        "packed": may_be_packed(folder / MODEL_FILE),
        "engines": {engine.capability: engine.plan_name for engine in served.engines},
        "host_code": [engine.plan_name for engine in served.engines if engine.version_compatible],
        "manifest_sha256": served.manifest_sha256,
    }
    if activity is not None:
        document["activity"] = activity
        # A file of this name keeps Python from caching its bytecode there. The server, which polls under
        # `serve`, would take that for a change and load the model again.
        write_bytes(folder / "__pycache__", b"")
    write_bytes(folder / "model.json", json_bytes(document))
    write_bytes(folder / "model.py", _TEMPLATE.read_bytes())


def model_document(
    signature: Signature, interface: Interface, settings: ModelSettings, digests: Mapping[str, str]
) -> dict[str, object]:
    """Assemble the `model.json` of an ONNX file that runs in the Python backend by onnxruntime.

    Args:
        signature: of the graph.
        interface: likewise.
        settings: how it is served.
        digests: SHA-256 by name, of `model.onnx` and other files.
    """
    return {
        "inputs": list(signature.input_names),
        "outputs": list(signature.output_names),
        "batched": interface.batched,
        "scalars": list(interface.bare_scalars),
        "threads": settings.threads,
        "model": MODEL_FILE,
        "packed": False,
        "engines": {},
        "host_code": [],
        "sha256": dict(digests),
    }


def require_served(served: Served, runtime: Runtime) -> None:
    """Check that a bundle has something for a runtime.

    Raises:
        UsageError: it has not; the error says which engines were left out and why.
    """
    why = why_not_served(served, runtime)
    if why is None:
        return
    if runtime != "tensorrt" or served.engines:
        raise UsageError(
            f"{served.bundle.path} has no model for {runtime}: {why}.", do="Choose another runtime."
        )
    left_out = f" Left out: {'; '.join(served.left_out)}." if served.left_out else ""
    raise UsageError(
        f"{served.bundle.path} has no TensorRT engine that can be served.{left_out}",
        do="Build one with `--target tensorrt` and a profile that begins at 1, or choose another runtime.",
    )


def write_config(
    folder: Path,
    name: str,
    served: Served,
    runtime: Runtime,
    settings: ModelSettings,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Write the `config.pbtxt` of a model, after Triton's schema parsed it, its warm-up and names of classes.

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
    warm, files = _warm_sample(served), {}
    for at, one in enumerate(served.interface.inputs):
        if settings.warmup and not one.dtype.startswith(("FP", "BF")):
            files[one.name] = f"input-{at}"
            write_bytes(folder / WARMUP_FOLDER / files[one.name], warm[one.name].tobytes())
    class_names = served.bundle.info.task.labels
    labelled = labelled_outputs(served.interface, class_names, served.bundle.info.class_scores)
    text = config_text(
        name,
        runtime=runtime,
        interface=served.interface,
        sizes={name: sample.shape for name, sample in warm.items()},
        warm_files=files,
        settings=settings,
        max_batch=largest_batch(served, runtime, settings),
        n_profiles=_n_profiles(served),
        parameters={"manifest_sha256": served.manifest_sha256, **(parameters or {})},
        label_files=dict.fromkeys(labelled, LABELS_FILE),
        plans={engine.capability: engine.plan_name for engine in served.engines}
        if runtime == "tensorrt"
        else None,
    )
    path = folder / CONFIG_FILE
    message = check_config(text, path)
    parsed = (message.name, *map(_read_back, (message.input, message.output)))
    ends = served.interface.inputs, served.interface.outputs
    expected = (name, *([(one.name, f"TYPE_{one.dtype}", one.dims) for one in some] for some in ends))
    if parsed != expected:
        raise ArtefactError(
            f"Triton reads {parsed} from {path}, and the bundle has {expected}.", do="Rename the tensors."
        )
    if labelled:  # first: the configuration names it
        write_bytes(folder / LABELS_FILE, labels_text(class_names).encode())
    write_bytes(path, text.encode())


def _warm_sample(served: Served) -> dict[str, Array]:
    """One sample of each golden input, without the batch.

    Its integers and truth values warm a model up: zeros may be such as the network does not take, like a rate
    or a divisor of 0.
    """
    one_sample = served.signature.part(served.golden_inputs, 0, 1)
    on_wire = {one.name: one.to_wire(one_sample[one.name]) for one in served.interface.inputs}
    return {name: one[0] if served.interface.batched else one for name, one in on_wire.items()}


def _read_back(tensors: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and dims of a parsed configuration's inputs or outputs."""
    types = tensors[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number if tensors else {}
    return [(one.name, types[one.data_type].name, tuple(one.dims)) for one in tensors]


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


def require_distinct_models(names: Sequence[str]) -> None:
    """Check that every model, of which a bundle may have several, has a name of its own.

    Raises:
        UsageError: two have the same name.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"Two models would have the name {name!r}.", do="Name the bundles otherwise with --name."
            )
