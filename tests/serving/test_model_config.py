"""config.pbtxt says what the settings say, by Triton's own schema."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import ArtefactError, MissingCapability, UsageError
from sparse_export.serving.model_config import TensorSpec, check_config, config_text
from sparse_export.serving.settings import ModelSettings

INPUT = TensorSpec(name="input", dtype="FP32", dims=(3, 32, 32))
OUTPUT = TensorSpec(name="logits", dtype="FP16", dims=(10,))


def _text(runtime: str = "python", max_batch: int = 64, **changes: object) -> str:
    return config_text(
        "net",
        runtime=runtime,
        inputs=INPUT,
        outputs=OUTPUT,
        settings=ModelSettings(**changes),  # type: ignore[arg-type]
        max_batch=max_batch,
        parameters={"manifest_sha256": "ab" * 32},
        plans={"9.0": "model-sm90.plan", "12.0": "model-sm120.plan", "8.6": "model-sm86.plan"},
    )


@given(
    max_batch=st.integers(1, 65536),
    batching=st.booleans(),
    batch_delay_us=st.integers(0, 10_000_000),
    instances=st.integers(1, 1024),
    queue_size=st.integers(0, 10_000_000),
    queue_timeout_ms=st.integers(0, 3_600_000),
    warmup=st.booleans(),
    runtime=st.sampled_from(["python", "onnxruntime", "tensorrt"]),
)
def test_the_parsed_configuration_has_every_setting(
    max_batch: int,
    batching: bool,
    batch_delay_us: int,
    instances: int,
    queue_size: int,
    queue_timeout_ms: int,
    warmup: bool,
    runtime: str,
) -> None:
    text = _text(
        runtime,
        max_batch=max_batch,
        batching=batching,
        batch_delay_us=batch_delay_us,
        instances=instances,
        queue_size=queue_size,
        queue_timeout_ms=queue_timeout_ms,
        warmup=warmup,
    )
    message = check_config(text, "config.pbtxt")
    assert (message.name, message.backend, message.max_batch_size) == ("net", runtime, max_batch)
    assert (message.input[0].name, list(message.input[0].dims)) == ("input", [3, 32, 32])
    assert (message.output[0].name, list(message.output[0].dims)) == ("logits", [10])
    assert message.instance_group[0].count == instances
    assert message.HasField("dynamic_batching") == batching
    policy = message.dynamic_batching.default_queue_policy
    limits = (policy.max_queue_size, policy.default_timeout_microseconds)
    assert limits == ((queue_size, queue_timeout_ms * 1000) if batching else (0, 0))
    assert message.dynamic_batching.max_queue_delay_microseconds == (batch_delay_us if batching else 0)
    assert [sample.batch_size for sample in message.model_warmup] == (
        sorted({1, max_batch}) if warmup else []
    )
    assert message.parameters["manifest_sha256"].string_value == "ab" * 32
    assert message.version_policy.latest.num_versions == 1


def test_a_queue_without_limits_has_no_policy() -> None:
    message = check_config(_text(queue_size=0, queue_timeout_ms=0), "config.pbtxt")
    assert not message.dynamic_batching.HasField("default_queue_policy")


def test_an_engine_for_each_type_of_gpu_is_named_by_its_capability() -> None:
    message = check_config(_text("tensorrt"), "config.pbtxt")
    assert dict(message.cc_model_filenames) == {
        "8.6": "model-sm86.plan",
        "9.0": "model-sm90.plan",
        "12.0": "model-sm120.plan",
    }
    assert message.default_model_filename == "model-sm86.plan"
    assert message.platform == "tensorrt_plan"
    assert message.optimization.cuda.graphs
    assert message.instance_group[0].kind == message.instance_group[0].KIND_GPU


@pytest.mark.parametrize(
    ("wrong", "right", "line"),
    [("max_batch_sizes", "max_batch_size", 4), ("TYPE_FP33", "TYPE_FP32", 5), ("KIND_XPU", "KIND_AUTO", 7)],
)
def test_a_wrong_field_is_told_with_its_line_and_column(wrong: str, right: str, line: int) -> None:
    text = _text().replace(right, wrong, 1)
    with pytest.raises(
        ArtefactError, match=rf"some/config\.pbtxt:{line}:\d+ is not a model configuration"
    ) as error:
        check_config(text, "some/config.pbtxt")
    assert wrong in str(error.value)


def test_without_tritonclient_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(MissingCapability, match=r"\.\[serve\]"):
        check_config(_text(), "config.pbtxt")


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch": 0},
        {"instances": 0},
        {"threads": 0},
        {"queue_size": -1},
        {"queue_timeout_ms": -1},
        {"batch_delay_us": -1},
    ],
)
def test_a_number_out_of_range_is_wrong_usage(changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        ModelSettings(**changes)  # type: ignore[arg-type]
