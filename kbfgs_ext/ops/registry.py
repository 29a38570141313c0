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

`prefer` puts another first for an op, or for some of its calls.

A call reaches a backend as one dict of its arguments by name. An implementation declines it by
raising `Unsupported` *before* it writes anything; then, and only then, `auto` tries the next
backend. Every other error propagates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kbfgs_ext import environment

FAMILIES = (
    "factor_ema",
    "double_damping",
    "bfgs_update",
    "lbfgs_two_loop",
    "kron_precondition",
    "safeguard",
    "spectral",
)
BACKENDS = ("cuda", "triton", "cpu", "reference")


Call = dict[str, Any]  # an op's arguments by name, without `backend`


class Unsupported(Exception):
    """A backend cannot take this call; the message says why. Nothing has been written."""


@dataclasses.dataclass(frozen=True)
class Op:
    """An op as its public function declares it."""

    name: str
    family: str
    arguments: tuple[str, ...]  # in order; the last is `backend`
    defaults: Mapping[str, Any]

    def positional(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
        """The arguments in order; what is not given has its default."""
        return *args, *map({**self.defaults, **kwargs}.__getitem__, self.arguments[len(args) :])

    def call(self, args: tuple, kwargs: Mapping[str, Any]) -> Call:
        """The arguments by name, `backend` among them; what is not given has its default."""
        if len(args) < len(self.arguments):
            args = self.positional(args, kwargs)
        return dict(zip(self.arguments, args, strict=True))


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One backend of one op.

    ``run`` takes a call; ``unavailable`` returns why the backend cannot work in this process at all
    (not built, not importable), or None.
    """

    op: str
    backend: str
    run: Callable[[Call], None]
    unavailable: Callable[[], str | None]


@dataclasses.dataclass(frozen=True)
class Taken:
    """The backend that took an op's last call, and why those before it did not."""

    backend: str
    declined: tuple[str, ...]


_watched: dict[str, Taken] | None = None  # where `watch` notes the calls, if it does
_asked: tuple[str | None, bool] = None, False  # `_environment` when it began


def _environment() -> tuple[str | None, bool]:
    """The backend that is asked for, and whether Triton is interpreted."""
    return environment.forced_backend(), environment.triton_interpreted()


_OPS: dict[str, Op] = {}
_TABLE: dict[str, dict[str, Implementation]] = {}
_PREFERRED: dict[str, tuple[str, Callable[[Call], bool] | None]] = {}


def declare(name: str, family: str, signature: inspect.Signature) -> Op:
    """Make an op known."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family: {family!r}")
    given = signature.parameters
    defaults = {n: p.default for n, p in given.items() if p.default is not inspect.Parameter.empty}
    _TABLE[name] = {}
    _OPS[name] = Op(name, family, tuple(given), defaults)
    return _OPS[name]


def register(
    op: str,
    backend: str,
    run: Callable[[Call], None],
    unavailable: Callable[[], str | None] = lambda: None,
) -> None:
    """``run`` is the ``backend`` implementation of ``op`` from now on."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend: {backend!r}")
    _TABLE[op][backend] = Implementation(op, backend, run, unavailable)


def prefer(op: str, backend: str, where: Callable[[Call], bool] | None = None) -> None:
    """Let "auto" try ``backend`` first: in all calls of ``op``, or ``where`` it is worth it."""
    _PREFERRED[op] = backend, where


def order(op: str, call: Call | None = None) -> tuple[str, ...]:
    """The backends as "auto" tries them for a call; without one, as for most calls."""
    first, where = _PREFERRED.get(op, (BACKENDS[0], None))
    if where is not None and (call is None or not where(call)):
        return BACKENDS
    return first, *(name for name in BACKENDS if name != first)


def by_name(function: Callable[..., None]) -> Callable[[Call], None]:
    """``function`` as one of a call, from which it gets the arguments that it names."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def run(call: Call) -> None:
        function(**{name: call[name] for name in names})

    return run


def ops() -> dict[str, str]:
    """Every op with its family."""
    return {name: op.family for name, op in sorted(_OPS.items())}


def declaration(op: str) -> Op:
    """What the public function of ``op`` declares."""
    return _OPS[op]


def implementation(op: str, backend: str) -> Implementation:
    """The implementation of ``op`` on ``backend``."""
    return _TABLE[op][backend]


def available(op: str, backend: str) -> bool:
    """Whether ``op`` has a ``backend`` that can work in this process."""
    return _TABLE[op][backend].unavailable() is None


def run(op: str, backend: str, call: Call) -> None:
    """Run ``op`` on ``backend``; for "auto" on the first backend that takes the call."""
    if backend == "auto":
        backend = (_environment() if _watched is None else _asked)[0] or "auto"
    if backend != "auto":
        reason = _run_one(op, backend, call)
        if reason is not None:
            raise Unsupported(reason)
        _note(op, backend, ())
        return
    declined: list[str] = []
    for name in order(op, call):
        reason = _run_one(op, name, call)
        if reason is None:
            _note(op, name, declined)
            return
        declined.append(f"{name}: {reason}")
    raise Unsupported(f"no backend takes this call of {op}: " + "; ".join(declined))


def _run_one(op: str, backend: str, call: Call) -> str | None:
    """Run ``op`` on ``backend``, or say why that does not take the call."""
    found = _TABLE[op].get(backend)
    if found is None:
        return f"{op} has no {backend} backend"
    reason = _wrong_device(backend, call.values()) or found.unavailable()
    if reason is not None:
        return reason
    try:
        found.run(call)
    except Unsupported as error:
        return str(error)
    return None


def _note(op: str, backend: str, declined: Sequence[str]) -> None:
    if _watched is not None:
        known = _watched.get(op)
        if known is None or BACKENDS.index(known.backend) <= BACKENDS.index(backend):
            _watched[op] = Taken(backend, tuple(declined))


@contextlib.contextmanager
def watch(into: dict[str, Taken]) -> Iterator[None]:
    """Context: note in ``into`` which backend each op takes; of several calls the slowest one's.
    The environment is asked once."""
    global _watched, _asked
    before = _watched, _asked
    _watched, _asked = into, _environment()
    try:
        yield
    finally:
        _watched, _asked = before


def watching() -> bool:
    """Whether a `watch` is on: the caller is a step of an optimizer."""
    return _watched is not None


def explain_step(taken: Mapping[str, Taken]) -> str:
    """What `watch` has noted, for people; ops on the reference first."""
    slow = [op for op, how in taken.items() if how.backend == "reference"]
    lines = [
        f"backends of the last step ({environment.versions()});"
        f" on the reference: {', '.join(sorted(slow)) or 'none'}",
    ]
    for op in sorted(taken, key=lambda op: (taken[op].backend != "reference", op)):
        how = taken[op]
        reasons = "".join(f"; not {reason}" for reason in how.declined)
        lines.append(f"  {ops()[op]}/{op}: {how.backend}{reasons}")
    return "\n".join(lines)


def _wrong_device(backend: str, args: Iterable[Any]) -> str | None:
    """Why ``backend`` does not run where the tensors of ``args`` are, of a list its first, or
    None."""
    if backend == "reference":
        return None
    on_cpu = backend == "cpu"
    for arg in args:
        item = arg[0] if isinstance(arg, (list, tuple)) and arg else arg
        if not isinstance(item, torch.Tensor) or (item.is_cpu if on_cpu else item.is_cuda):
            continue
        if backend == "triton" and (_environment() if _watched is None else _asked)[1]:
            return None
        kind = "cpu" if on_cpu else "cuda"
        return f"the {backend} backend needs {kind} tensors, got {item.device}"
    return None


def explain(
    device: str | torch.device | None = None,
    op: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> str:
    """Which backend each op would take on ``device``, and why not the others.

    Args:
        device: CUDA where there is one, else the CPU, unless given.
        op: one op alone, such as "kron_step_".
        args: with ``op``: a call's arguments by name, without the backend. Every backend is then
            tried on copies of them, which also shows what depends on dtype, layout and size.

    Raises:
        ValueError: there is no such op, or ``args`` come without one or are not its own.
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
        for name in order(name_of_op):
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


def _explain_call(op: str, args: Mapping[str, Any]) -> str:
    declared, chosen, reasons = declaration(op), None, []
    own = set(declared.arguments) - {"backend"}
    if unfit := (args.keys() - own) | (own - args.keys() - declared.defaults.keys()):
        raise ValueError(f"args do not fit {op}: {', '.join(sorted(unfit))}")
    call = declared.call((), args)
    del call["backend"]
    forced = environment.forced_backend()
    for name in order(op, call):
        copies = {
            k: [t.clone() for t in a] if isinstance(a, (list, tuple)) else a
            for k, a in call.items()
        }
        skipped = forced and name != forced
        reason = f"KBFGS_BACKEND={forced}" if skipped else _run_one(op, name, copies)
        if reason is None:
            chosen = chosen or name
        else:
            reasons.append(f"not {name}: {reason}")
    return f"{declared.family}/{op}: {chosen or 'none'}" + "".join(f"; {r}" for r in reasons)


def _why_not(op: str, backend: str, kind: str) -> str | None:
    reason = _TABLE[op][backend].unavailable()
    if reason is not None:
        return reason
    try:
        return _wrong_device(backend, (torch.empty(0, device=torch.device(kind)),))
    except (RuntimeError, AssertionError):  # the device itself is not there
        return f"no {kind} device here"
