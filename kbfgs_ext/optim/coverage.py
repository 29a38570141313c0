"""Coverage: which layers of a model K-BFGS takes, and what it leaves to the fallback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.factors import LayerFactors
from kbfgs_ext.optim.layers import Linear, kind_of


def cover(
    model: nn.Module, within: set[int] | None = None
) -> tuple[list[LayerFactors], dict[str, nn.Parameter]]:
    """Find the covered layers of ``model``.

    A layer is covered if its kind is known and its weight is trained. Modules that share weight and
    bias are one layer used several times; modules that share the weight alone are left out.

    Args:
        model: searched in the order of ``named_modules``.
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
        modules = [user for _, user in uses]
        layers.append(LayerFactors(plain or type(module).__name__, modules, kind))

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


def divide(
    layers: list[LayerFactors],
    rest: Mapping[str, nn.Parameter],
    groups: Iterable[Mapping[str, Any]],
) -> list[tuple[dict[str, Any], list[LayerFactors]]]:
    """Divide the covered layers among param groups.

    Args:
        layers, rest: what `cover` found.
        groups: hyperparameters, each with "params": a module, a parameter, or an iterable of them.
            A layer goes where its weight is.

    Returns:
        Hyperparameters and layers of each group that has layers; first the layers in no group.

    Raises:
        TypeError: a group is no mapping with an entry "params".
        ValueError: a group has a parameter that the model does not train, or that another has.
    """
    trained = {id(p) for layer in layers for p in layer.parameters()}
    trained |= {id(p) for p in rest.values()}
    home: dict[int, int] = {}  # parameter -> group
    divided: list[tuple[dict[str, Any], list[LayerFactors]]] = [({}, [])]
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"groups[{i}] must be a dict with an entry 'params', got {group!r}")
        divided.append(({k: v for k, v in group.items() if k != "params"}, []))
        for p in _parameters_of(group["params"]):
            if id(p) not in trained:
                raise ValueError(
                    f"groups[{i}]: a parameter of shape {tuple(p.shape)} is none that the model"
                    " trains"
                )
            if home.setdefault(id(p), i + 1) != i + 1:
                raise ValueError(
                    f"groups[{i}]: a parameter of shape {tuple(p.shape)} is in"
                    f" groups[{home[id(p)] - 1}] already"
                )
    for layer in layers:
        divided[home.get(id(layer.weight), 0)][1].append(layer)
    return [(options, part) for options, part in divided if part]


def _parameters_of(params: Any) -> list[torch.Tensor]:
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, nn.Module):
        return [p for p in params.parameters() if p.requires_grad]
    return [p for one in params for p in _parameters_of(one)]


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
