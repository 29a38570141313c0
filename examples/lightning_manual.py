"""Lightning, manual optimization: a large batch in parts, in place of accumulate_grad_batches.

python examples/lightning_manual.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kbfgs_ext import KBFGS

PARTS = 4


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        opt = self.optimizers()

        def closure() -> torch.Tensor:
            opt.zero_grad()
            whole = torch.zeros((), device=self.device)
            for x, y in zip(*(tensor.chunk(PARTS) for tensor in batch), strict=True):
                part = nn.functional.cross_entropy(self.net(x), y) / PARTS
                self.manual_backward(part)
                whole += part.detach()
            return whole

        loss = opt.step(closure)  # of the first pass
        self.log("train_loss", loss)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> KBFGS:
        return KBFGS(self)


def main(epochs: int = 3) -> list[float]:
    torch.manual_seed(0)
    x = torch.randn(2048, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=256, shuffle=True, drop_last=True)
    model = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(model, loader)
    return model.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
