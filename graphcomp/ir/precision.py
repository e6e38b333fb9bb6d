"""Numbers in another precision: floating point, and the complex numbers that are made of it."""

from collections.abc import Mapping

import torch
from torch import Tensor


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those that are numbers of another precision, converted; tied ones once."""
    changed = {id(t): (n, in_precision(t.detach(), dtype)) for n, t in tensors.items()}
    return {n: new for n, new in changed.values() if new.dtype != tensors[n].dtype}


def in_precision(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In floating point, or complex numbers of it; anything else as it is."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
