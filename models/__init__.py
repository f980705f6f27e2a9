"""The networks that sparse-export knows by name, and the way to a user's own.

    name             input        classes   conv + linear weights
    lenet300-100     (1, 28, 28)  10        266,200
    lenet5           (1, 28, 28)  10        430,500
    digits-cnn       (1, 8, 8)    10         40,208

Every network takes float inputs (N, C, H, W) and gives logits (N, n_classes). `named_parameters()` goes in the
order of the forward pass, and layer names stay as they are from release to release, for checkpoints hold them.
Initial values are torch's defaults, drawn from the global generator: call `torch.manual_seed` before `create`.

A name with a colon, `package.module:factory`, is the user's own: a callable without arguments that returns a
`torch.nn.Module`. Creating it runs the user's code. Importing this package does not load torch.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_export.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["ModelSpec", "create", "is_factory", "names", "spec"]

_OWN = "For a network of your own, give package.module:factory."


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A known network. factory: makes it with fresh weights.  input_shape: (C, H, W) of one sample."""

    name: str
    factory: Callable[[], torch.nn.Module]
    input_shape: tuple[int, ...]
    n_classes: int


def _lenet300_100() -> torch.nn.Module:
    from sparse_export.models.lenet import LeNet300100

    return LeNet300100()


def _lenet5() -> torch.nn.Module:
    from sparse_export.models.lenet import LeNet5

    return LeNet5()


def _digits_cnn() -> torch.nn.Module:
    from sparse_export.models.digits import DigitsCNN

    return DigitsCNN()


_SPECS = {
    known.name: known
    for known in (
        ModelSpec(name="lenet300-100", factory=_lenet300_100, input_shape=(1, 28, 28), n_classes=10),
        ModelSpec(name="lenet5", factory=_lenet5, input_shape=(1, 28, 28), n_classes=10),
        ModelSpec(name="digits-cnn", factory=_digits_cnn, input_shape=(1, 8, 8), n_classes=10),
    )
}


def names() -> tuple[str, ...]:
    """The known networks, in the order of the table above."""
    return tuple(_SPECS)


def spec(name: str) -> ModelSpec:
    """What is known of a named network. Raises UnknownNameError, for a user's factory too."""
    if name not in _SPECS:
        raise UnknownNameError("model", name, _SPECS, do=_OWN)
    return _SPECS[name]


def is_factory(name: str) -> bool:
    """Is this written as a user's own `package.module:factory`? Nothing is imported."""
    return ":" in name


def create(name: str) -> torch.nn.Module:
    """A network with fresh weights, by known name or `package.module:factory`.

    Raises UnknownNameError, or UsageError when the factory cannot be imported or does not return a Module.
    """
    return _from_factory(name) if is_factory(name) else spec(name).factory()


def _from_factory(name: str) -> torch.nn.Module:
    import torch

    factory = _callable(name)
    try:
        module = factory()
    except Exception as cause:
        raise UsageError(
            f"The factory {name} failed with {type(cause).__name__}: {cause}.",
            expected="It was expected to return a torch.nn.Module.",
            do="Call it in Python to see the whole traceback.",
        ) from cause
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"The factory {name} returned {_kind(module)}.",
            expected="A torch.nn.Module was expected.",
            do="Return the network itself from it.",
        )
    return module


def _callable(name: str) -> Callable[[], Any]:
    import torch

    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise UsageError(
            f"{name!r} does not name a factory.",
            expected="package.module:factory was expected, like my_package.nets:small_cnn.",
            do=f"Write it so, or choose one of {', '.join(names())}.",
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as cause:
        raise UsageError(
            f"The module {module_name} of model {name} cannot be imported: {type(cause).__name__}: {cause}.",
            expected="A module that Python finds and that loads without an error was expected.",
            do="Install its package, or put the folder that holds it on PYTHONPATH.",
        ) from cause
    try:
        found = operator.attrgetter(attribute)(module)
    except AttributeError as cause:
        public = ", ".join(sorted(key for key in vars(module) if not key.startswith("_"))) or "nothing"
        raise UsageError(
            f"The module {module_name} has no {attribute!r}.",
            expected=f"A factory of that name was expected; {module_name} has: {public}.",
            do="Correct the name after the colon.",
        ) from cause
    if isinstance(found, torch.nn.Module) or not callable(found):
        raise UsageError(
            f"{name} is {_kind(found)}.",
            expected="A callable that takes no arguments and returns a torch.nn.Module was expected.",
            do="Name a function or a class.",
        )
    if not _takes_nothing(found):
        raise UsageError(
            f"The factory {name} needs arguments: {inspect.signature(found)}.",
            expected="A callable that takes no arguments was expected.",
            do="Wrap it in a function that fills them in.",
        )
    return found  # type: ignore[no-any-return]  # attrgetter gives Any; checked above


def _takes_nothing(function: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # builtins without a signature
        return True
    try:
        signature.bind()
    except TypeError:
        return False
    return True


def _kind(value: object) -> str:
    return f"a value of type {type(value).__module__}.{type(value).__qualname__}"
