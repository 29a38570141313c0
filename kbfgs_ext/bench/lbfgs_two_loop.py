"""lbfgs_two_loop: arguments with full rings; the BLAS composition is the compact form."""

from __future__ import annotations

import functools

import torch

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers
from kbfgs_ext.ops import registry

MEMORIES = (10, 100)


def _rings(layers: Layers, make: Numbers, p: int) -> Arguments:
    """S, Y, rho, pushed: p pairs of one positive definite matrix each."""
    S = [make.normal(p, x.n_g) / x.n_g**0.5 for x in layers]
    Y = [v * torch.linspace(1, 2, v.shape[1], device=v.device) for v in S]
    rho = [1 / (a * b).sum(1) for a, b in zip(S, Y, strict=True)]
    pushed = [torch.tensor(p, device=make.device) for _ in layers]
    return dict(S=S, Y=Y, rho=rho, pushed=pushed)


def _two_loop(layers: Layers, make: Numbers, p: int) -> Arguments:
    Q = [make.normal(x.n_g, x.n_a) for x in layers]
    return _rings(layers, make, p) | dict(out=[make.unset(*q.shape) for q in Q], Q=Q, form="auto")


def _compact(out: list, Q: list, S: list, Y: list, rho: list, pushed: list) -> None:
    call = dict(out=out, Q=Q, S=S, Y=Y, rho=rho, pushed=pushed, form="compact")
    registry.implementation("lbfgs_two_loop_", "reference").run(call)


def _push(layers: Layers, make: Numbers, p: int) -> Arguments:
    s, y = (list(c) for c in zip(*(make.pair(make.spd(x.n_g)) for x in layers), strict=True))
    counts, c = [make.counts() for _ in layers], [make.vector(x.n_g) for x in layers]
    return _rings(layers, make, p) | dict(counts=counts, s=s, y=y, c=c, ok=None)


KERNELS = (
    *(
        Kernel(
            f"lbfgs_two_loop_, p = {p}",
            "lbfgs_two_loop_",
            functools.partial(_two_loop, p=p),
            _compact,
        )
        for p in MEMORIES
    ),
    Kernel("lbfgs_push_", "lbfgs_push_", functools.partial(_push, p=MEMORIES[-1])),
)
