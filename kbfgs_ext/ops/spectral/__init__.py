"""spectral: see README.md in this folder."""

from kbfgs_ext.ops.spectral.api import COEFFICIENTS, polar_

__all__ = ["COEFFICIENTS", "polar_"]
