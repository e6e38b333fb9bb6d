"""fold-bn: merge a normalisation into the convolution or linear layer in front of it.

    y = gamma * (W x + b - mean) / sqrt(var + eps) + beta
      = (s W) x + (beta + s (b - mean)),    s = gamma / sqrt(var + eps)        (one factor an output channel)

Exact in eval mode. Folded networks can be fine-tuned, but no longer have batch statistics: fold last if you
mean to train.
"""

import operator
from dataclasses import replace
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from graphcomp.bases import OPTIONS, Globs, matches, options_of
from graphcomp.errors import PassError
from graphcomp.ir import PASS_KEY, Program, editable
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan

BatchNorm = nn.modules.batchnorm._BatchNorm
AS_ARITHMETIC = "it is written as arithmetic or a function, not as a layer"
Foldable = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, config=OPTIONS)
class FoldBN:
    """Merge batch normalisation into the layer in front of it; what cannot be merged is named in the plan."""

    name: ClassVar[str] = "fold-bn"
    concern: ClassVar[Concern] = "normalisations"

    exclude: Annotated[
        Globs, Field(description="globs on module paths of normalisations to leave alone")
    ] = ()

    def foresee(self, outlook: Outlook) -> Outlook:
        """The network without these normalisations; which they are depends on nothing but its structure."""
        if not outlook.plain:
            return outlook
        pairs, _ = self._pairs(outlook.program)
        folded = self.rewrite(outlook.program, Plan(name=self.name, decisions={"pairs": pairs}))
        return replace(outlook, program=folded)

    def plan(self, program: Program, context: Context) -> Plan:
        """Find the pairs; a pair needs both modules to be called once and the layer to feed only it."""
        pairs, kept = self._pairs(program)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"pairs": pairs},
            kept=kept,
            summary=f"folded {len(pairs)} of {len(pairs) + len(kept)} normalisations",
        )

    def follow(self, program: Program, plan: Plan) -> Program:
        """Fold the same normalisations of another program, as far as it has them; its function stays."""
        pairs, _ = self._pairs(program)
        same = {norm: layer for norm, layer in pairs.items() if norm in plan.decisions["pairs"]}
        return self.rewrite(program, Plan(name=self.name, decisions={"pairs": same}))

    def _pairs(self, program: Program) -> tuple[dict[str, str], list[LeftAlone]]:
        """Normalisation -> the layer that it is folded into, and why the others are not."""
        pairs: dict[str, str] = {}
        kept: list[LeftAlone] = []
        for node in program.graph.nodes:
            if node.op == "call_module" and isinstance(program.layer(node.target), BatchNorm):
                reason = "excluded" if matches([node.target], self.exclude) else _obstacle(program, node)
                if reason:
                    kept.append(LeftAlone(where=node.target, reason=reason))
                else:
                    pairs[node.target] = cast(str, node.all_input_nodes[0].target)
        kept += [LeftAlone(where=name, reason=AS_ARITHMETIC) for name in _written_out(program)]
        return pairs, kept

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Folding changes no value."""
        return program

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Scale the weights, set the bias, drop the normalisation."""
        _check(program, plan.decisions["pairs"])
        module = editable(program)
        calls = {n.target: n for n in module.graph.nodes if n.op == "call_module"}
        for norm_name, layer_name in plan.decisions["pairs"].items():
            _fold(
                cast(nn.Conv2d, module.get_submodule(layer_name)),
                cast(BatchNorm, module.get_submodule(norm_name)),
            )
            node, source = calls[norm_name], calls[layer_name]
            source.meta[PASS_KEY] = self.name
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
        return replace(program, module=module)


def _written_out(program: Program) -> list[str]:
    """Normalisations that are no layers: what holds their statistics, or the product with a computed scale.

    Some compute scale and shift from buffers alone, so that only these are in the graph.
    """
    read = [n for n in program.graph.nodes if n.op == "get_attr"]
    held = [str(n.target).rpartition(".")[0] for n in read if str(n.target).endswith(".running_var")]
    scales = [n for n in read if str(n.target).startswith("_tensor_constant")]
    products = [user for n in scales for user in n.users if user.target is operator.mul]
    shifted = [p.name for p in products if any(_shifts(user, scales) for user in p.users)]
    return list(dict.fromkeys([*held, *shifted]))


def _shifts(node: fx.Node, constants: list[fx.Node]) -> bool:
    return node.target is operator.add and any(c in node.all_input_nodes for c in constants)


def _obstacle(program: Program, node: fx.Node) -> str | None:
    """Why a normalisation cannot be folded."""
    norm = cast(BatchNorm, program.layer(cast(str, node.target)))
    source = node.all_input_nodes[0]
    if norm.running_mean is None:
        return "it has no running statistics"
    if source.op != "call_module":
        return "no layer in front of it"
    layer = program.layer(cast(str, source.target))
    if not isinstance(layer, Foldable):
        return f"{type(layer).__name__} in front of it, not a convolution or linear layer"
    if isinstance(layer, nn.Linear) and len(program.shape(source) or ()) != 2:
        return "its channels are not the linear layer's outputs"
    if any(m._forward_hooks or m._forward_pre_hooks for m in (layer, norm)):
        return "one of the two has forward hooks"
    if len(source.users) > 1:
        return f"{source.target} feeds other nodes too"
    calls = [n.target for n in program.graph.nodes if n.op == "call_module"]
    if calls.count(source.target) > 1 or calls.count(node.target) > 1:
        return "one of the two is called more than once"
    if _is_shared(program, layer, cast(str, source.target)):
        return f"the weights of {source.target} are used elsewhere too"
    return None


def _check(program: Program, pairs: dict[str, str]) -> None:
    """PassError if the pairs are not this program's, as those of a plan that was made for another one."""
    called = program.called_modules()
    norms = {n.target: n for n in program.graph.nodes if isinstance(called.get(str(n.target)), BatchNorm)}
    for norm, layer in pairs.items():
        node = norms.get(norm)
        if node is None or node.all_input_nodes[0].target != layer or _obstacle(program, node):
            raise PassError(
                f"{norm}: found no normalisation to fold into {layer}, expected a plan made for this program"
            )


def _is_shared(program: Program, layer: nn.Module, name: str) -> bool:
    """Whether another layer is tied to the weights, or a node reads them by themselves."""
    own = {id(p) for p in layer.parameters()}
    names = [n for n, t in program.tensors.items() if id(t) in own]
    read = {n.target for n in program.graph.nodes if n.op == "get_attr"}
    return any(not n.startswith(f"{name}.") or n in read for n in names)


@torch.no_grad()
def _fold(layer: nn.Conv2d, norm: BatchNorm) -> None:
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    gamma = norm.weight if norm.weight is not None else torch.ones_like(mean)
    beta = norm.bias if norm.bias is not None else torch.zeros_like(mean)
    scale = gamma / torch.sqrt(var + norm.eps)
    bias = layer.bias if layer.bias is not None else torch.zeros_like(mean)
    trainable = layer.weight.requires_grad
    layer.weight.copy_(_scaled(layer, scale))
    layer.bias = nn.Parameter(beta + scale * (bias - mean), requires_grad=trainable)


def _scaled(layer: nn.Conv2d, scale: Tensor) -> Tensor:
    """The weight times one factor an output channel; a transposed weight is (in, out / groups, …)."""
    weight = layer.weight
    if not getattr(layer, "transposed", False):
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    blocks = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return (blocks * scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
