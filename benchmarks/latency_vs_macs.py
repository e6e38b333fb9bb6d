"""Allocation on time against allocation on MACs: which network is faster at the same accuracy?

    python benchmarks/latency_vs_macs.py --model models:resnet20-digits
    python benchmarks/latency_vs_macs.py --model models:resnet56 --weights W --data cifar10:DIR --epochs 1
    python benchmarks/latency_vs_macs.py --render          # write the section of docs/results.md

Every row is one pass of channel removal, `target=macs:x` or `target=latency:x`, by one share for all groups
(uniform) or step by step what saves most for the importance lost (greedy; default: uniform by MACs, greedy
by latency, and layers may go whole, if the network has any that may); behind it the same repair for all of
them: normalisations measured again, and with `--epochs` a short training. What has a row is not made again.
At the end all networks are timed by turns in one process, so that any two can be compared. Every latency
row is then held against the curve of the MAC rows of the same repair: the time that those need for its
accuracy, between two of them along a straight line. Rows without a partner on the curve (more accurate, or
less, than all of them) say so.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from rows import DOCS, OUT, Row, Rows, table
from section import replace_section

import graphcomp
from graphcomp.channels import Removal, analyse
from graphcomp.compiler.source import load_source
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes import PASSES
from graphcomp.records import Interval
from graphcomp.runtime.bench import ratio_interval
from graphcomp.runtime.turns import Times, in_turn

GOALS = (0.8, 0.65, 0.5)
COUNTERS = ("macs", "latency")
ALLOCATIONS = {
    "": "",
    "uniform": "allocation=uniform",
    "greedy": "allocation=greedy",
    "default": "allocation=auto",
}
"""`default`: uniform by MACs, greedy by latency, and narrow layers may go whole; the others keep all."""
WHOLE = "original"
RUNS = 400
NAME = "latency-vs-macs"
BEGIN, END = (
    f"<!-- {NAME}: {end}, written by benchmarks/latency_vs_macs.py --render -->" for end in ("begin", "end")
)
INTRO = """\
Every row removes channels for a part of the MACs or of the measured time (batch 1, one thread), by one
share for all groups or greedily (*default*: uniform by MACs, greedy by latency, and narrow layers that
only concatenations read may go whole); behind it the same repair for all. All files of a network are
timed by turns in one process (`benchmarks/latency_vs_macs.py`). Below, the time that the rows by MACs
need for the accuracy of a row by latency, along the straight line between two of them, over that row's
own: above 1, allocation on time is ahead. The original is a point of every curve. The weights of
MobileNet-V2 and the DenseNet are those that `benchmarks/train_cifar.py` trains."""


# ---------------------------------------------------------------------- making and timing


def measure(
    rows: Rows, source: Program, data: Data, criterion: str, goals: Sequence[float], repairs: Sequence[str]
) -> None:
    """Make every network that has no row, and keep its file and its accuracies."""
    folder = rows.path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    rows.measure(WHOLE, partial(_original, source, data, folder, repairs))
    kinds = allocations(criterion, source)
    for goal, counter, kind in product(goals, COUNTERS, kinds):
        name = f"{counter}:{goal:g} {kind}".strip()
        options = [f"target={counter}:{goal}", ALLOCATIONS[kind]]
        if "default" in kinds and kind != "default":
            options.append("min_channels=1")
        recipe = f"{criterion}{{{','.join(filter(None, options))}}}"
        print(
            name,
            rows.measure(name, partial(_row, source, data, recipe, _file(folder, name), repairs)),
            flush=True,
        )


def allocations(criterion: str, source: Program) -> Sequence[str]:
    """What a pass can allocate by; a single empty one if it has its own way."""
    options = {field.name for field in fields(PASSES[criterion])}
    if "allocation" not in options:
        return ("",)
    may_go = "min_channels" in options and _has_layers_that_may_go(source)
    return ("uniform", "greedy", "default") if may_go else ("uniform", "greedy")


def _has_layers_that_may_go(source: Program) -> bool:
    channels = analyse(source)
    for group in channels.removable:
        without = Removal.of(channels, group.channels).legal(np.zeros(len(channels.channel_of)))
        if not without.kept(group):
            return True
    return False


def _original(source: Program, data: Data, folder: Path, repairs: Sequence[str]) -> Row:
    found = accuracy(source, data.eval)
    if found is None:
        raise SystemExit("--data: found no labels, expected some")
    graphcomp.export_onnx(source, _file(folder, WHOLE), batches=(1,))
    return {"macs": 1.0, "top1": dict.fromkeys(repairs, 100 * found.value)}


def _row(source: Program, data: Data, recipe: str, file: Path, repairs: Sequence[str]) -> Row:
    try:
        removed = graphcomp.compile(source, recipe, data=data).program
    except graphcomp.GraphcompError as error:
        return {"refused": str(error)}
    graphcomp.export_onnx(removed, file, batches=(1,), provider="cpu")
    top1 = {}
    for repair in repairs:
        found = accuracy(graphcomp.compile(removed, repair, data=data).program, data.eval)
        assert found is not None
        top1[repair] = 100 * found.value
    return {"macs": macs(removed) / macs(source), "top1": top1}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(':', '-').replace(' ', '-')}.onnx"


def time_all(rows: Rows, seconds: float) -> None:
    """Time all networks by turns; kept beside the rows."""
    names = [name for name, row in rows.found.items() if "refused" not in row]
    folder = rows.path.with_suffix("")
    found = in_turn([_file(folder, n) for n in names], seconds=seconds * len(names), runs=RUNS)
    times = {name: samples.cpu for name, samples in zip(names, found, strict=True)}
    np.savez(rows.path.with_suffix(".npz"), **times)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Point:
    """One network behind one repair.

    Attributes:
        name: of its row.
        top1: per cent.
        times: CPU milliseconds, to be compared with those of any other point.
    """

    name: str
    top1: float
    times: Times

    @property
    def median(self) -> float:
        """Milliseconds."""
        return float(np.median(self.times))


def points(rows: Rows, times: Mapping[str, Times], repair: str) -> list[Point]:
    """Every network of one repair."""
    return [
        Point(name, row["top1"][repair], times[name]) for name, row in rows.found.items() if name in times
    ]


def held_against(point: Point, curve: Sequence[Point]) -> Interval | str:
    """The time that the curve needs for the same accuracy over the point's own; or why there is none.

    Where the curve has this accuracy more than once, the fastest counts.
    """
    for a, b in pairwise(sorted(curve, key=lambda p: p.median)):
        low, high = sorted((a, b), key=lambda p: p.top1)
        if low.top1 <= point.top1 <= high.top1:
            share = (point.top1 - low.top1) / (high.top1 - low.top1 or 1.0)
            one, other = ratio_interval(low.times, point.times), ratio_interval(high.times, point.times)
            return Interval(
                **{
                    part: (1 - share) * getattr(one, part) + share * getattr(other, part)
                    for part in ("value", "low", "high")
                }
            )
    return "more accurate than all" if point.top1 > max(p.top1 for p in curve) else "less accurate than all"


# ---------------------------------------------------------------------- the document


def section() -> str:
    """All networks that were measured, in Markdown."""
    parts = [BEGIN, "## Allocation on time against allocation on MACs", INTRO]
    for path in sorted(OUT.glob(f"{NAME}-*.npz")):
        rows = Rows.load(path.stem)
        with np.load(path) as stored:
            times = {name: stored[name] for name in stored.files}
        parts += _network(rows, times)
    return "\n\n".join([*parts, END])


def _network(rows: Rows, times: Mapping[str, Times]) -> list[str]:
    said, repairs = rows.settings, list(rows.found[WHOLE]["top1"])
    lines = []
    for name in sorted(rows.found, key=_place):
        row = rows.found[name]
        if "refused" in row:
            lines.append([name, f"refused: {row['refused']}", "", *("" for _ in repairs)])
            continue
        if name not in times:  # made since the last timing
            continue
        left = ratio_interval(times[name], times[WHOLE])
        time = f"{left.value:.3f} [{left.low:.3f}, {left.high:.3f}]"
        lines.append([name, f"{row['macs']:.3f}", time, *(f"{row['top1'][r]:.2f}" for r in repairs)])
    head = ["asked for", "MACs left", "time left", *(f"top-1, %: `{r}`" for r in repairs)]
    intro = f"**{said['model']}**, `{said['criterion']}`, {said['data']}; {rows.places}; CPU time."
    last = {name.partition(" ")[2] for name in rows.found if name != WHOLE}
    compared, verdicts, kinds = [], [], [kind for kind in ALLOCATIONS if kind in last]
    for repair in repairs:
        found = points(rows, times, repair)
        for point in sorted((p for p in found if p.name.startswith("latency")), key=lambda p: _place(p.name)):
            curves = [[p for p in found if p.name == WHOLE or _is_of(p, kind)] for kind in kinds]
            found_by = [held_against(point, curve) for curve in curves]
            compared.append([point.name, f"`{repair}`", *map(_said, found_by)])
            if point.name.endswith(kinds[-1]):
                verdicts += [one for one in found_by if isinstance(one, Interval)]
    second = table(["row", "repair", *(f"MACs {kind}".strip() for kind in kinds)], compared)
    return [intro, table(head, lines), second, _verdict(verdicts)]


def _verdict(found: Sequence[Interval]) -> str:
    """Of rows by latency, greedy where there is a choice, against rows by MACs of their accuracy."""
    if not found:
        return "No such row by latency has a partner of its accuracy."
    ahead, behind = sum(one.low > 1 for one in found), sum(one.high < 1 for one in found)
    values = sorted(one.value for one in found)
    return (
        f"By latency, greedily where there is a choice: {len(found)} comparisons with rows by MACs at equal "
        f"accuracy, ahead in {ahead}, behind in {behind}, {values[0]:.2f}x to {values[-1]:.2f}x as fast."
    )


def _place(name: str) -> tuple[float, str, str]:
    """The original, then the largest goals; MACs before latency."""
    if name == WHOLE:
        return -math.inf, "", ""
    counter, _, rest = name.partition(":")
    return -float(rest.split()[0]), str(COUNTERS.index(counter)), rest


def _is_of(point: Point, allocation: str) -> bool:
    return point.name.startswith("macs") and point.name.endswith(allocation)


def _said(found: Interval | str) -> str:
    return found if isinstance(found, str) else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--criterion", default="l1", help="any pass that takes a target")
    parser.add_argument("--goals", default=",".join(map(str, GOALS)))
    parser.add_argument("--samples", type=int, default=500, help="that normalisations are measured again on")
    parser.add_argument("--epochs", type=int, default=0, help="of the short training; 0: none")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each network")
    parser.add_argument("--render", action="store_true", help="write the section of docs/results.md")
    chosen = parser.parse_args()
    if chosen.model:
        loaded = load_source(chosen.model, chosen.weights)
        spec = chosen.data or loaded.data or "random"
        data = load_data(spec, input_shape=tuple(loaded.program.example_inputs[0].shape[1:]), seed=0)
        repairs = [f"finetune{{epochs=0, bn_reestimate={chosen.samples}}}"]
        repairs += [f"finetune{{epochs={chosen.epochs}}}"] if chosen.epochs else []
        size = f"{len(data.train)} images for training, {len(data.eval)} for evaluation"
        settings = {"model": chosen.model, "criterion": chosen.criterion, "data": size}
        key = f"{NAME}-{chosen.model.rpartition(':')[2]}-{chosen.criterion.partition('{')[0]}"
        rows = Rows.open(key, settings | {"repairs": repairs})
        measure(
            rows, loaded.program, data, chosen.criterion, list(map(float, chosen.goals.split(","))), repairs
        )
        time_all(rows, chosen.seconds)
        print("\n\n".join(_network(rows, dict(np.load(rows.path.with_suffix(".npz"))))))
    if chosen.render:
        replace_section(DOCS, BEGIN, END, section())


if __name__ == "__main__":
    main()
