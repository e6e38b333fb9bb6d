"""The decision by the loss's gradient: curves of all layers, a rate for each, the form that meets it."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from graphcomp.base import Progress, distributed, part
from graphcomp.data import Data
from graphcomp.errors import DataError
from graphcomp.factors import Factor, layer_macs
from graphcomp.ir import Program
from graphcomp.measure import macs, mean_gradients
from graphcomp.passes.cc.analysis import Analysis, side_by_side
from graphcomp.passes.cc.decided import Allocated, CompressibleLayer, hand_back
from graphcomp.passes.cc.forms import Compression
from graphcomp.passes.cc.gcro import solve_rates
from graphcomp.passes.cc.options import Options

GRADIENT_PART = 0.5
"""Of the progress bar."""


def by_gradients(
    program: Program, names: Sequence[str], data: Data | None, options: Options, multiple: int, tell: Progress
) -> list[Allocated]:
    """A row a layer; collective.

    Raises:
        DataError: no data. PassError: the rate cannot be met.
    """
    if not names:
        return []
    if data is None:
        raise DataError("gradients: found no data, expected labelled samples; give --data")
    weights = [f"{name}.weight" for name in names]
    gradients = mean_gradients(
        program, data.train, weights, samples=options.samples, progress=part(tell, 0, GRADIENT_PART)
    )
    by_layer = {name: gradients[weight] for name, weight in zip(names, weights, strict=True)}
    rest = part(tell, GRADIENT_PART, 1 - GRADIENT_PART)
    # What follows needs no data, and the others would only do it again.
    return distributed.on_first(lambda: _decided(program, by_layer, options, multiple, rest))


def _decided(
    program: Program, gradients: Mapping[str, Tensor], options: Options, multiple: int, tell: Progress
) -> list[Allocated]:
    layers = _analysed(program, gradients, options, multiple, part(tell, 0, 0.2))
    rates = solve_rates(
        [layer.analysis.fit for layer in layers],
        [layer.macs for layer in layers],
        macs(program),
        options.rate,
        [min(options.ceiling, layer.most) for layer in layers],
        slope=options.slope,
        official_clip=options.official_clip,
    )
    goals = [(1 - rate) * layer.macs for layer, rate in zip(layers, rates, strict=True)]
    counter = _counted(part(tell, 0.2, 0.8), "units", len(layers))
    forms = side_by_side(lambda pair: pair[0].form(pair[1]), zip(layers, goals, strict=True), counter)
    if multiple > 1:
        forms = hand_back(layers, goals, forms)
    return [_row(*decided, options) for decided in zip(layers, rates, forms, strict=True)]


def _analysed(
    program: Program, gradients: Mapping[str, Tensor], options: Options, multiple: int, tell: Progress
) -> list[CompressibleLayer]:
    def analysed(name: str) -> CompressibleLayer:
        weight = program.tensors[f"{name}.weight"]
        analysis = Analysis(weight, gradients[name], options.gamma, options.step, options.lookahead)
        return CompressibleLayer(name, analysis, layer_macs(program, Factor(layer=name)), multiple)

    return side_by_side(analysed, gradients, _counted(tell, "curves", len(gradients)))


def _row(layer: CompressibleLayer, rate: float, form: Compression, options: Options) -> Allocated:
    shape, fit = layer.analysis.shape, layer.analysis.fit
    factor = layer.factor(form)
    return Allocated(
        factor=factor,
        reason=(layer.reason(rate) if form.removed == 0 else None) or options.outside(layer.name),
        rate=rate,
        reached=1 - shape.macs(len(form.keep), factor.rank) / shape.macs(),
        macs=layer.macs,
        channels=shape.channels,
        full_rank=shape.directions,
        fit=None if fit is None else (fit.a, fit.b),
        exact=layer.analysis.exact,
        removed=layer.analysis.units[: form.removed],
    )


def _counted(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """A progress bar by number."""
    return lambda done: progress(f"{what}: {done} of {total} layers", done / total)
