"""dct: store weights as low frequencies of their reordered columns (Ulicny, Krylov and Dahyot 2020).

    X  = W.reshape(g, M)                       N = g M weights of a layer                           (4.1)
    Xs = X[:, order]                           a chain of near columns, `passes.dct.ordering`        (4.2)
    Y  = dct(Xs)[:, :t],  t = floor(M / r)     stored, with the order's inverse           (4.4), Alg. 2
    W~ = idct([Y, 0])[:, argsort(order)]       what the network computes with from now on (4.5), Alg. 3

g t + M numbers stand for g M, about 1/r + 1/g of them; which g and r a layer gets is in `_layout`. Only the
file gets smaller: the weight is rebuilt to do the same arithmetic. Fine-tuning trains the coefficients. What
a layer loses is its nSSE, S[(W - W~)^2] / S[W^2]: by Parseval the share of the energy beyond frequency t.

`method=magnitude` is the baseline of the paper's Table 1: no transform, the t columns of largest norm stay.

The weight that `simulate` writes does not tell by which order it was truncated, and its own chain is another
one. So the order is a decision: a plan holds it, packed, in its `bulk`.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from graphcomp.base import Progress, distributed
from graphcomp.bases import OPTIONS, Globs, not_asked, options_of, require_matches
from graphcomp.ir import PASS_KEY, Basis, Program, assemble, compressed, decode, editable, encode, parts
from graphcomp.passes.dct.layers import is_layer, obstacle, stems_of
from graphcomp.passes.dct.layout import Layout, LayoutRule, layouts
from graphcomp.passes.dct.ordering import OrderDistance, StartNorm
from graphcomp.passes.dct.orders import by_chain, by_norm, orders_of, packed
from graphcomp.passes.dct.stored import decided, stored, summary
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan


@dataclass(frozen=True, config=OPTIONS)
class Dct:
    """Store weights as low DCT frequencies of reordered columns: smaller, not faster (Ulicny et al. 2020)."""

    name: ClassVar[str] = "dct"
    concern: ClassVar[Concern] = "weights"
    keeps_rows: ClassVar[bool] = True

    rate: Annotated[
        float, Field(gt=0, description="r: 1/r of the coefficients stay; progressive-r: 1 + rate * rho")
    ]
    groups: Annotated[int, Field(ge=1, description="g: rows that a weight is read as; 1/g for the order")] = 4
    strategy: Annotated[
        LayoutRule,
        Field(description="uniform, or more rate or groups the larger a layer (rho: sqrt of the proportion)"),
    ] = "uniform"
    method: Annotated[
        Literal["dct", "magnitude"],
        Field(description="magnitude: keep the columns of largest norm instead, as a baseline"),
    ] = "dct"
    reorder: Annotated[bool, Field(description="put columns in order before the transform")] = True
    distance: Annotated[OrderDistance, Field(description="that the order keeps small between neighbours")] = (
        "euclidean"
    )
    start_norm: Annotated[
        StartNorm, Field(description="norm by which the order's first column is largest")
    ] = "l2"
    min_weights: Annotated[int, Field(ge=1, description="layers with fewer weights stay as they are")] = 4096
    stem: Annotated[bool, Field(description="compress convolutions that no other layer precedes, too")] = (
        False
    )
    include: Annotated[Globs, Field(description="globs on module paths of layers")] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths of layers to leave alone")] = ()

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.strategy != "progressive-r" and self.rate < 1:
            raise ValueError(
                f"rate: found {self.rate}, expected at least 1: it is the inverse of what stays, 8 keeps 1/8"
            )
        if self.method == "magnitude" and not self.reorder:
            raise ValueError("reorder: found false, expected true for magnitude, whose order is by norm")
        return self

    def require(self, outlook: Outlook) -> None:
        """Layers for every glob."""
        if outlook.names and outlook.plain:
            layers = (t for t, m in outlook.program.called_modules().items() if is_layer(m))
            require_matches((*self.include, *self.exclude), layers)

    def foresee(self, outlook: Outlook) -> Outlook:
        """Some layers become others, that nothing can be folded into."""
        return replace(outlook, names=False, plain=False)

    def plan(self, program: Program, context: Context) -> Plan:
        """Lay out the layers and order their columns."""
        chosen, kept = self.layout(program)
        orders = distributed.on_first(lambda: self._orders(program, chosen, context.progress))
        rows = [
            stored(program.tensors[f"{x.layer}.weight"], x, orders.get(x.layer), self._basis) for x in chosen
        ]
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={
                "layers": [x.model_dump(mode="json") for x in chosen],
                "basis": self._basis,
                "reorder": self.reorder,
            },
            bulk={layer: packed(order) for layer, order in orders.items()},
            kept=kept,
            summary=summary(rows, len(kept)),
            evidence={"layers": [r.model_dump(mode="json") for r in rows]},
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Write what is left of every weight in its place."""
        basis = plan.decisions["basis"]
        replaced: dict[str, Tensor] = {}
        for x, weight, order in decided(program, plan):
            coefficients = encode(weight.double(), x.rows, x.terms, order, basis)
            index = None if order is None else torch.argsort(order)
            rebuilt = decode(coefficients, x.columns, index, basis)
            replaced[f"{x.layer}.weight"] = rebuilt.reshape(weight.shape).to(weight.dtype)
        return replace(program, module=editable(program, replaced))

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Put a layer that stores coefficients in the place of every layer."""
        root, graph = parts(program)
        made: set[str] = set()
        for x, _, order in decided(program, plan):
            layer = cast(nn.Conv2d | nn.Linear, root.get_submodule(x.layer))
            root.set_submodule(x.layer, compressed(layer, x.rows, x.terms, order, plan.decisions["basis"]))
            made.add(x.layer)
        for node in graph.nodes:
            if node.op == "call_module" and node.target in made:
                node.meta[PASS_KEY] = self.name
        return replace(program, module=assemble(program, root, graph))

    def layout(self, program: Program) -> tuple[list[Layout], list[LeftAlone]]:
        """What every layer becomes, and why the others stay: by shapes alone, in no time."""
        found = {t: m for t, m in program.called_modules().items() if is_layer(m)}
        require_matches((*self.include, *self.exclude), found)
        stems = set() if self.stem else stems_of(program)
        reasons = {name: self._reason(program, name, stems) for name in found}
        counts = {n: program.tensors[f"{n}.weight"].numel() for n, why in reasons.items() if why is None}
        kept = [LeftAlone(where=name, reason=why) for name, why in reasons.items() if why is not None]
        return layouts(counts, self.strategy, self.rate, self.groups), kept

    def _reason(self, program: Program, name: str, stems: set[str]) -> str | None:
        """Why a layer stays as it is."""
        reason = not_asked([name], self.include, self.exclude) or obstacle(program, name)
        if reason is not None:
            return reason
        if name in stems:
            return "a first convolution"
        count = program.tensors[f"{name}.weight"].numel()
        return f"{count} weights, fewer than {self.min_weights}" if count < self.min_weights else None

    @property
    def _basis(self) -> Basis:
        return "dct" if self.method == "dct" else "standard"

    def _orders(self, program: Program, chosen: list[Layout], progress: Progress) -> dict[str, Tensor]:
        near = partial(by_chain, distance=self.distance, start=self.start_norm)
        order = by_norm if self.method == "magnitude" else near
        return orders_of(program, chosen, order, progress) if self.reorder else {}
