"""Requests to the models around a network: do raw samples give what training read, and the answer to it?"""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from sparse_export.errors import GateFailed
from sparse_export.runtimes.tolerance import differences
from sparse_export.serving.picture_models import (
    FILE,
    PictureModels,
    golden_samples,
    preprocess_signature,
)
from sparse_export.serving.probe import answer
from sparse_export.serving.repository import Served
from sparse_export.serving.tensors import Interface, interface_of
from sparse_export.signature import Array

__all__ = ["require_pictures"]


def require_pictures(
    host: str, port: int, served: Served, models: PictureModels, *, timeout_s: float
) -> float:
    """Send the golden raw samples through each of these models, one by one.

    Args:
        host: of the server.
        port: its HTTP port.
        served: the bundle that the models were made from.
        models: their names.
        timeout_s: seconds for each request.

    Returns:
        The largest difference of the ensembles' outputs from the network's.

    Raises:
        GateFailed: a difference is outside its tolerance, or there is no valid answer.
    """
    preprocessing, network = interface_of(preprocess_signature(served)), served.interface
    raw_name, name = preprocessing.inputs[0].name, network.inputs[0].name
    info = served.bundle.info.preprocess
    assert info is not None
    largest = 0.0

    def ask(model: str, interface: Interface, feed: Array) -> dict[str, Array]:
        feeds = {interface.inputs[0].name: feed}
        return answer(
            host, port, interface, feeds, model=model, version=None, n_samples=1, timeout_s=timeout_s
        )

    for raw, wanted in zip(*golden_samples(served), strict=True):
        made = ask(models.preprocess, preprocessing, raw[np.newaxis])[name]
        difference = float(np.abs(made[0] - wanted).max())
        if not difference <= info.allowed_difference:
            raise GateFailed(
                f"{models.preprocess} differs from the training's loader by {difference:.3g}.",
                expected=f"At most {info.allowed_difference:.3g} is allowed.",
                do="Do not use this server for raw samples: look at its log for the runtime.",
            )
        scores = ask(models.network, network, made)
        found = {models.raw: ask(models.raw, replace(network, inputs=preprocessing.inputs), raw[np.newaxis])}
        if models.file is not None:
            content = np.frombuffer(_png(raw), np.uint8)[np.newaxis]
            found[models.file] = ask(models.file, replace(network, inputs=(FILE,)), content)
        bundle = served.bundle.info
        for model, outputs in found.items():
            compared = differences(outputs, scores, atol=bundle.atol, rtol=bundle.rtol)
            wrong = [one.name for one in compared if not one.ok]
            if wrong:
                raise GateFailed(
                    f"{model} gives another {wrong[0]} for {raw_name} than {models.network} for the same "
                    "sample after preprocessing.",
                    do="Look at the server's log, above.",
                )
            largest = max([largest, *(one.max_abs_difference or 0.0 for one in compared)])
    return largest


def _png(picture: Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG")
    return stream.getvalue()
