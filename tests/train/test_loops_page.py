"""The loops of docs/loops.md, run as they stand: the page says nothing that does not work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "loops.md").read_text()
LOOPS = {  # what they import, and steps and updates of each trainer that they leave
    "amp.py": (None, {"trainer": (60, 5)}),
    "hugging_face.py": ("transformers", {"whole": (20, 3), "resumed": (20, 3)}),
    "with_lightning.py": ("lightning", {"first": (10, 1), "second": (20, 2)}),
    "with_timm.py": ("timm", {"sparse": (12, 2)}),
}
CHECK = """
import runpy, sys
seen = runpy.run_path(sys.argv[1], run_name="__main__")
from sparse_export.train import SparseTraining
for name, trainer in seen.items():
    if isinstance(trainer, SparseTraining):
        assert sum(int(mask.sum()) for mask in trainer.masks.values()) == trainer.n_active, name
        for key, mask in trainer.masks.items():
            assert not trainer.model.get_parameter(key)[~mask].any(), key
        print("found", name, trainer.n_steps, trainer.n_updates)
if "resumed" in seen:
    for key, mask in seen["whole"].masks.items():
        assert (mask == seen["resumed"].masks[key]).all(), key
for key, mask in seen["trainer"].masks.items() if "average" in seen else ():
    assert not seen["average"].module.get_parameter(key)[~mask].any(), key
"""


def blocks() -> dict[str, str]:
    return dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))


def test_each_loop_of_the_page_is_run_below() -> None:
    assert list(blocks()) == list(LOOPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_of_the_page_stays_sparse_and_counts_its_steps(name: str, tmp_path: Path) -> None:
    library, wanted = LOOPS[name]
    if library is not None:
        pytest.importorskip(library)
    (tmp_path / name).write_text(blocks()[name])
    done = subprocess.run(
        [sys.executable, "-c", CHECK, name],
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^found (\w+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    assert {key: (int(steps), int(updates)) for key, steps, updates in found} == wanted
