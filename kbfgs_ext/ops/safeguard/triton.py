"""safeguard in Triton: admission (20) and judgement (14), launches of one program each, in
double."""

from __future__ import annotations

import triton
import triton.language as tl

from kbfgs_ext.ops.triton_common import (
    finite,
    flag,
    launch,
    number,
    pointer,
    real_type,
    vector,
)

SKIPPED, UNDONE, RESTARTS = (tl.constexpr(i) for i in range(1, 4))  # words of `counts`
ORDER_G, WAITING, SOUND_PAIR, ORDER_A = (tl.constexpr(i) for i in range(1, 5))  # of `decision`
LENGTH = 256  # norms at a time


@triton.jit
def _admit(
    sound, counts, decision, loss, norms, n: tl.int64, TAKE: tl.constexpr, LENGTH: tl.constexpr
):
    bad = tl.zeros((LENGTH,), tl.int32)
    for i0 in tl.range(0, n, LENGTH):
        bad |= (~finite(vector(norms, i0 + tl.arange(0, LENGTH), n))).to(tl.int32)
    fine = (tl.max(bad, 0) == 0) & finite(tl.load(loss))  # (20)
    tl.store(sound, fine)
    tl.store(counts, tl.load(counts) + 1)
    tl.store(counts + SKIPPED, tl.load(counts + SKIPPED) + tl.where(fine, 0, 1))
    order = tl.load(decision + WAITING) != 0
    if TAKE:
        tl.store(decision + WAITING, order & ~fine)
        tl.store(decision + ORDER_A, order & fine)
    else:
        tl.store(decision + ORDER_A, fine & ~fine)


@triton.jit
def _judge(
    scale, watched, counts, decision, loss, loss_next, slope, ok, noise: tl.float64,
    shrink: tl.float64, grow: tl.float64, sufficient: tl.float64, smallest: tl.float64,
    surge: tl.float64, window: tl.int64, after: tl.int64, T: tl.constexpr, WATCH: tl.constexpr,
    TAKE: tl.constexpr,
):  # fmt: skip
    before, now = tl.load(scale).to(tl.float64), tl.load(loss).to(tl.float64)
    after_step = tl.load(loss_next).to(tl.float64)
    rise, room = after_step - now, noise * tl.abs(now)
    undo = tl.where(finite(after_step) & ~(rise > room), 0, 1)
    fine = flag(ok).to(tl.int32)
    order = tl.full((), 0, tl.int32)
    if WATCH:
        stuck = tl.load(watched).to(tl.float64) + 1
        stuck *= tl.where(before <= smallest, undo, 0).to(tl.float64)
        seen = tl.load(watched + 1).to(tl.float64) + 1
        window = number(window, tl.float64)
        seen = tl.where(seen > window, window, seen)
        mean = tl.load(watched + 2).to(tl.float64)
        mean += (now - mean) / seen
        lowest = tl.load(watched + 3).to(tl.float64)
        lower = (seen == window) & ((mean < lowest) | (mean != mean))
        lowest = tl.where(lower, mean, lowest)
        risen = (mean > surge * lowest) & (lowest > 0)
        order = tl.where((stuck >= after) | risen, fine, 0)
        sound = fine != 0
        tl.store(watched, tl.where(order != 0, 0.0, stuck).to(T), mask=sound)
        tl.store(watched + 1, tl.where(order != 0, 0.0, seen).to(T), mask=sound)
        tl.store(watched + 2, tl.where(order != 0, 0.0, mean).to(T), mask=sound)
        tl.store(watched + 3, tl.where(order != 0, float("inf"), lowest).to(T), mask=sound)
    new = before * grow
    if slope is not None:
        enough = room - rise >= -sufficient * tl.load(slope).to(tl.float64)
        new = tl.where(enough, new, before / grow)
    new = tl.where(undo != 0, before * shrink, new)
    new = tl.where(new < smallest, smallest, new)
    new = tl.where(new > 1, 1.0, new)
    tl.store(scale, new.to(T), mask=fine != 0)
    undo *= fine
    tl.store(counts + UNDONE, tl.load(counts + UNDONE) + undo)
    tl.store(counts + RESTARTS, tl.load(counts + RESTARTS) + order)
    tl.store(decision, undo != 0)
    tl.store(decision + ORDER_G, order != 0)
    waiting = (tl.load(decision + WAITING) != 0) | (order != 0)
    if TAKE:
        tl.store(decision + ORDER_A, waiting & (fine != 0))
        waiting = waiting & (fine == 0)
    tl.store(decision + WAITING, waiting)
    tl.store(decision + SOUND_PAIR, finite(after_step) & (fine != 0))


def admit_(sound, counts, decision, loss, norms, take) -> None:
    """(20): one launch for each step."""
    if not norms:
        return
    real_type(*norms, *loss)
    for t in (*norms, *counts, *decision):
        pointer(t)  # declines what has gaps
    for i, own in enumerate(norms):
        launch(
            _admit, 1, sound[i], counts[i], decision[i], loss[i], own, own.numel(),
            TAKE=bool(take), LENGTH=LENGTH, num_warps=1, device=own.device,
        )  # fmt: skip


def judge_(scale, watched, counts, decision, loss, loss_next, slope, noise, shrink, grow,
           sufficient, smallest, surge, window, restart_after, take, ok) -> None:  # fmt: skip
    """(14): one launch for each judgement."""
    if not scale:
        return
    T = real_type(*scale, *watched, *loss, *loss_next, *slope)
    for t in (*watched, *counts, *decision):
        pointer(t)  # declines what has gaps
    for i, own in enumerate(scale):
        launch(
            _judge, 1, own, watched[i], counts[i], decision[i], loss[i], loss_next[i],
            slope[i] if slope else None, ok, noise, shrink, grow, sufficient, smallest, surge,
            window, restart_after or 1, T=T, WATCH=restart_after is not None, TAKE=bool(take),
            num_warps=1, device=own.device,
        )  # fmt: skip
