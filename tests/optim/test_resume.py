"""A run that is saved and resumed goes on bit for bit, whatever it is made of.

(In a new process: tests/optim/test_step_path.py.)
"""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers

from tests.optim.models import METHODS, absolute, assert_same, four_calls, rows, snapshot

OPTIONS = {
    "plain": {},
    "ema": {"hessian_action": "ema"},
    "autocast": {"autocast": torch.bfloat16},
    "scaler": {"autocast": torch.float16, "scaled": True},
    "micro-batches": {"sizes": [7, 5, 4]},
    "clipping": {"max_grad_norm": 0.1},
    "intervals": {
        "pair_every": 2,
        "factors": absolute(update_every=3),
        "hessian_action": "ema",
    },
    "plain loop": {"plain_loop": True, "pair_every": 2},
    "groups": {"grouped": True},
    "tensors": {"lr": torch.tensor(1.0), "damping": torch.tensor(0.5)},
    "16 bit": {"dtype": torch.bfloat16},
}
SCHEDULES = {
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=20),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
}
EVERY = [(option, "cosine") for option in OPTIONS] + [("plain", name) for name in SCHEDULES]


class Run:
    """A model with dropout, BatchNorm and a fallback, its optimizer, schedule and scaler."""

    def __init__(self, method, schedule, plain_loop=False, autocast=None, scaled=False,
                 sizes=(16,), grouped=False, dtype=torch.float32, lr=1.0, **options):  # fmt: skip
        torch.manual_seed(1)
        self.model = nn.Sequential(
            nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 4)
        ).to(dtype)
        if grouped:
            options["groups"] = [{"params": self.model[4], "lr": 0.1, "damping": 1.0}]
        lr, damping = (
            v.clone() if isinstance(v, torch.Tensor) else v
            for v in (lr, options.pop("damping", 0.3))
        )
        self.opt = method(self.model, lr=lr, damping=damping, fallback=torch.optim.AdamW, **options)
        self.schedule = SCHEDULES[schedule](self.opt)
        self.scaler = torch.amp.GradScaler("cpu", 2.0**14, growth_interval=3, enabled=scaled)
        self.plain_loop, self.autocast, self.sizes, self.dtype = plain_loop, autocast, sizes, dtype

    def __call__(self, steps) -> None:
        for k in steps:
            x, target = rows(16, 6, self.dtype, seed=k), rows(16, 4, self.dtype, seed=100 + k)

            def closure(x=x, target=target):
                self.opt.zero_grad()
                total = torch.zeros(())
                for part, wanted in zip(x.split(self.sizes), target.split(self.sizes), strict=True):
                    with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                        loss = F.mse_loss(self.model(part).float(), wanted.float(), reduction="sum")
                    self.scaler.scale(loss / 64).backward()
                    total += loss.detach() / 64
                return total

            if self.plain_loop:
                loss = four_calls(self.opt, closure)
            else:
                loss = self.opt.step(closure, scaler=self.scaler)
            self.scaler.update()
            plateau = isinstance(self.schedule, schedulers.ReduceLROnPlateau)
            self.schedule.step(loss.item()) if plateau else self.schedule.step()

    def save(self) -> io.BytesIO:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        file = io.BytesIO()
        torch.save({**parts, "rng": torch.get_rng_state()}, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        saved = torch.load(file)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])

    def everything(self) -> dict[str, torch.Tensor]:
        moments = self.opt.steps.fallback.optimizer.state_dict()["state"]
        return {
            **snapshot(self.model, self.opt),
            **{name: b.clone() for name, b in self.model.named_buffers()},
            **self.opt.counters(),
            **{f"{i} {k}": v.clone() for i, s in moments.items() for k, v in s.items()},
            "lr": torch.tensor([float(g["lr"]) for g in self.opt.param_groups]),
            "scale": torch.tensor(self.scaler.get_scale()),
        }


PARTS = ("model", "opt", "schedule", "scaler")


@METHODS
@pytest.mark.parametrize(("option", "schedule"), EVERY, ids=["-".join(e) for e in EVERY])
def test_resume(method, option, schedule):
    at = 3  # between two pairs, where pair_every=2
    through = Run(method, schedule, **OPTIONS[option])
    through(range(at))
    file = through.save()
    through(range(at, at + 4))
    resumed = Run(method, schedule, **OPTIONS[option])
    resumed.load(file)
    resumed(range(at, at + 4))
    assert_same(through.everything(), resumed.everything())
    assert int(through.opt.counters()["steps"]) == at + 4
    assert int(through.opt.counters()["skipped"]) == 0


@METHODS
def test_back_to_before_the_first_step(method):
    run = Run(method, "cosine")
    file = run.save()
    run(range(3))
    first = run.everything()
    run.load(file)
    run(range(3))
    assert_same(first, run.everything())
