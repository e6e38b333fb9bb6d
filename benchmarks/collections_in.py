"""Networks of collections: through which door they come, how many channels may go, and exactness.

    pip install --target DIR --no-deps timm segmentation_models_pytorch huggingface_hub tqdm \
        httpx2 httpcore2 truststore h11 torch-pruning
    PYTHONPATH=DIR python benchmarks/collections_in.py               # every family; saves after each, resumes
    PYTHONPATH=DIR python benchmarks/collections_in.py --only 'swin*' --each 3
    PYTHONPATH=DIR python benchmarks/collections_in.py --of smp      # or torchvision: detectors, videos
    PYTHONPATH=DIR python benchmarks/collections_in.py --steps own,onnx,theirs   # beside Torch-Pruning
    python benchmarks/collections_in.py --of smp --render            # write the section of docs/results.md

Of each family of timm the smallest by their names (`collections_of.py`); of segmentation_models_pytorch every
architecture; of torchvision detectors, as parts between two modules, and networks of videos. Weights are
random, in float64, with statistics of the inputs.

own     The program is compared with the module on two samples (of a part: with what its last module returns
        in a run of the whole network); then half of all channels that may go are removed, and the smaller
        program is compared with the one that has zeros in their place, and with the *module* that has these
        zeros. A removal that changes nothing proves nothing, so how far it moves the output is measured, too.
        What counts as exact is what the compiler's own check lets pass (`verify.allowed`).
onnx    The smaller program in float32 becomes a file, whose parity is checked as that of any export.
theirs  Torch-Pruning halves the network, and is judged as in `zoo.py`.

CPU seconds, one thread. Each step runs in a process of its own, which is ended when it takes too long.
"""

import argparse
import fnmatch
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from collections_of import COLLECTIONS, Network
from collections_page import render
from rows import Row, Rows, where
from simulated import NotInModule, simulated_in
from zoo import Limits, in_child, judged

import graphcomp
from graphcomp.channels import Channels, Removal, analyse
from graphcomp.errors import GraphcompError
from graphcomp.ir import Program, function_name, output_tensors
from graphcomp.pipeline import TOLERANCE, relative_error, verify

OUTPUT = "network output"
"""Why channels of what a network returns stay."""
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
LIMITS = {"own": Limits(6, 90), "onnx": Limits(6, 60), "theirs": Limits(6, 20)}
"""GiB and CPU seconds of a step."""


class _Seen(Exception):  # noqa: N818 - a signal
    pass


def reference(network: Network) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """The inputs of the part, and what comes out of it, in a run of the whole network."""
    if not network.until:
        return network.inputs, output_tensors(network.model(*network.inputs))
    first, last = (network.model.get_submodule(path) for path in (network.start, network.until))
    seen: dict[str, Any] = {}

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault("inputs", tuple(output_tensors(args)))

    def end(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        seen["outputs"] = output_tensors(result)
        raise _Seen

    hooks = [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    with suppress(_Seen):
        network.model(*network.inputs)
    for hook in hooks:
        hook.remove()
    return seen["inputs"], seen["outputs"]


def rows_that_may_go(channels: Channels) -> float:
    """Of all rows that layers have, those of the network's outputs aside, the share that may go.

    Counted in rows, since coupled channels are one channel: pinned ones would hardly count.
    """
    rows = np.concatenate([a.channels.ravel() for a in channels.axes if a.role == "out"])
    outputs = channels.marks(c for c, (_, why) in channels.pinned.items() if why == OUTPUT)
    stays = channels.marks(channels.pinned)
    return 1 - float((stays & ~outputs)[rows].sum()) / max(1, int((~outputs)[rows].sum()))


@torch.no_grad()
def made(build: Callable[[], Network]) -> Network:
    """The network in float64 and eval mode; no two weights are equal, statistics are those of the inputs."""
    network = build()
    model = network.model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.copy_(noise * (1 / max(1, p[0].numel())) ** 0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        reference(network)
    for norm in norms:
        norm.eval()
    return network


def traced(network: Network) -> Program:
    """The program, which has the module's own tensors."""
    return graphcomp.trace(
        network.model, network.inputs, copy_weights=False, start=network.start, until=network.until
    )


def halved(channels: Channels) -> tuple[Removal, dict[str, str]]:
    """Half of every group that may go, chosen at random; and what was kept for it, with the reason."""
    score = np.random.default_rng(0).random(len(channels.channel_of))
    marks = channels.marks()
    for group in channels.removable:
        order = group.channels[np.argsort(score[group.channels])]
        marks[order[: len(order) // 2]] = True
    return Removal(channels, marks).feasible(score)


def has_products(program: Program) -> bool:
    """Whether it multiplies matrices of which both are made from the inputs, as attention does."""
    calls = (n for n in program.graph.nodes if n.op in ("call_function", "call_method"))
    nodes = (n for n in calls if function_name(n.target) in PRODUCTS)
    return any(sum(a.op != "get_attr" for a in n.all_input_nodes) > 1 for n in nodes)


@torch.no_grad()
def own(network: Network, steps: Sequence[str]) -> Row:
    """What graphcomp makes of one network, and of what is left of it; weights of the module change."""
    count = sum(p.numel() for p in network.model.parameters())
    inputs, whole = reference(network)
    begin = time.process_time()
    try:
        program = traced(network)
    except GraphcompError as error:
        return {"refused": str(error)}
    between = time.process_time()
    channels = analyse(program)
    analysed = time.process_time()
    removal, kept = halved(channels)
    masked, smaller = removal.mask(), removal.apply("benchmark")
    given, wanted, found = (output_tensors(p(*inputs)) for p in (program, masked, smaller))
    errors = {
        "program": max(map(relative_error, given, whole)),
        "error": max(map(relative_error, found, wanted)),
    }
    moved = max(map(relative_error, given, wanted))
    reasons: dict[str, int] = {}
    for group in channels.groups:
        if group.pinned and group.pinned[1] != OUTPUT:
            reasons[group.pinned[1]] = reasons.get(group.pinned[1], 0) + len(group.channels)
    facts: Row = {
        "door": "torch.export" if any("torch.export" in r for r in program.interface.remarks) else "torch.fx",
        "products": has_products(program),
        "specialised": len(program.interface.specialised),
        "trace_s": between - begin,
        "analyse_s": analysed - between,
        "rows": rows_that_may_go(channels),
        "moved": moved,
        "params": sum(p.numel() for p in smaller.module.parameters()) / count,
        "refusals": list(kept.values()),
        "pins": sorted(reasons, key=lambda reason: -reasons[reason])[:2],
    }
    if "onnx" in steps:
        facts["onnx"] = in_child(partial(onnx, smaller), LIMITS["onnx"])
    try:
        with simulated_in(network.model, program, masked):
            errors["module"] = max(map(relative_error, found, reference(network)[1]))
    except NotInModule as why:
        facts["not in module"] = str(why)
    worst = max(errors.values())
    allowed = TOLERANCE if worst <= TOLERANCE else verify.allowed(masked, 1)
    return facts | errors | {"allowed": allowed, "exact": worst <= allowed}


def onnx(smaller: Program) -> Row:
    """The file of a program, in float32."""
    begin = time.process_time()
    with TemporaryDirectory() as folder:
        try:
            path = Path(folder) / "model.onnx"
            export = graphcomp.export_onnx(smaller.to(torch.float32), path, batches=(1, 2))
        except GraphcompError as error:
            return {"refused": str(error)}
    return {
        "parity": max(export.parity.values()),
        "writer": export.fallback or "rows",
        "remarks": export.remarks,
        "s": time.process_time() - begin,
    }


def theirs(network: Network) -> Row:
    """What Torch-Pruning makes of it."""
    if network.until:
        return {"outcome": "not asked: a part of a network"}
    (x,) = network.inputs
    begin = time.process_time()
    return judged(network.model, x[:1], x, list(network.heads)) | {"s": time.process_time() - begin}


def measure(build: Callable[[], Network], steps: Sequence[str]) -> Row:
    """One network; steps beside the first are children of its process, which fork with the network made."""
    network = made(build)
    row: Row = {}
    if "theirs" in steps:
        row["theirs"] = in_child(partial(theirs, network), LIMITS["theirs"])
    return row | own(network, steps)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", choices=COLLECTIONS, default="timm", help="the collection")
    parser.add_argument("--only", default="*", help="families, as patterns between commas, in this order")
    parser.add_argument("--each", type=int, default=1, help="networks of each family of timm")
    parser.add_argument("--steps", default="own", help="of own, onnx, theirs, which; own is first")
    parser.add_argument("--render", action="store_true")
    chosen = parser.parse_args()
    if chosen.render:
        return render(chosen.of)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, steps = Rows.open(chosen.of, {}), chosen.steps.split(",")
    if "theirs" in steps:
        import torch_pruning  # type: ignore[import-not-found] # noqa: F401 - once, for all children
    networks = COLLECTIONS[chosen.of](chosen.each)
    asked = [n for p in chosen.only.split(",") for n, (f, _) in networks.items() if fnmatch.fnmatch(f, p)]
    for name in asked:
        family, build = networks[name]
        if set(steps) <= set(rows.found.get(name, {}).get("steps", ())):
            continue
        row = in_child(partial(measure, build, steps), LIMITS["own"]) | {"family": family, "steps": steps}
        rows.put(name, row | {"where": where()})
        print(name, {k: v for k, v in row.items() if k not in ("family", "steps", "pins")}, flush=True)
    return None


if __name__ == "__main__":
    main()
