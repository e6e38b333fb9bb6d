"""Modules and calls in the place of layers: factors, and what picks the channels that they read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graphcomp.channels import insert_select, sync_attributes
from graphcomp.factors.decompose import Factor, Kind, decompose
from graphcomp.ir import PASS_KEY, Program, acts_in_place, assemble, eliminate_dead_nodes, parts, same_memory


class Rewriter:
    """One rewrite: modules replaced, calls replaced, gathers in front."""

    def __init__(self, program: Program, factors: dict[str, Factor], pass_name: str) -> None:
        self.program, self.factors, self.pass_name = program, factors, pass_name
        self.root, self.graph = parts(program, self.sliced_weights())
        self.gathers: dict[tuple[Any, ...], fx.Node] = {}
        nodes = list(program.graph.nodes)
        self.new = dict(zip(nodes, self.graph.nodes, strict=True))
        self.order = {node: i for i, node in enumerate(nodes)}
        self.writers = [n for n in nodes if n.all_input_nodes and acts_in_place(program.module, n)]

    def sliced_weights(self) -> dict[str, Tensor]:
        """The weights of layers that read a part of their channels, without the other columns."""
        names = {f"{layer}.weight": f.keep for layer, f in self.factors.items() if f.keep is not None}
        return {name: self.program.tensors[name].detach()[:, keep] for name, keep in names.items()}

    def run(self) -> Program:
        """The program with all of it done."""
        names = {layer: self.install(factor) for layer, factor in self.factors.items()}
        for old in self.program.graph.nodes:
            if old.op == "call_module" and old.target in self.factors:
                self.replace(old, self.factors[old.target], names[old.target])
        eliminate_dead_nodes(self.graph, self.root)  # a gather that another one took the place of
        self.graph.lint()
        module = assemble(self.program, self.root, self.graph)
        return replace(self.program, module=module)

    def install(self, factor: Factor) -> list[str]:
        """Put the layer's new modules in its place; their paths."""
        owner, _, leaf = factor.layer.rpartition(".")
        layer = cast(nn.Conv2d, self.root.get_submodule(factor.layer))
        if factor.rank is None:
            sync_attributes(layer, layer, None)
            return [factor.layer]
        modules = layers_of(layer, decompose(layer.weight, factor), factor.kind)
        self.root.get_submodule(owner)._modules[leaf] = nn.Sequential(*modules)
        return [f"{factor.layer}.{i}" for i in range(len(modules))]

    def replace(self, old: fx.Node, factor: Factor, names: list[str]) -> None:
        """Calls of the new modules instead of one of the layer."""
        if factor.keep is None and factor.rank is None:
            return
        node = self.new[old]
        x = cast(fx.Node, node.args[0])
        with self.graph.inserting_before(node):
            if factor.keep is not None:
                x = self.gathered(old, factor.keep)
            for name in names:
                x = self.graph.call_module(name, (x,))
                x.meta = {**node.meta, PASS_KEY: self.pass_name}
        node.replace_all_uses_with(x)
        self.graph.erase_node(node)
        self.new[old] = x

    def gathered(self, reader: fx.Node, keep: list[int]) -> fx.Node:
        """The kept channels of what a reader reads, picked once for all that see the same values."""
        read = cast(fx.Node, reader.args[0])
        weight = self.program.tensors[f"{reader.target}.weight"]
        axis = len(self.program.shape(read) or ()) - (weight.ndim - 2) - 1
        source, positions = self.picked_from(reader, read, axis, torch.tensor(keep))
        key = (source, axis, tuple(positions.tolist()), self.writes_before(reader, source))
        if key not in self.gathers:
            self.gathers[key] = insert_select(
                self.root, self.graph, self.new[source], axis, positions, reader.name, self.pass_name
            )
        return self.gathers[key]

    def picked_from(
        self, reader: fx.Node, source: fx.Node, axis: int, positions: Tensor
    ) -> tuple[fx.Node, Tensor]:
        """Past an `index_select` that feeds the reader: one picks what two would."""
        while source.target is torch.index_select and source.args[1:2] == (axis,) and not source.kwargs:
            index, base = cast(fx.Node, source.args[2]), cast(fx.Node, source.args[0])
            rewritten = self.writes_before(reader, base) != self.writes_before(source, base)
            if index.op != "get_attr" or rewritten:
                break
            source, positions = base, self.program.tensors[cast(str, index.target)][positions]
        return source, positions

    def writes_before(self, reader: fx.Node, read: fx.Node) -> int:
        """How often what is read has been changed in place: two readers may see different values of it."""
        values, at = self.program.values, self.order[reader]
        return sum(
            self.order[w] < at and same_memory(values[w.all_input_nodes[0]], values[read])
            for w in self.writers
        )


def layers_of(layer: nn.Module, weights: Sequence[Tensor], kind: Kind) -> list[nn.Module]:
    """Layers with these weights that together replace one; the last one has its bias."""
    every = tuple(range(len(getattr(layer, "kernel_size", ()))))
    axes = {"svd": (every, ()), "spatial": ((0,), (1,)), "tucker2": ((), every, ())}[kind]
    bias = cast(nn.Parameter | None, layer.bias)
    last = len(weights) - 1
    return [_layer(layer, w, bias if i == last else None, axes[i]) for i, w in enumerate(weights)]


def _layer(like: nn.Module, weight: Tensor, bias: nn.Parameter | None, axes: Sequence[int]) -> nn.Module:
    """A layer with the geometry that `like` has along `axes`, and a kernel of 1 along the others."""
    old = cast(nn.Conv2d, like)
    n, c, *kernel = weight.shape
    if isinstance(like, nn.Linear):
        new: nn.Module = nn.Linear(c, n, bias is not None, device="meta")
    else:
        new = type(old)(
            c,
            n,
            tuple(kernel),  # type: ignore[arg-type]
            stride=_along(axes, old.stride, 1),
            padding=_along(axes, old.padding, 0) if axes else 0,
            dilation=_along(axes, old.dilation, 1),
            bias=bias is not None,
            padding_mode=old.padding_mode if axes else "zeros",
            device="meta",
        )
    new.weight = nn.Parameter(
        weight.to(old.weight.dtype).contiguous(), requires_grad=old.weight.requires_grad
    )
    if bias is not None:
        new.bias = bias
    return new


def _along(axes: Sequence[int], values: Any, neutral: int) -> Any:
    """The values on these axes only; "same" and "valid" padding mean that by themselves."""
    if isinstance(values, str):
        return values
    return tuple(v if d in axes else neutral for d, v in enumerate(values))
