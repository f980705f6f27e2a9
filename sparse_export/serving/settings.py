"""Settings of a served model: batches, queue, instances."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.errors import UsageError

__all__ = [
    "DEFAULT_MAX_BATCH",
    "DEFAULT_QUEUE_SIZE",
    "DEFAULT_QUEUE_TIMEOUT_MS",
    "HOST_CODE",
    "ModelSettings",
]

DEFAULT_MAX_BATCH = 64
HOST_CODE = "--backend-config=tensorrt,version-compatible=true"
"""Lets Triton's TensorRT backend load version compatible engines, which hold code for the host (its README).
"""
DEFAULT_QUEUE_SIZE = 512
DEFAULT_QUEUE_TIMEOUT_MS = 5000
_LARGEST_BATCH = 65536


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings of every model in a server.

    Attributes:
        max_batch: maximum number of samples in one execution, and in one request. None: 64, or the largest
            batch of the model's engines where that is less.
        batching: whether waiting requests are merged into one execution.
        batch_delay_us: how long a request may wait for others to be merged with.
        instances: copies of the model that run at the same time. Two, because with one and a limited queue
            the server's batcher now and then sleeps for up to half a second (docs/serving.md).
        threads: threads of onnxruntime in one instance.
        queue_size: maximum number of waiting requests, 0 for no limit. None: 512, and no limit for a model
            with a free size beside the batch, whose requests of mixed lengths the server's batcher would
            hold up with one (docs/serving.md).
        queue_timeout_ms: how long a request may wait before it is refused, 0 for no limit. None: 5000, and no
            limit likewise. Neither limit holds without batching.
        warmup: whether a batch of one and the largest batch run before the model counts as loaded.

    Raises:
        UsageError: a number is out of range.
    """

    max_batch: int | None = None
    batching: bool = True
    batch_delay_us: int = 0
    instances: int = 2
    threads: int = 1
    queue_size: int | None = None
    queue_timeout_ms: int | None = None
    warmup: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_batch", 1, _LARGEST_BATCH),
            ("batch_delay_us", 0, 10_000_000),
            ("instances", 1, 1024),
            ("threads", 1, 4096),
            ("queue_size", 0, 10_000_000),
            ("queue_timeout_ms", 0, 3_600_000),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UsageError(f"{name} is {value}.", do=f"Give {least} to {most}.")
