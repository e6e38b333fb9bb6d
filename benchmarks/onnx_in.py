"""Networks through torch's exporters and back: what is lost on the way in, and whether it can be compressed.

    python benchmarks/onnx_in.py                                # measure; saves after every file, resumes
    python benchmarks/onnx_in.py --models 'resnet*' --opsets 13,18 --exporters legacy
    python benchmarks/onnx_in.py --render                       # write the section of docs/results.md

Every file is made here. Reading compares it with ONNX Runtime (`onnx.read_onnx`), `l1` at half of all
channels is verified in float64 (`rewrite(simulate(p)) == simulate(p)`), and the export is compared with the
program. Seconds are CPU seconds of one thread.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import DOCS, OUT, Row, Rows
from section import replace_section
from torch import nn

import graphcomp
from graphcomp.base import muted
from graphcomp.compiler.models import load_model
from graphcomp.errors import GraphcompError, first_line

FILE = OUT / "onnx_in.onnx"
BEGIN, END = "<!-- onnx_in: begin, written by benchmarks/onnx_in.py --render -->", "<!-- onnx_in: end -->"
TORCHVISION = (
    "alexnet vgg11_bn vgg16 resnet18 resnet34 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 "
    "densenet169 squeezenet1_0 squeezenet1_1 googlenet inception_v3 mobilenet_v2 mobilenet_v3_small "
    "mobilenet_v3_large mnasnet0_5 mnasnet1_0 shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 "
    "efficientnet_b1 efficientnet_v2_s regnet_x_400mf regnet_y_400mf regnet_y_800mf convnext_tiny "
    "lraspp_mobilenet_v3_large fcn_resnet50 deeplabv3_mobilenet_v3_large"
).split()
OPSETS = (11, 13, 17, 18, 20, 23)
EXPORTERS = ("legacy", "dynamo")


def names() -> list[str]:
    """Specs of the networks."""
    from graphcomp.models import MODELS

    return [*(f"torchvision:{n}" for n in TORCHVISION), *(f"models:{n}" for n in MODELS)]


def write(module: nn.Module, x: torch.Tensor, file: Path, exporter: str, opset: int, folded: bool) -> None:
    """One file, with an open batch."""
    open_batch: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "dynamo": True, "external_data": False,
         "optimize": folded}
        if exporter == "dynamo"
        else {"dynamic_axes": {"input": {0: "batch"}}, "dynamo": False, "do_constant_folding": folded}
    )  # fmt: skip
    with muted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(file), opset_version=opset, input_names=["input"], **open_batch)


def measure(file: Path, traced: graphcomp.Program) -> dict[str, Any]:
    """Read, compress and write one file."""
    clock = time.process_time()
    program = graphcomp.read_onnx(file)
    row: dict[str, Any] = {"read_s": time.process_time() - clock, "remarks": list(program.interface.remarks)}
    row["removable"], row["removable_traced"] = (removable(p) for p in (program, traced))
    clock = time.process_time()
    made = graphcomp.compile(program, "l1{ratio=0.5}")
    row["remove_s"], row["verify_error"] = time.process_time() - clock, made.steps[0].verify_error
    row["left"], row["left_traced"] = (
        made.steps[0].after.params_trainable / sum(t.numel() for t in program.module.parameters()),
        graphcomp.compile(traced, "fold-bn, l1{ratio=0.5}").steps[-1].after.params_trainable
        / graphcomp.compile(traced, "fold-bn", allow_nothing=True).steps[0].after.params_trainable,
    )
    clock = time.process_time()
    export = graphcomp.export_onnx(made.program, file.with_suffix(".out.onnx"), batches=(1, 2))
    return row | {"export_s": time.process_time() - clock, "parity": max(export.parity.values())}


def removable(program: graphcomp.Program) -> int:
    """Channels that a pass may remove."""
    return sum(len(group.channels) for group in graphcomp.analyse(program).groups)


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, str, int, bool]]:
    """Network, exporter, opset, whether constants are folded; torch's new exporter writes 18 and above."""
    for name in names():
        if not any(
            fnmatch(name, pattern) or fnmatch(name.partition(":")[2], pattern) for pattern in options.models
        ):
            continue
        for exporter in options.exporters:
            for opset in options.opsets:
                if (exporter == "dynamo" and opset < 18) or (exporter == "legacy" and opset > 20):
                    continue
                for folded in (True, False):
                    yield name, exporter, opset, folded


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet."""
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    rows = Rows.open("onnx_in", {"size": options.size})
    for name, exporter, opset, folded in jobs(options):
        key = f"{name} {exporter} {opset} {'folded' if folded else 'as is'}"
        print(
            key, rows.measure(key, partial(row_of, name, exporter, opset, folded, options.size)), flush=True
        )


def row_of(name: str, exporter: str, opset: int, folded: bool, most: int) -> Row:
    """One file, or why there is none, or why it cannot be read."""
    loaded = load_model(name)
    assert loaded.input_shape is not None
    channels, *size = loaded.input_shape
    shape = (1, channels, *(min(n, most) for n in size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        write(loaded.module, x, FILE, exporter, opset, folded)
    except Exception as error:  # whatever torch's exporters raise: there is no file to read
        return {"no file": first_line(error)[:200]}
    try:
        return measure(FILE, graphcomp.trace(loaded.module, x))
    except GraphcompError as error:
        return {"error": first_line(error)[:300]}


def render() -> None:
    """Write the section of docs/results.md."""
    rows = Rows.load("onnx_in")
    head = "| file | read (s) | removable / traced | left / traced | error | export (s) | parity |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for key, row in rows.found.items():
        if "parity" in row:
            lines.append(
                f"| {key} | {row['read_s']:.1f} | {row['removable']} / {row['removable_traced']} | "
                f"{row['left']:.3f} / {row['left_traced']:.3f} | {row['verify_error']:.0e} | "
                f"{row['export_s']:.1f} | {row['parity']:.0e} |"
            )
        else:
            lines.append(f"| {key} | {row.get('error') or 'no file: ' + row['no file']} | | | | | |")
    said = f"`python benchmarks/onnx_in.py`, images of {rows.settings['size']} px; {rows.places}."
    text = "\n\n".join([BEGIN, "## ONNX files in", said, "\n".join(lines), END])
    replace_section(DOCS, BEGIN, END, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=lambda t: t.split(","), default=["*"])
    parser.add_argument("--opsets", type=lambda t: tuple(map(int, t.split(","))), default=OPSETS)
    parser.add_argument("--exporters", type=lambda t: t.split(","), default=EXPORTERS)
    parser.add_argument("--size", type=int, default=224, help="of images, at most")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    render() if options.render else run(options)


if __name__ == "__main__":
    main()
