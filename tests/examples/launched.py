"""An example on two processes, started as its framework does, with DDP or FSDP2:

    python tests/examples/launched.py EXAMPLE WRAPPER DIRECTORY

Each process writes what it has at the end to DIRECTORY/RANK.json.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import kbfgs_ext  # noqa: E402


def run(name: str, wrapper: str, directory: str, **options: object) -> None:
    """The example, and its weights."""
    example, made = importlib.import_module(name), []

    class Watched(kbfgs_ext.KBFGS):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    example.KBFGS = Watched
    if wrapper == "fsdp2":
        (cut_by_accelerate if name == "with_accelerate" else cut_by_hand)(example)
    losses = example.main(2, **options)
    (opt,) = made
    whole = [p.full_tensor() if wrapper == "fsdp2" else p for p in opt.model.parameters()]
    weights = [p.detach().double().sum().item() for p in whole]
    process = opt.steps.process
    said = {"losses": losses, "weights": weights, "size": process.size, "cut": process.sharded}
    (Path(directory) / f"{dist.get_rank()}.json").write_text(json.dumps(said))


def cut_by_hand(example) -> None:
    """As Lightning has it: `configure_model` shards."""

    def configure_model(self) -> None:
        for module in (self.net[0], self.net[2], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    example.Classifier.configure_model = configure_model


def cut_by_accelerate(example) -> None:
    """`prepare` takes the model with another optimizer, which is dropped. accelerate shards on GPUs
    alone: here it is told that it does on CPUs."""

    class Accelerator(example.Accelerator):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            self.state.distributed_type = accelerate.DistributedType.FSDP
            self.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
            )

        def prepare(self, first, *others):
            if not isinstance(first, torch.nn.Module):
                return super().prepare(first, *others)
            other = torch.optim.SGD(first.parameters())
            first, _, *others = super().prepare(first, other, *others)
            return first, *others

    example.Accelerator = Accelerator


if __name__ == "__main__":
    name, wrapper, directory = sys.argv[1:]
    if name == "with_accelerate":
        import accelerate

        accelerate.debug_launcher(functools.partial(run, name, wrapper, directory, cpu=True))
    else:
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = "ddp" if wrapper == "ddp" else ModelParallelStrategy(2, 1)
        run(name, wrapper, directory, strategy=strategy, devices=2)
