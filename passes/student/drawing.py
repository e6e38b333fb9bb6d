"""Initial weights: W ~ N(0, 2 / fan-in) with the fan-in that is left (He et al. 2015)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from graphcomp.channels import Removal
from graphcomp.ir import Program, editable

Normalisation = nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm
Weighted = nn.modules.conv._ConvNd | nn.Linear


def without_rule(program: Program) -> list[str]:
    """Layers and tensors whose weights cannot be drawn anew."""
    modules = program.called_modules()
    odd = [
        n
        for n, m in modules.items()
        if any(True for _ in m.parameters()) and not isinstance(m, Weighted | Normalisation)
    ]
    direct = [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]
    return [*odd, *dict.fromkeys(direct)]


@torch.no_grad()
def drawn(removal: Removal, seed: int) -> Program:
    """The same network with initial weights, scaled for the inputs that the removal leaves."""
    program, axes = removal.channels.program, removal.channels.axes
    module = editable(program)
    generator = torch.Generator().manual_seed(seed)
    left = {a.weight: float((~removal.gone[a.channels]).mean()) for a in axes if a.reads}
    for name in program.called_modules():
        layer = module.get_submodule(name)
        if isinstance(layer, Weighted):
            deviation = (2 / max(_fan_in(layer) * left.get(f"{name}.weight", 1.0), 1)) ** 0.5
            noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(deviation * noise)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, Normalisation):
            layer.reset_parameters()
    return replace(program, module=module)


def _fan_in(layer: Weighted) -> int:
    """How many products a value of the output is the sum of."""
    weight: Tensor = layer.weight
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed:
        groups: int = layer.groups
        return weight.shape[0] // groups * weight[0, 0].numel()
    return weight[0].numel()
