"""Builders of calls of measure_inputs_, measure_pair_ and lengths_: cases.py has the calls."""

from __future__ import annotations

import torch

from tests.helpers.inputs import in_dtype, random_vectors, scalars

STANDING = (0.0, 2.0, 1e-3)  # of moving averages: before the first, and after


def _averages(count, shift=0):
    return [torch.tensor(STANDING[(i + shift) % 3], dtype=torch.float64) for i in range(count)]


def measure_inputs(norms, ok=None, share=0.1):
    def build(dtype):
        (given,) = in_dtype(dtype, [[torch.tensor(n, dtype=torch.float64) for n in norms]])
        count = len(norms)
        return dict(
            v=_averages(count), lam_a=scalars(float("nan"), count), norms=given,
            elements=tuple(10.0 * (i + 1) for i in range(count)), damping=scalars(0.3, count),
            share=share, ok=ok,
        )  # fmt: skip

    return build


def measure_pair(sizes, ok=None, share=0.05, layout=lambda t: t):
    def build(dtype):
        vectors = in_dtype(dtype, [random_vectors(sizes, 10 * k) for k in range(3)])
        g_bar, g_bar_next, h_change = vectors
        return dict(
            ss=_averages(len(sizes)), yy=_averages(len(sizes), 1), g_bar=g_bar,
            g_bar_next=g_bar_next, h_change=[layout(h) for h in h_change], share=share, ok=ok,
        )  # fmt: skip

    return build


def lengths(groups, shared):
    """``groups`` holds the norms of each group's layers."""

    def build(dtype):
        norms = [torch.tensor(own, dtype=torch.float64) for own in groups]
        roots = [torch.arange(1.0, len(own) + 1, dtype=torch.float64).sqrt() for own in groups]
        (norms,) = in_dtype(dtype, [norms])
        return dict(
            sizes=[torch.full_like(r, float("nan")) for r in roots], norms=norms, roots=roots,
            step_size=scalars(0.3, len(groups)), shared=shared,
        )  # fmt: skip

    return build
