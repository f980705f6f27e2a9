"""The exception tree: what each error says, and the exit code that it ends the program with."""

from __future__ import annotations

import re

import pytest

from sparse_export import errors
from sparse_export.errors import SparseExportError, UnknownNameError

EXIT_CODES = {
    "SparseExportError": 1,
    "OutputError": 1,
    "TrainingDiverged": 1,
    "ProcessLost": 1,
    "RanksDiverged": 1,
    "EngineBuildFailed": 1,
    "ServerFailed": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "UnknownNameError": 2,
    "FolderInUse": 2,
    "GateFailed": 3,
    "SpeedupNotReached": 4,
    "MissingCapability": 5,
    "DataNotFound": 5,
    "ArtefactError": 6,
    "NotTrustedError": 6,
    "Interrupted": 130,
}


def _classes() -> dict[str, type[SparseExportError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, SparseExportError)
    }


def test_the_exit_codes_are_those_of_the_contract() -> None:
    assert {name: cls.exit_code for name, cls in _classes().items()} == EXIT_CODES


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    told = dict(re.findall(r"^ *[│├└─ ]*(\w+) +(\d+)(?:  |$)", errors.__doc__ or "", flags=re.MULTILINE))
    assert {name: int(code) for name, code in told.items()} == EXIT_CODES


def test_the_message_is_the_three_parts_in_order() -> None:
    error = SparseExportError("It is red.", expected="Green was expected.", do="Paint it.")
    assert str(error) == "It is red. Green was expected. Paint it."
    assert (error.what, error.expected, error.do) == ("It is red.", "Green was expected.", "Paint it.")


def test_parts_that_are_left_out_leave_no_gap() -> None:
    assert str(SparseExportError("It is red.", do="Paint it.")) == "It is red. Paint it."


@pytest.mark.parametrize(("name", "near"), [("lenet-5", "lenet5"), ("digit", "digits")])
def test_an_unknown_name_is_told_the_nearest_known_one(name: str, near: str) -> None:
    error = UnknownNameError("thing", name, ["digits", "lenet5"])
    assert str(error) == f"There is no thing named {name!r}. Did you mean {near!r}? Known: digits, lenet5."


def test_a_name_far_from_all_is_told_the_list_alone() -> None:
    error = UnknownNameError("thing", "zzz", ["digits"], do="Write your own.")
    assert str(error) == "There is no thing named 'zzz'. Known: digits. Write your own."


def test_wrong_usage_is_a_value_error_for_callers_of_the_library() -> None:
    with pytest.raises(ValueError, match="Wrong"):
        raise errors.UsageError("Wrong.")


@pytest.mark.parametrize(
    ("text", "line"),
    [("Truncated file.\nAt byte 4.", "Truncated file"), ("  No end", "No end"), ("", "OSError")],
)
def test_the_first_line_of_an_error_is_its_type_where_it_has_no_text(text: str, line: str) -> None:
    assert errors.first_line(OSError(text)) == line
