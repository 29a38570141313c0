"""kron_precondition against the Kronecker product written out, and the step around it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbfgs_ext import ops
from tests.helpers import backends, calls, cases, compare, kron_cases
from tests.helpers.oracles import kron_direction, randn, spd


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(max_examples=25, deadline=None)
@given(n_g=st.integers(1, 9), n_a=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_direction_is_the_kronecker_product(backend, n_g, n_a, seed):
    H_g, H_a, M = spd(n_g, 10, seed), spd(n_a, 10, seed + 1), randn(n_g, n_a, seed=seed)
    P, work = torch.full((2, n_g, n_a), float("nan"), dtype=torch.float64)
    ops.kron_precondition_([P], [H_g], [M], [H_a], [work], backend=backend)
    compare.assert_equal_to(P, kron_direction(H_g, M, H_a), n_g + n_a, M.abs().max().item() * 9)
    ops.kron_precondition_([P], [], [M], [H_a], [work], backend=backend)
    compare.assert_equal_to(P, M @ H_a, n_a, M.abs().max().item() * 9)
    ops.kron_precondition_([P], [H_g], [M], [], [work], backend=backend)
    compare.assert_equal_to(P, H_g @ M, n_g, M.abs().max().item() * 9)
    with pytest.raises(ValueError, match="H_g and H_a must not both be empty"):
        ops.kron_precondition_([P], [], [M], [], [work], backend=backend)


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("without", ["", "H_g", "H_a"])
@pytest.mark.parametrize(("g", "a"), [(1, 1), (3, 1), (1, 4), (3, 4), (9, 9)])
def test_tiles_of_block_diagonal_factors(backend, threads, without, g, a):
    """Of two layers that share their scratch: each as by its dense block-diagonal factors."""
    shapes = [(40, 90), (70, 33)]
    args = kron_cases.kron_precondition_grid(shapes, g, a, shared=True)(torch.float64)
    factors = dict(args)
    if without:
        factors[without] = [torch.eye(len(H)).double() for H in args[without]]
        args[without] = []
    each = zip(factors["H_g"], args["M"], factors["H_a"], strict=True)
    wanted = [H_g @ M @ H_a for H_g, M, H_a in each]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ops.kron_precondition_(**args, backend=backend)
    finally:
        torch.set_num_threads(before)
    for got, want in zip(args["P"], wanted, strict=True):
        compare.assert_equal_to(got, want, 160, args["M"][0].abs().max().item() * 100)


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("bias", [True, False])
def test_step_is_its_parts(backend, bias):
    args = cases.kron_step([(17, 5), (3, 33)], bias)(torch.float64)
    wanted = calls.apply(args, torch.clone)
    got = calls.run("kron_step_", args, backend)
    for op in ("momentum_", "kron_precondition_", "descend_"):
        calls.call(op, {name: wanted[name] for name in calls.names(op)}, "reference")
    for name in ("W", "b", "M", "P"):
        for g, w in zip(got[name], wanted[name], strict=True):
            if w.numel():
                compare.assert_equal_to(g, w, 40, w.abs().max().item() + 1)


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("bias", [True, False])
def test_restore_undoes_descend_bit_for_bit(backend, bias):
    args = cases.descend([(17, 5), (33, 64)], bias)(torch.float32)
    W, b, P = args["W"], args["b"], args["P"]
    before = [t.clone() for t in W + b]
    ops.descend_(**args, backend=backend)
    assert not torch.equal(W[0], before[0])
    ops.restore_(W, b, P, torch.tensor(True), backend)
    for got, wanted in zip(W + b, before, strict=True):
        compare.assert_same_bits(got, wanted)


@pytest.mark.parametrize("backend", backends.BOTH)
def test_slope_is_the_derivative_along_the_step(backend):
    """Of a loss whose gradient autograd knows: a central difference along the way that was gone."""
    W, b = randn(5, 4, seed=0).requires_grad_(), randn(5, seed=1).requires_grad_()
    x = randn(7, 4, seed=2)

    def loss(W, b):
        return torch.sin(x @ W.T + b).square().sum()

    loss(W, b).backward()
    saved = torch.cat([W, b[:, None]], dim=1).detach()
    step = randn(5, 5, seed=3) * 1e-5
    slope = torch.full((5,), float("nan"), dtype=torch.float64)
    new = saved + step
    ops.slope_([slope], [new[:, :4].contiguous()], [new[:, 4].contiguous()], [saved], [W.grad],
               [b.grad], backend)  # fmt: skip
    with torch.no_grad():
        ahead, back = (loss((saved + t * step)[:, :4], (saved + t * step)[:, 4]) for t in (1, -1))
    assert slope.sum().item() == pytest.approx(((ahead - back) / 2).item(), rel=1e-6)


def output_change(W, b, saved, a_bar, a_next, backend):
    change = torch.full((len(W),), float("nan"), dtype=saved.dtype)
    ops.output_change_([change], [W], [b], [saved], [a_bar], [a_next], backend)
    return change


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(max_examples=25, deadline=None)
@given(
    n_g=st.integers(1, 9), d_in=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 10_000)
)
def test_output_change_is_the_difference_of_the_outputs(backend, n_g, d_in, bias, seed):
    new, saved = randn(n_g, d_in + bias, seed=seed), randn(n_g, d_in + bias, seed=seed + 1)
    W, b = new[:, :d_in].contiguous(), new[:, d_in:].flatten()
    a_bar, a_next = randn(d_in + bias, seed=seed + 2), randn(d_in + bias, seed=seed + 3)
    change = output_change(W, b, saved, a_bar, a_next, backend)
    compare.assert_equal_to(change, new @ a_next - saved @ a_bar, 3 * d_in + 3, 20.0)
    # The same input twice: the step alone.
    change = output_change(W, b, saved, a_next, a_next, backend)
    compare.assert_equal_to(change, (new - saved) @ a_next, d_in + 1, 20.0)


@pytest.mark.parametrize("backend", backends.BOTH)
def test_output_change_keeps_what_the_difference_of_two_outputs_loses(backend):
    """float32, a millionth of the weights and of the large means changed."""
    n_g, d_in = 50, 300
    saved = randn(n_g, d_in + 1, seed=0).float()
    new = (saved.double() * (1 + 1e-6 * randn(n_g, d_in + 1, seed=1))).float()
    a_bar = (100 + randn(d_in + 1, seed=2)).float()
    a_next = (a_bar.double() * (1 + 1e-6 * randn(d_in + 1, seed=3))).float()
    a_bar[-1] = a_next[-1] = 1
    truth = new.double() @ a_next.double() - saved.double() @ a_bar.double()
    W, b = new[:, :d_in].contiguous(), new[:, d_in].contiguous()
    error = compare.error(output_change(W, b, saved, a_bar, a_next, backend), truth)
    naive = compare.error(new @ a_next - saved @ a_bar, truth)
    assert naive > 0.01 * truth.abs().max().item()
    assert error < 1e-5 * truth.abs().max().item()


@pytest.mark.parametrize("backend", backends.BOTH)
def test_momentum_averages_the_regularised_gradient(backend):
    W, b, dW, db = randn(3, 4, seed=0), randn(3, seed=1), randn(3, 4, seed=2), randn(3, seed=3)
    M = torch.zeros(3, 5, dtype=torch.float64)
    ops.momentum_([M], [dW], [db], [W], [b], 0.75, 0.5, backend=backend)
    wanted = 0.25 * torch.cat([dW + 0.5 * W, (db + 0.5 * b)[:, None]], dim=1)
    compare.assert_equal_to(M, wanted, 3, 4.0)


@backends.needs_native
def test_layers_may_share_the_storage_of_work():
    args = cases.kron_precondition([(17, 5), (3, 9)])(torch.float64)
    alone = calls.run("kron_precondition_", args, "cpu")
    pool = torch.empty(max(w.numel() for w in args["work"]), dtype=torch.float64)
    args["work"] = [pool[: w.numel()].view(w.shape) for w in args["work"]]
    ops.kron_precondition_(**args, backend="cpu")
    for got, wanted in zip(args["P"], alone["P"], strict=True):
        compare.assert_same_bits(got, wanted)


def test_bad_arguments_are_named():
    P, eye = torch.ones(2, 3), torch.eye(3)
    with pytest.raises(ValueError, match=r"H_g\[0\] must have shape \(2, 2\)"):
        ops.kron_precondition_([P], [eye], [P], [eye], [P])
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        ops.momentum_([P], [P], [P], [P], [P], 1.5, 0.0)
    with pytest.raises(ValueError, match=r"W\[0\] must have shape \(2, 2\)"):
        ops.descend_([P], [torch.ones(2)], [P], [torch.tensor(1.0, dtype=torch.float64)])
    none, row = torch.empty(0), torch.ones(3)
    with pytest.raises(ValueError, match=r"a_bar_next\[0\] must have shape \(3,\)"):
        ops.output_change_([torch.ones(2)], [P], [none], [P], [row], [row[:2]])
    with pytest.raises(ValueError, match=r"change\[0\] must be torch.float32 on cpu"):
        ops.output_change_([torch.ones(2).double()], [P], [none], [P], [row], [row])
