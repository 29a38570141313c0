"""An example on two processes, started as its framework does:

    python tests/examples/launched.py EXAMPLE DIRECTORY

Each process writes what it has at the end to DIRECTORY/RANK.json.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import kbfgs_ext  # noqa: E402


def run(name: str, directory: str, **options: object) -> None:
    """The example, and its weights."""
    example, made = importlib.import_module(name), []

    class Watched(kbfgs_ext.KBFGS):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    example.KBFGS = Watched
    losses = example.main(2, **options)
    (opt,) = made
    weights = [p.detach().double().sum().item() for p in opt.model.parameters()]
    said = {"losses": losses, "weights": weights, "size": opt.steps.process.size}
    (Path(directory) / f"{dist.get_rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    name, directory = sys.argv[1:]
    if name == "with_accelerate":
        import accelerate

        accelerate.debug_launcher(functools.partial(run, name, directory, cpu=True))
    else:
        run(name, directory, strategy="ddp", devices=2)
