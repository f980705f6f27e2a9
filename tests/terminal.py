"""The program on a terminal of its own, and the screen that a person sees of what it wrote."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CHECKOUT = Path(__file__).resolve().parents[1]
_NOT_PASSED_ON = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS")
_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\]8;[^\x1b\x07]*(?:\x07|\x1b\\)")


class Screen:
    """A terminal of some width and endless height: the sequences that rich and click write, no others.

    Attributes:
        frames: texts of the lines that were written over or erased, in order: what a bar once showed.
        wrapped: lines that were longer than the screen is wide.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._lines: list[list[str]] = [[]]
        self._row = self._column = 0
        self.frames: list[str] = []
        self.wrapped: list[str] = []

    @property
    def lines(self) -> list[str]:
        """What stands there, without trailing spaces."""
        return ["".join(line).rstrip() for line in self._lines]

    def feed(self, text: str) -> None:
        """Play what was written.

        Raises:
            ValueError: a sequence that no program of ours should write.
        """
        at = 0
        while at < len(text):
            found = _SEQUENCE.match(text, at)
            if found:
                if found[2]:
                    self._obey(found[1], found[2])
                at = found.end()
                continue
            self._put(text[at])
            at += 1

    def _obey(self, numbers: str, what: str) -> None:
        if what in "mhl":  # colours; the cursor hidden and shown
            return
        count = int(numbers or 0)
        if what == "A":
            self._row = max(0, self._row - max(1, count))
        elif what == "K" and count == 2:
            self._keep_frame()
            self._lines[self._row] = []
        else:
            raise ValueError(f"ESC [ {numbers}{what} was written")

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
            if self._row == len(self._lines):
                self._lines.append([])
        elif character < " ":
            raise ValueError(f"{character!r} was written")
        else:
            if self._column == self._width:
                self.wrapped.append("".join(self._lines[self._row]))
                self._put("\r")
                self._put("\n")
            line = self._lines[self._row]
            if self._column == 0 and line:
                self._keep_frame()
            line += " " * (self._column + 1 - len(line))
            line[self._column] = character
            self._column += 1

    def _keep_frame(self) -> None:
        text = "".join(self._lines[self._row]).rstrip()
        if text and (not self.frames or self.frames[-1] != text):
            self.frames.append(text)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A command that ran on a terminal.

    Attributes:
        lines: of the screen, in the end.
        frames: lines that were there for a while.
        wrapped: lines that the terminal had to break.
    """

    exit_code: int
    lines: Sequence[str]
    frames: Sequence[str]
    wrapped: Sequence[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


_SERVER = """
import json, os, sys, traceback
import numpy, onnx, onnxruntime, rich.live, torch, torchvision
import sparse_export.cli.main
import sparse_export.building, sparse_export.evaluate.gate, sparse_export.evaluate.validate
import sparse_export.oneshot, sparse_export.report, sparse_export.sweep.sweep, sparse_export.train.loop
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.setsid()
    terminal = os.open(asked["terminal"], os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate("rww"))
    os.chdir(asked["folder"])
    sys.argv = ["sparse-export", *asked["words"]]
    exec(asked["before"])
    try:
        sparse_export.cli.main.main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)  # threads that a library's destructors wait for were not forked
"""


class Program:
    """The program, its libraries loaded once: each command runs in a fork of that process.

    Use it as a context.
    """

    def __enter__(self) -> Self:
        kept = {name: text for name, text in os.environ.items() if name not in _NOT_PASSED_ON}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=CHECKOUT,
            env=kept | {"TERM": "xterm-256color", "PYTHONPATH": str(CHECKOUT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def __call__(self, words: Sequence[object], *, width: int, folder: Path, before: str = "") -> Watched:
        """Run a command in a folder, its output on a terminal of that width.

        Args:
            words: the command line.
            width: columns.
            folder: the current one.
            before: Python that runs first, to make the command smaller.
        """
        ask, answers = self._server.stdin, self._server.stdout
        assert ask and answers
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
        asked = {"words": [str(word) for word in words], "terminal": os.ttyname(theirs), "before": before}
        print(json.dumps(asked | {"folder": str(folder)}), file=ask, flush=True)
        answer: list[str] = []
        waiting = threading.Thread(target=lambda: answer.append(answers.readline()))
        waiting.start()
        screen, decoder, text = Screen(width), codecs.getincrementaldecoder("utf-8")(), ""
        try:
            while waiting.is_alive() or select.select([ours], [], [], 0)[0]:
                if select.select([ours], [], [], 0.05)[0]:
                    text += decoder.decode(os.read(ours, 65536))
        finally:
            os.close(ours)
            os.close(theirs)
        screen.feed(text)
        return Watched(
            exit_code=int(answer[0]), lines=screen.lines, frames=screen.frames, wrapped=screen.wrapped
        )
