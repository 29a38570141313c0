"""What an optimizer of covered layers keeps: groups, layers, fallback, reports, checkpoints.

The step itself is in stepping.py.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from kbfgs_ext.ops import registry
from kbfgs_ext.optim import checkpoint, hyper, reports
from kbfgs_ext.optim.capture import Recorder
from kbfgs_ext.optim.coverage import Excluded, common_device, cover, divide
from kbfgs_ext.optim.factors import LayerFactors, Plan
from kbfgs_ext.optim.fallback import Fallback, default_fallback
from kbfgs_ext.optim.memory import memory_usage, product_scratch_elements
from kbfgs_ext.optim.passes import Buffers, check_generators, joined
from kbfgs_ext.optim.safeguard import Safeguard, SafeguardRule

FallbackFactory = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


@dataclasses.dataclass
class Covered:
    """A param group of covered parameters, its layers, and its scalars on the device."""

    group: dict[str, Any]
    layers: list[LayerFactors]
    scalars: hyper.DeviceScalars


class CoveredOptimizer(torch.optim.Optimizer):
    """The state of KBFGS and KBFGSL, under torch's contract for optimizers."""

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        groups: Iterable[Mapping[str, Any]],
        plan: Plan,
        fallback: FallbackFactory | None,
        rule: SafeguardRule,
        backend: str,
        exclude: Any = (),
        context: nn.Module | Iterable[nn.Module] | None = None,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self.model = model
        self._context = joined(model, context)
        self._generators = check_generators(generators)
        self._excluded = Excluded(model, exclude)
        self._unseen: set[str] = set()  # layers that a warning has named
        self._blind: set[str] = set()  # and that another has
        self._plan = plan
        self._recorder = Recorder()
        self._covered: list[Covered] = []
        self._fallback: Fallback | None = None
        self._product = torch.empty(0)
        self._slopes = torch.empty(0)
        self._buffers = Buffers(self._context)
        self._trace: dict[str, registry.Taken] = {}  # which backend each op of the last step took
        self._generation = 0  # checkpoints loaded and groups added: a captured step is void
        self._iteration = 0  # steps that have moved the parameters, void ones too
        found = cover(model, self._excluded)
        layers, rest = found.layers, found.rest
        self._rest, self._reasons = dict(rest), dict(found.reasons)
        self._frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        if not layers:
            raise ValueError(
                f"model has no layer to cover: {type(model).__name__} contains no"
                " torch.nn.Linear with a trained weight"
                + (" that is not excluded" if "excluded" in found.reasons.values() else "")
            )
        divided = divide(layers, rest, groups)
        for options, _ in divided:
            hyper.check_group({**defaults, **options})
        device = common_device(layers)
        super().__init__(
            [{**options, "params": _parameters(part)} for options, part in divided], defaults
        )
        for group, (_, part) in zip(self.param_groups, divided, strict=True):
            self._covered.append(Covered(group, part, hyper.DeviceScalars(device)))
        self._guard = Safeguard(rule, device, plan.restart_after, backend)
        reports.say_what_is_left_out(layers, self._plan)
        self._fallback = self._make_fallback(rest, fallback)
        weakref.finalize(self, self._recorder.close)
        self._watch(layers)

    def _watch(self, layers: list[LayerFactors]) -> None:
        for layer in layers:
            self._recorder.attach(layer.modules, layer.observer)
            self.state.update({p: {} for p in layer.parameters()})  # torch's tools look for entries

    def _make_fallback(
        self,
        rest: Mapping[str, nn.Parameter],
        factory: FallbackFactory | None,
    ) -> Fallback | None:
        if not rest:
            return None
        made = Fallback(rest, factory or default_fallback)
        self.param_groups.extend(made.optimizer.param_groups)  # shared: schedulers reach them
        if factory is None:
            reports.say_what_falls_back(self, rest, made.optimizer.param_groups[0]["lr"])
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters that the optimizer does not have yet, such as a new or unfrozen layer's.

        Whole layers of ``model`` (weight, and bias where trained) are covered with the group's
        hyperparameters; the other parameters go to the fallback.

        Raises:
            ValueError: a hyperparameter is out of its range, or a parameter is taken already.
        """
        if not self._covered:  # torch's own constructor
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        hyper.check_group({**self.defaults, **param_group})
        self._generation += 1
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in taken for p in given):
            raise ValueError("params: some parameters are in another param group already")
        found = cover(self.model, self._excluded, within={id(p) for p in given})
        layers, rest = found.layers, found.rest
        for layer in [x for x in layers if x.bias is not None and id(x.bias) in taken]:
            layers.remove(layer)
            rest[f"{layer.name}.weight"] = layer.weight
            found.reasons[f"{layer.name}.weight"] = "its bias is in another param group"
        common_device(self._layers() + layers)
        known = {id(p) for layer in layers for p in layer.parameters()}
        known |= {id(p) for p in rest.values()}
        rest.update({f"params[{i}]": p for i, p in enumerate(given) if id(p) not in known})
        self._rest.update(rest)
        self._reasons.update(dict.fromkeys(rest, "no parameter of the model") | found.reasons)
        if layers:
            at = len(self._covered)
            super().add_param_group({**param_group, "params": _parameters(layers)})
            self.param_groups.insert(at, self.param_groups.pop())
            device = self._guard.scale.device
            self._covered.append(
                Covered(self.param_groups[at], layers, hyper.DeviceScalars(device))
            )
            self._watch(layers)
            reports.say_what_is_left_out(layers, self._plan)
        if rest and self._fallback is None:
            self._fallback = Fallback(rest, default_fallback)
            self.param_groups.extend(self._fallback.optimizer.param_groups)
        elif rest and self._fallback is not None:
            self._fallback.add(rest)
            self.param_groups.append(self._fallback.optimizer.param_groups[-1])

    # ------------------------------------------------------------------ what it reports

    def diagnostics(self) -> dict[str, dict[str, torch.Tensor]]:
        """Per layer, how often its pairs were accepted, rejected and damped so far.

        Keys: accepted, rejected, powell_damped, lm_damped of H_g; accepted_a, rejected_a of H_a;
        and restarts and restarts_a, unless ``restart_after`` is None.
        Values are int64 scalars on the device; reading one waits for the device. A side larger than
        ``max_factor_dim`` has no pairs: its counts stay zero.
        """
        report = {}
        for layer in self._layers():
            layer.allocate(self._plan)
            accepted, rejected, powell, lm = layer["counts_g"].clone().unbind()
            accepted_a, rejected_a, _, _ = layer["counts_a"].clone().unbind()
            report[layer.name] = {
                "accepted": accepted,
                "rejected": rejected,
                "powell_damped": powell,
                "lm_damped": lm,
                "accepted_a": accepted_a,
                "rejected_a": rejected_a,
            }
            if self._plan.restart_after is not None:
                restarts = {"restarts": layer["marks_g"][2], "restarts_a": layer["marks_a"][2]}
                report[layer.name] |= {name: t.clone() for name, t in restarts.items()}
        return report

    def counters(self) -> dict[str, torch.Tensor]:
        """Of the whole optimizer: steps, skipped (void: non-finite), undone (by the safeguard),
        restarts (of all factors at once, ordered by it) and its present scale; scalars on the
        device."""
        return {name: tensor.clone() for name, tensor in self._guard.counters().items()}

    def memory_usage(self) -> dict[str, int]:
        """Bytes by kind and in "total", the same before training starts and after, but for the
        fallback's, which makes its state in its first step, and the copies of large buffers, which
        are made when a first pass writes them.

        At a layer's start, once, three float64 matrices of its n_a x n_a come on top.
        """
        return memory_usage(self._layers(), self._plan, self._fallback, self._buffers)

    def coverage(self) -> reports.Coverage:
        """What is covered: a row per layer with its sizes and factor bytes, and one per parameter
        that goes to the fallback, with the reason. ``print(opt.coverage())`` is a table."""
        return reports.coverage(self._layers(), self._plan, self._rest, self._reasons)

    def explain(self) -> str:
        """Which backend each op of the last step took, and why not a faster one.

        Before the first step it is what `kbfgs_ext.explain` says of the device.
        """
        if not self._trace:
            return registry.explain(self.device)
        return registry.explain_step(self._trace)

    @property
    def closed(self) -> bool:
        """Whether the hooks are gone."""
        return self._recorder.closed

    def close(self) -> None:
        """Remove every hook from the model. The optimizer makes no step afterwards; its state can
        still be saved. The same happens when it is collected as garbage."""
        self._recorder.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, as every optimizer of torch does."""
        super().zero_grad(set_to_none)
        for layer in self._layers():
            layer.observer.zero_virtual()

    # ------------------------------------------------------------------ checkpoints

    def _about(self) -> dict[str, Any]:
        return checkpoint.describe(self._plan, self._layers())

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, but for torch's random state.

        In torch's own form: "state" holds the tensors of each parameter, "param_groups" the
        hyperparameters, and in the first of them, under "kbfgs", numbers and names alone. Tensors
        are not copied. Save the model's weights beside it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._materialize()
        packed = checkpoint.pack(
            self.param_groups,
            self._layers(),
            self._guard.tensors(),
            None if self._fallback is None else self._fallback.state_dict(),
            {"iteration": self._iteration, **self._about()},
        )
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, packed)
            packed = packed if replaced is None else replaced
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, after checking all of it.

        Raises:
            ValueError: it was made by another method or for another model; nothing is loaded then.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved = checkpoint.check(state_dict, self._about(), self.param_groups)
        if self._fallback is not None:
            self._fallback.check_state(saved.fallback)
        self._materialize()
        with torch.no_grad():
            checkpoint.load(self._layers(), self._guard.tensors(), saved)
        self._iteration = saved.iteration
        self._generation += 1
        own_groups = [dict(group) for group in self.param_groups]
        groups = copy.deepcopy(saved.groups)  # an lr may be a tensor
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)
        if self._fallback is not None:
            self._fallback.optimizer.load_state_dict(copy.deepcopy(saved.fallback))
            self.param_groups[len(self._covered) :] = self._fallback.optimizer.param_groups
        for group, own in zip(self.param_groups, own_groups, strict=True):
            checkpoint.keep_devices(group, own)
        self._publish_state()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: it watches the layers of a live"
            " model. Save state_dict() beside the model's, and load both into new ones"
        )

    # ------------------------------------------------------------------ small things

    @property
    def device(self) -> torch.device:
        """Where the covered layers and all state are."""
        return self._guard.scale.device

    def _layers(self) -> list[LayerFactors]:
        return [layer for covered in self._covered for layer in covered.layers]

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _split(
        self, layers: list[LayerFactors]
    ) -> Iterator[tuple[dict[str, Any], list[LayerFactors], hyper.DeviceScalars]]:
        """``layers`` by param group, and within one by the factors that their step has."""
        wanted = {id(layer) for layer in layers}
        for covered in self._covered:
            alike: dict[tuple[bool, ...], list[LayerFactors]] = {}
            for layer in covered.layers:
                if id(layer) in wanted:
                    sides = self._plan.keeps_a(layer), self._plan.keeps_g(layer)
                    alike.setdefault((*sides, layer.bare, layer.halved), []).append(layer)
            for part in alike.values():
                yield covered.group, part, covered.scalars

    def _materialize(self) -> None:
        """Allocate what is not there yet."""
        layers = self._layers()
        if all(layer.scratch for layer in layers) and self._product.numel():
            return
        device = common_device(layers)
        for layer in layers:
            layer.allocate(self._plan)
        size = product_scratch_elements(layers, self._plan, device)
        self._product = torch.empty(size, dtype=layers[0].dtype, device=device)
        self._slopes = torch.cat([layer["slope"] for layer in layers])  # one sum for all layers
        for layer, part in zip(layers, self._slopes.split([x.n_g for x in layers]), strict=True):
            layer.scratch["slope"] = part
        self._publish_state()

    def _publish_state(self) -> None:
        """The kept tensors under torch's own name for them."""
        for layer in self._layers():
            self.state[layer.weight] = layer.kept

    def _warn_once(self, active: list[LayerFactors]) -> None:
        """Name the layers that step without their input, and the parameters that nobody moves."""
        unseen = {layer.name for layer in active if not layer.observer.seen} - self._unseen
        if unseen:
            self._unseen |= unseen
            reports.say_what_is_unseen(sorted(unseen))
        blind = {x.name for x in active if x.observer.seen and not x.observer.filled} - self._blind
        if blind:
            self._blind |= blind
            reports.say_what_is_blind(sorted(blind))
        wanted = {n: p for n, p in self._frozen.items() if p.requires_grad and p.grad is not None}
        if wanted:
            taken = {id(p) for p in self._parameters()}
            self._frozen = {n: p for n, p in self._frozen.items() if n not in wanted}
            thawed = [name for name, p in wanted.items() if id(p) not in taken]
            if thawed:
                reports.say_what_has_thawed(thawed)

    def _copies(self) -> list[torch.Tensor]:
        """What a step keeps to put buffers and the fallback's parameters back."""
        return self._buffers.copies() + (self._fallback.copies() if self._fallback else [])

    def _scratch(self, layers: list[LayerFactors]) -> list[torch.Tensor]:
        """Each layer's part of the product scratch, n_g x n_a; none for layers without an H_a."""
        if not layers[0].uses("H_a"):
            return []
        alone = self._product.device.type == "cpu"
        views, at = [], 0
        for layer in layers:
            size = layer.n_g * layer.n_a
            views.append(self._product[at : at + size].view(layer.n_g, layer.n_a))
            at += 0 if alone else size
        return views


def _parameters(layers: list[LayerFactors]) -> list[nn.Parameter]:
    return [p for layer in layers for p in layer.parameters()]
