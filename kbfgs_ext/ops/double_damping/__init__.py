"""double_damping: see README.md in this folder."""

from kbfgs_ext.ops.double_damping.api import (
    double_damping_,
    measure_inputs_,
    measure_pair_,
    pair_ema_,
)

__all__ = ["double_damping_", "measure_inputs_", "measure_pair_", "pair_ema_"]
