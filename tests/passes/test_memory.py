"""`memory` is what passes hold at once, judged by what torch's allocator is asked for, by kind of layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from graphcomp.base.cache import VARIABLE
from graphcomp.bases.compensation import Compensation
from graphcomp.channels import analyse
from graphcomp.compiler.recipe import parse_passes
from graphcomp.data.split import Data
from graphcomp.ir import Program, editable
from graphcomp.measure import calibrate
from graphcomp.passes import PASSES
from graphcomp.pipeline import held
from tests.allocations import peak_of
from tests.fitting import normal_data
from tests.removing import exact_program
from tests.tiny import context

DEPTH = 8
AT_ONCE = 8


class Stack(nn.Module):
    """Equal layers, each of which reads what the one before yields, and one behind their mean."""

    def __init__(self, first: nn.Module, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.first, self.layers, self.fc = first, nn.ModuleList(layers), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x.flatten(2).mean(2) if x.ndim > 2 else x)  # type: ignore[no-any-return]


def stack(first: nn.Module, layer: Callable[[], nn.Module], width: int, *shape: int) -> Program:
    layers = [layer() for _ in range(DEPTH)]
    return exact_program((Stack(first, layers, width), (1, *shape)))


NETS: dict[str, Callable[[], Program]] = {
    "conv1d": lambda: stack(nn.Conv1d(3, 32, 1), lambda: nn.Conv1d(32, 32, 9, padding=4), 32, 3, 12),
    "conv2d": lambda: stack(nn.Conv2d(3, 32, 1), lambda: nn.Conv2d(32, 32, 3, padding=1), 32, 3, 4, 4),
    "conv3d": lambda: stack(nn.Conv3d(3, 12, 1), lambda: nn.Conv3d(12, 12, 3, padding=1), 12, 3, 3, 2, 2),
    "grouped": lambda: stack(
        nn.Conv2d(3, 64, 1), lambda: nn.Conv2d(64, 64, 3, padding=1, groups=2), 64, 3, 3, 3
    ),
    "transposed": lambda: stack(
        nn.Conv2d(3, 32, 1), lambda: nn.ConvTranspose2d(32, 32, 3, padding=1), 32, 3, 4, 4
    ),
    "linear": lambda: stack(
        nn.Linear(16, 240), lambda: nn.Sequential(nn.Linear(240, 24), nn.Linear(24, 240)), 240, 16
    ),
}
SAMPLES = {"linear": 1400, "conv3d": 400, "grouped": 400}
"""200 for the others."""

MEGABYTES = {
    "obs": dict.fromkeys(NETS, 5.5) | {"grouped": 6.0},
    "refit": dict.fromkeys(NETS, 4.2) | {"conv3d": 4.0, "grouped": 8.0, "linear": 4.0},
}
"""A little more than the largest layer takes; where no budget is given twice as much is held."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "almost"),
    [
        *(("obs", name, 1e-10) for name in NETS),
        *(("refit{together=false}", name, 1e-10) for name in NETS),
        ("refit", "conv2d", 1e-6),
    ],
)
def test_no_more_is_held_and_the_numbers_are_the_same(
    kind: str, name: str, almost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides a batch on its way through the network, and copies of that; nothing is left out.

    Steps of several layers together add up fewer samples at a time, and multiply what that rounds otherwise.
    """
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(calibrate, "BATCHES", (1, AT_ONCE))
    torch.manual_seed(0)
    program = NETS[name]()
    data = normal_data(program.example_inputs[0].shape[1:], SAMPLES.get(name, 200))
    memory, aside = int(MEGABYTES[kind[:5]][name] * 1e6), 2 * passing(program, data)
    ask = of_obs if kind == "obs" else partial(of_refit, kind)
    plain, most = peak_of(ask(program, data, 1 << 40))
    tight, held_ = peak_of(ask(program, data, memory))
    assert held_ <= memory + aside < most
    assert tight.keys() == plain.keys()
    for what, value in plain.items():
        assert torch.allclose(tight[what], value, rtol=almost, atol=almost), what


def of_obs(program: Program, data: Data, memory: int) -> Callable[[], dict[str, Tensor]]:
    """Losses and sensitivities of all groups."""

    def work() -> dict[str, Tensor]:
        channels = analyse(program)
        statistics = Compensation(channels, replace(context(data), memory=memory), "obs")
        groups = [g for g in channels.groups if g.pinned is None]
        assert not any(map(statistics.why_unjudged, groups))
        curves = {g: statistics.curve(g) for g in groups}
        moved = statistics.sensitivities({g: (c, len(g.channels) // 2) for g, c in curves.items()})
        found = {g.name: torch.from_numpy(c.lost) for g, c in curves.items()}
        return found | {f"{g.name} moved": torch.tensor(m) for g, m in moved.items()}

    return work


def of_refit(text: str, program: Program, data: Data, memory: int) -> Callable[[], dict[str, Tensor]]:
    """All weights, of a network without three in ten channels."""
    l1, refit = parse_passes(f"l1{{ratio=0.3, multiple=1}}, {text}", PASSES)
    plan = l1.plan(program, context())
    small = l1.rewrite(l1.simulate(program, plan), plan)
    small = replace(small, history=(plan.model_dump(mode="json", exclude={"bulk"}),))
    given = replace(context(data), memory=memory, earlier=(held("input", program),))
    plan = refit.plan(small, given)

    def work() -> dict[str, Tensor]:
        result, fit = cast(Any, refit).train(small, plan, given)
        assert {row.note for row in fit.layers} == {None}
        return {name: tensor.detach() for name, tensor in result.tensors.items()}

    return work


def passing(program: Program, data: Data) -> int:
    """What a batch of samples takes on its way through the network, and a copy of that."""
    x, _ = next(data.train.batches(AT_ONCE))

    def run() -> None:
        module = editable(program)
        with torch.no_grad():
            module(*x)

    return peak_of(run)[1]
