"""griffe: equations in docstrings, "(8)  H <- ...", are set as written; so is a * in prose."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Equations(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_code(obj.docstring.value)


def as_code(text: str) -> str:
    """Numbered lines, and those indented below them, become code; elsewhere a * is a product."""
    lines: list[str] = []
    equation = section = False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = re.fullmatch(r"\w+:", line) is not None
        starts = re.match(r"\(\d+\)  ", line) is not None
        continues = equation and line.startswith("  ")
        if lines and lines[-1] and line and (starts or continues) != equation:
            lines.append("")
        equation = starts or continues
        if equation:
            line = "    " + line
        elif section or not line.startswith("    "):
            line = re.sub(r"(?<=[^\s*])\*(?=[^\s*])", r"\\*", line)
        lines.append(line)
    return "\n".join(lines)
