"""timm: a vision transformer with timm's loss, optimizer factory and schedule; norms go to AdamW.

python examples/with_timm.py
"""

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler

from kbfgs_ext import KBFGS

default_registry.register(OptimInfo(name="kbfgs", opt_class=KBFGS, has_eps=False))


def main(steps: int = 12) -> list[float]:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=4, **size)
    images = torch.randn(128, 3, 16, 16)
    labels = torch.arange(128) % 4
    images[range(128), labels % 3, :, :8] += labels.view(-1, 1, 1) - 1.0
    loss_fn = LabelSmoothingCrossEntropy(0.1)

    opt = create_optimizer_v2(
        model,
        "kbfgs",
        param_group_fn=lambda model: model,  # the factory makes a list of parameters otherwise
        fallback=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    )
    schedule = CosineLRScheduler(opt, t_initial=steps, lr_min=1e-3, t_in_epochs=False)
    losses = []
    for step in range(steps):

        def closure() -> torch.Tensor:
            opt.zero_grad()
            loss = loss_fn(model(images), labels)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
        schedule.step_update(step + 1)
    print(opt.coverage())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
