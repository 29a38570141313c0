"""Hand-picked calls of every op, each with a readable id.

A case builds the arguments of one op, a dict by name without ``backend``, from seeded float64
numbers rounded to the dtype asked for. Arguments that an op only writes are filled
with NaN. How to run one: calls.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from kbfgs_ext.ops.bfgs_update.api import workspace_size
from tests.helpers.calls import Args
from tests.helpers.inputs import (
    NAN,
    in_dtype,
    nan_filled,
    random_ring,
    random_spds,
    random_vectors,
    row_strided,
    scalars,
    some_counts,
    strided,
    transposed,
)
from tests.helpers.kron_cases import (
    descend,
    kron_precondition,
    kron_step,
    momentum,
    output_change,
    restore,
    slope,
)
from tests.helpers.measure_cases import lengths, measure_inputs, measure_pair
from tests.helpers.oracles import randn
from tests.helpers.safeguard_cases import admit, judge
from tests.helpers.spectral_cases import polar


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    id: str
    build: Callable[[torch.dtype], Args]  # tensors on the CPU

    def __str__(self) -> str:
        return f"{self.op}{self.id}"


# --- one builder per op -------------------------------------------------------------------------


def factor_ema(sizes, m, bias=True, decay=0.9, ok=None, layout=lambda t: t, mean_only=False):
    def build(dtype):
        X = [0.5 + randn(m, n, seed=i) for i, n in enumerate(sizes)]
        factors = [n + bias for n in sizes]
        A = [] if mean_only else random_spds(tuple(factors), seed=50)
        a_bar = nan_filled(*[(n,) for n in factors])
        A, a_bar, X = in_dtype(dtype, [A, a_bar, X])
        return dict(A=A, a_bar=a_bar, X=[layout(x) for x in X], decay=decay, ok=ok)

    return build


def hessian_action(sizes, m, bias=True, layout=lambda t: t):
    def build(dtype):
        X = [0.5 + randn(m, n, seed=i) for i, n in enumerate(sizes)]
        s = random_vectors(tuple(n + bias for n in sizes), seed=50)
        y, X, s = in_dtype(dtype, [nan_filled(*[v.shape for v in s]), X, s])
        return dict(y=y, X=[layout(x) for x in X], s=s, lam=scalars(0.55, len(sizes)))

    return build


def pair_ema(sizes, decay=0.9, ok=None, layout=lambda t: t):
    def build(dtype):
        s, y, *means = in_dtype(dtype, [random_vectors(sizes, 10 * k) for k in range(5)])
        h_change, g_bar, g_next = ([layout(v) for v in vectors] for vectors in means)
        return dict(s=s, y=y, h_change=h_change, g_bar=g_bar, g_bar_next=g_next, decay=decay, ok=ok)

    return build


def pairs_for(H: list[torch.Tensor], kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """s and y that exercise a branch of the dampings or of the gate on H."""
    n = tuple(len(h) for h in H)
    y = random_vectors(n, 70)
    Hy = [h @ v for h, v in zip(H, y, strict=True)]
    if kind == "accepted":  # s = H y: s'y = y'Hy
        return [1.5 * v for v in Hy], y
    if kind == "powell":  # s'y below mu1*y'Hy, and still positive
        return [0.1 * v for v in Hy], y
    if kind == "negative":
        return [-v for v in Hy], y
    if kind == "lm":  # s far longer than y: s'y below lam*s's
        return [50 * v for v in Hy], y
    if kind == "both":
        s = random_vectors(n, 80, 30.0)
        return [
            v - 2 * (v @ w) / (w @ w) * w if v @ w > 0 else v for v, w in zip(s, y, strict=True)
        ], y
    if kind == "indefinite":  # y'Hy < 0, and no damping needed
        for h, v in zip(H, y, strict=True):
            h -= 3 * torch.outer(v, v) / (v @ v)
        return [2 * v for v in y], y
    if kind == "small":
        return [1e-12 * v for v in Hy], [1e-12 * v for v in y]
    raise ValueError(kind)


def double_damping(sizes, kind, condition=10.0, lam=0.55, ok=None, with_H=True):
    def build(dtype):
        H = random_spds(sizes, 20, condition)
        s, y = pairs_for(H, kind)
        Hy = (
            nan_filled(*[v.shape for v in y])
            if with_H
            else [h @ v for h, v in zip(H, y, strict=True)]
        )
        s, y, Hy, H = in_dtype(dtype, [s, y, Hy, H])
        count = len(sizes)
        return dict(
            s=s, y=y, Hy=Hy, counts=some_counts(count), H=H if with_H else [],
            lam=scalars(lam, count), mu1=0.2, ok=ok,
        )  # fmt: skip

    return build


def bfgs_update(sizes, kind="accepted", condition=10.0, c_scale=1e-3, ok=None, give_Hy=False):
    def build(dtype):
        H = random_spds(sizes, 20, condition)
        s, y = pairs_for(H, kind)
        H, s, y, c = in_dtype(dtype, [H, s, y, random_vectors(sizes, 90, c_scale)])
        Hy = [h @ v for h, v in zip(H, y, strict=True)] if give_Hy else []
        return dict(H=H, counts=some_counts(len(sizes)), s=s, y=y, Hy=Hy, c=c, ok=ok)

    return build


def curvature_update(
    layers, kind="accepted", m=20, from_X=False, bias=True, sides="ag", lam=0.55, ok=None,
    ok_pair=None, condition=10.0,
):  # fmt: skip
    """``layers`` holds (d_in, d_out) of each layer; ``sides`` which factors are given."""

    def build(dtype):
        n_a = tuple(d_in + bias for d_in, _ in layers) if "a" in sides else ()
        n_g = tuple(d_out for _, d_out in layers) if "g" in sides else ()
        H_a, H_g = random_spds(n_a, 10, condition), random_spds(n_g, 20, condition)
        A = [] if from_X else random_spds(n_a, 30, condition)
        X = [0.5 + randn(m, n - bias, seed=40 + i) for i, n in enumerate(n_a)] if from_X else []
        # Changes such that the averaged pair is the wanted one.
        s_new, y_new = pairs_for(H_g, kind)
        s, y, g_bar = (random_vectors(n_g, 100 + 10 * k, 1e-3) for k in range(3))
        h_change = [10 * (v - 0.9 * w) for v, w in zip(s_new, s, strict=True)]
        g_next = [g + 10 * (v - 0.9 * w) for g, v, w in zip(g_bar, y_new, y, strict=True)]
        work = nan_filled(*[
            (workspace_size(n_a[i] if n_a else 0, n_g[i] if n_g else 0),)
            for i in range(len(layers))
        ])  # fmt: skip
        lists = dict(
            H_a=H_a, H_g=H_g, s=s, y=y, work=work, A=A, X=X, a_bar=random_vectors(n_a, 60),
            h_change=h_change, g_bar=g_bar, g_bar_next=g_next,
        )  # fmt: skip
        return dict(
            zip(lists, in_dtype(dtype, list(lists.values())), strict=True),
            counts_a=some_counts(len(n_a)), counts_g=some_counts(len(n_g)),
            lam_a=scalars(0.3, len(n_a)), lam_g=scalars(lam, len(n_g)),
            pair_decay=0.9, mu1=0.2, ok=ok, ok_pair=ok_pair,
        )  # fmt: skip

    return build


def restart(sizes, side, bias=True, force=None, layout=lambda t: t):
    """After 3; ``side``: a letter, "A" or "X" for the source of the trace, "g", "ring", or "both":
    the first half from A, the others to I.

    Layers in turn have a streak of 3 (and numbers in H that are not), of 2, one that an accepted
    pair has ended, and one of 5.
    """

    def build(dtype):
        count = len(sizes)
        marks = [torch.tensor([7, 2, 1]) for _ in sizes]
        streaks = [(7, 5), (7, 4), (8, 9), (7, 7)]
        counts = [torch.tensor([*streaks[i % 4], 0, 0]) for i in range(count)]
        args = dict(H=[], pushed=[], marks=marks, counts=counts, lam=[], A=[], X=[], after=3)
        args["force"] = [] if force is None else [force.clone() for _ in sizes]
        if side == "ring":
            return args | {"pushed": [torch.tensor(5 + i) for i in range(count)]}
        H = random_spds(sizes, 20)
        H[0][-1] = NAN
        A = random_spds(sizes, 30) if side in ("A", "both") else []
        A = A[: count // 2] if side == "both" else A
        X = [randn(20, n - bias, seed=i) for i, n in enumerate(sizes)] if side == "X" else []
        H, A, X = in_dtype(dtype, [H, A, X])
        lam = scalars(0.3, len(A) + len(X))
        return args | dict(H=H, lam=lam, A=A, X=[layout(x) for x in X])

    return build


def two_loop(sizes, p, pushed, columns, form, condition=10.0, layout=lambda t: t):
    """``columns`` None: vectors."""

    def build(dtype):
        rings = [random_ring(p, n, pushed, condition, 7 * i) for i, n in enumerate(sizes)]
        S, Y, rho, count = (list(column) for column in zip(*rings, strict=True))
        shapes = [(n,) if columns is None else (n, columns) for n in sizes]
        Q = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
        out, Q, S, Y, rho = in_dtype(dtype, [nan_filled(*shapes), Q, S, Y, rho])
        return dict(out=out, Q=[layout(q) for q in Q], S=S, Y=Y, rho=rho, pushed=count, form=form)

    return build


def push(sizes, p, pushed, kind="accepted", ok=None):
    def build(dtype):
        rings = [random_ring(p, n, pushed, 10.0, 7 * i) for i, n in enumerate(sizes)]
        S, Y, rho, count = (list(column) for column in zip(*rings, strict=True))
        s, y = pairs_for(random_spds(sizes, 20), kind)
        S, Y, rho, s, y, c = in_dtype(dtype, [S, Y, rho, s, y, random_vectors(sizes, 90, 1e-3)])
        counts = some_counts(len(sizes))
        return dict(S=S, Y=Y, rho=rho, pushed=count, counts=counts, s=s, y=y, c=c, ok=ok)

    return build


YES, NO = torch.tensor(True), torch.tensor(False)
TINY = (1, 2, 17)
MIXED = (129, 1, 63, 32)
LAYERS = [(17, 2), (2, 17), (1, 1), (32, 63)]
WIDE = [(128, 127), (513, 129)]

ALL = [
    Case("factor_ema_", ":tiny", factor_ema(TINY, 40)),
    Case("factor_ema_", ":mixed-no-bias", factor_ema(MIXED, 63, bias=False)),
    Case("factor_ema_", ":blocks", factor_ema((128, 127, 513), 129)),
    Case("factor_ema_", ":1024", factor_ema((1024,), 32)),
    Case("factor_ema_", ":batch-1", factor_ema((17, 63), 1)),
    Case("factor_ema_", ":start", factor_ema(TINY, 40, decay=0.0)),
    Case("factor_ema_", ":mean-only", factor_ema(MIXED, 40, mean_only=True)),
    Case("factor_ema_", ":sliced", factor_ema((63, 300), 70, layout=row_strided)),
    Case("factor_ema_", ":transposed", factor_ema((63, 17), 70, layout=transposed)),
    Case("factor_ema_", ":strided", factor_ema((63, 17), 70, layout=strided)),
    Case("factor_ema_", ":ok", factor_ema(TINY, 40, ok=YES)),
    Case("hessian_action_", ":tiny", hessian_action(TINY, 40)),
    Case("hessian_action_", ":mixed-no-bias", hessian_action(MIXED, 131, bias=False)),
    Case("hessian_action_", ":513", hessian_action((513,), 200)),
    Case("hessian_action_", ":1024", hessian_action((1024,), 66)),
    Case("hessian_action_", ":batch-1", hessian_action((17, 63), 1)),
    Case("hessian_action_", ":sliced", hessian_action((63,), 70, layout=row_strided)),
    Case("hessian_action_", ":transposed", hessian_action((63,), 70, layout=transposed)),
    Case("pair_ema_", ":tiny", pair_ema(TINY)),
    Case("pair_ema_", ":mixed-no-decay", pair_ema(MIXED, decay=0.0)),
    Case("pair_ema_", ":1024", pair_ema((1024, 513), ok=YES)),
    Case("pair_ema_", ":strided-means", pair_ema((63, 17), layout=strided)),
    Case("double_damping_", ":undamped", double_damping(MIXED, "accepted", lam=1e-3)),
    Case("double_damping_", ":powell", double_damping(MIXED, "powell", lam=1e-3)),
    Case("double_damping_", ":negative", double_damping((127, 2), "negative")),
    Case("double_damping_", ":lm", double_damping(MIXED, "lm")),
    Case("double_damping_", ":both-ill-conditioned", double_damping((129,), "both", 1e6)),
    Case("double_damping_", ":513", double_damping((513, 17), "both")),
    Case("double_damping_", ":small", double_damping((32, 63), "small")),
    Case("double_damping_", ":given-Hy", double_damping(MIXED, "both", with_H=False)),
    Case("measure_inputs_", ":all", measure_inputs((3.0, 5.0, 0.0, 1e-20, NAN, 1e30))),
    Case("measure_pair_", ":mixed", measure_pair((*MIXED, 5, 2))),
    Case("measure_pair_", ":1024-strided", measure_pair((1024, 17), YES, layout=strided)),
    Case("bfgs_update_", ":tiny", bfgs_update(TINY)),
    Case("bfgs_update_", ":mixed", bfgs_update(MIXED)),
    Case("bfgs_update_", ":128-127", bfgs_update((128, 127))),
    Case("bfgs_update_", ":513", bfgs_update((513,))),
    Case("bfgs_update_", ":1024-given-Hy", bfgs_update((1024,), give_Hy=True)),
    Case("bfgs_update_", ":condition-1", bfgs_update((63,), condition=1.0)),
    Case("bfgs_update_", ":condition-1e6", bfgs_update((129, 17), condition=1e6)),
    Case("bfgs_update_", ":negative", bfgs_update(MIXED, "negative")),
    Case("bfgs_update_", ":gate-closed-by-c", bfgs_update(MIXED, c_scale=1e6)),
    Case("bfgs_update_", ":small", bfgs_update((32, 63), "small", c_scale=1e-9)),
    Case("curvature_update_", ":ema", curvature_update(LAYERS)),
    Case("curvature_update_", ":minibatch", curvature_update(LAYERS, from_X=True)),
    Case("curvature_update_", ":wide-damped", curvature_update(WIDE, "both")),
    Case("curvature_update_", ":wide-minibatch", curvature_update(WIDE, "lm", 130, from_X=True)),
    Case("curvature_update_", ":powell-no-bias", curvature_update(LAYERS, "powell", bias=False)),
    Case("curvature_update_", ":ill-conditioned", curvature_update(LAYERS, condition=1e4)),
    Case("curvature_update_", ":1024", curvature_update([(1023, 17)])),
    Case("curvature_update_", ":a-side-alone", curvature_update(LAYERS, sides="a")),
    Case("curvature_update_", ":g-side-alone", curvature_update(LAYERS, "lm", sides="g")),
    Case("curvature_update_", ":void-pair", curvature_update(LAYERS, ok=YES, ok_pair=NO)),
    Case("bfgs_update_", ":indefinite", bfgs_update(MIXED, "indefinite")),
    Case("curvature_update_", ":indefinite", curvature_update(LAYERS, "indefinite")),
    Case("restart_", ":from-A", restart(MIXED, "A")),
    Case("restart_", ":from-X", restart(MIXED, "X")),
    Case("restart_", ":from-X-no-bias", restart(MIXED, "X", bias=False)),
    Case("restart_", ":from-X-sliced", restart((63, 300), "X", layout=row_strided)),
    Case("restart_", ":from-X-transposed", restart((63, 17), "X", layout=transposed)),
    Case("restart_", ":identity", restart((*MIXED, 127), "g")),
    Case("restart_", ":ring", restart((*MIXED, 127), "ring")),
    Case("restart_", ":forced", restart(MIXED, "A", force=YES)),
    Case("restart_", ":forced-ring", restart(MIXED, "ring", force=YES)),
    Case("restart_", ":not-forced", restart(MIXED, "X", force=NO)),
    Case("restart_", ":both", restart((63, 17, 32, 1, 40, 2, 8, 33), "both")),
    Case("restart_", ":both-forced", restart((63, 17, 32, 1), "both", force=YES)),
    Case("restart_", ":1024", restart((1024, 513), "A")),
    Case("lbfgs_two_loop_", ":empty", two_loop(TINY, 5, 0, 3, "recursion")),
    Case("lbfgs_two_loop_", ":empty-compact", two_loop(TINY, 5, 0, 3, "compact")),
    Case("lbfgs_two_loop_", ":partial", two_loop(MIXED, 10, 3, 70, "recursion")),
    Case("lbfgs_two_loop_", ":partial-compact", two_loop(MIXED, 10, 3, 70, "compact")),
    Case("lbfgs_two_loop_", ":wrapped", two_loop((129, 63), 10, 14, 17, "recursion")),
    Case("lbfgs_two_loop_", ":wrapped-compact", two_loop((129, 63), 10, 14, 17, "compact")),
    Case("lbfgs_two_loop_", ":vector", two_loop(MIXED, 10, 14, None, "recursion")),
    Case("lbfgs_two_loop_", ":vector-compact", two_loop((129, 63), 10, 14, None, "compact")),
    Case("lbfgs_two_loop_", ":auto-513", two_loop((513,), 20, 25, 129, "auto")),
    Case("lbfgs_two_loop_", ":memory-1", two_loop((17,), 1, 4, 2, "auto")),
    Case("lbfgs_two_loop_", ":condition-1e3", two_loop((127,), 10, 14, 65, "recursion", 1e3)),
    Case("lbfgs_two_loop_", ":transposed", two_loop((63,), 5, 5, 32, "auto", layout=transposed)),
    Case("lbfgs_two_loop_", ":sliced", two_loop((63,), 5, 5, 32, "auto", layout=row_strided)),
    Case("lbfgs_push_", ":empty", push(TINY, 5, 0)),
    Case("lbfgs_push_", ":wrapped", push(MIXED, 5, 13)),
    Case("lbfgs_push_", ":rejected", push(MIXED, 5, 3, "negative")),
    Case("kron_precondition_", ":layers", kron_precondition(LAYERS)),
    Case("kron_precondition_", ":wide-no-bias", kron_precondition(WIDE, bias=False)),
    Case("kron_precondition_", ":no-H_g", kron_precondition(LAYERS, without="H_g")),
    Case("kron_precondition_", ":no-H_a", kron_precondition(LAYERS, without="H_a")),
    Case("kron_precondition_", ":tiles", kron_precondition(LAYERS, layout=row_strided)),
    *(
        Case(
            "kron_precondition_",
            f":tiles-no-{H}",
            kron_precondition(LAYERS, True, H, 10.0, row_strided),
        )
        for H in ("H_g", "H_a")
    ),
    Case("kron_precondition_", ":large-no-H_a", kron_precondition([(90, 200)], without="H_a")),
    Case("kron_precondition_", ":condition-1e6", kron_precondition([(63, 32)], condition=1e6)),
    Case("momentum_", ":layers", momentum(LAYERS)),
    Case("momentum_", ":wide-no-bias", momentum(WIDE, bias=False)),
    Case("momentum_", ":transposed", momentum(LAYERS, layout=transposed)),
    Case("momentum_", ":plain", momentum(LAYERS, mu=0.0, decay=0.0, ok=YES)),
    Case("descend_", ":layers", descend(LAYERS)),
    Case("descend_", ":wide-no-bias", descend(WIDE, bias=False, ok=YES)),
    Case("descend_", ":void", descend(LAYERS, ok=NO)),
    Case("slope_", ":layers", slope(LAYERS)),
    Case("slope_", ":wide-no-bias", slope(WIDE, bias=False)),
    Case("slope_", ":wide-transposed", slope(WIDE, layout=transposed)),
    Case("output_change_", ":layers", output_change(LAYERS)),
    Case("output_change_", ":wide-no-bias", output_change(WIDE, bias=False)),
    Case("output_change_", ":wide-transposed", output_change(WIDE, layout=transposed)),
    Case("output_change_", ":strided-means", output_change(LAYERS, means=strided)),
    Case("restore_", ":undo", restore(LAYERS, True)),
    Case("restore_", ":undo-no-bias", restore(WIDE, True, bias=False)),
    Case("restore_", ":keep", restore(LAYERS, False)),
    Case("kron_step_", ":layers", kron_step(LAYERS)),
    Case("kron_step_", ":wide-no-bias", kron_step(WIDE, bias=False)),
    Case("kron_step_", ":transposed-gradient", kron_step(LAYERS, layout=transposed)),
    Case("kron_step_", ":void", kron_step(LAYERS, ok=NO)),
    Case("lengths_", ":each", lengths([(7.0,), (2.0, 0.0, 1e-3)], False)),
    Case("lengths_", ":shared", lengths([(7.0,), (2.0, 0.0, 1e-3)], True)),
    Case("lengths_", ":shared-70", lengths([tuple(range(70))], True)),
    Case("admit_", ":sound", admit(3, 300, 1)),
    Case("admit_", ":nan", admit(2, 17, value=NAN, take=True, ordered=True)),
    Case("admit_", ":loss", admit(2, loss=float("inf"), take=True)),
    Case("admit_", ":ordered", admit(2, take=True, ordered=True)),
    Case("judge_", ":all", judge()),
    Case("judge_", ":take", judge(take=True, ordered=True)),
    Case("judge_", ":take-void", judge(take=True, ordered=True, ok=NO)),
    Case("judge_", ":no-slope", judge(sloped=False)),
    Case("judge_", ":no-restarts", judge(restart_after=None, ordered=True)),
    Case("judge_", ":ordered-before", judge("undone", "stuck", ordered=True, ok=YES)),
    Case("judge_", ":void", judge(ok=NO, ordered=True)),
    Case("judge_", ":any-rise", judge(sloped=False, noise=float("inf"))),
    Case("polar_", ":layers", polar([(2, 17), (17, 2), (1, 9), (9, 1), (1, 1), (12, 12)])),
    Case("polar_", ":wide", polar([(63, 129), (100, 200)])),
    Case("polar_", ":tall", polar([(129, 63), (65, 66)])),
    Case("polar_", ":ridge", polar([(32, 63), (33, 33), (63, 2)], ridge=0.01)),
    Case("polar_", ":1-iteration", polar([(32, 63), (17, 17)], iterations=1, ridge=0.1)),
    Case("polar_", ":2-iterations", polar([(32, 63), (63, 32)], iterations=2)),
    Case("polar_", ":small", polar([(17, 32), (32, 17)], scale=1e-30)),
]


def of(*ops: str) -> list[Case]:
    """The cases of these ops."""
    return [case for case in ALL if case.op in ops]


def first(op: str) -> Case:
    """The op's first case: small, several layers."""
    return of(op)[0]


def ids(case: Case) -> str:
    return str(case)
