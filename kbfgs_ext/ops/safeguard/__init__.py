"""safeguard: see README.md in this folder."""

from kbfgs_ext.ops.safeguard.api import admit_, judge_

__all__ = ["admit_", "judge_"]
