"""Lightning, automatic optimization: nothing but configure_optimizers changes.

python examples/lightning_automatic.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kbfgs_ext import KBFGS


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        # The closure runs twice per step; log the first pass alone. Lightning's wrapper of the
        # optimizer does not follow its attributes, so ask for the optimizer itself.
        if not self.optimizers(use_pl_optimizer=False).second_pass_due:
            self.log("train_loss", loss)
            self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> KBFGS:
        # With strategy="ddp" Lightning wraps the module: the optimizer is told of the processes.
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        return KBFGS(self, process_group=group)


def data() -> DataLoader:
    x = torch.randn(2048, 20)
    y = (x @ torch.randn(20, 3)).argmax(1)
    return DataLoader(TensorDataset(x, y), batch_size=256, shuffle=True, drop_last=True)


def main(epochs: int = 3, **options: object) -> list[float]:
    torch.manual_seed(0)
    model = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **{**quiet, **options})
    trainer.fit(model, data())
    return model.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
