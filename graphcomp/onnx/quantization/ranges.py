"""Ranges of activations and means of channels, in one pass over the data.

A histogram covers [-2^k, 2^k) in bins of equal width, where k is the least that holds all values so far.
When a value lies outside, pairs of bins are merged until it does not: borders of wide bins are borders of
narrow ones, so the histogram of a stream is exactly that of all its values at once, in whatever order and
portions they came.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.errors import ExportError
from graphcomp.onnx.quantization.layers import Layer
from graphcomp.onnx.quantization.sessions import Feeds, observed

BINS = 4096
"""A range has between a half and all of them: a percentile is right to 1/1024 of the largest value."""
_SMALLEST = -100

Share = float | Literal["mean"] | None
"""What a range holds: so many per cent of all values; all of them (None); or what the ends of samples are in
the mean (`mean`), so that a few samples that go far beyond the others do not decide."""


@dataclass
class Histogram:
    """Of all values that were added, see the text of the module.

    Attributes:
        exponent: k.
        counts: int64 (BINS,).
        low, high: the least and the largest value; inf and -inf before the first.
        lows, highs, samples: sums of every sample's least and largest value, and of how many samples.
    """

    exponent: int = _SMALLEST
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    low: float = math.inf
    high: float = -math.inf
    lows: float = 0.0
    highs: float = 0.0
    samples: int = 0

    def add(self, values: NDArray[np.float32], samples: int = 1) -> None:
        """Count finite float32 values of so many samples, at least one each, along the first axis."""
        rows = values.reshape(samples, -1)
        lows, highs = rows.min(1), rows.max(1)
        low, high = float(lows.min()), float(highs.max())
        self.lows += float(lows.sum(dtype=np.float64))
        self.highs += float(highs.sum(dtype=np.float64))
        self.samples += samples
        self.low, self.high = min(self.low, low), max(self.high, high)
        peak = max(-low, high)
        needed = math.frexp(peak)[1] if peak else _SMALLEST  # 2^needed is above it
        while self.exponent < needed:
            self._double()
        # In float64, where the smallest float32 beside the largest does not become 0 and change sides.
        scaled = values.ravel() * np.float64(2.0 ** (BINS.bit_length() - 2 - self.exponent))
        bins = np.floor(scaled).astype(np.int32) + BINS // 2
        self.counts += np.bincount(bins, minlength=BINS)

    def _double(self) -> None:
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.zeros(BINS, np.int64)
        self.counts[BINS // 4 : -BINS // 4] = merged
        self.exponent += 1

    def range(self, share: Share = None) -> tuple[float, float]:
        """See `Share`; of values that are left out as many are on each side.

        Of a share borders of bins, but nowhere outside of the values.
        """
        if share is None:
            return self.low, self.high
        if share == "mean":
            return self.lows / self.samples, self.highs / self.samples
        cut = (100 - share) / 200 * self.counts.sum()
        below = np.cumsum(self.counts)
        first = int(np.searchsorted(below, cut, side="right"))
        last = int(np.searchsorted(below, self.counts.sum() - cut, side="left"))
        width = 2.0 ** (self.exponent + 1) / BINS
        edges = ((first - BINS // 2) * width, (last + 1 - BINS // 2) * width)
        return max(edges[0], self.low), min(edges[1], self.high)


@dataclass(frozen=True)
class Statistics:
    """What one pass over the data tells.

    Attributes:
        histograms: by tensor.
        means: float64 (channels,) of every tensor that a layer reads.
        infinite: tensors with infinities among their values, as scores behind a mask are; the others have
            none.
    """

    histograms: Mapping[str, Histogram]
    means: Mapping[str, NDArray[np.float64]]
    infinite: frozenset[str] = frozenset()

    def ranges(self, share: Share = None) -> dict[str, tuple[float, float]]:
        """By tensor, see `Histogram.range`; from -inf to inf where there are infinities."""
        found = {name: histogram.range(share) for name, histogram in self.histograms.items()}
        return found | dict.fromkeys(sorted(self.infinite), (-math.inf, math.inf))


def collect(model: ModelProto, layers: Sequence[Layer], batches: Sequence[Feeds]) -> Statistics:
    """Run the float model on all batches and look at every float tensor that it reads or makes.

    Args:
        model: left as it is; the shapes of its tensors are inferred.
        layers: of this model.
        batches: at least one.

    Raises:
        ExportError: naming the tensor that is not a number.
    """
    histograms: dict[str, Histogram] = {}
    infinite: set[str] = set()
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    last = {layer.x: layer.channels_last for layer in layers}
    for feeds, batch in zip(batches, observed(model, batches), strict=True):
        count = len(next(iter(feeds.values())))
        for name, values in batch.items():
            if not values.size:
                continue
            if np.isnan(values).any():
                raise ExportError(
                    f"{name}: found NaN on the calibration samples, expected numbers; ranges of 8 bits "
                    "have none; look at the samples with `graphcomp inspect`"
                )
            if name in infinite or np.isinf(values).any():
                infinite.add(name)
                continue
            samples = count if values.shape[:1] == (count,) else 1  # without samples in front it is one
            histograms.setdefault(name, Histogram()).add(values, samples)
            if name in last:
                by_channel = _channels_last(values, last[name])
                sums[name] = sums.get(name, 0.0) + by_channel.sum(0, dtype=np.float64)
                counts[name] = counts.get(name, 0) + len(by_channel)
    means = {name: total / counts[name] for name, total in sums.items()}
    return Statistics(
        {n: h for n, h in histograms.items() if n not in infinite},
        {n: m for n, m in means.items() if n not in infinite},
        frozenset(infinite),
    )


def _channels_last(values: NDArray[Any], last: bool) -> NDArray[Any]:
    """As (positions, channels)."""
    moved = values if last else np.moveaxis(values, 1, -1)
    return moved.reshape(-1, moved.shape[-1])
