"""Scales of 8 bit weights, and the error of a mean that they leave.

Kernels of x86 without VNNI multiply u8 activations by s8 weights with `vpmaddubsw`, which adds the products
of two neighbouring taps in int16 and saturates silently: 255 a + 255 b, beyond [-32768, 32767]. The sum is
largest where the activations of negative weights are 0, so no input saturates exactly if in every pair

    max(a, 0) + max(b, 0) <= 128      and      min(a, 0) + min(b, 0) >= -128.

Rounded quotients do not grow with the scale, so the scales that satisfy it are all from some least one on,
which is found by bisection over float32.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Grid = Literal["pairs", "plain", "reduced"]
"""`plain`: 8 bit; `pairs`: 8 bit, coarser only in channels where two neighbouring taps would saturate;
`reduced`: 7 bit, which is ONNX Runtime's `reduce_range`."""

GRIDS: tuple[Grid, ...] = get_args(Grid)
PAIR = 128
"""255 * 128 fits int16, 255 * 129 does not."""
LARGEST: dict[Grid, int] = {"pairs": 127, "plain": 127, "reduced": 64}
"""Magnitude of a multiple."""


def scales(
    taps: NDArray[np.float32], grid: Grid, least: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    """One scale an output channel; 1 where all its taps are 0 and nothing else asks for more.

    Args:
        taps: finite, (output channels, taps), in the order in which the kernel adds them.
        grid: which weights are allowed.
        least: (output channels,) scales that must not be gone below, e.g. of biases.
    """
    peak = np.abs(taps).max(1, initial=0.0)
    start = peak.astype(np.float64) / LARGEST[grid]
    if least is not None:
        start = np.maximum(start, least)
    start = np.where(start > np.finfo(np.float32).tiny, start, 1.0).astype(np.float32)
    return _smallest(taps, start) if grid == "pairs" else start


def quantised(taps: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """The nearest multiples, ties to even, of weights (output channels, taps)."""
    return np.asarray(np.clip(np.rint(taps / scale[:, None]), -128, 127).astype(np.int8))


def saturates(weights: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Of (output channels, taps): in which channels a pair of neighbouring taps can."""
    even = np.pad(weights.astype(np.int16), ((0, 0), (0, weights.shape[1] % 2)))
    pairs = even.reshape(len(even), -1, 2)
    positive, negative = np.maximum(pairs, 0).sum(2), np.minimum(pairs, 0).sum(2)
    return np.asarray(((positive > PAIR) | (negative < -PAIR)).any(1))


def _smallest(taps: NDArray[np.float32], start: NDArray[np.float32]) -> NDArray[np.float32]:
    """The least float32 scales from `start` on at which no channel saturates."""
    found = start.copy()
    todo = np.flatnonzero(saturates(quantised(taps, start)))
    if not len(todo):
        return found
    # At twice the scale every weight is at most 64. Positive floats are ordered as their bits are.
    rows, low = taps[todo], start[todo].view(np.int32).astype(np.int64)
    high = (start[todo] * np.float32(2)).view(np.int32).astype(np.int64) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        bad = saturates(quantised(rows, middle.astype(np.int32).view(np.float32)))
        low, high = np.where(bad, middle, low), np.where(bad, high, middle)
    found[todo] = high.astype(np.int32).view(np.float32)
    return found


def shift(lost: NDArray[np.float32], means: NDArray[np.float64], groups: int = 1) -> NDArray[np.float64]:
    """What a bias has to gain so that the mean of a layer's output stays: sum of (W - W^) E[x].

    Nagel et al. 2019, section 4.2.

    At the border of a padded convolution fewer taps see the mean, which is not looked at.

    Args:
        lost: W - W^ as (output channels, positions of the kernel, input channels of a group).
        means: E[x] by input channel, of all groups.
        groups: of the convolution.
    """
    by_channel = lost.sum(1, dtype=np.float64).reshape(groups, -1, lost.shape[2])
    return np.asarray(np.einsum("goc,gc->go", by_channel, means.reshape(groups, -1)).ravel())
