"""Builders of calls of admit_ and judge_: cases.py has the calls."""

from __future__ import annotations

import math

import torch

from tests.helpers.inputs import in_dtype

SMALLEST, WINDOW, AFTER = 2.0**-20, 50, 3
# scale; steps stuck, losses seen, their mean, its lowest; loss before and after; slope.
JUDGED = {
    "first": (1.0, (0, 0, 0, math.inf), 10.0, 9.0, -1.0),
    "short": (0.5, (2, 4, 10, math.inf), 10.0, 9.0, -2.1),
    "uphill": (0.5, (1, 7, 11, math.inf), 10.0, 9.0, 3.0),
    "rounding": (0.5, (0, 7, 11, math.inf), 10.0, 10.0 + 2.0**-16, -1e-5),
    "undone": (0.5, (0, 60, 10, 9), 10.0, 11.0, -1.0),
    "smallest": (SMALLEST, (1, 50, 10, 9), 10.0, 11.0, -1.0),
    "stuck": (SMALLEST, (2, 50, 10, 9), 10.0, 11.0, -1.0),
    "nothing": (0.25, (2, 50, 10, 9), 10.0, math.nan, -1.0),
    "full": (1.0, (0, 49, 10, math.inf), 8.0, 7.0, -1.0),
    "lower": (0.97, (0, 50, 10, 9.99), 9.0, 8.0, -1.0),
    "surge": (0.5, (0, 50, 30, 9), 20.0, 19.0, -1.0),
    "negative": (0.5, (0, 50, -3, -9), -2.0, -3.0, -1.0),
    "enough": (0.5, (0, 4, 10, math.inf), 10.0, 9.0, -1.9),
    "zero": (0.5, (0, 4, 10, math.inf), 0.0, 0.1, -1.0),
    "bottomless": (0.5, (0, 4, 10, math.inf), 10.0, -math.inf, -1.0),
}


def admit(*lengths, value=1.0, loss=2.0, take=False, ordered=False):
    """Norms of these numbers, the last one ``value``."""

    def build(dtype):
        norms = [torch.arange(1.0, n + 1, dtype=torch.float64) for n in lengths]
        for own in norms:
            own[-1] = value
        losses = [torch.tensor(loss, dtype=torch.float64) for _ in lengths]
        norms, losses = in_dtype(dtype, [norms, losses])
        return dict(
            sound=[torch.tensor(True) for _ in lengths],
            counts=[torch.tensor([9, 1, 4, 1]) for _ in lengths],
            decision=[torch.tensor([True, False, ordered, True, True]) for _ in lengths],
            loss=losses, norms=norms, take=take,
        )  # fmt: skip

    return build


def judge(
    *kinds: str, sloped=True, restart_after=AFTER, ok=None, ordered=False, take=False, noise=1e-5
):
    """All kinds unless some are named; ``ordered``: an activation side is still to restart."""

    def build(dtype):
        rows = [JUDGED[kind] for kind in kinds or JUDGED]
        lists = [
            [torch.tensor(row[k], dtype=torch.float64) for row in rows] for k in range(len(rows[0]))
        ]
        scale, watched, loss, loss_next, slope = in_dtype(dtype, lists)
        counts = [torch.tensor([9, 1, 4, 1]) for _ in rows]
        decision = [torch.tensor([True, True, ordered, True, False]) for _ in rows]
        return dict(
            scale=scale, watched=watched, counts=counts, decision=decision, loss=loss,
            loss_next=loss_next, slope=slope if sloped else [], noise=noise, shrink=0.5, grow=1.1,
            sufficient=0.5, smallest=SMALLEST, surge=2.0, window=WINDOW,
            restart_after=restart_after, take=take, ok=ok,
        )  # fmt: skip

    return build
