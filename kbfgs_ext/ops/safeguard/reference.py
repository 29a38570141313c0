"""safeguard, the mathematics: equations (14) and (20) of ../README.md."""

from __future__ import annotations

import math

import torch

STEPS, SKIPPED, UNDONE, RESTARTS = range(4)  # words of `counts`
UNDO, ORDER_G, WAITING, SOUND_PAIR, ORDER_A = range(5)  # words of `decision`


def admit_(sound, counts, decision, loss, norms, take) -> None:
    for i in range(len(norms)):
        sound[i].copy_(torch.isfinite(norms[i]).all() & torch.isfinite(loss[i]))  # (20)
        counts[i][STEPS].add_(1)
        counts[i][SKIPPED].add_(~sound[i])
        _take_order(decision[i], sound[i] & take)


def _take_order(decision, take) -> None:
    decision[ORDER_A].copy_(decision[WAITING] & take)
    decision[WAITING].logical_xor_(decision[ORDER_A])


def judge_(scale, watched, counts, decision, loss, loss_next, slope, noise, shrink, grow,
           sufficient, smallest, surge, window, restart_after, take, ok) -> None:  # fmt: skip
    for i in range(len(scale)):
        fine = torch.ones_like(decision[i][0]) if ok is None else ok
        rise, room = loss_next[i] - loss[i], noise * loss[i].abs()
        undo = ~torch.isfinite(loss_next[i]) | (rise > room)  # (14)
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
            new = torch.where(room - rise >= -sufficient * slope[i], new, scale[i] / grow)
        new = torch.where(undo, scale[i] * shrink, new).clamp(smallest, 1.0)
        scale[i].copy_(torch.where(fine, new, scale[i]))
        undo = undo & fine
        counts[i][UNDONE].add_(undo)
        counts[i][RESTARTS].add_(order)
        pair = torch.isfinite(loss_next[i]) & fine
        new = (undo, order, decision[i][WAITING] | order, pair)
        decision[i][:ORDER_A].copy_(torch.stack(new))
        if take:
            _take_order(decision[i], fine)
