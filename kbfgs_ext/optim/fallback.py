"""Parameters of layers that are not covered: a first-order optimizer, undone when the step is.

The fallback steps between the two passes, so that the second pass sees every parameter's new value.
A void step (non-finite loss or gradient) leaves its parameters and state as they were, and a step
that the safeguard undoes leaves the parameters as they were; both are decided on the device, in
as many kernels for many small tensors as for a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from kbfgs_ext.optim.copies import Copies, zero_unless
from kbfgs_ext.optim.shards import is_sharded, local

LR = 1e-3
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # if they are asked to be


def default_fallback(parameters: Iterable[torch.Tensor]) -> torch.optim.Optimizer:
    """AdamW with torch's defaults (lr 1e-3); fused, where it reads nothing back to the host.

    On CUDA it can be captured in a graph, and its lr is a tensor, so that a scheduler reaches a
    replay.
    """
    parameters = list(parameters)
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    capturable = all(p.device.type == "cuda" for p in parameters)
    lr = torch.tensor(LR, device=parameters[0].device) if capturable else LR
    return torch.optim.AdamW(parameters, lr=lr, fused=fused, capturable=capturable)


class Fallback:
    """A fallback optimizer with copies of what its last step has changed."""

    def __init__(
        self,
        named: Mapping[str, torch.Tensor],
        factory: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer],
    ) -> None:
        self._names = {id(p): name for name, p in named.items()}
        self.optimizer = factory(list({id(p): p for p in named.values()}.values()))
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"fallback must return a torch.optim.Optimizer, got {type(self.optimizer).__name__}"
            )
        self._stepped: list[torch.Tensor] = []
        self._before, self._state_before = Copies(), Copies()  # of parameters, and of the state
        self._entries: dict[Any, dict[str, Any]] = {}  # the state of before, not copied

    def add(self, named: Mapping[str, torch.Tensor]) -> None:
        """Take more parameters, in a group of their own."""
        self._names |= {id(p): name for name, p in named.items()}
        parameters = list({id(p): p for p in named.values()}.values())
        self.optimizer.add_param_group({"params": parameters})

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the state that its first step would make: tools that load a
        checkpoint in place need the tensors to be there."""
        if not self.optimizer.state and self._starts_at_zero():
            self._make_state()
        return self.optimizer.state_dict()

    def _starts_at_zero(self) -> bool:
        """Whether a state of zeros is the optimizer's own before its first step."""
        if isinstance(self.optimizer, torch.optim.SGD):  # its first step knows no dampening
            return not any(group["dampening"] for group in self.optimizer.param_groups)
        return isinstance(self.optimizer, (torch.optim.Adam, torch.optim.AdamW))

    def _make_state(self) -> None:
        """A step with gradients of zero that moves nothing, and all that it has made set to 0."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        before = [(p.grad, p.detach().clone()) for p in parameters]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        with torch.no_grad():
            for p, (gradient, value) in zip(parameters, before, strict=True):
                p.grad = gradient
                p.copy_(value)
            for tensor in self._state_tensors():
                tensor.zero_()

    def check_state(self, saved: Mapping[str, Any]) -> None:
        """Raise ValueError where a saved state has tensors of another shape."""
        for i, p in enumerate(self.parameters()):
            for name, value in saved["state"].get(i, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f"state_dict is of another model: {name} of {self._names[id(p)]!r} is"
                        f" {tuple(value.shape)} there and the parameter {tuple(p.shape)} here"
                    )

    def parameters(self) -> list[torch.Tensor]:
        """All parameters of the fallback's groups."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _state_tensors(self) -> list[torch.Tensor]:
        values = (v for state in self.optimizer.state.values() for v in state.values())
        return [local(v) for v in values if isinstance(v, torch.Tensor)]

    def step(self, ok: torch.Tensor) -> None:
        """Step where ``ok``; elsewhere leave parameters and state."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        sparse = any(g.is_sparse for g in gradients)
        if sparse and any(group.get("momentum") for group in self.optimizer.param_groups):
            raise self._explained(ValueError("momentum would be sparse too"), parameters)
        self._before.keep([local(p) for p in parameters])
        self._state_before.keep([local(t) for t in self._state_tensors()])
        self._entries = {p: dict(entry) for p, entry in self.optimizer.state.items()}
        knows_void = not sparse and self._takes_found_inf(parameters, ok.device)
        if knows_void:
            self.optimizer.found_inf = (~ok).to(torch.float32)  # type: ignore[attr-defined]
        else:
            # A non-finite gradient must not enter state made by this very step.
            zero_unless(ok, [local(g) for g in gradients if not g.is_sparse])
        try:
            self.optimizer.step()
        except BaseException as error:
            self.take_back()
            if sparse and isinstance(error, Exception):
                raise self._explained(error, parameters) from error
            raise
        finally:
            if knows_void:
                del self.optimizer.found_inf  # type: ignore[attr-defined]
        if not knows_void:
            self._before.put_back(~ok)
            # AdamW may keep its step counts on the host: left advanced, a device flag cannot reach
            # them without a read, and a count one too high only moves a bias correction.
            self._state_before.put_back(~ok)
        self._stepped = parameters

    def take_back(self) -> None:
        """Undo the last step as a whole: parameters, and the state as it was before."""
        self._before.put_back()
        self._state_before.put_back()
        state = self.optimizer.state
        for p, entry in list(state.items()):
            if p not in self._entries:
                del state[p]
                continue
            entry.clear()
            entry.update(self._entries[p])
        self._stepped = []

    def _takes_found_inf(self, parameters: list[torch.Tensor], device: torch.device) -> bool:
        """Whether the optimizer's own kernels leave everything as it is where a flag on the device
        says so: torch's fused ones do, with the state that they have already."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        if any(map(is_sharded, parameters)):
            return False
        if type(optimizer) not in FUSED or not all(group["fused"] for group in groups):
            return False
        if type(optimizer) is not torch.optim.SGD or any(group["momentum"] for group in groups):
            for p in parameters:
                if not any(torch.is_tensor(v) for v in optimizer.state.get(p, {}).values()):
                    return False
        return all(t.device == device for t in [*parameters, *self._state_tensors()])

    def _explained(self, error: Exception, parameters: list[torch.Tensor]) -> Exception:
        """The error of a step with sparse gradients, and what to do about them."""
        sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
        names = ", ".join(self._names.get(id(p), "?") for p in sparse)
        return RuntimeError(
            f"the fallback, {type(self.optimizer).__name__}, cannot take the sparse gradients of"
            f" {names}: make the embedding with sparse=False, or give a fallback that takes them,"
            " such as fallback=lambda parameters: torch.optim.SGD(parameters, lr=0.1)."
            f" It said: {error}"
        )

    def slope(self, like: torch.Tensor) -> torch.Tensor:
        """The change of the loss that the gradient promises for the step just taken."""
        gradients = [None if p.grad is None else local(p.grad) for p in self._stepped]
        return self._before.slope(gradients, like)

    def undo(self, undo: torch.Tensor) -> None:
        """Put the parameters, not the state, back where ``undo``."""
        self._before.put_back(undo)

    def copies(self) -> list[torch.Tensor]:
        """The copies of what the last step has changed."""
        return self._before.tensors() + self._state_before.tensors()

    def bytes(self) -> int:
        """Bytes of the fallback's state and of the copies."""
        tensors = self._state_tensors() + self.copies()
        return sum(t.numel() * t.element_size() for t in tensors)
