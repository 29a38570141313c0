"""16-bit parameters with a 32-bit copy: small steps add up, and the copy goes wherever they go."""

import copy

import pytest
import torch

from kbfgs_ext import KBFGS, Precision
from tests.helpers import compare
from tests.optim.models import METHODS, assert_same, closure_of, mlp, rows, snapshot

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def problem(method=KBFGS, half=torch.bfloat16, **options):
    torch.manual_seed(0)
    model = mlp(6, 9, 4, dtype=half)
    opt = method(model, **options)
    return model, opt, closure_of(model, opt, rows(32, 6, half), rows(32, 4, half, seed=1))


def assert_parameters_are_the_rounding(opt):
    for layer in opt.layers:
        for p, master in layer.copies():
            assert master.dtype == torch.float32
            compare.assert_same_bits(p, master.to(p.dtype), layer.name)


@METHODS
@HALVES
def test_steps_too_small_for_16_bits_add_up(method, half):
    """A step is a fraction of a weight's last bit: rounded every time, nothing moves."""
    lr = 1e-2 * torch.finfo(half).eps
    moved = {}
    for kept in (True, False):
        precision = Precision(master_weights=kept)
        model, opt, closure = problem(method, half, lr=lr, precision=precision, safeguard=False)
        before = [p.detach().clone() for p in model.parameters() if p.dim() == 2]
        for _ in range(200):
            opt.step(closure)
        after = [p.detach() for p in model.parameters() if p.dim() == 2]
        large = [b.abs() > 0.1 for b in before]  # near 0 even these steps are seen
        moved[kept] = sum(
            int((a != b)[one].sum()) for a, b, one in zip(after, before, large, strict=True)
        )
        assert_parameters_are_the_rounding(opt)
        if not kept:
            assert all(not layer.copies() for layer in opt.layers)
    assert moved[False] == 0 < moved[True]


@METHODS
@HALVES
def test_undoing_a_step_restores_parameters_and_copies(method, half):
    model, opt, closure = problem(method, half)
    for _ in range(3):
        opt.step(closure)
    kept = {
        name: v for name, v in snapshot(model, opt).items() if "master" in name or "param" in name
    }
    assert any("master" in name for name in kept)
    undone = int(opt.counters()["undone"])
    opt.param_groups[0]["lr"] = 1e4
    opt.step(closure)
    assert int(opt.counters()["undone"]) == undone + 1
    assert_same(kept, {name: v for name, v in snapshot(model, opt).items() if name in kept})


@METHODS
def test_a_resumed_run_goes_on_bit_for_bit(method):
    model, opt, closure = problem(method)
    for _ in range(3):
        opt.step(closure)
    weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    other, other_opt, other_closure = problem(method)
    other.load_state_dict(weights)
    other_opt.load_state_dict(saved)
    for _ in range(3):
        opt.step(closure)
        other_opt.step(other_closure)
    assert_same(snapshot(model, opt), snapshot(other, other_opt))


def test_a_checkpoint_without_copies_starts_them_from_the_parameters():
    model, opt, closure = problem(precision=Precision(master_weights=False))
    for _ in range(3):
        opt.step(closure)
    other, other_opt, other_closure = problem()
    other.load_state_dict(model.state_dict())
    other_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    other_opt.step(other_closure)
    assert_parameters_are_the_rounding(other_opt)
    before = [p.detach().clone() for p in model.parameters()]
    for p, b in zip(other.parameters(), before, strict=True):
        assert (p - b).abs().max() < 1


def test_parameters_that_someone_else_has_changed_are_taken_over():
    model, opt, closure = problem(lr=1e-6)
    for _ in range(2):
        opt.step(closure)
    with torch.no_grad():
        model[0].weight[0].fill_(0.5)
        model[0].weight.data[1].fill_(0.25)
    kept = opt.layers[0].W()[2:].clone()
    opt.step(closure)
    torch.testing.assert_close(opt.layers[0].W()[0], torch.full((6,), 0.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(opt.layers[0].W()[1], torch.full((6,), 0.25), atol=1e-3, rtol=0)
    torch.testing.assert_close(opt.layers[0].W()[2:], kept, atol=1e-3, rtol=0)
    assert_parameters_are_the_rounding(opt)


def test_the_frozen_half_of_a_layer_stays():
    model, opt, closure = problem()
    model[0].bias.requires_grad_(False)
    before = model[0].bias.detach().clone()
    for _ in range(3):
        opt.step(closure)
    compare.assert_same_bits(model[0].bias.detach(), before)
    assert_parameters_are_the_rounding(opt)


def test_memory_usage_counts_the_copies():
    model, opt, _ = problem()
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert opt.memory_usage()["master_W"] == 4 * weights
    assert "master_W" not in problem(precision=Precision(master_weights=False))[1].memory_usage()
