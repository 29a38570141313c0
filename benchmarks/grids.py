"""What ``python -m benchmarks.compare`` tries: as many settings for every optimizer.

The first point of each grid is the one that runs when a single one is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.optimizers import Settings

SIZE = 6  # points of every grid


def _rates(*rates: float) -> tuple[Settings, ...]:
    return tuple(Settings(lr=lr) for lr in rates)


# The paper's direction. The constructor's defaults are in the comparison of tasks (tasks/).
_TUNED = Settings(preset="tuned")
QUASI_NEWTON = (
    _TUNED,
    replace(_TUNED, lr=1.0),
    replace(_TUNED, lr=0.03, step_length="layer"),
    replace(_TUNED, lr=0.06, step_length="layer"),
    replace(_TUNED, step_length="direction"),  # the paper's length
    # The paper's for MNIST: sqrt(0.3) both.
    replace(
        _TUNED,
        damping_a=0.55,
        damping_g=0.55,
        pair_decay=0.9,
        initial_scale=1.0,
        step_length="direction",
    ),
)

GRIDS: dict[str, tuple[Settings, ...]] = {
    "kbfgs": QUASI_NEWTON,
    "kbfgsl": QUASI_NEWTON,
    # The first is the paper's for MNIST.
    "kfac": tuple(
        Settings(lr=lr, damping=damping)
        for lr, damping in ((1, 3), (1, 1), (0.3, 1), (0.3, 0.3), (0.1, 0.1), (0.03, 0.03))
    ),
    "muon": _rates(3e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    "soap": _rates(3e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    "adamw": _rates(3e-3, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3),
    "rmsprop": _rates(3e-4, 5e-5, 1e-4, 1e-3, 2e-3, 5e-3),
    "sgdm": _rates(3e-3, 3e-4, 1e-3, 1e-2, 3e-2, 1e-1),
}

# Training losses to which seconds and epochs are counted: early, middle and late in a run.
TARGETS: dict[str, tuple[float, ...]] = {
    "mnist": (120.0, 80.0, 60.0),
    "curves": (100.0, 70.0, 50.0),
    "faces": (60.0, 40.0, 30.0),
}
