"""Weights that modules compute anew at every call, by torch's own means, as the values that they have."""

import copy
import warnings
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphcomp.errors import GraphcompWarning, some_of


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of the old weight norm's computed weights, which torch refuses to copy."""
    held = (t for m in model.modules() for t in vars(m).values())
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, cast(dict[int, Any], computed))


_WEIGHT_HOOKS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks of torch that compute a parameter anew at every call."""


def _weight_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]


def is_parametrized(module: nn.Module) -> bool:
    """Whether a module computes some of its weights."""
    return parametrize.is_parametrized(module) or bool(_weight_hooks(module))


def bake_parametrizations(model: nn.Module) -> None:
    """Replace computed weights by their values: exact in eval mode, and then the analysis can see them."""
    lost: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            _bake(module)
        for hook in _weight_hooks(module):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
                lost.setdefault("masks of nn.utils.prune", []).append(path)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
                lost.setdefault("spectral_norm", []).append(path)
            else:
                nn.utils.remove_weight_norm(module, hook.name)
    for what, paths in lost.items():
        warnings.warn(
            f"{some_of(paths)}: found {what}; the weights that they yield are baked in, and "
            "training on moves these freely",
            GraphcompWarning,
            stacklevel=3,
        )


def _bake(module: nn.Module) -> None:
    """torch's own `remove_parametrizations` would take the property from the class, which copies share."""
    lists = dict(cast(nn.ModuleDict, module.parametrizations).items())
    values = {name: getattr(module, name).detach().clone() for name in lists}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        origin = list(lists[name].parameters())
        if origin:
            module.register_parameter(name, nn.Parameter(value, any(p.requires_grad for p in origin)))
        else:
            module.register_buffer(name, value)
