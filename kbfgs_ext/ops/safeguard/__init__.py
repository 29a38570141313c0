"""safeguard: see README.md in this folder."""

from kbfgs_ext.ops.safeguard.api import judge_

__all__ = ["judge_"]
