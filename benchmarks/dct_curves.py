"""DCT coefficient layers on trained networks: accuracy against size (Ulicny et al. 2020, Fig. 2 and Table 1).

    python benchmarks/dct_curves.py resnet56 --weights W --data "cifar10:DIR?limit=5000"
    python benchmarks/dct_curves.py mobilenet_v2 --weights W --images DIR     # DIR/IIII_*.jpg, IIII the class
    python benchmarks/dct_curves.py resnet56 --weights W --data "…" --tuned   # then: a short fine-tuning
    python benchmarks/dct_curves.py --render                                  # section and plots in docs/

Every recipe is run with and without reordering of the columns (then there is no index vector, and none is
counted), and beside the baseline of the paper's Table 1: columns of largest norm and no transform. Rows are
saved one by one and measured once; a run that was interrupted is restarted by the same command.

The method is free of data, so all images that are given are evaluated. Rows that were fine-tuned are
compared, before and after, on those that were not trained on.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rows import DOCS, OUT, Row, Rows, table
from section import replace_section

import graphcomp
from graphcomp.compiler.source import load_source
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.ir.program import Program
from graphcomp.measure.cost import params_order, params_trainable
from graphcomp.measure.evaluate import accuracy, wilson
from graphcomp.report.plots import style

BEGIN, END = "<!-- dct: begin, written by benchmarks/dct_curves.py --render -->", "<!-- dct: end -->"
PLOTS = DOCS.parent / "plots"


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        title: for the document.
        model: as on the command line.
        options: of `dct`, for what the paper leaves whole.
        whole: whether both halves of the data are evaluated; else the test set alone.
        training: options of `finetune`, but for the number of steps.
    """

    title: str
    model: str
    options: str
    whole: bool
    training: str


NETWORKS = {
    "mobilenet_v2": Network(
        "MobileNet-V2",
        "torchvision:mobilenet_v2",
        'exclude="features.[0-7].*"',
        True,
        "batch=64, lr=0.001, augment=none",
    ),
    "resnet56": Network("ResNet-56", "models:resnet56", "", False, "batch=128, lr=0.01"),
}


ORDERED, PLAIN, LARGEST = "in order", "as they are", "largest columns"


@dataclass(frozen=True)
class Variant:
    """One recipe.

    Attributes:
        line: rows of one line differ in the rate alone.
        rate, groups: of the pass.
        how: what becomes of the columns.
        tune: whether it is one of the few that are fine-tuned too.
    """

    strategy: str
    rate: float
    groups: int
    how: str = ORDERED
    tune: bool = False

    @property
    def line(self) -> str:
        """Rows of one line differ in the rate alone."""
        return f"{self.strategy}, g = {self.groups}"

    @property
    def label(self) -> str:
        """For a table."""
        symbol = "r'" if self.strategy == "progressive-r" else "r"
        return f"{self.line}, {symbol} = {self.rate:g}, {self.how}"

    def passes(self, network: Network) -> str:
        """As on the command line."""
        changes = {ORDERED: "", PLAIN: "reorder=false", LARGEST: "method=magnitude"}
        options = [f"rate={self.rate:g}", f"groups={self.groups}", f"strategy={self.strategy}"]
        return f"dct{{{', '.join(x for x in (*options, changes[self.how], network.options) if x)}}}"


UNIFORM, PROGRESSIVE = (2, 4, 8, 16), (0.25, 0.5, 1, 2, 4)


def _variants() -> list[Variant]:
    both = (ORDERED, PLAIN)
    found = [
        Variant("uniform", r, 4, how, tune=r == 8 or (r == 4 and how == ORDERED))
        for how in both
        for r in UNIFORM
    ]
    found += [
        Variant("progressive-r", r, 4, how, tune=r in (1, 2) and how == ORDERED)
        for how in both
        for r in PROGRESSIVE
    ]
    found += [Variant("progressive-g", r, 4, how) for how in both for r in UNIFORM]
    found += [Variant("uniform", r, 8) for r in UNIFORM]
    return found + [Variant("uniform", r, 4, LARGEST, tune=r == 2) for r in UNIFORM]


VARIANTS = _variants()
ORIGINAL = "original"


# ---------------------------------------------------------------------- data


def pack(images: Path) -> Path:
    """An npz of all `IIII_*.jpg` of a folder, IIII their class; in `out/`, made once."""
    packed = OUT / f"{images.name}.npz"
    if not packed.exists():
        files = sorted(images.glob("[0-9][0-9][0-9][0-9]_*.jpg"))
        if not files:
            raise SystemExit(f"{images}: found no IIII_*.jpg, expected images named by their class")
        pixels = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
        packed.parent.mkdir(exist_ok=True)
        whole = packed.with_suffix(".partial.npz")
        np.savez(whole, x=pixels, y=np.array([int(f.name[:4]) for f in files]))
        whole.replace(packed)
    return packed


# ---------------------------------------------------------------------- measuring


def measure(name: str, weights: Path, spec: str, tuning: str | None) -> None:
    """All rows of a network that are missing, and then those that are fine-tuned by the recipe `tuning`."""
    network = NETWORKS[name]
    source = load_source(network.model, weights).program
    data = load_data(spec, input_shape=tuple(source.example_inputs[0].shape[1:]), seed=0)
    said = re.sub(r"\S*/", "", data.description)  # without folders: the document is read elsewhere
    rows = Rows.open(f"dct-{name}", {"weights": weights.name, "data": said})
    print(
        f"{ORIGINAL}: {_said(rows.measure(ORIGINAL, lambda: _row(source, data, network, True)))}", flush=True
    )
    for variant in VARIANTS:
        passes = variant.passes(network)
        row = rows.measure(passes, partial(_compressed, source, variant, data, network))
        print(f"{passes}: {_said(row)}", flush=True)
    if tuning is None:
        return
    for passes in (ORIGINAL, *(v.passes(network) for v in VARIANTS if v.tune)):
        if rows.found[passes].get("tuning") != tuning:
            program = source if passes == ORIGINAL else _run(source, passes, None)
            tuned = accuracy(_run(program, tuning, data), data.eval)
            assert tuned is not None
            rows.put(passes, rows.found[passes] | {"tuning": tuning, "tuned": tuned.value})
        print(f"{passes}, tuned: {_said(rows.found[passes])}", flush=True)


def _run(program: Program, passes: str, data: Data | None) -> Program:
    return graphcomp.compile(program, passes, data=data).program


def _compressed(source: Program, variant: Variant, data: Data, network: Network) -> Row:
    started = time.process_time()
    made = graphcomp.compile(source, variant.passes(network))
    seconds = time.process_time() - started
    layers = made.steps[-1].plan.evidence["layers"]
    weights = [source.tensors[f"{x['layer']}.weight"].detach() for x in layers]
    energies = [float(weight.double().square().sum()) for weight in weights]
    lost = sum(x["nsse"] * energy for x, energy in zip(layers, energies, strict=True))
    return _row(made.program, data, network, variant.how == ORDERED) | {
        "layers": len(layers),
        "weights": sum(x["weights"] for x in layers),
        "coefficients": sum(x["coefficients"] for x in layers),
        "nsse": lost / sum(energies),
        "seconds": seconds,
    }


def _row(program: Program, data: Data, network: Network, filed: bool) -> Row:
    halves = [accuracy(program, split) for split in (data.eval, data.train)[: 1 + network.whole]]
    found = [a for a in halves if a is not None]
    samples = sum(a.samples for a in found)
    correct = round(sum(a.value * a.samples for a in found))
    return {
        "trainable": params_trainable(program),
        "order": params_order(program),
        "bytes": _file_size(program) if filed else None,
        "top1": correct / samples,
        "interval": wilson(correct, samples),
        "samples": samples,
        "held_out": found[0].value,
        "held_out_samples": found[0].samples,
    }


def _file_size(program: Program) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return graphcomp.export_onnx(program, Path(folder, "model.onnx"), batches=(1,)).bytes


def _said(row: Row) -> str:
    tuned = f", held out {row['held_out']:.4f} -> {row['tuned']:.4f}" if "tuned" in row else ""
    return f"{row['trainable'] + row['order']:,} parameters, top-1 {row['top1']:.4f}{tuned}"


# ---------------------------------------------------------------------- the document

LINES = {
    "uniform, g = 4": ("#0072B2", "o"),
    "uniform, g = 8": ("#56B4E9", "v"),
    "progressive-r, g = 4": ("#D55E00", "s"),
    "progressive-g, g = 4": ("#009E73", "^"),
}
"""Of Okabe and Ito's palette, as in the reports."""
DASHES = {ORDERED: "-", PLAIN: "--", LARGEST: ":"}


def plot(name: str, rows: Rows) -> Path:
    """Accuracy against what is stored, and the energy that is lost against the coefficients that stay."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    whole = rows.found[ORIGINAL]
    size = whole["trainable"] + whole["order"]
    for line, how in dict.fromkeys((v.line, v.how) for v in VARIANTS):
        found = [rows.found.get(v.passes(NETWORKS[name])) for v in VARIANTS if (v.line, v.how) == (line, how)]
        points = sorted((r for r in found if r), key=lambda r: r["coefficients"])
        kept = [100 * (r["trainable"] + r["order"]) / size for r in points]
        _draw(left, kept, [100 * r["top1"] for r in points], line, how)
        shares = [100 * r["coefficients"] / r["weights"] for r in points]
        _draw(right, shares, [r["nsse"] for r in points], line, how)
    left.axhline(100 * whole["top1"], color="#b4bac4", linewidth=1)
    left.set(xlabel="parameters stored, order included, % of the original", ylabel="top-1 accuracy, %")
    right.set(xlabel="coefficients, % of the weights that are compressed", ylabel="nSSE")
    for ax in (left, right):
        style(ax, "y")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path = PLOTS / f"dct-{name}.svg"
    path.parent.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(path, metadata={"Date": None, "Title": f"dct on {NETWORKS[name].title}"})
    return path


def _draw(ax: Axes, x: Sequence[float], y: Sequence[float], line: str, how: str) -> None:
    colour, marker = LINES[line]
    label = f"{line}, columns {how}" if how != LARGEST else f"{line}, {how}, no transform"
    face = colour if how == ORDERED else "white"
    look = {"color": colour, "marker": marker, "linestyle": DASHES[how], "markerfacecolor": face}
    ax.plot(x, y, label=label, linewidth=1.4, markersize=5, **look)


HEAD = "strategy | columns | r or r' | coefficients + dense | order | % | file, MB | nSSE | top-1, %".split(
    " | "
)


def _curve_table(network: Network, rows: Rows) -> str:
    whole = rows.found[ORIGINAL]
    lines = [[ORIGINAL, "", "", *_cells(whole, whole)]]
    for v in VARIANTS:
        row = rows.found.get(v.passes(network))
        lines += [[v.line, v.how, f"{v.rate:g}", *_cells(row, whole)]] if row else []
    return table(HEAD, lines)


def _cells(row: Row, whole: Row) -> list[str]:
    share = 100 * (row["trainable"] + row["order"]) / (whole["trainable"] + whole["order"])
    size = f"{row['bytes'] / 1e6:.2f}" if row["bytes"] else ""
    nsse = f"{row['nsse']:.4f}" if "nsse" in row else ""
    return [f"{row['trainable']:,}", f"{row['order']:,}", f"{share:.1f}", size, nsse, _percent(row["top1"])]


def _tuned_table(network: Network, rows: Rows) -> str:
    names = {ORIGINAL: ORIGINAL} | {v.passes(network): v.label for v in VARIANTS}
    tuned = [(names[key], row) for key, row in rows.found.items() if "tuned" in row]
    samples = rows.found[ORIGINAL]["held_out_samples"]
    lines = [[name, _percent(row["held_out"]), _percent(row["tuned"])] for name, row in tuned]
    return table(["recipe", f"top-1 on {samples:,} other images, before, %", "after, %"], lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _network_section(name: str, rows: Rows) -> Iterable[str]:
    network, whole = NETWORKS[name], rows.found[ORIGINAL]
    low, high = (100 * x for x in whole["interval"])
    missing = sum(v.passes(network) not in rows.found for v in VARIANTS)
    path = plot(name, rows)
    yield f"### {network.title}"
    yield (
        f"{rows.settings['data']}; top-1 on {whole['samples']:,} images (original: 95 % interval "
        f"{low:.1f} to {high:.1f}). {rows.places}."
        + (f" {missing} of {len(VARIANTS)} recipes were not run." if missing else "")
    )
    yield f"![accuracy against size]({path.relative_to(DOCS.parent)})"
    yield _curve_table(network, rows)
    recipes = dict.fromkeys(row["tuning"] for row in rows.found.values() if "tuning" in row)
    if recipes:
        yield f"A short fine-tuning (`{'`, `'.join(recipes)}`) of some:"
        yield _tuned_table(network, rows)


INTRO = """Stored parameters are the trainable ones and the order (none where columns stay as they are); the
file is the `coefficients` export, of recipes with an order. `nSSE` is that of all compressed weights
together. Largest columns: the baseline without a transform (Table 1 of the paper). The paper fine-tunes for
an epoch of ImageNet on other hardware: some steps on some images are no reproduction of its accuracies."""

COMMANDS = """```
python benchmarks/dct_curves.py resnet56 --weights W --data "cifar10:DIR?limit=5000&mean=…&std=…" --tuned
python benchmarks/dct_curves.py mobilenet_v2 --weights W --images DIR --tuned
python benchmarks/dct_curves.py --render
```"""


def render() -> None:
    """Write plots and section of the networks that have rows."""
    parts = [
        BEGIN,
        "## DCT: accuracy against size",
        INTRO,
        COMMANDS,
    ]
    for name in NETWORKS:
        rows = Rows.load(f"dct-{name}")
        if ORIGINAL in rows.found:
            parts += _network_section(name, rows)
    replace_section(DOCS, BEGIN, END, "\n\n".join([*parts, END]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", choices=sorted(NETWORKS))
    parser.add_argument("--weights", type=Path)
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", help="as of graphcomp compile")
    data.add_argument("--images", type=Path, help="folder of IIII_*.jpg, IIII their class, cut to size")
    parser.add_argument("--tuned", action="store_true", help="fine-tune some recipes as well")
    parser.add_argument("--steps", type=int, default=100, help="of the fine-tuning")
    parser.add_argument("--training", help="options of finetune, e.g. 'batch=64, lr=0.001'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true", help="write the section of docs/results.md")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.network is not None:
        if chosen.weights is None or not (chosen.data or chosen.images):
            parser.error("give --weights, and --data or --images")
        spec = chosen.data or f"npz:{pack(chosen.images)}"
        training = chosen.training or NETWORKS[chosen.network].training
        tuning = f"finetune{{{training}, max_steps={chosen.steps}, epochs=10000, held_out=0, keep=last}}"
        measure(chosen.network, chosen.weights, spec, tuning if chosen.tuned else None)
    if chosen.render:
        render()


if __name__ == "__main__":
    main()
