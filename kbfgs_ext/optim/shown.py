"""What a first pass has shown: the layers that the step moves, or why there are none."""

from __future__ import annotations

from kbfgs_ext.optim.covered import CoveredLayer
from kbfgs_ext.optim.recorder import Recorder
from kbfgs_ext.optim.shards import is_sharded

DARK = (
    "the covered layers ran under torch.no_grad() or inference_mode(): a pass needs gradients,"
    " so run the model with them enabled"
)


def in_the_dark(recorder: Recorder, layers: list[CoveredLayer]) -> bool:
    """Whether the pass has run covered layers, but none with gradients."""
    return recorder.in_the_dark and not any(layer.observer.uses for layer in layers)


def look(layers: list[CoveredLayer]) -> None:
    """Find what moves of each layer: the parameters that a gradient has reached."""
    for layer in layers:
        observer = layer.observer
        if observer.dark and observer.recomputed and not observer.uses:
            raise RuntimeError(
                f"layer '{layer.name}' ran forward without gradients and was recomputed in"
                " backward: use torch.utils.checkpoint with use_reentrant=False"
            )
        if observer.empty and not observer.uses:
            layer.moving = []  # its gradients are zero: no use at all
        else:
            layer.look()


def moved(recorder: Recorder, layers: list[CoveredLayer]) -> list[CoveredLayer]:
    """The layers of which something moves; raises where there are none, or where the optimizer does
    not have what the model trains."""
    for layer in [layer for layer in layers if not layer.moving and layer.shard is None]:
        if any(is_sharded(p) for module, _ in layer.uses for p in module.parameters()):
            raise RuntimeError(
                f"layer '{layer.name}' was sharded after the optimizer was made, which has the"
                " weights of before: call fully_shard first, and then make the optimizer"
            )
    active = [layer for layer in layers if layer.moving]
    if active:
        return active
    for layer in layers:
        if layer.observer.empty:
            raise ValueError(
                f"the input of layer '{layer.name}' is empty: shape {layer.observer.empty};"
                " a step needs a batch with at least one row"
            )
    if in_the_dark(recorder, layers):
        raise RuntimeError(DARK)
    raise RuntimeError(
        "closure must call backward() on a loss that depends on the covered layers,"
        " and leave their gradients in place: no gradient has reached any of"
        f" {', '.join(layer.name for layer in layers)}"
    )
