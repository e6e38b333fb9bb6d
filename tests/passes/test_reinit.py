"""reinit: torch's own first weights, by the seed alone; the structure and what is frozen stay."""

import pytest
import torch
from torch import Tensor, nn

from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.passes import L1, Reinit
from graphcomp.pipeline import Outlook
from graphcomp.pipeline.verify import TOLERANCE
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced


def drawn(program: Program, seed: int = 0) -> dict[str, Tensor]:
    return dict(run_pass(Reinit(), program, context(seed=seed))[2].tensors)


def test_as_the_layers_draw_themselves() -> None:
    """A network of the same layers, built anew under the same seed, has these values."""

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 6))

    trained = net()
    with torch.no_grad():
        for p in [*trained.parameters(), *trained.buffers()]:
            p.fill_(3)
    found = drawn(traced(trained, 1, 3, 8, 8), seed=7)
    torch.manual_seed(7)
    expected = dict(net().state_dict())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_seed_is_the_runs_unless_the_pass_has_one() -> None:
    def weight(run: int, own: int | None = None) -> Tensor:
        return run_pass(Reinit(seed=own), tiny_program(), context(seed=run))[2].tensors["inner.weight"]

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))
    assert torch.equal(weight(1, 5), weight(2, 5)) and torch.equal(weight(1, 5), weight(5))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    drawn(tiny_program())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_compressed_structure_keeps_its_widths() -> None:
    _, _, small = run_pass(L1(ratio=0.5, multiple=1), tiny_program(), context())
    step, _, after = run_pass(Reinit(), small, context())
    assert step.verify_error <= TOLERANCE and not step.plan.kept
    assert {n: t.shape for n, t in after.tensors.items()} == {n: t.shape for n, t in small.tensors.items()}
    assert str(after).splitlines() == str(small).splitlines()
    bound = small.tensors["inner.weight"][0].numel() ** -0.5  # torch: uniform within 1 / sqrt(fan-in)
    assert after.tensors["inner.weight"].abs().max() <= bound
    assert after.tensors["bn0.running_mean"].eq(0).all() and after.tensors["bn0.weight"].eq(1).all()


class Odd(nn.Module):
    """A frozen layer, one with a frozen weight, one that is called twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.mixed, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.frozen.requires_grad_(False)
        self.mixed.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.mixed(self.frozen(x)))) * self.scale  # type: ignore[no-any-return]


def test_what_is_frozen_or_has_no_initialiser_is_named() -> None:
    program = traced(Odd(), 1, 4)
    step, plan, after = run_pass(Reinit(), program, context())
    assert plan.decisions["layers"] == ["mixed", "twice"]
    same = {n for n, t in program.tensors.items() if torch.equal(t, after.tensors[n])}
    assert same == {"frozen.weight", "frozen.bias", "mixed.weight", "scale"}
    assert {k.where: k.reason for k in step.plan.kept} == {
        "scale": "a function reads it, and no layer says how to draw it",
        "frozen": "it is frozen: none of its parameters requires gradients",
    }


def test_nothing_to_draw() -> None:
    with pytest.raises(PassError, match="found no layer whose values can be drawn"):
        Reinit().require(Outlook(traced(nn.Sequential(nn.ReLU()), 1, 4), context()))


def test_what_comes_after_knows_that_nothing_was_learned() -> None:
    outlook = Outlook(tiny_program(), context())
    assert Reinit().foresee(outlook).untrained == {len(outlook.context.earlier)}
