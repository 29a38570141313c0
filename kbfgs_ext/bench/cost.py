"""What a call of an op costs at least: ``cost(op, args) -> Cost(bytes, flops)``.

Bytes are a floor: every argument that is read counts once, every argument that is written once
more, scratch not at all. Symmetric matrices count whole, since they are stored whole, but where an
op computes one half of them. FLOPs are the leading terms, additions and multiplications apart; of a
symmetric product, one half. Only shapes and dtypes are looked at: tensors on the meta device do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kbfgs_ext import ops as ops  # declares them

Arguments = dict[str, Any]


class Cost(NamedTuple):
    """Bytes moved and floating-point operations done."""

    bytes: int
    flops: int


def cost(op: str, args: Arguments) -> Cost:
    """The cost of ``op`` on ``args``: its arguments by name, ``backend`` left out."""
    schema = getattr(torch.ops.kbfgs_ext, op).default._schema
    written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    moved = 0.0
    for name, value in args.items():
        times = _read_share(op, name, args) + (name in written)
        moved += times * _bytes(op, name, value)
    return Cost(round(moved), _FLOPS[op](args))


# The share that is read of what is written, where that is not all of it.
_READ_SHARE = {
    ("factor_ema_", "A"): 0.5,  # symmetric: one half is computed, both are stored
    ("factor_ema_", "a_bar"): 0,
    ("hessian_action_", "y"): 0,
    ("lbfgs_two_loop_", "out"): 0,
    ("lbfgs_push_", "S"): 0,
    ("lbfgs_push_", "Y"): 0,
    ("lbfgs_push_", "rho"): 0,
    ("kron_precondition_", "P"): 0,
    ("kron_step_", "P"): 0,
    ("slope_", "slope"): 0,
    ("output_change_", "change"): 0,
    ("measure_inputs_", "lam_a"): 0,
    ("lengths_", "sizes"): 0,
    ("admit_", "sound"): 0,
    ("restore_", "W"): 0,  # where there is something to undo
    ("restore_", "b"): 0,
}


def _read_share(op: str, name: str, named: Arguments) -> float:
    if op == "double_damping_" and name == "Hy":
        return 0 if named["H"] else 1
    return _READ_SHARE.get((op, name), 1)


def _bytes(op: str, name: str, value: Any) -> int:
    if op == "restart_" and name not in ("marks", "counts"):
        return 0  # of a call that restarts nothing: all but a few in a run
    tensors = [value] if isinstance(value, torch.Tensor) else value
    if name == "work" or not isinstance(tensors, list):
        return 0
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]  # a list may be of numbers
    one_row = op == "lbfgs_push_" and name in ("S", "Y", "rho")
    return sum(t.numel() * t.element_size() // (len(t) if one_row else 1) for t in tensors)


def _sum(count: Callable[..., int], *lists: list[torch.Tensor]) -> int:
    """The sum over the layers of ``count(tensor, ...)``."""
    return sum(count(*tensors) for tensors in zip(*lists, strict=True))


def _square(H: torch.Tensor) -> int:
    return len(H) ** 2


def _factor_ema(a: Arguments) -> int:
    if not a["A"]:
        return _sum(torch.numel, a["X"])
    return _sum(lambda A, X: len(X) * len(A) * (len(A) + 1), a["A"], a["X"])


def _hessian_action(a: Arguments) -> int:
    return 4 * _sum(torch.numel, a["X"])  # two matrix-vector products


def _double_damping(a: Arguments) -> int:
    return 2 * _sum(_square, a["H"]) + 8 * _sum(len, a["s"])


def _bfgs_update(a: Arguments) -> int:
    return (4 if a["Hy"] else 6) * _sum(_square, a["H"])


def _curvature_update(a: Arguments) -> int:
    with_A, with_X = 10 * _sum(_square, a["A"]), 4 * _sum(torch.numel, a["X"])
    a_side = with_A or with_X + 8 * _sum(_square, a["H_a"])
    return a_side + 6 * _sum(_square, a["H_g"])


def _lbfgs_two_loop(a: Arguments) -> int:
    return 8 * _sum(lambda Q, S: len(S) * Q.numel(), a["Q"], a["S"])


def _kron_precondition(a: Arguments) -> int:
    sides = [H for H in (a["H_g"], a["H_a"]) if H]  # a side without factors is the identity
    return sum(_sum(lambda M, H: 2 * M.numel() * len(H), a["M"], H) for H in sides)


def _momentum(a: Arguments) -> int:
    return 5 * _sum(torch.numel, a["M"])


def _descend(a: Arguments) -> int:
    return 2 * _sum(torch.numel, a["P"])


def _polar(a: Arguments) -> int:
    """k^3 FLOPs for an inverse, and for a product of which half is made."""
    inner = 4 * (len(a["coefficients"]) // 3) - 3 if a["shifts"] is None else len(a["shifts"])
    sides = [sorted(P.shape) for P in a["P"]]
    return sum(3 * k * k * n + inner * k**3 for k, n in sides)


_FLOPS: dict[str, Callable[[Arguments], int]] = {
    "factor_ema_": _factor_ema,
    "hessian_action_": _hessian_action,
    "pair_ema_": lambda a: 7 * _sum(len, a["s"]),
    "double_damping_": _double_damping,
    "bfgs_update_": _bfgs_update,
    "curvature_update_": _curvature_update,
    "lbfgs_two_loop_": _lbfgs_two_loop,
    "restart_": lambda a: 0,
    "lbfgs_push_": lambda a: 8 * _sum(len, a["s"]),
    "kron_precondition_": _kron_precondition,
    "momentum_": _momentum,
    "descend_": _descend,
    "slope_": lambda a: 3 * _sum(torch.numel, a["saved"]),
    "output_change_": lambda a: 5 * _sum(torch.numel, a["saved"]),
    "restore_": lambda a: 0,
    "admit_": lambda a: 0,
    "judge_": lambda a: 0,
    "lengths_": lambda a: 0,
    "measure_inputs_": lambda a: 0,
    "measure_pair_": lambda a: 7 * _sum(len, a["g_bar"]),
    "polar_": _polar,
    "kron_step_": lambda a: _momentum(a) + _kron_precondition(a) + _descend(a),
}
