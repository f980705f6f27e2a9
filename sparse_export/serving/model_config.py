"""Triton's `config.pbtxt`: written from a few facts, and checked by the real schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import ArtefactError, MissingCapability
from sparse_export.serving.settings import ModelSettings

__all__ = ["TensorSpec", "check_config", "config_text"]

_BACKENDS = {
    "python": 'backend: "python"',
    "onnxruntime": 'backend: "onnxruntime"\nplatform: "onnxruntime_onnx"',
    "tensorrt": 'backend: "tensorrt"\nplatform: "tensorrt_plan"',
}
_US_PER_MS = 1000


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """An input or output of a model. dtype: as in `FP32`; dims: of one sample, without the batch axis."""

    name: str
    dtype: str
    dims: tuple[int, ...]


def config_text(
    name: str,
    *,
    runtime: str,
    inputs: TensorSpec,
    outputs: TensorSpec,
    settings: ModelSettings,
    max_batch: int,
    parameters: Mapping[str, str],
    plans: Mapping[str, str] | None = None,
    n_profiles: int = 1,
) -> str:
    """The content of a `config.pbtxt`.

    runtime: `python`, `onnxruntime` or `tensorrt`.  max_batch: samples in one execution, which those of the settings
    come to for this model.  parameters: free strings that come along, as the hash of the manifest.  plans: for
    `tensorrt`, file name by compute capability, as in {"9.0": "model-sm90.plan"}; n_profiles: of each.
    """
    blocks = [
        f"# {name}: written by sparse-export. https://github.com/triton-inference-server/server documents the fields.",
        f"name: {json.dumps(name)}",
        _BACKENDS[runtime],
        f"max_batch_size: {max_batch}",
        f"input [{_tensor(inputs)}]",
        f"output [{_tensor(outputs)}]",
        _instance_group(runtime, settings, n_profiles),
        *([_batching(settings)] if settings.batching else []),
        "version_policy { latest { num_versions: 1 } }",
        *([_warmup(inputs, max_batch)] if settings.warmup else []),
    ]
    if runtime == "onnxruntime":
        parameters = {**parameters, "intra_op_thread_count": str(settings.threads)}
    if runtime == "tensorrt":
        blocks += _tensorrt(plans or {})
    blocks += [
        f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
        for key, value in sorted(parameters.items())
    ]
    return "\n".join(blocks) + "\n"


def _dims(dims: Sequence[int]) -> str:
    return ", ".join(map(str, dims))


def _tensor(spec: TensorSpec) -> str:
    return f" {{ name: {json.dumps(spec.name)} data_type: TYPE_{spec.dtype} dims: [ {_dims(spec.dims)} ] }} "


def _instance_group(runtime: str, settings: ModelSettings, n_profiles: int) -> str:
    # KIND_AUTO is a GPU where there is one, else the CPU.  An engine runs nowhere but on a GPU.
    kind = "KIND_GPU" if runtime == "tensorrt" else "KIND_AUTO"
    profiles = ""
    if runtime == "tensorrt" and n_profiles > 1:  # else the server takes the first for every batch
        profiles = f" profile: [ {', '.join(json.dumps(str(at)) for at in range(n_profiles))} ]"
    return f"instance_group [ {{ kind: {kind} count: {settings.instances}{profiles} }} ]"


def _batching(settings: ModelSettings) -> str:
    lines = [f"  max_queue_delay_microseconds: {settings.batch_delay_us}"]
    policy = []
    if settings.queue_timeout_ms:
        policy.append("timeout_action: REJECT")
        policy.append(f"default_timeout_microseconds: {settings.queue_timeout_ms * _US_PER_MS}")
    if settings.queue_size:
        policy.append(f"max_queue_size: {settings.queue_size}")
    if policy:  # a policy without limits would still cost the server its prefetching
        lines += ["  default_queue_policy {", *(f"    {line}" for line in policy), "  }"]
    return "\n".join(["dynamic_batching {", *lines, "}"])


def _warmup(inputs: TensorSpec, max_batch: int) -> str:
    tensor = f"data_type: TYPE_{inputs.dtype} dims: [ {_dims(inputs.dims)} ] zero_data: true"
    samples = [
        f'  {{ name: "batch of {n}" batch_size: {n} inputs {{ key: {json.dumps(inputs.name)} value {{ {tensor} }} }} }}'
        for n in sorted({1, max_batch})
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
    """Parse by the schema of Triton's own client; the message, an `inference.ModelConfig`.

    where: the file, said in the error with line and column.
    Raises ArtefactError (not a model configuration) or MissingCapability (no tritonclient).
    """
    try:
        from google.protobuf import text_format  # type: ignore[import-untyped]
        from tritonclient.grpc import model_config_pb2
    except ImportError as cause:
        raise MissingCapability(
            f"Model configurations cannot be checked: {cause}.",
            expected="tritonclient was expected: nothing is written or served unchecked.",
            do="Run `pip install 'sparse-export[serve]'`.",
        ) from cause
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as cause:
        line, column = cause.GetLine(), cause.GetColumn()
        place = f"{where}:{line}:{column}" if line is not None else str(where)
        told = str(cause).removeprefix(f"{line}:{column} : ")
        raise ArtefactError(
            f"{place} is not a model configuration: {told}",
            expected="The fields of Triton's ModelConfig were expected.",
            do="Correct that line.",
        ) from cause
