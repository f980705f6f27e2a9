"""How a model is to be served: batches, queue, instances."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_export.errors import UsageError

__all__ = ["DEFAULT_MAX_BATCH", "HOST_CODE", "ModelSettings"]

DEFAULT_MAX_BATCH = 64
HOST_CODE = "--backend-config=tensorrt,version-compatible=true"
"""What lets Triton's TensorRT backend load version compatible engines, which hold code for the host (its README)."""
_LARGEST_BATCH = 65536


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What the server is told of every model.

    max_batch: samples in one execution, requests merged; a single request may not bring more.  None: 64, or as many as
    the engines of a model have profiles for, where that is less.
    batching: merge waiting requests into one execution.  batch_delay_us: how long a request may wait for others.
    instances: copies of the model that work at the same time; two, because with one the server's batcher sleeps up to
    half a second now and then where the queue has a limit (docs/serving.md).  threads: of onnxruntime inside one of
    them.  queue_size: requests that may wait, one more is refused.  queue_timeout_ms: how long one may wait before it
    is refused. 0 for either is no limit; neither holds without batching.  warmup: run a batch of one and the largest batch before the model counts as loaded.
    Raises UsageError for a number out of range.
    """

    max_batch: int | None = None
    batching: bool = True
    batch_delay_us: int = 0
    instances: int = 2
    threads: int = 1
    queue_size: int = 512
    queue_timeout_ms: int = 5000
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
                raise UsageError(f"{name} is {value}.", expected=f"{least} to {most} was expected.")
