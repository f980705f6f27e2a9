"""Puts a served model under load: python load.py --model NAME --golden golden/NAME --clients 32 --seconds 60

Each client sends one sample, waits for the answer and sends the next. Prints requests, errors, percentiles
and rate as one JSON document. Needs tritonclient[http,grpc] and numpy, and nothing of sparse-export. One
process of Python cannot load a large server: run several, or NVIDIA's perf_analyzer, for example

    perf_analyzer -m NAME -u 127.0.0.1:8001 -i grpc --concurrency-range 32 --request-count 20000
    --warmup-request-count 500
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np


class Tally:
    """What the clients saw. latencies: seconds of answered requests; errors: how often each message came."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.errors: collections.Counter[str] = collections.Counter()

    def document(self, seconds: float) -> dict[str, object]:
        """JSON-able; times in milliseconds."""
        times = np.array(self.latencies or [0.0]) * 1e3
        p50, p99 = (round(float(value), 3) for value in np.percentile(times, [50, 99]))
        return {
            "requests": len(self.latencies),
            "errors": sum(self.errors.values()),
            "error_messages": dict(self.errors.most_common(5)),
            "mean_ms": round(float(times.mean()), 4),
            "p50_ms": p50,
            "p99_ms": p99,
            "largest_ms": round(float(times.max()), 3),
            "requests_per_s": round(len(self.latencies) / seconds, 1),
        }


def tensors(protocol: Any, golden: Path, model: str, url: str) -> list[Any]:
    """The first sample of the golden inputs; all of them where the server takes no batches apart."""
    index = json.loads((golden / "golden.json").read_text())
    with protocol.InferenceServerClient(url) as connection:
        config = connection.get_model_config(model)
    is_batched = (config["max_batch_size"] if isinstance(config, dict) else config.config.max_batch_size) > 0
    found = []
    for one in index["inputs"]:
        array = np.load(golden / one["file"])
        sample = array[:1] if is_batched else array
        tensor = protocol.InferInput(one["name"], list(sample.shape), one["datatype"])
        tensor.set_data_from_numpy(sample)
        found.append(tensor)
    return found


def client(protocol: Any, url: str, model: str, inputs: list[Any], end: float, tally: Tally) -> None:
    """One client, until `end` by time.monotonic."""
    with protocol.InferenceServerClient(url) as connection:
        while time.monotonic() < end:
            begin = time.perf_counter()
            try:
                connection.infer(model, inputs)
            except Exception as error:  # noqa: BLE001 - whatever a client sees is counted
                tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
                time.sleep(0.05)
            else:
                tally.latencies.append(time.perf_counter() - begin)


def main() -> int:
    """0 when every request was answered."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--model", required=True)
    options.add_argument("--golden", required=True, type=Path, help="folder with golden.json")
    options.add_argument("--protocol", choices=["http", "grpc"], default="grpc")
    options.add_argument("--url", default=None, help="default 127.0.0.1:8000 for http, :8001 for grpc")
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--seconds", type=float, default=60.0)
    given = options.parse_args()
    if given.protocol == "http":
        import tritonclient.http as protocol
    else:
        import tritonclient.grpc as protocol
    url = given.url or f"127.0.0.1:{8000 if given.protocol == 'http' else 8001}"
    inputs = tensors(protocol, given.golden, given.model, url)
    tally = Tally()
    end = time.monotonic() + given.seconds
    threads = [
        threading.Thread(target=client, args=(protocol, url, given.model, inputs, end, tally))
        for _ in range(given.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"clients": given.clients, "protocol": given.protocol, **tally.document(given.seconds)}))
    return 1 if tally.errors or not tally.latencies else 0


if __name__ == "__main__":
    sys.exit(main())
