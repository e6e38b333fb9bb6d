"""Statistics of activations: one streaming pass over the data for all that is asked for.

    covariance   a = response of one sample: all dimensions but batch and channels max-pooled    (METHODS 5.1)
                 C = (S2 - S1 S1^T / m) / (m - 1),   S1 = sum (a - s),   S2 = sum (a - s)(a - s)^T
    zeros        entries of a channel that are exactly 0, and how many entries there are         (METHODS 2.1)

The accumulators are sums, in float64 and int64, so that neither the batch size nor the number of processes
matters, and take O(C^2) memory a node. The shift s is the first sample's response, the same in all processes:
without it a large mean would cancel the variance (T5.11).

Results are kept by content (`base.cache`): the same program on the same samples is run once, also over
several recipes.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from graphcomp.base import Progress, distributed, quiet
from graphcomp.base import cache as disk
from graphcomp.data import Split
from graphcomp.errors import AnalysisError, DataError
from graphcomp.ir import Program, editable, evaluating

BATCHES = 16, 128
"""Fewest and most samples at a time."""

ELEMENTS = 1 << 21
"""Of the largest activation at a time: what stays in the caches is faster, 1.6 times for a ResNet-56."""

KIND = "calibration"
"""Of entries in the cache."""

Watcher = Callable[[Tensor], None]


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


def collect(
    program: Program,
    split: Split,
    requests: Iterable[Request],
    *,
    samples: int | None = None,
    batch: int | None = None,
    cache: bool = True,
    memory: MutableMapping[str, Statistic] | None = None,
    progress: Progress = quiet,
) -> dict[Request, Statistic]:
    """Everything that is asked for, from one pass over the data in eval mode; collective (see `distributed`).

    Args:
        program: a network with one input; left as it is.
        split: the samples.
        requests: duplicates are answered once. Ask for all at once: each call may be a pass over the data.
        samples: only the first so many of the split. Fewer than channels give a singular covariance.
        batch: samples at a time; by default `batch_size(program)`. The result only depends on it as far as
            float32 inference does.
        cache: read and write the cache on disk.
        memory: results of earlier calls, by content; read and extended.
        progress: told a message and the fraction of the samples that were seen.

    Raises:
        AnalysisError: no such node, no such dimension, or a network with several inputs.
        DataError: no samples; one sample, for a covariance; responses that are not finite.
    """
    wanted = list(dict.fromkeys(requests))
    _check(program, wanted)
    part = _first(split, samples)
    keys = _keys(program, part, wanted) if cache or memory is not None else {}
    found = distributed.on_first(lambda: _known(keys, memory or {}, cache))
    missing = [r for r in wanted if r not in found]
    if missing:
        new = _measure(program, part, missing, batch or batch_size(program), progress)
        if cache and distributed.is_first():
            for request in missing:
                disk.store(KIND, keys[request], _packed(new[request]))
        found |= new
    if memory is not None:
        memory.update((keys[r], found[r]) for r in wanted)
    return {r: found[r] for r in wanted}


def batch_size(program: Program) -> int:
    """Samples at a time: as many as have a largest activation of `ELEMENTS`, within `BATCHES`."""
    shapes = (program.shape(node) for node in program.graph.nodes if node.op != "get_attr")
    largest = max((int(np.prod(shape)) for shape in shapes if shape is not None), default=1)
    return min(max(ELEMENTS // largest, BATCHES[0]), BATCHES[1])


def _first(split: Split, samples: int | None) -> Split:
    count = len(split) if samples is None else min(samples, len(split))
    if count < 1:
        raise DataError(
            "calibration: found no samples, expected at least one; give --data a non-empty source"
        )
    return split if count == len(split) else split.subset(np.arange(count))


# ---------------------------------------------------------------------- what is asked for


def _check(program: Program, requests: Sequence[Request]) -> None:
    """Refuse what could not be answered before the long run."""
    if len(program.example_inputs) != 1:
        raise AnalysisError(
            f"calibration: found {len(program.example_inputs)} inputs, expected a network with one; data "
            "sources yield one tensor a sample"
        )
    nodes = {node.name: node for node in program.graph.nodes}
    for request in requests:
        if request.node not in nodes:
            raise AnalysisError(
                f"calibration: found no node {request.node!r}, expected one of "
                f"{', '.join(list(nodes)[:8])}, …; `graphcomp inspect --nodes` lists them"
            )
        shape = program.shape(nodes[request.node])
        if shape is None or not -len(shape) < request.dim < len(shape) or request.dim == 0:
            found = "no single tensor" if shape is None else f"an output of shape {shape}"
            raise AnalysisError(
                f"calibration: {request.node}: found {found}, expected one with channels in dimension "
                f"{request.dim} and samples in dimension 0; ask for another dim or node"
            )


# ---------------------------------------------------------------------- running the network


def watch(
    program: Program,
    batches: Iterable[Tensor],
    watchers: Mapping[str, Watcher],
    told: Callable[[int], None] = lambda seen: None,
) -> int:
    """Run the program over `batches` in eval mode and hand each watched node's output to its watcher.

    Watchers see the tensor before any later in-place operator changes it, and must not keep it.

    Args:
        program: left as it is.
        batches: inputs, where the program's tensors are.
        watchers: by node name.
        told: called after each batch with the number of samples seen so far.

    Returns:
        The number of samples seen.
    """
    interpreter = _Watching(program.module, watchers)
    seen = 0
    with evaluating(program.module):
        for x in batches:
            with torch.no_grad():
                interpreter.run(x)
            seen += len(x)
            told(seen)
    return seen


class _Watching(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, watchers: Mapping[str, Watcher]) -> None:
        super().__init__(module)
        self.watchers = watchers

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.watchers:
            self.watchers[n.name](value)
        return value


def _measure(
    program: Program, split: Split, requests: Sequence[Request], batch: int, progress: Progress
) -> dict[Request, Statistic]:
    """One pass over this process's share of the samples, added up over all processes."""
    device = distributed.device()
    if device.type != "cpu":
        program = replace(program, module=editable(program).to(device))
    sums = {r: _SUMS[r.kind](r) for r in requests}
    # Every process looks at the first sample: the same shifts and shapes, even where its share is empty.
    watch(program, [next(split.batches(1))[0].to(device)], _by_node({r: s.start for r, s in sums.items()}))
    shifts = distributed.broadcast([s.shift.cpu() for s in sums.values()])
    for accumulator, shift in zip(sums.values(), shifts, strict=True):
        accumulator.shift = shift.to(device)
    mine = split.subset(distributed.share(len(split), batch))

    def told(seen: int) -> None:
        of_all = seen * len(split) // len(mine)
        progress(f"calibrate: {of_all:,} of {len(split):,} samples", seen / len(mine))

    inputs = (x.to(device) for x, _ in mine.batches(batch))
    watch(program, inputs, _by_node({r: s.add for r, s in sums.items()}), told)
    distributed.all_reduce(t for s in sums.values() for t in s.sums)
    return {r: s.result() for r, s in sums.items()}


def _by_node(watchers: Mapping[Request, Watcher]) -> dict[str, Watcher]:
    nodes: dict[str, list[Watcher]] = {}
    for request, watcher in watchers.items():
        nodes.setdefault(request.node, []).append(watcher)

    def all_of(several: Sequence[Watcher], output: Tensor) -> None:
        for watcher in several:
            watcher(output)

    return {node: partial(all_of, several) for node, several in nodes.items()}


# ---------------------------------------------------------------------- sums


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


_SUMS: dict[str, type[_Sums]] = {"covariance": _Moments, "zeros": _ZeroCounts}


# ---------------------------------------------------------------------- the cache


def _keys(program: Program, split: Split, requests: Sequence[Request]) -> dict[Request, str]:
    content = {"program": program.fingerprint(), "data": split.fingerprint()}
    return {r: disk.key(__name__, **content, request=asdict(r)) for r in requests}


def _known(
    keys: Mapping[Request, str], memory: Mapping[str, Statistic], cache: bool
) -> dict[Request, Statistic]:
    found: dict[Request, Statistic] = {}
    for request, key in keys.items():
        if key in memory:
            found[request] = memory[key]
        elif cache and (tensors := disk.load(KIND, key)) is not None:
            found[request] = _unpacked(tensors)
    return found


def _packed(statistic: Statistic) -> dict[str, Tensor]:
    if isinstance(statistic, Zeros):
        return {"zeros": statistic.zeros, "entries": torch.tensor(statistic.entries)}
    return {
        "samples": torch.tensor(statistic.samples),
        "mean": statistic.mean,
        "matrix": statistic.matrix,
    }


def _unpacked(tensors: Mapping[str, Tensor]) -> Statistic:
    if "zeros" in tensors:
        return Zeros(tensors["zeros"], int(tensors["entries"]))
    return Covariance(int(tensors["samples"]), tensors["mean"], tensors["matrix"])
