"""Compression methods on one trained network, side by side: sizes, time, accuracy with and without training.

    python benchmarks/methods.py pfa --model models:resnet56 --weights W --data cifar10:DIR    # one table
    python benchmarks/methods.py --render                             # all that was measured, in the document
    python benchmarks/methods.py --list                               # all suites
    python benchmarks/methods.py oneshot-grid --only '*obs*refit' …   # some recipes of one

A suite is a list of recipes. Every recipe is one `graphcomp.compile`; what they share (calibration, …) is
computed once and comes from the cache. Rows are saved as they are known and measured once; lines that the
document has already, of other machines and days, stay in it, and say where they come from. Speedups are timed
by `graphcomp.benchmark`, each recipe interleaved with the same baseline, one thread, batch 1. Counts of
`multiple=1` are the paper's and not made to be fast: that is what its columns of time show.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path

from rows import DOCS, Row, Rows, page, timed, written
from section import read_section, replace_section

import graphcomp
from graphcomp.compiler.source import load_source
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs, snapshot
from graphcomp.measure.evaluate import accuracy
from graphcomp.models import MODELS
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

EPOCHS = 4
WIDTHS = "multiple=8"
TRAINING = "lr=0.02, batch=64, held_out=0.1, precision=float32, layout=contiguous"
"""What all trainings have in common; with fixed arithmetic, since short ones would differ in it."""


@dataclass(frozen=True)
class Recipe:
    """One recipe of a suite.

    Attributes:
        cells: the first of its line.
        passes: as on the command line.
        paper: the last cells of its line.
    """

    cells: tuple[str, ...]
    passes: str
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """Recipes that make a table.

    Attributes:
        first, last: heads of the columns beside those that are measured.
        timed: whether to measure speedups.
        after: head of the column of accuracy at the end where accuracy after the cut is a column, too.
        spent: whether time spent is a column.
        note: said of all rows.
    """

    recipes: list[Recipe]
    first: tuple[str, ...]
    last: tuple[str, ...] = ()
    timed: bool = False
    after: str | None = None
    spent: bool = False
    note: str = ""


def _pfa(join: str) -> list[Recipe]:
    recipes = []
    for key, (params, work, change) in PFA_PAPER.items():
        what = "mode=kl" if key == "kl" else f"energy={key}"
        paper = f"{params:.2f}", f"{work:.2f}", f"{change:+.2f}"
        recipes.append(Recipe((join, what), f"pfa{{{what},join={join},multiple=1}}", paper))
    return recipes


def _pfa_fast() -> list[Recipe]:
    joins = ("couple", "pad", "project")
    kinds = [f"{what},join={join}" for join in joins for what in ("energy=0.95", "mode=kl")]
    kinds += [f"target=macs:0.5,join={join}" for join in joins]
    return [Recipe((f"`{passes}`",), passes) for kind in kinds if (passes := f"pfa{{{kind},multiple=8}}")]


def _reestimated() -> list[Recipe]:
    """What is lost to stale statistics alone: normalisations measured again on 2,000 samples, no training."""
    recipes = [f"energy={e}" for e in ENERGIES] + ["mode=kl"]
    again = "finetune{epochs=0, bn_reestimate=2000}"
    return [Recipe(("pad", r), f"pfa{{{r},join=pad,multiple=1}}, {again}") for r in recipes]


def _selection() -> list[Recipe]:
    how = ("correlation", "l1", "random")
    return [
        Recipe((s, f"{e}"), f"pfa{{energy={e},join=pad,selection={s},multiple=1}}")
        for e in (0.99, 0.95)
        for s in how
    ]


def _recovery() -> list[Recipe]:
    """About half the MACs by every method, and the same number of epochs for all of them.

    Where training is part of the method its epochs are of that number. The steps of `apoz` and the game of
    `play-and-prune` find their own rates; the paper of `distil` draws the student's weights anew.
    """
    half = f"target=macs:0.5, {WIDTHS}"
    after = f"finetune{{epochs={EPOCHS}, {TRAINING}}}"
    steps = f"finetune={{epochs=1, {TRAINING}}}"
    sparse = f"finetune{{epochs={EPOCHS // 2}, sparsity=1e-4, keep=last, {TRAINING}}}"
    rest = f"finetune{{epochs={EPOCHS - EPOCHS // 2}, {TRAINING}}}"
    distilled = f"distil{{epochs={EPOCHS}, {TRAINING}}}"
    taught = f"distil{{epochs={EPOCHS}, teacher=input, loss=kl, {TRAINING}}}"
    found = {
        "none, trained on": after,
        "random": f"random{{{half}}}, {after}",
        "l1": f"l1{{{half}}}, {after}",
        "l1, Hinton's loss": f"l1{{{half}}}, {taught}",
        "slimming": f"{sparse}, slimming{{{half}}}, {rest}",
        "apoz": f"apoz{{{half}}}, {after}",
        "apoz, steps": f"apoz{{steps={EPOCHS}, tolerance=10, {steps}}}",
        "play-and-prune": f"play-and-prune{{eps=3, max_epochs={EPOCHS}, training={{{TRAINING}}}}}",
        "pfa, couple": f"pfa{{{half}, join=couple}}, {after}",
        "pfa, pad": f"pfa{{{half}, join=pad}}, {after}",
        "low-rank": f"low-rank{{{half}}}, {after}",
        "cc": f"cc{{rate=0.5, {WIDTHS}}}, {after}",
        "student, sliced; distil": f"student{{fraction=1/2, init=slice}}, {distilled}",
        "student, random; distil": f"student{{fraction=1/2}}, {distilled}",
    }
    return [Recipe((name, f"`{passes.replace(TRAINING, '…')}`"), passes) for name, passes in found.items()]


AMOUNTS = 0.75, 0.5, 0.35
CRITERIA = "l1", "random", "apoz", "slimming", "pfa", "obs"
ALLOCATIONS = "uniform", "greedy", "calibrated"


def _cut(criterion: str, amount: float, how: str) -> str:
    return f"{criterion}{{target=macs:{amount}, allocation={how}, {WIDTHS}}}"


def _oneshot() -> list[Recipe]:
    """Without any training: what there is for channels, ranks, columns, and channels and ranks together."""
    found = {
        ("obs", f"{amount:g}"): f"fold-bn, {_cut('obs', amount, 'calibrated')}, refit" for amount in AMOUNTS
    }
    ranks = f"low-rank{{target=macs:0.5, fit=responses, {WIDTHS}}}"
    found["low-rank", "0.5"] = f"fold-bn, {ranks}, refit"
    found["low-rank, any rank", "0.5"] = f"fold-bn, {ranks.replace(WIDTHS, 'multiple=1')}, refit"
    for first, rest in ((0.75, 0.667), (0.9, 0.556)):
        some = f"low-rank{{target=macs:{rest}, fit=responses, {WIDTHS}}}"
        both = f"fold-bn, {_cut('obs', first, 'calibrated')}, refit, {some}, refit"
        found[f"obs {first:g}, low-rank", "0.5"] = both
        found[f"obs {first:g}, low-rank of any rank", "0.5"] = both.replace(
            some, some.replace(WIDTHS, "multiple=1")
        )
    found["cc", "0.5"] = f"fold-bn, cc{{rate=0.5, {WIDTHS}}}, refit"
    found["cc, responses", "0.5"] = f"fold-bn, cc{{rate=0.5, fit=responses, {WIDTHS}}}, refit"
    return [Recipe((*cells, f"`{passes}`"), passes) for cells, passes in found.items()]


def _grid() -> list[Recipe]:
    """Every criterion, allocation and repair at half the MACs.

    Statistics are those of the same samples that layers are fitted to, so that both repairs see as much.
    """
    again = "finetune{epochs=0, bn_reestimate=1000}"
    recipes = []
    for how in reversed(ALLOCATIONS):
        for criterion in reversed(CRITERIA):
            cut = _cut(criterion, 0.5, how)
            # slimming goes by the scales of normalisations
            fitted = f"{cut}, fold-bn, refit" if criterion == "slimming" else f"fold-bn, {cut}, refit"
            recipes.append(Recipe((criterion, how, "statistics"), f"{cut}, {again}"))
            recipes.append(Recipe((criterion, how, "refit"), fitted))
    return recipes


def _epochs() -> list[Recipe]:
    """The best of `oneshot`, and as many short epochs as in `recovery`."""
    cut = f"{_cut('obs', 0.5, 'calibrated')}, refit"
    found = {
        "obs, refit": f"{cut}, finetune{{epochs={EPOCHS}, {TRAINING}}}",
        "obs, refit, Hinton's loss": f"{cut}, distil{{epochs={EPOCHS}, teacher=input, loss=kl, {TRAINING}}}",
    }
    searched = TRAINING.replace("lr=0.02", "lr=auto")
    folded = f"fold-bn, {cut}"
    found["obs, refit, rate found"] = f"{folded}, finetune{{epochs={EPOCHS}, {searched}}}"
    taught = f"distil{{epochs={EPOCHS}, teacher=input, loss=kl, {searched}}}"
    found["obs, refit, Hinton's loss, rate found"] = f"{folded}, {taught}"
    return [Recipe((name, f"`{passes.replace(TRAINING, '…')}`"), passes) for name, passes in found.items()]


PAPER_HEAD = ("paper: % params", "% MACs", "top-1 change, retrained")
SUITES = {
    "pfa": Suite(
        [*_pfa("pad"), *_pfa("couple"), *_pfa("project")], ("join", "recipe"), PAPER_HEAD, timed=True
    ),
    "pfa-reestimated": Suite(_reestimated(), ("join", "recipe")),
    "pfa-fast": Suite(_pfa_fast(), ("recipe",), timed=True),
    "pfa-selection": Suite(_selection(), ("selection", "energy")),
    "oneshot": Suite(
        _oneshot(),
        ("what goes", "of the MACs", "recipe"),
        timed=True,
        spent=True,
        note="No labels, no training.",
    ),
    "oneshot-grid": Suite(
        _grid(),
        ("criterion", "allocation", "repair"),
        after="repaired, %",
        spent=True,
        note=f"Half the MACs, `{WIDTHS}`, no labels, no training; statistics: those of the normalisations, "
        "estimated again on as many images as `refit` takes.",
    ),
    "oneshot-epochs": Suite(
        _epochs(),
        ("method", "recipe"),
        timed=True,
        after="trained, %",
        spent=True,
        note=f"All train for {EPOCHS} epochs, with `…` = `{TRAINING}`.",
    ),
    "recovery": Suite(
        _recovery(),
        ("method", "recipe"),
        timed=True,
        after="trained, %",
        spent=True,
        note=f"All train for {EPOCHS} epochs together, with `…` = `{TRAINING}`.",
    ),
}
NETWORK = "resnet56"
BEFORE = "before"
MOST_NAMED = 6
"""Recipes that were not run, up to which they are named."""


# ---------------------------------------------------------------------- measuring


def measure(
    name: str, model: str, weights: Path | None, spec: str, seconds: float, only: Sequence[str] = ("*",)
) -> None:
    """All rows of a suite that are missing, of recipes that globs match: those of the first glob first."""
    suite = SUITES[name]
    wanted = dict.fromkeys(r for glob in only for r in suite.recipes if fnmatch(r.passes, glob))
    if not wanted:
        raise SystemExit(f"{name}: found no recipe that {' or '.join(only)} matches; see --list")
    source = load_source(model, weights).program
    data = load_data(spec, input_shape=tuple(source.example_inputs[0].shape[1:]), seed=0)
    said = re.sub(r"\S*/", "", data.description)  # without folders: the document is read elsewhere
    settings = {"model": model, "weights": weights.name if weights else "its own weights", "data": said}
    rows = Rows.open(_place(name, model), settings | ({"seconds": seconds} if suite.timed else {}))
    rows.measure(BEFORE, lambda: _counts(snapshot(source, accuracy(source, data.eval))))
    print(f"{BEFORE}: {rows.found[BEFORE]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base.onnx")
        timer: Callable[[Program], Row] | None = None
        if suite.timed:
            graphcomp.export_onnx(source, base)
            timer = partial(timed, base, seconds)
        for recipe in wanted:
            row = rows.measure(recipe.passes, partial(_row, source, recipe.passes, data, timer))
            print(f"{recipe.passes}: {row}", flush=True)


def _place(suite: str, model: str) -> str:
    """Name of the file of a suite's rows."""
    short = model.rpartition(":")[2]
    return f"methods-{suite}" + ("" if short == NETWORK else f"-{short}")


def _row(source: Program, passes: str, data: Data, timer: Callable[[Program], Row] | None) -> Row:
    start = time.process_time()
    try:
        made = graphcomp.compile(source, passes, data=data)
    except graphcomp.GraphcompError as error:
        return {"refused": str(error)}
    spent = time.process_time() - start
    timing = timer(made.program) if timer else {}
    counts = [_counts(step.after) for step in made.steps]
    sizes = [macs(source), *(count["macs"] for count in counts)]
    resized = zip(made.steps, counts, pairwise(sizes), strict=True)
    cut = [count["top1"] for step, count, (old, new) in resized if new != old and not step.rounds]
    return counts[-1] | timing | {"cut": cut[-1] if cut else None, "seconds": spent}


def _counts(counted: Snapshot) -> Row:
    top1 = counted.score.value if counted.score else None
    return {"params": counted.params_trainable, "macs": counted.macs, "top1": top1}


# ---------------------------------------------------------------------- the document


def render() -> None:
    """Put the tables of all suites and networks that were measured into the document."""
    for name in SUITES:
        for short in dict.fromkeys((NETWORK, *MODELS)):
            place = _place(name, short)
            rows = Rows.load(place)
            if BEFORE in rows.found:
                what = place.removeprefix("methods-")
                begin, end = (
                    f"<!-- {what}: {e}, written by benchmarks/methods.py -->" for e in ("begin", "end")
                )
                new = _section(name, rows, read_section(DOCS, begin, end))
                replace_section(DOCS, begin, end, f"{begin}\n{new}\n{end}")


def _section(name: str, rows: Rows, there: str) -> str:
    """A suite's section, with the lines of the one that is there for what is not in `rows`."""
    suite, before, settings = SUITES[name], rows.found[BEFORE], rows.settings
    model = settings["model"].partition(":")[2]
    options = f" --seconds {settings['seconds']:g}" if suite.timed else ""
    said = f"`python benchmarks/methods.py {name}{options}`, {settings['weights']}, {settings['data']}."
    whole = f"{model} before: {before['params']:,} parameters, {before['macs']:,} MACs, "
    whole += f"top-1 {_percent(before)} %."
    clock = " Speedups with a * are of CPU time: the machine was busy." if suite.timed else ""
    note = f" {suite.note}" if suite.note else ""
    spent = ("CPU minutes",) if suite.spent else ()
    top1 = ("top-1 cut, %", suite.after, *spent) if suite.after else ("top-1, %", *spent)
    head = ["% params", "% MACs", *top1, *(("by MACs", "measured") if suite.timed else ())]
    head = [*suite.first, *head, *suite.last]
    known = written(there, f"{said} {whole}", head, len(suite.first))
    for recipe in suite.recipes:
        if recipe.passes in rows.found:
            row = rows.found[recipe.passes]
            known[recipe.cells] = _line(recipe, row, before, suite), row["where"]
    order = [recipe.cells for recipe in suite.recipes]
    lines = {cells: known[cells] for cells in (*order, *known) if cells in known}
    missing = [r.passes for r in suite.recipes if r.cells not in lines]
    lacking = f" Not run: `{'`, `'.join(missing)}`." if missing else ""
    if len(missing) > MOST_NAMED:
        lacking = f" Not run: {len(missing)} of the suite's {len(suite.recipes)} recipes."
    return page(f"{said} {whole}{note}{clock}{lacking}", head, lines)


def _line(recipe: Recipe, row: Row, before: Row, suite: Suite) -> list[str]:
    if "refused" in row:
        empty = ["" for _ in range(2 + bool(suite.after) + suite.spent + 2 * suite.timed)]
        return [*recipe.cells, f"refused: {row['refused']}", *empty, *recipe.paper]
    shares = [f"{100 * row[what] / before[what]:.2f}" for what in ("params", "macs")]
    cells = [_percent(row)]
    if suite.after:
        cells = [_percent(row, "cut"), *cells]
    if suite.spent:
        cells.append(f"{row['seconds'] / 60:.1f}")
    return [*recipe.cells, *shares, *cells, *(_speedup(row) if suite.timed else []), *recipe.paper]


def _percent(row: Row, what: str = "top1") -> str:
    return "" if row[what] is None else f"{100 * row[what]:.2f}"


def _speedup(row: Row) -> list[str]:
    value, low, high = row["measured"]
    star = "*" if row["clock"] == "CPU" else ""
    return [f"{row['theory']:.2f}x", f"{value:.2f}x [{low:.2f}, {high:.2f}]{star}"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", choices=sorted(SUITES))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--model", default=f"models:{NETWORK}")
    parser.add_argument("--weights", type=Path, help="as of graphcomp compile")
    parser.add_argument("--data", help="as of graphcomp compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each recipe that is timed")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="recipes, those of the first glob first")
    parser.add_argument("--render", action="store_true", help="write the tables into docs/results.md")
    chosen = parser.parse_args()
    if chosen.list:
        for name, suite in SUITES.items():
            print(f"{name}: {len(suite.recipes)} recipes, such as {suite.recipes[0].passes}")
    if chosen.suite is not None:
        if chosen.data is None:
            parser.error("give --data")
        measure(
            chosen.suite, chosen.model, chosen.weights, chosen.data, chosen.seconds, chosen.only or ("*",)
        )
    if chosen.render:
        render()


if __name__ == "__main__":
    main()
