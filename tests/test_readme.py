"""The examples that people copy from README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()


def test_the_python_example_runs_as_it_stands(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n{code}"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    found = re.fullmatch(r"(\d+) of (\d+) parameters are not zero\n", done.stdout)
    assert found, done.stdout
    n_weights, n_biases = 64 * 128 + 128 * 10, 128 + 10
    assert int(found[2]) == n_weights + n_biases
    assert int(found[1]) <= round(0.1 * n_weights) + n_biases
    assert (tmp_path / "bundles" / "mine" / "model.onnx").is_file()


def test_every_document_that_readme_names_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (CHECKOUT / link).exists()] == []


def test_nothing_was_left_to_be_filled_in() -> None:
    assert "@@" not in README
