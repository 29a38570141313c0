"""Which backend runs an op: a table, a resolver, and an explanation.

Every op has up to four implementations, one per backend, in order of priority:

========== ======================================= =============================
backend    what it is                              where it runs
========== ======================================= =============================
cuda       C++/CUDA kernels (csrc)                 CUDA tensors
triton     Triton kernels                          CUDA tensors
cpu        C++ kernels (csrc)                      CPU tensors
reference  plain PyTorch, one equation per line    any device and dtype
========== ======================================= =============================

An implementation declines a call by raising `Unsupported` *before* it writes anything; then, and
only then, `auto` tries the next backend. Every other error propagates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from kbfgs_ext import environment

FAMILIES = (
    "factor_ema",
    "double_damping",
    "bfgs_update",
    "lbfgs_two_loop",
    "kron_precondition",
)
BACKENDS = ("cuda", "triton", "cpu", "reference")


class Unsupported(Exception):
    """A backend cannot take this call; the message says why. Nothing has been written."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    ``run`` takes the op's arguments without ``backend``; ``unavailable`` returns why the backend
    cannot work in this process at all (not built, not importable), or None.
    """

    op: str
    family: str
    backend: str
    run: Callable[..., None]
    unavailable: Callable[[], str | None]


_TABLE: dict[str, dict[str, Implementation]] = {}


def register(
    op: str, family: str, backend: str, unavailable: Callable[[], str | None] = lambda: None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: ``run`` is the ``backend`` implementation of ``op``."""
    if family not in FAMILIES or backend not in BACKENDS:
        raise ValueError(f"unknown family or backend: {family!r}, {backend!r}")

    def add(run: Callable[..., None]) -> Callable[..., None]:
        _TABLE.setdefault(op, {})[backend] = Implementation(op, family, backend, run, unavailable)
        return run

    return add


def ops() -> dict[str, str]:
    """Every op with its family."""
    return {op: next(iter(impls.values())).family for op, impls in sorted(_TABLE.items())}


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of ``op`` on ``backend``; raises `Unsupported` where there is none."""
    found = _TABLE[op].get(backend)
    if found is None:
        raise Unsupported(f"{op} has no {backend} backend")
    return found


def available(op: str, backend: str) -> bool:
    """Whether ``op`` has a ``backend`` that can work in this process."""
    found = _TABLE[op].get(backend)
    return found is not None and found.unavailable() is None


def check_device(backend: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise `Unsupported` unless ``backend`` runs where ``tensors`` are."""
    wanted = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}.get(backend)
    if wanted is None:
        return
    if backend == "triton" and environment.triton_interpreted():
        return
    for tensor in tensors:
        if tensor.device.type != wanted:
            raise Unsupported(f"the {backend} backend needs {wanted} tensors, got {tensor.device}")


def run(op: str, backend: str, args: tuple) -> None:
    """Run ``op`` on ``backend``; for "auto" on the first backend that takes the call."""
    if backend == "auto":
        backend = environment.forced_backend() or "auto"
    if backend != "auto":
        _run_one(implementation(op, backend), args)
        return
    declined = []
    for name in BACKENDS:
        found = _TABLE[op].get(name)
        if found is None:
            continue
        try:
            _run_one(found, args)
            return
        except Unsupported as reason:
            declined.append(f"{name}: {reason}")
    raise Unsupported(f"no backend takes this call of {op}: " + "; ".join(declined))


def _run_one(found: Implementation, args: tuple) -> None:
    reason = found.unavailable()
    if reason is not None:
        raise Unsupported(reason)
    check_device(found.backend, _tensors(args))
    found.run(*args)


def _tensors(args: tuple) -> list[torch.Tensor]:
    flat: list[torch.Tensor] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            flat.append(arg)
        elif isinstance(arg, (list, tuple)):
            flat.extend(item for item in arg if isinstance(item, torch.Tensor))
    return flat


def explain(
    device: str | torch.device | None = None, op: str | None = None, args: tuple | None = None
) -> str:
    """Which backend each op would take on ``device``, and why not the others.

    Args:
        device: CUDA where there is one, else the CPU, unless given.
        op: one op alone, such as "kron_step_".
        args: with ``op``: a call's arguments, without the backend. Every backend is then tried on
            copies of them, which also shows what depends on dtype, layout and size.

    Raises:
        ValueError: there is no such op, or ``args`` come without one.
    """
    if op is not None and op not in _TABLE:
        raise ValueError(f"op must be one of {', '.join(ops())}, got {op!r}")
    if args is not None:
        if op is None:
            raise ValueError("args are those of one op: op must be given with them")
        return _explain_call(op, args)
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    forced = environment.forced_backend()
    lines = [environment.summary(), f"backends for {kind} tensors:"]
    for name_of_op, family in ops().items():
        if op not in (None, name_of_op):
            continue
        chosen, reasons = None, []
        for name in BACKENDS:
            reason = _why_not(name_of_op, name, kind)
            if forced and name != forced:
                reason = f"KBFGS_BACKEND={forced}"
            if reason is None and chosen is None:
                chosen = name
            elif reason is not None:
                reasons.append(f"not {name}: {reason}")
        lines.append(
            f"  {family}/{name_of_op}: {chosen or 'none'}" + "".join(f"; {r}" for r in reasons)
        )
    return "\n".join(lines)


def _explain_call(op: str, args: tuple) -> str:
    chosen, reasons, forced = None, [], environment.forced_backend()
    for name in BACKENDS:
        copies = tuple([t.clone() for t in a] if isinstance(a, (list, tuple)) else a for a in args)
        try:
            if forced and name != forced:
                raise Unsupported(f"KBFGS_BACKEND={forced}")
            _run_one(implementation(op, name), copies)
            chosen = chosen or name
        except Unsupported as reason:
            reasons.append(f"not {name}: {reason}")
    return f"{ops()[op]}/{op}: {chosen or 'none'}" + "".join(f"; {r}" for r in reasons)


def _why_not(op: str, backend: str, kind: str) -> str | None:
    found = _TABLE[op].get(backend)
    if found is None:
        return "not written for this op"
    reason = found.unavailable()
    if reason is not None:
        return reason
    try:
        check_device(backend, [torch.empty(0, device=torch.device(kind))])
    except Unsupported as declined:
        return str(declined)
    except (RuntimeError, AssertionError):  # the device itself is not there
        return f"no {kind} device here"
    return None
