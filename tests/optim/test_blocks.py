"""Factors in blocks: how sides are cut, and that a step is the one of dense matrices."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext import KBFGS, KBFGSL, DirectionRule, FactorRule, presets
from kbfgs_ext.optim.blocks import cut
from tests.helpers.block_oracle import BlockLayer, step
from tests.optim.models import DEFAULTS, assert_same, closure_of, four_calls, mlp, rows, snapshot

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])
STEPS = 12
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
# The paper's: what these tests expect rests on it.
PLAIN = {
    "damping": 0.3, "momentum": 0.9, "stat_decay": 0.9, "pair_decay": 0.9, "powell": 0.2,
    "safeguard": False, "direction": "newton", "pair_every": 1,
    "factors": FactorRule(restart_after=None, relative_damping=False),
}  # fmt: skip

# The polar direction.
DEFAULT = {
    "lr": 0.07, "damping_a": 1.0, "damping_g": 0.3, "direction": "spectral", "pair_every": 3,
    "safeguard": True, "factors": FactorRule(),
}  # fmt: skip

# n_a, n_g: layer 0 is 6, 20 and layer 2 is 21, 20 and layer 4 is 21, 3.
SIZES = (5, 20, 20, 3)


def build(method, block_size: int | None = 10, **options):
    torch.manual_seed(0)
    model = mlp(*SIZES)
    opt = method(model, block_size=block_size, **options)
    return model, opt, closure_of(model, opt, rows(12, 5), rows(12, 3, seed=1))


def test_sides_are_cut_into_few_blocks_of_nearly_equal_size():
    for units, unit, beside, size in itertools.product(
        range(1, 30), (1, 3, 9), (0, 1), (1, 2, 5, 10, None)
    ):
        d_in, n = units * unit, units * unit + beside
        blocks = cut(n, size, unit, beside)
        assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
        assert blocks[-1].stop == n and blocks[-1].start < d_in
        assert all(b.start % unit == 0 and b.start < b.stop for b in blocks)
        sizes = [b.stop - b.start for b in blocks]
        if size is None:
            assert len(blocks) == 1
        elif size >= 2 and unit == 1:
            assert max(sizes) <= size and len(blocks) == -(-n // size)
            assert max(sizes) - min(sizes) <= 1
        elif len(blocks) < units:
            assert max(sizes) <= size


# ------------------------------------------------------------------ the mathematics


class Halves(nn.Module):
    """tanh of one half of a hidden layer times the other: one layer of 8, or two of 4."""

    def __init__(self, *hidden: nn.Module) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(hidden)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        h = torch.cat([layer(x) for layer in self.hidden], -1)
        return self.head(torch.tanh(h[..., :4]) * h[..., 4:])


@DEFAULTS
@ACTIONS
@BACKENDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_half_a_side_of_outputs_is_two_layers_that_share_an_input(
    method, action, backend, bias, relative
):
    torch.manual_seed(0)
    d_in = 4 - bias  # n_a is 4
    one = Halves(nn.Linear(d_in, 8, bias)).double()
    two = Halves(nn.Linear(d_in, 4, bias), nn.Linear(d_in, 4, bias)).double()
    two.head.load_state_dict(one.head.state_dict())
    (whole,), halves = one.hidden, two.hidden
    for half, rows_ in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
        for name, p in half.named_parameters():
            p.data.copy_(getattr(whole, name)[rows_])
    options = {**PLAIN, "hessian_action": action, "backend": backend}
    options["factors"] = replace(PLAIN["factors"], relative_damping=relative)
    opt = method(one, lr=0.1, block_size=4, **options)
    other = method(two, lr=0.1, block_size=None, **options)
    assert not opt.layers[0].whole and opt.layers[1].whole
    x, target = rows(12, d_in), rows(12, 3, seed=1)
    closure, again = closure_of(one, opt, x, target), closure_of(two, other, x, target)
    for _ in range(STEPS):
        assert opt.step(closure).item() == pytest.approx(other.step(again).item(), rel=1e-10)
    layer, left, right, head = opt.layers[0], *other.layers
    torch.testing.assert_close(layer["M"], torch.cat([left["M"], right["M"]]), **TIGHT)
    for half, factor in zip((left, right), layer.gradients, strict=True):
        for name, tensor in factor.kept.items():
            torch.testing.assert_close(tensor, half[name], **TIGHT)
        for name, tensor in layer.activations[0].kept.items():
            torch.testing.assert_close(tensor, half[name], **TIGHT)
        assert int(factor["counts_g"][0]) > 0
    for name, tensor in opt.layers[1].kept.items():
        torch.testing.assert_close(tensor, head[name], **TIGHT)


@ACTIONS
@DEFAULTS
@BACKENDS
@pytest.mark.parametrize("bias", [True, False])
def test_half_a_side_of_inputs_is_two_layers_that_share_an_output(method, action, backend, bias):
    """As far as the activation side goes: without second passes H_g stays I. With them the two
    layers would each have a pair of their own, and the one layer has one."""
    torch.manual_seed(0)
    d_in = 8 - bias
    one = nn.Linear(d_in, 3, bias).double()
    left, right = nn.Linear(4, 3, False).double(), nn.Linear(d_in - 4, 3, bias).double()
    left.weight.data.copy_(one.weight[:, :4])
    right.weight.data.copy_(one.weight[:, 4:])
    if bias:
        right.bias.data.copy_(one.bias)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = left, right

        def forward(self, x):
            return self.left(x[:, :4]) + self.right(x[:, 4:])

    two = Sum()
    options = {**PLAIN, "lr": 0.1, "hessian_action": action, "backend": backend, "pair_every": 99}
    opt, other = method(one, block_size=4, **options), method(two, block_size=None, **options)
    assert [f.n for f in opt.layers[0].activations] == [4, 4]
    x, target = rows(12, d_in), rows(12, 3, seed=1)
    closure, again = closure_of(one, opt, x, target), closure_of(two, other, x, target)
    for _ in range(STEPS):
        losses = []
        for optimizer, passes in ((opt, closure), (other, again)):
            with optimizer.first_pass():
                losses.append(passes())
            optimizer.descend(losses[-1])  # and no second pass, also where one is due
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    for factor, half in zip(opt.layers[0].activations, other.layers, strict=True):
        for name, tensor in factor.kept.items():
            torch.testing.assert_close(tensor, half[name], **TIGHT)
        assert int(factor["counts_a"][0]) >= STEPS - 1
    assert int(opt.diagnostics()["Linear"]["accepted"]) == 0


@DEFAULTS
@ACTIONS
@BACKENDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block_size", [5, 10])
def test_steps_are_those_of_dense_block_diagonal_factors(method, action, backend, bias, block_size):
    torch.manual_seed(0)
    model = mlp(*SIZES, bias=bias)
    memory = {"memory": 4} if method is KBFGSL else {}
    opt = method(
        model, lr=0.2, block_size=block_size, hessian_action=action, backend=backend, **memory,
        **PLAIN,
    )  # fmt: skip
    copy = mlp(*SIZES, bias=bias)
    copy.load_state_dict(model.state_dict())
    own = {
        "lam_a": 0.3**0.5, "lam_g": 0.3**0.5, "pair_decay": 0.9, "powell": 0.2,
        "keep_A": action == "ema", "memory": memory.get("memory"),
    }  # fmt: skip
    linears = [module for module in copy if isinstance(module, nn.Linear)]
    dense = [
        BlockLayer(linear, [f.n for f in layer.gradients], [f.n for f in layer.activations], own)
        for linear, layer in zip(linears, opt.layers, strict=True)
    ]
    assert len(dense[1].g) > 1 and len(dense[1].a) > 1
    x, target = rows(12, 5), rows(12, 3, seed=1)
    closure = closure_of(model, opt, x, target)

    def run():
        seen, h = [], x
        for module in copy:
            inputs, h = h, module(h)
            if isinstance(module, nn.Linear):
                h.retain_grad()
                seen.append((inputs, h))
        loss = (h - target).square().sum() / (2 * len(x))
        loss.backward()
        return loss, seen

    for _ in range(STEPS):
        loss = opt.step(closure).item()
        assert loss == pytest.approx(step(dense, run, 0.2, 0.9, 0.9), rel=1e-10)
    for one, layer in zip(dense, opt.layers, strict=True):
        torch.testing.assert_close(layer["M"], one.M, **TIGHT)
        for factor, H, counts in zip(layer.activations, one.H_a, one.counts_a, strict=True):
            torch.testing.assert_close(factor["H_a"], H, **TIGHT)
            assert factor["counts_a"].tolist()[:2] == counts
        for factor, H, counts in zip(layer.gradients, one.H_g, one.counts_g, strict=True):
            assert factor["counts_g"].tolist() == counts
            if method is KBFGS:
                torch.testing.assert_close(factor["H_g"], H, **TIGHT)
    assert sum(c[2] + c[3] for one in dense for c in one.counts_g) > 0  # both dampings' business


@DEFAULTS
@ACTIONS
def test_kernels_and_reference_agree_on_every_option(method, action):
    """With all that a step can be made of beside the paper's."""
    options = [
        DEFAULT,
        presets.TUNED,
        {
            "direction": DirectionRule("newton", step_length="balanced"),
            "factors": FactorRule(restart_after=1),
            "pair_every": 2,
        },
        {
            "factors": replace(PLAIN["factors"], update_every=3, initial_scale=3.0),
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        },
    ]
    for option in options:
        runs = []
        for backend in ("reference", "auto"):
            model, opt, closure = build(
                method, 8, **{**PLAIN, **option, "hessian_action": action, "backend": backend}
            )
            for _ in range(6):
                opt.step(closure)
            runs.append(snapshot(model, opt))
        for name, tensor in runs[0].items():
            torch.testing.assert_close(tensor, runs[1][name], rtol=1e-7, atol=1e-9)


@DEFAULTS
@ACTIONS
def test_a_block_as_large_as_all_sides_changes_nothing(method, action):
    a, opt, closure = build(method, 21, hessian_action=action)
    b, whole, again = build(method, None, hessian_action=action)
    for _ in range(5):
        opt.step(closure)
        whole.step(again)
    assert_same(snapshot(a, opt), snapshot(b, whole))


@DEFAULTS
@ACTIONS
@BACKENDS
def test_no_host_read(method, action, backend):
    with FakeTensorMode():
        _, opt, closure = build(method, hessian_action=action, backend=backend)
        for _ in range(3):
            opt.step(closure)


def test_four_calls_are_a_step():
    a, opt, closure = build(KBFGS)
    b, other, again = build(KBFGS)
    for _ in range(4):
        opt.step(closure)
        four_calls(other, again)
    assert_same(snapshot(a, opt), snapshot(b, other))
