"""The time of one kernel by its widths: which are computed, where it is measured, and the fit between.

    ms(kernel, x, y) = a + b x + c y + d x y      x, y: channels in and out, rounded up to what is computed

Every kernel is fitted with a, b, c, d >= 0 (least squares of relative errors): a prediction never falls when
a width rises. Rounding follows the runtime: on CPUs MLAS computes blocks of channels (`Target.multiple`),
reads images of few channels as they are, and leaves its blocked layout where the number of input channels is
not a multiple of 4, or where groups do not fill their blocks. Linear layers are not rounded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphcomp.channels import next_multiple
from graphcomp.runtime import Kernel, Target

KernelForm = Literal["blocked", "direct", "plain"]

Point = tuple[int, int]
"""Channels in and out."""

Points = Mapping[Point, float]
"""Milliseconds of a kernel by its channels in and out."""

NOISE = 0.05
"""Of the largest time of a kernel: smaller ones are not known better than this, and must not bend the fit."""

MOST_POINTS = 9
"""That a kernel is measured at: a fit has four coefficients."""


def form_of(kernel: Kernel, into: int, out: int, target: Target) -> KernelForm:
    """In which way the runtime computes this (the rules of ONNX Runtime's NCHWc transformer, on CPUs)."""
    if target.provider != "cpu":
        return "blocked"
    if kernel.op == "linear" or len(kernel.plane) != 2:
        return "plain"
    if kernel.op != "conv":
        return "blocked" if into % 4 == 0 else "plain"
    if kernel.groups > 1:
        fills = not (into // kernel.groups % target.multiple or out // kernel.groups % target.multiple)
        return "blocked" if fills else "plain"
    if into < target.multiple:
        return "direct"
    return "blocked" if into % 4 == 0 else "plain"


def computed(form: KernelForm, into: int, out: int, multiple: int) -> Point:
    """The widths that time is paid for: whole blocks of outputs, and of inputs if not read directly."""
    if form == "plain":
        return into, out
    return into if form == "direct" else next_multiple(into, multiple), next_multiple(out, multiple)


@dataclass(frozen=True)
class Fit:
    """`ms(x, y) = a + b x + c y + d x y`, all coefficients at least 0."""

    coefficients: tuple[float, float, float, float]

    def __call__(self, x: float, y: float) -> float:
        """Milliseconds at the widths that are computed."""
        a, b, c, d = self.coefficients
        return a + b * x + c * y + d * x * y


def fit(points: Points) -> Fit:
    """Least squares of relative errors, exact if the points are of this form."""
    from scipy.optimize import nnls  # half a second of its own, for runs that measure alone

    places = np.array(list(points), np.float64)
    times = np.array(list(points.values()))
    scale = places.max(0)
    x, y = (places / scale).T
    scatter = np.maximum(times, NOISE * times.max())[:, None]
    terms = np.stack([np.ones_like(x), x, y, x * y], 1) / scatter
    found, _ = nnls(terms, times / scatter[:, 0])
    a, b, c, d = found
    return Fit((float(a), float(b / scale[0]), float(c / scale[1]), float(d / scale[0] / scale[1])))


def design(widths: Iterable[Point], steps: Point, is_square: bool) -> list[Point]:
    """Where to measure a kernel: at widths that the network has, and at half of them in either direction.

    Args:
        widths: that are needed, as computed.
        steps: what widths are multiples of.
        is_square: both are always the same.
    """
    wanted = set()
    for x, y in widths:
        low = tuple(max(s, next_multiple(w // 2, s)) for w, s in zip((x, y), steps, strict=True))
        if is_square:
            wanted |= {(x, x), (low[0], low[0])}
        else:
            wanted |= {(a, b) for a in (x, low[0]) for b in (y, low[1])}
    ordered = sorted(wanted, key=lambda p: (p[0] * p[1], p))
    if len(ordered) <= MOST_POINTS:
        return ordered
    return [ordered[round(i)] for i in np.linspace(0, len(ordered) - 1, MOST_POINTS)]
