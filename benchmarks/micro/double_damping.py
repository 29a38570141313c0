"""double_damping: arguments. Vector work: there is no BLAS composition but the reference itself."""

from __future__ import annotations

from typing import Any

from benchmarks.micro.kernel import Kernel, Layers, Numbers


def _ema(layers: Layers, make: Numbers) -> list[Any]:
    return [*([make.vector(x.n_g) for x in layers] for _ in range(6)), 0.9, None]


def _damping(layers: Layers, make: Numbers) -> list[Any]:
    H = [make.spd(x.n_g) for x in layers]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H), strict=True))
    Hy, counts = [make.unset(len(h)) for h in H], [make.counts() for _ in H]
    return [s, y, Hy, counts, H, [make.scalar(0.55) for _ in H], 0.2, None]


KERNELS = (
    Kernel("pair_ema_", "pair_ema_", _ema),
    Kernel("double_damping_", "double_damping_", _damping),
)
