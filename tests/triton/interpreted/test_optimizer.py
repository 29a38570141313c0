"""A training run on the Triton backend, interpreted, is the run on the reference backend."""

import pytest
import torch
from torch import nn

import kbfgs_ext
from tests.helpers import compare

STEPS = 4


def trained(optimizer, backend, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.ReLU(),
                          nn.Linear(5, 3)).double()  # fmt: skip
    X, target = torch.randn(12, 7).double(), torch.randn(12, 3).double()
    opt = optimizer(model, backend=backend, weight_decay=1e-3, **options)
    opt.warm_start([X])

    def closure():
        opt.zero_grad()
        loss = 0.5 * (model(X) - target).square().sum() / len(X)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(STEPS)]
    return losses, torch.cat([p.detach().reshape(-1) for p in model.parameters()])


NEWTON = kbfgs_ext.DirectionRule("newton", step_length="layer", nesterov=True)


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (kbfgs_ext.KBFGS, {"hessian_action": "ema"}),
        (kbfgs_ext.KBFGS, {"hessian_action": "minibatch"}),
        (kbfgs_ext.KBFGSL, {"hessian_action": "ema", "memory": 3}),
        (kbfgs_ext.KBFGSL, {"hessian_action": "minibatch", "memory": 20}),
        (kbfgs_ext.KBFGS, {"hessian_action": "ema", "block_size": 4, "pair_every": 1}),
        (kbfgs_ext.KBFGS, {"hessian_action": "minibatch", "block_size": 4, "direction": NEWTON}),
        (kbfgs_ext.KBFGSL, {"hessian_action": "minibatch", "block_size": 4, "memory": 3}),
    ],
    ids=[
        "kbfgs-ema", "kbfgs-minibatch", "kbfgsl-ema-wrapped", "kbfgsl-minibatch-compact",
        "kbfgs-ema-blocks", "kbfgs-minibatch-blocks", "kbfgsl-blocks",
    ],
)  # fmt: skip
def test_same_run(optimizer, options, safeguard):
    losses, weights = trained(optimizer, "reference", safeguard=safeguard, **options)
    got_losses, got_weights = trained(optimizer, "triton", safeguard=safeguard, **options)
    terms = 100 * STEPS  # sums of some tens of terms per product, a few products per step
    compare.assert_equal_to(got_weights, weights, terms, weights.abs().max().item(), "weights")
    got, wanted = torch.tensor(got_losses), torch.tensor(losses)
    compare.assert_equal_to(got.double(), wanted.double(), terms, max(losses), "losses")
    assert len(set(losses)) == STEPS  # it moves
