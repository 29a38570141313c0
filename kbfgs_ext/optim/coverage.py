"""Coverage: which layers of a model K-BFGS takes, and what it leaves to the fallback."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.layers import View, views, why_not
from kbfgs_ext.optim.settings import Settings

EXCLUDED, FROZEN = "excluded", "the weight of its layer is frozen"
LEFT_OUT = (EXCLUDED, FROZEN)
Place = tuple[int, int] | None  # some rows of a weight or a bias; None: all
Use = tuple[str, nn.Module, View]


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
        names += [
            _layer(name, view) for name, module in model.named_modules() for view in views(module)
        ]
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
    are left out. Of a weight in parts all are covered, or none.

    Args:
        model: searched in the order of ``named_modules``.
        settings: of the optimizer.
        excluded: whether the layer of this name is left out on purpose.
        within: ids of the parameters to look at; None looks at all.

    Raises:
        TypeError: the weight of a known kind is not real floating point.
        ValueError: a weight is not initialised yet (lazy modules).
    """
    tables: dict[int, str] = {}  # weight -> the embedding that it is the weight of
    users: dict[int, dict[Place, list[Use]]] = {}  # by the weight, and by the rows of it
    why: dict[int, str] = {}  # parameter -> why it is not covered
    biases: dict[tuple[int, Place], set[int]] = {}  # some rows of a bias -> the weights beside it
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                why.setdefault(id(p), why_not(module))
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                    tables.setdefault(id(p), _plain(name))
        for view in views(module):
            weight, bias = view.weight, view.bias
            if not isinstance(weight, nn.Parameter):
                continue
            own = _layer(name, view)
            if not weight.is_floating_point():
                raise TypeError(
                    f"model: the weight of layer '{own}' is {weight.dtype};"
                    " only real floating-point weights can be trained"
                )
            if bias is not None:
                place = id(bias), _place(view.bias_rows or view.rows)
                biases.setdefault(place, set()).add(id(weight))
            reason = ""
            if excluded(_plain(own), module):
                reason = EXCLUDED
            elif not weight.requires_grad:
                reason = FROZEN
            else:
                uses = users.setdefault(id(weight), {}).setdefault(_place(view.rows), [])
                uses.append((own, module, view))
            if reason:
                why.update({id(p): reason for p in (weight, bias) if p is not None})

    layers: list[CoveredLayer] = []
    for places in users.values():
        everyone = [use for uses in places.values() for use in uses]
        weight = everyone[0][2].weight
        both = {
            id(p): p for _, _, view in everyone for p in (view.weight, view.bias) if p is not None
        }
        reason = _unfit(places, biases) or next((why[i] for i in both if why[i] in LEFT_OUT), "")
        if reason:
            why.update(dict.fromkeys(both, reason))
        elif within is not None and id(weight) not in within:
            del both[id(weight)]
            why.update(dict.fromkeys(both, "its layer is covered without it"))
        else:
            for uses in places.values():
                name, module, _ = uses[0]
                name = _plain(name) or type(module).__name__
                layers.append(CoveredLayer(name, [use[1:] for use in uses], settings))
                layers[-1].tied = tables.get(id(weight), "")

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


def _layer(module: str, view: View) -> str:
    """The name of a layer in the module of this name."""
    return ".".join(part for part in (module, view.name) if part)


def _place(rows: slice | None) -> Place:
    return None if rows is None else (rows.start, rows.stop)


def _unfit(places: Mapping[Place, list[Use]], biases: Mapping[tuple[int, Place], set[int]]) -> str:
    """Why the uses of one weight are no layers; empty if they are."""
    if None in places and len(places) > 1:
        return "its layers use the weight as a whole, and in parts"
    for uses in places.values():
        bias = uses[0][2].bias
        if any(view.bias is not bias for _, _, view in uses):
            return "its layers share the weight and not the bias"
        for _, _, view in uses:
            place = id(bias), _place(view.bias_rows or view.rows)
            if len(biases.get(place, ())) > 1:
                return "its layers share the bias and not the weight"
    return ""


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
        ValueError: a group has a parameter that the model does not train, or that another has, or
            layers that share a bias are in different groups.
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
    owners: dict[int, CoveredLayer] = {}  # of the biases, of which a layer may have a part
    for layer in layers:
        at = home.get(id(layer.weight), 0)
        owner = layer if layer.bias is None else owners.setdefault(id(layer.bias), layer)
        if home.get(id(owner.weight), 0) != at:
            raise ValueError(
                f"groups: layers '{owner.name}' and '{layer.name}' have parts of one bias, so one"
                " group must hold the weights of both"
            )
        divided[at][1].append(layer)
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
