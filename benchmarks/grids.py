"""What ``python -m benchmarks.compare`` tries: as many settings for every optimizer.

The first point of each grid is the one that runs when a single one is asked for.
"""

from __future__ import annotations

from benchmarks.optimizers import Settings

SIZE = 6  # points of every grid


def _rates(*rates: float) -> tuple[Settings, ...]:
    return tuple(Settings(lr=lr) for lr in rates)


# The first is presets.TUNED. It differs from the paper's in kind, as the next three do: pairs of
# short memory, H_g from the damping. Then the paper's own for MNIST, sqrt(0.3) on both sides, and
# the dampings of the first without the rest of it.
_TUNED = {"pair_decay": 0.5, "initial_scale": "damping"}
QUASI_NEWTON = tuple(
    Settings(lr=lr, damping_a=damping_a, damping_g=0.55, **kind)
    for lr, damping_a, kind in (
        (0.3, 0.1, _TUNED),
        (0.2, 0.1, _TUNED),
        (0.5, 0.1, _TUNED),
        (0.3, 0.2, _TUNED),
        (0.3, 0.55, {}),
        (0.3, 0.1, {}),
    )
)

GRIDS: dict[str, tuple[Settings, ...]] = {
    "kbfgs": QUASI_NEWTON,
    "kbfgsl": QUASI_NEWTON,
    # The first is the paper's for MNIST.
    "kfac": tuple(
        Settings(lr=lr, damping=damping)
        for lr, damping in ((1, 3), (1, 1), (0.3, 1), (0.3, 0.3), (0.1, 0.1), (0.03, 0.03))
    ),
    "muon": _rates(3e-3, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "soap": _rates(3e-3, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
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
