"""Asks a served model for the golden answer, over HTTP and gRPC: python example.py --model NAME --golden
golden/NAME

Needs tritonclient[http,grpc] and numpy, and nothing of sparse-export.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc, http


def ask(
    client: Any, protocol: Any, model: str, batch: np.ndarray, input_name: str, output_name: str
) -> np.ndarray:
    """What `model` makes of a batch (samples, ...); `protocol` is tritonclient.http or .grpc."""
    dtypes = {"float32": "FP32", "float16": "FP16", "float64": "FP64"}
    tensor = protocol.InferInput(input_name, list(batch.shape), dtypes[batch.dtype.name])
    tensor.set_data_from_numpy(batch)
    answer = client.infer(model, [tensor], outputs=[protocol.InferRequestedOutput(output_name)])
    found: np.ndarray = answer.as_numpy(output_name)
    return found


def main() -> int:
    """0 when both protocols give the golden answer, else 1."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--golden", required=True, type=Path, help="folder with input.npy and output.npy")
    options.add_argument("--http", default="127.0.0.1:8000")
    options.add_argument("--grpc", default="127.0.0.1:8001")
    options.add_argument("--input", default="input")
    options.add_argument("--output", default="logits")
    options.add_argument("--tolerance", type=float, default=1e-3)
    given = options.parse_args()
    batch = np.load(given.golden / "input.npy")
    wanted = np.load(given.golden / "output.npy")
    code = 0
    for protocol, url in ((http, given.http), (grpc, given.grpc)):
        with protocol.InferenceServerClient(url) as client:
            if not client.is_model_ready(given.model):
                print(f"{url}: {given.model} is not ready")
                code = 1
                continue
            found = ask(client, protocol, given.model, batch, given.input, given.output)
        difference = float(np.abs(found - wanted).max())
        right = difference <= given.tolerance * max(1.0, float(np.abs(wanted).max()))
        print(f"{url}: largest difference {difference:.3g}, {'right' if right else 'WRONG'}")
        code = code if right else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
