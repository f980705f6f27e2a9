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
    """Create a network of timm with fresh weights; nothing is downloaded.

    Args:
        name: an entry of `timm.list_models()`, with or without the tag of its pretrained weights, which here
            only selects the configuration.
        n_classes: None for timm's own number.

    Raises:
        MissingCapability: timm is not installed.
        UsageError: timm has no such network, or cannot create it.
    """
    timm = _timm(name)
    settings = {} if n_classes is None else {"num_classes": n_classes}
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **settings)
    except Exception as cause:
        raise _failed(name, cause) from cause
    return network


def pretrained(name: str) -> nn.Module:
    """Create a network of timm with its published weights, downloaded where needed.

    Args:
        name: an entry of `timm.list_models()`.

    Raises:
        MissingCapability: timm is not installed, or the weights cannot be downloaded.
        UsageError: timm has no such network.
    """
    timm = _timm(name)
    try:
        network: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as cause:
        raise weights_unavailable(f"{TIMM}{name}", cause) from cause
    return network


def input_shape(name: str) -> tuple[int, ...] | None:
    """Look up the shape of a network's inputs.

    Args:
        name: an entry of `timm.list_models()`.

    Returns:
        (C, H, W) by timm's default configuration, None where it has none.

    Raises:
        SparseExportError: as `create`.
    """
    timm = _timm(name)
    try:
        configuration = timm.get_pretrained_cfg(name)
    except Exception as cause:
        raise _failed(name, cause) from cause
    return None if configuration is None else tuple(configuration.input_size)


def _timm(name: str) -> ModuleType:
    """The library, after checking that it has the network: other names may be URLs that it would fetch."""
    turn_telemetry_off()
    try:
        timm = importlib.import_module("timm")
    except ImportError as cause:
        raise MissingCapability(
            f"The network timm:{name} needs the package timm, which cannot be imported: {cause}.",
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
    """The error for a network that timm cannot create."""
    reason = str(cause).rstrip(".")
    return UsageError(
        f"timm cannot make {name!r}: {type(cause).__name__}: {reason}.",
        do="Call timm.create_model in Python to see the whole traceback, or choose another one.",
    )
