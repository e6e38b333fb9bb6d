"""Networks of timm, one a family: through which door they come, how many channels may go, and exactness.

    pip install --target DIR --no-deps timm huggingface_hub tqdm     # timm is no dependency of the project
    PYTHONPATH=DIR python benchmarks/collections_in.py               # every family; saves after each, resumes
    PYTHONPATH=DIR python benchmarks/collections_in.py --only 'swin*'
    python benchmarks/collections_in.py --render                     # write the section of docs/results.md

Of each family the smallest by its name. Weights are random, in float64. The program is compared with the
module on two samples; then half of all channels that may go are removed, and the smaller program is compared
with the one that has zeros in their place. A removal that changes nothing proves nothing, so how far it moves
the output is measured, too. CPU seconds, one thread.
"""

import argparse
import fnmatch
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from rows import DOCS, Row, Rows, table
from section import replace_section

import graphcomp
from graphcomp.channels import Removal, analyse
from graphcomp.errors import GraphcompError

BEGIN, END = "<!-- timm: begin, written by benchmarks/collections_in.py --render -->", "<!-- timm: end -->"
SMALL = "atto femto pico nano tiny xxs _xs extra_small small mini _b0 _m0 _t0 18 _s 26 50".split()
LARGEST = 60e6
"""Parameters above which a family's smallest is left out."""
EXACT = 1e-9


def families() -> dict[str, str]:
    """Family (timm's file) -> the network that stands for it."""
    import timm  # type: ignore[import-not-found] # only here

    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.models.model_entrypoint(name).__module__.rpartition(".")[2], []).append(name)

    def size(name: str) -> tuple[int, int]:
        return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

    return {family: min(names, key=size) for family, names in sorted(found.items())}


@torch.no_grad()
def measure(name: str) -> Row:
    """One network."""
    import timm

    model = timm.create_model(name).eval()
    count = sum(p.numel() for p in model.parameters())
    if count > LARGEST:
        return {"left_out": f"{count / 1e6:.0f} M parameters"}
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(noise * (1 / max(1, p[0].numel())) ** 0.5 if p.ndim > 1 else 1 + 0.1 * noise)
    model = model.double()
    x = torch.randn(2, *model.default_cfg["input_size"], generator=generator, dtype=torch.float64)
    whole = model(x)
    begin = time.process_time()
    try:
        program = graphcomp.trace(model, x[:1], copy_weights=False)
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
    wanted, masked, found = program(x), removal.mask()(x), smaller(x)
    peak = float(masked.abs().max())
    every = sum(len(g.channels) for g in channels.groups)
    pins = Counter(g.pinned[1] for g in channels.groups if g.pinned)
    return {
        "door": "torch.export" if program.interface.remarks else "torch.fx",
        "specialised": len(program.interface.specialised),
        "trace_s": traced - begin,
        "analyse_s": analysed - traced,
        "program": float((whole - wanted).abs().max() / whole.abs().max()),
        "share": sum(len(g.channels) for g in channels.groups if g.pinned is None) / every,
        "error": float((masked - found).abs().max() / peak),
        "moved": float((masked - wanted).abs().max() / peak),
        "params": sum(p.numel() for p in smaller.module.parameters()) / count,
        "refusals": len(kept),
        "pins": [reason for reason, _ in pins.most_common(2)],
    }


def render() -> None:
    """Write the section."""
    rows = Rows.load("timm")
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
                f"{row['share']:.2f}",
                f"{row['params']:.2f}",
                f"{max(row['program'], row['error']):.0e}",
                f"{row['trace_s']:.1f} + {row['analyse_s']:.2f}",
                "; ".join(p for p in row["pins"] if p != "network output") or "-",
            ]
        )
    good = [r for r in rows.found.values() if "share" in r]
    exact = sum(max(r["program"], r["error"]) < EXACT for r in good)
    head = ["network", "door", "may go", "left", "error", "CPU s", "what stays, and why"]
    text = (
        f"{BEGIN}\n## Networks of timm, one a family\n\n`benchmarks/collections_in.py`, {rows.places}. "
        f"{len(good)} networks, {exact} exact (the program against the module, the removal against "
        f"zeros, float64); torch.fx took {sum(r['door'] == 'torch.fx' for r in good)} of them; median "
        f"share of channels that may go {float(np.median([r['share'] for r in good])):.2f}; median analysis "
        f"{float(np.median([r['analyse_s'] for r in good])):.2f} CPU s, longest "
        f"{max(r['analyse_s'] for r in good):.1f}. `left`: parameters when half of these went.\n\n"
        f"{table(head, lines)}\n"
    )
    if refused:
        text += "\nNot in the table: " + "; ".join(refused) + ".\n"
    replace_section(DOCS, BEGIN, END, text + END)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="families, as a pattern")
    parser.add_argument("--render", action="store_true")
    chosen = parser.parse_args()
    if chosen.render:
        return render()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows.open("timm", {})
    for family, name in families().items():
        if not fnmatch.fnmatch(family, chosen.only) or name in rows.found:
            continue
        try:
            rows.measure(name, lambda name=name: measure(name))  # type: ignore[misc]
        except Exception as error:  # a network's own failure must not end the run
            rows.put(name, {"failed": f"{type(error).__name__}: {error}"})
        print(name, {k: v for k, v in rows.found[name].items() if k not in ("where", "pins")}, flush=True)
    return None


if __name__ == "__main__":
    main()
