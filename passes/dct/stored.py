"""What is stored of a weight, and what is lost: as evidence of a plan, and read back from one."""

from collections.abc import Iterator

from pydantic import Field, ValidationError
from torch import Tensor

from graphcomp.errors import PassError
from graphcomp.ir import Basis, Program, narrowest, spectrum
from graphcomp.passes.dct.layers import obstacle
from graphcomp.passes.dct.layout import Layout
from graphcomp.passes.dct.orders import unpacked
from graphcomp.records import Plan, Record


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


def stored(weight: Tensor, x: Layout, order: Tensor | None, basis: Basis) -> Stored:
    """What storing a weight takes and loses."""
    energies = spectrum(weight.detach().double(), x.rows, order, basis).square()
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


def decided(program: Program, plan: Plan) -> Iterator[tuple[Layout, Tensor, Tensor | None]]:
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


def summary(rows: list[Stored], others: int) -> str:
    """How many layers of how many, in numbers and bytes before and after."""
    weights, coefficients, positions = (
        sum(getattr(r, name) for r in rows) for name in ("weights", "coefficients", "positions")
    )
    before, after = (sum(r.bytes[i] for r in rows) / 1e6 for i in (0, 1))
    return (
        f"stored {len(rows)} of {len(rows) + others} layers as coefficients: {weights:,} weights as "
        f"{coefficients:,} coefficients and {positions:,} positions, {before:.2f} MB as {after:.2f} MB"
    )
