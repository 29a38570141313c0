"""double_damping, the mathematics: equations (5) to (7), (21), (22) of kbfgs_ext/ops/README.md."""

from __future__ import annotations

import torch

ACCEPTED, REJECTED, POWELL, LM = range(4)  # columns of `counts`


def pair_ema_(s, y, h_change, g_bar, g_bar_next, decay, ok) -> None:
    for i in range(len(s)):
        s_new = decay * s[i] + (1 - decay) * h_change[i]  # (5)
        y_new = decay * y[i] + (1 - decay) * (g_bar_next[i] - g_bar[i])  # (5)
        keep = torch.isfinite(s_new).all() & torch.isfinite(y_new).all()
        keep = keep if ok is None else keep & ok
        s[i].copy_(torch.where(keep, s_new, s[i]))
        y[i].copy_(torch.where(keep, y_new, y[i]))


def double_damping_(s, y, Hy, counts, H, lam, mu1, ok) -> None:
    for i in range(len(s)):
        mu2 = lam[i].to(s[i].dtype)
        if H:
            Hy[i].copy_(H[i] @ y[i])
        yes = torch.ones((), dtype=torch.bool, device=s[i].device) if ok is None else ok

        sy, yHy = s[i] @ y[i], y[i] @ Hy[i]
        powell = yes & ~(sy > mu1 * yHy)  # (6)
        theta = torch.where(powell, (1 - mu1) * yHy / (yHy - sy), 1.0)
        s[i].copy_(torch.where(powell, theta * s[i] + (1 - theta) * Hy[i], s[i]))

        sy, ss = s[i] @ y[i], s[i] @ s[i]
        lm = yes & ~(sy > mu2 * ss)  # (7)
        theta = torch.where(lm, (1 - mu2) * ss / (ss - sy), 1.0)
        y[i].copy_(torch.where(lm, theta * y[i] + (1 - theta) * s[i], y[i]))

        counts[i][POWELL] += powell
        counts[i][LM] += lm
        if H:
            Hy[i].copy_(H[i] @ y[i])


def measure_inputs_(v, lam_a, norms, elements, damping, share, ok) -> None:
    for i in range(len(v)):
        mean_square = norms[i].to(v[i].dtype).square() / elements[i]
        _follow(v[i], mean_square, share, ok)  # (21)
        new = torch.where(v[i] > 0, v[i], 1.0) * damping[i]  # inputs may all be 0: dead units
        lam_a[i].copy_(new if ok is None else torch.where(ok, new, lam_a[i]))


def measure_pair_(ss, yy, g_bar, g_bar_next, h_change, share, ok) -> None:
    for i in range(len(ss)):
        y = g_bar_next[i] - g_bar[i]
        for average, change in ((ss[i], h_change[i]), (yy[i], y)):
            _follow(average, change.to(average.dtype).square().sum(), share, ok)  # (22)
        known = (ss[i] > 0) & (yy[i] > 0)
        known = known if ok is None else known & ok
        unit = torch.where(known, (ss[i] / yy[i]).sqrt(), 1.0).to(y.dtype)
        g_bar[i].mul_(unit)
        g_bar_next[i].mul_(unit)


def _follow(average: torch.Tensor, new: torch.Tensor, share: float, ok) -> None:
    """The average begins with the first value that is finite and not 0."""
    followed = torch.where(average > 0, average.lerp(new, share), new)
    fine = torch.isfinite(new) if ok is None else torch.isfinite(new) & ok
    average.copy_(torch.where(fine, followed, average))
