"""CURVES: the original 28 x 28 drawings, or curves of the same recipe drawn here."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data.base import DataError, Dataset, find_file, load_mat

ORIGINAL = "digs3pts_1.mat"
SIDE = 28  # pixels
TRAIN, TEST = 20_000, 10_000  # images, as in the original
SEED = 0

# A quadratic through three points of a square overshoots it by an eighth at most, here 2.25 pixels;
# the margin keeps that and a pen's width on the page.
MARGIN = 4.5  # pixels
PEN = 0.7  # pixels, standard deviation of the stroke's profile
# Ink that is fainter is none. The pen's profile falls to denormal numbers a few pixels away, and
# many processors multiply those very slowly.
FAINTEST = 1e-6
# The fastest curve covers about 1.1 pixels per sample, close enough for its dots to merge.
SAMPLES = 96
CHUNK = 2_000  # images drawn at a time: 40 MB of temporaries


def load(folder: Path | None) -> Dataset:
    """The original file from ``folder`` (or ``folder/curves``), else 30,000 curves drawn here."""
    path = find_file(folder, ORIGINAL, f"curves/{ORIGINAL}")
    if path is not None:
        train, test = load_mat(path, "bdata", "bdatatest")
        if train.shape[-1] != SIDE * SIDE:
            raise DataError(f"{path}: bdata must have {SIDE * SIDE} columns, got {train.shape}")
        return Dataset.of(
            "curves",
            f"CURVES ({len(train):,})",
            f"{ORIGINAL}, Hinton and Salakhutdinov, as distributed by J. Martens",
            train,
            test,
        )
    images = draw(TRAIN + TEST, SEED)
    return Dataset.of(
        "curves",
        "CURVES-like (generated)",
        f"quadratics through three uniform points, soft pen, drawn by kbfgs_ext with seed {SEED}",
        images[:TRAIN],
        images[TRAIN:],
    )


def draw(count: int, seed: int) -> Tensor:
    """``count`` images (count, 784) in [0, 1] of the quadratic through three uniform points.

    The curve passes its points at t = 0, 1/2 and 1. Ink at a pixel is the Gaussian pen profile
    integrated along the curve's length, 1 on a straight stroke and cut off at 1 where it crosses
    itself; the Gaussian separates, so that an image is one product of two thin matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, 2, generator=generator) * (SIDE - 2 * MARGIN) + MARGIN
    t = (torch.arange(SAMPLES) + 0.5) / SAMPLES
    lagrange = torch.stack([(1 - 2 * t) * (1 - t), 4 * t * (1 - t), t * (2 * t - 1)])
    slope = torch.stack([4 * t - 3, 4 - 8 * t, 4 * t - 1])
    centres = torch.arange(SIDE) + 0.5
    images = torch.empty(count, SIDE * SIDE)
    # MKL settles on a kernel at a function's first call, and of two threads that make it together
    # one can get a coarse kernel (pytorch/pytorch#188792). One element is one thread's.
    torch.exp(torch.zeros(1))
    for start in range(0, count, CHUNK):
        chunk = points[start : start + CHUNK].mT  # (images, xy, point)
        place = chunk @ lagrange  # (images, xy, sample), pixels
        length = (chunk @ slope).norm(dim=1) / SAMPLES  # (images, sample), pixels
        # pen: (images, xy, sample, pixel)
        pen = torch.exp(-0.5 * ((place[..., None] - centres) / PEN) ** 2)
        ink = (pen[:, 1] * length[..., None]).mT @ pen[:, 0]  # (images, row, column)
        ink /= PEN * math.sqrt(2 * math.pi)
        ink[ink < FAINTEST] = 0
        images[start : start + CHUNK] = ink.clamp_(max=1).flatten(1)
    return images
