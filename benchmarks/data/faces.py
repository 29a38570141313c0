"""FACES: the original 25 x 25 patches, or patches of the same recipe cut from the ORL faces."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data.base import DataError, Dataset, find_file, load_mat

ORIGINAL = "newfaces_rot_single.mat"
ORL = "orl_faces.npz"
SIDE = 25  # pixels
TRAIN, TEST = 103_500, 41_400  # patches of the original: its first and its last columns
PERSONS, TRAIN_PERSONS, TEST_PERSONS = 40, 25, 10  # the five in between are not used
PATCHES_PER_IMAGE = 414  # of the original: 165,600 patches / 400 images
SEED = 0

# The original's zoom and crop were never published. Width of a patch and play of its centre are
# fractions of the image width, chosen so that a patch at 45 degrees still lies inside the image:
# 0.65 / sqrt(2) + 0.03 * sqrt(2) < 0.5.
PATCH_WIDTH = 0.65
CENTRE_PLAY = 0.03
MAX_ANGLE = math.pi / 2  # rotations within +-90 degrees
CREDIT = "AT&T Laboratories Cambridge (ORL)"


def load(folder: Path | None, patches_per_image: int = PATCHES_PER_IMAGE) -> Dataset:
    """The original file from ``folder`` (or ``folder/faces``), else patches cut from 400 faces.

    The faces come from ``orl_faces.npz`` in the same place, else from scikit-learn, which downloads
    them once.
    """
    if patches_per_image < 1:
        raise DataError(f"patches_per_image must be at least 1, got {patches_per_image}")
    original = find_file(folder, ORIGINAL, f"faces/{ORIGINAL}")
    if original is not None:
        return _load_original(original)
    path = find_file(folder, ORL, f"faces/{ORL}")
    images, person, source = _read_orl(path) if path is not None else _fetch_olivetti(folder)
    generator = torch.Generator().manual_seed(SEED)
    train, test = (
        cut_patches(images[chosen], patches_per_image, generator)
        for chosen in (person < TRAIN_PERSONS, person >= PERSONS - TEST_PERSONS)
    )
    # As in the original: mean 0 per pixel and one scale for all, so that the average variance is 1.
    mean = train.mean(0)
    scale = train.var(0, correction=0).mean().rsqrt()
    train.sub_(mean).mul_(scale)
    test.sub_(mean).mul_(scale)
    return Dataset.of(
        "faces",
        f"FACES-like ({len(images)} ORL faces)",
        f"{CREDIT}, {source}; rotated within +-90 degrees, cropped, subsampled and normalised by "
        f"kbfgs_ext with seed {SEED}, {patches_per_image} patches per image",
        train,
        test,
    )


def _load_original(path: Path) -> Dataset:
    (columns,) = load_mat(path, "newfaces_single")
    if columns.shape[0] != SIDE * SIDE or columns.shape[1] < TRAIN + TEST:
        raise DataError(
            f"{path}: newfaces_single must have {SIDE * SIDE} rows and at least "
            f"{TRAIN + TEST} columns, got {tuple(columns.shape)}"
        )
    return Dataset.of(
        "faces",
        f"FACES ({TRAIN:,})",
        f"{ORIGINAL}, made by Hinton and Salakhutdinov from faces of {CREDIT}",
        columns[:, :TRAIN].T.contiguous(),
        columns[:, -TEST:].T.contiguous(),
    )


def _read_orl(path: Path) -> tuple[Tensor, Tensor, str]:
    with np.load(path) as content:
        if not {"images", "person"} <= set(content.files):
            raise DataError(f"{path} must hold the arrays images and person, has {content.files}")
        images, person = content["images"], content["person"]
    if images.ndim != 3 or person.shape != images.shape[:1]:
        raise DataError(f"{path}: images {images.shape} and person {person.shape} do not fit")
    height, width = images.shape[1:]
    pixels = torch.from_numpy(images.astype(np.float32)) / 255
    return pixels, torch.from_numpy(person), f"{height} x {width} pixels"


def _fetch_olivetti(folder: Path | None) -> tuple[Tensor, Tensor, str]:
    try:
        from sklearn.datasets import fetch_olivetti_faces

        faces = fetch_olivetti_faces(n_retries=1)
    except (ImportError, OSError) as error:
        place = f"into {folder}" if folder else "into a folder named with --data"
        raise DataError(
            f"no faces: put {ORIGINAL}, or {ORL} with the arrays images (400, height, width) and "
            f"person (400), {place}; scikit-learn could not supply them either ({error})"
        ) from error
    return (
        torch.from_numpy(np.asarray(faces.images, dtype=np.float32)),
        torch.from_numpy(np.asarray(faces.target)),
        "Olivetti version of scikit-learn, 64 x 64 pixels",
    )


def cut_patches(images: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    """``per_image`` rotated patches (rows of 625 pixels) of each image (n, height, width).

    Patches of one image lie together, images in their order.
    """
    count, height, width = images.shape
    extent = PATCH_WIDTH * width  # pixels of the image
    # Low-pass to about half the distance of the samples, so that subsampling does not alias.
    source = _blur(images, sigma=extent / SIDE / 2)[:, None]
    ticks = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    y, x = (axis.flatten() * extent for axis in torch.meshgrid(ticks, ticks, indexing="ij"))
    patches = torch.empty(count, per_image, SIDE * SIDE)
    for i in range(count):
        draw = torch.rand(3, per_image, 1, generator=generator) * 2 - 1
        angle = draw[0] * MAX_ANGLE
        centre_x, centre_y = draw[1] * CENTRE_PLAY * width, draw[2] * CENTRE_PLAY * width
        column = x * angle.cos() - y * angle.sin() + centre_x  # pixels from the image's centre
        row = x * angle.sin() + y * angle.cos() + centre_y
        grid = torch.stack([2 * column / width, 2 * row / height], dim=-1)[None]
        patches[i] = F.grid_sample(source[i : i + 1], grid, align_corners=False)[0, 0]
    return patches.flatten(0, 1)


def _blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (n, height, width), ``sigma`` in pixels, edges repeated."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = F.pad(images[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]
