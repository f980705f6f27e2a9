"""Which container of Triton to deploy in: the one whose TensorRT is that of the engine.

The tags and versions are as remembered and were checked against neither documents nor images. A wrong row costs
a failed image build, and no wrong answer: the Dockerfile refuses a container with another TensorRT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Container", "container_for"]

_IMAGE = "nvcr.io/nvidia/tritonserver"
# For bundles without an engine: its onnxruntime, 1.27, reads opset 20 and IR 10.
# Source: docs/introduction/compatibility.md of triton-inference-server/server at e1db8a6.
_NEWEST = "26.07-py3"
_TAGS = {
    "10.14.1.48": "25.12-py3",
    "10.13.3.9": "25.10-py3",
    "10.13.2.6": "25.08-py3",
    "10.11.0.33": "25.07-py3",
    "10.10.0.31": "25.05-py3",
    "10.9.0.34": "25.04-py3",
    "10.8.0.43": "25.02-py3",
    "10.7.0.23": "24.12-py3",
}
_FOUR_NUMBERS = re.compile(r"\d+\.\d+\.\d+\.\d+")


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image. warning: why the engine may not load in it, or empty."""

    image: str
    tag: str
    tensorrt: str | None
    warning: str = ""

    @property
    def reference(self) -> str:
        return f"{self.image}:{self.tag}"


def container_for(tensorrt: str | None) -> Container:
    """The container for engines of a TensorRT version, or for none."""
    if tensorrt is None:
        return Container(image=_IMAGE, tag=_NEWEST, tensorrt=None)
    match = _FOUR_NUMBERS.match(tensorrt)
    version = match[0] if match else tensorrt
    if version in _TAGS:
        return Container(image=_IMAGE, tag=_TAGS[version], tensorrt=version)
    return Container(
        image=_IMAGE,
        tag=_NEWEST,
        tensorrt=version,
        warning=f"No container with TensorRT {version} is known (known: {', '.join(_TAGS)}). An engine loads only in "
        f"the version that built it: set the tag in docker/ and kubernetes/ to the month that has {version}, or build "
        "the engine again in the container.",
    )
