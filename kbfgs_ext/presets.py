"""Named settings: ``KBFGS(model, **presets.PUBLISHED)``. The evidence: docs/tuning.md.

The constructor's defaults are the setting that is best in general. Beside them:

PUBLISHED    the paper's setting for MNIST and its recursion to the letter; diverges on many seeds
TUNED        the paper's direction, the dampings apart, a pair of short memory, H_g from 1/lam_g,
             all layers by the same length
"""

from __future__ import annotations

import dataclasses
from typing import Any

from kbfgs_ext.optim.rules import DirectionRule, FactorRule

PUBLISHED: dict[str, Any] = {
    "lr": 0.3,
    "damping": 0.3,
    "momentum": 0.9,
    "stat_decay": 0.9,
    "pair_decay": 0.9,
    "powell": 0.2,
    "hessian_action": "ema",
    "pair_every": 1,
    "safeguard": False,
    "direction": DirectionRule("newton", step_length="direction", nesterov=False),
    "factors": FactorRule(
        initial_scale=1.0, relative_damping=False, restart_after=None, update_every=1
    ),
}

TUNED: dict[str, Any] = PUBLISHED | {
    "damping_a": 0.1,
    "damping_g": 0.55,
    "pair_decay": 0.5,
    "hessian_action": "minibatch",
    "safeguard": True,
    "direction": DirectionRule("newton", step_length="balanced", nesterov=False),
    "factors": dataclasses.replace(PUBLISHED["factors"], initial_scale="damping", restart_after=10),
}
