"""Mixed precision: autocast, scaled losses, 16-bit parameters, and the optimizer's own products."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from kbfgs_ext import KBFGS, Precision
from kbfgs_ext.optim.direction import Direction
from tests.helpers import backends
from tests.optim.models import (
    METHODS,
    assert_same,
    assert_same_weights,
    closure_of,
    mlp,
    newton,
    newton_l,
    problem,
    rows,
    snapshot,
)

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def network(method=newton, seed=0, **options):
    """A float32 model with a norm for the fallback, its optimizer, and a batch."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(inplace=True), nn.Linear(16, 4)
    )
    opt = method(model, fallback=lambda ps: torch.optim.AdamW(ps, lr=1e-3), **options)
    return model, opt, rows(32, 6, torch.float32), rows(32, 4, torch.float32, seed=1)


def mixed_closure(model, opt, x, target, half=torch.bfloat16, scaler=None, enabled=True):
    """Forward under autocast; backward of the scaled loss."""

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", half, enabled=enabled):
            loss = F.mse_loss(model(x).float(), target)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


def scaler_of(scale=2.0**12, **options) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


# ---------------------------------------------------------------------- autocast


@METHODS
@ACTIONS
@HALVES
def test_autocast_trains_with_32_bit_factors(method, action, half):
    model, opt, x, target = network(method, hessian_action=action)
    exact_model, exact_opt, _, _ = network(method, hessian_action=action)
    closure = mixed_closure(model, opt, x, target, half)
    exact = mixed_closure(exact_model, exact_opt, x, target, enabled=False)
    losses = [(opt.step(closure).item(), exact_opt.step(exact).item()) for _ in range(30)]
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=0.1)
    for layer in opt.layers:
        for name, tensor in {**layer.kept, **layer.scratch}.items():
            assert tensor.dtype in (torch.float32, torch.int64), name
        assert int(layer["counts_g"][0]) > 0


@METHODS
@ACTIONS
def test_autocast_around_the_whole_step_is_autocast_inside(method, action):
    """The optimizer's own products stay 32-bit, and stale 16-bit copies of weights are dropped."""
    inside_model, inside, x, target = network(method, hessian_action=action)
    around_model, around, _, _ = network(method, hessian_action=action)
    closure = mixed_closure(inside_model, inside, x, target)

    def bare():
        around.zero_grad()
        loss = F.mse_loss(around_model(x).float(), target)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        around.warm_start([x])
    with torch.autocast("cpu", torch.bfloat16):
        inside.warm_start([x])
    for _ in range(3):
        inside.step(closure)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            around.step(bare)
    # mse_loss itself runs in another dtype there, so the weights agree to 16-bit rounding
    for p, q in zip(inside_model.parameters(), around_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------------- scaled losses


@METHODS
@ACTIONS
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clipping", "clipping"])
def test_a_scaled_loss_changes_nothing(method, action, clip):
    """Powers of two are exact: the same bits as without a scaler, clipping included."""
    runs = []
    for scaler in (None, scaler_of(), scaler_of(enabled=False)):
        model, opt, x, target = network(method, hessian_action=action, max_grad_norm=clip)
        closure = mixed_closure(model, opt, x, target, enabled=False, scaler=scaler)
        for _ in range(5):
            opt.step(closure, scaler=scaler)
            if scaler is not None:
                scaler.update()
        runs.append({**snapshot(model, opt), "loss": closure().detach()})
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@METHODS
@ACTIONS
def test_overflow_in_the_first_pass_skips_the_step(method, action):
    """fp16 gradients overflow at 2**24: no factor, weight or fallback moment changes; then it goes
    on at a smaller scale."""
    model, opt, x, target = network(method, hessian_action=action)
    scaler = scaler_of(2.0**24, backoff_factor=2.0**-8)
    closure = mixed_closure(model, opt, x, 100 * target, torch.float16, scaler)
    first = closure().item()
    opt.step(closure, scaler=scaler)  # nothing has started yet
    scaler.update()
    assert scaler.get_scale() == 2.0**16 and int(opt.counters()["skipped"]) == 1
    scaler.update(2.0**10)
    for _ in range(3):
        opt.step(closure, scaler=scaler)
        scaler.update()
    before, moments = snapshot(model, opt), opt.steps.fallback.optimizer.state_dict()["state"]
    moments = {(i, k): v.clone() for i, s in moments.items() for k, v in s.items() if k != "step"}
    scaler.update(2.0**24)
    opt.step(closure, scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 2.0**16 and int(opt.counters()["skipped"]) == 2
    assert_same(before, snapshot(model, opt))
    after = opt.steps.fallback.optimizer.state_dict()["state"]
    for (i, k), v in moments.items():
        assert torch.equal(v, after[i][k])
    scaler.update(2.0**10)
    for _ in range(20):
        last = opt.step(closure, scaler=scaler).item()
        scaler.update()
    assert math.isfinite(last) and last < first


@METHODS
def test_overflow_in_the_second_pass_alone_makes_no_pair(method):
    model, opt, x, target = network(method)
    scaler = scaler_of()
    good = mixed_closure(model, opt, x, target, torch.float16, scaler)
    for _ in range(3):
        opt.step(good, scaler=scaler)
        scaler.update()
    before = snapshot(model, opt)
    calls = []

    def second_overflows():
        calls.append(1)
        if len(calls) == 1:
            return good()
        loss = F.mse_loss(model(x), target)
        (scaler.scale(loss) * math.inf).backward()
        return loss

    opt.step(second_overflows, scaler=scaler)
    scaler.update()
    unpaired = (" H_g", " s", " y", " S", " Y", " rho", " pushed", " counts_g")
    changing = [name for name in before if not name.endswith(unpaired)]
    assert_same(before, snapshot(model, opt), but=changing)
    assert not torch.equal(before["param 0.weight"], model[0].weight)
    assert int(opt.counters()["undone"]) == 0


def test_a_step_with_a_scaler_reads_nothing_back():
    """Fake tensors have no value: unscaling, checking and clipping are done without one."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4))
        opt = KBFGS(model, max_grad_norm=1.0)
        x, target = torch.randn(8, 6), torch.randn(8, 4)
        scaler = scaler_of()
        for _ in range(3):
            opt.step(mixed_closure(model, opt, x, target, scaler=scaler), scaler=scaler)
            scaler._per_optimizer_states.clear()  # what update() does besides asking the flag


def test_the_four_calls_take_a_scaler():
    a, opt_a, x, target = network()
    b, opt_b, _, _ = network()
    one, two = scaler_of(), scaler_of()
    passes = mixed_closure(b, opt_b, x, target, scaler=two)
    for _ in range(3):
        opt_a.step(mixed_closure(a, opt_a, x, target, scaler=one), scaler=one)
        one.update()
        with opt_b.first_pass():
            loss = passes()
        opt_b.descend(loss, scaler=two)
        with opt_b.second_pass():
            loss = passes()
        opt_b.finish(loss)
        two.update()
    assert_same_weights(a, b)


def test_scaler_misuse():
    model, opt, x, target = network()
    scaler = scaler_of()
    closure = mixed_closure(model, opt, x, target, scaler=scaler)
    before = snapshot(model, opt)
    for call in (lambda: scaler.step(opt), lambda: scaler.step(opt, closure)):
        closure()
        with pytest.raises(TypeError, match=r"call optimizer.step\(closure, scaler=scaler\)"):
            call()
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler, got float"):
        opt.step(closure, scaler=2.0)
    assert_same(before, snapshot(model, opt))
    scaler = scaler_of()
    opt.step(mixed_closure(model, opt, x, target, scaler=scaler), scaler=scaler)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        opt.step(mixed_closure(model, opt, x, target, scaler=scaler), scaler=scaler)


# ---------------------------------------------------------------------- 16-bit parameters


@METHODS
@HALVES
def test_16_bit_parameters_have_32_bit_factors(method, half):
    torch.manual_seed(0)
    model = mlp(6, 9, 4, dtype=half)
    opt = method(model, lr=0.3)
    closure = closure_of(model, opt, rows(32, 6, half), rows(32, 4, half, seed=1))
    first = opt.step(closure).item()
    for _ in range(20):
        last = opt.step(closure).item()
    assert last < 0.85 * first
    for layer in opt.layers:
        assert layer.weight.dtype == half
        assert {t.dtype for t in layer.kept.values()} == {torch.float32, torch.int64}
    before = snapshot(model, opt)
    opt.param_groups[0]["lr"] = 1e4
    opt.step(closure)
    assert int(opt.counters()["undone"]) >= 1
    assert_same({k: v for k, v in before.items() if k.startswith("param")}, snapshot(model, opt))


# ---------------------------------------------------------------------- on the kernels


@backends.needs_native
@METHODS
@ACTIONS
@HALVES
@pytest.mark.parametrize("how", ["autocast", "parameters", "one layer's parameters"])
def test_no_op_of_a_16_bit_step_is_on_the_reference(method, action, half, how):
    torch.manual_seed(0)
    model = mlp(6, 9, 7, 4, dtype=torch.float32)
    if how == "parameters":
        model = model.to(half)
    elif how != "autocast":
        next(m for m in model if isinstance(m, nn.Linear)).to(half)
    x, target = rows(32, 6, torch.float32), rows(32, 4, torch.float32, seed=1)
    opt = method(model, hessian_action=action, weight_decay=1e-3)

    def closure():
        opt.zero_grad()
        h = x
        with torch.autocast("cpu", half, enabled=how == "autocast"):
            for module in model:
                weight = getattr(module, "weight", None)
                h = module(h if weight is None else h.to(weight.dtype))
        loss = F.mse_loss(h.float(), target)
        loss.backward()
        return loss

    taken = set()
    for _ in range(3):  # the first one starts the factors
        opt.step(closure)
        report = opt.explain()
        assert "on the reference: none" in report.splitlines()[0], report
        assert "bfloat16" not in report and "float16" not in report
        taken |= {line.split("/")[1].split(":")[0] for line in report.splitlines()[1:]}
    assert taken >= {
        "curvature_update_",
        "descend_" if method is newton_l else "kron_step_",
        "slope_",
    }
    assert "factor_ema_" in taken and "output_change_" in taken and "restart_" in taken


# ---------------------------------------------------------------------- own products


@pytest.mark.parametrize("chosen", [None, "highest", "high", "medium"])
def test_matmul_precision_is_set_for_own_products_alone(chosen, monkeypatch):
    seen = {"own": set(), "model": set()}
    aim = Direction.aim

    def watched(*args):
        seen["own"].add(torch.get_float32_matmul_precision())
        return aim(*args)

    monkeypatch.setattr(Direction, "aim", watched)
    model, opt, closure = problem(precision=Precision(matmul=chosen))
    model.register_forward_hook(
        lambda *_: seen["model"].add(torch.get_float32_matmul_precision()) and None
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        opt.step(closure)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {"own": {chosen or "high"}, "model": {"high"}}


def test_matmul_precision_of_another_name():
    with pytest.raises(ValueError, match="matmul must be None or one of.*got 'tf32'"):
        Precision(matmul="tf32")


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_matmul_precision_beside_torchs_newer_settings(chosen):
    """They may contradict the old one, which then cannot be read: they stay as they were."""
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place, setting in zip(places, ("tf32", "bf16"), strict=True):
            place.fp32_precision = setting
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
        _, opt, closure = problem(precision=Precision(matmul=chosen))
        assert opt.step(closure).isfinite()
        assert [place.fp32_precision for place in places] == ["tf32", "bf16"]
    finally:
        torch.set_float32_matmul_precision("highest")
        for place, setting in zip(places, before, strict=True):
            place.fp32_precision = setting
