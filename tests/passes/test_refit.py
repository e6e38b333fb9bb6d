"""refit: every layer against a dense solver, rows against what passes removed, and what it may look at."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.base import Shelf
from graphcomp.channels import Removal, analyse
from graphcomp.compiler.recipe import parse_passes
from graphcomp.data.split import Data
from graphcomp.errors import PassError
from graphcomp.ir import Program, save, trace
from graphcomp.measure import is_mixing, matrix
from graphcomp.passes import PASSES, FoldBN, Refit
from graphcomp.passes.refit import lockstep
from graphcomp.passes.refit.around import BOUNDS, bounds_of
from graphcomp.passes.refit.lineage import Origin, origins
from graphcomp.passes.refit.units import find_units
from graphcomp.pipeline import check_order, held
from graphcomp.records import Fit, Plan
from tests.fitting import ALL, all_of, check_fit, lineage, normal_data, recorded, run, samples
from tests.learnable import exact_data, make_data
from tests.nets import TRAPS, Net, Spec, build, random_cnn
from tests.processes import in_processes
from tests.removing import exact_program
from tests.tiny import context, tiny, tiny_program, traced

HALF = "l1{ratio=0.5, multiple=1}"
RIDGE = 1e-3
FIT = Refit(positions=ALL, ridge=RIDGE, together=False)


def passes(text: str) -> list[Any]:
    return parse_passes(text, PASSES)


def outputs(program: Program, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = program.module(x.clone())
    return cast(Tensor, found)


# ---- Every kind of layer


SAMPLES_SEE_EACH_OTHER = {"batchnorm-of-batch"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAPS if name not in SAMPLES_SEE_EACH_OTHER])
def test_every_layer_is_what_a_dense_solver_says(name: str) -> None:
    program = exact_program(TRAPS[name]())
    shape = program.example_inputs[0].shape[1:]
    data = normal_data(shape, count=96)
    ran = run([*passes("l1{ratio=0.5, multiple=1}"), FIT], program, context(data))
    assert check_fit(ran, program, data, RIDGE) or not ran.plans[0].decisions["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["fold-bn, ", ""])
@pytest.mark.parametrize("kind", ["svd", "spatial", "tucker2"])
def test_factors_are_what_a_dense_solver_says(kind: str, before: str) -> None:
    """The last two of a layer's factors are fitted as one product, and cut to what matters most."""
    program = exact_program((tiny(), (1, 3, 8, 8)))
    folded = FoldBN().rewrite(program, FoldBN().plan(program, context())) if before else program
    data = normal_data((3, 8, 8))
    text = f"{before}low-rank{{rank=4, kind={kind}, multiple=1, include=[inner, outer]}}"
    ran = run([*passes(text), FIT], program, context(data))
    assert check_fit(ran, folded, data, RIDGE) >= 2


class Frames(nn.Module):
    """Frames are folded into the batch, and tokens as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Conv2d(2, 8, 3),
            nn.Conv2d(8, 4, 1),
            nn.Linear(4, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x.flatten(0, 1)).relu()).relu().mean((2, 3))
        return self.d(self.c(y).relu()).unflatten(0, (-1, 4)).mean(1)


def test_samples_may_be_several_maps() -> None:
    program = exact_program((Frames(), (1, 4, 2, 5, 5)))
    data = normal_data((4, 2, 5, 5))
    ran = run([*passes(HALF), FIT], program, context(data))
    assert check_fit(ran, program, data, RIDGE) >= 1
    assert {r.layer: r.rows for r in cast(Fit, ran.steps[-1].fit).layers} == {
        "a": 2304, "b": 2304, "c": 256, "d": 256
    }  # fmt: skip


@pytest.mark.slow
def test_a_normalisation_may_be_folded_before_between_and_after() -> None:
    program = exact_program((tiny(), (1, 3, 8, 8)))
    folded = FoldBN().rewrite(program, FoldBN().plan(program, context()))
    data = normal_data((3, 8, 8))
    for text in (f"fold-bn, {HALF}", f"{HALF}, fold-bn", f"{HALF}, fold-bn, random{{ratio=0.5, multiple=1}}"):
        ran = run([*passes(text), FIT], program, context(data))
        assert check_fit(ran, folded, data, RIDGE) == 3, text
        assert {k.where: k.reason for k in ran.steps[-1].plan.kept} == {"stem": "the pass left it as it was"}


# ---- Which rows are left


def rows_left(rows: dict[str, list[int]], program: Program, plan: Plan) -> dict[str, list[int]]:
    """What the channel analysis of a program says that a plan leaves of the rows of its layers."""
    if "rows" not in plan.decisions:
        return rows
    channels = analyse(program, plan.decisions["join"])
    drop = Removal.from_rows(channels, plan.decisions["rows"]).gone
    found = {}
    called = program.called_modules()
    of = {name: a.channels for a in channels.axes for name, _ in a.tensors if a.role in ("out", "norm")}
    for path, numbers in rows.items():
        if path not in called:
            continue
        gone = drop[of[f"{path}.weight"]] if f"{path}.weight" in of else [False] * len(numbers)
        found[path] = [n for n, is_gone in zip(numbers, gone, strict=True) if not is_gone]
    return {path: numbers for path, numbers in found.items() if numbers}


def all_rows(program: Program) -> dict[str, list[int]]:
    layers = {p: matrix(m) for p, m in program.called_modules().items() if is_mixing(m)}
    return {p: list(range(w.shape[0] * w.shape[1])) for p, w in layers.items()}


REMOVERS = (
    "l1{ratio=0.5, multiple=1}",
    "l1{ratio=0.3, multiple=1, join=pad}",
    "random{ratio=0.6, multiple=1}",
    "l1{target={params: 0.6}, multiple=1}",
    "fold-bn",
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_cnn(), st.lists(st.sampled_from(REMOVERS), min_size=1, max_size=3))
def test_rows_of_random_nets(spec: Spec, texts: list[str]) -> None:
    """Whatever removed them: what is left of every layer is what no plan took, and holds its values."""
    first = program = exact_program(build(spec))
    rows, replays = all_rows(first), []
    for pass_ in passes(", ".join(texts)):
        try:
            plan = pass_.plan(program, context())
        except PassError:  # a target that cannot be reached
            continue
        rows = rows_left(rows, program, plan)
        program = pass_.rewrite(pass_.simulate(program, plan), plan)
        replays.append(partial(replayed, pass_, plan))
    found = origins(first, replays)
    layers = {p: layer for p, layer in program.called_modules().items() if is_mixing(layer)}
    assert found.keys() == layers.keys()
    for path, layer in layers.items():
        assert found[path].layer == path and found[path].rows.tolist() == rows[path]
        if "fold-bn" not in texts:
            old, new = (w.flatten(0, 1) for w in (matrix(first.layer(path)), matrix(layer)))
            for row, values in zip(found[path].rows, new, strict=True):
                assert set(values.tolist()) <= set(old[row].tolist())


def replayed(pass_: Any, plan: Plan, program: Program) -> Program:
    return cast(Program, pass_.rewrite(program, plan))


RECIPES = {
    "pad": "fold-bn, l1{ratio=0.5, multiple=1, join=pad}",
    "pfa": "fold-bn, pfa{energy=0.9, multiple=1}",
    "project": "fold-bn, pfa{energy=0.9, multiple=1, join=project}",
    "slimming": "slimming{ratio=0.5, multiple=1}, fold-bn",
    "apoz": "fold-bn, apoz{ratio=0.6, multiple=1}",
    "cc": "fold-bn, cc{rate=0.5, multiple=1, samples=48}",
    "svd": "fold-bn, low-rank{rank=3, multiple=1}, l1{ratio=0.3, multiple=1}",
    "spatial": "fold-bn, low-rank{rank=5, multiple=1, kind=spatial}, l1{ratio=0.3, multiple=1}",
    "tucker2": "fold-bn, l1{ratio=0.2, multiple=1}, low-rank{rank=4, multiple=1, kind=tucker2}",
    "dct": "fold-bn, l1{ratio=0.3, multiple=1}, dct{rate=4, min_weights=1}",
    "student": "student{fraction=0.5, init=slice}, fold-bn",
}


def rows_by_biases(folded: Program, result: Program) -> dict[str, tuple[str, list[int]]]:
    """Layer -> the layer and rows of the folded input whose biases it has: every bias is another number."""
    places = {
        value: (path, row)
        for path, layer in folded.called_modules().items()
        if is_mixing(layer)
        for row, value in enumerate(cast(Tensor, layer.bias).tolist())
    }
    found = {}
    for path, layer in result.called_modules().items():
        if is_mixing(layer) and layer.bias is not None:
            at = [places[v] for v in cast(Tensor, layer.bias).tolist()]
            (origin,) = {name for name, _ in at}
            found[path] = (origin, [row for _, row in at])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_rows_after_every_remover(name: str) -> None:
    """By the biases, which all of these take along; and the fit brings the outputs back."""
    program = exact_program((tiny(), (1, 3, 8, 8)))
    folded = FoldBN().rewrite(program, FoldBN().plan(program, context()))
    data = exact_data()
    ran = run([*passes(RECIPES[name]), Refit()], program, context(data))
    small = replace(ran, passes=ran.passes[:-1], plans=ran.plans[:-1])
    found = {path: (o.layer, o.rows.tolist()) for path, o in lineage(small).items()}
    assert found == rows_by_biases(folded, ran.programs[-2])
    fit = ran.steps[-1].fit
    assert fit is not None and {row.layer for row in fit.layers} == found.keys()
    x = all_of(data)
    far, near = (
        float((outputs(p, x) - outputs(program, x)).square().mean()) for p in (ran.programs[-2], ran.result)
    )
    assert near < 0.5 * far


@pytest.mark.slow
def test_rows_after_passes_that_train() -> None:
    """play-and-prune trains between its removals, and biases move: its plans say which rows are left."""
    program = traced(tiny(), 1, 3, 8, 8)
    text = (
        "play-and-prune{max_epochs=2, eps=100, alpha=0.3, delta0=100, delta_w=1000, "
        "training={batch=48, precision=float32}}"
    )
    ran = run([*passes(text), Refit(teacher=0)], program, context(make_data()))
    layers = ran.plans[-1].decisions["layers"]
    assert set(layers) == {"stem", "inner", "outer", "fc"} and layers == {n: n for n in layers}
    assert len(matrix(ran.result.layer("inner"))[0]) < 16
    fit = ran.steps[-1].fit
    assert fit is not None and fit.original == "the run's input"


@pytest.mark.slow
def test_rows_of_weights_that_are_drawn_anew() -> None:
    """A student of random weights is fitted to the rows that it has."""
    program = exact_program((tiny(), (1, 3, 8, 8)))
    data = exact_data()
    ran = run([*passes("student{fraction=0.5}"), Refit()], program, context(data))
    x = all_of(data)
    far, near = (
        float((outputs(p, x) - outputs(program, x)).square().mean()) for p in (ran.programs[-2], ran.result)
    )
    assert near < 0.3 * far


# ---- What comes back without loss


def same_bits(a: Program, b: Program) -> bool:
    return a.fingerprint() == b.fingerprint()


@pytest.mark.parametrize("text", ["", "fold-bn", "l1{ratio=0.0}"])
def test_t9_3_nothing_removed_nothing_changed(text: str) -> None:
    ran = run(
        [*passes(text or "fold-bn"), Refit()] if text else [Refit()], tiny_program(), context(make_data())
    )
    assert same_bits(ran.result, ran.programs[-2])


def chain(*layers: nn.Module) -> Program:
    return traced(nn.Sequential(*layers), 1, 3, 8, 8)


def removed(text: str, program: Program) -> Program:
    """After one pass, unverified: what is dead or saturated is hardly seen by a check on random values."""
    (pass_,) = passes(text)
    plan = pass_.plan(program, context())
    small = pass_.rewrite(pass_.simulate(program, plan), plan)
    return replace(small, history=(plan.model_dump(mode="json", exclude={"bulk"}),))


def refitted(pass_: Refit, program: Program, small: Program, data: Data) -> Program:
    given = replace(context(data), earlier=(held("input", program),))
    return pass_.train(small, pass_.plan(small, given), given)[0]


@torch.no_grad()
def copies() -> Program:
    """Channels 5 to 7 of the first layer are a tenth of 0 to 2, before and behind the ReLU."""
    first = nn.Conv2d(3, 8, 3, padding=1)
    for tensor in (first.weight, cast(Tensor, first.bias)):
        tensor[5:] = 0.1 * tensor[:3]
    second, last = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(384, 4)
    second.weight[:, 5:] *= 10
    return chain(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), last)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_of_channels_are_merged(dtype: torch.dtype) -> None:
    program = copies().to(dtype)
    data = make_data() if dtype == torch.float32 else exact_data()
    ran = run([*passes("l1{ratio=0.375, multiple=1, include=['0']}"), Refit()], program, context(data))
    assert ran.plans[0].decisions["rows"]["0.weight"] == [5, 6, 7]
    x = next(data.eval.batches(60))[0][0]
    expected = outputs(program, x)
    far, near = (
        float((outputs(p, x) - expected).norm() / expected.norm()) for p in (ran.programs[1], ran.result)
    )
    assert far > 1e-2 and near < 1e-5


@torch.no_grad()
def constants() -> Program:
    """Channels 4 to 7 of the first layer are constant behind the ReLU6; the reader has no margins."""
    first = nn.Conv2d(3, 8, 3, padding=1)
    first.weight[:4] *= 10
    first.weight[4:] *= 0.1
    cast(Tensor, first.bias)[4:] = torch.tensor([100.0, -100.0, 100.0, 100.0])
    return chain(first, nn.ReLU6(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4))


@pytest.mark.parametrize("options", [{"only": "bias"}, {}])
def test_constant_channels_go_into_the_bias(options: dict[str, Any]) -> None:
    program, data = constants(), make_data()
    small = removed("l1{ratio=0.5, multiple=1, include=['0']}", program)
    assert small.history[-1]["decisions"]["rows"]["0.weight"] == [4, 5, 6, 7]
    result = refitted(Refit(**options), program, small, data)
    x = next(data.eval.batches(60))[0][0]
    expected = outputs(program, x)
    far, near = (float((outputs(p, x) - expected).norm() / expected.norm()) for p in (small, result))
    assert far > 0.1 and near < 1e-5
    if options:
        assert torch.equal(matrix(result.layer("2")), matrix(small.layer("2")))


@pytest.mark.slow
def test_only_the_bias() -> None:
    """Means are restored, and no weight moves by a bit; that of coefficients neither."""
    program, data = exact_program((tiny(), (1, 3, 8, 8))), normal_data((3, 8, 8))
    ran = run(
        [*passes(f"fold-bn, {HALF}, dct{{rate=2, min_weights=1}}"), Refit(only="bias", positions=ALL)],
        program,
        context(data),
    )
    before, after = ran.programs[-2].tensors, ran.result.tensors
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert moved and all(name.endswith(".bias") for name in moved)
    original = recorded(program, all_of(data))
    own = recorded(ran.result, all_of(data))
    rows = lineage(replace(ran, passes=ran.passes[:-1], plans=ran.plans[:-1]))["inner"].rows
    means = original.yielded["bn1"].mean((0, 2, 3))[torch.from_numpy(rows)]
    assert torch.allclose(own.yielded["inner"].mean((0, 2, 3)), means)


# ---- What it leaves alone


class Twice(nn.Module):
    """One layer is called twice, two share a weight, and one is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.tied, self.other = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8, 8))
        self.other.weight = self.tied.weight
        self.up, self.last = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.twice(self.twice(x).relu()).relu()
        x = self.other(self.tied(x).relu()).relu()
        x = self.up(x, output_size=[17, 17])
        return self.last(x.relu()).mean((2, 3))


def test_t9_6_what_is_tied_is_left_alone() -> None:
    program = exact_program((Twice(), (1, 3, 8, 8)))
    ran = run([*passes(HALF), Refit()], program, context(normal_data((3, 8, 8))))
    reasons = {k.where: k.reason for k in ran.plans[-1].kept}
    assert reasons["tied"] == reasons["other"] == "its weight is used elsewhere too"
    assert reasons["up"] == "it is told how large its output is to be"
    assert {row.layer for row in cast(Fit, ran.steps[-1].fit).layers} == set(
        ran.plans[-1].decisions["layers"]
    )
    for name in ("tied", "other", "up"):
        assert torch.equal(matrix(ran.result.layer(name)), matrix(ran.programs[-2].layer(name)))


class Often(nn.Module):
    """One layer is called three times: twice in a row, and after an addition of what it had yielded."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) if norms else nn.Identity() for _ in range(3))
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = nn.functional.relu(self.norms[0](self.again(x)), inplace=True)
        y = self.norms[1](self.again(y)) + x
        y = nn.functional.relu6(self.norms[2](self.again(y)))
        return self.last(y.mean((2, 3)))


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_t9_6_calls_of_one_layer_are_fitted_together(memory: int) -> None:
    program, data = exact_program((Often(), (1, 3, 8, 8))), normal_data((3, 8, 8))
    ran = run([*passes(HALF), FIT], program, replace(context(data), memory=memory))
    assert "again" in ran.plans[-1].decisions["layers"]
    assert check_fit(ran, program, data, RIDGE) == 2  # what is in front of them is exact as it is


def test_calls_in_front_of_normalisations_of_their_own_are_left_alone() -> None:
    program = exact_program((Often(norms=True), (1, 3, 8, 8)))
    ran = run([*passes(HALF), FIT], program, context(normal_data((3, 8, 8))))
    reasons = {k.where: k.reason for k in ran.plans[-1].kept}
    assert "in front of normalisations of their own" in reasons["again"]


def test_what_is_excluded_is_left_alone() -> None:
    program, data = exact_program((tiny(), (1, 3, 8, 8))), normal_data((3, 8, 8))
    ran = run([*passes(HALF), Refit(include=("inner", "outer"), exclude=("out*",))], program, context(data))
    assert [row.layer for row in cast(Fit, ran.steps[-1].fit).layers] == ["inner"]
    left = {"stem": "not included", "outer": "excluded", "fc": "not included"}
    assert {k.where: k.reason for k in ran.plans[-1].kept} == left


ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_activations_are_constant_beyond_their_bounds(name: str) -> None:
    low, high = BOUNDS[name]
    made = trace(nn.Sequential(ACTIVATIONS[name]), torch.zeros(1, 3))
    (node,) = (n for n in made.graph.nodes if n.op == "placeholder")
    assert bounds_of(made, node) == (low, high)
    below, inside = low - torch.linspace(0, 9, 10), low + torch.linspace(0.1, min(high - low, 9), 10)
    activation = ACTIVATIONS[name]
    assert activation(below).unique().numel() == 1 < activation(inside).unique().numel()
    if math.isfinite(high):
        assert activation(high + torch.linspace(0, 9, 10)).unique().numel() == 1


class Normalised(nn.Module):
    """A layer in front of a normalisation, that something else may read as well."""

    def __init__(self, also: bool, norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.also = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), also
        self.norm = nn.BatchNorm2d(4) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y if self.norm is None else self.norm(y)
        return self.b(z + y.sigmoid() if self.also else z)


@pytest.mark.parametrize(
    ("original", "small", "reason"),
    [
        ((False, True), (False, False), "its normalisation was folded, and cannot be in the original"),
        ((False, False), (False, True), "a normalisation reads it, and none in the original"),
        ((True, True), (False, False), "its normalisation was folded, and cannot be in the original"),
        ((True, True), (True, True), None),
        ((False, True), (False, True), None),
    ],
)
def test_normalisations_that_only_one_has(
    original: tuple[bool, bool], small: tuple[bool, bool], reason: str | None
) -> None:
    big, little = (exact_program((Normalised(*options), (1, 3, 4, 4))) for options in (original, small))
    rows = {name: Origin(name, np.arange(4)) for name in "ab"}
    units, left = find_units(little, big, rows)
    assert {k.where: k.reason for k in left} == ({"a": reason} if reason else {})
    assert [u.layer for u in units] == (["b"] if reason else ["a", "b"])


@pytest.mark.slow
def test_t9_1_more_columns_than_rows() -> None:
    """A classifier of 384 columns: with 40 images it is never worse on others, and its row says why."""
    program, data = copies(), make_data(40)
    ran = run([*passes("l1{ratio=0.5, multiple=1, include=['0']}"), Refit()], program, context(data))
    (row,) = [r for r in cast(Fit, ran.steps[-1].fit).layers if r.layer == "5"]
    assert (row.rows, row.columns) == (40, 384) and row.after <= row.before
    few = run([*passes("l1{ratio=0.5, multiple=1, include=['0']}"), Refit(samples=6)], program, context(data))
    (row,) = [r for r in cast(Fit, few.steps[-1].fit).layers if r.layer == "5"]
    assert row.note == "6 rows for 384 columns are too few: only its bias was fitted"
    assert torch.equal(matrix(few.result.layer("5")), matrix(few.programs[-2].layer("5")))
    asked = run(
        [*passes("l1{ratio=0.5, multiple=1, include=['0']}"), Refit(ridge=1e-3)], program, context(data)
    )
    assert torch.equal(matrix(asked.result.layer("5")), matrix(asked.programs[-2].layer("5")))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 17])
def test_few_samples(count: int) -> None:
    """One is enough to run; every one is looked at, and from eight on some are held out."""
    program, data = exact_program((tiny(), (1, 3, 8, 8))), normal_data((3, 8, 8), count)
    ran = run([*passes(HALF), Refit()], program, context(data))
    fit = cast(Fit, ran.steps[-1].fit)
    assert fit.samples == count and all(row.after <= row.before * 1.001 for row in fit.layers)
    assert {row.layer: row.rows for row in fit.layers} == {
        "stem": 64 * count, "inner": 64 * count, "outer": 64 * count, "fc": count
    }  # fmt: skip
    assert all(t.isfinite().all() for t in ran.result.tensors.values())


@torch.no_grad()
def test_t9_5_dead_channels() -> None:
    """Inputs that are zero on all samples give weights that are finite, and stay where nothing is learned."""
    first = nn.Conv2d(3, 8, 3, padding=1)
    cast(Tensor, first.bias)[:4] = -1e4
    program = chain(first, nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
    small = removed("l1{ratio=0.5, multiple=1, include=['2']}", program)
    result = refitted(Refit(), program, small, make_data())
    before, after = (matrix(p.layer("2")).reshape(3, 8, 9) for p in (small, result))
    assert torch.equal(before[:, :4], after[:, :4])
    assert all(t.isfinite().all() for t in result.tensors.values())


def test_what_is_not_finite_is_an_error() -> None:
    x = all_of(make_data())
    x[3, 0, 2, 2] = float("nan")
    with pytest.raises(PassError, match="not finite"):
        run([*passes(HALF), Refit()], tiny_program(), context(samples(x)))


# ---- What it may look at, and how


class Block(nn.Module):
    """A bottleneck whose activations may be in place, so that they overwrite what waits for the addition."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        )  # fmt: skip
        self.relu, self.inplace = nn.ReLU6(inplace), inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.b(self.relu(self.a(x)))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.fc(self.relu(y).mean((2, 3)))


def blocks() -> list[Program]:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        found.append(traced(Block(inplace), 1, 3, 8, 8))
    return found


@pytest.mark.slow
def test_t9_4_activations_in_place() -> None:
    results = [run([*passes(HALF), Refit()], p, context(make_data())).result for p in blocks()]
    assert all(torch.equal(a, b) for a, b in zip(*(r.tensors.values() for r in results), strict=True))


def test_inputs_may_be_changed_in_place() -> None:
    """The original's run leaves the samples as they were."""

    def net(function: Any) -> Program:
        torch.manual_seed(0)
        parts = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 4, 3)}
        return traced(Net(lambda m, x: m.b(m.a(function(x)).relu()).mean((2, 3)), **parts), 1, 3, 8, 8)

    programs = net(lambda x: x.mul_(2)), net(lambda x: x * 2)
    results = [run([*passes(HALF), Refit()], p, context(make_data())).result for p in programs]
    assert all(torch.equal(a, b) for a, b in zip(*(r.tensors.values() for r in results), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("free", [1, 60_000])
def test_memory_is_a_budget(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit beside a fit waits in files, with the same result bit for bit; in place as well."""
    moved: list[int] = []
    mapped = Shelf.in_file

    def counted(self: Any, tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return mapped(self, tensor)

    monkeypatch.setattr(Shelf, "in_file", counted)
    for program in (*blocks(), tiny_program()):
        plain = run([*passes(HALF), Refit()], program, context(make_data())).result
        assert not moved
        with monkeypatch.context() as most:
            most.setattr(lockstep, "most_needed", lambda *args: args[-1] - free)
            tight = run([*passes(HALF), Refit()], program, context(make_data())).result
        assert moved and same_bits(plain, tight)
        moved.clear()


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PassError, match=r"found 10 bytes free, expected .* set TMPDIR"):
        run([*passes(HALF), Refit()], tiny_program(), replace(context(make_data()), memory=1))


@pytest.mark.slow
def test_t9_8_neither_labels_nor_evaluation_data() -> None:
    """Other labels, or none, and evaluation data that nobody may read: the same network."""
    data = make_data()
    other = replace(data.train, labels=data.train.labels.roll(1))
    plans = passes(HALF)
    expected = run([*plans, Refit()], tiny_program(), context(data)).result
    x = all_of(data)
    for same in (replace(data, train=other), samples(x)):
        assert same_bits(run([*plans, Refit()], tiny_program(), context(same)).result, expected)


@pytest.mark.slow
def test_the_seed_is_the_runs() -> None:
    data = make_data()
    one, same, other = (
        run([*passes(HALF), Refit(positions=8)], tiny_program(), context(data, seed=seed)).result
        for seed in (0, 0, 1)
    )
    assert same_bits(one, same) and not same_bits(one, other)


def test_samples_are_spread_over_the_data() -> None:
    """They may be sorted by class."""
    data = make_data(100)
    assert data.train.spread(10).indices.tolist() == list(range(0, 100, 10))
    assert len(data.train.spread(1000)) == 100


def test_the_record_says_what_it_did() -> None:
    ran = run([*passes(HALF), Refit(samples=50, positions=7)], tiny_program(), context(make_data()))
    step = ran.steps[-1]
    fit = cast(Fit, step.fit)
    assert step.training is None and step.summary == fit.summary
    assert (fit.original, fit.samples, fit.positions, fit.resumed) == ("the run's input", 50, 7, 0)
    assert [(r.layer, r.original) for r in fit.layers] == [(n, n) for n in ("stem", "inner", "outer", "fc")]
    assert all(r.rows == (50 if r.layer == "fc" else 350) for r in fit.layers)
    changed = [r for r in fit.layers if r.ridge is not None]
    assert changed and all(r.after < r.before for r in changed)


# ---- Over processes, and interrupted


def run_in_a_process() -> dict[str, Tensor]:
    torch.manual_seed(0)
    data = exact_data()
    ran = run([*passes(f"fold-bn, {HALF}"), Refit()], exact_program((tiny(), (1, 3, 8, 8))), context(data))
    return {name: t.detach() for name, t in ran.result.tensors.items()}


@pytest.mark.slow
def test_two_processes_end_where_one_does() -> None:
    alone = run_in_a_process()
    for together in in_processes(2, run_in_a_process):
        assert together.keys() == alone.keys()
        for name, tensor in alone.items():
            assert torch.allclose(together[name], tensor, rtol=1e-10, atol=1e-10), name


@pytest.mark.slow
def test_an_interrupted_fit_goes_on(tmp_path: Path) -> None:
    program, data = tiny_program(), make_data()
    plain = run([*passes(HALF), Refit()], program, context(data))

    def stop(message: str, share: float) -> None:
        if "fit outer" in message:
            raise KeyboardInterrupt

    given = replace(context(data), workdir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run([*passes(HALF), Refit()], program, replace(given, progress=stop))
    again = run([*passes(HALF), Refit()], program, given)
    fit, first = (cast(Fit, r.steps[-1].fit) for r in (again, plain))
    assert fit.resumed == 2 and fit.layers == first.layers
    assert same_bits(again.result, plain.result)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_state_of_other_work_is_refused(tmp_path: Path) -> None:
    program, data = tiny_program(), make_data()
    given = replace(context(data), workdir=tmp_path)

    def stop(message: str, share: float) -> None:
        if "fit outer" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([*passes(HALF), Refit()], program, replace(given, progress=stop))
    with pytest.raises(PassError, match="delete it"):
        run([*passes(HALF), Refit(samples=30)], program, given)


# ---- Whom it is fitted to


def original_of(text: str, data: Data, **options: Any) -> str:
    ran = run([*passes(text), Refit(**options)], tiny_program(), context(data))
    return cast(Fit, ran.steps[-1].fit).original


TRAINED = "finetune{epochs=1, batch=48, lr=0.001, precision=float32}"
ESTIMATED = "finetune{epochs=0, bn_reestimate=true}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HALF, "the run's input"),
        (f"{TRAINED}, {HALF}", "step 1 (finetune)"),
        (f"{TRAINED}, fold-bn, {HALF}", "step 1 (finetune)"),
        (f"{HALF}, {ESTIMATED}", "the run's input"),
        (f"{TRAINED}, {HALF}, {TRAINED}, fold-bn", "step 1 (finetune)"),
        (f"{HALF}, {TRAINED}, {HALF}", "step 2 (finetune)"),
        (f"{HALF}, refit, {HALF}", "the run's input"),
        ("apoz{ratio=0.6, multiple=1}, fold-bn", "the run's input"),
        (f"apoz{{ratio=0.6, multiple=1}}, {HALF}", "the run's input"),
    ],
)
def test_the_teacher_is_what_was_trained_before_the_last_removals(text: str, expected: str) -> None:
    assert original_of(text, make_data()) == expected


@pytest.mark.slow
def test_a_teacher_that_is_named(tmp_path: Path) -> None:
    data, text = make_data(), f"fold-bn, {HALF}, random{{ratio=0.5, multiple=1}}"
    assert original_of(text, data, teacher="l1") == "step 2 (l1)"
    assert original_of(text, data, teacher=1) == "step 1 (fold-bn)"
    assert original_of(text, data, teacher="input") == "the run's input"
    save(tiny_program(), tmp_path / "saved")
    assert original_of(text, data, teacher=str(tmp_path / "saved")) == str(tmp_path / "saved")


def test_teachers_that_are_none(tmp_path: Path) -> None:
    given = context(make_data())
    with pytest.raises(PassError, match="teacher: did not find 'pfa', expected a step of this run"):
        check_order([*passes(HALF), Refit(teacher="pfa")], tiny_program(), given)
    with pytest.raises(PassError, match="teacher: did not find 7"):
        check_order([*passes(HALF), Refit(teacher=7)], tiny_program(), given)
    small = run(passes(HALF), tiny_program(), given).result
    save(small, tmp_path / "other")
    other = [*passes("random{ratio=0.5, multiple=1}"), Refit(teacher=str(tmp_path / "other"))]
    with pytest.raises(PassError, match="whose history is no beginning of this network's"):
        run(other, tiny_program(), given)


def test_what_cannot_work_is_refused_before_anything_runs() -> None:
    program, given = tiny_program(), context(make_data())
    with pytest.raises(PassError, match="refit: found no data"):
        check_order([*passes(HALF), Refit()], program, context())
    with pytest.raises(PassError, match="nowhere"):
        check_order([Refit(include=("nowhere",))], program, given)


# ---- On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use on this machine")
def test_a_gpu_finds_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    program, data = exact_program((tiny(), (1, 3, 8, 8))), exact_data()
    cpu = run([*passes(HALF), Refit()], program, context(data)).result
    monkeypatch.setattr(lockstep.distributed, "device", lambda: torch.device("cuda"))
    gpu = run([*passes(HALF), Refit()], program, context(data)).result
    for name, tensor in cpu.tensors.items():
        assert torch.allclose(gpu.tensors[name], tensor, rtol=1e-8, atol=1e-8), name
