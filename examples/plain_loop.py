"""A training loop with a closure, and the same without one: the same losses, to the bit.

python examples/plain_loop.py
"""

import torch
from torch import nn

from kbfgs_ext import KBFGS


def problem() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(2048, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    return model, list(zip(x.split(256), y.split(256), strict=True))


def with_closure(epochs: int = 3) -> list[float]:
    model, batches = problem()
    opt = KBFGS(model)
    losses = []
    for x, y in batches * epochs:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    return losses


def without_closure(epochs: int = 3) -> list[float]:
    model, batches = problem()
    opt = KBFGS(model)
    losses = []
    for x, y in batches * epochs:
        with opt.first_pass():
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
        opt.descend(loss)
        if opt.second_pass_due:
            with opt.second_pass():
                again = nn.functional.cross_entropy(model(x), y)
                again.backward()
            opt.finish(again)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = with_closure()
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; the same twice: {losses == without_closure()}"
    )
