"""Asks a served model for the golden answer, over HTTP and gRPC: python example.py --model NAME --golden
golden/NAME

Needs tritonclient[http,grpc] and numpy, and nothing of sparse-export.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc, http


def load(folder: Path, entries: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays of the index `golden.json`, by name."""
    return {one["name"]: np.load(folder / one["file"]) for one in entries}


def largest_batch(client: Any, protocol: Any, model: str) -> int:
    """How many samples a request may bring; 0 where the server merges none, and takes any number."""
    if protocol is http:
        return int(client.get_model_config(model)["max_batch_size"])
    return int(client.get_model_config(model).config.max_batch_size)


def ask(
    client: Any, protocol: Any, model: str, inputs: list[dict[str, Any]], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What `model` makes of arrays, by name; `protocol` is tritonclient.http or .grpc."""
    tensors = []
    for one in inputs:
        array = arrays[one["name"]]
        tensor = protocol.InferInput(one["name"], list(array.shape), one["datatype"])
        tensor.set_data_from_numpy(array)  # of BF16 from float32
        tensors.append(tensor)
    answer = client.infer(model, tensors)
    told = answer.get_response()
    names = [one["name"] for one in told["outputs"]] if protocol is http else [o.name for o in told.outputs]
    return {name: answer.as_numpy(name) for name in names}


def ask_in_batches(
    client: Any, protocol: Any, model: str, inputs: list[dict[str, Any]], arrays: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """As `ask`, in as many requests as the model needs."""
    most = largest_batch(client, protocol, model)
    if not most:
        return ask(client, protocol, model, inputs, arrays)
    n_samples = len(next(iter(arrays.values())))
    parts = [
        ask(client, protocol, model, inputs, {name: a[at : at + most] for name, a in arrays.items()})
        for at in range(0, n_samples, most)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def verdict(found: np.ndarray, wanted: np.ndarray, entry: dict[str, Any]) -> tuple[bool, str]:
    """Is an output right by its entry of the index, and how far off?"""
    if found.shape != wanted.shape:
        return False, f"shape {found.shape} and not {wanted.shape}"
    if "largest_difference" in entry:
        difference = float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max())
        return difference <= entry["largest_difference"], f"largest difference {difference:.3g}"
    unequal = float((found != wanted).mean())
    return unequal <= entry["largest_unequal_share"], f"{unequal:.3g} of the values differ"


def main() -> int:
    """0 when both protocols give the golden answer, else 1."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", required=True)
    options.add_argument("--golden", required=True, type=Path, help="folder with golden.json")
    options.add_argument("--http", default="127.0.0.1:8000")
    options.add_argument("--grpc", default="127.0.0.1:8001")
    given = options.parse_args()
    index = json.loads((given.golden / "golden.json").read_text())
    arrays, wanted = (load(given.golden, index[which]) for which in ("inputs", "outputs"))
    code = 0
    for protocol, url in ((http, given.http), (grpc, given.grpc)):
        with protocol.InferenceServerClient(url) as client:
            if not client.is_model_ready(given.model):
                print(f"{url}: {given.model} is not ready")
                code = 1
                continue
            found = ask_in_batches(client, protocol, given.model, index["inputs"], arrays)
        for entry in index["outputs"]:
            name = entry["name"]
            right, how = verdict(found[name], wanted[name], entry)
            print(f"{url}: {name}, {how}, {'right' if right else 'WRONG'}")
            code = code if right else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
