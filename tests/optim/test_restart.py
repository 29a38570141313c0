"""A factor that rejects pair after pair is put back to its start; and H stays symmetric."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kbfgs_ext.optim.restart import restart_a, restart_g
from tests.optim.models import METHODS, assert_same, mlp, problem, snapshot

ACTIONS = pytest.mark.parametrize("action", ["ema", "minibatch"])
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


def started(method, **options):
    """A problem after three steps, and its first layer."""
    _, opt, closure = problem(method, restart_after=3, **options)
    for _ in range(3):
        opt.step(closure)
    return opt, opt._layers()[0]


def restarts(opt) -> tuple[int, int]:
    report = opt.diagnostics()["0"]
    return int(report["restarts"]), int(report["restarts_a"])


@METHODS
@ACTIONS
def test_restarts_after_so_many_rejections_in_a_row(method, action):
    """Two rejected, one accepted, three rejected: the third of those restarts, once."""
    opt, layer = started(method, hessian_action=action)
    X = [] if action == "ema" else [torch.ones(4, 5, dtype=torch.float64)]
    lam_a = torch.tensor(0.5, dtype=torch.float64)
    due = [(1, 0), (1, 0), (0, 0), (1, 0), (1, 0), (1, 1), (1, 1), (1, 1), (1, 2)]
    for rejected, restarted in due:
        for side in "ag":
            layer["counts_" + side][rejected] += 1
        before = {name: t.clone() for name, t in layer.kept.items()}
        already = restarts(opt)[0]
        restart_a([layer], X, lam_a, 3)
        restart_g([layer], 3)
        assert restarts(opt) == (restarted, restarted)
        if restarted == already:
            assert all(torch.equal(before[n], t) for n, t in layer.kept.items() if n[0] in "HSYrp")
    trace = layer["A"].trace() if action == "ema" else 6.0
    torch.testing.assert_close(layer["H_a"], torch.eye(6, dtype=torch.float64) / (0.5 + trace))
    if layer.has("H_g"):
        assert torch.equal(layer["H_g"], torch.eye(7, dtype=torch.float64))
    else:
        assert not any(layer[name].any() for name in ("S", "Y", "rho", "pushed"))


@METHODS
@ACTIONS
def test_in_a_step(method, action):
    """A factor gone wrong (zero) rejects, restarts, and learns again."""
    _, opt, closure = problem(method, restart_after=2, hessian_action=action)
    opt.step(closure)
    layer = opt._layers()[0]
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
    a, opt, closure = problem(method, restart_after=1, hessian_action=action)
    b, plain, again = problem(method, hessian_action=action)
    for _ in range(8):
        opt.step(closure)
        plain.step(again)
    assert restarts(opt) == (0, 0) and "restarts" not in plain.diagnostics()["0"]
    assert_same(snapshot(b, plain), snapshot(a, opt))


@METHODS
def test_a_streak_outlives_a_checkpoint(method):
    opt, layer = started(method)
    layer["counts_g"][1] += 2
    restart_g([layer], 3)
    _, other, _ = problem(method, restart_after=3)
    other.load_state_dict(opt.state_dict())
    resumed = other._layers()[0]
    resumed["counts_g"][1] += 1
    restart_g([resumed], 3)
    assert restarts(other) == (1, 0)
    with pytest.raises(ValueError, match="restart_after = 3, this .* = None"):
        problem(method)[1].load_state_dict(opt.state_dict())


@METHODS
@ACTIONS
@BACKENDS
def test_no_host_read(method, action, backend):
    with FakeTensorMode():
        _, opt, closure = problem(method, hessian_action=action, backend=backend, restart_after=2)
        for _ in range(3):
            opt.step(closure)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError)])
def test_bad_values(value, error):
    with pytest.raises(error, match=f"restart_after must be .*got {value}"):
        problem(restart_after=value)


@METHODS
@ACTIONS
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
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
    for layer in opt._layers():
        for name in ("A", "H_a", "H_g"):
            if name == "A" and backend == "reference":
                continue  # torch's product: as symmetric as the BLAS of the machine makes it
            if layer.has(name):
                assert torch.equal(layer[name], layer[name].T), f"{layer.name} {name}"
