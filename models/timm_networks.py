"""Networks of the timm library, the one module that imports it."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from torch import nn

from sparse_export.errors import MissingCapability, UsageError, how_to_get
from sparse_export.models.names import TIMM
from sparse_export.models.published import weights_unavailable
from sparse_export.telemetry import turn_telemetry_off


def create(name: str, n_classes: int | None = None) -> nn.Module:
    """timm's network of that name with fresh weights; nothing is downloaded.

    name: an entry of `timm.list_models()`, with or without the tag of its pretrained weights, which chooses the
        configuration only.  n_classes: timm's own number when None.
    Raises MissingCapability without timm, UsageError when timm has no such network or cannot make it.
    """
    timm = _timm(name)
    settings = {} if n_classes is None else {"num_classes": n_classes}
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **settings)
    except Exception as cause:
        raise _failed(name, cause) from cause
    return network


def pretrained(name: str) -> nn.Module:
    """timm's network of that name with the weights that it publishes, downloaded where needed.

    Raises MissingCapability without timm or when they cannot be had, UsageError when timm has no such network.
    """
    timm = _timm(name)
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as cause:
        raise weights_unavailable(f"{TIMM}{name}", cause) from cause
    return network


def input_shape(name: str) -> tuple[int, ...] | None:
    """(C, H, W) as timm's default configuration has it, None where it has none. Raises like `create`."""
    timm = _timm(name)
    try:
        configuration = timm.get_pretrained_cfg(name)
    except Exception as cause:
        raise _failed(name, cause) from cause
    return None if configuration is None else tuple(configuration.input_size)


def _timm(name: str) -> ModuleType:
    """The library, once it is sure that it knows the network: other names may be addresses that it would fetch."""
    turn_telemetry_off()
    try:
        timm = importlib.import_module("timm")
    except ImportError as cause:
        raise MissingCapability(
            f"The network timm:{name} needs the package timm, which cannot be imported: {cause}.",
            expected="The extra `timm` of sparse-export was expected.",
            do=f"Install it: {how_to_get('timm')}.",
        ) from cause
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UsageError(
            f"timm {timm.__version__} has no network named {name!r}.",
            expected=f"Did you mean {' or '.join(map(repr, near))}?" if near else "",
            do="Choose one that timm.list_models() gives.",
        )
    return timm


def _failed(name: str, cause: Exception) -> UsageError:
    reason = str(cause).rstrip(".")
    return UsageError(
        f"timm cannot make {name!r}: {type(cause).__name__}: {reason}.",
        expected="A network that needs no more than its name was expected.",
        do="Call timm.create_model in Python to see the whole traceback, or choose another one.",
    )
