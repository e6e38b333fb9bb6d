"""Normalisations by known statistics go into the convolution or product in front of them.

y = (w x + b - mean) * scale / sqrt(var + eps) + shift is w' x + b' with f = scale / sqrt(var + eps),
w' = f w by row and b' = (b - mean) f + shift, computed in float64. Runtimes do the same when they load a
file, but not always, and a reader finds fewer nodes.
"""

from collections import Counter

import torch
from torch import Tensor

from graphcomp.onnx.rows import Op, Writing


def fold_norms(writing: Writing, outputs: set[str]) -> None:
    """Fold every BatchNormalization whose input only it reads; `outputs` are read by others."""
    readers = Counter(name for op in writing.ops for name in op.inputs)
    makers = {name: op for op in writing.ops for name in op.outputs}
    gone: set[int] = set()
    for op in writing.ops:
        before = makers.get(op.inputs[0]) if op.kind == "BatchNormalization" else None
        if before is None or readers[op.inputs[0]] > 1 or op.inputs[0] in outputs:
            continue
        if _fold(writing, before, op):
            before.outputs = op.outputs
            makers[op.outputs[0]] = before
            gone.add(id(op))
    writing.ops = [op for op in writing.ops if id(op) not in gone]


def _fold(writing: Writing, layer: Op, norm: Op) -> bool:
    stored = writing.stored
    if layer.kind not in ("Conv", "ConvTranspose", "Gemm") or any(n not in stored for n in layer.inputs[1:]):
        return False
    weight, *rest = (stored[n] for n in layer.inputs[1:])
    if not weight.is_floating_point():
        return False
    scale, shift, mean, var = (stored[n].double() for n in norm.inputs[1:])
    factor = scale * torch.rsqrt(var + norm.attributes.get("epsilon", 1e-5))
    bias = rest[0].double() if rest else torch.zeros_like(mean)
    folded = _scaled(layer, weight.double(), factor)
    _store(writing, layer, 1, folded.to(weight.dtype), f"{layer.name}.weight")
    _store(writing, layer, 2, ((bias - mean) * factor + shift).to(weight.dtype), f"{layer.name}.bias")
    return True


def _scaled(layer: Op, weight: Tensor, factor: Tensor) -> Tensor:
    """A weight with its rows multiplied, wherever the layer has them."""
    if layer.kind == "ConvTranspose":  # inputs, outputs of a group, kernel
        groups = layer.attributes.get("group", 1)
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return (parts * factor.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    if layer.kind == "Gemm" and not layer.attributes["transB"]:
        return weight * factor
    return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _store(writing: Writing, op: Op, position: int, tensor: Tensor, stem: str) -> None:
    """Give an operator other numbers, under the old name if nobody else has them."""
    old = op.inputs[position] if position < len(op.inputs) else ""
    alone = old and sum(old in other.inputs for other in writing.ops) == 1
    name = old if alone else writing.free(old or stem)
    writing.stored[name] = tensor
    op.inputs[position:] = [name, *op.inputs[position + 1 :]]
