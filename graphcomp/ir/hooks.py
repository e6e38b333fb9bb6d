"""Whether a module has hooks: calling it does more than its forward says."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
