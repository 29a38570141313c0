"""What a minibatch's inputs change before the direction is taken: step 3 of docs/algorithm.md."""

from __future__ import annotations

import torch

from kbfgs_ext.optim import scales
from kbfgs_ext.optim.parts import Part, Parts
from kbfgs_ext.optim.process import Alone


def follow(part: Part, parts: Parts, process: Alone, ok: torch.Tensor) -> None:
    """The activation factor and mean; at a layer's start also its damped inverse."""
    if part.mine is not None:
        scales.measure_inputs(part.mine, process.norms, ok)
    cold = [layer for layer in part.layers if not layer.started]
    if not cold:
        process.average_in(part, ok)
        return
    for layer in cold:  # a warm start has left A_0
        process.average(layer, 0.0 if not layer.warm_batches else None, ok)
    old = [layer for layer in part.layers if layer.started]
    for one in parts.of(old, by_inputs=True):
        process.average_in(one, ok)
    for one in parts.of(cold, by_inputs=True):
        for layer in one.layers:  # one by one: an error in one must not start another twice
            warm_batches = layer.warm_batches
            for factor in layer.activations:
                if layer.mine:
                    factor.start(factor.damping(one.scalars.lam_a))
                factor.spare = None
                layer.warm_batches = 0  # its average is gone: at an error it is a minibatch's turn
            layer.started, layer.warm_batches = True, warm_batches
