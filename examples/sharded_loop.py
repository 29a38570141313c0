"""A loop like torchtitan's: FSDP2, batches in parts, warm-up, clipping, checkpoints of all ranks.
python examples/sharded_loop.py, or torchrun --nproc-per-node 2 examples/sharded_loop.py
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

from kbfgs_ext import KBFGS


def main(steps: int = 12, folder: str | None = None, save_at: int = 6) -> list[float]:
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0}
        dist.init_process_group("gloo", **alone, world_size=1 if alone else -1)  # GPUs: "nccl"
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(32, 8), nn.Flatten(), *blocks, nn.Linear(64, 32))
    for module in (*blocks, model):
        fully_shard(module)
    opt = KBFGS(model, max_grad_norm=1.0)  # after fully_shard
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: min(n + 1, 3) / 3 * (1 - n / steps))

    whole = {"model": model, "optimizer": opt, "schedule": schedule}
    if folder and Path(folder, ".metadata").exists():
        dcp.load(saved := {n: part.state_dict() for n, part in whole.items()}, checkpoint_id=folder)
        for name, part in whole.items():
            part.load_state_dict(saved[name])
    tokens = torch.randint(32, (512, 8), generator=torch.Generator().manual_seed(dist.get_rank()))
    parts = list(zip(tokens.chunk(4), tokens.amax(1).chunk(4), strict=True))
    losses = []
    for step in range(schedule.last_epoch, steps):

        def closure() -> torch.Tensor:
            opt.zero_grad()
            total = torch.zeros(())
            for number, (x, y) in enumerate(parts, 1):
                model.set_requires_gradient_sync(number == len(parts))
                loss = nn.functional.cross_entropy(model(x), y) / len(parts)
                loss.backward()
                total += loss.detach()
            return total

        losses.append(opt.step(closure).item())
        schedule.step()
        if folder and step + 1 == save_at:
            dcp.save({n: part.state_dict() for n, part in whole.items()}, checkpoint_id=folder)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"rank {dist.get_rank()}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    dist.barrier()  # a process that ends while its group's threads are at work may be aborted
    dist.destroy_process_group()
