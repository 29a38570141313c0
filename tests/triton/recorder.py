"""The launches of an op, recorded in place of being run; and calls of the size of a real model."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from kbfgs_ext.ops import registry
from kbfgs_ext.ops.bfgs_update.api import workspace_size
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


def call(op: str, args: list) -> None:
    """The op's Triton implementation itself: dispatch would ask for a GPU."""
    module = importlib.import_module(f"kbfgs_ext.ops.{registry.ops()[op]}.triton")
    getattr(module, op)(*args)


def launches_of(op: str, args: list) -> list[Launch]:
    """What a call launches."""
    with recorded() as launches:
        call(op, args)
    return launches


def model_calls(
    name: str, dtype: torch.dtype, input_dtype: torch.dtype | None = None
) -> dict[str, tuple[str, list]]:
    """Calls of every op on an autoencoder: {what: (op, arguments)}; numbers are not set."""
    return calls_of(AUTOENCODERS[name], dtype, input_dtype)


def calls_of(
    sizes: Sequence[int],
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
    batch: int = BATCH,
) -> dict[str, tuple[str, list]]:
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
    ok = torch.empty((), dtype=torch.bool)
    a_bar = vectors(n_a)
    g = [vectors(n_g) for _ in range(7)]
    means = g[2:6]

    def curvature(A, X):
        return ("curvature_update_", [H_a, H_g, g[0], g[1], counts, counts, scratch, A, X, a_bar,
                *means, scalars, scalars, 0.9, 0.2, ok, ok])  # fmt: skip

    def judge(slope, after):
        scale, loss, loss_next = empty((), (), ())
        decision = [torch.empty(3, dtype=torch.bool)]
        return ("judge_", [[scale], vectors([4]), counts[:1], decision, [loss], [loss_next], slope,
                1e-6, 0.5, 1.1, 0.5, 1e-6, 2.0, 50, after, ok])  # fmt: skip

    def two_loop(form, out, Q):
        return "lbfgs_two_loop_", [out, Q, S, Y, rho, pushed, form]

    return {
        "factor_ema_": ("factor_ema_", [A, a_bar, X, 0.9, ok]),
        "factor_ema_, means alone": ("factor_ema_", [[], a_bar, X, 0.9, ok]),
        "hessian_action_": ("hessian_action_", [a_bar, X, vectors(n_a), scalars]),
        "pair_ema_": ("pair_ema_", [g[0], g[1], *means, 0.9, ok]),
        "double_damping_": (
            "double_damping_", [g[0], g[1], g[2], counts, H_g, scalars, 0.2, ok],
        ),
        "double_damping_, Hy given": (
            "double_damping_", [g[0], g[1], g[2], counts, [], scalars, 0.2, ok],
        ),
        "bfgs_update_": ("bfgs_update_", [H_g, counts, g[0], g[1], [], g[2], ok]),
        "curvature_update_, ema": curvature(A, []),
        "curvature_update_, minibatch": curvature([], X),
        "restart_, from A": ("restart_", [H_a, [], marks, counts, scalars, A, [], 10, ok]),
        "restart_, from X": ("restart_", [H_a, [], marks, counts, scalars, [], X, 10, ok]),
        "restart_, to I": ("restart_", [H_g, [], marks, counts, [], [], [], 10, None]),
        "restart_, a ring": ("restart_", [[], pushed, marks, counts, [], [], [], 10, ok]),
        "lbfgs_two_loop_, recursion": two_loop("recursion", P, M),
        "lbfgs_two_loop_, compact": two_loop("compact", P, M),
        "lbfgs_two_loop_, compact, a vector": two_loop("compact", g[0], g[1]),
        "lbfgs_push_": ("lbfgs_push_", [S, Y, rho, pushed, counts, g[0], g[1], g[2], ok]),
        "kron_precondition_": ("kron_precondition_", [P, H_g, M, H_a, work]),
        "kron_precondition_, no H_g": ("kron_precondition_", [P, [], M, H_a, work]),
        "momentum_": ("momentum_", [M, dW, db, W, b, 0.9, 1e-5, ok]),
        "descend_": ("descend_", [W, b, P, scalars, ok]),
        "slope_": ("slope_", [g[0], W, b, P, dW, db]),
        "output_change_": ("output_change_", [g[0], W, b, P, a_bar, vectors(n_a)]),
        "restore_": ("restore_", [W, b, P, ok]),
        "kron_step_": (
            "kron_step_", [W, b, M, P, work, dW, db, H_g, H_a, scalars, 0.9, 1e-5, ok],
        ),
        "judge_": judge(empty(()), 10),
        "judge_, no slope, no restarts": judge([], None),
    }  # fmt: skip
