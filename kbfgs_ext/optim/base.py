"""What an optimizer of covered layers is to torch: groups, fallback, reports, checkpoints.

What it does in a step is in step.py.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from kbfgs_ext.ops import registry
from kbfgs_ext.optim import checkpoint, hyper, reports
from kbfgs_ext.optim.coverage import Excluded, common_device, cover, divide
from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.factors import Factor
from kbfgs_ext.optim.fallback import Fallback, default_fallback
from kbfgs_ext.optim.memory import memory_usage
from kbfgs_ext.optim.parts import Group
from kbfgs_ext.optim.passes import check_generators, joined, once
from kbfgs_ext.optim.rules import RankRule
from kbfgs_ext.optim.settings import Settings
from kbfgs_ext.optim.shards import mesh_of
from kbfgs_ext.optim.step import Step
from kbfgs_ext.optim.wrappers import process_of, unwrapped, wrappers_of

FallbackFactory = Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]


class CoveredOptimizer(torch.optim.Optimizer):
    """KBFGS and KBFGSL under torch's contract for optimizers.

    Args:
        model: the layers to cover are looked for here.
        settings: of the whole optimizer.
        defaults: hyperparameters of a param group.
        groups to ranks: as in `KBFGS`.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        defaults: dict[str, Any],
        groups: Iterable[Mapping[str, Any]] = (),
        fallback: FallbackFactory | None = None,
        exclude: Any = (),
        context: nn.Module | Iterable[nn.Module] | None = None,
        generators: Iterable[torch.Generator] = (),
        process_group: Any = None,
        ranks: RankRule = RankRule(),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}: the optimizer"
                " watches layers, so it needs the model rather than model.parameters()"
            )
        hyper.check_group(defaults)
        wrappers, model = wrappers_of(joined(model, context)), unwrapped(model)
        everything, generators = joined(model, context), check_generators(generators)
        mesh_of(everything)  # refuses other kinds of shards
        self.model, self.settings = model, settings
        self._excluded = Excluded(model, exclude)
        found = cover(model, settings, self._excluded)
        self._rest, self._reasons = dict(found.rest), dict(found.reasons)
        if not found.layers:
            raise ValueError(
                f"model has no layer to cover: {type(model).__name__} contains no Linear,"
                " convolution or registered kind of layer with a trained weight"
                + (" that is not excluded" if "excluded" in found.reasons.values() else "")
            )
        divided = divide(found.layers, found.rest, groups)
        for options, _ in divided:
            hyper.check_group({**defaults, **options})
        device = common_device(found.layers)
        among = device, everything, found.layers
        process = process_of(process_group, wrappers, ranks, *among)
        process.take(found.layers)
        process.broadcast(list(model.parameters()))
        self.steps = Step(settings, everything, generators, device, process)
        super().__init__(
            [{**options, "params": _parameters(part)} for options, part in divided], defaults
        )
        for group, (_, part) in zip(self.param_groups, divided, strict=True):
            self._cover(group, part)
        reports.say_what_is_large(found.layers, model)
        self.steps.fallback = self._make_fallback(found.rest, fallback)
        weakref.finalize(self, self.steps.recorder.close)

    def _cover(self, group: dict[str, Any], layers: list[CoveredLayer]) -> None:
        self.steps.add(Group(group, layers, hyper.DeviceScalars(self.steps.device)))
        # `state_dict` fills it in; torch's tools load what an optimizer has an entry for.
        self.param_groups[0].setdefault(checkpoint.ABOUT, {})

    def _make_fallback(
        self, rest: Mapping[str, nn.Parameter], factory: FallbackFactory | None
    ) -> Fallback | None:
        if not rest:
            return None
        made = Fallback(rest, factory or default_fallback)
        self.param_groups.extend(made.optimizer.param_groups)  # shared: schedulers reach them
        if factory is None:
            reports.say_what_falls_back(self, made.optimizer.param_groups[0]["lr"])
        return made

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters that the optimizer does not have yet, such as a new or unfrozen layer's.

        Whole layers of ``model`` (weight, and bias where trained) are covered with the group's
        hyperparameters; the other parameters go to the fallback.

        Raises:
            ValueError: a hyperparameter is out of its range, or a parameter is taken already.
        """
        if not self.steps.layers:  # torch's own constructor
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        hyper.check_group({**self.defaults, **param_group})
        self.steps.version += 1
        taken = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in taken for p in given):
            raise ValueError("params: some parameters are in another param group already")
        found = cover(self.model, self.settings, self._excluded, within={id(p) for p in given})
        layers, rest = found.layers, found.rest
        for layer in [x for x in layers if x.bias is not None and id(x.bias) in taken]:
            layers.remove(layer)
            rest[f"{layer.name}.weight"] = layer.weight
            found.reasons[f"{layer.name}.weight"] = "its bias is in another param group"
        common_device(self.layers + layers)
        known = {id(p) for layer in layers for p in layer.parameters()}
        known |= {id(p) for p in rest.values()}
        rest.update({f"params[{i}]": p for i, p in enumerate(given) if id(p) not in known})
        self._rest.update(rest)
        self._reasons.update(dict.fromkeys(rest, "no parameter of the model") | found.reasons)
        if layers:
            self.steps.process.take(layers)
            at = len(self.steps.parts.groups)
            super().add_param_group({**param_group, "params": _parameters(layers)})
            self.param_groups.insert(at, self.param_groups.pop())
            self._cover(self.param_groups[at], layers)
            reports.say_what_is_large(layers, self.model)
        if rest and self.steps.fallback is None:
            self.steps.fallback = Fallback(rest, default_fallback)
            self.param_groups.extend(self.steps.fallback.optimizer.param_groups)
        elif rest and self.steps.fallback is not None:
            self.steps.fallback.add(rest)
            self.param_groups.append(self.steps.fallback.optimizer.param_groups[-1])

    # ------------------------------------------------------------------ what it reports

    def diagnostics(self) -> dict[str, dict[str, torch.Tensor]]:
        """Per layer, how often its pairs were accepted, rejected and damped so far.

        Keys: accepted, rejected, powell_damped, lm_damped of H_g; accepted_a, rejected_a of H_a;
        and restarts and restarts_a, unless ``restart_after`` is None.
        Values are int64 scalars on the device; reading one waits for the device. A side in several
        blocks has the sums over them.
        """
        report = {}
        for layer in self.layers:
            layer.allocate()
            accepted, rejected, powell, lm = _total(layer.gradients, "counts_g")
            accepted_a, rejected_a, _, _ = _total(layer.activations, "counts_a")
            report[layer.name] = {
                "accepted": accepted,
                "rejected": rejected,
                "powell_damped": powell,
                "lm_damped": lm,
                "accepted_a": accepted_a,
                "rejected_a": rejected_a,
            }
            if self.settings.restart_after is not None:
                report[layer.name] |= {
                    "restarts": _total(layer.gradients, "marks_g")[2],
                    "restarts_a": _total(layer.activations, "marks_a")[2],
                }
        return report

    def counters(self) -> dict[str, torch.Tensor]:
        """Of the whole optimizer: steps, skipped (void: non-finite), undone (by the safeguard),
        restarts (of all factors at once, ordered by it) and its present scale; scalars on the
        device."""
        return {name: tensor.clone() for name, tensor in self.steps.guard.counters().items()}

    def summary(self) -> str:
        """A line for progress bars: the steps, lr, and of the other counters what is not as in a
        sound run. Reading it waits for the device."""
        return reports.summary(self.counters(), self.param_groups[0]["lr"])

    def memory_usage(self) -> dict[str, int]:
        """Bytes by kind and in "total", the same before training starts and after, but for the
        fallback's, which makes its state in its first step, and the copies of large buffers, which
        are made when a first pass writes them.

        At a layer's start, once, three float64 matrices as large as its largest block of H_a come
        on top.
        """
        return memory_usage(self.layers, self.settings, self.steps.fallback, self.steps.buffers)

    def coverage(self) -> reports.Coverage:
        """What is covered: a row per layer with its sizes and factor bytes, and one per parameter
        that goes to the fallback, with the reason. ``print(opt.coverage())`` is a table."""
        return reports.coverage(self.layers, self._rest, self._reasons)

    def explain(self) -> str:
        """Which backend each op of the last step took, and why not a faster one.

        Before the first step it is what `kbfgs_ext.explain` says of the device. With several ranks
        it ends in who does what, and what sharing the work spares and sends.
        """
        trace = self.steps.trace
        said = registry.explain_step(trace) if trace else registry.explain(self.device)
        return "\n".join(filter(None, [said, self.steps.process.explain()]))

    @property
    def closed(self) -> bool:
        """Whether the hooks are gone."""
        return self.steps.recorder.closed

    def close(self) -> None:
        """Remove every hook from the model. The optimizer makes no step afterwards; its state can
        still be saved. The same happens when it is collected as garbage."""
        self.steps.recorder.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all parameters, as every optimizer of torch does."""
        if set_to_none:  # twice in a step: without what torch's own does around it
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)
        for layer in self.layers:
            layer.observer.zero_virtual()
            if not set_to_none:
                layer.observer.note_zeros()

    # ------------------------------------------------------------------ checkpoints

    def _about(self) -> dict[str, Any]:
        return checkpoint.describe(self.settings, self.layers)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, but for torch's random state.

        In torch's own form: "state" holds the tensors of each parameter, "param_groups" the
        hyperparameters, and in the first of them, under "kbfgs", numbers and names alone. Tensors
        are not copied. Save the model's weights beside it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = self._packed()
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, packed)
            packed = packed if replaced is None else replaced
        return packed

    def _packed(self) -> dict[str, Any]:
        self.steps.parts.materialize()
        fallback = self.steps.fallback
        return checkpoint.pack(
            self.param_groups,
            self.layers,
            self.steps.guard.tensors(),
            None if fallback is None else fallback.state_dict(),
            {"iteration": self.steps.number, **self.steps.process.about(), **self._about()},
        )

    @property
    def state(self) -> defaultdict[torch.Tensor, Any]:
        """What `state_dict` has of each parameter, by the parameter: the live tensors."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        found = {parameters[i]: entry for i, entry in self._packed()["state"].items()}
        return defaultdict(dict, found)

    @state.setter
    def state(self, value: Any) -> None:
        """Torch's constructor asks for it; the state is where the layers are."""

    def consolidate(self) -> None:
        """Make the state of all ranks the same, so that one of them can save it for all.

        Only with several ranks and ``hessian_action="ema"`` is there anything to do: every rank
        has its own share of A there, and `state_dict` holds that of the rank that makes it. All
        ranks call this, one all-reduce of A per layer; the run goes on as before, to rounding.
        """
        if not self.steps.process.together:
            self.steps.process.consolidate(self.layers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, after checking all of it.

        Raises:
            ValueError: it was made by another method or for another model, or holds another
                rank's share of A (`consolidate`); nothing is loaded then.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        saved = checkpoint.check(state_dict, self._about(), self.param_groups)
        checkpoint.check_parts(self.layers, saved)
        self.steps.process.check_share(saved.share)
        fallback = self.steps.fallback
        if fallback is not None:
            fallback.check_state(saved.fallback)
        self.steps.parts.materialize()
        with torch.no_grad():
            checkpoint.load(self.layers, self.steps.guard.tensors(), saved)
        self.steps.number = saved.iteration
        self.steps.process.together = saved.share is None
        self.steps.version += 1
        own_groups = [dict(group) for group in self.param_groups]
        groups = copy.deepcopy(saved.groups)  # an lr may be a tensor
        for group, values in zip(self.param_groups, groups, strict=True):
            group.update(values)
        if fallback is not None:
            fallback.optimizer.load_state_dict(copy.deepcopy(saved.fallback))
            covered = len(self.steps.parts.groups)
            self.param_groups[covered:] = fallback.optimizer.param_groups
        for group, own in zip(self.param_groups, own_groups, strict=True):
            checkpoint.keep_devices(group, own)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: it watches the layers of a live"
            " model. Save state_dict() beside the model's, and load both into new ones"
        )

    # ------------------------------------------------------------------ small things

    def _run_pre_hooks(self) -> None:
        self._opt_called = True  # what torch's schedulers look for
        for hook in itertools.chain(
            _global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()
        ):
            hook(self, (self,), {})

    def _run_post_hooks(self) -> None:
        for hook in itertools.chain(
            self._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()
        ):
            hook(self, (self,), {})

    @property
    def device(self) -> torch.device:
        """Where the covered layers and all state are."""
        return self.steps.device

    @property
    def layers(self) -> list[CoveredLayer]:
        """The covered layers with their factors."""
        return self.steps.layers


def _total(factors: Sequence[Factor], name: str) -> tuple[torch.Tensor, ...]:
    """The entries of a vector of counts, summed over the blocks of a side."""
    blocks = [t for factor in factors for t in factor.blocks(name)]
    return torch.stack(blocks).sum(0).unbind()


def _parameters(layers: list[CoveredLayer]) -> list[torch.Tensor]:
    return once(p for layer in layers for p in layer.parameters())
