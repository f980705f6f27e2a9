"""The networks that sparse-export knows by name, and the ways to others.

    name             input          classes   weights        in tensors
    lenet300-100     (1, 28, 28)    10            266,200     3
    lenet5           (1, 28, 28)    10            430,500     4
    digits-cnn       (1, 8, 8)      10             40,208     5
    alexnet-s        (3, 32, 32)    10          5,066,784     8
    alexnet-b        (3, 32, 32)    10          8,484,896     8
    vgg-c            (3, 32, 32)    10         11,307,712    16
    vgg-d            (3, 32, 32)    10         15,239,872    16
    vgg-like         (3, 32, 32)    10         14,977,728    15
    wrn-28-2         (3, 32, 32)    10          1,463,984    29
    wrn-22-8         (3, 32, 32)    10         17,147,312    23
    wrn-16-8         (3, 32, 32)    10         10,954,160    17
    wrn-16-10        (3, 32, 32)    10         17,107,632    17
    resnet18         (3, 224, 224)  1000       11,678,912    21
    resnet34         (3, 224, 224)  1000       21,779,648    37
    resnet50         (3, 224, 224)  1000       25,502,912    54
    vit-b-16         (3, 224, 224)  1000       86,292,480    50
    vit-l-16         (3, 224, 224)  1000      303,800,320    98

Weights are those of convolutions, linear layers and the input projections of attention, which sparse training
may mask. The CIFAR-10 networks are those of Dettmers and Zettlemoyer 2019, "Sparse Networks from Scratch";
the ImageNet networks are torchvision's, with random weights, and torchvision is imported when one is created.

Every network takes float inputs (N, C, H, W) and gives logits (N, n_classes). Layer names stay as they are
from release to release, for checkpoints hold them; in the networks defined here `named_parameters()` goes in
the order of the forward pass. Initial values are torch's defaults, in the wide residual networks He's and in
torchvision's networks torchvision's, drawn from the global generator: call `torch.manual_seed` before
`create`.

`timm:NAME` is a network of the timm library (extra `timm`), with random weights.

Another name with a colon, `package.module:factory`, is the user's own: a callable that returns a
`torch.nn.Module` and needs no argument, save perhaps `n_classes`. Creating it runs the user's code. Importing
this package does not load torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sparse_export.errors import UnknownNameError, UsageError
from sparse_export.models.names import TIMM, is_factory
from sparse_export.own_code import attribute_named, current_folder_first, kind_of, module_named

if TYPE_CHECKING:
    import torch

__all__ = [
    "ModelSpec",
    "create",
    "example_beside",
    "function_named",
    "input_shape",
    "is_factory",
    "names",
    "spec",
    "torchvision_constructor",
]

_OWN = "For a network of timm, give timm:NAME; for one of your own, package.module:factory."


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A known network.

    Attributes:
        name: of the network.
        factory: creates it with fresh weights for a number of classes.
        input_shape: (C, H, W) of one sample.
        n_classes: its own number of classes.
    """

    name: str
    factory: Callable[[int], torch.nn.Module]
    input_shape: tuple[int, ...]
    n_classes: int


def _lenet300_100(n_classes: int) -> torch.nn.Module:
    from sparse_export.models.lenet import LeNet300100

    return LeNet300100(n_classes)


def _lenet5(n_classes: int) -> torch.nn.Module:
    from sparse_export.models.lenet import LeNet5

    return LeNet5(n_classes)


def _digits_cnn(n_classes: int) -> torch.nn.Module:
    from sparse_export.models.digits import DigitsCNN

    return DigitsCNN(n_classes)


def _alexnet(n_classes: int, *, hidden: int) -> torch.nn.Module:
    from sparse_export.models.cifar_alexnet import CifarAlexNet

    return CifarAlexNet(hidden, n_classes)


def _vgg(n_classes: int, *, pointwise: bool, n_hidden: int) -> torch.nn.Module:
    from sparse_export.models.cifar_vgg import CifarVGG

    return CifarVGG(pointwise=pointwise, n_hidden=n_hidden, n_classes=n_classes)


def _wrn(n_classes: int, *, depth: int, widen: int) -> torch.nn.Module:
    from sparse_export.models.wide_resnet import WideResNet

    return WideResNet(depth, widen, n_classes)


def _torchvision(n_classes: int, *, constructor: str) -> torch.nn.Module:
    from torchvision import models

    module: torch.nn.Module = getattr(models, constructor)(weights=None, num_classes=n_classes)
    return module


def _cifar10(name: str, factory: Callable[[int], torch.nn.Module]) -> ModelSpec:
    return ModelSpec(name=name, factory=factory, input_shape=(3, 32, 32), n_classes=10)


def _imagenet(name: str, constructor: str) -> ModelSpec:
    factory = partial(_torchvision, constructor=constructor)
    return ModelSpec(name=name, factory=factory, input_shape=(3, 224, 224), n_classes=1000)


_SPECS = {
    known.name: known
    for known in (
        ModelSpec(name="lenet300-100", factory=_lenet300_100, input_shape=(1, 28, 28), n_classes=10),
        ModelSpec(name="lenet5", factory=_lenet5, input_shape=(1, 28, 28), n_classes=10),
        ModelSpec(name="digits-cnn", factory=_digits_cnn, input_shape=(1, 8, 8), n_classes=10),
        _cifar10("alexnet-s", partial(_alexnet, hidden=1024)),
        _cifar10("alexnet-b", partial(_alexnet, hidden=2048)),
        _cifar10("vgg-c", partial(_vgg, pointwise=True, n_hidden=2)),
        _cifar10("vgg-d", partial(_vgg, pointwise=False, n_hidden=2)),
        _cifar10("vgg-like", partial(_vgg, pointwise=False, n_hidden=1)),
        _cifar10("wrn-28-2", partial(_wrn, depth=28, widen=2)),
        _cifar10("wrn-22-8", partial(_wrn, depth=22, widen=8)),
        _cifar10("wrn-16-8", partial(_wrn, depth=16, widen=8)),
        _cifar10("wrn-16-10", partial(_wrn, depth=16, widen=10)),
        _imagenet("resnet18", "resnet18"),
        _imagenet("resnet34", "resnet34"),
        _imagenet("resnet50", "resnet50"),
        _imagenet("vit-b-16", "vit_b_16"),
        _imagenet("vit-l-16", "vit_l_16"),
    )
}


def names() -> tuple[str, ...]:
    """List the known networks, in the order of the table above."""
    return tuple(_SPECS)


def spec(name: str) -> ModelSpec:
    """Look up a known network.

    Args:
        name: one of `names()`.

    Raises:
        UnknownNameError: any other name, `timm:NAME` and a user's factory included.
    """
    if name not in _SPECS:
        raise UnknownNameError("model", name, _SPECS, do=_OWN)
    return _SPECS[name]


def torchvision_constructor(name: str) -> str | None:
    """Look up torchvision's name of a network.

    Args:
        name: of a network.

    Returns:
        The name; None for a network that is not torchvision's.
    """
    factory = _SPECS[name].factory if name in _SPECS else None
    if isinstance(factory, partial) and factory.func is _torchvision:
        return str(factory.keywords["constructor"])
    return None


def input_shape(name: str) -> tuple[int, ...] | None:
    """Look up the shape of a network's inputs, without creating the network.

    Args:
        name: a known name, `timm:NAME` or `package.module:factory`.

    Returns:
        (C, H, W) of one sample, of `timm:NAME` by timm's default configuration; None for a user's factory,
        which is not imported.

    Raises:
        UnknownNameError: there is no such network.
        MissingCapability: timm is not installed.
        UsageError: timm has no such network.
    """
    if is_factory(name):
        return None
    if name.startswith(TIMM):
        from sparse_export.models import timm_networks

        return timm_networks.input_shape(name.removeprefix(TIMM))
    return spec(name).input_shape


def create(name: str, n_classes: int | None = None) -> torch.nn.Module:
    """Create a network with fresh weights.

    Args:
        name: a known name, `timm:NAME` or `package.module:factory`.
        n_classes: logits for each sample; None for the network's own number. A factory gets it where it has a
            parameter `n_classes`; otherwise its own number stands.

    Raises:
        UnknownNameError: there is no such network.
        MissingCapability: timm is not installed.
        UsageError: n_classes is below 1, timm has no such network, or the factory cannot be imported or does
            not return a Module.
    """
    if n_classes is not None and n_classes < 1:
        raise UsageError(
            f"A network for {n_classes} classes was requested.",
            do="Give 1 or more, or leave n_classes out for the network's own number.",
        )
    if is_factory(name):
        return _from_factory(name, n_classes)
    if name.startswith(TIMM):
        from sparse_export.models import timm_networks

        return timm_networks.create(name.removeprefix(TIMM), n_classes)
    known = spec(name)
    return known.factory(known.n_classes if n_classes is None else n_classes)


def example_beside(name: str) -> tuple[Callable[[], Any], Any] | None:
    """Look up how a user's network is called: `example_inputs` and `free_sizes` beside its factory.

    Args:
        name: `package.module:factory`, whose module is imported.

    Returns:
        The function and the free sizes, None without; None where there is no such function.

    Raises:
        UsageError: the module cannot be imported.
    """
    with current_folder_first():
        module = module_named(name.partition(":")[0], name)
    function = getattr(module, "example_inputs", None)
    return (function, getattr(module, "free_sizes", None)) if callable(function) else None


def function_named(name: str) -> Callable[..., Any]:
    """Import a user's function. It runs the code of its module.

    Args:
        name: `package.module:function`, looked for in the current folder first.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    with current_folder_first():
        found = attribute_named(name, "function", "like my_package.losses:smooth_l1")
    if not callable(found):
        raise UsageError(f"{name} is {kind_of(found)}, not a function.", do="Name a function.")
    return found  # type: ignore[no-any-return]  # attrgetter gives Any; checked above


def _from_factory(name: str, n_classes: int | None) -> torch.nn.Module:
    """Create a network by a user's factory. Raises UsageError."""
    import torch

    with current_folder_first():
        factory = _callable(name, n_classes)
        try:
            module = factory()
        except (Exception, SystemExit) as cause:
            raise UsageError(
                f"The factory {name} failed with {type(cause).__name__}: {cause}.",
                do="Call it in Python to see the whole traceback.",
            ) from cause
    if not isinstance(module, torch.nn.Module):
        raise UsageError(
            f"The factory {name} returned {kind_of(module)}, not a torch.nn.Module.",
            do="Return the network itself from it.",
        )
    return module


def _callable(name: str, n_classes: int | None) -> Callable[[], Any]:
    """The named factory, with n_classes filled in where it has such a parameter."""
    import torch

    others = f"like my_package.nets:small_cnn, or one of {', '.join(names())}"
    found = attribute_named(name, "factory", others)
    if isinstance(found, torch.nn.Module) or not callable(found):
        raise UsageError(
            f"{name} is {kind_of(found)}, not a callable that returns a torch.nn.Module.",
            do="Name a function or a class.",
        )
    signature = _signature(found)
    if n_classes is not None and signature is not None and _takes_n_classes(signature):
        found = partial(found, n_classes=n_classes)
        signature = _signature(found)
    if signature is not None and not _takes_nothing(signature):
        raise UsageError(
            f"The factory {name} needs arguments: {signature}.",
            do="Wrap it in a function that fills them in; only n_classes may be left.",
        )
    return found  # type: ignore[no-any-return]  # attrgetter gives Any; checked above


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a callable, None where it has none."""
    try:
        return inspect.signature(function)
    except ValueError:  # builtins without a signature
        return None


def _takes_n_classes(signature: inspect.Signature) -> bool:
    """Has it a parameter n_classes that can be passed by name?"""
    parameter = signature.parameters.get("n_classes")
    return parameter is not None and parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )


def _takes_nothing(signature: inspect.Signature) -> bool:
    """Can it be called without arguments?"""
    try:
        signature.bind()
    except TypeError:
        return False
    return True
