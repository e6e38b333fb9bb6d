"""What `refit` is held against: least squares by `lstsq`, layer by layer, and rows by what they hold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphcomp.data.split import Data, Split
from graphcomp.ir.program import Program, editable
from graphcomp.measure import Positions, matrix, outputs_at, patches_at
from graphcomp.passes.refit.layer import BENDS
from graphcomp.passes.refit.lineage import Origin, origins
from graphcomp.passes.refit.units import Unit, find_units
from graphcomp.pipeline import Pass, Pipeline
from graphcomp.pipeline.contract import Context
from graphcomp.records import Plan, Step

ALL = 1 << 20
"""Positions: every one of a map."""


def dense(a: Tensor, t: Tensor, w0: Tensor, ridge: float, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """W `[o, K]` and b `[o]` of one group, float64: rows for the ridge stacked below the data."""
    a, t = a.double(), t.double()
    mean_a, mean_t = (x.mean(0) if intercept else torch.zeros_like(x[0]) for x in (a, t))
    a, t = a - mean_a, t - mean_t
    n, k = a.shape
    level = max(ridge * float(a.square().mean(0).mean()), 1e-12)
    left = torch.cat([a / n**0.5, level**0.5 * torch.eye(k, dtype=a.dtype)])
    right = torch.cat([(t - a @ w0.T) / n**0.5, torch.zeros(k, t.shape[1], dtype=a.dtype)])
    w = w0 + torch.linalg.lstsq(left, right, driver="gelsd").solution.T
    return w, mean_t - w @ mean_a


def samples(x: Tensor) -> Data:
    """These, without labels; to evaluate by them is an error."""

    def forbidden(indices: Any) -> Tensor:
        raise AssertionError("refit looked at evaluation data")

    none = torch.zeros(len(x), dtype=torch.int64)
    train = Split(none, np.arange(len(x)), lambda i: (x[torch.from_numpy(i)],), labelled=False)
    return Data(train, replace(train, fetch=forbidden), 0, "normal", "samples")


def normal_data(shape: Sequence[int], count: int = 64, seed: int = 0) -> Data:
    """Normal samples of a shape without the batch, float64."""
    generator = torch.Generator().manual_seed(seed)
    return samples(torch.randn(count, *shape, generator=generator, dtype=torch.float64))


def all_of(data: Data) -> Tensor:
    (x,), _ = next(data.train.batches(len(data.train)))
    return x


@dataclass(frozen=True)
class Ran:
    """A pipeline that was run: programs (0: the input), plans and records by step."""

    passes: tuple[Pass, ...]
    programs: list[Program]
    plans: list[Plan]
    steps: list[Step]

    @property
    def result(self) -> Program:
        return self.programs[-1]


def run(passes: Sequence[Pass], program: Program, given: Context) -> Ran:
    programs = [program]
    pipeline = Pipeline(list(passes), [lambda _, result: programs.append(result)], allow_nothing=True)
    _, steps = pipeline.run(program, given)
    return Ran(tuple(passes), programs, [step.plan for step in steps], steps)


def lineage(ran: Ran) -> dict[str, Origin]:
    """Of the result's layers in the input, by the plans of all passes but those that move no row."""
    moving = [p for p in zip(ran.passes, ran.plans, strict=True) if not _keeps_rows(p[0])]
    return origins(ran.programs[0], [partial(_replayed, *pair) for pair in moving])


def _keeps_rows(pass_: Pass) -> bool:
    return hasattr(pass_, "train") or getattr(pass_, "keeps_rows", False)


def _replayed(pass_: Pass, plan: Plan, program: Program) -> Program:
    return pass_.rewrite(program, plan)


# ---- The fit, done again


class _Recorder(fx.Interpreter):
    """What every node yields and every layer reads, as it is when the node runs."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.read: dict[str, Tensor] = {}
        self.yielded: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            self.read[n.name] = self.fetch_args_kwargs_from_env(n)[0][0].clone()
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.yielded[n.name] = value.clone()
        return value


@torch.no_grad()
def recorded(program: Program, x: Tensor) -> _Recorder:
    recorder = _Recorder(program)
    recorder.run(x.clone())
    return recorder


@torch.no_grad()
def fitted_by_hand(
    unit: Unit, before: Program, own: _Recorder, theirs: _Recorder, ridge: float | None
) -> tuple[Tensor, Tensor]:
    """W `[g, o, K]` (of a factor and its layer together) and b `[g, o]`, at all positions of all samples.

    b is what the layer adds; without a bias of its own, what a normalisation behind it is to add to it.

    Args:
        own, theirs: what the fitted program reads and yields, and the original. Later calls of a layer are
            fitted to what they read while it has its old weights.
        ridge: None: only b is fitted.
    """
    first = before.layer(unit.layer if unit.factor is None else unit.factor[0])
    w = product(before, unit)
    parts = [_of_call(call, before, first, own, theirs) for call in unit.calls]
    a, target, other = (torch.cat(found) for found in zip(*(p[:3] for p in parts), strict=True))
    low, high = (torch.cat(found).unsqueeze(1) for found in zip(*(p[3:] for p in parts), strict=True))
    layer = before.layer(unit.layer)
    scale, shift = torch.ones(target.shape[1]).double(), torch.zeros(target.shape[1]).double()
    bias = getattr(layer, "bias", None)
    intercept = bias is not None or unit.norm is not None
    if unit.norm is not None:
        norm: Any = before.layer(unit.norm)
        scale = 1 / torch.sqrt(norm.running_var + norm.eps)
        shift = -norm.running_mean * scale
        if norm.affine:
            scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    b = torch.zeros(w.shape[:2]).double() if bias is None else bias.reshape(w.shape[:2])
    is_bent = bool(low.isfinite().any() or high.isfinite().any())
    for bent in [False, *[True] * BENDS] if is_bent else [False]:
        u = (torch.einsum("ngk,gok->ngo", a, w) + b).flatten(1)
        z, d = u * scale + shift + other, target
        if bent:
            d = torch.where((target < low) & (z < low), z, torch.maximum(d, low))
            d = torch.where((target > high) & (z > high), z, torch.minimum(d, high))
        goals = ((d - other - shift) / scale).reshape(len(d), *w.shape[:2])
        if ridge is None:
            return w, (goals - torch.einsum("ngk,gok->ngo", a, w)).mean(0) if intercept else b
        new = [dense(a[:, g], goals[:, g], w[g], ridge, intercept=intercept) for g in range(w.shape[0])]
        w, b = torch.stack([p[0] for p in new]), torch.stack([p[1] for p in new])
        if unit.factor is not None:
            assert isinstance(first.weight, Tensor)
            rank, mean = len(first.weight), a[:, 0].mean(0)
            yielded = (a[:, 0] - mean) @ w[0].T * scale
            vectors = torch.linalg.svd(yielded, full_matrices=False).Vh[:rank]
            cut = (vectors.T @ vectors @ (scale.unsqueeze(1) * w[0])) / scale.unsqueeze(1)
            b = b + (w[0] - cut) @ mean if intercept else b
            w = cut.unsqueeze(0)
    return w, b


def _of_call(
    call: Unit, before: Program, first: nn.Module, own: _Recorder, theirs: _Recorder
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of one call: what is read, the target, what is added, and between which bounds it counts."""
    layer = before.layer(call.layer)
    y = own.yielded[call.node.name]
    maps = 1 if call.is_last else len(y)
    plane = y.shape[:-1].numel() // maps if call.is_last else y.shape[2:].numel()
    at = Positions(ALL, 0).of(plane, 0, maps)
    read = call.node if call.factor is None else call.factor[1]
    a = patches_at(first, own.read[read.name], at)
    target = outputs_at(layer, theirs.yielded[call.seen], at)[:, call.origin.rows]
    other = outputs_at(layer, own.yielded[call.other.name], at) if call.other is not None else 0 * target
    low, high = (torch.full((len(a),), bound, dtype=torch.float64) for bound in (call.low, call.high))
    return a, target, other, low, high


def product(program: Program, unit: Unit) -> Tensor:
    """W of a unit."""
    last = matrix(program.layer(unit.layer))
    return last if unit.factor is None else last @ matrix(program.layer(unit.factor[0]))


def units_of(original: Program, program: Program, found: Mapping[str, Origin]) -> list[Unit]:
    return find_units(program, original, found)[0]


def _with_old(after: Program, before: Program, unit: Unit) -> Program:
    """The fitted program with the weights that a layer had before."""
    names = [name for name in after.tensors if name.startswith(f"{unit.layer}.")]
    old = {name: before.tensors[name] for name in names}
    return replace(after, module=editable(after, old))


def check_fit(ran: Ran, original: Program, data: Data, ridge: float) -> int:
    """Every layer of a run that ends with `refit` is what `lstsq` says; returns how many were fitted.

    Args:
        ran: whose last pass is a refit at all positions with this ridge.
        original: what it was fitted to, with the normalisations folded that the run folded.
        data: float64.
    """
    before, after = ran.programs[-2], ran.result
    fit = ran.steps[-1].fit
    assert fit is not None
    found = lineage(replace(ran, passes=ran.passes[:-1], plans=ran.plans[:-1]))
    units = {u.layer: u for u in units_of(original, before, found)}
    assert [row.layer for row in fit.layers] == list(units)
    own_values, theirs = (recorded(p, all_of(data)) for p in (after, original))
    count = 0
    for row in fit.layers:
        own, unit = after.layer(row.layer), units[row.layer]
        if row.after == row.before:
            assert torch.equal(product(after, unit), product(before, unit))
            continue
        assert row.ridge in (ridge, None)
        mine = recorded(_with_old(after, before, unit), all_of(data)) if unit.later else own_values
        w, b = fitted_by_hand(unit, before, mine, theirs, row.ridge)
        size = float(w.abs().max())
        assert torch.allclose(product(after, unit), w, rtol=0, atol=1e-6 * size), row.layer
        if getattr(own, "bias", None) is not None:
            assert torch.allclose(own.bias, b.flatten(), rtol=1e-6, atol=1e-6 * size), row.layer  # type: ignore[arg-type]
        elif unit.norm is not None:
            was, now = (p.layer(unit.norm).running_mean for p in (before, after))
            assert isinstance(was, Tensor) and isinstance(now, Tensor)
            assert torch.allclose(was - now, b.flatten(), rtol=1e-6, atol=1e-6 * size), row.layer
        count += 1
    return count
