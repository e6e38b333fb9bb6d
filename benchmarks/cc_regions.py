"""Liu's study of collaborative compression on ResNet-56: half of the MACs, region by region.

    python benchmarks/cc_regions.py --weights W --data cifar10:DIR             # before fine-tuning, and times
    python benchmarks/cc_regions.py --weights W --data cifar10:DIR --tuned     # and a short fine-tuning
    python benchmarks/cc_regions.py --render                                   # section of docs/results.md

The columns of the study's Tables I and II: regions of three blocks, and of nine, no block (x) and all. One
analysis of the whole network serves all regions (it is kept by content). Rows are saved as they are known
and measured once: every row is one `graphcomp.compile`, its confusion matrix on the test images, and its file
timed against the original's, interleaved, one thread, batch 1. `recipes/cc-resnet56.yaml` is the whole
study.
"""

import argparse
import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rows import DOCS, Row, Rows, table, timed
from section import replace_section

import graphcomp
from graphcomp.compiler.source import load_source
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.factors import candidates
from graphcomp.factors.decompose import Factor
from graphcomp.ir.program import Program
from graphcomp.measure.classes import class_statistics
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.measure.evaluate import confusion, wilson
from graphcomp.passes import CC
from graphcomp.study.axes import Regions, blocks_of, regions

BEGIN, END = "<!-- cc: begin, written by benchmarks/cc_regions.py --render -->", "<!-- cc: end -->"
NAME = "cc-regions"
MODEL = "models:resnet56"
CLASSES = ("plane", "auto", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RATE = 0.5
ROUNDED = (8, 16)
"""Multiples that widths and ranks of the whole network are rounded up to, for the speed's sake."""

LIU = {
    "none": (0.9327, 0.0012, "cat", 0.9327, 0.0012),
    "1-3": (0.9102, 0.0029, "dog", 0.934, 0.0029),
    "4-6": (0.9137, 0.0012, "dog", 0.932, 0.0012),
    "7-9": (0.9004, 0.0032, "cat", 0.933, 0.0010),
    "10-12": (0.899, 0.0021, "dog", 0.9332, 0.0011),
    "13-15": (0.91, 0.0032, "cat", 0.932, 0.0010),
    "16-18": (0.91, 0.0024, "cat", 0.9335, 0.0013),
    "19-21": (0.8931, 0.0029, "cat", 0.9328, 0.0012),
    "22-24": (0.908, 0.0019, "cat", 0.9325, 0.0010),
    "25-27": (0.8962, 0.0033, "plane", 0.9328, 0.0013),
    "all": (0.2643, 0.0986, "auto", 0.9313, 0.0010),
}
"""Tables I and II: top-1, variance and hardest class before fine-tuning; top-1 and variance after 100 epochs.
Two columns of variances repeat before and after, probably a slip."""
LIU_PARAMS = 455_599


# ---------------------------------------------------------------------- measuring


def passes() -> dict[str, tuple[tuple[str, ...], int]]:
    """Row name -> globs of the region, and the multiple that widths are rounded to."""
    layers = list(candidates(load_source(MODEL).program))
    found = regions(blocks_of(layers, None, NAME), Regions(strides=(3, 9)))
    rows = {name: (tuple(globs), 1) for name, globs in found.items()}
    return rows | {rounded(multiple): (("*",), multiple) for multiple in ROUNDED}


def rounded(multiple: int) -> str:
    """Name of the row of the whole network in multiples."""
    return f"all, multiples of {multiple}"


def measure(weights: Path, spec: str, samples: int, seconds: float, tuning: str | None) -> None:
    """All rows that are missing; then those that are fine-tuned by the recipe `tuning`."""
    source = load_source(MODEL, weights).program
    data = load_data(spec, input_shape=tuple(source.example_inputs[0].shape[1:]), seed=0)
    said = re.sub(r"\S*/", "", data.description)  # without folders: the document is read elsewhere
    settings = {"weights": weights.name, "data": said, "samples": samples, "seconds": seconds}
    rows = Rows.open(NAME, settings)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base.onnx")
        graphcomp.export_onnx(source, base)
        for name, (globs, multiple) in passes().items():
            pass_ = CC(rate=RATE, only=globs, multiple=multiple, samples=samples)
            row = rows.measure(name, partial(_row, source, pass_, data, base, seconds))
            print(f"{name}: {_said(row)}", flush=True)
            if tuning is not None and row.get("tuning") != tuning:
                made = _compress(source, pass_, data)[0]
                tuned = _classes(graphcomp.compile(made, tuning, data=_few(data)).program, data)
                rows.put(name, row | {"tuning": tuning, "tuned": tuned})
                print(f"{name}, tuned: {tuned['top1']:.4f}", flush=True)


def _few(data: Data) -> Data:
    """The same training data; what a step evaluates on by itself is not used here."""
    return replace(data, eval=data.eval.subset(np.arange(min(250, len(data.eval)))))


def _compress(source: Program, pass_: CC, data: Data) -> tuple[Program, Row]:
    """The result, and what was decided."""
    made = graphcomp.compile(source, [pass_], data=_few(data))
    (step,) = made.steps
    decided = [row for row in step.plan.evidence["layers"] if row["reason"] is None]
    uncut = sum(_uncut(source, Factor.model_validate(row["factor"])) for row in decided)
    rates = [row["rate"] for row in step.plan.evidence["layers"]]
    return made.program, {
        "uncut": params_trainable(source) + uncut,
        "layers": len(decided),
        "split": sum(row["factor"]["rank"] is not None for row in decided),
        "rates": (min(rates), max(rates)),
        "seconds": step.seconds,
    }


def _uncut(source: Program, factor: Factor) -> int:
    """Parameters that a layer gains by itself, before channels that nobody reads go."""
    weight = source.tensors[f"{factor.layer}.weight"]
    kernel = weight[0, 0].numel()
    width = weight.shape[1] if factor.keep is None else len(factor.keep)
    if factor.rank is None:
        return len(weight) * width * kernel - weight.numel()
    return int(factor.rank * (width * kernel + len(weight)) - weight.numel())


def _row(source: Program, pass_: CC, data: Data, base: Path, seconds: float) -> Row:
    program, decided = _compress(source, pass_, data)
    counts = {"params": params_trainable(program), "macs": macs(program)}
    return counts | decided | _classes(program, data) | timed(base, seconds, program)


def _classes(program: Program, data: Data) -> Row:
    matrix = confusion(program, data.eval)
    assert matrix is not None
    found = class_statistics(matrix.tolist())
    correct, samples = int(matrix.trace()), int(matrix.sum())
    return {
        "top1": correct / samples,
        "interval": wilson(correct, samples),
        "variance": found.variance,
        "hardest": CLASSES[found.hardest],
    }


def _said(row: Row) -> str:
    return (
        f"{row['params']:,} parameters, top-1 {row['top1']:.4f}, variance {row['variance']:.4f}, hardest "
        f"{row['hardest']}, {row['theory']:.2f}x by MACs, {row['measured'][0]:.2f}x measured"
    )


# ---------------------------------------------------------------------- the document

HEAD = "blocks | params | % | % MACs | by MACs | measured | top-1 (Liu) | variance (Liu) | hardest (Liu)"
TUNED_HEAD = "blocks | top-1 before | after (Liu) | variance (Liu) | hardest"
INTRO = """Half of the MACs of the whole network are given up (`cc{rate=0.5, multiple=1}`); of that only the
blocks named are compressed. Liu's numbers stand beside: they are of **another checkpoint** (93.27 %) and of a
gradient over all 50,000 images, so none is reproduced here. A variance is the population variance of the ten
class accuracies. *By MACs* counts what the file computes, 1x1 convolutions that pick channels included.
Rounded rows are the same recipe in multiples of what the kernels compute anyway. A run that measures times
(`graphcomp compile`) leaves alone what its factors slow down (`revert`); these rows do not."""


def render() -> None:
    """Write the section, if there are rows."""
    rows = Rows.load(NAME)
    if not rows.found:
        raise SystemExit(f"{rows.path}: found no rows, expected some; measure first")
    order = [name for name in passes() if name in rows.found]
    settings = rows.settings
    where = (
        f"{settings['weights']}; {settings['data']}; gradients of {settings['samples']:,} training images; "
        f"{rows.places}. Speedups: one thread, batch 1; those with a * are of CPU time, for the machine was "
        "busy."
    )
    command = "```\npython benchmarks/cc_regions.py --weights W --data cifar10:DIR --tuned --render\n```"
    parts = [
        BEGIN,
        "## CC on ResNet-56 and CIFAR-10, half of the MACs, region by region",
        INTRO,
        where,
        command,
    ]
    parts += [*_whole(rows), table(HEAD.split(" | "), [_cells(name, rows.found[name]) for name in order])]
    recipes = dict.fromkeys(row["tuning"] for row in rows.found.values() if "tuned" in row)
    if recipes:
        tuned = [name for name in order if "tuned" in rows.found[name]]
        said = f"After a short fine-tuning, `{'`, `'.join(recipes)}`; Liu's is of 100 epochs of all images:"
        parts += [said, table(TUNED_HEAD.split(" | "), [_tuned_cells(n, rows.found[n]) for n in tuned])]
    replace_section(DOCS, BEGIN, END, "\n\n".join([*parts, END]))


def _whole(rows: Rows) -> list[str]:
    row, none = rows.found.get("all"), rows.found.get("none")
    if row is None or none is None:
        return []
    low, high = row["rates"]
    parts = [
        f"**All blocks.** {row['uncut']:,} of {none['params']:,} parameters "
        f"({100 * row['uncut'] / none['params']:.2f} %) as the study counts, which reports {LIU_PARAMS:,} "
        f"({100 * LIU_PARAMS / 853_018:.2f} %); {row['params']:,} once channels that nobody reads any more "
        f"are gone as well. {row['split']} of {row['layers']} layers become two factors; their rates are "
        f"{low:.3f} to {high:.3f}."
    ]
    inside = [rows.found[name]["uncut"] for name in rows.found if name in LIU and name not in ("none", "all")]
    if len(inside) == len(LIU) - 2:
        saved = sum(none["params"] - params for params in inside)
        parts.append(
            f"What the nine regions of three blocks save adds up to {saved:,}; all blocks save "
            f"{none['params'] - row['uncut']:,}."
        )
    return [" ".join(parts)]


def _cells(name: str, row: Row) -> list[str]:
    whole = 853_018, 125_485_696
    value, low, high = row["measured"]
    star = "*" if row["clock"] == "CPU" else ""
    top1, variance, hardest, *_ = LIU.get(name, ("", "", ""))
    return [
        name,
        f"{row['params']:,}",
        f"{100 * row['params'] / whole[0]:.2f}",
        f"{100 * row['macs'] / whole[1]:.2f}",
        f"{row['theory']:.2f}x",
        f"{value:.2f}x [{low:.2f}, {high:.2f}]{star}",
        _beside(f"{row['top1']:.4f}", top1),
        _beside(f"{row['variance']:.4f}", variance),
        _beside(row["hardest"], hardest),
    ]


def _tuned_cells(name: str, row: Row) -> list[str]:
    tuned = row["tuned"]
    *_, top1, variance = LIU.get(name, ("", ""))
    return [
        name,
        f"{row['top1']:.4f}",
        _beside(f"{tuned['top1']:.4f}", top1),
        _beside(f"{tuned['variance']:.4f}", variance),
        tuned["hardest"],
    ]


def _beside(ours: str, theirs: object) -> str:
    return f"{ours} ({theirs})" if theirs != "" else ours


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", help="as of graphcomp compile")
    parser.add_argument("--samples", type=int, default=5000, help="training images of the gradient")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row")
    parser.add_argument("--tuned", action="store_true", help="fine-tune every row as well")
    parser.add_argument("--steps", type=int, default=80, help="of the fine-tuning")
    parser.add_argument("--training", default="batch=128, lr=0.01", help="options of finetune")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="write the section of docs/results.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    tuning = f"finetune{{{chosen.training}, max_steps={chosen.steps}, epochs=10000, held_out=0, keep=last}}"
    if chosen.weights is not None or chosen.data is not None:
        if chosen.weights is None or chosen.data is None:
            parser.error("give --weights and --data")
        tuned = tuning if chosen.tuned else None
        measure(chosen.weights, chosen.data, chosen.samples, chosen.seconds, tuned)
    if chosen.render:
        render()


if __name__ == "__main__":
    main()
