"""Networks of collections: through which door they come, how many channels may go, and exactness.

    pip install --target DIR --no-deps timm segmentation_models_pytorch huggingface_hub tqdm \
        httpx2 httpcore2 truststore h11
    PYTHONPATH=DIR python benchmarks/collections_in.py               # every family; saves after each, resumes
    PYTHONPATH=DIR python benchmarks/collections_in.py --only 'swin*' --each 3
    PYTHONPATH=DIR python benchmarks/collections_in.py --of smp      # or torchvision: detectors, videos
    python benchmarks/collections_in.py --of smp --render            # write the section of docs/results.md

Of each family of timm the smallest by their names, those with fewer parameters first; of
segmentation_models_pytorch every architecture; of torchvision detectors, as parts between two modules, and
networks of videos. Weights are
random, in float64. The program is compared with the module on two samples (of a part: with what its last
module returns in a run of the whole network); then half of all channels that may go are removed, and the
smaller program is compared with the one that has zeros in their place. A removal that changes nothing
proves nothing, so how far it moves the output is measured, too. CPU seconds, one thread.
"""

import argparse
import contextlib
import fnmatch
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from rows import DOCS, Row, Rows, table
from section import replace_section

import graphcomp
from graphcomp.channels import Channels, Removal, analyse
from graphcomp.errors import GraphcompError
from graphcomp.ir import output_tensors
from graphcomp.pipeline import relative_error

TITLES = {
    "timm": "Networks of timm, of every family",
    "smp": "Networks of segmentation_models_pytorch",
    "torchvision": "Detectors and networks of videos of torchvision",
}
SMALL = "atto femto pico nano tiny xxs _xs extra_small small mini _b0 _m0 _t0 18 _s 26 50".split()
LARGEST = 60e6
"""Parameters above which a family's smallest is left out."""
EXACT = 1e-9
OUTPUT = "network output"
"""Why channels of what a network returns stay."""


def families(each: int) -> dict[str, list[str]]:
    """Family (timm's file) -> the networks that stand for it."""
    import timm  # type: ignore[import-not-found] # only here

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)

    def size(name: str) -> tuple[int, int]:
        return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

    return {family: sorted(names, key=size)[:each] for family, names in sorted(found.items())}


@dataclass(frozen=True)
class Network:
    """A network with what it takes, and between which modules it is looked at."""

    model: nn.Module
    inputs: tuple[Any, ...]
    start: str = ""
    until: str = ""


Networks = dict[str, tuple[str, Callable[[], Network]]]
"""Name -> family, and how it is made."""


def _image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _of_timm(each: int) -> Networks:
    import timm

    def build(name: str) -> Network:
        model = timm.create_model(name)
        return Network(model, (_image(2, *model.default_cfg["input_size"]),))

    def parameters(name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    chosen = {name: family for family, names in families(each).items() for name in names}
    return {name: (chosen[name], partial(build, name)) for name in sorted(chosen, key=parameters)}


def _of_smp(_: int) -> Networks:
    import segmentation_models_pytorch as smp  # type: ignore[import-not-found] # only here

    def build(name: str) -> Network:
        encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else "resnet18"
        model = smp.create_model(name, encoder_name=encoder, encoder_weights=None, classes=3)
        return Network(model, (_image(2, 3, 224, 224),))

    return {name: (name, partial(build, name)) for name in smp.MODEL_ARCHITECTURES_MAPPING}


DETECTORS = {
    "retinanet_resnet50_fpn": ("backbone", "head"),
    "retinanet_resnet50_fpn_v2": ("backbone", "head"),
    "fcos_resnet50_fpn": ("backbone", "head"),
    "ssd300_vgg16": ("backbone", "head"),
    "ssdlite320_mobilenet_v3_large": ("backbone", "head"),
    "fasterrcnn_resnet50_fpn": ("backbone", "backbone"),
    "fasterrcnn_resnet50_fpn_v2": ("backbone", "backbone"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("backbone", "backbone"),
    "maskrcnn_resnet50_fpn": ("backbone", "backbone"),
    "maskrcnn_resnet50_fpn heads": ("roi_heads.box_head", "roi_heads.box_predictor"),
    "keypointrcnn_resnet50_fpn": ("backbone", "backbone"),
}
"""What of a detector is a part: to the raw heads where nothing else reads the features."""
CLIPS = {"r3d_18": 112, "mc3_18": 112, "r2plus1d_18": 112, "s3d": 224, "mvit_v2_s": 224, "swin3d_t": 224}


def _of_torchvision(_: int) -> Networks:
    from torchvision import models

    def detector(name: str) -> Network:
        kind = name.partition(" ")[0]
        size = {} if "ssd" in kind else {"min_size": 224, "max_size": 320}
        model = models.get_model(kind, weights=None, weights_backbone=None, **size)
        return Network(model, ([_image(3, 224, 288), _image(3, 200, 288)],), *DETECTORS[name])

    def clips(name: str) -> Network:
        return Network(models.get_model(name, weights=None), (_image(2, 3, 16, CLIPS[name], CLIPS[name]),))

    found = {name: ("detection", partial(detector, name)) for name in DETECTORS}
    found |= {name: ("video", partial(clips, name)) for name in CLIPS}
    return found


COLLECTIONS = {"timm": _of_timm, "smp": _of_smp, "torchvision": _of_torchvision}


class _Seen(Exception):  # noqa: N818 - a signal
    pass


def _reference(network: Network) -> tuple[tuple[Tensor, ...], list[Tensor]]:
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
    with contextlib.suppress(_Seen):
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
def measure(build: Callable[[], Network]) -> Row:
    """One network."""
    network = build()
    model = network.model.eval()
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        return {"left_out": f"{count / 1e6:.0f} M parameters"}
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise * (1 / max(1, p[0].numel())) ** 0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    model = model.double()
    inputs, whole = _reference(network)
    begin = time.process_time()
    try:
        program = graphcomp.trace(
            model, network.inputs, copy_weights=False, start=network.start, until=network.until
        )
    except GraphcompError as error:
        return {"refused": str(error)}
    traced = time.process_time()
    channels = analyse(program)
    analysed = time.process_time()
    score = np.random.default_rng(0).random(len(channels.channel_of))
    marks = channels.marks()
    for group in channels.removable:
        order = group.channels[np.argsort(score[group.channels])]
        marks[order[: len(order) // 2]] = True
    removal, kept = Removal(channels, marks).feasible(score)
    smaller = removal.apply("benchmark")
    wanted, masked, found = (output_tensors(p(*inputs)) for p in (program, removal.mask(), smaller))
    every = sum(len(g.channels) for g in channels.groups)
    pins = Counter(g.pinned[1] for g in channels.groups if g.pinned)
    return {
        "door": "torch.export" if any("torch.export" in r for r in program.interface.remarks) else "torch.fx",
        "specialised": len(program.interface.specialised),
        "trace_s": traced - begin,
        "analyse_s": analysed - traced,
        "program": max(map(relative_error, wanted, whole)),
        "share": sum(len(g.channels) for g in channels.groups if g.pinned is None) / every,
        "rows": rows_that_may_go(channels),
        "error": max(map(relative_error, found, masked)),
        "moved": max(map(relative_error, wanted, masked)),
        "params": sum(p.numel() for p in smaller.module.parameters()) / count,
        "refusals": len(kept),
        "pins": [reason for reason, _ in pins.most_common(2)],
    }


def render(collection: str) -> None:
    """Write the section."""
    rows = Rows.load(collection)
    begin = f"<!-- {collection}: begin, written by benchmarks/collections_in.py --render -->"
    end = f"<!-- {collection}: end -->"
    lines, refused = [], []
    for name, row in rows.found.items():
        if "share" not in row:
            said = row.get("refused") or row.get("left_out") or row.get("failed")
            refused.append(f"`{name}`: {str(said).partition('; ')[0]:.160}")
            continue
        lines.append(
            [
                f"`{name}`",
                row["door"] + (", one size" if row["specialised"] else ""),
                f"{row['rows']:.2f}",
                f"{row['params']:.2f}",
                f"{max(row['program'], row['error']):.0e}",
                f"{row['trace_s']:.1f} + {row['analyse_s']:.2f}",
                "; ".join(p for p in row["pins"] if p != OUTPUT) or "-",
            ]
        )
    good = [r for r in rows.found.values() if "share" in r]
    exact = sum(max(r["program"], r["error"]) < EXACT for r in good)
    head = ["network", "door", "may go", "left", "error", "CPU s", "what stays, and why"]
    text = (
        f"{begin}\n## {TITLES[collection]}\n\n"
        f"`benchmarks/collections_in.py --of {collection}`, {rows.places}. "
        f"{len(good)} networks, {exact} exact (the program against the module, the removal against "
        f"zeros, float64); torch.fx took {sum(r['door'] == 'torch.fx' for r in good)} of them; median "
        f"share that may go {float(np.median([r['rows'] for r in good])):.2f}; median analysis "
        f"{float(np.median([r['analyse_s'] for r in good])):.2f} CPU s, longest "
        f"{max(r['analyse_s'] for r in good):.1f}. `may go`: of the rows of all layers, those of the "
        "network's outputs aside. `left`: parameters when half of these went.\n\n"
        f"{table(head, lines)}\n"
    )
    if refused:
        text += "\nNot in the table: " + "; ".join(refused) + ".\n"
    replace_section(DOCS, begin, end, text + end)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", choices=COLLECTIONS, default="timm", help="the collection")
    parser.add_argument("--only", default="*", help="families, as a pattern")
    parser.add_argument("--each", type=int, default=1, help="networks of each family of timm")
    parser.add_argument("--render", action="store_true")
    chosen = parser.parse_args()
    if chosen.render:
        return render(chosen.of)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows.open(chosen.of, {})
    for name, (family, build) in COLLECTIONS[chosen.of](chosen.each).items():
        if not fnmatch.fnmatch(family, chosen.only) or name in rows.found:
            continue
        try:
            rows.measure(name, partial(measure, build))
        except Exception as error:  # a network's own failure must not end the run
            rows.put(name, {"failed": f"{type(error).__name__}: {error}"})
        print(name, {k: v for k, v in rows.found[name].items() if k not in ("where", "pins")}, flush=True)
    return None


if __name__ == "__main__":
    main()
