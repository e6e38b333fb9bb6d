"""Which 8 bit form of a file: ranges with the best outputs, a grid that cannot saturate, what is in float.

Layers that do most harm alone are tried in float, the worst first. One stays there if the outputs become
better and the file does not become slower than with every layer in 8 bits: a layer that reads or makes few
channels costs as much in float.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.errors import ExportError
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.grids import Grid
from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.qdq import Choice, compensate, write_qdq
from graphcomp.onnx.quantization.ranges import Share, Statistics
from graphcomp.onnx.quantization.samples import outputs
from graphcomp.onnx.quantization.sessions import Feeds
from graphcomp.onnx.quantization.spreading import Factors
from graphcomp.records import GivenBack, Kernels

SHARES: tuple[Share, ...] = (None, 99.999, 99.99, "mean")
"""Ranges that are tried."""
SLOWER = 1.01
"""Up to which a time is none that rose: medians of a race repeat to about a hundredth."""
MOST_TRIES, MOST_REFUSED = 8, 3
"""Layers that are tried in float, and how many in a row may be refused before it ends."""
_ALONE = 2  # batches that tell what one layer does

Race = Callable[[Sequence[bytes]], list[float]]
"""Times of models, run in turn."""


@dataclass(frozen=True, eq=False)
class Work:
    """What all attempts at a file share.

    Attributes:
        model, layers: the file, and those of its layers that can be 8 bit.
        left: the others, and why.
        fitted, statistics: batches of calibration samples, and what is known of them.
        held: batches that are held out.
        expected: what the model computes from them.
        factors: that are in the model's weights, see `spreading`.
        kernels: that the file is for. Those of GPUs do not run here: it is looked at as written.
    """

    model: ModelProto
    layers: Sequence[Layer]
    left: Mapping[str, str]
    fitted: Sequence[Feeds]
    statistics: Statistics
    held: Sequence[Feeds]
    expected: list[NDArray[Any]]
    factors: Factors = field(default_factory=dict)
    kernels: Kernels = "cpu"


@dataclass(frozen=True, eq=False)
class Attempt:
    """An 8 bit form: the model, what was chosen, dB by range, steps by layer, and what it left in float."""

    model: ModelProto
    choice: Choice
    tried: dict[str, float]
    decibels: float
    steps: dict[str, int]
    layers: Sequence[Layer]
    left: Mapping[str, str]
    given_back: list[GivenBack] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Layers that compute something else."""
        return [name for name, steps in self.steps.items() if steps > 1]


def checked(work: Work, grid: Grid | None, own: Grid) -> Attempt:
    """With the grid that was asked for; else `own`, and 7 bit, and wrong layers in float.

    Raises ExportError where fused layers compute something else in spite of that.
    """
    if grid is not None:
        found = _attempt(work, grid, {})
    else:
        found = _attempt(work, own, {})
        if found.wrong:
            found = _attempt(work, "reduced", {})
        if found.wrong:
            why = "its fused kernel computes something else than the layer as written"
            found = _attempt(work, "reduced", dict.fromkeys(found.wrong, why))
    if found.wrong:
        worst = max(found.wrong, key=lambda name: found.steps[name])
        raise ExportError(
            f"{worst}: found its fused kernel {found.steps[worst]} steps of its output away from the layer "
            f"as written (and {len(found.wrong) - 1} more), expected at most 1; with the grid "
            f"{found.choice.grid!r} sums saturate on this machine; use pairs or reduced"
        )
    return found


def _attempt(work: Work, grid: Grid, wrong: Mapping[str, str]) -> Attempt:
    statistics = work.statistics
    layers = [layer for layer in work.layers if layer.name not in wrong]
    names, others = tuple(layer.name for layer in layers), (*work.left, *wrong)
    choices = [
        Choice(
            grid,
            share,
            statistics.ranges(share),
            statistics.means,
            names,
            others,
            work.factors,
            kernels=work.kernels,
        )
        for share in SHARES
    ]
    made = [write_qdq(work.model, layers, choice) for choice in choices]
    decibels = [_snr(work, one) for one in made]
    best = max(range(len(made)), key=decibels.__getitem__)
    tried = dict(zip(map(_said, SHARES), decibels, strict=True))
    choices.append(compensate(work.model, layers, choices[best], work.fitted))
    made.append(write_qdq(work.model, layers, choices[-1]))
    decibels.append(_snr(work, made[-1]))
    tried[f"{_said(SHARES[best])}, compensated"] = decibels[-1]
    best = max(best, len(SHARES), key=decibels.__getitem__)
    steps = _steps(work, made[best], layers)
    left = {**work.left, **wrong}
    return Attempt(made[best], choices[best], tried, decibels[best], steps, layers, left)


def _said(share: Share) -> str:
    """Of ranges, for reports."""
    if share is None:
        return "MinMax"
    return "means of samples" if share == "mean" else f"{share} %"


def _steps(work: Work, made: ModelProto, layers: Sequence[Layer]) -> dict[str, int]:
    """How far fused layers are from themselves as written; nothing of kernels that do not run here."""
    return checks.errors_by_layer(made, layers, work.held[0]) if work.kernels == "cpu" else {}


def _snr(work: Work, made: ModelProto, batches: int | None = None) -> float:
    """Of the outputs on held-out samples, or on the first batches of them."""
    fed = work.held[:batches]
    expected = work.expected[: len(work.expected) * len(fed) // len(work.held)]
    return checks.snr(expected, outputs(made.SerializeToString(), fed, plain=work.kernels != "cpu"))


def give_back(work: Work, found: Attempt, race: Race) -> Attempt:
    """Layers that do most harm in 8 bits go back to float while that takes no time (see the module)."""
    if len(found.layers) < 2:
        return found
    alone = {
        x.name: _snr(work, write_qdq(work.model, found.layers, found.choice, x.name), _ALONE)
        for x in found.layers
    }
    every, best, tried, refused = found.model.SerializeToString(), found, list[GivenBack](), 0
    for name in sorted(alone, key=alone.__getitem__)[: min(MOST_TRIES, len(alone) - 1)]:
        attempt = _without(work, best, name)
        if attempt.wrong:
            continue
        time = _time(race, every, attempt)
        if time <= SLOWER:  # chance alone says so now and then: it has to say it twice
            time = max(time, _time(race, every, attempt))
        kept = attempt.decibels > best.decibels and time <= SLOWER
        tried.append(
            GivenBack(name=name, alone_db=alone[name], snr_db=attempt.decibels, time=time, kept=kept)
        )
        best, refused = (attempt, 0) if kept else (best, refused + 1)
        if refused == MOST_REFUSED:
            break
    return replace(best, given_back=tried)


def _time(race: Race, every: bytes, attempt: Attempt) -> float:
    times = race([every, attempt.model.SerializeToString()])
    return times[1] / times[0]


def _without(work: Work, found: Attempt, name: str) -> Attempt:
    """With one more layer in float."""
    layers = [layer for layer in found.layers if layer.name != name]
    names, others = tuple(layer.name for layer in layers), (*found.choice.in_float, name)
    choice = replace(found.choice, layers=names, in_float=others)
    made = write_qdq(work.model, layers, choice)
    steps = _steps(work, made, layers)
    left = {**found.left, name: "the outputs are better for it, and it takes no time"}
    return replace(
        found, model=made, choice=choice, decibels=_snr(work, made), steps=steps, layers=layers, left=left
    )
