"""config.pbtxt says what the settings say, by Triton's own schema."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.errors import ArtefactError, MissingCapability, UsageError
from sparse_export.serving.model_config import check_config, config_text
from sparse_export.serving.settings import ModelSettings
from sparse_export.serving.tensors import Interface, TensorSpec, interface_of
from sparse_export.signature import Signature, TensorInfo
from tests.named_graphs import PICTURES, SPOKEN, WORDS

INPUT = TensorSpec(name="input", dtype="FP32", dims=(3, 32, 32))
OUTPUT = TensorSpec(name="logits", dtype="FP16", dims=(10,))
PLAIN = Interface(inputs=(INPUT,), outputs=(OUTPUT,), batched=True)


def _text(runtime: str = "python", max_batch: int = 64, **changes: object) -> str:
    return config_text(
        "net",
        runtime=runtime,
        interface=PLAIN,
        sizes={"input": INPUT.dims},
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


def _named(signature: Signature, sizes: dict[str, tuple[int, ...]], max_batch: int, **settings: Any) -> Any:
    text = config_text(
        "net",
        runtime="python",
        interface=interface_of(signature),
        sizes=sizes,
        settings=ModelSettings(**settings),
        max_batch=max_batch,
        parameters={},
    )
    return check_config(text, "config.pbtxt")


def test_every_input_and_output_is_there_with_its_type_and_free_sizes() -> None:
    message = _named(WORDS, {"input_ids": (12,), "attention_mask": (12,)}, 64)
    assert [(one.name, one.data_type, list(one.dims)) for one in message.input] == [
        ("input_ids", message.input[0].data_type, [-1]),
        ("attention_mask", message.input[0].data_type, [-1]),
    ]
    types = message.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [types[one.data_type].name for one in (*message.input, *message.output)] == [
        *["TYPE_INT64"] * 2,
        "TYPE_FP32",
        "TYPE_INT64",
    ]
    assert [list(one.dims) for one in message.output] == [[-1, 8], [-1]]
    warm = {sample.batch_size: sample.inputs["attention_mask"] for sample in message.model_warmup}
    assert warm.keys() == {1, 64}
    assert list(warm[64].dims) == [12]


def test_a_network_whose_samples_do_not_all_come_first_is_not_batched() -> None:
    message = _named(SPOKEN, {"sound": (1, 16), "state": (2, 1, 4)}, 0)
    assert (message.max_batch_size, message.HasField("dynamic_batching")) == (0, False)
    assert [list(one.dims) for one in message.input] == [[-1, -1], [2, -1, 4]]
    (warm,) = message.model_warmup
    assert (warm.batch_size, list(warm.inputs["state"].dims)) == (1, [2, 1, 4])


@pytest.mark.parametrize(
    ("outputs", "batched"),
    [
        ((("batch", 3),), True),
        ((("batch",),), True),
        ((("batch", "batch"),), False),  # how alike samples are: another answer in another company
        (((3,),), False),
        ((("n_boxes", 4),), False),
    ],
)
def test_requests_are_merged_only_where_samples_come_first_in_everything(
    outputs: tuple[tuple[int | str, ...], ...], batched: bool
) -> None:
    signature = Signature(
        inputs=(TensorInfo(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=tuple(
            TensorInfo(name=f"y{at}", dtype="float32", shape=one) for at, one in enumerate(outputs)
        ),
    )
    assert interface_of(signature).batched is batched


def test_a_size_of_nothing_but_the_batch_is_one_of_1_on_the_wire_that_the_server_takes_away() -> None:
    signature = Signature(
        inputs=(TensorInfo(name="x", dtype="bool", shape=("batch",)),),
        outputs=(TensorInfo(name="y", dtype="bool", shape=("batch",)),),
    )
    message = _named(signature, {"x": (1,)}, 8)
    assert list(message.input[0].dims) == [1]
    assert message.input[0].HasField("reshape")
    assert list(message.input[0].reshape.shape) == []
    (spec,) = interface_of(signature).inputs
    sent = spec.to_wire(np.array([True, False]))
    assert sent.shape == (2, 1)
    assert spec.from_wire(sent).tolist() == [True, False]


def test_names_of_any_kind_are_read_back_as_they_are() -> None:
    names = ['the "first"', "a/b:0", "\u00e9\n", "back\\slash"]
    signature = Signature(
        inputs=tuple(TensorInfo(name=one, dtype="int8", shape=("batch", 2)) for one in names),
        outputs=(TensorInfo(name="y", dtype="uint64", shape=("batch", 2)),),
    )
    message = _named(signature, dict.fromkeys(names, (2,)), 4)
    assert [one.name for one in message.input] == names
    assert set(message.model_warmup[0].inputs) == set(names)


@pytest.mark.parametrize(
    ("signature", "settings", "limits"),
    [
        (PICTURES, {}, (512, 5_000_000)),
        (WORDS, {}, (0, 0)),
        (WORDS, {"queue_size": 9}, (9, 0)),
        (WORDS, {"queue_timeout_ms": 2}, (0, 2000)),
    ],
)
def test_inputs_of_mixed_lengths_wait_without_a_limit_that_nobody_gave(
    signature: Signature, settings: dict[str, int], limits: tuple[int, int]
) -> None:
    sizes = {one.name: (4,) * (len(one.shape) - 1) for one in signature.inputs}
    message = _named(signature, sizes, 8, **settings)
    policy = message.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == limits
