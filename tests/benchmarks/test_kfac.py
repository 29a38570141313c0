"""The K-FAC baseline against dense algebra and against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import kfac
from benchmarks.baselines.kfac import KFAC
from benchmarks.models import Loss, cross_entropy, half_squared_error
from tests.helpers.compare import assert_equal_to

# The target of which S is the gradient, of a sample's loss.
TARGETS = {
    cross_entropy: lambda outputs, S: outputs.sigmoid() - S,
    half_squared_error: lambda outputs, S: outputs - S,
    F.cross_entropy: lambda outputs, S: outputs.softmax(1) - S,
    F.mse_loss: lambda outputs, S: outputs - S * outputs.shape[1] / 2,
}
LOSSES = pytest.mark.parametrize("loss", [cross_entropy, half_squared_error])
WEIGHT_DECAY = 0.1


def step(model: nn.Module, opt: KFAC, loss: Loss, x: Tensor, target: Tensor) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        value = loss(model(x), target)
        value.backward()
        return value

    opt.step(closure)


@LOSSES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_step_is_the_dense_kronecker_solve(loss: Loss, bias: bool) -> None:
    """vec(P) = inv((G + lam*I) (x) (A + lam*I)) vec(M), rows first."""
    torch.manual_seed(0)
    m, d_in, d_out = 12, 5, 3
    model = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    x, target = torch.rand(m, d_in).double(), torch.rand(m, d_out).double()
    opt = KFAC(model, loss, lr=0.7, damping=0.04, momentum=0.9, weight_decay=WEIGHT_DECAY)
    before = [p.detach().clone() for p in model.parameters()]
    value = loss(model(x), target)
    gradients = torch.autograd.grad(value, list(model.parameters()))

    torch.manual_seed(1)
    step(model, opt, loss, x, target)

    torch.manual_seed(1)
    with torch.no_grad():
        outputs = nn.functional.linear(x, *before)
        S = kfac.SAMPLED[loss](outputs)
    X = torch.cat([x, torch.ones(m, 1).double()], 1) if bias else x
    lam = math.sqrt(0.04)
    A, G = (R.T @ R / m + lam * torch.eye(R.shape[1]).double() for R in (X, S))
    columns = (g + WEIGHT_DECAY * b for g, b in zip(gradients, before, strict=True))
    M = 0.1 * torch.cat([c if c.ndim == 2 else c[:, None] for c in columns], 1)
    P = torch.linalg.solve(torch.kron(G, A), M.flatten()).view_as(M)
    after = torch.cat([b if b.ndim == 2 else b[:, None] for b in before], 1) - 0.7 * P
    for parameter, part in zip(model.parameters(), after.split(d_in, 1), strict=True):
        assert_equal_to(parameter.detach(), part.reshape(parameter.shape), P.numel(), 1 / lam**2)


@pytest.mark.parametrize("loss", TARGETS)
def test_sampled_gradients_are_those_of_drawn_targets(loss: Loss) -> None:
    """At every layer, per sample: what autograd says for the loss summed over the samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.rand(8, 4).double()
    outputs = model(x)
    torch.manual_seed(1)
    target = TARGETS[loss](outputs.detach(), kfac.SAMPLED[loss](outputs.detach()))
    if loss in (cross_entropy, F.cross_entropy):
        assert set(target.round(decimals=9).abs().flatten().tolist()) == {0.0, 1.0}
    if loss is F.cross_entropy:
        assert_equal_to(target.sum(1), torch.ones(len(x)).double(), 3, 1.0)
    opt = KFAC(model, loss)
    hidden = model[0](x)
    (expected,) = torch.autograd.grad(len(x) * loss(model[2](model[1](hidden)), target), hidden)
    torch.manual_seed(1)
    opt.warm_start([x])
    assert_equal_to(opt.layers[0].G, expected.T @ expected / len(x), len(x), 1.0)


def test_warm_start_averages_and_steps_decay() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    batches = [torch.rand(6, 4).double() for _ in range(4)]
    opt = KFAC(model, half_squared_error)
    second_moments = []
    for x in batches:
        X = torch.cat([x, torch.ones(6, 1).double()], 1)
        second_moments.append(X.T @ X / 6)
    opt.warm_start(batches[:3])
    average = sum(second_moments[:3]) / 3
    assert_equal_to(opt.layers[0].A, average, 6, 1.0)
    step(model, opt, half_squared_error, batches[3], batches[3][:, :2])
    expected = 0.9 * average + 0.1 * second_moments[3]
    assert_equal_to(opt.layers[0].A, expected, 6, 1.0)


def test_inverses_are_made_in_the_first_steps_and_then_seldom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 2)
    opt = KFAC(model, half_squared_error, inverse_every=4)
    made: list[int] = []
    monkeypatch.setattr(kfac.Layer, "invert", lambda layer, lam: made.append(opt.steps))
    opt.layers[0].inv_A, opt.layers[0].inv_G = torch.eye(4), torch.eye(2)
    x = torch.rand(5, 3)
    for _ in range(10):
        step(model, opt, half_squared_error, x, x[:, :2])
    assert made == [0, 1, 2, 3, 4, 8]


def test_draws_have_the_models_moments() -> None:
    """E S = 0, E S^2 = p(1-p) or 1 or 2, to five standard errors."""
    torch.manual_seed(0)
    n = 40_000
    for value, (sample, variance) in itertools.product(
        (-1.5, 0.0, 2.0),
        [
            (kfac.bernoulli, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
            (kfac.gaussian, torch.ones_like),
            (lambda z: kfac.scaled_gaussian(z[:, None])[:, 0], lambda z: 2 * torch.ones_like(z)),
            (
                lambda z: kfac.categorical(torch.stack((z, 0 * z), 1))[:, 0],
                lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
            ),
        ],
    ):
        z = torch.full((n,), value)
        S, var = sample(z), variance(z[0])
        assert abs(S.mean()) < 5 * (var / n).sqrt()
        assert S.var() == pytest.approx(float(var), rel=5 * math.sqrt(2 / n) + 0.05)


def test_a_diverged_network_is_not_an_error() -> None:
    drawn = kfac.bernoulli(torch.tensor([[float("nan"), 0.0]]))
    assert torch.isnan(drawn[0, 0])
    assert abs(drawn[0, 1]) == 0.5
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    assert torch.isnan(kfac.damped_inverse(indefinite, 0.1)).all()
    torch.testing.assert_close(
        kfac.damped_inverse(indefinite, 2.0), torch.diag(torch.tensor([1 / 3, 1.0]))
    )


def test_models_with_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="linear layers alone"):
        KFAC(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), half_squared_error)
