"""The networks of torchvision as ONNX files, by our rows and by torch's exporter.

    python benchmarks/onnx_out.py                        # measure; saves after every network, resumes
    python benchmarks/onnx_out.py --models 'resnet*' --exporter 'resnet18' --seconds 20
    python benchmarks/onnx_out.py --render               # write the section of docs/results.md

Both files are of one program and go through the same steps (`onnx.export_onnx`: clean-up, checker, parity
with ONNX Runtime at two batch sizes of two inputs), but for what drafts the model. Seconds are CPU seconds of
that alone, one thread, after a toy network has paid for what happens once a process. The two files run
against each other in ONNX Runtime (`graphcomp.benchmark`: interleaved, the ratio with its 95 % interval).
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnxruntime as ort
import torch
from rows import DOCS, OUT, Row, Rows, table
from section import replace_section
from torch import nn
from zoo import build, image, zoo

import graphcomp
from graphcomp.errors import GraphcompError, first_line
from graphcomp.ir import output_tensors
from graphcomp.onnx import export
from graphcomp.onnx.agreement import disagreement
from graphcomp.onnx.drafts import Draft, draft
from graphcomp.onnx.interface import output_names
from graphcomp.onnx.parity import make_cases

BEGIN, END = "<!-- onnx_out: begin, written by benchmarks/onnx_out.py --render -->", "<!-- onnx_out: end -->"
EXPORTER = (
    "squeezenet1_1 shufflenet_v2_x1_0 mnasnet1_0 mobilenet_v2 mobilenet_v3_large efficientnet_b0 densenet121 "
    "googlenet regnet_y_400mf resnet18 resnet50 convnext_tiny"
).split()
BATCHES = (1, 2)
TOLERANCE = 1e-4


@contextmanager
def drafting(exporter: bool) -> Iterator[list[float]]:
    """Every export is drafted by torch's exporter, or as always; the list gets the CPU seconds of each."""
    seconds: list[float] = []
    usual = draft

    def timed(*args: Any) -> Draft:
        clock = time.process_time()
        if exporter:
            translated = args[-1]()
            found = Draft(translated.model(), translated.tags, {}, "torch's exporter was asked for")
        else:
            found = usual(*args)
        seconds.append(time.process_time() - clock)
        return found

    with patch.object(export, "draft", timed):
        yield seconds


def written(program: graphcomp.Program, file: Path, exporter: bool) -> Row:
    """One file, with what it took and what is in it."""
    clock = time.process_time()
    with drafting(exporter) as seconds:
        # a network of random weights may amplify rounding, so parity is written down, not demanded
        record = graphcomp.export_onnx(program, file, batches=BATCHES, tolerance=float("inf"))
    row: Row = {"draft_s": seconds[0], "export_s": time.process_time() - clock, "bytes": record.bytes}
    kinds = Counter(node.op_type for node in onnx.load(file).graph.node)
    row |= {"parity": max(record.parity.values()), "kinds": dict(kinds.most_common())}
    return row if exporter or record.fallback is None else row | {"fallback": record.fallback}


def row_of(name: str, exporter: bool, pixels: int, seconds: float) -> Row:
    """A network through our rows; with `exporter` through torch's exporter too, and the two files timed."""
    program = graphcomp.trace(build(name), image(pixels))
    ours, theirs = (OUT / f"onnx_out_{which}.onnx" for which in ("ours", "theirs"))
    try:
        row: Row = {"ours": written(program, ours, exporter=False)}
        if exporter:
            row["theirs"] = written(program, theirs, exporter=True)
            timing = graphcomp.benchmark(theirs, ours, seconds=seconds).batches[0]
            row["speedup"] = (timing.quoted.value, timing.quoted.low, timing.quoted.high)
            row["clock"] = "CPU" if timing.busy else "wall"
        if row["ours"]["parity"] > TOLERANCE:
            row["from_float64"] = from_float64(
                program, {"ours": ours} | ({"theirs": theirs} if exporter else {})
            )
        return row
    except GraphcompError as error:
        return {"error": first_line(error)[:300]}
    finally:
        for file in (ours, theirs):
            file.unlink(missing_ok=True)


def from_float64(program: graphcomp.Program, files: dict[str, Path]) -> Row:
    """How far torch's float32, and the files in ONNX Runtime, are from the program in float64.

    On the inputs that parity is of. Where all are as far, a difference between two of them is rounding that
    the network amplifies.
    """
    wide, worst = program.to(torch.float64), dict.fromkeys(["torch", *files], 0.0)
    sessions = {n: ort.InferenceSession(str(f), providers=["CPUExecutionProvider"]) for n, f in files.items()}
    for case in make_cases(program, BATCHES, 0, output_names(program)):
        (x,) = case.inputs
        with torch.inference_mode():
            exact = [y.numpy() for y in output_tensors(wide(x.double()))]
        found = {"torch": [y.numpy() for y in case.expected]}
        for name, session in sessions.items():
            found[name] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for name, values in found.items():
            far = [disagreement(y, w, TOLERANCE) for y, w in zip(values, exact, strict=True)]
            worst[name] = max(worst[name], *far)
    return worst


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet: first our rows, smallest network first, then the exporter."""
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    rows = Rows.open("onnx_out", {"size": options.size})
    names = [n for n, size in zoo().items() if size <= options.limit_params and _is(n, options.models)]
    beside = [n for n in names if _is(n, options.exporter)]
    toy = graphcomp.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), image(32))
    for exporter in (False, True) if beside else (False,):
        written(toy, OUT / "onnx_out_toy.onnx", exporter)
        for name in beside if exporter else names:
            found = rows.found.get(name, {})
            if not found or (exporter and "theirs" not in found and "error" not in found):
                rows.found.pop(name, None)
                rows.measure(name, partial(row_of, name, exporter, options.size, options.seconds))
                print(name, {k: v for k, v in rows.found[name].items() if k != "where"}, flush=True)


def _is(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def difference(ours: Row, theirs: Row) -> str:
    """Which operators the two files have in other numbers."""
    left, right = (Counter[str](row["kinds"]) for row in (ours, theirs))
    changed = [f"{k} {left[k]} / {right[k]}" for k in sorted(left | right) if left[k] != right[k]]
    return ", ".join(changed) or "the same"


def render() -> None:
    """Write the section of docs/results.md."""
    rows = Rows.load("onnx_out")
    good = {name: row for name, row in rows.found.items() if "ours" in row}
    both = {name: row for name, row in good.items() if "theirs" in row}
    beside = [
        [
            name,
            *(f"{row['ours'][k]:.2f} / {row['theirs'][k]:.1f}" for k in ("draft_s", "export_s")),
            f"{row['ours']['bytes'] / 1e6:.2f} / {row['theirs']['bytes'] / 1e6:.2f}",
            f"{row['ours']['parity']:.0e} / {row['theirs']['parity']:.0e}",
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["speedup"]) + f" {row['clock']}",
            difference(row["ours"], row["theirs"]),
        ]
        for name, row in both.items()
    ]
    alone = [
        [
            name,
            f"{row['ours']['draft_s']:.2f}",
            f"{row['ours']['export_s']:.1f}",
            f"{row['ours']['bytes'] / 1e6:.1f}",
            str(sum(row["ours"]["kinds"].values())),
            f"{row['ours']['parity']:.0e}",
            row["ours"].get("fallback", ""),
        ]
        for name, row in good.items()
    ]
    slow = [n for n, row in good.items() if row["ours"]["draft_s"] >= 1 and "fallback" not in row["ours"]]
    apart = [n for n, row in good.items() if row["ours"]["parity"] > TOLERANCE]
    rounding = [
        f"{name} ({', '.join(f'{k} {v:.0e}' for k, v in row['from_float64'].items())})"
        for name, row in good.items()
        if "from_float64" in row
    ]
    distances = (
        [f"Distances of these from the network in float64: {'; '.join(rounding)}."] if rounding else []
    )
    failed = [f"{name}: {row['error']}" for name, row in rows.found.items() if "error" in row]
    said = [
        f"`python benchmarks/onnx_out.py`, {rows.settings['size']} px; {rows.places}.",
        f"{len(good)} networks by our rows, {len(both)} of them by torch's exporter as well (ours / theirs). "
        f"Drafting took 1 s or more on {', '.join(slow) or 'none'}. Random weights, so that rounding may be "
        f"amplified: further apart than {TOLERANCE:g} were {', '.join(apart) or 'none'}.",
        *distances,
        *failed,
    ]
    heads = (
        ["network", "draft (s)", "export (s)", "MB", "parity", "speed: theirs over ours", "operators"],
        ["network", "draft (s)", "export (s)", "MB", "nodes", "parity", "why not by our rows"],
    )
    tables = [table(head, rows) for head, rows in zip(heads, (beside, alone), strict=True) if rows]
    text = [BEGIN, "## ONNX files out", *said, *tables, END]
    replace_section(DOCS, BEGIN, END, "\n\n".join(text))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=lambda t: t.split(","), default=["*"])
    parser.add_argument(
        "--exporter", type=lambda t: t.split(","), default=EXPORTER, help="which go through it"
    )
    parser.add_argument("--limit-params", type=float, default=2e8)
    parser.add_argument("--size", type=int, default=224, help="of images")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a pair of files")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    render() if options.render else run(options)


if __name__ == "__main__":
    main()
