"""double_damping, the mathematics: equations (5) to (7) of kbfgs_ext/ops/README.md."""

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
