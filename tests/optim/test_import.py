"""What an import brings along: torch, and nothing that torch itself would import later."""

from __future__ import annotations

import subprocess
import sys

LATER = ("torch._dynamo", "torch._inductor", "triton", "matplotlib", "rich")


def test_import_leaves_the_compiler_alone():
    command = f"import sys, kbfgs_ext; print(*[m for m in {LATER!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == ""
