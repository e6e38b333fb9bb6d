"""Layers that hold tensors of a file: copies, and when two nodes call one layer."""

from typing import Any

from torch import nn

from graphcomp.onnx.rows.reading import as_tensor
from graphcomp.onnx.rows.values import Known


def fill(module: nn.Module, **tensors: Known | None) -> None:
    """Give a layer its parameters: copies of what the file has."""
    for name, known in tensors.items():
        if known is not None:
            module.register_parameter(name, nn.Parameter(as_tensor(known.array)))


def shared(kind: str, weight: Known, bias: Known | None, *settings: Any) -> tuple[Any, ...] | None:
    """Equal for nodes that call one layer: the same initialisers, and the same settings.

    None where the weight is no initialiser of two or more dimensions: exporters merge equal vectors, which
    says nothing.
    """
    if not weight.name or weight.array.ndim < 2 or (bias is not None and not bias.name):
        return None
    return (kind, weight.name, bias.name if bias is not None else "", *settings)
