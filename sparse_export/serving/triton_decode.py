"""A model for Triton's Python backend: decodes a picture file to uint8 RGB, as training does.

Copied as `model.py` into a model repository, where it runs by itself: it needs numpy and Pillow. It takes
`file`, the bytes of a file as uint8 (1, length), and gives `picture`, uint8 (1, height, width, 3). Bytes are
no strings here, and arrays go in and out by DLPack, for the reason that `triton_model.py` tells.
"""

from __future__ import annotations

import ctypes
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_STEP = 257  # 65,535 / 255: from one value of 8 bits to the next in 16
_USED = b"used_dltensor"  # kept: a capsule stores a pointer to its name
_SetName = ctypes.pythonapi.PyCapsule_SetName
_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
_SetName.restype = ctypes.c_int


class TritonPythonModel:
    """The class that the backend looks up by name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Look up the backend's module. args: strings, from the backend."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, each with one file."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        content = np.from_dlpack(self._pb.get_input_tensor_by_name(request, "file")).tobytes()
        try:
            picture = decoded(content)
        except Exception as cause:  # noqa: BLE001 - decoders meet bad bytes with errors of any kind
            error = self._pb.TritonError(f"the file of {len(content)} bytes is no picture: {cause}")
            return self._pb.InferenceResponse(error=error)
        capsule = picture[np.newaxis].__dlpack__()
        tensor = self._pb.Tensor.from_dlpack("picture", capsule)
        _SetName(capsule, _USED)
        return self._pb.InferenceResponse([tensor])


def decoded(content: bytes) -> np.ndarray:
    """Decode a file to uint8 (height, width, 3), in RGB; grey ones of 16 bits are scaled.

    Raises:
        Exception: whatever Pillow raises of bytes that are no picture, or one of too many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as source:
            mode = source.mode
            is_grey = mode.startswith("I;") or (mode == "I" and source.format in ("PNG", "PPM"))
            if not is_grey and mode in ("I", "F"):
                raise ValueError("its values are of unknown range")
            if not is_grey:
                return np.array(source.convert("RGB"))
            values = np.asarray(source).astype(np.int64)
            grey = ((values + _STEP // 2) // _STEP).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
