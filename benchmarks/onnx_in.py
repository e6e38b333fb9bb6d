"""Networks through torch's exporters and back: what is lost on the way in, and whether it can be compressed.

    python benchmarks/onnx_in.py --create               # once: .venv-onnx, with onnx2torch and onnxsim
    python benchmarks/onnx_in.py                        # measure; saves after every file, resumes
    python benchmarks/onnx_in.py --models 'resnet*' --exporters legacy --full
    python benchmarks/onnx_in.py --render               # write the section of docs/results.md

Every file is made here: of every network one by each exporter, opsets and constant folding in turn (all of
them: `--full`), and of some a channels-last one (`onnx_nhwc.py`). Reading compares a file with ONNX Runtime,
and so does this program, on other samples. The channels that a pass may remove are counted beside those of
the network itself, traced. `l1` at half of all channels is verified in float64 (`rewrite(simulate(p)) ==
simulate(p)`), and the export is compared with the program. Seconds are CPU seconds of one thread.
"""

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx_nhwc import channels_last, weights
from onnx_others import PACKAGES, Others
from onnx_page import COMPARED, section
from own_venv import make_venv
from rows import DOCS, OUT, Row, Rows
from section import replace_section
from torch import nn
from torchvision.models import get_model

import graphcomp
from graphcomp.base import muted
from graphcomp.compiler.models import load_model
from graphcomp.errors import GraphcompError, LoadError, first_line
from graphcomp.ir import output_tensors
from graphcomp.onnx.alone import apart
from graphcomp.onnx.rows import VALUE_KEY

FILE = OUT / "onnx_in.onnx"
BEGIN, END = "<!-- onnx_in: begin, written by benchmarks/onnx_in.py --render -->", "<!-- onnx_in: end -->"
TORCHVISION = """
resnet18 squeezenet1_1 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf alexnet
densenet121 googlenet efficientnet_b0 resnet34 regnet_x_400mf mobilenet_v3_large shufflenet_v2_x1_0
squeezenet1_0 mnasnet1_0 resnet50 lraspp_mobilenet_v3_large vgg11_bn convnext_tiny resnext50_32x4d
inception_v3 vit_b_16 swin_t deeplabv3_mobilenet_v3_large fcn_resnet50 regnet_y_800mf efficientnet_b1
densenet169 efficientnet_v2_s wide_resnet50_2 vgg16
""".split()
MODELS = """
resnet20 resnet20-b vgg16-cifar mobilenet-v2-cifar densenet-cifar resnet20-digits preact-resnet164
""".split()
NHWC_NETWORKS = """
resnet20-b vgg16-cifar densenet-cifar resnet18 mobilenet_v2 mobilenet_v3_small squeezenet1_1 densenet121
googlenet mnasnet0_5 regnet_y_400mf resnet50
""".split()
SMALLEST = {"inception_v3": 80, "vit_b_16": 224}
"""Images that these need at least, where `--size` is smaller."""

EXPORTERS = {"legacy": (11, 13, 17, 18, 20), "dynamo": (18, 20, 23), "nhwc": (13,)}
"""And the opsets that each is asked for: torch's new one writes 18 and above, its old one at most 20."""

ROUNDING = 1e-4
"""What outputs may differ by before rows are looked at alone."""

WRONG = "against ONNX Runtime"
"""What the error says that refuses a file which was read as another function."""

Job = tuple[str, int, bool]
"""Exporter, opset, whether constants are folded."""


def names() -> list[str]:
    """Specs of the networks."""
    return [
        *(f"ten-classes:{n}" for n in COMPARED),
        *(f"models:{n}" for n in MODELS),
        *(f"torchvision:{n}" for n in TORCHVISION),
    ]


def write(module: nn.Module, x: torch.Tensor, file: Path, exporter: str, opset: int, folded: bool) -> None:
    """One file, with an open batch."""
    if exporter == "nhwc":
        write(module, x, file, "legacy", opset, folded)
        onnx.save(channels_last(onnx.load(file)), file)
        return
    open_batch: dict[str, Any] = (
        {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "dynamo": True, "external_data": False,
         "optimize": folded}
        if exporter == "dynamo"
        else {"dynamic_axes": {"input": {0: "batch"}}, "dynamo": False, "do_constant_folding": folded}
    )  # fmt: skip
    with muted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # torch.export takes a batch of 1 for fixed.
        example = torch.cat([x, x]) if exporter == "dynamo" else x
        torch.onnx.export(
            module, (example,), str(file), opset_version=opset, input_names=["input"], **open_batch
        )


@dataclass(frozen=True)
class Reference:
    """The network itself, traced: what its files are held to.

    Attributes:
        removable: channels that a pass may remove.
        left: parameters that `l1` at half of all channels leaves, as a part of those before.
    """

    removable: int
    left: float

    @staticmethod
    def known(name: str, rows: Rows) -> "Reference | None":
        """What another file of the same network was held to."""
        for other, row in rows.found.items():
            if other.startswith(f"{name} ") and "left_traced" in row:
                return Reference(row["removable_traced"], row["left_traced"])
        return None

    @staticmethod
    def of(module: nn.Module, x: torch.Tensor) -> "Reference":
        """Normalisations are folded first, as they are in most files."""
        traced = graphcomp.trace(module, x)
        folded, cut = graphcomp.compile(traced, "fold-bn, l1{ratio=0.5}").steps
        return Reference(removable(traced), cut.after.params_trainable / folded.after.params_trainable)


def measure(file: Path, reference: Reference) -> Row:
    """Read, compress and write one file."""
    clock = time.process_time()
    try:
        program = graphcomp.read_onnx(file)
    except LoadError as error:
        return {"wrong" if WRONG in str(error) else "refused": first_line(error)[:300]}
    row: Row = {"read_s": time.process_time() - clock, "remarks": list(program.interface.remarks)}
    row |= {"agreement": agreement(program, file), "before": numbers(file)}
    if row["agreement"] > ROUNDING:
        row["alone"] = alone(program, file)
    row |= {"removable": removable(program), "removable_traced": reference.removable}
    clock = time.process_time()
    try:
        made = graphcomp.compile(program, "l1{ratio=0.5}")
        row |= {"remove_s": time.process_time() - clock, "verify_error": made.steps[0].verify_error}
        parameters = sum(t.numel() for t in program.module.parameters())
        row |= {"left": made.steps[0].after.params_trainable / parameters, "left_traced": reference.left}
        clock = time.process_time()
        out = file.with_suffix(".out.onnx")
        export = graphcomp.export_onnx(made.program, out, batches=(1, 2))
    except GraphcompError as error:
        return row | {"error": first_line(error)[:300]}
    row |= {"export_s": time.process_time() - clock, "parity": max(export.parity.values())}
    return row | {"after": numbers(out)}


def agreement(program: graphcomp.Program, file: Path) -> float:
    """The largest relative difference from ONNX Runtime, of three samples alone and mostly together.

    Reading has compared the two already, on other samples; this is what it is held to.
    """
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    x = torch.randn(3, *program.example_inputs[0].shape[1:], generator=torch.Generator().manual_seed(3))
    worst, alone = 0.0, not any(0 in port.axes for port in program.interface.inputs)
    for part in x.split(1) if alone else (x, *x.split(1)):
        with torch.inference_mode():
            ours = [t.numpy() for t in output_tensors(program(part))]
        for mine, theirs in zip(ours, session.run(None, {name: part.numpy()}), strict=True):
            worst = max(worst, float(np.abs(mine - theirs).max() / max(np.abs(theirs).max(), 1e-6)))
    return worst


def alone(program: graphcomp.Program, file: Path) -> str:
    """The first row that is apart from ONNX Runtime's own values by a tenth of that; "" if none is.

    A network of random weights may amplify rounding until its outputs tell nothing.
    """
    x = torch.randn(3, *program.example_inputs[0].shape[1:], generator=torch.Generator().manual_seed(3))
    model = onnx.load(file)
    nodes = {n: str(n.meta[VALUE_KEY]) for n in program.graph.nodes if VALUE_KEY in n.meta}
    return apart(program, nodes, model, {model.graph.input[0].name: x.numpy()}, [x], ROUNDING / 10) or ""


def removable(program: graphcomp.Program) -> int:
    """Channels that a pass may remove."""
    return sum(len(group.channels) for group in graphcomp.analyse(program).removable)


def numbers(file: Path) -> int:
    """Weights in a file: elements of its initialisers and constants of floating point."""
    return weights(onnx.load(file))


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Job]]:
    """Network and file: every network once by each exporter, opsets and folding in turn.

    NHWC_NETWORKS are written a third time, as channels-last graphs.
    """
    for index, name in enumerate(names()):
        short = name.partition(":")[2]
        if not any(fnmatch(name, p) or fnmatch(short, p) for p in options.models):
            continue
        for exporter in options.exporters:
            if exporter == "nhwc" and short not in NHWC_NETWORKS:
                continue
            if name.startswith("ten-classes:"):  # for onnxsim, whose pruning keeps most of the head
                if exporter == "legacy":
                    yield name, (exporter, 17, True)
                continue
            opsets = EXPORTERS[exporter]
            chosen = opsets if options.full else (opsets[index % len(opsets)],)
            turn = (index // len(opsets) + index + (exporter == "dynamo")) % 2 == 0
            for opset in chosen:
                for folded in (True, False) if options.full and exporter != "nhwc" else (turn,):
                    yield name, (exporter, opset, folded)


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet."""
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    rows, others = Rows.open("onnx_in", {"size": options.size}), Others(options.venv)
    for name, files in groupby(jobs(options), key=itemgetter(0)):
        todo = [file for _, file in files if key(name, file) not in rows.found]
        if not todo:
            continue
        module, x = network(name, options.size)
        reference = Reference.known(name, rows) or Reference.of(module, x)
        for job in todo:
            row = rows.measure(key(name, job), partial(row_of, module, x, job, reference, others))
            print(key(name, job), row, flush=True)


def key(name: str, job: Job) -> str:
    """What a row is called."""
    exporter, opset, folded = job
    return f"{name} {exporter} {opset} {'folded' if folded else 'as is'}"


def network(name: str, most: int) -> tuple[nn.Module, torch.Tensor]:
    """A network of random weights, and an image of at most this size, or of the smallest that it takes.

    Batch statistics are those of eight images: with fresh ones the signal dies on the way in deep networks.
    Matrices that are made as zeros (a transformer's head) get numbers: zeros would agree with anything.
    """
    kind, _, short = name.partition(":")
    torch.manual_seed(0)
    if kind == "ten-classes":
        module, (channels, *size) = get_model(short, weights=None, num_classes=10).eval(), (3, 224, 224)
    else:
        loaded = load_model(name)
        assert loaded.input_shape is not None
        module, (channels, *size) = loaded.module, loaded.input_shape
    most = max(most, SMALLEST.get(short, 0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, channels, *(min(n, most) for n in size), generator=generator)
    for p in module.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(x)
    for norm in norms:
        norm.eval().running_var.mul_(torch.rand(norm.num_features, generator=generator) + 0.5)  # type: ignore[union-attr]
    return module, x[:1]


def row_of(module: nn.Module, x: torch.Tensor, job: Job, reference: Reference, others: Others) -> Row:
    """One file, or why there is none, or why it cannot be read; and what others make of it."""
    try:
        write(module, x, FILE, *job)
    except Exception as error:  # whatever torch's exporters raise: there is no file to read
        return {"no file": first_line(error)[:200]}
    return measure(FILE, reference) | others.of(FILE, prune=job[0] == "legacy")


def render() -> None:
    """Write the section of docs/results.md."""
    rows = Rows.load("onnx_in")
    text = "\n\n".join([BEGIN, "## ONNX files in", section(rows.found, rows.settings, rows.places), END])
    replace_section(DOCS, BEGIN, END, text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=lambda t: t.split(","), default=["*"])
    parser.add_argument("--full", action="store_true", help="every opset, folded and as is, not in turn")
    parser.add_argument("--exporters", type=lambda t: t.split(","), default=[*EXPORTERS])
    parser.add_argument("--size", type=int, default=224, help="of images, at most")
    venv = Path(__file__).resolve().parent.parent / ".venv-onnx"
    parser.add_argument("--venv", type=Path, default=venv, help="of onnx2torch and onnxsim")
    parser.add_argument("--create", action="store_true", help="create the venv and stop")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    if options.create:
        make_venv(options.venv, *PACKAGES)
    elif options.render:
        render()
    else:
        run(options)


if __name__ == "__main__":
    main()
