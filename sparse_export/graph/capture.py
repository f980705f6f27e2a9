"""A torch network captured as a program that holds for every free size."""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.onnx._internal.exporter import _flags
from torch.utils._sympy.printers import PythonPrinter

from sparse_export.errors import UsageError
from sparse_export.graph.example import Example
from sparse_export.graph.named_network import NamedNetwork
from sparse_export.signature import BATCH

__all__ = ["Captured", "captured"]

_LENGTHS = (*range(1, 65), *(2**power + offset for power in range(7, 17) for offset in (-1, 0, 1)))

_TORCH = Path(torch.__file__).parent
_BYTECODE = _TORCH / "_dynamo"  # where TorchDynamo evaluates a branch of somebody else's code
_USER_CODE = re.compile(r"(?P<source>.*)  # (?P<file>.*):(?P<line>\d+) in ")  # as torch's SLoc has it

_SAME = 1e-5  # of the largest output; sums in another order differ by about 1e-7
_MORE_SHOWN = 60  # characters of a line of source


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A network as torch.export has it.

    Attributes:
        program: takes the tensors of the example in their order, and returns those of the outputs.
        symbols: what the program calls each free size, to the name that it has in the example.
    """

    program: ExportedProgram
    symbols: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Condition:
    """What a program takes for granted of a free size.

    place: where in the source, "" where torch does not say.
    """

    size: str
    expression: str
    false_at: int
    place: str


def captured(network: NamedNetwork) -> Captured:
    """torch.export's program of a network, for every length of its free sizes.

    It is traced without TorchDynamo first, and with it where that fails or fixes a size, as `len(x)` does.

    Args:
        network: in eval mode, on the CPU, with an example whose free sizes are 2 or more.

    Raises:
        UsageError: the network takes a branch that depends on a free size. Limits that forward has itself,
            as the length of a table of positions, are none, but for the batch.
        Exception: whatever torch.export raises for a network that it can trace in neither way.
    """
    failure: Exception | None = None
    condition: _Condition | None = None
    for strict in (False, True):
        try:
            program = _traced(network, strict)
        except Exception as cause:  # noqa: BLE001 - whatever forward raises; the other way may take it
            failure = failure or cause
            continue
        symbols = _symbols(program, network.example)
        found = _conditions(program, network, symbols)
        if not found:
            return Captured(program=program, symbols={str(symbol): name for symbol, name in symbols.items()})
        if condition is None or found[0].place:
            condition = found[0]
    if condition is None:
        assert failure is not None
        raise failure
    size = "batch size" if condition.size == BATCH else f"size {condition.size}"
    raise UsageError(
        f"The network {type(network.network).__name__} depends on the {size}{condition.place}: it was traced "
        f"for {condition.expression}, which is false at {condition.size} {condition.false_at}.",
        expected=f"One graph for every {size} was expected.",
        do=(
            "Take the branch out of forward, and write shapes with -1 or x.shape[0] in place of a fixed "
            f"{size}"
            + ("." if condition.size == BATCH else ", or let the size be fixed: take it out of free_sizes.")
        ),
    ) from failure


def _traced(network: NamedNetwork, strict: bool) -> ExportedProgram:
    example = network.example
    free = tuple(
        {axis: Dim.AUTO for axis, name in enumerate(names) if name is not None}
        for names in example.axes.values()
    )
    with torch.no_grad(), _exporting(strict), warnings.catch_warnings():
        # By a hook that computes a weight of others, as weight_norm's: the graph computes it too.
        warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export")
        return _flags.set_onnx_exporting_flag(torch.export.export)(
            network, tuple(example.tensors.values()), dynamic_shapes=(free,), strict=strict
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


def _symbols(program: ExportedProgram, example: Example) -> dict[Any, str]:
    """The free sizes of the example by their symbols in the program.

    Two inputs have a symbol each for a size that they share.
    """
    axes = list(example.axes.values())
    found = {}
    for symbol, sources in getattr(_shape_env(program), "var_to_sources", {}).items():
        for source in sources:
            place = getattr(source, "base", None)
            index, axis = getattr(place, "index", None), getattr(source, "idx", None)
            name = axes[index][axis] if isinstance(index, int) and isinstance(axis, int) else None
            if name is not None:
                found[symbol] = name
    return found


def _conditions(
    program: ExportedProgram, network: NamedNetwork, symbols: Mapping[Any, str]
) -> list[_Condition]:
    """What the program takes for granted of free sizes, without what holds for every length.

    Operators of torch ask whether a size is 1 in order to choose strides or a kernel, in attention and
    recurrent layers for one. That changes no result, and batch 1 is compared with PyTorch when a bundle is
    built.
    """
    found = []
    lengths = network.example.all_sizes
    for guard in _guards(program):
        expression = guard.expr
        names = {symbol: symbols[symbol] for symbol in expression.free_symbols if symbol in symbols}
        if len(names) < len(expression.free_symbols) or free_unbacked_symbols(expression):
            continue  # of values
        for name in (size for size in lengths if size in names.values()):
            false_at = _false_at(expression, name, names, lengths)
            if not false_at or (false_at == [1] and _inside_operator(guard.sloc)):
                continue
            if name != BATCH:
                false_at = _without_limits(network, name, false_at)
                if false_at == [1] and _is_same_at_one(program, network, name):
                    continue
            if false_at:
                found.append(
                    _Condition(
                        size=name,
                        expression=_text(expression, names),
                        false_at=false_at[0],
                        place=_place(guard.sloc),
                    )
                )
    return found


def _shape_env(program: ExportedProgram) -> Any:
    """Where torch notes what it found out of sizes; None for a program without tensors."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    return next((value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)), None)


def _guards(program: ExportedProgram) -> list[Any]:
    return list(getattr(_shape_env(program), "guards", []))


def _false_at(expression: Any, name: str, names: Mapping[Any, str], lengths: Mapping[str, int]) -> list[int]:
    """The lengths of a size, of those that are tried, for which a guard is false."""

    def is_false(length: int) -> bool:
        tried = {**lengths, name: length}
        return bool(expression.subs({symbol: tried[one] for symbol, one in names.items()}) == False)

    return [length for length in _LENGTHS if is_false(length)]


def _without_limits(network: NamedNetwork, name: str, false_at: list[int]) -> list[int]:
    """Leave out lengths that forward does not take either. Those next to the example's are tried, which may
    be too short or too long; where it takes no other length at all, the size is fixed.
    """
    here = network.example.all_sizes[name]
    below = [length for length in false_at if length < here][-1:]
    above = [length for length in false_at if length > here][:1]
    left = [length for length in (*below, *above) if _takes(network, name, length)]
    if left or {here - 1, here + 1} - set(false_at) - {0} or _is_multiple(here, false_at):
        return left
    return [*below, *above]


def _is_multiple(here: int, false_at: list[int]) -> bool:
    """Is a guard true at a multiple of a length?"""
    return any(here * factor in _LENGTHS and here * factor not in false_at for factor in (2, 3, 4))


def _takes(network: NamedNetwork, name: str, length: int) -> bool:
    tensors = network.example.with_sizes({name: length}).tensors.values()
    try:
        with torch.no_grad():
            network(*tensors)
    except Exception:  # noqa: BLE001 - whatever forward raises of a length that it does not take
        return False
    return True


def _is_same_at_one(program: ExportedProgram, network: NamedNetwork, name: str) -> bool:
    """Does a program hold for a length of 1 although it was traced for more?

    Attention of transformers asks for it, in order to call a kernel without a mask.
    """
    tensors = list(network.example.with_sizes({name: 1}).tensors.values())
    try:
        with torch.no_grad():
            found = program.module(check_guards=False)(*tensors)
            wanted = network(*tensors)
    except Exception:  # noqa: BLE001 - a program that does not take the length raises anything
        return False
    return all(_is_same(one, other) for one, other in zip(found, wanted, strict=True))


def _is_same(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return bool((found == wanted).all())
    largest = float(wanted.nan_to_num().abs().max()) if wanted.numel() else 0.0
    return torch.allclose(found, wanted, rtol=0.0, atol=_SAME * largest, equal_nan=True)


def _text(expression: Any, names: Mapping[Any, str]) -> str:
    """A guard as Python has it, `batch > 1`."""
    named = {symbol: type(symbol)(name, integer=True) for symbol, name in names.items()}
    return str(PythonPrinter().doprint(expression.subs(named)))


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
