"""Coverage: which layers of a model K-BFGS takes, and what it leaves to the fallback."""

from __future__ import annotations

import torch
from torch import nn

from kbfgs_ext.optim.capture import Recorder
from kbfgs_ext.optim.factors import LayerFactors
from kbfgs_ext.optim.layers import Linear, kind_of


def cover(
    model: nn.Module, recorder: Recorder, within: set[int] | None = None
) -> tuple[list[LayerFactors], dict[str, nn.Parameter]]:
    """Find the covered layers of ``model`` and attach their hooks.

    A layer is covered if its kind is known and its weight is trained. Modules that share weight and
    bias are one layer used several times; modules that share the weight alone are left out.

    Args:
        model: searched in the order of ``named_modules``.
        recorder: gets the hooks.
        within: ids of the parameters to look at; None looks at all.

    Returns:
        The layers, and every other trained parameter by name.

    Raises:
        TypeError: the weight of a known kind is not real floating point.
        ValueError: a weight is not initialised yet (lazy modules).
    """
    by_weight: dict[int, tuple[type[Linear], list[tuple[str, nn.Module]]]] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not isinstance(module.weight, nn.Parameter):
            continue
        if not module.weight.is_floating_point():
            raise TypeError(
                f"model: the weight of layer '{name}' is {module.weight.dtype};"
                " only real floating-point weights can be trained"
            )
        if module.weight.requires_grad:
            by_weight.setdefault(id(module.weight), (kind, []))[1].append((name, module))

    layers: list[LayerFactors] = []
    for kind, uses in by_weight.values():
        name, module = uses[0]
        wanted = within is None or id(module.weight) in within
        if not wanted or any(other.bias is not module.bias for _, other in uses):
            continue
        # A compiled model wraps its own: a checkpoint fits both.
        plain = name.replace("_orig_mod.", "")
        layer = LayerFactors(plain or type(module).__name__, module, kind)
        layers.append(layer)
        for _, user in uses:
            recorder.attach(user, layer.slot)

    covered = {id(p) for layer in layers for p in layer.parameters()}
    rest = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in covered and (within is None or id(p) in within)
    }
    for name, p in rest.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: parameter '{name}' is not initialised yet; run one forward pass first"
            )
    return layers, rest


def common_device(layers: list[LayerFactors]) -> torch.device:
    """The device of all covered layers; raises ValueError naming the layers if there are two."""
    first = layers[0]
    for layer in layers:
        if layer.weight.device != first.weight.device:
            raise ValueError(
                f"model: covered layers are on different devices: '{first.name}' on"
                f" {first.weight.device}, '{layer.name}' on {layer.weight.device}"
            )
    return first.weight.device
