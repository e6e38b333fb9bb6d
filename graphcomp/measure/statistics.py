"""Statistics of activations, as sums that batches and processes add to.

    covariance   a = response of one sample: all dimensions but batch and channels max-pooled    (METHODS 5.1)
                 C = (S2 - S1 S1^T / m) / (m - 1),   S1 = sum (a - s),   S2 = sum (a - s)(a - s)^T
    zeros        entries of a channel that are exactly 0, and how many entries there are         (METHODS 2.1)

The accumulators are sums, in float64 and int64, so that neither the batch size nor the number of processes
matters, and take O(C^2) memory a node. The shift s is the first sample's response, the same in all processes:
without it a large mean would cancel the variance (T5.11).
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from graphcomp.errors import DataError


@dataclass(frozen=True)
class Request:
    """What is asked of one node's output.

    Attributes:
        node: name of the fx node. A layer that is called several times has a node a call; results add up
            (`Covariance.__add__`, `Zeros.__add__`).
        kind: `covariance` of the responses, or `zeros` among the entries.
        dim: dimension of the channels. Dimension 0 is the batch; all others are max-pooled (covariance) or
            counted (zeros).
    """

    node: str
    kind: Literal["covariance", "zeros"]
    dim: int = 1


@dataclass(frozen=True, eq=False)
class Covariance:
    """Second moments of responses. Do not change the tensors in place: they are shared with the cache.

    Attributes:
        samples: m, how many responses there were.
        mean: float64 `[C]`.
        matrix: float64 `[C, C]`, symmetric, centred, divided by m - 1; exactly zero for constant channels.
    """

    samples: int
    mean: Tensor
    matrix: Tensor

    def __add__(self, other: "Covariance") -> "Covariance":
        """The statistics of both sets of responses taken together (Chan, Golub & LeVeque 1983)."""
        m, n = self.samples, other.samples
        gap = other.mean - self.mean
        scatter = (m - 1) * self.matrix + (n - 1) * other.matrix + torch.outer(gap, gap) * (m * n / (m + n))
        return Covariance(m + n, self.mean + gap * (n / (m + n)), scatter / (m + n - 1))


@dataclass(frozen=True, eq=False)
class Zeros:
    """Exact counts of zeros.

    Attributes:
        zeros: int64 `[C]`.
        entries: samples times positions, the same for every channel.
    """

    zeros: Tensor
    entries: int

    @property
    def fraction(self) -> Tensor:
        """Average percentage of zeros, float64 `[C]` in [0, 1] (Hu et al. 2016; METHODS eq. 2.1)."""
        return self.zeros.double() / self.entries

    def __add__(self, other: "Zeros") -> "Zeros":
        """The counts of both taken together."""
        return Zeros(self.zeros + other.zeros, self.entries + other.entries)


Statistic = Covariance | Zeros


class _Sums(Protocol):
    """Additive accumulators of one request.

    Attributes:
        shift: subtracted from the responses; the same in all processes.
        sums: added up over the processes.
    """

    shift: Tensor
    sums: tuple[Tensor, ...]

    def __init__(self, request: Request) -> None: ...

    def start(self, output: Tensor) -> None:
        """Become empty sums for outputs like this one."""

    def add(self, output: Tensor) -> None:
        """Count in the samples of a batch."""

    def result(self) -> Statistic:
        """What was asked for, on the CPU."""


class _Moments:
    """Shifted first and second moments of max-pooled responses."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def start(self, output: Tensor) -> None:
        self.shift = _responses(output, self.request.dim)[0].double()
        width = len(self.shift)
        self.sums = tuple(self.shift.new_zeros(shape) for shape in ((), (width,), (width, width)))

    def add(self, output: Tensor) -> None:
        gaps = _responses(output, self.request.dim).double() - self.shift
        count, first, second = self.sums
        count += len(gaps)
        first += gaps.sum(0)
        second.addmm_(gaps.T, gaps)

    def result(self) -> Covariance:
        count, first, second = (s.cpu() for s in self.sums)
        samples = int(count)
        if samples < 2:
            raise DataError(
                f"calibration: {self.request.node}: found 1 sample, expected at least 2 for a covariance; "
                "give --data more samples"
            )
        scatter = second.addr(first, first, alpha=-1 / samples)
        matrix = (scatter + scatter.T).div_(2 * (samples - 1))
        matrix.diagonal().clamp_(min=0)
        if not bool(torch.isfinite(matrix).all()):
            raise DataError(
                f"calibration: {self.request.node}: found NaN or infinite responses, expected finite ones; "
                "check the weights and the normalisation of --data"
            )
        return Covariance(samples, self.shift.cpu() + first / samples, matrix)


def _responses(output: Tensor, dim: int) -> Tensor:
    """[m, C]: the largest value of each channel of each sample (METHODS 5.1)."""
    channels_second = output.movedim(dim, 1)
    return channels_second if output.ndim == 2 else channels_second.amax(tuple(range(2, output.ndim)))


class _ZeroCounts:
    """Zeros a channel, and entries."""

    def __init__(self, request: Request) -> None:
        self.dim = request.dim

    def start(self, output: Tensor) -> None:
        self.shift = torch.zeros(())  # counts need none
        shapes: list[tuple[int, ...]] = [(output.shape[self.dim],), ()]
        self.sums = tuple(torch.zeros(s, dtype=torch.int64, device=output.device) for s in shapes)

    def add(self, output: Tensor) -> None:
        zeros, entries = self.sums
        # Bytes hold the count of 255 samples, and are added several times faster than booleans.
        found = (output == 0).view(torch.uint8)
        for start in range(0, len(found), 255):
            by_position = found[start : start + 255].sum(0, dtype=torch.uint8)
            by_channel = by_position.movedim(self.dim % output.ndim - 1, 0).reshape(len(zeros), -1)
            zeros += by_channel.sum(1)
        entries += output.numel() // len(zeros)

    def result(self) -> Zeros:
        zeros, entries = (s.cpu() for s in self.sums)
        return Zeros(zeros, int(entries))


SUMS: dict[str, type[_Sums]] = {"covariance": _Moments, "zeros": _ZeroCounts}
