"""Torch-Pruning's importances on the networks of `methods.py oneshot-grid`: half the MACs, without training.

    python benchmarks/zoo.py --create                      # once: .venv-zoo, which Torch-Pruning runs in
    .venv-zoo/bin/python benchmarks/oneshot.py --weights W --data cifar10:DIR     # rows that are missing
    python benchmarks/oneshot.py --render                  # all that was measured, in the document

Its pruner is set up as its README does, locally (one ratio for all layers) and globally, at the largest ratio
that leaves no more than half the MACs. Taylor and Hessian see labelled training images; Hessian's squares are
the mean over samples that it documents (its own `accumulate_grad` keeps those of the last one only). Widths
are its own. It takes inner channels of residual blocks only: at shortcuts that are padded (He et al.'s option
A) it counts wrongly, and what it yields does not run (1.6.1). Accuracy as it is cut, and after estimating the
normalisations' statistics again on 1,000 images, by graphcomp, as for its own criteria.
"""

import argparse
import copy
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the venv of Torch-Pruning does not have graphcomp installed

from rows import DOCS, Row, Rows, page, written  # noqa: E402
from section import read_section, replace_section  # noqa: E402

import graphcomp  # noqa: E402
from graphcomp.compiler.source import load_source  # noqa: E402
from graphcomp.data.sources import load_data  # noqa: E402
from graphcomp.data.split import Data  # noqa: E402
from graphcomp.measure.cost import macs, params_trainable  # noqa: E402
from graphcomp.measure.evaluate import accuracy  # noqa: E402
from graphcomp.models import MODELS  # noqa: E402

GOAL, NEAR = 0.5, 1e-3
GRADIENTS, SQUARES = 512, 64
"""Labelled training images that Taylor's gradients are the mean over, and Hessian's squares."""

AGAIN = "finetune{epochs=0, bn_reestimate=1000}"
KINDS = ("l1", "l2", "LAMP", "Taylor", "Hessian")
SCOPES = ("local", "global")
BEFORE = "before"
NETWORK = "resnet56"


def importance(kind: str) -> Any:
    """One of its importances."""
    import torch_pruning as tp  # type: ignore[import-not-found] # only in its own venv

    made: dict[str, Callable[[], Any]] = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "LAMP": lambda: tp.importance.LAMPImportance(p=2),
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
    }
    return made[kind]()


def gradients(model: nn.Module, data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every parameter the mean gradient of the loss, and the mean of its squares over samples."""
    model = copy.deepcopy(model).eval()
    some = data.train.spread(GRADIENTS)
    for (x,), y in some.batches(64):
        (F.cross_entropy(model(x), y, reduction="sum") / len(some)).backward()
    means = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    squares = {n: torch.zeros_like(g) for n, g in means.items()}
    few = data.train.spread(SQUARES)
    for (x,), y in few.batches(1):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                squares[name] += p.grad.square() / len(few)
    return means, squares


def pruned(
    model: nn.Module,
    ratio: float,
    kind: str,
    scope: str,
    learned: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> nn.Module:
    """A copy without this part of all inner channels."""
    import torch_pruning as tp

    model = copy.deepcopy(model).eval()
    asked = importance(kind)
    for name, p in model.named_parameters():
        if name in learned[0]:
            p.grad = learned[0][name].clone()
            if kind == "Hessian":
                asked._accu_grad[p], asked._counter[p] = learned[1][name].clone(), 1
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    outer = [m for name, m in layers.items() if not re.fullmatch(r"layer\d+\.\d+\.conv1", name)]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 32, 32),
        importance=asked,
        global_pruning=scope == "global",
        pruning_ratio=ratio,
        ignored_layers=outer,
    )
    pruner.step()
    return model


def measured(model: nn.Module, kind: str, scope: str, data: Data) -> Row:
    """Sizes, and accuracy as it is cut and with statistics estimated again."""
    x = torch.zeros(1, 3, 32, 32)
    goal = GOAL * macs(graphcomp.trace(model, x))
    learned = gradients(model, data) if kind in ("Taylor", "Hessian") else ({}, {})
    low, high = 0.0, 1.0
    while high - low > NEAR:
        ratio = (low + high) / 2
        try:
            left = macs(graphcomp.trace(pruned(model, ratio, kind, scope, learned), x))
        except graphcomp.GraphcompError:  # a layer without channels
            left = 0
        low, high = (ratio, high) if left > goal else (low, ratio)
    program = graphcomp.trace(pruned(model, high, kind, scope, learned), x)
    cut = accuracy(program, data.eval)
    again = graphcomp.compile(program, AGAIN, data=data).steps[-1].after
    assert cut is not None and again.score is not None
    sizes = {"params": params_trainable(program), "macs": macs(program)}
    return sizes | {"cut": cut.value, "top1": again.score.value, "ratio": high}


def measure(model: str, weights: Path | None, spec: str) -> None:
    """All rows that are missing."""
    source = load_source(f"models:{model}", weights).program
    data = load_data(spec, input_shape=tuple(source.example_inputs[0].shape[1:]), seed=0)
    said = re.sub(r"\S*/", "", data.description)
    settings = {"model": model, "weights": weights.name if weights else "its own weights", "data": said}
    rows = Rows.open(f"oneshot-{model}", settings)
    net = MODELS[model].factory()
    net.load_state_dict(source.module.state_dict())
    whole = accuracy(source, data.eval)
    assert whole is not None
    rows.measure(
        BEFORE, lambda: {"params": params_trainable(source), "macs": macs(source), "top1": whole.value}
    )
    for scope in reversed(SCOPES):
        for kind in KINDS:
            row = rows.measure(f"{kind}, {scope}", partial(measured, net, kind, scope, data))
            print(f"{kind}, {scope}: {row}", flush=True)


def render() -> None:
    """Put the tables of all networks that were measured into the document."""
    for model in MODELS:
        rows = Rows.load(f"oneshot-{model}")
        if BEFORE in rows.found:
            begin, end = (
                f"<!-- oneshot {model}: {e}, written by benchmarks/oneshot.py -->" for e in ("begin", "end")
            )
            new = _section(rows, read_section(DOCS, begin, end))
            replace_section(DOCS, begin, end, f"{begin}\n{new}\n{end}")


def _section(rows: Rows, there: str) -> str:
    """The table of a network, with the lines of the one that is there for what is not in `rows`."""
    before, settings = rows.found[BEFORE], rows.settings
    head = ["importance", "scope", "% params", "% MACs", "top-1 cut, %", "statistics, %"]
    said = f"`python benchmarks/oneshot.py`, Torch-Pruning, {settings['weights']}, {settings['data']}."
    said += f" {settings['model']} before: top-1 {100 * before['top1']:.2f} %."
    known = written(there, said, head, 2)
    order = [(kind, scope) for scope in reversed(SCOPES) for kind in KINDS]
    for kind, scope in order:
        if (row := rows.found.get(f"{kind}, {scope}")) is not None:
            shares = (f"{100 * row[what] / before[what]:.2f}" for what in ("params", "macs"))
            scores = (f"{100 * row[what]:.2f}" for what in ("cut", "top1"))
            known[kind, scope] = [kind, scope, *shares, *scores], row["where"]
    lines = {cells: known[cells] for cells in order if cells in known}
    missing = [", ".join(cells) for cells in order if cells not in lines]
    lacking = f" Not run: {'; '.join(missing)}." if missing else ""
    return page(f"{said}{lacking}", head, lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=[n for n in MODELS if re.fullmatch(r"resnet\d+", n)], default=NETWORK
    )
    parser.add_argument("--weights", type=Path, help="as of graphcomp compile")
    parser.add_argument("--data", help="as of graphcomp compile")
    parser.add_argument("--render", action="store_true", help="write the tables into docs/results.md")
    chosen = parser.parse_args()
    if chosen.data is not None:
        measure(chosen.model, chosen.weights, chosen.data)
    if chosen.render:
        render()


if __name__ == "__main__":
    main()
