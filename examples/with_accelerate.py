"""accelerate: the model is prepared first, then the optimizer is made from it and prepared too.

python examples/with_accelerate.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kbfgs_ext import KBFGS


def main(epochs: int = 3, **options: object) -> list[float]:
    accelerator = Accelerator(**options)
    torch.manual_seed(0)
    x = torch.randn(2048, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=256, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))

    model, loader = accelerator.prepare(model, loader)  # moves the model to its device
    kbfgs = KBFGS(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(kbfgs, epochs * len(loader))
    opt, schedule = accelerator.prepare(kbfgs, schedule)
    losses = []
    for _ in range(epochs):
        for x, y in loader:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if not kbfgs.second_pass_due:  # accelerate's `step` returns nothing
                    losses.append(loss.item())
                return loss

            opt.step(closure)
            schedule.step()
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
