"""The program itself: help, versions, errors and exit codes."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from sparse_export import errors
from sparse_export.cli._common import Output
from sparse_export.cli.main import COMMANDS, GROUPS, cli
from tests.cli.conftest import Call

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "sparse_export")


def _python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, so that an uninstalled package is found too."""
    return subprocess.run(
        [sys.executable, *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=CHECKOUT,
        env={**os.environ, **environment},
        timeout=120,
    )


def _program(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _python(*PROGRAM, *words, **environment)


def _command(name: str) -> click.Command:
    command: click.Command = importlib.import_module(f"sparse_export.cli.{name.replace('-', '_')}").command
    return command


def _raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def examine() -> None:
        raise error

    monkeypatch.setattr("sparse_export.doctor.examine", examine)


@pytest.mark.timing
def test_help_answers_at_once() -> None:
    _program("--help")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _program("--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_load_no_heavy_library(words: list[str]) -> None:
    probe = (
        "import sys\n"
        "from sparse_export.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n"
        "    heavy = {'torch', 'onnx', 'onnxruntime', 'torchvision', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)\n"
    )
    done = _python("-c", probe, *words)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_the_list_of_commands_imports_none_of_them() -> None:
    probe = (
        "import sys\n"
        "from sparse_export.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.startswith('sparse_export.cli.')], file=sys.stderr)\n"
    )
    done = _python("-c", probe)
    assert set(re.findall(r"cli\.(\w+)", done.stderr)) == {"main", "_click", "_common"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nosuch"], "There is no recipe named 'nosuch'"),
        (["train", "no/file.toml"], "recipe file no/file.toml is not there"),
        (["validate", "no/bundle"], "no/bundle does not exist"),
        (["validate", ".", "--against", "no/bundle"], "no/bundle does not exist"),
        (["compare", ".", "no/bundle"], "no/bundle does not exist"),
        (["gate", "no/bundle", "--against", "."], "no/bundle does not exist"),
        (["bench", "no/bundle"], "no/bundle does not exist"),
        (["serve", "no/bundle"], "no/bundle does not exist"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_loaded(words: list[str], said: str) -> None:
    probe = (
        "import sys\n"
        "from sparse_export.cli.main import cli\n"
        f"sys.argv = {['sparse-export', *words]!r}\n"
        "try:\n"
        "    cli()\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = _python("-c", probe)
    assert said in done.stderr
    assert done.stderr.splitlines()[-1] == "2 False"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_own_help_says(name: str) -> None:
    command = _command(name)
    assert command.name == name
    assert command.get_short_help_str(limit=200).rstrip(".") == COMMANDS[name].rstrip(".")


def test_every_command_file_is_in_the_list() -> None:
    files = {path.stem for path in (CHECKOUT / "cli").glob("*.py") if not path.stem.startswith("_")}
    assert files == {*(name.replace("-", "_") for name in COMMANDS), "main"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json(name: str) -> None:
    command = _command(name)
    assert "--json" in [option for parameter in command.params for option in parameter.opts]


def test_the_commands_work_on_plain_click_too() -> None:
    probe = (
        "import sys\n"
        "sys.modules['rich_click'] = None\n"
        "from sparse_export.cli.main import cli\n"
        "cli.main(sys.argv[1:])\n"
    )
    for words, wanted in ((["--help"], "Commands:"), (["build", "--help"], "--out PATH")):
        done = _python("-c", probe, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert wanted in done.stdout


def test_version_names_the_libraries_that_decide_a_result() -> None:
    done = _program("--version")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0
    assert {"sparse-export", "python", "torch", "onnx", "numpy"} <= lines.keys()


def test_no_command_shows_the_help_on_stderr_and_is_wrong_usage() -> None:
    done = _program()
    assert (done.returncode, done.stdout) == (2, "")
    assert all(name in done.stderr for name in COMMANDS)


def test_an_unknown_command_is_told_the_nearest() -> None:
    done = _program("valdate")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'validate'?" in done.stderr


@pytest.mark.parametrize("words", [["--nonsense"], ["build"], ["build", "--nonsense"], ["compare", "one"]])
def test_wrong_usage_ends_with_two(words: list[str], call: Call) -> None:
    result = call(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: " in result.stderr


def test_a_usage_error_is_a_json_document_when_json_was_asked_for(call: Call) -> None:
    result = call("build", "--nonsense", "--json")
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


@pytest.mark.parametrize(
    "error",
    [
        errors.SparseExportError("Failed."),
        errors.UsageError("Wrong."),
        errors.GateFailed("Not kept."),
        errors.SpeedupNotReached("Not faster."),
        errors.MissingCapability("No GPU."),
        errors.ArtefactError("Corrupt."),
        errors.Interrupted("Stopped."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_one_paragraph_on_stderr_and_its_exit_code(
    error: errors.SparseExportError, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, error)
    result = call("doctor")
    assert (result.exit_code, result.stdout, result.stderr) == (error.exit_code, "", f"Error: {error}\n")


def test_an_error_with_json_is_the_one_document(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, errors.ArtefactError("x is damaged.", do="Make it again."))
    result = call("doctor", "--json")
    assert json.loads(result.stdout) == {
        "error": {"type": "ArtefactError", "message": "x is damaged. Make it again.", "exit_code": 6}
    }
    assert result.stderr == "Error: x is damaged. Make it again.\n"


def test_json_may_be_asked_for_in_the_environment() -> None:
    done = _program("build", "no-such-run", SPARSE_EXPORT_JSON="1")
    assert (done.returncode, json.loads(done.stdout)["error"]["type"]) == (2, "UnknownNameError")


@pytest.mark.parametrize(("value", "is_document"), [("1", True), ("Yes", True), ("on", True), ("0", False)])
def test_an_error_before_the_options_are_read_heeds_the_environment_too(
    value: str, is_document: bool, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_EXPORT_JSON", value)
    result = call("build", "--nonsense")
    assert result.exit_code == 2
    assert (json.loads(result.stdout)["error"]["exit_code"] == 2) if is_document else (result.stdout == "")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_name_that_the_encoding_has_not_is_written_as_an_escape(encoding: str) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    Output(stream=stream).write("runs/" + os.fsdecode(b"caf\xe9"))
    stream.flush()
    assert written.getvalue() == b"runs/caf\\udce9\n"


def test_what_a_terminal_would_obey_is_written_as_an_escape(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, errors.ArtefactError("The layer \x1b[2Jfc\x07\x9b1m is\tdamaged\n."))
    assert call("doctor").stderr == "Error: The layer \\x1b[2Jfc\\x07\\x9b1m is\tdamaged\n.\n"


def test_an_interruption_ends_with_130(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, KeyboardInterrupt())
    result = call("doctor")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "Interrupted." in result.stderr


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_refusal_of_the_system_is_told_without_a_traceback(
    code: int, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, OSError(code, os.strerror(code), "/somewhere/file"))
    result = call("doctor")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: Cannot use /somewhere/file: {os.strerror(code)}.")


def test_a_refusal_without_a_file_name_is_told_too(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    result = call("doctor")
    assert (result.exit_code, "Traceback" in result.stderr) == (1, False)
    assert "No space left on device" in result.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault of ours"), FileNotFoundError(errno.ENOENT, "gone", "x")]
)
def test_a_fault_of_the_program_shows_its_traceback_and_ends_with_one(
    error: Exception, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    _raise(monkeypatch, error)
    result = call("doctor", "--json")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert json.loads(result.stdout)["error"]["type"] == type(error).__name__


def test_a_reader_that_goes_away_is_no_error_message() -> None:
    with subprocess.Popen(
        [sys.executable, *PROGRAM, "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 1


def test_what_a_library_prints_does_not_reach_stdout_with_json(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_export.doctor import Examination, Finding

    def examine() -> Examination:
        print("chatter")
        return Examination(findings=(Finding(group="a", name="b", state="ok", value="c"),))

    monkeypatch.setattr("sparse_export.doctor.examine", examine)
    result = call("doctor", "--json")
    assert json.loads(result.stdout)["findings"][0]["value"] == "c"
    assert result.stderr == "chatter\n"


@pytest.mark.parametrize("words", [["--help"], ["nonsense"], ["doctor"]])
def test_there_is_no_colour_where_there_is_no_terminal(words: list[str]) -> None:
    done = _program(*words)
    assert "\x1b" not in done.stdout + done.stderr


def test_ctrl_c_in_a_training_ends_with_130(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, *PROGRAM, "train", "digits", "--epochs", "500", "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130
    assert "--resume" in rest
    assert "Traceback" not in rest


def test_shell_completion_lists_the_commands_and_the_options_of_one() -> None:
    commands = _program(
        _SPARSE_EXPORT_COMPLETE="bash_complete", COMP_WORDS="sparse-export val", COMP_CWORD="1"
    )
    options = _program(
        _SPARSE_EXPORT_COMPLETE="bash_complete", COMP_WORDS="sparse-export build --ou", COMP_CWORD="2"
    )
    assert (commands.stdout.strip(), options.stdout.strip()) == ("plain,validate", "plain,--out")


def test_the_group_is_what_click_tools_expect() -> None:
    context = click.Context(cli, info_name="sparse-export")
    assert cli.list_commands(context) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_document_lists_the_options_that_a_command_has(name: str) -> None:
    document = (CHECKOUT / "docs" / "cli.md").read_text()
    section = re.search(rf"^## `{name}\b.*?(?=^## )", document, flags=re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md has no section on {name}"
    command = _command(name)
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    told = {
        word
        for row in re.findall(r"^\| `--.*", section[0], flags=re.MULTILINE)
        for word in re.findall(r"--[\w-]+", row.split("|")[1])
    }
    assert told == options - {"--json"}


def test_every_command_stands_under_one_heading_of_the_help() -> None:
    listed = [name for names in GROUPS.values() for name in names]
    assert sorted(listed) == sorted(COMMANDS)
    shown = _program("--help").stdout
    at = [shown.index(f"─ {heading} ─") for heading in GROUPS]
    assert at == sorted(at)
    assert shown.index("─ Deploy ─") < shown.index("│ serve ") < shown.index("─ More ─")
    assert "─ Commands ─" not in shown
