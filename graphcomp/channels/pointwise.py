"""What operators do to values that are the same everywhere: scale and shift, drop, round, keep them."""

from typing import cast

import torch
from torch import Tensor, fx

from graphcomp.ir import Program, op_name


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) of a normalisation by stored statistics; None if it has none."""
    if mean is None or var is None:
        return None
    scale = (torch.ones_like(mean) if weight is None else weight) / torch.sqrt(var + eps)
    return scale, (torch.zeros_like(mean) if bias is None else bias) - scale * mean


def functional_affine(program: Program, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), float64, of a call of `F.batch_norm` with tensors that the network holds."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    held = [given.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if given.get("training", False) or any(isinstance(n, fx.Node) and n.op != "get_attr" for n in held):
        return None
    weight, bias, mean, var = (
        None if n is None else program.tensors[str(cast(fx.Node, n).target)].detach().double() for n in held
    )
    return batch_norm_affine(weight, bias, mean, var, float(cast(float, given.get("eps", 1e-5))))


def drops(program: Program, node: fx.Node) -> bool:
    """Whether a function draws random numbers: it was told to train, whatever the mode."""
    name = op_name(program, node)
    if node.op == "call_module" or not (name in _DROPOUTS or name.startswith("dropout")):
        return False
    if name == "rrelu":
        return bool(node.kwargs.get("training", node.args[3] if len(node.args) > 3 else False))
    last = node.args[-1] if isinstance(node.args[-1], bool) else True
    return bool(node.kwargs.get("training", last))


_DROPOUTS = ("dropout", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth", "rrelu")


def keeps_constants(program: Program, node: fx.Node) -> bool:
    """Whether a constant plane comes out of a pooling or resizing operator as it was."""
    if node.op == "call_module":
        layer = program.layer(cast(str, node.target))
        what, options = type(layer).__name__.lower(), vars(layer)
        padding = options.get("padding", 0)
    else:
        what, options = op_name(program, node), dict(node.kwargs)
        padding = options.get("padding", node.args[3] if len(node.args) > 3 else 0)
        if len(node.args) > 4 and "avg" in what:
            return False
    if "lp" in what or options.get("divisor_override") is not None:
        return False
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return "avg" not in what or "adaptive" in what or not (padded and options.get("count_include_pad", True))


def rounds(program: Program, source: fx.Node, node: fx.Node) -> bool:
    """Whether a node makes whole numbers of others."""
    before, after = program.values[source], program.values[node]
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return before.is_floating_point() and not after.is_floating_point()
