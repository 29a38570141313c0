"""Parameters of layers that are not covered: a first-order optimizer, undone when the step is.

The fallback steps between the two passes, so that the second pass sees every parameter's new value.
A void step (non-finite loss or gradient) leaves its parameters and state as they were, and a step
that the safeguard undoes leaves the parameters as they were; both are decided on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

LR = 1e-3


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
        self._saved: list[torch.Tensor] = []
        self._stepped: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []  # what the copies are of
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
        return [v for v in values if isinstance(v, torch.Tensor)]

    def step(self, ok: torch.Tensor) -> None:
        """Step where ``ok``; elsewhere leave parameters and state."""
        parameters = [p for p in self.parameters() if p.grad is not None]
        sparse = any(p.grad.is_sparse for p in parameters if p.grad is not None)
        if sparse and any(group.get("momentum") for group in self.optimizer.param_groups):
            raise self._explained(ValueError("momentum would be sparse too"), parameters)
        state = self._state_tensors()
        self._before = before = [t.detach() for t in parameters + state]
        self._entries = {p: dict(entry) for p, entry in self.optimizer.state.items()}
        self._keep(before)
        for p in parameters:  # a non-finite gradient must not enter state made by this very step
            if p.grad is not None and not p.grad.is_sparse:
                p.grad.copy_(torch.where(ok, p.grad, 0.0))
        try:
            self.optimizer.step()
        except BaseException as error:
            self.take_back()
            if sparse and isinstance(error, Exception):
                raise self._explained(error, parameters) from error
            raise
        self._put_back(before, ~ok)
        self._stepped = parameters

    def take_back(self) -> None:
        """Undo the last step as a whole: parameters, and the state as it was before."""
        for saved, tensor in zip(self._saved, self._before, strict=True):
            tensor.copy_(saved)
        state = self.optimizer.state
        for p, entry in list(state.items()):
            if p not in self._entries:
                del state[p]
                continue
            entry.clear()
            entry.update(self._entries[p])
        self._stepped = []

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
        total = torch.zeros_like(like)
        for p, saved in zip(self._stepped, self._saved, strict=False):
            if p.grad is not None:
                moved = p.detach() - saved  # of 16-bit parameters too a sum in like's dtype
                total += (p.grad * moved).sum(dtype=like.dtype).to(like.device)
        return total

    def undo(self, undo: torch.Tensor) -> None:
        """Put the parameters, not the state, back where ``undo``."""
        self._put_back([p.detach() for p in self._stepped], undo)

    def _keep(self, tensors: list[torch.Tensor]) -> None:
        fits = len(self._saved) == len(tensors) and all(
            s.shape == t.shape and s.dtype == t.dtype and s.device == t.device
            for s, t in zip(self._saved, tensors, strict=True)
        )
        if not fits:  # the first steps, while the optimizer makes its state
            self._saved = [torch.empty_like(t) for t in tensors]
        for saved, tensor in zip(self._saved, tensors, strict=True):
            saved.copy_(tensor)

    def _put_back(self, tensors: list[torch.Tensor], where: torch.Tensor) -> None:
        for saved, tensor in zip(self._saved, tensors, strict=False):
            # AdamW may keep its step counts on the host: left advanced, a device flag cannot reach
            # them without a read, and a count one too high only moves a bias correction.
            if tensor.device == where.device:
                tensor.copy_(torch.where(where, saved, tensor))

    def copies(self) -> list[torch.Tensor]:
        """The copies of what the last step has changed."""
        return list(self._saved)

    def bytes(self) -> int:
        """Bytes of the fallback's state and of the copies."""
        tensors = self._state_tensors() + self._saved
        return sum(t.numel() * t.element_size() for t in tensors)
