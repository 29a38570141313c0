"""Named settings: ``KBFGS(model, **presets.TUNED)``. The evidence: docs/tuning.md.

PUBLISHED    the paper's setting for MNIST and its recursion to the letter; diverges on many seeds
TUNED        the dampings apart, a pair of short memory, H_g from 1/lam_g, all layers by the same
             length: leaves the first plateau of a deep network sooner
SPECTRAL     directions with singular values of 1, dampings in each layer's own units: the scale of
             the loss does not matter. New: let lr fall, and compare with TUNED
"""

from __future__ import annotations

from typing import Any

PUBLISHED: dict[str, Any] = {
    "lr": 0.3,
    "damping": 0.3,
    "hessian_action": "ema",
    "safeguard": False,
}

TUNED: dict[str, Any] = {
    "lr": 0.3,
    "damping_a": 0.1,
    "damping_g": 0.55,
    "pair_decay": 0.5,
    "initial_scale": "damping",
    "step_length": "balanced",
}

SPECTRAL: dict[str, Any] = {
    "lr": 0.07,
    "damping_a": 1.0,
    "damping_g": 0.3,
    "relative_damping": True,
    "direction": "spectral",
    "nesterov": True,
    "step_length": "layer",
    "pair_every": 10,
}
