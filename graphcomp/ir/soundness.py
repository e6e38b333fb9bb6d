"""Numbers that no network holds unless its training diverged or its file was damaged."""

from collections.abc import Mapping

from torch import Tensor, nn


def damaged(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many values are NaN or infinite, by name, of those of `tensors` that must not have any.

    Infinities are numbers as others in buffers that nothing estimates: masks of attention and bounds.

    Args:
        module: whose parameters and buffers `tensors` are, or are to become.
        tensors: by dotted name; others than of floating point have no such values.
    """
    estimated = {name for name, part in module.named_modules(remove_duplicate=False) if _tracks(part)}
    buffers = (name for name, _ in module.named_buffers(remove_duplicate=False))
    constants = {name for name in buffers if name.rpartition(".")[0] not in estimated}
    found = {
        name: int((tensor.isnan() if name in constants else ~tensor.isfinite()).sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    return {name: count for name, count in found.items() if count}


def negative_variances(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the running variances below `module` that are negative somewhere in `tensors`."""
    names = (f"{path}.running_var".lstrip(".") for path, part in module.named_modules() if _tracks(part))
    return [name for name in names if name in tensors and bool((tensors[name] < 0).any())]


def _tracks(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor)
