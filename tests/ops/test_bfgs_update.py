"""bfgs_update: symmetric, positive definite, secant equation, product form; all of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kbfgs_ext import ops
from kbfgs_ext.ops.bfgs_update.api import workspace_size
from tests.helpers import backends, calls, cases, compare
from tests.helpers.oracles import bfgs_inverse, randn, spd, with_ones

ACCEPTED, REJECTED = 0, 1


def updated(backend, H, s, y, c):
    H, counts = H.clone(), torch.zeros(4, dtype=torch.int64)
    ops.bfgs_update_([H], [counts], [s], [y], [], [c], backend=backend)
    return H, counts


@pytest.mark.parametrize("backend", backends.BOTH)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    condition=st.sampled_from([1.0, 10.0, 1e3]),
)
def test_update_keeps_what_bfgs_keeps(backend, n, seed, condition):
    H, y = spd(n, condition, seed), randn(n, seed=seed + 1)
    s = spd(n, condition, seed + 2) @ y  # some curvature, s'y > 0
    got, counts = updated(backend, H, s, y, torch.zeros(n, dtype=torch.float64))
    assert counts.tolist() == [1, 0, 0, 0]
    size = bfgs_inverse(H, s, y).abs().max().item()
    rho, Hy = 1 / (s @ y), H @ y
    largest = max(size, (rho * s.norm() * (Hy.norm() + (rho * (y @ Hy) + 1) * s.norm())).item())
    compare.assert_equal_to(got, bfgs_inverse(H, s, y), n, largest, "product form")
    compare.assert_equal_to(got @ y, s, n, largest * y.norm().item(), "secant equation")
    if backend == "cpu":
        compare.assert_same_bits(got, got.T.contiguous(), "symmetry")
    loss = compare.rounding(torch.float64, n, largest)
    assert torch.linalg.eigvalsh(got)[0] > -loss


@pytest.mark.parametrize("backend", backends.BOTH)
def test_factor_stays_positive_definite_over_many_updates(backend):
    n = 33
    H, B = torch.eye(n), spd(n, 100.0) * 100
    for k in range(200):
        s = randn(n, seed=k).float()
        H, counts = updated(backend, H, s, (B @ s.double()).float(), torch.zeros(n))
        assert counts[ACCEPTED] == 1
    assert torch.linalg.eigvalsh(H.double())[0] > 0


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda s, y, c: s.neg_(),
        lambda s, y, c: s.zero_(),
        lambda s, y, c: y.zero_(),
        lambda s, y, c: c.fill_(1e9),
        lambda s, y, c: c.fill_(float("nan")),
        lambda s, y, c: s.__setitem__(3, float("inf")),
        lambda s, y, c: y.__setitem__(3, float("nan")),
        lambda s, y, c: (s.mul_(1e-160), y.mul_(1e-160)),
    ],
    ids=["negative", "s-zero", "y-zero", "c-large", "c-nan", "s-inf", "y-nan", "1/s'y-overflows"],
)
def test_rejected_pair_leaves_every_bit(backend, spoil):
    H, y = spd(17), randn(17, seed=1)
    s, c = H @ y, torch.zeros(17, dtype=torch.float64)
    spoil(s, y, c)
    got, counts = updated(backend, H, s, y, c)
    compare.assert_same_bits(got, H)
    assert counts.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("from_X", [False, True])
def test_curvature_update_is_its_parts(backend, from_X):
    """The fused op against the ops it is made of, each on the reference backend."""
    build = cases.curvature_update([(33, 17), (5, 40)], "both", from_X=from_X)
    args = build(torch.float64)
    got = calls.run("curvature_update_", args, backend)
    for i in range(2):
        one = {k: v[i] for k, v in args.items() if isinstance(v, list) and v}
        s_a = one["H_a"] @ one["a_bar"]
        y_a = torch.empty_like(s_a)
        if from_X:
            ops.hessian_action_([y_a], [one["X"]], [s_a], [one["lam_a"]], backend="reference")
        else:
            y_a = one["A"] @ s_a + one["lam_a"] * s_a
        H_a, _ = updated("reference", one["H_a"], s_a, y_a, one["a_bar"])
        s, y = one["s"].clone(), one["y"].clone()
        changes = {k: [one[k]] for k in ("h_change", "g_bar", "g_bar_next")}
        ops.pair_ema_([s], [y], **changes, decay=0.9, backend="reference")
        s_d, y_d, Hy, counts = s.clone(), y.clone(), torch.empty_like(y), one["counts_g"].clone()
        ops.double_damping_(
            [s_d], [y_d], [Hy], [counts], [one["H_g"]], [one["lam_g"]], backend="reference"
        )
        H_g, _ = updated("reference", one["H_g"], s_d, y_d, one["g_bar"])
        for name, wanted in (("H_a", H_a), ("H_g", H_g), ("s", s), ("y", y)):
            before = one[name].abs().max().item()
            scale = max(before, wanted.abs().max().item())
            compare.assert_equal_to(got[name][i], wanted, wanted.shape[0], scale, name)


@pytest.mark.parametrize("backend", backends.BOTH)
def test_layer_whose_own_means_are_not_finite_is_skipped_alone(backend):
    args = cases.curvature_update([(5, 4), (6, 7)])(torch.float64)
    args["h_change"][0][2] = float("nan")
    got = calls.run("curvature_update_", args, backend)
    for name in ("H_g", "s", "y", "counts_g"):
        compare.assert_same_bits(got[name][0], args[name][0])
        assert not torch.equal(got[name][1], args[name][1])
    assert not torch.equal(got["H_a"][0], args["H_a"][0])  # which has nothing to do with them


@pytest.mark.parametrize("backend", backends.BOTH)
@pytest.mark.parametrize("side", ["A", "X", "g", "ring", "both"])
def test_restart_after_a_streak(backend, side):
    """Layers with streaks of 3, 2, none and 5, where 3 is the limit."""
    n = 17
    args = cases.restart((n,) * 4, side)(torch.float64)
    got = calls.run("restart_", args, backend)
    H = got["H"]
    assert [m.tolist() for m in got["marks"]] == [[7, 5, 2], [7, 2, 1], [8, 9, 1], [7, 7, 2]]
    if side == "ring":
        assert [int(p) for p in got["pushed"]] == [0, 6, 7, 0]
        return
    for i, before in enumerate(args["H"]):
        if i in (1, 2):
            compare.assert_same_bits(H[i], before)
            continue
        divisor = torch.tensor(1.0, dtype=torch.float64)
        if i < len(args["lam"]):
            X = with_ones(args["X"][i]) if side == "X" else None
            divisor = 0.3 + (args["A"][i] if X is None else X.T @ X / len(X)).trace()
        compare.assert_equal_to(H[i], torch.eye(n, dtype=torch.float64) / divisor, n, 1.0)


@pytest.mark.parametrize("backend", backends.BOTH)
def test_restart_that_is_forced_and_one_that_is_put_off(backend):
    """No streak, and all restart; but where the trace overflows nothing does, until it does not."""
    args = cases.restart((5, 7), "X", force=torch.tensor(True))(torch.float32)
    args["after"] = 100
    args["X"][1][2, 3] = float("inf")
    got = calls.run("restart_", args, backend)
    assert [m[2].item() for m in got["marks"]] == [2, 1]
    compare.assert_same_bits(got["H"][1], args["H"][1])
    got["X"][1][2, 3] = 0.0
    again = calls.run("restart_", got, backend)
    assert [m[2].item() for m in again["marks"]] == [3, 2]
    assert torch.equal(again["H"][1], torch.diag(again["H"][1].diagonal()))


def test_bad_arguments_of_restart_are_named():
    H, v = torch.eye(3), torch.tensor(0.5, dtype=torch.float64)
    marks, counts = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    pushed = torch.tensor(0)

    def call(H=(), pushed=(), marks=(marks,), counts=(counts,), lam=(), A=(), X=(), after=2):
        ops.restart_(H, pushed, marks, counts, lam, A, X, [], after)

    for words, arguments in (
        ("after must be at least 1, got 0", {"H": [H], "after": 0}),
        ("give H or pushed, not both: got 1 and 1", {"H": [H], "pushed": [pushed]}),
        ("one entry per layer, got lengths .*'pushed': 0", {}),
        ("lam goes with A or X: got 1 lam, 0 A and 0 X", {"H": [H], "lam": [v]}),
        ("lam goes with A or X: got 0 lam, 1 A and 0 X", {"H": [H], "A": [H]}),
        ("lam goes with A or X: got 1 lam, 1 A and 1 X", {"lam": [v], "A": [H], "X": [H]}),
        (r"marks\[0\] must have shape \(3,\)", {"H": [H], "marks": [counts]}),
        (r"counts\[0\] must have shape \(4,\)", {"H": [H], "counts": [marks]}),
        (r"pushed\[0\] must have shape \(\)", {"pushed": [marks]}),
        (r"H\[0\] must have shape \(3, 3\)", {"H": [H[:, :2]]}),
        (r"A\[0\] must have shape \(3, 3\)", {"H": [H], "lam": [v], "A": [H[:2]]}),
        (r"A\[0\] must be torch.float32", {"H": [H], "lam": [v], "A": [H.double()]}),
        (r"X\[0\] must be m x 3 or m x 2", {"H": [H], "lam": [v], "X": [torch.ones(4, 5)]}),
    ):
        with pytest.raises(ValueError, match=words):
            call(**arguments)


def test_bad_arguments_are_named():
    v, counts = torch.ones(3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"H\[0\] must have shape \(3, 3\)"):
        ops.bfgs_update_([torch.eye(2)], [counts], [v], [v], [], [v])
    with pytest.raises(ValueError, match=r"c\[0\] must be torch.float32"):
        ops.bfgs_update_([torch.eye(3)], [counts], [v], [v], [], [v.double()])
    with pytest.raises(ValueError, match="backend must be"):
        ops.bfgs_update_([], [], [], [], [], [], backend="gpu")
    assert workspace_size(5, 3) >= 3 * (5 + 3)
