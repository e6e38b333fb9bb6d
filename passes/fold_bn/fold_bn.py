"""fold-bn: merge a normalisation into the convolution or linear layer in front of it.

    y = gamma * (W x + b - mean) / sqrt(var + eps) + beta
      = (s W) x + (beta + s (b - mean)),    s = gamma / sqrt(var + eps)        (one factor an output channel)

Exact in eval mode. Folded networks can be fine-tuned, but no longer have batch statistics: fold last if you
mean to train.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from graphcomp.bases import OPTIONS, Globs, matches, options_of
from graphcomp.channels import batch_norm_affine
from graphcomp.errors import PassError
from graphcomp.ir import PASS_KEY, Program, editable
from graphcomp.passes.fold_bn.obstacles import BatchNorm, obstacle, written_out
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan

AS_ARITHMETIC = "it is written as arithmetic or a function, not as a layer"


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
                reason = "excluded" if matches([node.target], self.exclude) else obstacle(program, node)
                if reason:
                    kept.append(LeftAlone(where=node.target, reason=reason))
                else:
                    pairs[node.target] = cast(str, node.all_input_nodes[0].target)
        kept += [LeftAlone(where=name, reason=AS_ARITHMETIC) for name in written_out(program)]
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


def _check(program: Program, pairs: dict[str, str]) -> None:
    """PassError if the pairs are not this program's, as those of a plan that was made for another one."""
    called = program.called_modules()
    norms = {n.target: n for n in program.graph.nodes if isinstance(called.get(str(n.target)), BatchNorm)}
    for norm, layer in pairs.items():
        node = norms.get(norm)
        if node is None or node.all_input_nodes[0].target != layer or obstacle(program, node):
            raise PassError(
                f"{norm}: found no normalisation to fold into {layer}, expected a plan made for this program"
            )


@torch.no_grad()
def _fold(layer: nn.Conv2d, norm: BatchNorm) -> None:
    mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale, _ = cast(tuple[Tensor, Tensor], batch_norm_affine(norm.weight, norm.bias, mean, var, norm.eps))
    beta = norm.bias if norm.bias is not None else torch.zeros_like(mean)
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
