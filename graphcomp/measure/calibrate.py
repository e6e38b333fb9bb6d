"""Statistics of activations: one streaming pass over the data for all that is asked for (`statistics`).

Results are kept by content (`base.cache`): the same program on the same samples is run once, also over
several recipes.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphcomp.base import Progress, distributed, quiet
from graphcomp.base import cache as disk
from graphcomp.data import Split
from graphcomp.errors import AnalysisError, DataError
from graphcomp.ir import Batch, Program, editable, evaluating, moved
from graphcomp.measure.samples import at_once, elements
from graphcomp.measure.statistics import SUMS, Covariance, Request, Statistic, Zeros

BATCHES = 4, 128
"""Fewest and most samples at a time; with 16 of 224 pixels a third of the time went into fresh memory, and of
4 to 8 the fewer took less on every network that was tried (ResNet-50, DenseNet-121, MobileNet-V3, VGG-16)."""

ELEMENTS = 1 << 21
"""Of the largest activation at a time: what stays in the caches is faster, 1.6 times for a ResNet-56."""

KIND = "calibration"
"""Of entries in the cache."""

Watcher = Callable[[Tensor], None]


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
        program: left as it is.
        split: the samples.
        requests: duplicates are answered once. Ask for all at once: each call may be a pass over the data.
        samples: only the first so many of the split. Fewer than channels give a singular covariance.
        batch: samples at a time; by default `batch_size(program)`. The result only depends on it as far as
            float32 inference does.
        cache: read and write the cache on disk.
        memory: results of earlier calls, by content; read and extended.
        progress: told a message and the fraction of the samples that were seen.

    Raises:
        AnalysisError: no such node, or no such dimension.
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
    """Samples at a time: as many as have a largest activation of `ELEMENTS`, within `BATCHES`; or one."""
    return at_once(program, ELEMENTS // max([1, *elements(program)]), *BATCHES)


def _first(split: Split, samples: int | None) -> Split:
    count = len(split) if samples is None else min(samples, len(split))
    if count < 1:
        raise DataError(
            "calibration: found no samples, expected at least one; give --data a non-empty source"
        )
    return split if count == len(split) else split.subset(np.arange(count))


def _check(program: Program, requests: Sequence[Request]) -> None:
    """Refuse what could not be answered before the long run."""
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


def watch(
    program: Program,
    batches: Iterable[Batch],
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
        for batch in batches:
            with torch.no_grad():
                interpreter.run(*batch)
            seen += len(batch[0])
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
    sums = {r: SUMS[r.kind](r) for r in requests}
    # Every process looks at the first sample: the same shifts and shapes, even where its share is empty.
    first, _ = next(split.batches(1))
    watch(program, [moved(first, device)], _by_node({r: s.start for r, s in sums.items()}))
    shifts = distributed.broadcast([s.shift.cpu() for s in sums.values()])
    for accumulator, shift in zip(sums.values(), shifts, strict=True):
        accumulator.shift = shift.to(device)
    mine = split.subset(distributed.share(len(split), batch))

    def told(seen: int) -> None:
        of_all = seen * len(split) // len(mine)
        progress(f"calibrate: {of_all:,} of {len(split):,} samples", seen / len(mine))

    inputs = (moved(x, device) for x, _ in mine.batches(batch))
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
