"""MkDocs: pages that live beside the code, links between them, and equations as MathML."""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OPS = "kbfgs_ext/ops"
# A file of the repository, and its page.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmark-rows.md",
    f"{OPS}/README.md": "ops/index.md",
    **{
        f"{OPS}/{path.parent.name}/README.md": f"ops/{path.parent.name}.md"
        for path in (ROOT / OPS).glob("*/README.md")
    },
}
SITE = {**PAGES, **{f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}}
SITE["docs/README.md"] = "index.md"
SOURCE = {page: source for source, page in SITE.items() if source != "docs/README.md"}
CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside the code, the ops' reference, and the plots."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference-ops.md", content=reference_of_ops()))
    for plot in (ROOT / "benchmarks/results").rglob("*.png"):
        page = f"plots/{plot.name}"
        SITE[str(plot.relative_to(ROOT))] = page
        files.append(File.generated(config, page, abs_src_path=str(plot)))
    return files


def reference_of_ops() -> str:
    """Every public op, in the order of `kbfgs_ext.ops.__all__`."""
    tree = ast.parse((ROOT / OPS / "__init__.py").read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    head = (
        "# Ops\n\n`kbfgs_ext.ops`: every op takes lists, one entry per layer, and writes its first"
        " arguments. [Symbols and equations](ops/index.md).\n"
    )
    return head + "".join(f"\n::: kbfgs_ext.ops.{name}\n" for name in names if name.endswith("_"))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as on the site, marks in place of equations; code stays as it is."""
    here = page.file.src_uri
    # A link's text may hold code: links first, on the whole text outside fences.
    parts = re.split(r"(```.*?```)", markdown, flags=re.S)
    parts[::2] = [links(part, here) for part in parts[::2]]
    parts = CODE.split("".join(parts))
    page.equations = []
    parts[::2] = [marks(part, page.equations) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Equations as MathML, which browsers set by themselves."""
    return re.sub(r"@math(\d+)@", lambda mark: convert(page.equations[int(mark[1])]), html)


def marks(text: str, equations: list[str]) -> str:
    """$...$ as a mark: Markdown would take markup at the start of a line for a block."""

    def mark(found: re.Match[str]) -> str:
        equations.append(found[1])
        return f"@math{len(equations) - 1}@"

    return re.sub(r"\$([^$\n]+)\$", mark, text)


def links(text: str, here: str) -> str:
    """Links to files, relative to the file they stand in, become links to pages."""
    folder = posixpath.dirname(SOURCE.get(here, here))

    def link(found: re.Match[str]) -> str:
        label, target, anchor = (part or "" for part in found.groups())
        if "://" in target or not target:
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in SITE:
            there = posixpath.relpath(SITE[path], posixpath.dirname(here) or ".")
            return f"[{title(label, path)}]({there}{anchor})"
        if here in SOURCE and (ROOT / path).exists():
            return label  # a file without a page, such as code: there is nowhere to lead
        return found[0]

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


def title(label: str, path: str) -> str:
    """A link that is called by its file is called by its page's heading on the site."""
    if re.fullmatch(r"[\w./-]+\.md", label) is None:
        return label
    return (ROOT / path).read_text().splitlines()[0].removeprefix("# ")
