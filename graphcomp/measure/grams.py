"""What layers read, and what their outputs weigh: the statistics behind a compensated removal.

    G = E (a - m)(a - m)^T,   m = E a       of patches a at sampled positions                    (METHODS 9.1)
    f_r = E sum_pos (d v.z / d y_r)^2       of outputs y_r, with z all outputs of the network and v = +-1 at
                                            random, less its mean: no labels                    (METHODS 9.2)

One streaming pass each, products in float32, sums in float64; over several processes the batches are those of
one process. Results are kept by content (`base.cache`); so are the sums of a pass that is under way, and one
that was interrupted goes on from there. What is finished may fill half of the memory that is given; beyond
that it lies in files that are mapped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphcomp.base import Progress, Shelf, distributed, quiet
from graphcomp.base import cache as disk
from graphcomp.data import Split
from graphcomp.ir import Batch, Program, editable, evaluating, moved
from graphcomp.measure import calibrate, gradients
from graphcomp.measure.cost import plane_of
from graphcomp.measure.patches import Positions, is_linear, matrix_shape, patches_at
from graphcomp.measure.regression import BLOCK, Moments
from graphcomp.measure.samples import by_sample

KIND = "grams"
"""Of entries in the cache."""

CHECKPOINT = 256
"""Samples after which every process keeps its sums."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Second moments of what a layer reads. Do not change the tensors in place.

    Attributes:
        rows: sampled positions of all samples.
        mean, matrix: m `[g, K]` and G `[g, K, K]`, float64.
    """

    rows: int
    mean: Tensor
    matrix: Tensor


def grams(
    program: Program,
    split: Split,
    layers: Sequence[str],
    *,
    positions: int,
    seed: int,
    memory: int,
    progress: Progress = quiet,
) -> dict[str, Gram]:
    """Second moments of the patches that layers read, over all samples of a split; collective.

    Args:
        program: left as it is.
        split: the samples.
        layers: paths of layers that mix channels (`is_mixing`); calls of one layer add up.
        positions, seed: see `Positions`.
        memory: bytes of sums to hold at a time: more of them take another pass over the data. What is
            returned takes half of that at most.
        progress: told a message and a fraction.
    """
    content = {"program": program.fingerprint(), "data": split.fingerprint()}
    keys = {n: disk.key(__name__, **content, layer=n, positions=positions, seed=seed) for n in layers}
    drawn, shelf = Positions(positions, seed), Shelf(memory // 2)
    found = {name: _known(key, shelf) for name, key in keys.items()}
    missing = [name for name in layers if found[name] is None]
    while missing:
        part = _first_within(program, missing, memory - shelf.kept)
        missing = missing[len(part) :]
        process = distributed.rank(), distributed.world_size()
        place = disk.key(__name__, **content, part=part, positions=positions, seed=seed, process=process)
        for name, gram in _measure(program, split, part, drawn, place, progress):
            tensors = {"rows": torch.tensor(gram.rows), "mean": gram.mean, "matrix": gram.matrix}
            if distributed.is_first():
                disk.store(KIND, keys[name], tensors)
            found[name] = {**tensors, "matrix": shelf.keep(gram.matrix)}
            del gram, tensors  # they would wait for the next one
    packed = cast(dict[str, dict[str, Tensor]], found)
    return {n: Gram(int(t["rows"]), t["mean"], t["matrix"]) for n, t in packed.items()}


def _known(key: str, shelf: Shelf) -> dict[str, Tensor] | None:
    """What was stored; the first process, which reads it, has it mapped."""
    found = distributed.on_first(lambda: disk.load(KIND, key))
    if found is not None and not distributed.is_first():
        found["matrix"] = shelf.keep(found["matrix"])
    return found


def bytes_to_sum(groups: int, columns: int) -> int:
    """What the sums of a layer take, with a product that is to be added to them."""
    return 8 * groups * columns**2 + _product(groups, columns)


def _product(groups: int, columns: int) -> int:
    return 12 * groups * columns * min(columns, BLOCK)


def _first_within(program: Program, layers: Sequence[str], memory: int) -> list[str]:
    """The first layers, one at least, whose sums fit into memory together."""
    held = largest = 0
    for number, name in enumerate(layers):
        g, _, k = matrix_shape(program.layer(name))
        held, largest = held + 8 * g * k * k, max(largest, _product(g, k))
        if number and held + largest > memory:
            return list(layers[:number])
    return list(layers)


def _measure(
    program: Program,
    split: Split,
    layers: Sequence[str],
    drawn: Positions,
    place: str,
    progress: Progress,
) -> Iterator[tuple[str, Gram]]:
    """Of layers that memory holds together; sums that are under way are kept under the key `place`."""
    device = distributed.device()
    if device.type != "cpu":
        program = replace(program, module=editable(program).to(device))
    wanted = set(layers)
    calls = [n for n in program.graph.nodes if n.op == "call_module" and n.target in wanted]
    batch = calibrate.batch_size(program)
    mine = distributed.share(len(split), batch)
    shifts: dict[str, Tensor] = {}
    now = 0

    def begin(nodes: Sequence[fx.Node], x: Tensor) -> None:
        for node in nodes:
            shifts.setdefault(str(node.target), _patches(program, node, x, drawn, 0).mean(0))

    def see(nodes: Sequence[fx.Node], x: Tensor) -> None:
        for node in nodes:
            a = _patches(program, node, x, drawn, now)
            sums[str(node.target)].add(a, a.new_zeros(len(a), a.shape[1], 0))

    by_source: dict[str, list[fx.Node]] = {}
    for node in calls:
        by_source.setdefault(cast(fx.Node, node.args[0]).name, []).append(node)
    first, _ = next(split.batches(min(batch, len(split))))
    begins = {source: partial(begin, nodes) for source, nodes in by_source.items()}
    calibrate.watch(program, [moved(first, device)], begins)
    shared = distributed.broadcast({name: shift.cpu() for name, shift in shifts.items()})
    sums = {n: Moments(a.to(device), a.new_zeros(len(a), 0).to(device)) for n, a in shared.items()}
    before = kept = _resume(place, sums)
    rest = mine[before:]
    starts = iter(rest[:: max(batch, 1)].tolist())

    def inputs() -> Iterator[Batch]:
        nonlocal now
        for x, _ in split.subset(rest).batches(batch):
            now = next(starts)
            yield moved(x, device)

    def told(count: int) -> None:
        nonlocal kept
        seen = before + count
        if kept + CHECKPOINT <= seen < len(mine):
            disk.store(KIND, place, {"seen": torch.tensor(seen), **_under_way(sums)})
            kept = seen
        progress(f"patches: {seen * len(split) // len(mine):,} of {len(split):,} samples", seen / len(mine))

    calibrate.watch(
        program, inputs(), {source: partial(see, nodes) for source, nodes in by_source.items()}, told
    )
    disk.forget(KIND, place)
    for name in layers:
        total = sums.pop(name)
        distributed.all_reduce(total.sums)
        normal = total.centred()
        del total
        yield name, Gram(int(normal.rows), normal.mean_a.cpu(), normal.gram.cpu())


def _under_way(sums: Mapping[str, Moments]) -> dict[str, Tensor]:
    """What sums of patches are made of, by name."""
    return {f"{n}:{what}": getattr(s, what) for n, s in sums.items() for what in ("rows", "a", "aa")}


def _resume(place: str, sums: Mapping[str, Moments]) -> int:
    """Go on with sums that were kept: of how many samples they are."""
    found = disk.load(KIND, place)
    if found is None:
        return 0
    for name, total in _under_way(sums).items():
        total.copy_(found[name])
    return int(found["seen"])


def _patches(program: Program, node: fx.Node, x: Tensor, drawn: Positions, first: int) -> Tensor:
    module = program.layer(str(node.target))
    shape = program.shape(node) or ()
    size = math.prod(plane_of(shape, cast(Tensor, module.weight).ndim))
    samples = x.numel() // x.shape[-1] // size if is_linear(module) else len(x)
    return patches_at(module, x, drawn.of(size, first, samples).to(x.device))


# ---------------------------------------------------------------------- what outputs weigh


def output_weights(
    program: Program,
    split: Split,
    layers: Sequence[str],
    *,
    seed: int,
    memory: int,
    progress: Progress = quiet,
) -> dict[str, Tensor]:
    """f of every output channel of these layers, float64 `[out]`; collective.

    Args:
        program: differentiable; left as it is.
        split: the samples, all of which are looked at.
        layers: paths of layers; calls of one layer add up.
        seed: of v.
        memory: bytes, of which activations take a quarter.
        progress: told a message and a fraction.
    """
    key = disk.key(
        __name__, program=program.fingerprint(), data=split.fingerprint(), layers=list(layers), seed=seed
    )
    found = distributed.on_first(lambda: disk.load(KIND, key))
    if found is None:
        found = _squares(program, split, layers, seed, memory, progress)
        if distributed.is_first():
            disk.store(KIND, key, found)
    return found


def _squares(
    program: Program, split: Split, layers: Sequence[str], seed: int, memory: int, progress: Progress
) -> dict[str, Tensor]:
    device = distributed.device()
    module = editable(program).to(device).requires_grad_(False)
    batch = gradients.batch_size(program, memory)
    mine = distributed.share(len(split), batch)
    sums: dict[str, Tensor] = {}
    for name in layers:
        g, o, _ = matrix_shape(program.layer(name))
        sums[name] = torch.zeros(g * o, dtype=torch.float64, device=device)
    run = _Weighing(module, sums)
    with evaluating(module), torch.enable_grad():
        for at in range(0, len(mine), batch):
            positions = mine[at : at + batch]
            x, _ = next(split.subset(positions).batches(len(positions)))
            z = by_sample(program, run.run(*moved(x, device)), len(positions))
            signs = []
            for number in positions[: len(z)].tolist():
                generator = torch.Generator().manual_seed(hash((seed, number)) % (1 << 63))
                v = torch.randint(0, 2, (z.shape[1],), generator=generator).to(z.dtype) * 2 - 1
                signs.append(v - v.mean())
            if z.requires_grad:  # no layer was asked for otherwise, or the outputs read none
                torch.autograd.backward([(z * torch.stack(signs).to(device)).sum()])
            progress(
                f"weights of outputs: {at + len(positions):,} samples", (at + len(positions)) / len(mine)
            )
    distributed.all_reduce(sums.values())
    return {name: (total / len(split)).cpu() for name, total in sums.items()}


class _Weighing(fx.Interpreter):
    """Adds up squared gradients of layers' outputs as they arrive."""

    def __init__(self, module: fx.GraphModule, sums: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.sums = sums

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, and watch what arrives at its output; a hook sees it as it was before changes in place."""
        value = super().call_module(target, args, kwargs)
        if target in self.sums:
            if not value.requires_grad:  # neither inputs nor weights ask for gradients: the first layers do
                value = value.requires_grad_().clone()  # a network may change it, but no leaf, in place
            module = self.fetch_attr(target)
            dims = tuple(range(1, value.ndim - 1) if is_linear(module) else range(2, value.ndim))

            def see(gradient: Tensor) -> None:
                squares = gradient.double().square()
                self.sums[target].add_((squares.sum(dims) if dims else squares).sum(0))

            value.register_hook(see)
        return value
