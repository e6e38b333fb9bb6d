"""refit: layers in a line, improved together for what the last one is to yield."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphcomp.ir import Program
from graphcomp.measure import Positions, is_linear, matrix, outputs_at, patches_at
from graphcomp.passes import Refit
from graphcomp.passes.refit.curvature import DAMPING, RIDGE, Curvature, Pulls
from graphcomp.passes.refit.joint import Together
from graphcomp.passes.refit.line_run import LineRun, Sample
from graphcomp.passes.refit.lineage import origins
from graphcomp.passes.refit.lines import Line, find_lines
from graphcomp.passes.refit.units import Unit, find_units
from graphcomp.records import Fit
from tests.fitting import ALL, all_of, lineage, normal_data, recorded, run
from tests.passes.test_refit import passes, same_bits
from tests.removing import exact_program
from tests.tiny import context


class Blocks(nn.Module):
    """One of each: residual, bottleneck, inverted with a depthwise layer, gated, and a plain row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.c, self.d, self.e = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.up, self.deep = nn.Conv2d(12, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down = nn.Conv2d(24, 12, 1)
        self.wide, self.gate, self.narrow = nn.Conv2d(12, 16, 1), nn.Linear(16, 16), nn.Conv2d(16, 12, 1)
        self.i, self.j = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)  # two lines that begin with one value
        self.k, self.l = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.f, self.g, self.h = nn.Conv2d(12, 12, 3, stride=2), nn.Conv2d(12, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = F.relu(x + self.b(F.relu(self.a(x), inplace=True)))
        x = F.relu(x + self.e(F.relu(self.d(F.relu(self.c(x))))))
        x = x + self.down(F.relu6(self.deep(F.relu6(self.up(x)))))
        y = F.relu(self.wide(x))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3)))).unsqueeze(2).unsqueeze(3)
        x = F.relu(x + self.narrow(y))
        x = F.relu(x + self.j(F.relu(self.i(x))) + self.l(F.relu(self.k(x))))
        return cast(Tensor, self.h(F.relu(self.g(F.relu(self.f(x)))).mean((2, 3))))


SHAPE = 3, 8, 8
CUT = "l1{ratio=0.4, multiple=1}"


def blocks() -> Program:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return exact_program((Blocks(), (1, *SHAPE)))


def lines_of(original: Program, program: Program, replays: Any) -> dict[str, Line]:
    return find_lines(program, find_units(program, original, origins(original, replays))[0], 1 << 40)


def test_lines() -> None:
    found = lines_of(blocks(), blocks(), [])
    assert {layer: line.layers[:-1] for layer, line in found.items()} == {
        "b": ("a",),
        "d": ("c",),
        "e": ("d",),
        "down": ("up", "deep"),
        "j": ("i",),
        "l": ("k",),
        "g": ("f",),
        "h": ("g",),
    }
    assert found["down"].entry is found["down"].nodes[0].args[0]
    for line in found.values():
        assert [n.target for n in line.nodes if n.op == "call_module" and n.target in line.layers] == [
            *line.layers
        ]


def test_factors_count_as_one_layer() -> None:
    """A factored layer is no line by itself; what is in front of it is improved with both factors."""
    ran = run(
        [*passes("low-rank{rank=4, multiple=1, include=[a, b, d]}"), Refit()],
        blocks(),
        context(normal_data(SHAPE, 128)),
    )
    found = {row.layer: row.together for row in cast(Fit, ran.steps[-1].fit).layers}
    assert found["b.1"] == ["a.1", "b.0"] and found["d.1"] == ["c", "d.0"] and found["a.1"] == []


def fits(**options: Any) -> Any:
    data = normal_data(SHAPE, 256)
    return run([*passes(CUT), Refit(positions=16, **options)], blocks(), context(data))


def lacking(ran: Any, layer: str, x: Tensor) -> float:
    """Mean squared error at the end of a line, on any samples."""
    original, program = ran.programs[0], ran.result
    found = lineage(replace(ran, passes=ran.passes[:-1], plans=ran.plans[:-1]))
    line = find_lines(program, find_units(program, original, found)[0], 1 << 40)[layer]
    own, theirs = recorded(program, x), recorded(original, x)
    y = theirs.yielded[line.unit.seen][:, line.unit.origin.rows]
    at = torch.arange(y.shape[2:].numel()).expand(len(y), -1)
    module = program.layer(layer)
    target = outputs_at(module, y, at)
    assert line.unit.other is not None
    other = outputs_at(module, own.yielded[line.unit.other.name], at)
    read = own.read[line.nodes[0].name]
    sample = Sample(read, at, target, other, is_held_out=True, is_scout=False, first=0, count=len(x))
    with torch.no_grad():
        return float(LineRun(program.module, line).error(sample).square().mean())


def test_lines_lack_less() -> None:
    """On held-out samples of the fit, and on others; and what changed is what is said."""
    alone, both = fits(together=False), fits()
    rows = cast(Fit, both.steps[-1].fit).layers
    improved = {row.layer: row for row in rows if row.left is not None}
    assert set(improved) >= {"b", "down", "g"}
    assert all(row.left is not None and row.left <= 1 for row in improved.values())
    assert sum(row.left < 0.97 for row in improved.values() if row.left is not None) >= 2
    x = all_of(normal_data(SHAPE, 512, seed=5))
    before, after = (lacking(ran, "b", x) for ran in (alone, both))
    assert after < 0.97 * before
    assert all(row.left is None and not row.together for row in cast(Fit, alone.steps[-1].fit).layers)
    trained = [{name: t.requires_grad for name, t in p.module.named_parameters()} for p in both.programs[-2:]]
    assert trained[0] == trained[1]


def test_nothing_removed_nothing_changes() -> None:
    ran = run([*passes("fold-bn"), Refit()], blocks(), context(normal_data(SHAPE)))
    assert same_bits(ran.result, blocks())


@pytest.mark.parametrize("kind", ["conv", "grouped", "transposed", "linear", "no bias"])
def test_one_layer_alone_takes_the_regression(kind: str) -> None:
    """At the end of a line J is 1: so a whole step is least squares, up to what is added to the curvature."""
    torch.manual_seed(0)
    layer: nn.Module = {
        "conv": nn.Conv2d(4, 6, 3, padding=1, stride=2),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
        "linear": nn.Linear(4, 6),
        "no bias": nn.Conv2d(4, 6, 3, bias=False),
    }[kind].double()
    x = torch.randn(32, 4, 9, 9, dtype=torch.float64) + 1
    x = x.movedim(1, -1).contiguous() if kind == "linear" else x
    goal = layer(x).detach() + torch.randn_like(layer(x)) + 0.5
    e = layer(x) - goal
    weight = cast(Tensor, layer.weight)
    pulls = torch.autograd.grad([e.square().sum() / 2], [weight])
    maps = len(x)
    plane = e.shape[1:-1].numel() if is_linear(layer) else e.shape[2:].numel()
    a = patches_at(layer, x, Positions(ALL, 0).of(plane, 0, maps))
    left = e.detach() if is_linear(layer) else e.detach().movedim(1, -1)
    signed = torch.zeros_like(left.reshape(len(a), a.shape[1], -1))  # of unit second moments, exactly
    outputs_each = signed.shape[2]
    at = torch.arange(len(a))
    signed[at, :, at % outputs_each] = outputs_each**0.5
    signed = signed.reshape(left.shape) if is_linear(layer) else signed.reshape(left.shape).movedim(-1, 1)
    curvature = Curvature(layer)
    curvature.add(Pulls(pulls[0], e.detach(), signed, a))
    step = curvature.step()
    left = left.reshape(len(a), a.shape[1], -1)
    for g in range(a.shape[1]):
        design = a[:, g]
        if step.b is not None:
            design = torch.cat([design, torch.ones(len(a), 1, dtype=torch.float64)], 1)
        best = -torch.linalg.lstsq(design, left[:, g]).solution.T
        assert torch.allclose(step.w[g], best[:, : a.shape[2]], atol=0.03 * float(best.abs().max()))
        if step.b is not None:
            assert torch.allclose(step.b[g], best[:, -1], atol=0.03 * float(best.abs().max()))
    assert DAMPING < 0.1 and RIDGE < 0.1


@pytest.mark.parametrize("is_weighed", [False, True])
def test_two_layers_find_the_best_product_of_their_rank(is_weighed: bool) -> None:
    """Without an activation between them the optimum is known: the leading directions of the responses."""
    torch.manual_seed(2)
    x = torch.randn(4000, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    goal = x @ torch.randn(12, 8, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(12, 3), nn.Linear(3, 8)).double()
    program = exact_program((net, (1, 12)))
    line = _line_of(program)
    module = program.module
    at = torch.zeros(len(x), 1, dtype=torch.int64)
    whole = Sample(x, at, goal, None, is_held_out=False, is_scout=True, first=0, count=len(x))
    judge = Sample(x, at, goal, None, is_held_out=True, is_scout=False, first=0, count=len(x))
    w, mean = torch.linalg.lstsq(x - x.mean(0), goal - goal.mean(0)).solution, goal.mean(0)
    yielded = (x - x.mean(0)) @ w
    weights = torch.linspace(0.2, 2, 8, dtype=torch.float64) if is_weighed else None
    values = torch.linalg.svdvals(yielded if weights is None else yielded * weights)
    least = float(values[3:].square().sum()) / goal.numel()
    with torch.no_grad():
        joint = Together(cast(fx.GraphModule, module), line, weights, {"0": 0.0, "1": 0.0}, 0)
        start = joint.loss([judge])
        for _ in range(12):
            joint.improve([whole, judge])
        assert least <= joint.loss([judge]) < 1.02 * least < 0.5 * start
    assert mean.shape == (8,)


def _line_of(program: Program) -> Line:
    first, last = (n for n in program.graph.nodes if n.op == "call_module")
    origin: Any = None
    inf = float("inf")
    unit = Unit("1", last, origin, None, last.name, None, -inf, inf, is_last=True)
    entry = next(n for n in program.graph.nodes if n.op == "placeholder")
    return Line(unit, ("0", "1"), (first, last), entry, {}, 1, 0)


def test_samples_in_pieces() -> None:
    """The same rows, and the same errors."""
    program = exact_program((nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)), (1, *SHAPE)))
    first, last = (n for n in program.graph.nodes if n.op == "call_module")
    inf = float("inf")
    unit = Unit("1", last, cast(Any, None), None, last.name, None, -inf, inf, is_last=False)
    entry = next(n for n in program.graph.nodes if n.op == "placeholder")
    run_ = LineRun(program.module, Line(unit, ("0", "1"), (first, last), entry, {}, 1, 0))
    x = all_of(normal_data(SHAPE, 10))
    at = torch.randint(0, 36, (10, 5))
    whole = Sample(x, at, torch.randn(50, 2).double(), torch.randn(50, 2).double(), False, True, 40, 10)
    pieces = list(whole.pieces(3))
    assert [(p.first, p.count) for p in pieces] == [(40, 3), (43, 3), (46, 3), (49, 1)]
    with torch.no_grad():
        assert torch.allclose(torch.cat([run_.error(p) for p in pieces]), run_.error(whole))


def test_what_is_changed_in_place_is_not_gone_back_to() -> None:
    """A later addition writes into what a line begins with: the line is left, the network right."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            y = self.a(x)
            x.mul_(0.5)
            y = self.b(y.relu())
            return cast(Tensor, self.last((x + y).relu().mean((2, 3))))

    program = exact_program((Writes(), (1, *SHAPE)))
    ran = run([*passes(CUT), Refit()], program, context(normal_data(SHAPE, 128)))
    rows = {row.layer: row for row in cast(Fit, ran.steps[-1].fit).layers}
    assert rows["b"].left is None and rows["b"].after < rows["b"].before
    assert matrix(ran.result.layer("a")).isfinite().all()
