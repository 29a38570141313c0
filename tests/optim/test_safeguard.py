"""The safeguard: what it undoes, how the scale moves, and that it can always recover."""

import itertools
import math

import pytest
import torch

from kbfgs_ext import KBFGS
from kbfgs_ext.optim.safeguard import FINITE, Safeguard, SafeguardRule, resolution
from tests.optim.models import METHODS, closure_of, mlp, rows


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "loss_next", "ok", "undo", "scale"),
    [
        (2.0, 1.0, True, False, 0.55),
        (1.0, 1.0, True, False, 0.55),
        (1.0, 2.0, True, True, 0.25),
        (1.0, math.nan, True, True, 0.25),
        (1.0, math.inf, True, True, 0.25),
        (math.nan, math.nan, False, False, 0.5),
    ],
)
def test_rule(loss, loss_next, ok, undo, scale):
    guard = Safeguard(SafeguardRule(shrink=0.5, grow=1.1), torch.device("cpu"))
    guard.scale.fill_(0.5)
    judged = guard.judge(scalar(loss), scalar(loss_next), None, 0.0, torch.tensor(ok))
    assert bool(judged) is undo
    assert guard.scale.item() == pytest.approx(scale)
    assert int(guard.counters()["undone"]) == int(undo)


@pytest.mark.parametrize("loss", [0.0, 1e-40, -1.0, 1e300])
def test_any_finite_loss_is_kept_along_a_polar_direction(loss):
    """A loss of 0 too, as a hinge has of a minibatch that is all on its side."""
    guard = Safeguard(FINITE, torch.device("cpu"))
    for loss_next in (5.0, math.nan, math.inf, -math.inf):
        judged = guard.judge(scalar(loss), scalar(loss_next), None, 1e-6, torch.tensor(True))
        assert bool(judged) is not math.isfinite(loss_next)


@pytest.mark.parametrize(
    ("loss_next", "slope", "sufficient", "scale"),
    [
        (9.0, -1.9, 0.5, 0.55),  # 1 is more than half of 1.9
        (9.0, -2.1, 0.5, 0.5 / 1.1),
        (9.0, -2.1, 0.4, 0.55),
        (9.0, 3.0, 0.5, 0.55),  # down where the gradient says up
        (10.0, -1.0, 0.5, 0.5 / 1.1),  # kept, for nothing
        (10.1, -1.0, 0.5, 0.25),
        (9.0, math.nan, 0.5, 0.5 / 1.1),
        (math.nan, -1.0, 0.5, 0.25),
    ],
)
def test_sufficient_decrease(loss_next, slope, sufficient, scale):
    guard = Safeguard(SafeguardRule(sufficient=sufficient), torch.device("cpu"))
    guard.scale.fill_(0.5)
    guard.judge(scalar(10.0), scalar(loss_next), scalar(slope), 0.0, torch.tensor(True))
    assert guard.scale.item() == pytest.approx(scale)


def test_a_difference_within_rounding_says_nothing():
    """So a scale that has become tiny grows again: the losses of a float32 network stand still."""
    guard = Safeguard(SafeguardRule(), torch.device("cpu"))
    guard.scale.fill_(1e-4)
    noise = resolution(torch.float32)
    for loss_next in (100.0, 100.0 + 2e-5, 100.0 - 2e-5):
        undo = guard.judge(
            scalar(100.0), scalar(loss_next), scalar(-1e-5), noise, torch.tensor(True)
        )
        assert not undo
    assert guard.scale.item() == pytest.approx(1e-4 * 1.1**3)
    guard.judge(scalar(100.0), scalar(100.0 + 2e-4), scalar(-1e-5), noise, torch.tensor(True))
    guard.judge(scalar(100.0), scalar(100.0), scalar(-1e-3), noise, torch.tensor(True))
    assert guard.scale.item() == pytest.approx(1e-4 * 1.1**3 / 2 / 1.1)


@pytest.mark.parametrize(
    ("dtype", "units"),
    [(torch.float64, 8 * 2**-52), (torch.float32, 8 * 2**-23), (torch.bfloat16, 2**-7)],
)
def test_resolution_of_losses(dtype, units):
    """A 16-bit loss is a 32-bit sum rounded once, not eight times."""
    assert resolution(dtype) == units


class Mixed(torch.nn.Module):
    """Two covered layers, one of them not always reached, and two parameters of the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(9, 6, sparse=True)
        self.inner, self.aside = torch.nn.Linear(6, 7), torch.nn.Linear(6, 4)
        self.norm = torch.nn.LayerNorm(7)

    def forward(self, i: torch.Tensor, aside: bool) -> torch.Tensor:
        x = self.words(i)
        out = self.norm(torch.tanh(self.inner(x))).square().sum(1).mean()
        return out + self.aside(x).square().sum(1).mean() if aside else out


@pytest.mark.parametrize("largest", [None, 1e-3])
@METHODS
def test_slope_is_that_of_the_whole_step(method, largest):
    """Of all parameters that have moved, with the gradients that the loss has, clipped or not."""
    torch.manual_seed(0)
    model = Mixed().double()
    opt = method(model, max_grad_norm=largest, fallback=lambda p: torch.optim.SGD(p, lr=0.1))
    i = torch.arange(40) % 9
    for aside in (True, False, True):  # where it is not reached, nothing of a former step is left
        before = [p.detach().clone() for p in model.parameters()]
        with opt.first_pass():
            opt.zero_grad()
            loss = model(i, aside)
            loss.backward()
        grads = [0.0 if p.grad is None else p.grad.clone().to_dense() for p in model.parameters()]
        opt.descend(loss)
        moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
        wanted = sum((d * g).sum() for d, g in zip(moved, grads, strict=True))
        assert opt.steps.slope.item() == pytest.approx(wanted.item(), rel=1e-9)
        with opt.second_pass():
            loss = model(i, aside)
            loss.backward()
        opt.finish(loss)


@METHODS
def test_steps_stay_off_the_edge(method):
    """A learning rate a little too large: without the slope, steps are kept that bring next to
    nothing, and the loss ends higher."""
    last = {}
    for sufficient in (0.0, 0.5):
        torch.manual_seed(0)
        model = mlp(6, 9, 4)
        x, target = rows(64, 6), rows(64, 4, seed=1)
        opt = method(model, lr=3.0, safeguard=SafeguardRule(sufficient=sufficient))
        closure = closure_of(model, opt, x, target)
        losses = [opt.step(closure).item() for _ in range(200)]
        last[sufficient] = losses[-1], int(opt.counters()["undone"])
    assert last[0.5][0] < last[0.0][0]
    assert last[0.5][1] < last[0.0][1]


def test_scale_is_bounded():
    guard = Safeguard(SafeguardRule(), torch.device("cpu"))
    guard.judge(scalar(2.0), scalar(1.0), None, 0.0, torch.tensor(True))
    assert guard.scale == 1.0
    for _ in range(100):
        guard.judge(scalar(1.0), scalar(2.0), None, 0.0, torch.tensor(True))
    assert guard.scale == SafeguardRule().smallest


def test_standstill_counts_at_the_smallest_scale_alone():
    guard = Safeguard(SafeguardRule(smallest=0.25), torch.device("cpu"), restart_after=2)
    yes, no = torch.tensor(True), torch.tensor(False)
    ordered = []
    for loss_next in (2.0, 2.0, 2.0, 0.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        guard.judge(scalar(1.0), scalar(loss_next), None, 0.0, yes)
        # A void step is neither a standstill nor its end.
        guard.judge(scalar(1.0), scalar(math.nan), None, 0.0, no)
        ordered.append(int(guard.counters()["restarts"]))
    # At 1, 1/2, 1/4; kept; at 0.275; and then two by two at 1/4.
    assert ordered == [0, 0, 0, 0, 0, 0, 1, 1, 2]
    norms, taken = torch.ones(3, dtype=torch.float64), []
    for loss in (math.nan, 1.0, 1.0):  # a void step leaves it
        guard.admit(scalar(loss), norms, True)
        taken.append(bool(guard.order_a))
    assert taken == [False, True, False]


def restarts_of(losses: list[float], **rule) -> list[int]:
    """The restarts ordered after each of the first passes' losses, all their steps kept."""
    guard = Safeguard(SafeguardRule(**rule), torch.device("cpu"), restart_after=10)
    seen = []
    for loss in losses:
        ok = torch.tensor(math.isfinite(loss))
        guard.judge(scalar(loss), scalar(loss - 1e-3), None, 0.0, ok)
        seen.append(int(guard.counters()["restarts"]))
    return seen


def test_surge_of_the_running_mean():
    """The mean of two: 4, 3, 2.5, then 3.75, 6.4 > 2*2.5; anew from there; a void step is none."""
    losses = [4.0, 2.0, 2.0, 5.0, math.nan, 9.0, 9.0, 9.0, 10.0]
    assert restarts_of(losses, window=2) == [0] * 5 + [1] * 4
    assert restarts_of(losses, window=2, surge=math.inf) == [0] * 9


def test_no_surge_without_cause():
    """A loss that falls from 1e3 to 0, scattered by a quarter; and losses that are not positive."""
    random = torch.Generator().manual_seed(0)
    scatter = 1 + 0.25 * torch.randn(2000, generator=random)
    losses = (1e3 * torch.logspace(0, -6, 2000) * scatter).tolist()
    assert restarts_of(losses)[-1] == 0
    assert restarts_of([-1.0] * 100 + [5.0] * 100)[-1] == 0
    assert restarts_of([1.0] * 100 + [5.0] * 100)[-1] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sufficient", 1.0),
        ("sufficient", -0.1),
        ("surge", 1.0),
        ("surge", math.nan),
        ("window", 0),
        ("window", 1.5),
        ("window", math.inf),
        ("rise", -0.1),
        ("rise", math.nan),
    ],
)
def test_rule_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is out of its range: {value}"):
        SafeguardRule(**{name: value})


@METHODS
def test_undone_step_restores_weights_exactly(method):
    torch.manual_seed(0)
    model = mlp(6, 9, 4, dtype=torch.float32)
    opt = method(model, lr=1e6)
    x, target = rows(32, 6, torch.float32), rows(32, 4, torch.float32, seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(closure_of(model, opt, x, target))
    assert int(opt.counters()["undone"]) == 1
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert all(int(d["accepted"]) + int(d["rejected"]) == 1 for d in opt.diagnostics().values())


@METHODS
def test_no_lock(method):
    """A learning rate far too large does not bring training to a standstill."""
    torch.manual_seed(0)
    model = mlp(6, 9, 4)
    x, target = rows(64, 6), rows(64, 4, seed=1)
    opt = method(model, lr=1000.0)
    closure = closure_of(model, opt, x, target)
    losses = [opt.step(closure).item() for _ in range(300)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(b <= a for a, b in itertools.pairwise(losses))  # one batch: never up


def test_off_is_off():
    model = mlp(6, 9, 4)
    opt = KBFGS(model, lr=50.0, safeguard=False)
    x, target = rows(32, 6), rows(32, 4, seed=1)
    for _ in range(5):
        opt.step(closure_of(model, opt, x, target))
    assert int(opt.counters()["undone"]) == 0 and opt.counters()["scale"] == 1.0
