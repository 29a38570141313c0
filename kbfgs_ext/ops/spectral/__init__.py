"""spectral: see README.md in this folder."""

from kbfgs_ext.ops.spectral.api import COEFFICIENTS, SHIFTS, WEIGHTS, polar_

__all__ = ["COEFFICIENTS", "SHIFTS", "WEIGHTS", "polar_"]
