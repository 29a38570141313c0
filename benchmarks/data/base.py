"""What every dataset is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


class DataError(RuntimeError):
    """Data is missing or not what it should be; the message says what to put where."""


@dataclass(frozen=True)
class Dataset:
    """Images as rows of float32 tensors on the CPU."""

    name: str  # mnist, curves or faces
    label: str  # what the images are, for tables and plots
    provenance: str  # who made them, and what was done to them here
    pixel_range: tuple[float, float]  # smallest and largest pixel of the training set
    train: Tensor  # (N, d)
    test: Tensor  # (N_test, d)

    @classmethod
    def of(cls, name: str, label: str, provenance: str, train: Tensor, test: Tensor) -> Dataset:
        """Check that ``train`` and ``test`` are finite image rows and measure the pixel range."""
        for part, images in (("train", train), ("test", test)):
            if images.ndim != 2 or images.dtype != torch.float32 or len(images) == 0:
                raise DataError(
                    f"{name}: the {part} set must be a non-empty float32 matrix, "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            if not bool(torch.isfinite(images).all()):
                raise DataError(f"{name}: the {part} set has pixels that are not finite")
        if train.shape[1] != test.shape[1]:
            raise DataError(
                f"{name}: train images have {train.shape[1]} pixels, test images {test.shape[1]}"
            )
        low, high = torch.aminmax(train)
        return cls(name, label, provenance, (float(low), float(high)), train, test)

    @property
    def summary(self) -> str:
        """One line: label, sizes, pixel range."""
        low, high = self.pixel_range
        return (
            f"{self.label}: {len(self.train):,} train + {len(self.test):,} test, "
            f"{self.train.shape[1]} pixels in [{low:.3g}, {high:.3g}]"
        )


def find_file(folder: Path | None, *names: str) -> Path | None:
    """The first of ``names`` (paths relative to ``folder``) that is a file."""
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_mat(path: Path, *keys: str) -> list[Tensor]:
    """The float32 matrices under ``keys`` of a MATLAB file (version 7 or older)."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=keys)
        return [torch.as_tensor(content[key], dtype=torch.float32) for key in keys]
    except (KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not the expected MATLAB file with the keys {', '.join(keys)}: {error}"
        ) from error
