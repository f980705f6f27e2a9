"""One request to Triton, of any network."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tritonclient import http

from sparse_export.serving.tensors import interface_of
from sparse_export.signature import Feeds, Signature

__all__ = ["answer"]


def answer(port: int, model: str, signature: Signature, feeds: Feeds) -> dict[str, NDArray[np.generic]]:
    """Ask over HTTP with binary tensors.

    Args:
        port: of the server on this machine.
        model: its name there.
        signature: of the network.
        feeds: inputs by name.

    Returns:
        The outputs by name, as the network gives them.
    """
    interface, tensors = interface_of(signature), []
    for spec in interface.inputs:
        array = np.ascontiguousarray(spec.to_wire(feeds[spec.name]))
        tensor = http.InferInput(spec.name, list(array.shape), spec.dtype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    wanted = [http.InferRequestedOutput(spec.name) for spec in interface.outputs]
    client = http.InferenceServerClient(f"127.0.0.1:{port}", connection_timeout=60, network_timeout=120)
    with client:
        got = client.infer(model, tensors, outputs=wanted)
    return {spec.name: spec.from_wire(got.as_numpy(spec.name)) for spec in interface.outputs}
