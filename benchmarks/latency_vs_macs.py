"""Allocation on time against allocation on MACs: which network is faster at the same accuracy?

    python benchmarks/latency_vs_macs.py --model models:resnet20-digits
    python benchmarks/latency_vs_macs.py --model models:resnet56 --weights W --data cifar10:DIR --epochs 1

Every row is one pass of channel removal, `target=macs:x` or `target=latency:x`, by one share for all groups
(uniform) or step by step what saves most for the importance lost (greedy); behind it the same repair for all
of them: normalisations measured again, and with `--epochs` a short training. Time is measured for every row
against the same original. Below the rows every latency row is held against the curve of the MAC rows of the
same repair: the time that those need for its accuracy, between two of them along a straight line. Rows
without a partner on the curve (more accurate, or less, than all of them) say so.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import graphcomp
from graphcomp.compiler import load_source
from graphcomp.cost import macs
from graphcomp.data import Data, load_data
from graphcomp.evaluate import accuracy
from graphcomp.program import Program
from graphcomp.records import Interval

GOALS = (0.8, 0.65, 0.5)
KINDS = (("macs", "uniform"), ("macs", "greedy"), ("latency", "uniform"), ("latency", "greedy"))


@dataclass(frozen=True)
class Point:
    """One compressed network.

    Attributes:
        counter, allocation, goal: what was asked for.
        repair: the passes behind it.
        macs: part that is left.
        speedup: measured.
        top1: on the evaluation data.
    """

    counter: str
    allocation: str
    goal: float
    repair: str
    macs: float
    speedup: Interval
    top1: float

    @property
    def time(self) -> float:
        """Part of the time that is left."""
        return 1 / self.speedup.value

    def row(self) -> str:
        """In Markdown."""
        low, high = 1 / self.speedup.high, 1 / self.speedup.low
        cells = [self.counter, self.allocation, f"{self.goal:g}", self.repair, f"{self.macs:.3f}"]
        return f"| {' | '.join([*cells, f'{self.time:.3f} [{low:.3f}, {high:.3f}]', f'{self.top1:.2f}'])} |"


HEAD = "| target | allocation | asked | repair | MACs left | time left | top-1, % |"


def points(
    source: Program,
    data: Data,
    criterion: str,
    goals: Sequence[float],
    repairs: Sequence[str],
    seconds: float,
) -> Iterator[Point]:
    """Every network, as soon as it is known; those of one removal are repaired from the same program."""
    for goal in goals:
        for counter, allocation in KINDS:
            options = f"target={counter}:{goal},allocation={allocation}"
            try:
                removed = graphcomp.compile(source, f"{criterion}{{{options}}}", data=data).program
            except graphcomp.GraphcompError as error:
                print(f"{criterion}{{{options}}}: {error}")
                continue
            speedup = timed(source, removed, seconds)
            left = macs(removed) / macs(source)
            for repair in repairs:
                result = graphcomp.compile(removed, repair, data=data).program
                found = accuracy(result, data.eval)
                assert found is not None
                yield Point(counter, allocation, goal, repair, left, speedup, 100 * found.top1)


def timed(base: Program, new: Program, seconds: float) -> Interval:
    """Speedup in CPU time, which is the same on a busy machine."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "base.onnx"), Path(folder, "new.onnx")
        graphcomp.export_onnx(base, files[0], batches=(1,))
        graphcomp.export_onnx(new, files[1], batches=(1,), provider="cpu")
        return graphcomp.benchmark(*files, seconds=seconds).batches[0].cpu_speedup


def held_against(point: Point, curve: Sequence[Point]) -> str:
    """The time that the curve needs for the same accuracy, in words."""
    for a, b in pairwise(curve):
        low, high = sorted((a, b), key=lambda p: p.top1)
        if low.top1 <= point.top1 <= high.top1:
            span = high.top1 - low.top1
            share = (point.top1 - low.top1) / span if span else 0.5
            time = low.time + share * (high.time - low.time)
            return f"{time:.3f} for the same accuracy: {time / point.time:.3f}x"
    best = max(curve, key=lambda p: p.top1)
    where = "more" if point.top1 > best.top1 else "less"
    return f"no partner, {where} accurate than all of them"


def verdicts(found: Sequence[Point], top1: float) -> list[str]:
    """Every latency row against both curves of MAC rows; the original is a point of each of them."""
    lines = []
    for point in (p for p in found if p.counter == "latency"):
        for allocation in ("uniform", "greedy"):
            fellows = [p for p in found if (p.counter, p.allocation) == ("macs", allocation)]
            same = [p for p in fellows if p.repair == point.repair]
            whole = Point("", "", 1.0, "", 1.0, Interval(value=1, low=1, high=1), top1)
            curve = sorted([*same, whole], key=lambda p: p.time)
            lines.append(
                f"latency:{point.goal:g} {point.allocation}, {point.repair}: {point.time:.3f}; MACs "
                f"{allocation}: {held_against(point, curve)}"
            )
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models:resnet20-digits")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--criterion", default="l1", help="any pass that removes channels")
    parser.add_argument("--goals", default=",".join(map(str, GOALS)))
    parser.add_argument("--samples", type=int, default=500, help="that normalisations are measured again on")
    parser.add_argument("--epochs", type=int, default=0, help="of the short training; 0: none")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each network")
    chosen = parser.parse_args()
    loaded = load_source(chosen.model, chosen.weights)
    spec = chosen.data or loaded.data or "random"
    data = load_data(spec, input_shape=tuple(loaded.program.example_inputs[0].shape[1:]), seed=0)
    original = accuracy(loaded.program, data.eval)
    if original is None:
        raise SystemExit(f"--data: {spec} has no labels, expected some")
    repairs = [f"finetune{{epochs=0, bn_reestimate={chosen.samples}}}"]
    repairs += [f"finetune{{epochs={chosen.epochs}}}"] if chosen.epochs else []
    goals = [float(goal) for goal in chosen.goals.split(",")]
    print(f"{chosen.model}, {chosen.criterion}: top-1 {100 * original.top1:.2f} %\n\n{HEAD}")
    print(f"|{' --- |' * (HEAD.count('|') - 1)}", flush=True)
    found = []
    for point in points(loaded.program, data, chosen.criterion, goals, repairs, chosen.seconds):
        found.append(point)
        print(point.row(), flush=True)
    print("\n" + "\n".join(f"- {line}" for line in verdicts(found, 100 * original.top1)))


if __name__ == "__main__":
    main()
