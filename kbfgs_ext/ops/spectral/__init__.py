"""spectral: see README.md in this folder."""

from kbfgs_ext.ops.spectral.api import COEFFICIENTS, SHIFTS, WEIGHTS, only_value, polar_

__all__ = ["COEFFICIENTS", "SHIFTS", "WEIGHTS", "only_value", "polar_"]
