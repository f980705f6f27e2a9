"""A torch network captured as a program that holds for every batch size."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.onnx._internal.exporter import _flags
from torch.utils._sympy.printers import PythonPrinter

from sparse_export.errors import UsageError

__all__ = ["captured"]

_BATCH_SIZES = (*range(1, 65), *(2**power + offset for power in range(7, 17) for offset in (-1, 0, 1)))

_TORCH = Path(torch.__file__).parent
_BYTECODE = _TORCH / "_dynamo"  # where TorchDynamo evaluates a branch of somebody else's code
_USER_CODE = re.compile(r"(?P<source>.*)  # (?P<file>.*):(?P<line>\d+) in ")  # as torch's SLoc has it

_MORE_SHOWN = 60  # characters of a line of source


@dataclass(frozen=True, kw_only=True)
class _Condition:
    """What a program takes for granted of its batch size.

    place: where in the source, "" where torch does not say.
    """

    expression: str
    false_at: int
    place: str


def captured(network: nn.Module, sample: Tensor) -> ExportedProgram:
    """torch.export's program of a network, for every batch size.

    It is traced without TorchDynamo first, and with it where that fails or fixes the batch size, as `len(x)`
    does.

    Args:
        network: in eval mode, on the CPU.
        sample: one input batch of at least 2 samples; its values do not matter.

    Returns:
        The program, whose first dimension of the input is free.

    Raises:
        UsageError: the network takes a branch that depends on the batch size.
        Exception: whatever torch.export raises for a network that it can trace in neither way.
    """
    failure: Exception | None = None
    condition: _Condition | None = None
    for strict in (False, True):
        try:
            program = _traced(network, sample, strict)
        except Exception as cause:  # noqa: BLE001 - whatever forward raises; the other way may take it
            failure = failure or cause
            continue
        found = _conditions(program)
        if not found:
            return program
        if condition is None or found[0].place:
            condition = found[0]
    if condition is None:
        assert failure is not None
        raise failure
    raise UsageError(
        f"The network {type(network).__name__} depends on the batch size{condition.place}: it was traced for "
        f"{condition.expression}, which is false at batch {condition.false_at}.",
        expected="One graph for every batch size was expected.",
        do=(
            "Take the branch out of forward, and write shapes with -1 or x.shape[0] in place of a fixed "
            "batch size."
        ),
    ) from failure


def _traced(network: nn.Module, sample: Tensor, strict: bool) -> ExportedProgram:
    with torch.no_grad(), _exporting(strict):
        return _flags.set_onnx_exporting_flag(torch.export.export)(
            network, (sample,), dynamic_shapes=({0: Dim.AUTO},), strict=strict
        )


@contextlib.contextmanager
def _exporting(strict: bool) -> Iterator[None]:
    """What torch.onnx.export sets while it captures a network by itself.

    Without `backed_size_oblivious` a branch on `batch > 1` would be taken without a word.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        try:
            # TorchDynamo follows attention into a fused operator that has no ONNX form.
            torch.backends.mha.set_fastpath_enabled(fast and not strict)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def _conditions(program: ExportedProgram) -> list[_Condition]:
    """What the program takes for granted of its batch size, without what holds for every size.

    Operators of torch ask whether a size is 1 in order to choose strides or a kernel, in attention and
    recurrent layers for one. That changes no result, and batch 1 is compared with PyTorch when a bundle is
    built.
    """
    found = []
    for guard in _shape_env(program).guards:
        false_at = _false_at(guard.expr)
        if false_at and (false_at != [1] or not _inside_operator(guard.sloc)):
            found.append(
                _Condition(expression=_text(guard.expr), false_at=false_at[0], place=_place(guard.sloc))
            )
    return found


def _shape_env(program: ExportedProgram) -> Any:
    """Where torch notes what it found out of sizes."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return next(value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor))


def _false_at(expression: Any) -> list[int]:
    """The batch sizes, of those that are tried, for which a guard is false; none where it is of values."""
    if len(expression.free_symbols) != 1 or free_unbacked_symbols(expression):
        return []
    (batch,) = expression.free_symbols  # nothing else is free
    return [size for size in _BATCH_SIZES if expression.subs(batch, size) == False]


def _text(expression: Any) -> str:
    """A guard as Python has it, `batch > 1`."""
    (batch,) = expression.free_symbols
    return str(PythonPrinter().doprint(expression.subs(batch, type(batch)("batch", integer=True))))


def _inside_operator(place: Any) -> bool:
    frame = place.framework_loc
    if not isinstance(frame, traceback.FrameSummary):
        return True
    file = Path(frame.filename)
    return file.is_relative_to(_TORCH) and not file.is_relative_to(_BYTECODE)


def _place(place: Any) -> str:
    """Where a guard comes from, for people: ` at net.py, line 7 (if x.shape[0] > 4:)`; empty where that is
    not known.
    """
    frame = place.framework_loc
    if isinstance(frame, traceback.FrameSummary) and not Path(frame.filename).is_relative_to(_TORCH):
        return _at(frame.filename, frame.lineno, frame.line or "")
    found = _USER_CODE.match(place.maybe_user_loc or "")
    return "" if found is None else _at(found["file"], found["line"], found["source"])


def _at(file: str, line: int | str | None, source: str) -> str:
    shown = source if len(source) <= _MORE_SHOWN else f"{source[:_MORE_SHOWN]}…"
    return f" at {Path(file).name}, line {line}" + (f" (`{shown}`)" if shown else "")
