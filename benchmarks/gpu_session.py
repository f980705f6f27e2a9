"""Measure one CUDA card by one command, in at most nine minutes, offline.

    python -m benchmarks.gpu_session [--out FOLDER] [--parts NAMES] [--minutes N] [--data-dir FOLDER]
    [--rehearse]

Parts, in order: `tests` (all tests marked gpu), `ceilings` (copying, dense and 2:4 matrix rates), `products`
(Linear sizes of vision transformers and language models), `inference` (networks dense, 2:4 wherever possible,
and planned), `training` (steps dense and 2:4, forward only and with the gradient of the input), `masks` (what
sparse momentum adds to a step, and a mask update), `trained` (short trainings on CIFAR-10, with --data-dir).
Each runs in a process of its own with its own share of the time, and writes what it has after every case, so
that a part which is stopped or fails loses one case. Writes DATE-CARD.json (everything, raw samples left
out), DATE-CARD.md (a table), DATE-CARD-samples.json.gz (every round) and DATE-CARD-tests.txt.

--rehearse runs all of it but `tests` on the CPU, with the dense reference in place of the hardware's
products, in small sizes: its figures mean nothing, and its files say so. It shows that the program works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.document import write
from benchmarks.gpu.parts import run_part
from benchmarks.gpu.setting import CARD, REHEARSAL
from sparse_export.errors import SparseExportError
from sparse_export.instruments.machine import machine_facts
from sparse_export.version import command_line, library_versions, now

# Share of the time that each part gets.
# What a part leaves over goes to those behind it.
SHARES = {
    "tests": 0.17,
    "ceilings": 0.05,
    "products": 0.15,
    "inference": 0.3,
    "training": 0.21,
    "masks": 0.07,
    "trained": 0.05,
}


def run_tests(limit_s: float, log: Path) -> str | None:
    """Run every gpu test.

    Args:
        limit_s: after which they are stopped.
        log: file for their output.

    Returns:
        What went wrong; None if nothing did.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"],
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        log.write_text(f"stopped after {limit_s:.0f} s\n{_text(cause.stdout)}")
        return f"stopped after {limit_s:.0f} s"
    log.write_text(done.stdout + done.stderr)
    last = done.stdout.strip().splitlines()[-1:] or ["no output"]
    return None if done.returncode == 0 else f"exit {done.returncode}: {last[0]}"


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else str(output or "")


def session(folder: Path, parts: Sequence[str], minutes: float, *, rehearse: bool) -> Path:
    """Run the parts one after another, each in a process of its own.

    Args:
        folder: of the document.
        parts: names of the parts, in their order.
        minutes: for all parts together.
        rehearse: on the CPU?

    Returns:
        Path of the document.
    """
    card = "rehearsal" if rehearse else torch.cuda.get_device_name(0)
    date = now()
    stem = f"{date[:16].replace(':', '')}-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-').lower()}"
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        "A rehearsal on the CPU with dense products in place of 2:4 ones: these figures mean nothing."
        if rehearse
        else "Times of the device by CUDA events; ratios above 1 mean that 2:4 is faster. Through torch, not TensorRT."
    )
    document: dict[str, Any] = {
        "card": card,
        "date": date,
        "note": note,
        "command": command_line(),
        "machine": machine_facts(),
        "versions": library_versions(),
        "parts": {},
    }
    end = time.monotonic() + 60 * minutes
    for place, name in enumerate(parts):
        limit_s = max(1.0, end - time.monotonic()) * SHARES[name] / sum(SHARES[one] for one in parts[place:])
        print(f"{name}: at most {limit_s:.0f} s", flush=True)
        began = time.monotonic()
        part: dict[str, Any] = {"cases": [], "problem": None}
        if name == "tests":
            part["problem"] = run_tests(limit_s, folder / f"{stem}-tests.txt")
        else:
            file = folder / f".{stem}-{name}.json"
            words = [sys.executable, "-m", "benchmarks.gpu_session", "--part", name, "--part-file", str(file)]
            try:
                done = subprocess.run(
                    [*words, *(["--rehearse"] if rehearse else [])],
                    timeout=limit_s,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    part["problem"] = done.stderr.strip() or f"exit {done.returncode}"
            except subprocess.TimeoutExpired:
                part["problem"] = f"stopped after {limit_s:.0f} s"
            if file.is_file():
                part |= json.loads(file.read_text())
                file.unlink()
        part["seconds"] = time.monotonic() - began
        document["parts"][name] = part
        write(folder, stem, document)
        print(
            f"  {len(part['cases'])} cases, {part['seconds']:.0f} "
            f"s{', ' + part['problem'].splitlines()[-1] if part['problem'] else ''}"
        )
    return folder / f"{stem}.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--parts", default=",".join(SHARES), help="default: all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--data-dir", type=Path, help="with CIFAR-10; without it nothing is trained")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without meaning")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = REHEARSAL if arguments.rehearse else CARD
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device. --rehearse runs on the CPU.", file=sys.stderr)
        return 5
    if arguments.part:
        run_part(arguments.part, setting, arguments.part_file)
        return 0
    parts = arguments.parts.split(",")
    unknown = [name for name in parts if name not in SHARES]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(SHARES)}")
    if arguments.data_dir is not None:
        os.environ["SPARSE_EXPORT_DATA"] = str(arguments.data_dir.resolve())
    elif not arguments.rehearse and "SPARSE_EXPORT_DATA" not in os.environ:
        parts = [name for name in parts if name != "trained"]
    if arguments.rehearse:
        parts = [name for name in parts if name != "tests"]
    try:
        written = session(arguments.out, parts, arguments.minutes, rehearse=arguments.rehearse)
    except SparseExportError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    print(written)
    problems = [name for name, part in json.loads(written.read_text())["parts"].items() if part["problem"]]
    if problems:
        print(f"Incomplete: {', '.join(problems)}. The document says why.", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
