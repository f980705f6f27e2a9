"""Write Triton's `config.pbtxt`, and check it by Triton's own schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_export.errors import ArtefactError, MissingCapability, how_to_get
from sparse_export.serving.settings import DEFAULT_QUEUE_SIZE, DEFAULT_QUEUE_TIMEOUT_MS, ModelSettings
from sparse_export.serving.tensors import Interface, TensorSpec

__all__ = ["WARMUP_FOLDER", "check_config", "config_text", "ensemble_text"]

WARMUP_FOLDER = "warmup"
"""In a model's folder, where Triton looks for `input_data_file`."""

_BACKENDS = {
    "python": 'backend: "python"',
    "onnxruntime": 'backend: "onnxruntime"\nplatform: "onnxruntime_onnx"',
    "tensorrt": 'backend: "tensorrt"\nplatform: "tensorrt_plan"',
}
_US_PER_MS = 1000


def config_text(
    name: str,
    *,
    runtime: str,
    interface: Interface,
    sizes: Mapping[str, Sequence[int]],
    settings: ModelSettings,
    max_batch: int,
    parameters: Mapping[str, str],
    plans: Mapping[str, str] | None = None,
    n_profiles: int = 1,
    warm_files: Mapping[str, str] | None = None,
    label_files: Mapping[str, str] | None = None,
    kind: str = "",
) -> str:
    """Return the content of a `config.pbtxt`.

    Args:
        name: name of the model.
        runtime: `python`, `onnxruntime` or `tensorrt`.
        interface: its inputs and outputs.
        sizes: dims of each input to warm up with, by name; of a model that is not batched with one sample.
        settings: how it is served.
        max_batch: maximum number of samples in one execution; it replaces that of the settings. 0 for a model
            that is not batched.
        parameters: strings to store in the configuration, as the hash of the manifest.
        plans: for `tensorrt`, file name by compute capability, as {"9.0": "model-sm90.plan"}.
        n_profiles: number of profiles of each plan.
        warm_files: by input the file in the model's folder `WARMUP_FOLDER` that holds one sample to warm up
            with; an input without one gets zeros.
        label_files: of outputs that are scores of classes, the file with the names of the classes, by name of
            the output.
        kind: where instances run, as `KIND_CPU`; empty for a GPU where there is one.
    """
    labels = label_files or {}
    outputs = [_tensor(one, interface.batched, labels.get(one.name)) for one in interface.outputs]
    blocks = [
        _head(name),
        _BACKENDS[runtime],
        f"max_batch_size: {max_batch}",
        f"input [{','.join(_tensor(one, interface.batched) for one in interface.inputs)}]",
        f"output [{','.join(outputs)}]",
        _instance_group(runtime, settings, n_profiles, kind),
        *([_batching(interface, settings)] if settings.batching and max_batch else []),
        "version_policy { latest { num_versions: 1 } }",
        *([_warmup(interface, sizes, max_batch, warm_files or {})] if settings.warmup else []),
    ]
    if runtime == "onnxruntime":
        parameters = {**parameters, "intra_op_thread_count": str(settings.threads)}
    if runtime == "tensorrt":
        blocks += _tensorrt(plans or {})
    return "\n".join([*blocks, *_parameters(parameters)]) + "\n"


def ensemble_text(
    name: str,
    *,
    interface: Interface,
    steps: Sequence[tuple[str, Mapping[str, str], Mapping[str, str]]],
    max_batch: int,
    parameters: Mapping[str, str],
    label_files: Mapping[str, str],
) -> str:
    """Return the content of the `config.pbtxt` of a model that is a chain of others.

    Args:
        name: name of the model.
        interface: its inputs and outputs.
        steps: of each the name of its model, and the ensemble's tensor by the name of its input, and output.
        max_batch: maximum number of samples in one request.
        parameters: as of `config_text`, as are `label_files`.
    """
    inputs = ",".join(_tensor(one, interface.batched) for one in interface.inputs)
    outputs = ",".join(
        _tensor(one, interface.batched, label_files.get(one.name)) for one in interface.outputs
    )
    chain = [
        "\n".join(
            [
                f"  {{ model_name: {json.dumps(model)} model_version: -1",
                *_map("input_map", taken),
                *_map("output_map", given),
                "  }",
            ]
        )
        for model, taken, given in steps
    ]
    blocks = [
        _head(name),
        'platform: "ensemble"',
        f"max_batch_size: {max_batch}",
        f"input [{inputs}]",
        f"output [{outputs}]",
        "ensemble_scheduling { step [\n" + ",\n".join(chain) + "\n] }",
    ]
    return "\n".join([*blocks, *_parameters(parameters)]) + "\n"


def _head(name: str) -> str:
    where = "https://github.com/triton-inference-server/server"
    return f"# {name}: written by sparse-export. {where} documents the fields.\nname: {json.dumps(name)}"


def _map(field: str, tensors: Mapping[str, str]) -> list[str]:
    return [f"    {field} {{ key: {_text(key)} value: {_text(value)} }}" for key, value in tensors.items()]


def _parameters(parameters: Mapping[str, str]) -> list[str]:
    return [
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in sorted(parameters.items())
    ]


def _dims(dims: Sequence[int]) -> str:
    return ", ".join(map(str, dims))


def _text(value: str) -> str:
    """A string of the text format, which takes UTF-8 as it is."""
    return json.dumps(value, ensure_ascii=False)


def _tensor(spec: TensorSpec, batched: bool, label_file: str | None = None) -> str:
    reshape = " reshape { shape: [ ] }" if spec.is_scalar and batched else ""
    dims = f"dims: [ {_dims(spec.dims)} ]{reshape}"
    labels = "" if label_file is None else f" label_filename: {_text(label_file)}"
    return f" {{ name: {_text(spec.name)} data_type: TYPE_{spec.dtype} {dims}{labels} }} "


def _instance_group(runtime: str, settings: ModelSettings, n_profiles: int, kind: str) -> str:
    # KIND_AUTO is a GPU where there is one, else the CPU. An engine needs a GPU.
    kind = kind or ("KIND_GPU" if runtime == "tensorrt" else "KIND_AUTO")
    profiles = ""
    if runtime == "tensorrt" and n_profiles > 1:  # else the server takes the first for every batch
        profiles = f" profile: [ {', '.join(json.dumps(str(at)) for at in range(n_profiles))} ]"
    return f"instance_group [ {{ kind: {kind} count: {settings.instances}{profiles} }} ]"


def _batching(interface: Interface, settings: ModelSettings) -> str:
    # With a limit the server's batcher sleeps for up to half a second wherever a request of another length
    # ends a batch (Triton 2.51).
    has_lengths = any(-1 in one.dims for one in interface.inputs)
    size, timeout_ms = (
        (0 if has_lengths else default) if given is None else given
        for given, default in (
            (settings.queue_size, DEFAULT_QUEUE_SIZE),
            (settings.queue_timeout_ms, DEFAULT_QUEUE_TIMEOUT_MS),
        )
    )
    lines = [f"  max_queue_delay_microseconds: {settings.batch_delay_us}"]
    policy = []
    if timeout_ms:
        policy.append("timeout_action: REJECT")
        policy.append(f"default_timeout_microseconds: {timeout_ms * _US_PER_MS}")
    if size:
        policy.append(f"max_queue_size: {size}")
    if policy:  # a policy without limits would still cost the server its prefetching
        lines += ["  default_queue_policy {", *(f"    {line}" for line in policy), "  }"]
    return "\n".join(["dynamic_batching {", *lines, "}"])


def _warmup(
    interface: Interface, sizes: Mapping[str, Sequence[int]], max_batch: int, files: Mapping[str, str]
) -> str:
    values = {name: f"input_data_file: {_text(file)}" for name, file in files.items()}
    inputs = [
        f"inputs {{ key: {_text(one.name)} value {{ data_type: TYPE_{one.dtype} "
        f"dims: [ {_dims(sizes[one.name])} ] {values.get(one.name, 'zero_data: true')} }} }}"
        for one in interface.inputs
    ]
    samples = [
        "\n".join([f'  {{ name: "batch of {n}" batch_size: {n}', *(f"    {one}" for one in inputs), "  }"])
        for n in sorted({1, max_batch or 1})
    ]
    return "model_warmup [\n" + ",\n".join(samples) + "\n]"


def _tensorrt(plans: Mapping[str, str]) -> list[str]:
    ordered = sorted(plans.items(), key=lambda item: float(item[0]))
    return [
        f"default_model_filename: {json.dumps(ordered[0][1])}",
        *(
            f"cc_model_filenames {{ key: {json.dumps(capability)} value: {json.dumps(file)} }}"
            for capability, file in ordered
        ),
        "optimization { cuda { graphs: true output_copy_stream: true } }",
    ]


def check_config(text: str, where: Path | str) -> Any:
    """Parse a configuration by the schema of Triton's client.

    Args:
        text: content of a `config.pbtxt`.
        where: its path, for the error.

    Returns:
        The message, an `inference.ModelConfig`.

    Raises:
        ArtefactError: the text is not a model configuration; the error has line and column.
        MissingCapability: tritonclient is not installed.
    """
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc import model_config_pb2
    except ImportError as cause:
        raise MissingCapability(
            f"Model configurations cannot be checked without Triton's client: {cause}.",
            do=f"Run {how_to_get('serve')}.",
        ) from cause
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as cause:
        line, column = cause.GetLine(), cause.GetColumn()
        place = f"{where}:{line}:{column}" if line is not None else str(where)
        reason = str(cause).removeprefix(f"{line}:{column} : ")
        raise ArtefactError(
            f"{place} is not a model configuration: {reason}", do="Correct that line."
        ) from cause
