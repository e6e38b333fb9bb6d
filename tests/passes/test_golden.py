"""One golden per pass: the smallest network that shows what it does, as text before and after.

`GRAPHCOMP_UPDATE_GOLDEN=1` writes them anew: read the difference. What is decided by numbers is decided by a
wide margin (filters that are copies, units that are dead), so that no machine rounds its way to another text.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.compiler.recipe import parse_passes
from graphcomp.ir.program import Program
from graphcomp.passes import PASSES
from graphcomp.pipeline import Pipeline
from graphcomp.records import Plan
from tests.learnable import make_data
from tests.nets import Net, _block, _conv, _head
from tests.tiny import context, traced

GOLDEN = Path(__file__).parents[1] / "golden/passes"
CLASSES = 4
STEPS = "batch=48, lr=0.01, precision=float32"
QUICK = f"epochs=1, {STEPS}"


# ---- The networks: for 3x8x8 images of four classes


def filters_of(module: nn.Module) -> Tensor:
    return cast(Tensor, module.weight)


@torch.no_grad()
def scale(module: nn.Module, rows: Sequence[int], by: float) -> None:
    filters_of(module)[list(rows)] *= by


def residual() -> Net:
    """The stem is tied to the branch's last layer by the addition, the branch's first is on its own."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.stem(x)
        return m.head(F.relu(y + m.outer(m.inner(y))))

    return Net(forward, stem=_block(3, 4), inner=_block(4, 4), outer=_conv(4, 4), head=_head(4, CLASSES))


@torch.no_grad()
def one_answer() -> Net:
    """A few steps do not change what it says of any image, so no rounding changes its accuracy."""
    net = residual()
    cast(Tensor, net.get_submodule("head.2").bias)[0] = 100.0
    return net


def smallest_filters() -> Net:
    net = residual()
    for layer in (net.get_submodule("stem.0"), net.get_submodule("outer"), net.get_submodule("inner.0")):
        scale(layer, [1, 2], 0.01)
    return net


def separable() -> Net:
    """A depthwise layer goes with the layer in front of it."""
    depthwise = _conv(4, 4, groups=4)
    return Net(
        lambda m, x: m.head(m.depthwise(m.stem(x))),
        stem=_block(3, 4),
        depthwise=depthwise,
        head=_head(4, CLASSES),
    )


def two_normalisations() -> Net:
    """One behind a layer of its own, one behind a layer that an addition reads as well."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.shared(m.stem(x))
        return m.head(y + m.norm(y))

    norm = nn.BatchNorm2d(4)
    return Net(forward, stem=_block(3, 4), shared=_conv(4, 4), norm=norm, head=_head(4, CLASSES))


@torch.no_grad()
def dead_units() -> Net:
    """Two units never fire; behind the second layer zeros would say nothing."""
    net = Net(
        lambda m, x: m.head(m.bare(F.relu(m.stem(x)))),
        stem=_conv(3, 8),
        bare=_conv(8, 4),
        head=_head(4, CLASSES),
    )
    cast(Tensor, net.get_submodule("stem").bias)[[2, 5]] = -1000.0
    return net


def small_scales() -> Net:
    """Nearly all small scales are in the first layer, so one threshold takes more there."""
    net = Net(
        lambda m, x: m.head(m.bare(m.two(m.one(x)))),
        one=_block(3, 8),
        two=_block(8, 8),
        bare=_conv(8, 4),
        head=_head(4, CLASSES),
    )
    scale(net.get_submodule("one.1"), range(6), 0.01)
    scale(net.get_submodule("two.1"), [0, 1], 0.01)
    return net


@torch.no_grad()
def copies() -> Net:
    """Channels 4 and 5 respond as 0 and 1 do."""
    net = Net(lambda m, x: m.head(F.relu(m.stem(x))), stem=_conv(3, 6), head=_head(6, CLASSES))
    stem = net.get_submodule("stem")
    filters_of(stem)[4:] = 2 * filters_of(stem)[:2]
    return net


def three_kinds_of_layers() -> Net:
    """A 3x3 and a 1x1 convolution, and a linear layer."""
    return Net(
        lambda m, x: m.head(F.relu(m.narrow(F.relu(m.wide(m.stem(x)))))),
        stem=_block(3, 8),
        wide=_conv(8, 8),
        narrow=_conv(8, 4, kernel=1),
        head=_head(4, CLASSES),
    )


@torch.no_grad()
def redundant() -> Net:
    """One layer of rank two, and one that hardly reads half of its channels."""
    net = Net(
        lambda m, x: m.head(F.relu(m.reads_half(F.relu(m.rank_two(m.stem(x)))))),
        stem=_block(3, 8),
        rank_two=_conv(8, 8),
        reads_half=_conv(8, 8),
        head=_head(8, CLASSES),
    )
    filters_of(net.get_submodule("reads_half"))[:, 4:] *= 1e-6
    weight = filters_of(net.get_submodule("rank_two"))
    weight.copy_((torch.randn(8, 2) @ torch.randn(2, weight[0].numel()) / 8).reshape(weight.shape))
    return net


def plain() -> Net:
    return Net(lambda m, x: m.head(m.stem(x)), stem=_block(3, 4), head=_head(4, CLASSES))


# ---- What is done to them


@dataclass(frozen=True)
class Example:
    """A network, and the pass as a recipe says it; the last one, where it needs others before it."""

    net: Callable[[], Net]
    line: str


EXAMPLES = {
    "fold-bn": Example(two_normalisations, "fold-bn"),
    "l1": Example(smallest_filters, "l1{ratio=0.5, multiple=1}"),
    "random": Example(separable, "random{ratio=0.5, multiple=1}"),
    "reinit": Example(smallest_filters, "l1{ratio=0.5, multiple=1}, reinit"),
    "obs": Example(copies, "fold-bn, obs{ratio=0.5, multiple=1}"),
    "apoz": Example(dead_units, "apoz{multiple=1}"),
    "play-and-prune": Example(
        one_answer,
        f"play-and-prune{{eps=100, alpha=0.5, delta0=100, delta_w=1000, max_epochs=1, training={{{STEPS}}}}}",
    ),
    "slimming": Example(small_scales, "slimming{ratio=0.5, multiple=1}"),
    "low-rank": Example(three_kinds_of_layers, "low-rank{rank=2, multiple=1}"),
    "cc": Example(redundant, "cc{rate=0.5, multiple=1}"),
    "pfa": Example(copies, "pfa{energy=0.9999, multiple=1}"),
    "dct": Example(three_kinds_of_layers, "dct{rate=4, min_weights=128}"),
    "refit": Example(smallest_filters, "fold-bn, l1{ratio=0.5, multiple=1}, refit"),
    "finetune": Example(plain, f"finetune{{{QUICK}}}"),
    "quantize": Example(residual, "quantize"),
    "student": Example(residual, "student{fraction=0.5}"),
    "distil": Example(residual, f"distil{{teacher=input, {QUICK}}}"),
}


def build(net: Callable[[], Net]) -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return traced(net(), 1, 3, 8, 8)


def text(line: str, before: Program, plan: Plan, after: Program) -> str:
    left = [f"{k.where}: {k.reason}" for k in plan.kept] or ["nothing"]
    parts = [f"# {line}", str(before), "# left alone", "\n".join(left), f"# {plan.summary}", str(after)]
    return "\n\n".join(parts) + "\n"


def test_every_pass_has_an_example() -> None:
    assert EXAMPLES.keys() == PASSES.keys()
    assert {path.stem for path in GOLDEN.iterdir()} <= PASSES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_golden(name: str) -> None:
    example = EXAMPLES[name]
    passes = parse_passes(example.line, PASSES)
    assert passes[-1].name == name
    results = [build(example.net)]
    pipeline = Pipeline(passes, [lambda _, result: results.append(result)])
    _, steps = pipeline.run(results[0], context(make_data()))
    found = text(example.line, results[-2], steps[-1].plan, results[-1])
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GRAPHCOMP_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()
