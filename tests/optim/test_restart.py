"""Factors that reject pair after pair, or go nowhere, start again; and H stays symmetric."""

import copy
import io
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext import FactorRule
from kbfgs_ext.optim.checkpoint import FORMAT
from kbfgs_ext.optim.parts import Part
from kbfgs_ext.optim.safeguard import SafeguardRule
from kbfgs_ext.optim.updates import restart
from tests.optim.models import (
    METHODS,
    absolute,
    assert_same,
    mlp,
    newton_l,
    problem,
    rows,
    snapshot,
)

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


def started(method, **options):
    """A problem after three steps, and its first layer."""
    _, opt, closure = problem(method, factors=absolute(restart_after=3), **options)
    for _ in range(3):
        opt.step(closure)
    return opt, opt.layers[0]


def restart_side(opt, layer, side, X=()) -> None:
    part = Part(opt.steps.parts.groups[0], [layer], opt.settings)
    part.scalars.lam_a.fill_(0.5)
    restart(part, {side: None}, X)


def restarts(opt) -> tuple[int, int]:
    report = opt.diagnostics()["0"]
    return int(report["restarts"]), int(report["restarts_a"])


@METHODS
@ACTIONS
def test_restarts_after_so_many_rejections_in_a_row(method, action):
    """Two rejected, one accepted, three rejected: the third of those restarts, once."""
    opt, layer = started(method, hessian_action=action)
    X = [] if action == "ema" else [torch.ones(4, 5, dtype=torch.float64)]
    due = [(1, 0), (1, 0), (0, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 1), (1, 2)]
    for rejected, restarted in due:
        for side in "ag":
            layer["counts_" + side][rejected] += 1
        before = {name: t.clone() for name, t in layer.kept.items()}
        already = restarts(opt)[0]
        restart_side(opt, layer, "a", X)
        restart_side(opt, layer, "g")
        assert restarts(opt) == (restarted, restarted)
        if restarted == already:
            assert all(torch.equal(before[n], t) for n, t in layer.kept.items() if n[0] in "HSYrp")
    trace = layer["A"].trace() if action == "ema" else 6.0
    torch.testing.assert_close(layer["H_a"], torch.eye(6, dtype=torch.float64) / (0.5 + trace))
    if layer.has("H_g"):
        assert torch.equal(layer["H_g"], torch.eye(7, dtype=torch.float64))
    else:
        assert layer["pushed"] == 0


@METHODS
@ACTIONS
def test_in_a_step(method, action):
    """A factor gone wrong (zero) rejects, restarts, and learns again."""
    _, opt, closure = problem(method, factors=absolute(restart_after=2), hessian_action=action)
    opt.step(closure)
    layer = opt.layers[0]
    layer["H_a"].zero_()
    for _ in range(4):
        opt.step(closure)
    counts = opt.diagnostics()["0"]
    assert int(counts["restarts_a"]) == 1 and int(counts["rejected_a"]) == 2
    assert int(counts["accepted_a"]) == 3
    assert torch.linalg.eigvalsh(layer["H_a"]).min() > 0


@METHODS
@ACTIONS
def test_without_rejections_nothing_changes(method, action):
    a, opt, closure = problem(method, factors=absolute(restart_after=1), hessian_action=action)
    b, plain, again = problem(method, factors=absolute(restart_after=None), hessian_action=action)
    for _ in range(8):
        opt.step(closure)
        plain.step(again)
    assert restarts(opt) == (0, 0) and "restarts" not in plain.diagnostics()["0"]
    assert_same(snapshot(b, plain), snapshot(a, opt))


def test_an_indefinite_factor_is_refused_and_restarts():
    """H_g = -I climbs; y'Hy < 0 shows it, and training goes on from the restart."""
    _, opt, closure = problem(factors=absolute(restart_after=3))
    opt.step(closure)
    for layer in opt.layers:
        layer["H_g"].neg_()
    stuck = [opt.step(closure).item() for _ in range(4)]
    assert len(set(stuck)) == 1
    for counts in opt.diagnostics().values():
        assert int(counts["restarts"]) == 1 and int(counts["rejected"]) == 3
    freed = [opt.step(closure).item() for _ in range(30)]
    assert freed[-1] < 0.9 * stuck[0]
    assert int(opt.counters()["restarts"]) == 0  # no need of the safeguard's


def test_an_indefinite_ring_restarts_when_no_step_is_kept():
    """Its gate has no H y to see it by, and accepts every pair. H = I - 1000 I."""
    rules = {"factors": absolute(restart_after=3), "safeguard": SafeguardRule(smallest=0.25)}
    _, opt, closure = problem(newton_l, **rules)
    opt.step(closure)
    for layer in opt.layers:
        n = layer.n_g
        layer["S"][:n], layer["Y"][:n], layer["rho"][:n] = torch.eye(n), 0.0, -1e3
        layer["pushed"].fill_(n)
    stuck = [opt.step(closure).item() for _ in range(5)]  # at 1, 1/2 and three times 1/4
    assert len(set(stuck)) == 1 and opt.counters()["scale"] == 0.25
    assert int(opt.counters()["restarts"]) == 1
    for layer in opt.layers:
        assert layer["pushed"] == 0 and layer["counts_g"][:2].tolist() == [6, 0]
    freed = [opt.step(closure).item() for _ in range(30)]
    assert freed[-1] < 0.9 * stuck[0]


def uphill(closure, calls=0):
    """The same gradients with a loss that only rises: every step is undone."""

    def rising():
        nonlocal calls
        calls += 1
        return closure().detach() + 1e3 * calls

    return rising


STANDSTILL = {"factors": absolute(restart_after=3), "safeguard": SafeguardRule(smallest=1.0)}


@METHODS
@ACTIONS
def test_all_factors_restart_when_no_step_is_kept(method, action):
    """H_a without A in the next step, whose activations it needs; then a new streak begins."""
    _, opt, closure = problem(method, hessian_action=action, **STANDSTILL)
    for _ in range(2):
        opt.step(uphill(closure))
    opt.step(closure)  # kept: the streak is over
    late = action == "minibatch"
    for k in range(1, 8):
        opt.step(uphill(closure))
        assert int(opt.counters()["restarts"]) == k // 3
        assert restarts(opt) == (k // 3, (k - late) // 3)
        if k % 3 == 0:
            for layer in opt.layers:
                if layer.has("H_g"):
                    assert torch.equal(layer["H_g"], torch.eye(layer.n_g, dtype=torch.float64))
                else:
                    assert layer["pushed"] == 0
    for counts in opt.diagnostics().values():
        assert int(counts["rejected"]) == int(counts["rejected_a"]) == 0


@METHODS
@ACTIONS
def test_all_factors_restart_on_a_surge(method, action):
    """Every step lowers its own minibatch's loss, and the next minibatch's is higher than ever."""
    rule = SafeguardRule(surge=2.0, window=2)
    _, opt, closure = problem(method, hessian_action=action, safeguard=rule)
    losses = iter(value for loss in (1.0, 1.0, 1.1, 3.1, 3.0) for value in (loss, 0.9 * loss))

    def overfit():
        return closure().detach() * 0 + next(losses)

    seen = []
    for _ in range(5):
        opt.step(overfit)
        seen.append((int(opt.counters()["restarts"]), *restarts(opt)))
        for layer in opt.layers:
            if layer.has("H_g"):
                start = torch.eye(layer.n_g, dtype=torch.float64)
                assert torch.equal(layer["H_g"], start) == (len(seen) == 4)
            else:
                assert layer["pushed"] == (0 if len(seen) == 4 else len(seen) % 4)
    at_once = int(action == "ema")  # H_a without A in the next step, whose activations it needs
    assert seen == [(0, 0, 0)] * 3 + [(1, 1, at_once), (1, 1, 1)]
    assert int(opt.counters()["undone"]) == 0


@METHODS
@ACTIONS
def test_a_void_step_puts_the_restart_off(method, action):
    """And is no part of the streak."""
    _, opt, closure = problem(method, hessian_action=action, **STANDSTILL)
    void = uphill(lambda: closure() * math.nan)
    for done in range(4):
        before = snapshot(opt.model, opt)
        opt.step(void)
        assert_same(before, snapshot(opt.model, opt))
        assert restarts(opt) == (done // 3, 0 if action == "minibatch" else done // 3)
        opt.step(uphill(closure))
    assert restarts(opt) == (1, 1)


@METHODS
@ACTIONS
@pytest.mark.parametrize("at", [1, 2, 3], ids=["in the streak", "before its end", "ordered"])
@pytest.mark.parametrize(
    "options",
    [STANDSTILL, {"safeguard": SafeguardRule(surge=1.5, window=2)}],
    ids=["standstill", "surge"],
)
def test_resumed_in_a_streak(method, action, at, options):
    """Of undone steps, or of losses that rise."""
    runs = []
    for resumed in (False, True):
        _, opt, closure = problem(method, hessian_action=action, **options)
        rising = uphill(closure)
        for k in range(5):
            if k == at and resumed:
                file = io.BytesIO()
                torch.save(opt.state_dict(), file)
                file.seek(0)
                weights = opt.model.state_dict()
                _, opt, closure = problem(method, hessian_action=action, **options)
                opt.model.load_state_dict(weights)
                opt.load_state_dict(torch.load(file))
                rising = uphill(closure, 2 * k)
            opt.step(rising)
        assert restarts(opt) == (1, 1)
        runs.append({**snapshot(opt.model, opt), **opt.counters()})
    assert_same(*runs)


@METHODS
def test_a_streak_outlives_a_checkpoint(method):
    opt, layer = started(method)
    layer["counts_g"][1] += 2
    restart_side(opt, layer, "g")
    _, other, _ = problem(method, factors=absolute(restart_after=3))
    other.load_state_dict(opt.state_dict())
    resumed = other.layers[0]
    resumed["counts_g"][1] += 1
    restart_side(other, resumed, "g")
    assert restarts(other) == (1, 0)
    never = absolute(restart_after=None)
    with pytest.raises(ValueError, match="restart_after = 3, this .* = None"):
        problem(method, factors=never)[1].load_state_dict(opt.state_dict())


@METHODS
@ACTIONS
def test_an_order_is_taken_where_nothing_judges(method, action):
    """By a run without a safeguard that goes on where one with it was saved."""
    _, opt, closure = problem(method, hessian_action=action, safeguard=False)
    opt.step(closure)
    opt.steps.guard.tensors()["order_a"].fill_(True)
    opt.step(closure)
    opt.step(closure)
    assert restarts(opt) == (0, 1) and not opt.steps.guard.tensors()["order_a"]


def test_a_checkpoint_of_another_format_is_refused():
    _, opt, _ = problem()
    saved = opt.state_dict()
    saved["param_groups"][0]["kbfgs"]["format"] = FORMAT + 1
    wrong = f"has format = {FORMAT + 1}, this optimizer has format = {FORMAT}"
    with pytest.raises(ValueError, match=wrong):
        opt.load_state_dict(saved)


@METHODS
@ACTIONS
@BACKENDS
def test_no_host_read(method, action, backend):
    with FakeTensorMode():
        options = {"hessian_action": action, "backend": backend}
        _, opt, closure = problem(method, factors=absolute(restart_after=2), **options)
        for _ in range(3):
            opt.step(closure)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError)])
def test_bad_values(value, error):
    with pytest.raises(error, match=f"restart_after must be .*got {value}"):
        FactorRule(restart_after=value)


@METHODS
@ACTIONS
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)],
)
def test_factors_stay_symmetric_to_the_last_bit(method, action, backend, dtype):
    """Over many steps that move, are damped, are undone and are void."""
    torch.manual_seed(0)
    model = mlp(5, 7, 3, dtype=dtype)
    opt = method(model, hessian_action=action, lr=2.0, damping=1e-3, backend=backend)
    random = torch.Generator().manual_seed(0)
    for k in range(200):
        x = torch.randn(12, 5, generator=random).to(dtype) * (math.nan if k % 50 == 7 else 1.0)

        def closure(x=x):
            opt.zero_grad()
            loss = (model(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        opt.step(closure)
    for layer in opt.layers:
        for name in ("A", "H_a", "H_g"):
            if name == "A" and backend == "reference":
                continue  # torch's product: as symmetric as the BLAS of the machine makes it
            if layer.has(name):
                assert torch.equal(layer[name], layer[name].T), f"{layer.name} {name}"


@METHODS
@ACTIONS
def test_started_anew_it_is_a_new_optimizer(method, action):
    """But for what is counted; after steps that have filled everything."""
    factors = absolute(initial_scale="damping", restart_after=3)
    options = {"hessian_action": action, "factors": factors}
    model, opt, closure = problem(method, **options)
    for _ in range(5):
        opt.step(closure)
    opt.steps.guard.scale.fill_(0.25)
    opt.restart()
    assert opt.counters()["scale"] == 1.0 and int(opt.counters()["steps"]) == 5
    fresh = method(model, **options)
    start = copy.deepcopy(model.state_dict())
    ends = []
    for one in (opt, fresh):
        model.load_state_dict(start)
        for _ in range(4):
            one.step(lambda one=one: passes(model, one))
        ends.append(snapshot(model, one))
    assert_same(*ends, but=["counts_a", "counts_g", "marks_a", "marks_g"])
    assert int(opt.diagnostics()["0"]["accepted"]) == 5 + 4


def passes(model, opt):
    opt.zero_grad()
    loss = (model(rows(12, 5)) - rows(12, 3, seed=1)).square().mean()
    loss.backward()
    return loss


@METHODS
def test_started_anew_no_streak_goes_on(method):
    opt, layer = started(method)
    layer["counts_g"][1] += 2
    opt.restart()
    layer["counts_g"][1] += 1
    restart_side(opt, layer, "g")
    assert restarts(opt) == (0, 0)
    layer["counts_g"][1] += 2
    restart_side(opt, layer, "g")
    assert restarts(opt) == (1, 0)


def test_started_anew_in_the_midst_of_a_step():
    model, opt, _ = problem()
    with opt.first_pass():
        loss = passes(model, opt)
    opt.descend(loss)
    with pytest.raises(
        RuntimeError, match=r"restart\(\) is out of order: second_pass\(\) comes next"
    ):
        opt.restart()


def test_started_anew_takes_a_warm_start():
    _, opt, closure = problem()
    opt.step(closure)
    with pytest.raises(RuntimeError, match="warm_start must come before"):
        opt.warm_start([rows(12, 5)])
    opt.restart()
    opt.warm_start([rows(12, 5)])
    assert opt.step(closure).isfinite()
