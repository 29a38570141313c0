"""double_damping: arguments. Vector work: there is no BLAS composition but the reference itself."""

from __future__ import annotations

from kbfgs_ext.bench.kernel import Arguments, Kernel, Layers, Numbers


def _ema(layers: Layers, make: Numbers) -> Arguments:
    lists = ("s", "y", "h_change", "g_bar", "g_bar_next")
    vectors = {name: [make.vector(x.n_g) for x in layers] for name in lists}
    return vectors | dict(decay=0.9, ok=None)


def _damping(layers: Layers, make: Numbers) -> Arguments:
    H = [make.spd(x.n_g) for x in layers]
    s, y = (list(column) for column in zip(*(make.pair(h) for h in H), strict=True))
    Hy, counts = [make.unset(len(h)) for h in H], [make.counts() for _ in H]
    lam = [make.scalar(0.55) for _ in H]
    return dict(s=s, y=y, Hy=Hy, counts=counts, H=H, lam=lam, mu1=0.2, ok=None)


def _inputs(layers: Layers, make: Numbers) -> Arguments:
    v, lam_a, damping = ([make.scalar(1.0) for _ in layers] for _ in range(3))
    elements = tuple(float(make.batch * x.d_in) for x in layers)
    norms = [make.scalar(e**0.5).float() for e in elements]
    return dict(
        v=v, lam_a=lam_a, norms=norms, elements=elements, damping=damping, share=0.1, ok=None
    )


def _measured_pair(layers: Layers, make: Numbers) -> Arguments:
    ss, yy = ([make.scalar(1.0) for _ in layers] for _ in range(2))
    lists = ("g_bar", "g_bar_next", "h_change")
    vectors = {name: [make.vector(x.n_g) for x in layers] for name in lists}
    return dict(ss=ss, yy=yy, **vectors, share=0.0, ok=None)  # the gradients keep their length


KERNELS = (
    Kernel("measure_inputs_", "measure_inputs_", _inputs),
    Kernel("measure_pair_", "measure_pair_", _measured_pair),
    Kernel("pair_ema_", "pair_ema_", _ema),
    Kernel("double_damping_", "double_damping_", _damping),
)
