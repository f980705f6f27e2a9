"""A training step as one CUDA graph: launched kernel by kernel a few times, then replayed whole.

A step of a small network is hundreds of kernels of a few microseconds, which a host may launch more slowly
than a card runs them. A graph is launched at once. What that gains on a card was not measured yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_export.errors import UsageError
from sparse_export.train.inputs import ModelInputs, each, tensors_of

__all__ = ["Capture", "CapturedStep", "cuda_capture", "make_capturable", "set_rate"]

N_LAUNCHED = 3
"""Steps before the capture, which make lazy state: momenta, cuDNN's choices, the mask launch's tables."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a call's work on the device without doing it; gives what repeats it, and the tensor it fills."""


class CapturedStep:
    """Makes the steps of a training that all have one shape; owns the graph and the memory of its inputs.

    Gradients stand in `.grad` after each step as ever. What happens only sometimes, as a mask update does,
    belongs outside; it changes tensors in place.

    Args:
        work: takes inputs and labels and gives the loss (a scalar): gradients, the optimizer's step and the
            masks. It must read whatever changes between steps from tensors that stay where they are, the
            learning rate among them (see `make_capturable`), and must read nothing back to the host.
        capture: `cuda_capture`, but for tests.
    """

    def __init__(self, work: Callable[[Any, Tensor], Tensor], capture: Capture | None = None) -> None:
        self._work, self._capture = work, capture or cuda_capture
        self._n_launched = 0
        self._inputs: tuple[ModelInputs, Tensor] | None = None
        self._replay: Callable[[], None] | None = None
        self._loss: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        """Is the step replayed from now on?"""
        return self._replay is not None

    def __call__(self, x: ModelInputs, y: Tensor) -> Tensor:
        """One step.

        Args:
            x, y: of the same shapes, types and strides every time.

        Returns:
            The loss, as a copy.

        Raises:
            UsageError: the inputs have another shape, or something in the work cannot be captured.
        """
        if self._n_launched < N_LAUNCHED:
            self._n_launched += 1
            with _aside(y.device):
                return self._work(x, y).detach()
        if self._inputs is None:
            self._inputs = (each(x, Tensor.clone), y.clone())
            self._replay, self._loss = self._captured(*self._inputs)
        held, held_y = self._inputs
        pairs = zip((*tensors_of(held), held_y), (*tensors_of(x), y), strict=True)
        for own, given in pairs:
            if own.shape != given.shape:
                raise UsageError(
                    f"A captured step was given inputs of shape {tuple(given.shape)}.",
                    expected=f"The shape that it was captured with was expected: {tuple(own.shape)}.",
                    do="Give batches of one size, or leave cuda_graph out of the recipe.",
                )
            own.copy_(given)
        assert self._replay is not None
        assert self._loss is not None
        self._replay()
        return self._loss.detach().clone()

    def _captured(self, x: ModelInputs, y: Tensor) -> tuple[Callable[[], None], Tensor]:
        try:
            return self._capture(lambda: self._work(x, y))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as cause:
            first: BaseException = (
                cause  # what ends a capture is followed by errors that say only that it ended
            )
            while first.__context__ is not None:
                first = first.__context__
            reason = next(iter(str(first).splitlines()), type(first).__name__)
            raise UsageError(
                f"The training step cannot be captured as a CUDA graph: {reason}",
                expected="A step that reads nothing back to the host was expected.",
                do="Leave cuda_graph out of the recipe.",
            ) from cause


def cuda_capture(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `Capture` of CUDA. Only this thread is watched: another one may pin memory for pictures meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails may leave its own behind
    return graph.replay, result


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as torch asks for what runs before a capture; whatever follows waits for it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def make_capturable(optimizer: Optimizer, device: torch.device | None) -> None:
    """Let an optimizer read its learning rates from the device, so that a graph sees them change.

    Call it after a state was loaded.

    Args:
        optimizer: changed in place.
        device: of the parameters; None for the opposite, numbers on the host.
    """
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = rate if device is None else torch.tensor(rate, dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = device is not None


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give all parameters a learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
