"""Networks of the timm library by `timm:NAME`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_export import models
from sparse_export.errors import MissingCapability, UnknownNameError, UsageError

# What sparse-export uses of timm 1.0, in the shape that it has there.
STAND_IN = """
import os
from types import SimpleNamespace
from torch import nn

__version__ = "1.0.0"
said_of_telemetry = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
_SIDES = {"tiny_net": 6, "tiny_net.small": 4, "bare_net": None}

def list_models():
    return ["tiny_net", "bare_net"]

def is_model(name):
    return name.split(".")[0] in list_models()

def get_pretrained_cfg(name, allow_unregistered=True):
    if name not in _SIDES:
        raise RuntimeError(f"Invalid pretrained tag in {name}.")
    return _SIDES[name] and SimpleNamespace(input_size=(3, _SIDES[name], _SIDES[name]))

def create_model(name, pretrained=False, **kwargs):
    assert not pretrained
    side = _SIDES.get(name)
    if side is None:
        raise RuntimeError(f"no sizes for {name}")
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, kwargs.get("num_classes", 1000)))
"""


def forget_timm() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "timm.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    forget_timm()
    yield
    forget_timm()


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


@pytest.mark.usefixtures("no_timm")
@pytest.mark.parametrize("ask", [models.create, models.input_shape])
def test_without_timm_the_extra_to_install_is_named(ask: object) -> None:
    assert callable(ask)
    with pytest.raises(MissingCapability, match=r"timm:resnet10t needs the package timm.*'\.\[timm\]'"):
        ask("timm:resnet10t")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("n_classes", "n_logits"), [(None, 1000), (10, 10)])
def test_a_network_of_timm_has_as_many_classes_as_asked_for(n_classes: int | None, n_logits: int) -> None:
    network = models.create("timm:tiny_net", n_classes)
    assert network(torch.zeros(2, 3, 6, 6)).shape == (2, n_logits)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("of_user", "said"), [(None, "1"), ("0", "0")])
def test_timm_is_imported_where_its_downloads_report_only_what_the_user_allows(
    of_user: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    if of_user is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", of_user)
    models.create("timm:tiny_net")
    assert sys.modules["timm"].said_of_telemetry == said


@pytest.mark.usefixtures("stand_in")
def test_the_input_shape_is_that_of_the_default_configuration() -> None:
    shapes = [models.input_shape(f"timm:{name}") for name in ("tiny_net", "tiny_net.small", "bare_net")]
    assert shapes == [(3, 6, 6), (3, 4, 4), None]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinynet", r"timm 1\.0\.0 has no network named 'tinynet'.*Did you mean 'tiny_net'\?"),
        ("hf-hub:somebody/tiny_net", r"has no network named 'hf-hub:somebody/tiny_net'"),
        ("local-dir:/tmp/tiny_net", r"has no network named"),
        ("", r"has no network named ''"),
        ("tiny_net.wrong", r"cannot make 'tiny_net\.wrong': RuntimeError"),
    ],
)
def test_a_name_that_timm_does_not_list_is_refused(name: str, message: str) -> None:
    for ask in (models.create, models.input_shape):
        with pytest.raises(UsageError, match=message):
            ask(f"timm:{name}")


@pytest.mark.usefixtures("stand_in")
def test_a_network_that_timm_fails_to_make_is_reported_with_the_cause() -> None:
    with pytest.raises(UsageError, match=r"timm cannot make 'bare_net': RuntimeError: no sizes for bare_net"):
        models.create("timm:bare_net")


def test_a_network_of_timm_is_no_factory_of_the_users_and_has_no_facts_beforehand() -> None:
    assert not models.is_factory("timm:resnet10t")
    assert models.is_factory("timm.models:resnet10t")
    with pytest.raises(UnknownNameError, match=r"'timm:resnet10t'"):
        models.spec("timm:resnet10t")


def test_the_real_timm_makes_a_network_of_the_shape_that_it_tells() -> None:
    pytest.importorskip("timm", reason="timm is not installed: pip install '.[timm]'")
    shape = models.input_shape("timm:resnet10t")
    assert shape is not None
    network = models.create("timm:resnet10t", 10).eval()
    assert isinstance(network, nn.Module)
    assert network(torch.zeros(2, *shape)).shape == (2, 10)
    with pytest.raises(UsageError, match=r"has no network named 'hf-hub:timm/resnet10t\.c3_in1k'"):
        models.create("timm:hf-hub:timm/resnet10t.c3_in1k")
