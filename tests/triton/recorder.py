"""The launches of an op, recorded in place of being run; and calls of the size of a real model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from kbfgs_ext.ops import registry
from kbfgs_ext.ops.bfgs_update.api import workspace_size
from kbfgs_ext.ops.spectral import api as spectral
from tests.helpers.calls import Args
from tests.helpers.traffic import AUTOENCODERS, BATCH

MEMORY = 100


@dataclasses.dataclass
class Launch:
    kernel: object
    programs: int
    args: tuple
    options: dict


def triton_modules() -> list[types.ModuleType]:
    """All that launch kernels."""
    for family in registry.FAMILIES:
        importlib.import_module(f"kbfgs_ext.ops.{family}.triton")
    return [m for name, m in sys.modules.items() if re.match(r"kbfgs_ext\.ops\..*triton$", name)]


@contextlib.contextmanager
def replaced(launch: Callable[..., None]) -> Iterator[None]:
    """Within it ``launch`` gets what would be launched."""
    with contextlib.ExitStack() as stack:
        for module in triton_modules():
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it launches go into the list that it gives."""
    launches: list[Launch] = []

    def record(kernel, programs, *args, device, **options) -> None:
        if programs:
            launches.append(Launch(kernel, programs, args, options))

    with replaced(record):
        yield launches


def call(op: str, args: Args) -> None:
    """The op's Triton implementation itself: dispatch would ask for a GPU."""
    registry.implementation(op, "triton").run(args)


def launches_of(op: str, args: Args) -> list[Launch]:
    """What a call launches."""
    with recorded() as launches:
        call(op, args)
    return launches


def model_calls(
    name: str, dtype: torch.dtype, input_dtype: torch.dtype | None = None
) -> dict[str, tuple[str, Args]]:
    """Calls of every op on an autoencoder: {what: (op, arguments)}; numbers are not set."""
    return calls_of(AUTOENCODERS[name], dtype, input_dtype)


def calls_of(
    sizes: Sequence[int],
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
    batch: int = BATCH,
) -> dict[str, tuple[str, Args]]:
    """The same for a network of these sizes."""
    d_in, n_g = sizes[:-1], sizes[1:]
    n_a = [d + 1 for d in d_in]
    count = len(n_g)
    given = input_dtype or dtype

    def empty(*shapes, like=dtype):
        return [torch.empty(shape, dtype=like) for shape in shapes]

    def vectors(lengths):
        return empty(*[(n,) for n in lengths])

    H_a, A = (empty(*[(n, n) for n in n_a]) for _ in range(2))
    H_g = empty(*[(n, n) for n in n_g])
    X = empty(*[(batch, d) for d in d_in], like=given)
    W, dW = (empty(*zip(n_g, d_in, strict=True), like=given) for _ in range(2))
    b, db = (empty(*[(n,) for n in n_g], like=given) for _ in range(2))
    M, P, work = (empty(*zip(n_g, n_a, strict=True)) for _ in range(3))
    S, Y = (empty(*[(MEMORY, n) for n in n_g]) for _ in range(2))
    rho, pushed = vectors([MEMORY] * count), empty(*[()] * count, like=torch.int64)
    counts, marks = (empty(*[(k,)] * count, like=torch.int64) for k in (4, 3))
    scalars = empty(*[()] * count, like=torch.float64)
    scratch = vectors([workspace_size(a, g) for a, g in zip(n_a, n_g, strict=True)])
    room = vectors(itertools.starmap(spectral.workspace_size, zip(n_g, n_a, strict=True)))
    ok = torch.empty((), dtype=torch.bool)
    a_bar, a_next = vectors(n_a), vectors(n_a)
    s, y, Hy, c, h_change, g_bar, g_bar_next = (vectors(n_g) for _ in range(7))
    pair = dict(s=s, y=y)
    changes = dict(h_change=h_change, g_bar=g_bar, g_bar_next=g_bar_next)
    parameters, gradient = dict(W=W, b=b), dict(dW=dW, db=db)
    averaging = dict(momentum=0.9, weight_decay=1e-5)

    def damping(H):
        return pair | dict(Hy=Hy, counts=counts, H=H, lam=scalars, mu1=0.2, ok=ok)

    def curvature(A, X):
        return pair | changes | dict(
            H_a=H_a, H_g=H_g, counts_a=counts, counts_g=counts, work=scratch, A=A, X=X, a_bar=a_bar,
            lam_a=scalars, lam_g=scalars, pair_decay=0.9, mu1=0.2, ok=ok, ok_pair=ok,
        )  # fmt: skip

    def restart(H=(), pushed=(), lam=(), A=(), X=(), force=ok):
        n = len(H) or len(pushed)
        lists = dict(H=H, pushed=pushed, marks=marks * 2, counts=counts * 2, lam=lam, A=A, X=X)
        lists |= {name: lists[name][:n] for name in ("marks", "counts")}
        lists["force"] = [force] * n if force is not None else []
        return {name: list(value) for name, value in lists.items()} | dict(after=10)

    def admit(take):
        return dict(
            sound=[ok], counts=counts[:1], decision=[torch.empty(5, dtype=torch.bool)],
            loss=empty(()), norms=vectors([2 * count]), take=take,
        )  # fmt: skip

    def lengths(shared):
        wide = [torch.empty(count, dtype=torch.float64) for _ in range(2)]
        return dict(
            sizes=wide[:1], norms=vectors([count]), roots=wide[1:], step_size=scalars[:1],
            shared=shared,
        )  # fmt: skip

    def judge(slope, after, take=False):
        scale, loss, loss_next = empty((), (), ())
        return dict(
            scale=[scale], watched=vectors([4]), counts=counts[:1],
            decision=[torch.empty(5, dtype=torch.bool)], loss=[loss], loss_next=[loss_next],
            slope=slope, noise=1e-6, shrink=0.5, grow=1.1, sufficient=0.5, smallest=1e-6, surge=2.0,
            window=50, restart_after=after, take=take, ok=ok,
        )  # fmt: skip

    norms = empty(*[()] * count)
    of_inputs = dict(v=scalars, lam_a=scalars, norms=norms, damping=scalars)
    ring = dict(S=S, Y=Y, rho=rho, pushed=pushed)
    product = dict(P=P, H_g=H_g, M=M, H_a=H_a, work=work)
    found = {
        "factor_ema_": dict(A=A, a_bar=a_bar, X=X, decay=0.9, ok=ok),
        "factor_ema_, means alone": dict(A=[], a_bar=a_bar, X=X, decay=0.9, ok=ok),
        "hessian_action_": dict(y=a_bar, X=X, s=a_next, lam=scalars),
        "pair_ema_": pair | changes | dict(decay=0.9, ok=ok),
        "double_damping_": damping(H_g),
        "double_damping_, Hy given": damping([]),
        "bfgs_update_": pair | dict(H=H_g, counts=counts, Hy=[], c=c, ok=ok),
        "curvature_update_, ema": curvature(A, []),
        "curvature_update_, minibatch": curvature([], X),
        "restart_, from A": restart(H_a, lam=scalars, A=A),
        "restart_, from X": restart(H_a, lam=scalars, X=X),
        "restart_, both sides": restart(H_a + H_g, lam=scalars, A=A),
        "restart_, to I": restart(H_g, force=None),
        "restart_, a ring": restart(pushed=pushed),
        "lbfgs_two_loop_, recursion": ring | dict(out=P, Q=M, form="recursion"),
        "lbfgs_two_loop_, compact": ring | dict(out=P, Q=M, form="compact"),
        "lbfgs_two_loop_, compact, a vector": ring | dict(out=s, Q=y, form="compact"),
        "lbfgs_push_": ring | pair | dict(counts=counts, c=c, ok=ok),
        "kron_precondition_": product,
        "kron_precondition_, no H_g": product | dict(H_g=[]),
        "kron_precondition_, no H_a": product | dict(H_a=[]),
        "momentum_": parameters | gradient | averaging | dict(M=M, ok=ok),
        "descend_": parameters | dict(P=P, step_size=scalars, ok=ok),
        "slope_": parameters | gradient | dict(slope=s, saved=P),
        "output_change_": parameters | dict(change=s, saved=P, a_bar=a_bar, a_bar_next=a_next),
        "restore_": parameters | dict(saved=P, undo=ok),
        "kron_step_": product | parameters | gradient | averaging | dict(step_size=scalars, ok=ok),
        "polar_": dict(P=P, work=room, coefficients=spectral.COEFFICIENTS, ridge=0.0, shifts=None),
        "measure_inputs_": of_inputs | dict(elements=(1.0,) * count, share=0.1, ok=ok),
        "measure_pair_": changes | dict(ss=scalars, yy=scalars, share=0.1, ok=ok),
        "lengths_, each": lengths(False),
        "lengths_, shared": lengths(True),
        "admit_": admit(False),
        "admit_, take": admit(True),
        "judge_": judge(empty(()), 10),
        "judge_, take": judge(empty(()), 10, True),
        "judge_, no slope, no restarts": judge([], None),
    }
    return {what: (what.split(",")[0], args) for what, args in found.items()}
