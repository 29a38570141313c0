"""Two runs that must be one, and what a step must be by definition: for tests of training loops."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers import oracles
from tests.optim.models import closure_of, snapshot

TIGHT = dict(rtol=1e-10, atol=1e-10)
Work = Callable[[nn.Module], torch.Tensor]  # forward and backward; returns the loss


def backward_of(loss_of: Work) -> Work:
    """Forward and one backward."""

    def work(model: nn.Module) -> torch.Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    return work


def train(model: nn.Module, opt: torch.optim.Optimizer, work: Work, steps: int = 4) -> list[float]:
    """Steps whose closure zeroes the gradients and works; their losses."""

    def closure() -> torch.Tensor:
        opt.zero_grad()
        return work(model)

    return [opt.step(closure).item() for _ in range(steps)]


def everything(model: nn.Module, opt) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change: parameters, buffers, state, fallback, counters."""
    state = opt.steps.fallback.optimizer.state if opt.steps.fallback else {}
    moments = {
        f"fallback {i} {key}": torch.as_tensor(value).clone()
        for i, entry in enumerate(state.values())
        for key, value in entry.items()
    }
    return {
        **snapshot(model, opt),
        **{f"buffer {name}": b.clone() for name, b in model.named_buffers()},
        **{f"counter {name}": value for name, value in opt.counters().items()},
        **moments,
        "wanted": torch.tensor([p.requires_grad for p in model.parameters()]),
        "iteration": torch.tensor(opt.steps.number),
    }


def assert_one_run(a: tuple, b: tuple) -> None:
    """Two pairs of model and optimizer are in the same state, to 1e-10."""
    one, other = everything(*a), everything(*b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


# What nobody keeps a copy of: the factors, the averages of pairs and scales, and what counts them.
LEARNED = ("A", "H_a", "H_g", "s", "y", "S", "Y", "rho", "pushed", "ss", "yy", "v", "lam_a")
LEARNED += tuple(f"{name}_{side}" for name in ("counts", "marks") for side in "ag")
# What a judgement moves.
JUDGED = ("counter scale", "counter undone", "counter restarts")


def assert_as_before(
    before: dict[str, torch.Tensor], model: nn.Module, opt, learned: tuple = (), judged: tuple = ()
) -> None:
    """Everything is as it was: momentum to rounding, all else to the bit. (Without momentum M has
    no say in the next step.)"""
    after = everything(model, opt)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if name.endswith(" M"):
            if opt.param_groups[0]["momentum"]:
                torch.testing.assert_close(after[name], value, **TIGHT, msg=name)
        elif not name.endswith(tuple(f" {x}" for x in learned)) and name not in judged:
            assert torch.equal(value, after[name]), name


def assert_trains_as(model: nn.Module, work: Work, plainly: Work, make, steps: int = 4) -> None:
    """Training with ``work`` is training with ``plainly``: the same model, optimizer and value."""
    twin = copy.deepcopy(model)
    opt, other = make(model), make(twin)
    losses, wanted = train(model, opt, work, steps), train(twin, other, plainly, steps)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-6, atol=1e-9)
    assert_one_run((model, opt), (twin, other))
    assert losses[-1] != losses[0]


# ---------------------------------------------------------------------- by definition


def gradients_of(model: nn.Module, work: Work) -> dict[str, torch.Tensor]:
    """The gradients of ``work`` on a copy of the model: of its parameters, and of a bias for every
    layer, zero where the layer has none."""
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.grad = None
    stand_ins: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        if type(module) is nn.Linear and module.bias is None:
            zero = module.weight.detach().new_zeros(module.out_features)
            module.bias = stand_ins.setdefault(id(module.weight), nn.Parameter(zero))
        elif type(module) is nn.Linear:
            module.bias.requires_grad_(True)
    work(twin)
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def assert_g_bar_is_the_bias_gradient(model: nn.Module, opt, work: Work, steps: int = 3) -> None:
    """In both passes, for every layer; 0 for one whose bias the loss does not depend on."""

    def compare(name: str) -> None:
        for layer in opt.layers:
            expected = wanted.get(f"{layer.name}.bias", torch.zeros_like(layer[name]))
            torch.testing.assert_close(layer[name], expected.to(layer[name].dtype), **TIGHT)

    for _ in range(steps):
        wanted = gradients_of(model, work)
        with opt.first_pass():
            opt.zero_grad()
            loss = work(model)
        opt.descend(loss)
        compare("g_bar")
        wanted = gradients_of(model, work)
        with opt.second_pass():
            opt.zero_grad()
            again = work(model)
        compare("g_bar_next")
        opt.finish(again)


def step_of(layer, X: torch.Tensor, lr: float, lam_a: float, D: torch.Tensor) -> torch.Tensor:
    """lr*H_g M H_a in float64 of a layer that is about to step, from its kept tensors; D is its
    gradient, weight decay and all, n_g x n_a."""
    kept, n_g = {name: t.double().clone() for name, t in layer.kept.items()}, layer.n_g
    H_a = kept["H_a"]
    if not layer.started:
        ones = oracles.with_ones(X) if layer.n_a > X.shape[1] else X
        eye = torch.eye(layer.n_a, dtype=torch.float64)
        H_a = torch.linalg.inv(ones.T @ ones / len(X) + lam_a * eye).contiguous()
    if "H_g" in kept:
        H_g = kept["H_g"]
    else:
        pushed = int(layer.kept["pushed"])
        H_g = oracles.lbfgs_inverse(list(zip(kept["S"], kept["Y"], strict=True))[:pushed], n_g)
    return lr * oracles.kron_direction(H_g, 0.9 * kept["M"] + 0.1 * D, H_a)


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_one_trajectory(method, model, twin, x, steps=12, **options) -> None:
    """Losses, parameters and all that is kept are the same."""
    options = {"lr": 0.1, **options}
    opt, other = method(model, **options), method(twin, **options)
    assert opt.coverage().share == 1.0
    target = images(len(x), 3, seed=1)
    closure, again = closure_of(model, opt, x, target), closure_of(twin, other, x, target)
    losses = []
    for _ in range(steps):
        losses.append(opt.step(closure).item())
        assert losses[-1] == pytest.approx(other.step(again).item(), rel=1e-10)
    assert losses[-1] < losses[0]
    accepted = []
    for one, two in zip(_groups(opt), _groups(other), strict=True):
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name], **TIGHT)
        accepted += [int(t[0]) for name, t in one.items() if name.startswith("counts_a")]
    assert min(accepted) > 0 or opt.settings.factor_every > 1


def _groups(opt) -> list[dict[str, torch.Tensor]]:
    """Weight and kept tensors of every layer, and of one in groups those of each."""
    found = []
    for layer in opt.layers:
        whole = {"W": layer.W(), "M": layer["M"]}
        stacks = {name: t if layer.groups > 1 else [t] for name, t in layer.kept.items()}
        kept = stacks | {name: layer.by_group(t) for name, t in whole.items()}
        found += [{name: t[i] for name, t in kept.items()} for i in range(layer.groups)]
    return found
