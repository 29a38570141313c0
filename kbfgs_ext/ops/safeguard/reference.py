"""safeguard, the mathematics: equation (14) of ../README.md."""

from __future__ import annotations

import math

import torch

UNDONE, RESTARTS = 2, 3  # words of `counts`


def judge_(scale, watched, counts, decision, loss, loss_next, slope, noise, shrink, grow,
           sufficient, smallest, surge, window, restart_after, ok) -> None:  # fmt: skip
    for i in range(len(scale)):
        fine = torch.ones_like(decision[i][0]) if ok is None else ok
        decrease = loss[i] - loss_next[i] + noise * loss[i].abs()
        undo = ~(decrease >= 0)
        order = torch.zeros_like(undo)
        if restart_after is not None:
            stuck, seen, mean, lowest = watched[i].unbind()
            stuck = (stuck + 1) * (undo & (scale[i] <= smallest))
            seen = (seen + 1).clamp(max=window)
            mean = mean + (loss[i] - mean) / seen
            lowest = torch.where(seen == window, torch.minimum(lowest, mean), lowest)
            risen = (mean > surge * lowest) & (lowest > 0)
            order = ((stuck >= restart_after) | risen) & fine
            now = torch.stack((stuck, seen, mean, lowest)).masked_fill_(order, 0)
            now[3].masked_fill_(order, math.inf)
            watched[i].copy_(torch.where(fine, now, watched[i]))
        new = scale[i] * grow
        if slope:
            new = torch.where(decrease >= -sufficient * slope[i], new, scale[i] / grow)
        new = torch.where(undo, scale[i] * shrink, new).clamp(smallest, 1.0)
        scale[i].copy_(torch.where(fine, new, scale[i]))
        undo = undo & fine
        counts[i][UNDONE].add_(undo)
        counts[i][RESTARTS].add_(order)
        decision[i].copy_(torch.stack((undo, order, decision[i][2] | order)))
