"""Compression methods on one trained network, side by side: sizes, accuracy and time, without fine-tuning.

    python benchmarks/methods.py pfa --model models:resnet56 --weights W --data cifar10:DIR    # one table
    python benchmarks/methods.py --list                                                        # all suites

A suite is a list of recipes. Every recipe is one `graphcomp.compile`; what they share (calibration, …)
is computed once and comes from the cache. Speedups are timed by `graphcomp.benchmark` against the same
baseline, only where widths are rounded to the target's multiple: the paper's counts are not made to be fast.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import graphcomp
from graphcomp.compiler import load_source
from graphcomp.cost import snapshot
from graphcomp.data import Data, load_data
from graphcomp.evaluate import accuracy
from graphcomp.program import Program
from graphcomp.records import Snapshot

ENERGIES = (0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.90, 0.80)
PFA_PAPER = {
    0.99: (72.60, 80.69, -0.20),
    0.98: (61.89, 70.04, -0.18),
    0.97: (54.10, 61.85, -0.80),
    0.96: (48.27, 55.46, -0.70),
    0.95: (43.36, 49.51, -1.01),
    0.93: (36.11, 41.61, -1.25),
    0.90: (27.42, 28.08, -1.81),
    0.80: (12.57, 14.56, -4.10),
    "kl": (59.97, 61.57, -0.65),
}
"""ResNet-56 on CIFAR-10: % parameters, % MACs, change of top-1 after retraining (the paper's table)."""


@dataclass(frozen=True)
class Row:
    """One recipe of a suite.

    Attributes:
        label: the first cells of its line.
        passes: as on the command line.
        timed: whether to measure the speedup.
        paper: the last cells.
    """

    label: str
    passes: str
    timed: bool = False
    paper: str = ""


def _pfa(join: str) -> list[Row]:
    rows = []
    for key, (params, macs, change) in PFA_PAPER.items():
        what = "mode=kl" if key == "kl" else f"energy={key}"
        paper = f"{params:.2f} | {macs:.2f} | {change:+.2f}"
        rows.append(Row(f"{join} | {what}", f"pfa{{{what},join={join},multiple=1}}", paper=paper))
    return rows


def _pfa_fast() -> list[Row]:
    kinds = [
        f"{what},join={join}" for join in ("couple", "pad", "project") for what in ("energy=0.95", "mode=kl")
    ]
    kinds += [f"target=macs:0.5,join={join}" for join in ("couple", "pad", "project")]
    return [Row(f"pfa{{{kind}}}", f"pfa{{{kind}}}", timed=True) for kind in kinds]


def _reestimated() -> list[Row]:
    """What is lost to stale statistics alone: normalisations measured again on 2,000 samples, no training."""
    recipes = [f"energy={e}" for e in ENERGIES] + ["mode=kl"]
    again = "finetune{epochs=0, bn_reestimate=2000}"
    return [Row(f"pad | {r}", f"pfa{{{r},join=pad,multiple=1}}, {again}") for r in recipes]


def _selection() -> list[Row]:
    how = ("correlation", "l1", "random")
    return [
        Row(f"{s} | {e}", f"pfa{{energy={e},join=pad,selection={s},multiple=1}}")
        for e in (0.99, 0.95)
        for s in how
    ]


PAPER_HEAD = "paper: % params | % MACs | top-1, retrained"
SUITES: dict[str, tuple[str, str, list[Row]]] = {
    "pfa": ("join | recipe", PAPER_HEAD, [*_pfa("pad"), *_pfa("couple"), *_pfa("project")]),
    "pfa-reestimated": ("join | recipe", "", _reestimated()),
    "pfa-fast": ("recipe", "", _pfa_fast()),
    "pfa-selection": ("selection | energy", "", _selection()),
}


def run(suite: str, model: str, weights: Path, spec: str, seconds: float) -> None:
    """Print the table of a suite, a line as soon as it is known."""
    source = load_source(model, weights).program
    data = load_data(spec, input_shape=tuple(source.example_inputs[0].shape[1:]), seed=0)
    first, last, rows = SUITES[suite]
    before = snapshot(source, accuracy(source, data.eval))
    print(f"{model}: {before.params_trainable:,} parameters, {before.macs:,} MACs, top-1 {_top1(before)} %\n")
    timed = ["speedup: MACs", "measured"] if rows[0].timed else []
    head = " | ".join([first, "% params", "% MACs", "top-1, %", *timed, *([last] if last else []), "CPU s"])
    print(f"| {head} |\n|{' --- |' * (head.count('|') + 1)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(_line(row, source, data, before, seconds))} |", flush=True)


def _line(row: Row, source: Program, data: Data, before: Snapshot, seconds: float) -> Sequence[str]:
    start = time.process_time()
    try:
        made = graphcomp.compile(source, row.passes, data=data)
    except graphcomp.GraphcompError as error:
        return [row.label, f"refused: {error}"]
    spent, after = time.process_time() - start, made.steps[-1].after
    cells = [row.label, *(f"{100 * x:.2f}" for x in _fractions(after, before)), _top1(after)]
    cells += _speedup(source, made.program, seconds) if row.timed else []
    return [*cells, *([row.paper] if row.paper else []), f"{spent:.0f}"]


def _fractions(after: Snapshot, before: Snapshot) -> tuple[float, float]:
    return after.params_trainable / before.params_trainable, after.macs / before.macs


def _top1(snapshot: Snapshot) -> str:
    return "" if snapshot.accuracy is None else f"{100 * snapshot.accuracy.top1:.2f}"


def _speedup(base: Program, new: Program, seconds: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "base.onnx"), Path(folder, "new.onnx")
        graphcomp.export_onnx(base, files[0])
        graphcomp.export_onnx(new, files[1], provider="cpu")
        timing = graphcomp.benchmark(*files, seconds=seconds).batches[0]
    quoted = timing.cpu_speedup if timing.busy else timing.speedup
    clock = " (CPU time)" if timing.busy else ""
    return [f"{timing.theoretical:.2f}x", f"{quoted.value:.2f}x [{quoted.low:.2f}, {quoted.high:.2f}]{clock}"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=sorted(SUITES))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--model", default="models:resnet56")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each recipe that is timed")
    chosen = parser.parse_args()
    if chosen.list or chosen.suite is None:
        for name, (_, _, rows) in SUITES.items():
            print(f"{name}: {len(rows)} recipes, such as {rows[0].passes}")
        return
    run(chosen.suite, chosen.model, chosen.weights, chosen.data, chosen.seconds)


if __name__ == "__main__":
    main()
