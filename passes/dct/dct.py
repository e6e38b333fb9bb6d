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

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, fx, nn

from graphcomp.base import distributed
from graphcomp.bases import OPTIONS, Globs, matches, options_of, require_matches
from graphcomp.errors import PassError
from graphcomp.factors import irreplaceable
from graphcomp.ir import (
    PASS_KEY,
    Basis,
    DctLayer,
    Program,
    assemble,
    compressed,
    decode,
    editable,
    encode,
    narrowest,
    parts,
    spectrum,
)
from graphcomp.measure import layer_row
from graphcomp.passes.dct.layout import Layout, LayoutRule, layouts
from graphcomp.passes.dct.ordering import OrderDistance, StartNorm
from graphcomp.passes.dct.orders import by_chain, by_norm, packed, unpacked
from graphcomp.pipeline import Concern, Context, Outlook
from graphcomp.records import LeftAlone, Plan, Record


class Stored(Record):
    """One layer's numbers; `evidence["layers"]` of a plan is a list of them."""

    layer: str
    weights: int
    coefficients: int = Field(description="trainable")
    positions: int = Field(description="of the order: stored, never trained")
    rows: int
    terms: int
    nsse: float = Field(description="energy that is lost, as a share of the weight's")
    bytes: tuple[int, int] = Field(description="of the weight before, of coefficients and order after")


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
    allow_nothing: Annotated[bool, Field(description="compressing nothing is no error")] = False

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
            layers = (t for t, m in outlook.program.called_modules().items() if _is_layer(m))
            require_matches((*self.include, *self.exclude), layers)

    def foresee(self, outlook: Outlook) -> Outlook:
        """Some layers become others, that nothing can be folded into."""
        return replace(outlook, names=False, plain=False)

    def plan(self, program: Program, context: Context) -> Plan:
        """Lay out the layers and order their columns; PassError if there is no layer to compress."""
        chosen, kept = self.layout(program)
        if not chosen and not self.allow_nothing:
            reasons = "; ".join(f"{k.where}: {k.reason}" for k in kept[:5]) or "the network has no such layer"
            raise PassError(
                f"found no layer to compress ({reasons}), expected some; set allow_nothing to accept"
            )
        orders = distributed.on_first(lambda: self._orders(program, chosen, context))
        rows = [self._stored(program.tensors[f"{x.layer}.weight"], x, orders.get(x.layer)) for x in chosen]
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
            summary=_summary(rows, len(kept)),
            evidence={"layers": [r.model_dump(mode="json") for r in rows]},
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Write what is left of every weight in its place."""
        basis = plan.decisions["basis"]
        replaced: dict[str, Tensor] = {}
        for x, weight, order in _decided(program, plan):
            coefficients = encode(weight.double(), x.rows, x.terms, order, basis)
            index = None if order is None else torch.argsort(order)
            rebuilt = decode(coefficients, x.columns, index, basis)
            replaced[f"{x.layer}.weight"] = rebuilt.reshape(weight.shape).to(weight.dtype)
        return Program(editable(program, replaced), program.example_inputs, program.history)

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Put a layer that stores coefficients in the place of every layer."""
        root, graph = parts(program)
        made: set[str] = set()
        for x, _, order in _decided(program, plan):
            layer = cast(nn.Conv2d | nn.Linear, root.get_submodule(x.layer))
            root.set_submodule(x.layer, compressed(layer, x.rows, x.terms, order, plan.decisions["basis"]))
            made.add(x.layer)
        for node in graph.nodes:
            if node.op == "call_module" and node.target in made:
                node.meta[PASS_KEY] = self.name
        return Program(assemble(program, root, graph), program.example_inputs, program.history)

    def layout(self, program: Program) -> tuple[list[Layout], list[LeftAlone]]:
        """What every layer becomes, and why the others stay: by shapes alone, in no time."""
        found = {t: m for t, m in program.called_modules().items() if _is_layer(m)}
        require_matches((*self.include, *self.exclude), found)
        stems = set() if self.stem else _stems(program)
        reasons = {name: self._reason(program, name, stems) for name in found}
        counts = {
            n: program.tensors[f"{n}.weight"].numel() for n, reason in reasons.items() if reason is None
        }
        kept = [
            LeftAlone(where=name, reason=reason) for name, reason in reasons.items() if reason is not None
        ]
        return layouts(counts, self.strategy, self.rate, self.groups), kept

    def _reason(self, program: Program, name: str, stems: set[str]) -> str | None:
        """Why a layer stays as it is."""
        if not any(fnmatch(name, glob) for glob in self.include):
            return "not included"
        if matches([name], self.exclude):
            return "excluded"
        reason = obstacle(program, name)
        if reason is not None:
            return reason
        if name in stems:
            return "a first convolution"
        count = program.tensors[f"{name}.weight"].numel()
        return f"{count} weights, fewer than {self.min_weights}" if count < self.min_weights else None

    @property
    def _basis(self) -> Basis:
        return "dct" if self.method == "dct" else "standard"

    def _orders(self, program: Program, chosen: list[Layout], context: Context) -> dict[str, Tensor]:
        orders: dict[str, Tensor] = {}
        done, total = 0, sum(x.columns for x in chosen)
        for x in chosen if self.reorder else ():
            context.progress(f"order the columns of {x.layer}", done / total)
            weight = program.tensors[f"{x.layer}.weight"].detach()
            if self.method == "magnitude":
                orders[x.layer] = by_norm(weight, x)
            else:
                orders[x.layer] = by_chain(weight, x, self.distance, self.start_norm)
            done += x.columns
        return orders

    def _stored(self, weight: Tensor, x: Layout, order: Tensor | None) -> Stored:
        energies = spectrum(weight.detach().double(), x.rows, order, self._basis).square()
        whole, lost = float(energies.sum()), float(energies[:, x.terms :].sum())
        positions = 0 if order is None else x.columns
        size = x.coefficients * weight.itemsize + positions * narrowest(x.columns).itemsize
        return Stored(
            layer=x.layer,
            weights=x.weights,
            coefficients=x.coefficients,
            positions=positions,
            rows=x.rows,
            terms=x.terms,
            nsse=lost / whole if whole else 0.0,
            bytes=(x.weights * weight.itemsize, size),
        )


# ---------------------------------------------------------------------- which layers


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd | nn.Linear | DctLayer)


def obstacle(program: Program, layer: str) -> str | None:
    """Why a layer's weight cannot, or by METHODS 4.4 should not, be stored as coefficients."""
    module = program.called_modules()[layer]
    if isinstance(module, DctLayer):
        return "it is stored as coefficients already"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"{type(module).__name__} is neither Conv2d nor Linear"
    groups = getattr(module, "groups", 1)
    if groups > 1 and groups == module.in_channels:
        return "a depthwise convolution"
    return irreplaceable(program, layer)


def _stems(program: Program) -> set[str]:
    """Convolutions that read the network's inputs through nothing that has weights of such a layer."""
    behind: set[fx.Node] = set()
    stems: set[str] = set()
    for node in program.graph.nodes:
        sources = set(node.all_input_nodes)
        row = layer_row(program, node)
        if row is not None or sources & behind:
            behind.add(node)
        if row is not None and not sources & behind and row.kind == "Conv2d":
            stems.add(cast(str, node.target))
    return stems


# ---------------------------------------------------------------------- plans


def _decided(program: Program, plan: Plan) -> Iterator[tuple[Layout, Tensor, Tensor | None]]:
    """What a plan says of every layer: its layout, its weight, its order; PassError if they do not fit."""
    for record in plan.decisions["layers"]:
        try:
            x = Layout.model_validate(record)
        except ValidationError as error:
            raise PassError(f"plan: {error}; expected a plan as dct makes it") from error
        layers = program.called_modules()
        reason = obstacle(program, x.layer) if x.layer in layers else "the network has no such layer"
        weight = program.tensors.get(f"{x.layer}.weight")
        if reason is None and weight is not None and weight.numel() != x.weights:
            reason = f"it has {weight.numel()} weights"
        if reason is not None or weight is None:
            raise PassError(
                f"{x.layer}: found {reason}, expected a layer of {x.weights} weights to compress; "
                "use a plan that was made for this program"
            )
        order = unpacked(plan.bulk, x) if plan.decisions["reorder"] else None
        yield x, weight.detach(), None if order is None else order.to(weight.device)


def _summary(rows: list[Stored], others: int) -> str:
    weights, coefficients, positions = (
        sum(getattr(r, name) for r in rows) for name in ("weights", "coefficients", "positions")
    )
    before, after = (sum(r.bytes[i] for r in rows) / 1e6 for i in (0, 1))
    return (
        f"stored {len(rows)} of {len(rows) + others} layers as coefficients: {weights:,} weights as "
        f"{coefficients:,} coefficients and {positions:,} positions, {before:.2f} MB as {after:.2f} MB"
    )
