"""The warm start: activation factors from more than the first minibatch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.capture import Pass
from kbfgs_ext.optim.passes import RandomState
from kbfgs_ext.optim.step import Step


def warm_start(model: nn.Module, steps: Step, batches: Iterable[Any]) -> None:
    """`KBFGS.warm_start`."""
    if any(layer.started for layer in steps.layers):
        raise RuntimeError("warm_start must come before the first step")
    steps.parts.materialize()
    steps.process.begin(steps.layers, steps.parameters(), steps.number)
    random = RandomState(steps.device, steps.generators)
    steps.buffers.save()
    finite: list[torch.Tensor] = []
    try:
        with steps.recording(Pass.WARM):
            for batch in batches:
                finite.append(_average(model, steps, batch))
    except BaseException as error:
        steps.process.fail(error)
        raise
    finally:
        random.restore()
        steps.buffers.restore()
    bad = [i for i, fine in enumerate(finite) if not fine]
    with steps.own_work():
        elsewhere, number = steps.process.warm(steps.layers, bool(bad), len(finite))
    if elsewhere or not number:
        for layer in steps.layers:
            for factor in layer.activations:
                factor.average.zero_()
            layer.warm_batches = 0
        raise ValueError(
            f"batches: batch {bad[0] if bad else 'of another rank'} gives non-finite activations"
            if elsewhere
            else "batches is empty: warm_start needs at least one batch"
        )


def _average(model: nn.Module, steps: Step, batch: Any) -> torch.Tensor:
    """Average one batch into the factors; whether its activations are finite."""
    for layer in steps.layers:
        layer.observer.begin(None, layer["g_bar"], keep_inputs=True)
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
    fine = torch.ones((), dtype=torch.bool, device=steps.device)
    for layer in steps.layers:
        if layer.observer.has_inputs():
            k = layer.warm_batches
            with steps.own_work():
                for factor, inputs in zip(layer.activations, layer.inputs(), strict=True):
                    factor.average_one(factor["a_bar"], inputs, k / (k + 1), None)
            layer.warm_batches = k + 1
            layer.observer.forget_inputs()
            fine &= torch.isfinite(layer["a_bar"]).all()
    return fine
