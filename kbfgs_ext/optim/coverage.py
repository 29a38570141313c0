"""Coverage: which layers of a model K-BFGS takes, and what it leaves to the fallback."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.layers import View, kind_of, why_not
from kbfgs_ext.optim.settings import Settings


class Excluded:
    """What ``exclude=`` names: modules with all that is in them, and layers or parameters by name
    or pattern ("decoder", "blocks.*.qkv"); a name covers what lies below it."""

    def __init__(self, model: nn.Module, given: Any) -> None:
        self._modules: set[int] = set()
        self._patterns: list[str] = []
        inside = {id(module) for module in model.modules()}
        for one in [given] if isinstance(given, (str, nn.Module)) else given:
            if isinstance(one, str):
                self._patterns.append(one)
            elif isinstance(one, nn.Module):
                if id(one) not in inside:
                    raise ValueError(
                        f"exclude: a {type(one).__name__} is no part of the model:"
                        " give its modules, their names, or patterns of names"
                    )
                self._modules |= {id(module) for module in one.modules()}
            else:
                raise TypeError(f"exclude must hold modules and names, got {one!r}")
        names = [name for name, _ in model.named_modules()]
        for pattern in self._patterns:
            if not any(self._fits(pattern, _plain(name)) for name in names):
                raise ValueError(f"exclude: no layer of the model has a name like {pattern!r}")

    @staticmethod
    def _fits(pattern: str, name: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, pattern + ".*")

    def __call__(self, name: str, module: nn.Module) -> bool:
        """Whether the layer is left out."""
        return id(module) in self._modules or any(self._fits(p, name) for p in self._patterns)


def _plain(name: str) -> str:
    """A compiled model wraps its own: a checkpoint fits both."""
    return name.replace("_orig_mod.", "")


@dataclasses.dataclass
class Found:
    """What `cover` finds: the layers, every other trained parameter, and why it is not covered."""

    layers: list[CoveredLayer]
    rest: dict[str, nn.Parameter]
    reasons: dict[str, str]  # by the names in ``rest``


def cover(
    model: nn.Module,
    settings: Settings,
    excluded: Callable[[str, nn.Module], bool] = lambda name, module: False,
    within: set[int] | None = None,
) -> Found:
    """Find the covered layers of ``model``.

    A layer is covered if its kind is known and its weight is trained. Modules that share weight and
    bias are one layer used several times; modules that share the weight alone, or the bias alone,
    are left out.

    Args:
        model: searched in the order of ``named_modules``.
        settings: of the optimizer.
        excluded: whether the layer of this name is left out on purpose.
        within: ids of the parameters to look at; None looks at all.

    Raises:
        TypeError: the weight of a known kind is not real floating point.
        ValueError: a weight is not initialised yet (lazy modules).
    """
    users: dict[int, list[tuple[str, nn.Module, View]]] = {}  # by the weight
    why: dict[int, str] = {}  # parameter -> why it is not covered
    biases: dict[int, set[int]] = {}  # bias -> the weights beside it
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                why.setdefault(id(p), why_not(module))
        kind = kind_of(module)
        for view in [] if kind is None or kind.refuses(module) else kind.views(module):
            weight, bias = view.weight, view.bias
            if not isinstance(weight, nn.Parameter):
                continue
            if not weight.is_floating_point():
                raise TypeError(
                    f"model: the weight of layer '{name}' is {weight.dtype};"
                    " only real floating-point weights can be trained"
                )
            if bias is not None:
                biases.setdefault(id(bias), set()).add(id(weight))
            reason = ""
            if excluded(_plain(name), module):
                reason = "excluded"
            elif not weight.requires_grad:
                reason = "the weight of its layer is frozen"
            else:
                users.setdefault(id(weight), []).append((name, module, view))
            if reason:
                why.update({id(p): reason for p in (weight, bias) if p is not None})

    layers: list[CoveredLayer] = []
    for uses in users.values():
        name, module, view = uses[0]
        weight, bias = view.weight, view.bias
        if any(other.bias is not bias for _, _, other in uses):
            reason = "its layers share the weight and not the bias"
        elif bias is not None and len(biases[id(bias)]) > 1:
            reason = "its layers share the bias and not the weight"
        elif why[id(weight)] == "excluded":
            reason = "excluded"  # under another name
        else:
            reason = ""
        if reason:
            shared = [p for _, _, other in uses for p in (other.weight, other.bias)]
            why.update({id(p): reason for p in shared if p is not None})
        elif within is not None and id(weight) not in within:
            if bias is not None:
                why[id(bias)] = "its layer is covered without it"
        else:
            name = _plain(name) or type(module).__name__
            layers.append(CoveredLayer(name, [use[1:] for use in uses], settings))

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
    return Found(layers, rest, {name: why[id(p)] for name, p in rest.items()})


def divide(
    layers: list[CoveredLayer],
    rest: Mapping[str, nn.Parameter],
    groups: Iterable[Mapping[str, Any]],
) -> list[tuple[dict[str, Any], list[CoveredLayer]]]:
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
    divided: list[tuple[dict[str, Any], list[CoveredLayer]]] = [({}, [])]
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


def common_device(layers: list[CoveredLayer]) -> torch.device:
    """The device of all covered layers; raises ValueError naming the layers if there are two."""
    first = layers[0]
    for layer in layers:
        if layer.weight.device != first.weight.device:
            raise ValueError(
                f"model: covered layers are on different devices: '{first.name}' on"
                f" {first.weight.device}, '{layer.name}' on {layer.weight.device}"
            )
    return first.weight.device
