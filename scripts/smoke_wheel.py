"""A wheel in a fresh environment: it installs without a compiler, and README's snippet runs.

``python scripts/smoke_wheel.py dist/*.whl --torch 2.11.0 --torch 2.15.0`` makes an environment per
wheel and torch, installs both, and runs this file in it, away from the checkout. ``--here`` checks
the package that is installed already.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


def check() -> None:
    """The installed package: what it says of itself, README's snippet, cpu against reference."""
    import torch

    import kbfgs_ext
    from kbfgs_ext import ops

    said = kbfgs_ext.explain("cpu")
    if "compiled extension: ready" not in said:
        raise SystemExit(f"expected a binary, got\n{said}")

    readme = importlib.metadata.metadata("kbfgs_ext").get_payload()
    snippet = re.findall(r"```python\n(.*?)```", readme, flags=re.S)[0]
    torch.manual_seed(0)
    exec(compile(snippet, "README.md", "exec"), {})

    found = {}
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        H, s, y = torch.eye(40), torch.randn(40), torch.randn(40)
        y = y if s @ y > 0 else -y
        ops.bfgs_update_([H], [torch.zeros(4, dtype=torch.int64)], [s], [y], [], [y], None, backend)
        found[backend] = H
    for H in found.values():
        torch.testing.assert_close(H @ y, s, rtol=1e-3, atol=1e-3)  # the secant equation
        torch.testing.assert_close(H, found["reference"], rtol=1e-4, atol=1e-4)
    where = Path(kbfgs_ext.__file__).parent
    print(f"kbfgs_ext {kbfgs_ext.__version__} in {where}, torch {torch.__version__}: works")


def fresh(wheel: Path, torch: str | None) -> None:
    """``check`` in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        wanted = "torch" if torch is None else f"torch=={torch}"
        # No compiler and no other tool on the path: a wheel must not need them.
        environment = {**os.environ, "PATH": str(python.parent), "CXX": "", "PYTHONPATH": ""}
        for command in (
            ["-m", "pip", "install", "-q", wanted],
            ["-m", "pip", "install", "-q", "--only-binary=:all:", str(wheel.resolve())],
            [str(Path(__file__).resolve()), "--here"],
        ):
            began = time.perf_counter()
            subprocess.run([python, *command], check=True, cwd=folder, env=environment)
            print(f"{time.perf_counter() - began:.1f} s: {Path(command[-1]).name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path)
    parser.add_argument("--torch", action="append", help="a version to install (the newest)")
    parser.add_argument("--here", action="store_true", help="check this environment")
    options = parser.parse_args()
    if options.here:
        sys.path[:] = [path for path in sys.path if path != str(Path(__file__).resolve().parent)]
        check()
    elif not options.wheels:
        parser.error("give a wheel, or --here")
    for wheel in options.wheels:
        for torch in options.torch or [None]:
            fresh(wheel, torch)


if __name__ == "__main__":
    main()
