"""Modules of torch that are opened: what they consist of takes their place, so that a trace sees it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from graphcomp.ir.attention import OpenAttention, opens_attention
from graphcomp.ir.recurrent import OpenRecurrent, opens_recurrent

_OPENED: tuple[tuple[Callable[[Any], bool], Callable[[Any], nn.Module]], ...] = (
    (opens_attention, OpenAttention),
    (opens_recurrent, OpenRecurrent),
)


def holds_closed(model: nn.Module) -> bool:
    """Whether `open_modules` would change anything."""
    return any(opens(m) for m in model.modules() for opens, _ in _OPENED)


def open_modules(model: nn.Module) -> None:
    """Replace what is known of torch's modules below `model` by what torch.fx traces through, in place."""
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            for opens, kind in _OPENED:
                if child is not None and opens(child):
                    if id(child) not in made:
                        made[id(child)] = kind(child)
                    parent._modules[name] = made[id(child)]


def unwrapped(model: Any) -> Any:
    """The network inside of what torch.compile and torch's data parallelism return; any other as it is."""
    while isinstance(model, nn.Module):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and isinstance(
            getattr(model, "_orig_mod", None), nn.Module
        ):
            model = model._orig_mod
        else:
            break
    return model
