"""Hooks of the documents' site: README as its first page, the library's reference, and files that are linked.

The pages in docs/ are read in a checkout too, where links may lead out of docs/. Here those files come along,
and the links lead to the copies.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)#\s:]+)((?:#[^)\s]*)?)\)")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}  # of the root, by their names here
MODULES = ("sparse_export", "sparse_export.sparsity", "sparse_export.tasks", "sparse_export.train")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root, the reference, and each file that a page links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=_as_here((ROOT / name).read_text(), ROOT)))
    files.append(File.generated(config, "api.md", content=_reference()))
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]
    linked = {
        path
        for source in sources
        for name, _ in LINK.findall(source.read_text())
        if (path := (source.parent / name).resolve()).is_file() and not _is_page(path)
    }
    for path in sorted(linked):
        files.append(File.generated(config, _copy(path), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to what was copied."""
    in_docs = (ROOT / "docs" / page.file.src_uri).is_file()
    return _as_here(markdown, ROOT / "docs") if in_docs else markdown


def _is_page(path: Path) -> bool:
    in_docs = path.is_relative_to(ROOT / "docs")
    return in_docs or (path.parent == ROOT and path.name in PAGES)


def _copy(path: Path) -> str:
    """Where a file of the checkout lies in the site. A note in Markdown is no page of it."""
    name = path.relative_to(ROOT).as_posix()
    return f"files/{name}.txt" if name.endswith(".md") else f"files/{name}"


def _as_here(markdown: str, folder: Path) -> str:
    """A page with its links as they are in the site. folder: that the page lies in."""

    def led(found: re.Match[str]) -> str:
        path = (folder / found[1]).resolve()
        if not path.is_file() or not path.is_relative_to(ROOT):
            return found[0]
        if path.is_relative_to(ROOT / "docs"):
            return f"]({path.relative_to(ROOT / 'docs').as_posix()}{found[2]})"
        return f"]({PAGES[path.name] if _is_page(path) else _copy(path)}{found[2]})"

    return LINK.sub(led, markdown)


def _reference() -> str:
    """A page with what the public modules offer, by their `__all__`."""
    lines = ["# Library reference", "", "From the docstrings. [From Python](python.md) has examples.", ""]
    for module in MODULES:
        lines += [f"## `{module}`", ""]
        for name in _offered(module):
            lines += [f"::: {module}.{name}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def _offered(module: str) -> list[str]:
    file = ROOT / module.replace(".", "/") / "__init__.py"
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(one, "id", "") == "__all__" for one in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return [name for name in names if not name.startswith("__")]
    raise ValueError(f"{file} has no __all__.")
