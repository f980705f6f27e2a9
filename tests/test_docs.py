"""The documents that list what the code has."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sparse_export.train.recipe import (
    LearningRateRecipe,
    OptimizerRecipe,
    Recipe,
    recipe_from_table,
)
from sparse_export.train.sparsity_config import SparsityConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECIPE_PAGE = (DOCS / "recipe.md").read_text()
TABLES: dict[str, Any] = {
    "Top level": Recipe,
    "`[optimizer]`": OptimizerRecipe,
    "`[learning_rate]`": LearningRateRecipe,
    "`[sparsity]`": SparsityConfig,
}


def told(heading: str) -> dict[str, tuple[str, str]]:
    """The table below a heading: key -> default, meaning."""
    (section,) = re.findall(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", RECIPE_PAGE, re.DOTALL | re.MULTILINE
    )
    return {
        key: (default, text)
        for key, default, text in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", section, re.MULTILINE)
    }


def fields_of(table: Any) -> dict[str, tuple[Any, Any]]:
    """The keys of a table of a recipe: the type of each, and its default."""
    if is_dataclass(table):
        types = get_type_hints(table)
        return {field.name: (types[field.name], field.default) for field in fields(table)}
    return {name: (field.annotation, field.default) for name, field in table.model_fields.items()}


def keys_of(table: Any) -> set[str]:
    return {
        name
        for name, (kind, _) in fields_of(table).items()
        if not (isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind)))
    }


def words_of(annotation: Any) -> list[str]:
    """The words that a key can have, those of a choice within an optional one too."""
    if get_origin(annotation) is Literal:
        return [word for word in get_args(annotation) if isinstance(word, str)]
    return [word for part in get_args(annotation) for word in words_of(part)]


@pytest.mark.parametrize("heading", TABLES)
def test_the_recipe_page_has_a_line_for_every_key_and_no_other(heading: str) -> None:
    assert told(heading).keys() == keys_of(TABLES[heading])


@pytest.mark.parametrize("heading", TABLES)
def test_the_recipe_page_tells_every_default(heading: str) -> None:
    for key, (default, _) in told(heading).items():
        _, wanted = fields_of(TABLES[heading])[key]
        if wanted is PydanticUndefined:
            assert default == "needed", key
        elif wanted is None:
            assert default == "not set", key
        else:
            found = tomllib.loads(f"x = {default.strip('`')}")["x"]
            assert found == json.loads(json.dumps(wanted)), key


@pytest.mark.parametrize("heading", TABLES)
def test_the_recipe_page_names_every_word_that_a_key_can_have(heading: str) -> None:
    for key, (default, meaning) in told(heading).items():
        for word in words_of(fields_of(TABLES[heading])[key][0]):
            assert f'`"{word}"`' in f"{default} {meaning}", (key, word)


def test_the_example_of_the_recipe_page_has_every_key_and_each_default() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", RECIPE_PAGE, re.DOTALL)
    table = tomllib.loads(example)
    recipe = recipe_from_table(table, source="the example")
    assert recipe == Recipe(model=recipe.model, data=recipe.data, epochs=recipe.epochs)
    everything = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", example, flags=re.MULTILINE))
    for heading, kind in TABLES.items():
        part = everything if kind is Recipe else everything[heading.strip("`[]")]
        assert {key for key, value in part.items() if not isinstance(value, dict)} == keys_of(kind)


@pytest.mark.full
def test_the_examples_of_the_python_page_run_as_they_stand(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```(?:python|toml)\n(?:# (\w+\.py)\n)?(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL
    )
    for name, code in blocks:
        (tmp_path / (name or "grid.toml")).write_text(code)
    # Timing and whole sweeps have tests of their own, and take longer than all the rest.
    names = [name for name, _ in blocks if name not in ("", "nets.py", "work.py")]
    assert names == [
        *("words.py", "loop.py", "resume.py", "deploy.py", "stages.py", "look.py", "infer.py", "client.py")
    ]
    code = f"""
import sys
from types import SimpleNamespace
sys.path[:0] = [{str(DOCS.parent)!r}, "."]
import sparse_export
import sparse_export.sweep.sweep
sparse_export.compare = lambda *_, **__: None
sparse_export.sweep.sweep.sweep = lambda *_, **__: SimpleNamespace(rows=[])
seen = dict()
for name in {names!r}:
    seen[name] = dict(__name__="__main__")
    exec(open(name).read(), seen[name])
trained, resumed = (seen[name]["model"].state_dict() for name in ("loop.py", "resume.py"))
assert all((trained[key] == resumed[key]).all() for key in trained)
from sparse_export.graph.example_sources import example_from_function
words = seen["words.py"]
inputs = example_from_function(words["Words"](), words["example_inputs"], free_sizes=words["free_sizes"])
assert inputs.sizes == dict(sequence=7)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_networks_of_any_kind_are_sparsified_and_trained_as_the_pages_say(tmp_path: Path) -> None:
    found: dict[str, str] = {}
    for page in ("python.md", "sparsify.md", "training.md"):
        blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
        found |= dict(blocks)
    for name in ("words.py", "any.py", "words_loop.py"):
        (tmp_path / name).write_text(found[name])
    code = f"""
import sys
sys.path[:0] = [{str(DOCS.parent)!r}, "."]
seen = dict(__name__="__main__")
exec(open("any.py").read(), seen)
assert [one.name for one in seen["done"].report.stages[0].agreement.outputs] == ["logits"]
assert "of-a-file" in str(seen["se"].open_run("runs/of-a-file").path)
exec(open("words_loop.py").read(), dict(__name__="__main__"))
info = seen["se"].open_bundle("bundles/words-trained").info
assert info.signature.input_names == ("input_ids", "attention_mask")
assert info.signature.free == ("batch", "sequence")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_tasks_of_the_page_score_what_they_say_and_its_recipe_trains(tmp_path: Path) -> None:
    page = (DOCS / "tasks.md").read_text()
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
        (tmp_path / name).write_text(code)
    for example in (DOCS / "examples").glob("*.py"):
        shutil.copy(example, tmp_path)
    (recipe,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "recipe.toml").write_text(recipe)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def digit(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))\n"
    )
    code = f"""
import math
import sys
sys.path[:0] = [{str(DOCS.parent)!r}, "."]
import numpy as np
import torch
from sparse_export.tasks import task_named
from sparse_export.train.loop import train
from sparse_export.train.recipe import load_recipe

def figure(name, outputs, targets):
    task = task_named(name)
    return task.score(task.statistics(outputs, targets)).figure

steps = np.eye(4)[[[1, 1, 0, 2, 2, 0, 3], [0, 1, 0, 1, 1, 0, 0]]]  # reads 1 2 3 and 1 1
assert figure("reading:task", dict(y=steps), [[1, 2, 3], [1, 2]]) == 1 / 5
tags, true = np.eye(3)[[[0, 1, 2], [2, 2, 0]]], np.array([[0, 1, 1], [2, -1, -1]])
assert figure("tagging:task", dict(y=tags), true) == 75.0
loss = task_named("tagging:task").loss(torch.from_numpy(tags), torch.from_numpy(true))
assert abs(float(loss) - (math.log(math.e + 2) - 0.75)) < 1e-9  # of four tokens, one of them wrong

from detection import boxes_of
one = np.float32([[10, 10, 8, 8, 0.9, 0], [10, 11, 8, 8, 0.8, 0], [40, 40, 8, 8, 0, 0.7], [70, 70, 8, 8, 0.6, 0.1]])
boxes, scores, classes = boxes_of(one.T)  # the second overlaps with the first
assert boxes.tolist() == [[6, 6, 14, 14], [36, 36, 44, 44], [66, 66, 74, 74]]
assert np.allclose(scores, [0.9, 0.7, 0.6]) and classes.tolist() == [0, 1, 0]
true = np.array([[0, 6, 6, 14, 14], [1, 37, 36, 44, 44], [0, 100, 100, 110, 110], [0, 66, 70, 74, 78]])
nothing = np.zeros((6, 4), np.float32)
pictures = dict(y=np.stack([one.T, nothing]))
# Class 0: one of three found, with precision 1; class 1: one of one.
assert abs(figure("detection:task", pictures, [true, np.zeros((0, 5))]) - 100 * (1 / 3 + 1) / 2) < 1e-9
kept = lambda *scores: dict(y=np.array([[[0.0] * 3] * 4 + list(scores)], dtype=np.float32))
dense = kept([0.9, 0.1, 0.4], [0.0, 0.8, 0.5])["y"]
assert figure("kept_boxes:task", kept([0.9, 0.1, 0.4], [0.0, 0.8, 0.5]), list(dense)) == 100.0
assert abs(figure("kept_boxes:task", kept([0.9, 0.9, 0.6], [0.0, 0.8, 0.5]), list(dense)) - 100 / 3) < 1e-9
assert figure("my_tasks:within_one", dict(y=np.array([[1.0], [3.0]])), np.array([1.5, 1.5])) == 50.0
for changes, name in ((dict(), "RMSE"), (dict(task="my_tasks:within_one"), "share within one")):
    recipe = load_recipe("recipe.toml", changes=dict(model="nets:digit", **changes))
    assert train(recipe, "run-" + name.replace(" ", "-"), device="cpu").info.test.name == name
pairs = dict(model="pairs:Pair", data="pairs:data", task="classification", epochs=1)
run = train(load_recipe("recipe.toml", changes=pairs), "run-pairs", device="cpu")
assert run.info.signature.input_names == ("ids", "features")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_every_name_that_a_page_imports_is_there(page: Path) -> None:
    found = re.findall(r"^ *from (sparse_export[\w.]*) import ([^()\n]+)$", page.read_text(), re.MULTILINE)
    for module, names in found:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.split()[0]), (module, name)


def anchors_of(page: str) -> set[str]:
    """What a link can name after #: the headings, without marks, in small letters, blanks as hyphens."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [path.name for path in sorted(DOCS.glob("*.md"))])
def test_every_file_that_a_document_links_to_is_there(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (DOCS / name).read_text())
    assert [link for link in links if "://" not in link and not (DOCS / link).exists()] == []


@pytest.mark.parametrize("name", ["recipe.md", "data.md", "python.md", "troubleshooting.md", "results.md"])
def test_every_heading_that_a_page_for_users_links_to_is_there(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]*\.md)?#([^)\s]+)\)", (DOCS / name).read_text())
    assert [
        (page, anchor)
        for page, anchor in links
        if anchor not in anchors_of((DOCS / (page or name)).read_text())
    ] == []


def test_readme_links_to_every_document() -> None:
    readme = (DOCS.parent / "README.md").read_text()
    assert [path.name for path in sorted(DOCS.glob("*.md")) if f"(docs/{path.name})" not in readme] == []
