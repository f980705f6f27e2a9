"""What can be asked of an engine is checked first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_export.engines.options import (
    EngineOptions,
    Profile,
    engine_file,
    engine_options,
    parse_architectures,
    parse_profile,
    require_buildable,
)
from sparse_export.errors import UnknownNameError, UsageError
from tests.engines.conftest import SMALL
from tests.named_graphs import PICTURES, WORDS

_BOUNDS = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted).map(tuple)
_NAMES = st.text(st.characters(exclude_characters=",", exclude_categories=["Z", "C"]), min_size=1)


@given(st.dictionaries(_NAMES, _BOUNDS, min_size=1))
def test_a_profile_is_read_as_it_is_written(sizes: dict[str, tuple[int, int, int]]) -> None:
    profile = Profile(sizes=sizes)
    assert parse_profile(str(profile)) == profile


def test_one_number_is_all_three_and_without_a_name_they_are_the_batch() -> None:
    assert parse_profile("4").sizes == {"batch": (4, 4, 4)}
    assert parse_profile("1:8:32, past + new = 16:128:512").sizes == {
        "batch": (1, 8, 32),
        "past + new": (16, 128, 512),
    }


def test_a_profile_bounds_every_free_size_and_the_batch_by_whatever_name() -> None:
    named = replace(WORDS, batch="batch", sizes={})
    assert parse_profile("sequence=2:4:8").bounds(named) == {"batch": (1, 8, 32), "sequence": (2, 4, 8)}
    assert parse_profile("2").bounds(PICTURES) == {"n": (2, 2, 2)}
    assert Profile().bounds(PICTURES) == {"n": (1, 8, 32)}
    assert Profile().bounds(replace(SMALL, inputs=(), batch=None)) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1:8:32", r"No profile bounds sequence.*--profile batch=1:8:32,sequence=12\.$"),
        ("batch=4", r"--profile batch=4,sequence=12\.$"),
        ("sequence=4,height=8", r"bounds height, which is no free size.*The free sizes are batch, sequence"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused_with_what_to_type(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_profile(text).bounds(WORDS)


def test_a_network_of_fixed_sizes_takes_no_profile() -> None:
    with pytest.raises(UsageError, match="none is free"):
        parse_profile("4").bounds(
            replace(SMALL, inputs=(replace(SMALL.inputs[0], shape=(3, 16)),), batch=None)
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1:2",
        "=1",
        "1,2",
        "a=1,a=2",
        "1:2:3,",
        "0:1:2",
        "2:1:3",
        "1:3:2",
        "a:b:c",
        "-1:2:3",
        "1:2:3:4",
        "1.5",
        "\uff11:2:3",
        "9" * 30,
    ],
)
def test_other_texts_are_no_profile(text: str) -> None:
    with pytest.raises(UsageError, match="MIN"):
        parse_profile(text)


@given(st.text())
def test_any_text_is_a_profile_or_a_usage_error(text: str) -> None:
    try:
        profile = parse_profile(text)
    except UsageError:
        return
    assert all(1 <= a <= b <= c for a, b, c in profile.sizes.values())


def test_architectures_come_once_each_and_in_order() -> None:
    assert parse_architectures(" sm120, SM80,sm89,sm80 ") == ("sm80", "sm89", "sm120")
    assert parse_architectures("") == ()


@pytest.mark.parametrize("text", ["80", "sm", "sm8", "sm08", "ampere", "sm80;sm86", "sm1234"])
def test_other_words_are_no_architecture(text: str) -> None:
    with pytest.raises(UsageError, match="sm80"):
        parse_architectures(text)


@pytest.mark.parametrize(
    "options",
    [
        {"target": "tensorrt", "architectures": ("sm80",)},
        {"target": "tensorrt-rtx", "hardware": "ampere-plus"},
        {"target": "tensorrt-rtx", "version_compatible": True},
        {"target": "tensorrt", "profiles": ()},
        {"target": "tensorrt", "optimization_level": 6},
        {"target": "tensorrt", "workspace_bytes": 0},
        {"target": "tensorrt-rtx", "architectures": ("ampere",)},
    ],
)
def test_options_that_a_target_has_not_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EngineOptions(**options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="ampere-plus"):
        EngineOptions(target="tensorrt", hardware="ampere")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="tensorrt"):
        EngineOptions(target="openvino")  # type: ignore[arg-type]


def test_words_go_to_the_targets_that_know_them() -> None:
    full, rtx = engine_options(
        ["tensorrt-rtx", "onnx", "tensorrt"],
        profiles=["1:2:4", "8"],
        architectures="sm89",
        workspace_mib=2,
        hardware="ampere-plus",
    )
    assert (full.target, full.hardware, full.architectures) == ("tensorrt", "ampere-plus", ())
    assert (rtx.target, rtx.hardware, rtx.architectures) == ("tensorrt-rtx", "none", ("sm89",))
    assert {one.workspace_bytes for one in (full, rtx)} == {2 << 20}
    assert [str(profile) for profile in full.profiles] == ["batch=1:2:4", "batch=8"]


@pytest.mark.parametrize(
    ("targets", "words", "option"),
    [
        (["onnx"], {"profiles": ["1:2:3"]}, "--profile"),
        (["onnx"], {"workspace_mib": 1}, "--workspace"),
        (["onnx"], {"optimization_level": 0}, "--opt-level"),
        (["tensorrt"], {"architectures": "sm80"}, "--gpu-arch"),
        (["tensorrt-rtx"], {"hardware": "ampere-plus"}, "--hardware-compatible"),
        (["tensorrt-rtx"], {"version_compatible": True}, "--version-compatible"),
    ],
)
def test_words_that_no_target_takes_are_refused(
    targets: list[str], words: dict[str, Any], option: str
) -> None:
    with pytest.raises(UsageError, match=f"{option} was given"):
        engine_options(targets, **words)


@pytest.mark.parametrize(("precision", "oldest"), [("bf16", "sm75"), ("fp8", "sm86")])
def test_a_gpu_without_the_arithmetic_is_refused(precision: Any, oldest: str) -> None:
    with pytest.raises(UsageError, match=f"{oldest} has no {precision}"):
        require_buildable(precision, ["sm120", oldest])
    require_buildable(precision, ["sm89", "sm120"])


def test_an_engine_is_named_by_what_it_is_for() -> None:
    assert (
        engine_file("tensorrt-rtx", "fp16", ("sm80", "sm89")) == "engines/tensorrt-rtx-fp16-sm80+sm89.engine"
    )
    assert engine_file("tensorrt", "fp32", ()) == "engines/tensorrt-fp32-default.engine"
