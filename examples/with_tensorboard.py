"""TensorBoard: the loss, and what the optimizer counts, per stretch of steps.

python examples/with_tensorboard.py; tensorboard --logdir build/out/tensorboard
"""

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from kbfgs_ext import KBFGS

EVERY = 10  # reading counters waits for the device: not in every step


class Log:
    """Writes counters and, per layer, what has happened to its pairs since the last reading."""

    def __init__(self, opt: KBFGS, writer: SummaryWriter) -> None:
        self.opt, self.writer, self.before = opt, writer, {}

    def __call__(self, step: int) -> None:
        for key, value in self.opt.counters().items():
            self.writer.add_scalar(f"kbfgs/{key}", value, step)
        for layer, counts in self.opt.diagnostics().items():
            for key, value in counts.items():
                name = f"kbfgs_layers/{layer}/{key}"
                self.writer.add_scalar(name, value.item() - self.before.get(name, 0), step)
                self.before[name] = value.item()


def main(steps: int = 30, folder: str = "build/out/tensorboard") -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(512, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    opt = KBFGS(model)
    losses = []
    with SummaryWriter(folder) as writer:
        log = Log(opt, writer)
        for step in range(steps):

            def closure() -> torch.Tensor:
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
            if step % EVERY == 0 or step == steps - 1:
                writer.add_scalar("loss", losses[-1], step)
                log(step)
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
