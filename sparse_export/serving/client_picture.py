"""Sends pictures to a served model, over HTTP and gRPC, and prints the names of their classes:
python picture.py --model NAME-file photograph.jpg

A model NAME-file takes the bytes of a file; NAME-picture takes pixels, which Pillow decodes here. Needs
tritonclient[http,grpc], numpy, and for pixels Pillow; nothing of sparse-export.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc, http


def content_of(path: Path, name: str, shape: list[int]) -> np.ndarray:
    """What the input `name` of a model takes of a picture, uint8; shape: of the input, the samples first."""
    if name == "file":
        return np.frombuffer(path.read_bytes(), np.uint8)[np.newaxis]
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L" if shape[-1] == 1 else "RGB"))
    return pixels.reshape(1, *pixels.shape[:2], shape[-1])


def ask(client: Any, protocol: Any, model: str, path: Path, n_best: int) -> list[str]:
    """The best classes of a picture, as `score:number:name`, without a name where the server knows none."""
    told = client.get_model_metadata(model)
    as_json = protocol is http
    taken = told["inputs"][0] if as_json else told.inputs[0]
    name, shape = (taken["name"], taken["shape"]) if as_json else (taken.name, taken.shape)
    outputs = [one["name"] for one in told["outputs"]] if as_json else [one.name for one in told.outputs]
    scores = "probabilities" if "probabilities" in outputs else outputs[0]
    content = content_of(path, name, [int(size) for size in shape])
    tensor = protocol.InferInput(name, list(content.shape), "UINT8")
    tensor.set_data_from_numpy(content)
    wanted = protocol.InferRequestedOutput(scores, class_count=n_best)
    answer = client.infer(model, [tensor], outputs=[wanted]).as_numpy(scores)
    return [text.decode() for text in answer.ravel()]


def main() -> int:
    """0 when both protocols answered, and alike."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("pictures", nargs="+", type=Path)
    options.add_argument("--model", required=True)
    options.add_argument("--best", type=int, default=1, help="classes to print of each picture")
    options.add_argument("--http", default="127.0.0.1:8000")
    options.add_argument("--grpc", default="127.0.0.1:8001")
    given = options.parse_args()
    code = 0
    with http.InferenceServerClient(given.http) as first, grpc.InferenceServerClient(given.grpc) as second:
        for path in given.pictures:
            best = ask(first, http, given.model, path, given.best)
            also = ask(second, grpc, given.model, path, given.best)
            for text in best:
                score, number, *name = text.split(":", 2)
                print(f"{path}: {''.join(name) or f'class {number}'}, {float(score):.4f}")
            if [text.split(":")[1:] for text in best] != [text.split(":")[1:] for text in also]:
                print(f"{path}: gRPC gives {', '.join(also)}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
