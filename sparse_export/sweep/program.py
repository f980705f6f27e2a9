"""Programs of a user's own that a sweep runs: `module:function`, called once a cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_export.errors import UsageError
from sparse_export.formats.run import RUN_FILE, read_run_info
from sparse_export.own_code import attribute_named, current_folder_first, kind_of

__all__ = ["ProgramCall", "call_program"]

Value = bool | int | float | str


@dataclass(frozen=True, kw_only=True)
class ProgramCall:
    """One call of a user's program.

    Args:
        program: `module:function`.
        arguments: keywords in alphabetical order, with their values; `out` comes with them.
    """

    program: str
    arguments: tuple[tuple[str, Value], ...]

    def table(self) -> dict[str, Any]:
        """For a document."""
        return {"program": self.program, "arguments": dict(self.arguments)}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> ProgramCall:
        """The call that a document has."""
        return cls(program=table["program"], arguments=tuple(sorted(table["arguments"].items())))

    def digest(self, version: int) -> str:
        """Ten hex digits that stand for this call. version: of what sweeps train."""
        text = f"{version} {json.dumps(self.table(), sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def call_program(call: ProgramCall, out: Path) -> None:
    """Call a program, which is to leave a finished run in `out`, as `SparseTraining.run` writes it.

    Args:
        call: which one, with what.
        out: folder of the run.

    Raises:
        UsageError: there is no such function, or it left no finished run.
    """
    with current_folder_first():
        function = attribute_named(call.program, kind="program", do="a function that trains and leaves a run")
    if not callable(function):
        raise UsageError(f"{call.program} is {kind_of(function)}.", expected="A function was expected.")
    import torch

    torch.set_num_threads(1)  # cells run side by side; the program may set another number
    function(out=out, **dict(call.arguments))
    if not (out / RUN_FILE).is_file() or read_run_info(out).status != "complete":
        raise UsageError(
            f"The program {call.program} left no finished run in {out}.",
            do="End it with trainer.run(out, ...) of its SparseTraining.",
        )


def flat(table: Mapping[str, Any], where: str) -> Iterator[tuple[str, Value]]:
    """The arguments in a table of a grid. Raises UsageError for what is no argument."""
    for key, value in table.items():
        if not key.isidentifier():
            raise UsageError(f"The grid has {key} in {where}, and a program takes keyword arguments.")
        if not isinstance(value, Value):
            raise UsageError(
                f"The grid has {key} = {value!r} in {where}.",
                expected="A number, a text, true or false was expected.",
            )
        yield key, value
