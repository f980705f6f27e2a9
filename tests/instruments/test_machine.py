from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_export.instruments.machine import machine_facts, n_usable_cores


def test_machine_facts_are_json_and_name_the_machine() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["n_cores_usable"] == n_usable_cores() >= 1
    assert facts["memory_bytes"] > facts["memory_available_bytes"] > 0
    assert facts["python"].startswith("3.")
    assert len(facts["load_average"]) == 3


def test_machine_facts_do_not_import_torch() -> None:
    code = (
        "import sys; from sparse_export.instruments.machine import machine_facts; machine_facts(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _fake_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_named_as_nvidia_smi_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_smi(tmp_path, "echo 'NVIDIA A100, 40GB, 535.1'; echo 'NVIDIA T4, 535.1'", monkeypatch)
    assert machine_facts()["gpus"] == [
        {"name": "NVIDIA A100, 40GB", "driver": "535.1"},
        {"name": "NVIDIA T4", "driver": "535.1"},
    ]


def test_an_nvidia_smi_that_fails_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_smi(tmp_path, "echo 'No devices were found'; exit 6", monkeypatch)
    assert machine_facts()["gpus"] == []
