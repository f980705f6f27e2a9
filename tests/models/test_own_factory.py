"""A user's own network by `package.module:factory`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from sparse_export import models
from sparse_export.errors import UnknownNameError, UsageError

SOURCE = """
import torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

class Holder:
    @staticmethod
    def make():
        return Net()

def sized(n):
    return torch.nn.Linear(n, 2)

def optional(n=5):
    return torch.nn.Linear(n, 2)

def classes(n_classes):
    return torch.nn.Linear(3, n_classes)

class Classes(torch.nn.Linear):
    def __init__(self, *, n_classes=4):
        super().__init__(3, n_classes)

def anything(**settings):
    return torch.nn.Linear(3, settings.get("n_classes", 2))

def positional(n_classes=2, /):
    return torch.nn.Linear(3, n_classes)

def two(n, n_classes):
    return torch.nn.Linear(n, n_classes)

def wrong():
    return {"weight": torch.zeros(2)}

def fails():
    raise FileNotFoundError("weights.bin")

ready = torch.nn.Linear(3, 2)
number = 3
"""


@pytest.fixture(autouse=True)
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(SOURCE)
    (package / "broken.py").write_text("import no_such_library\n")
    (package / "garbled.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["Net", "Holder.make", "optional"])
def test_a_callable_without_required_arguments_makes_the_network(attribute: str) -> None:
    assert isinstance(models.create(f"own_package.nets:{attribute}"), nn.Linear)


def test_each_call_makes_a_new_network() -> None:
    assert models.create("own_package.nets:Net") is not models.create("own_package.nets:Net")


@pytest.mark.parametrize(
    ("attribute", "n_classes", "n_logits"),
    [
        ("classes", 7, 7),
        ("Classes", 7, 7),
        ("Classes", None, 4),
        ("Net", 7, 2),
        ("optional", 7, 2),
        ("anything", 7, 2),
        ("positional", 7, 2),
    ],
)
def test_the_number_of_classes_is_told_to_a_factory_that_has_a_parameter_for_it(
    attribute: str, n_classes: int | None, n_logits: int
) -> None:
    network = models.create(f"own_package.nets:{attribute}", n_classes)
    assert isinstance(network, nn.Linear) and network.out_features == n_logits


def test_a_factory_that_needs_more_than_the_number_of_classes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"needs arguments: \(n, \*, n_classes=7\).*Wrap it"):
        models.create("own_package.nets:two", 7)


def test_a_factory_that_needs_the_number_of_classes_is_refused_without_it() -> None:
    with pytest.raises(UsageError, match=r"needs arguments: \(n_classes\).*only n_classes may be left"):
        models.create("own_package.nets:classes")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own_package.absent:make",
            r"own_package\.absent .*cannot be imported: ModuleNotFoundError.*PYTHONPATH",
        ),
        (
            "own_package.broken:make",
            r"cannot be imported: ModuleNotFoundError: No module named 'no_such_library'",
        ),
        ("own_package.garbled:make", r"cannot be imported: SyntaxError"),
        ("own_package.nets:absent", r"has no 'absent'.* Net, .*Correct the name"),
        ("own_package.nets:number", r"a value of type int.*callable.*Name a function"),
        ("own_package.nets:ready", r"torch\.nn\.modules\.linear\.Linear.*Name a function or a class"),
        ("own_package.nets:sized", r"needs arguments: \(n\).*Wrap it in a function"),
        ("own_package.nets:wrong", r"returned a value of type dict.*Return the network itself"),
        ("own_package.nets:fails", r"failed with FileNotFoundError: weights\.bin"),
        (":make", r"':make' does not name a factory"),
        ("own_package.nets:", r"'own_package\.nets:' does not name a factory"),
        ("own package:make", r"does not name a factory.*package\.module:factory"),
        ("own_package:nets:Net", r"does not name a factory"),
        ("..nets:Net", r"does not name a factory"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused_with_the_way_out(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.create(name)


def test_a_colon_makes_a_name_a_factory_and_nothing_is_imported_to_tell() -> None:
    assert models.is_factory("own_package.nets:Net")
    assert not models.is_factory("lenet5")
    assert "own_package.nets" not in sys.modules


def test_nothing_is_known_of_an_own_factory_beforehand() -> None:
    with pytest.raises(UnknownNameError, match=r"own_package\.nets:Net"):
        models.spec("own_package.nets:Net")
    assert models.input_shape("own_package.nets:Net") is None
    assert "own_package.nets" not in sys.modules
