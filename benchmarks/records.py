"""What a training run leaves behind: rows of losses, and the JSON file that holds them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.training import Config


@dataclass(frozen=True)
class Row:
    """The state after an epoch or a part of it; epoch 0 is the start."""

    epoch: float  # an integer where it is whole
    steps: int  # since the start
    train_loss: float  # nats or half squared error per image, with the weight decay term
    test_loss: float
    seconds: float  # of training since the start: warm start included, evaluation excluded
    counters: dict[str, float] = field(default_factory=dict)  # of the optimizer, since the start


@dataclass
class Run:
    """A run and its outcome, as written to JSON."""

    config: Config
    settings: dict[str, Any]  # what the optimizer was built with
    dataset: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    warm_start_seconds: float = 0.0
    # Until the last epoch is through, so that a killed process leaves a truthful file behind.
    status: str = "interrupted"

    def payload(self) -> dict[str, Any]:
        """The run as JSON content; numbers that are not finite become null."""
        return _jsonable(
            {
                "status": self.status,
                "config": asdict(self.config) | {"settings": self.settings},
                "dataset": self.dataset,
                "environment": self.environment,
                "warm_start_seconds": self.warm_start_seconds,
                "rows": [asdict(row) for row in self.rows],
            }
        )


def write_json(path: Path, payload: dict[str, Any]) -> None:
    """Write ``payload`` so that a reader finds the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(payload, indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
