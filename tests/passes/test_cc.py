"""The pass cc: what it decides for whole networks, and that the result computes what was decided."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from graphcomp.base.cache import VARIABLE
from graphcomp.budget.stopwatch import Stopwatch
from graphcomp.channels import multiple_for, round_within
from graphcomp.compiler.checkpoints import load_weights
from graphcomp.compiler.models import load_model
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data
from graphcomp.errors import DataError, PassError
from graphcomp.factors.decompose import decompose, read_factors
from graphcomp.factors.layers import layer_macs
from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure.cost import layer_rows, macs, params_trainable
from graphcomp.passes import CC
from graphcomp.passes.cc.decided import Allocated
from graphcomp.passes.cc.layers import network_ends, too_large
from graphcomp.pipeline import Context, Pipeline
from graphcomp.pipeline.verify import TOLERANCE
from graphcomp.records import Plan
from tests.learnable import SHAPE, make_data, normalised_net
from tests.removing import digest
from tests.running import run_pass
from tests.stopwatch import Machine
from tests.tiny import context, random_data, tiny_program, traced

RATE = 0.5
PAPER = CC(rate=RATE, multiple=1, lookahead="held")
"""The paper's rounding (none); exact lookahead is `test_mshc`'s and takes ten times as long."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analyses")


@pytest.fixture(autouse=True)
def _one_cache(_fresh_cache: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file look at the same few networks."""
    monkeypatch.setenv(VARIABLE, str(folder))


@pytest.fixture(scope="module")
def resnet() -> Iterator[tuple[Program, Data]]:
    """The bundled ResNet-20, trained on the digits."""
    loaded = load_model("models:resnet20-digits")
    assert loaded.default_weights is not None and loaded.input_shape is not None
    load_weights(loaded.module, loaded.default_weights)
    data = load_data("digits?limit=150", input_shape=loaded.input_shape, seed=0)
    yield traced(loaded.module, 1, *loaded.input_shape), data


@pytest.fixture(scope="module")
def whole(resnet: tuple[Program, Data]) -> tuple[Program, Plan, Program]:
    """The network, its plan by `PAPER`, and what it becomes."""
    program, data = resnet
    step, plan, result = run_pass(PAPER, program, context(data))
    assert step.verify_error <= TOLERANCE
    return program, plan, result


def rows(plan: Plan) -> list[Allocated]:
    return [Allocated.model_validate(row) for row in plan.evidence["layers"]]


def replayed(program: Program, plan: Plan, *, only: tuple[str, ...]) -> Program:
    """Only these layers of a plan."""
    factors = [f for f in plan.decisions["factors"] if f["layer"].startswith(only)]
    part = plan.model_copy(update={"decisions": {**plan.decisions, "factors": factors}})
    return PAPER.rewrite(PAPER.simulate(program, part), part)


# ---------------------------------------------------------------------- the decision


@pytest.mark.slow
def test_t1_1_the_rate_is_one_of_all_macs(whole: tuple[Program, Plan, Program]) -> None:
    """At least half of all MACs go, stem and classifier counted; parameters are another number."""
    program, plan, result = whole
    removed = sum(row.macs * row.reached for row in rows(plan))
    assert RATE * macs(program) <= removed <= (RATE + 0.03) * macs(program)
    asked = sum(row.macs * row.rate for row in rows(plan))
    assert asked == pytest.approx(RATE * macs(program), rel=1e-9)
    assert macs(result) <= macs(program) - removed
    assert len(rows(plan)) == 18 and sum(r.macs for r in rows(plan)) < macs(program)


@pytest.mark.slow
def test_t1_2_rates_differ(whole: tuple[Program, Plan, Program]) -> None:
    """And not by the norm of the weights: the slopes of the fits are equal at the rates."""
    _, plan, _ = whole
    free = [row for row in rows(plan) if 1e-6 < row.rate < 0.95 - 1e-6 and row.fit]
    assert max(r.rate for r in free) - min(r.rate for r in free) > 0.2
    slopes = [a * b * torch.tensor(b * r.rate).exp().item() for r in free for a, b in [r.fit or (0, 0)]]
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-4)


@pytest.mark.slow
def test_t1_8_every_layer_meets_its_rate(whole: tuple[Program, Plan, Program]) -> None:
    """By METHODS 1.1, which counts the second factor; a factorisation is never larger than one weight."""
    program, plan, _ = whole
    for row in rows(plan):
        after = layer_macs(program, row.factor)
        assert after == round(row.macs * (1 - row.reached)) <= row.macs * (1 - row.rate) + 1e-6
        assert row.factor.rank is None or after < layer_macs(
            program, row.factor.model_copy(update={"rank": None})
        )
        gone = [unit for unit in row.removed if unit < row.channels]
        assert sorted({*range(row.channels)} - {*gone}) == (row.factor.keep or list(range(row.channels)))


def test_t1_6_readers_change(whole: tuple[Program, Plan, Program]) -> None:
    """A layer reads len(K) channels; what it makes is as wide as before if anybody needs all of it."""
    program, plan, result = whole
    for factor in read_factors(plan.decisions):
        split = f"{factor.layer}.0.weight" in result.tensors
        names = [f"{factor.layer}.{i}.weight" if split else f"{factor.layer}.weight" for i in (0, 1)]
        before, (first, last) = program.tensors[f"{factor.layer}.weight"], (result.tensors[n] for n in names)
        assert first.shape[1] == len(factor.keep or range(before.shape[1]))
        if factor.layer.endswith("conv2"):  # the residual stream
            assert len(last) == len(before)
    simulated = PAPER.simulate(program, plan)
    assert torch.equal(simulated.tensors["conv1.weight"], program.tensors["conv1.weight"])


def test_t1_10_t1_11_factors_of_the_original_weight(whole: tuple[Program, Plan, Program]) -> None:
    """The best approximation of W[:, K] (error = energy of the tail), with balanced factors."""
    program, plan, _ = whole
    simulated = PAPER.simulate(program, plan)
    seen = 0
    for factor in read_factors(plan.decisions):
        if factor.rank is None:
            continue
        keep = factor.keep or slice(None)
        original = program.tensors[f"{factor.layer}.weight"].detach().double()[:, keep]
        made = simulated.tensors[f"{factor.layer}.weight"].detach().double()[:, keep]
        tail = torch.linalg.svdvals(original.flatten(1))[factor.rank :].square().sum()
        assert float((made - original).square().sum()) == pytest.approx(float(tail), rel=1e-4)
        first, second = decompose(original, factor)
        assert float(first.norm()) == pytest.approx(float(second.norm()), rel=1e-9)
        seen += 1
    assert seen


@pytest.mark.slow
def test_t1_13_twice_the_same(
    resnet: tuple[Program, Data], whole: tuple[Program, Plan, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed again, not read from the cache."""
    program, data = resnet
    before = digest(program)
    monkeypatch.setenv(VARIABLE, "")
    again = PAPER.plan(program, context(data))
    assert again == whole[1] and digest(program) == before


@pytest.mark.slow
def test_t1_14_a_region_is_a_part_of_the_whole(
    resnet: tuple[Program, Data], whole: tuple[Program, Plan, Program]
) -> None:
    """Its rates and units are those of the whole network; all other weights are the dense ones."""
    program, data = resnet
    _, plan, _ = whole
    part = replace(PAPER, only=("layer2.*",)).plan(program, context(data))
    chosen = [f for f in plan.decisions["factors"] if f["layer"].startswith("layer2.")]
    assert part.decisions["factors"] == chosen and len(chosen) == 6
    ignored = {"reason"}
    assert [r.model_dump(exclude=ignored) for r in rows(part)] == [
        r.model_dump(exclude=ignored) for r in rows(plan)
    ]
    assert {k.where for k in part.kept if "region" in k.reason} >= {"layer1.0.conv1", "layer3.2.conv2"}
    made = replayed(program, part, only=("layer",))
    assert digest(made) == digest(replayed(program, plan, only=("layer2.",)))
    assert torch.equal(made.tensors["layer3.0.conv1.weight"], program.tensors["layer3.0.conv1.weight"])


@pytest.mark.slow
def test_g1_9_savings_of_blocks_add_up(whole: tuple[Program, Plan, Program]) -> None:
    """Every block alone, and each stage: the sum of the savings is what the whole network saves."""
    program, plan, result = whole
    dense = params_trainable(program)
    for parts in (
        ["layer1.", "layer2.", "layer3."],
        [f"layer{s}.{b}." for s in (1, 2, 3) for b in (0, 1, 2)],
    ):
        saved = [dense - params_trainable(replayed(program, plan, only=(part,))) for part in parts]
        assert all(s > 0 for s in saved)
        assert sum(saved) == dense - params_trainable(result)


@pytest.mark.slow
def test_t1_15_plans_are_replayed_without_data(whole: tuple[Program, Plan, Program], tmp_path: Path) -> None:
    """From JSON; and the result loads without the model's source, bitwise equal."""
    program, plan, result = whole
    again = Plan.model_validate(json.loads(json.dumps(plan.model_dump(mode="json"))))
    made = PAPER.rewrite(PAPER.simulate(program, again), again)
    assert digest(made) == digest(result)
    save(result, tmp_path / "saved")
    x = torch.randn(2, *program.example_inputs[0].shape[1:])
    assert torch.equal(load(tmp_path / "saved")(x), result(x))


@pytest.mark.slow
def test_empty_region_is_the_dense_network(resnet: tuple[Program, Data]) -> None:
    program, data = resnet
    pass_ = replace(PAPER, rate=0)
    step, plan, result = run_pass(pass_, program, context(data))
    assert plan.decisions["factors"] == [] and step.verify_error == 0
    x = torch.randn(2, *program.example_inputs[0].shape[1:])
    assert torch.equal(result(x), program(x))


# ---------------------------------------------------------------------- rounding


@pytest.mark.slow
@pytest.mark.parametrize(("multiple", "rate"), [(8, 0.5), (4, 0.7), (16, 0.4)])
def test_rounded_widths_and_ranks(resnet: tuple[Program, Data], multiple: int, rate: float) -> None:
    program, data = resnet
    step, plan, result = run_pass(replace(PAPER, rate=rate, multiple=multiple), program, context(data))
    assert step.verify_error <= TOLERANCE
    removed = sum(row.macs * row.reached for row in rows(plan))
    assert rate * macs(program) <= removed
    for row in rows(plan):
        width, rank = len(row.factor.keep or range(row.channels)), row.factor.rank
        assert width == round_within(width, multiple, row.channels)
        assert rank is None or rank == round_within(rank, multiple, row.full_rank)
        assert (row.reason is None) == (row.reached > 0)
    step_of_narrowest = multiple_for(16, multiple)
    assert all(r.out_channels % step_of_narrowest == 0 for r in layer_rows(result) if r.name != "linear")


@pytest.mark.slow
def test_narrow_layers_are_rounded_to_parts_of_the_multiple(resnet: tuple[Program, Data]) -> None:
    """Blocks of 16 leave layers of 16 channels a choice of 8; what all of that gives up is said."""
    program, data = resnet
    pass_ = replace(PAPER, rate=0.7, multiple=None)
    plan = pass_.plan(program, context(data, target="cpu-avx512"))
    assert {k.where for k in plan.kept} == {"conv1", "linear"}
    narrow = [f for f in plan.decisions["factors"] if f["layer"].startswith("layer1.")]
    assert narrow and all(len(f["keep"] or range(16)) == 8 for f in narrow)
    with pytest.raises(PassError, match=r"expected at most 0\.75\d\d, which is what 18 layers of 18"):
        replace(pass_, rate=0.8).plan(program, context(data, target="cpu-avx512"))


def test_what_is_given_up_too_much_is_handed_back(
    resnet: tuple[Program, Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More MACs than by rounding alone, still no more than the rate leaves."""
    program, data = resnet
    pass_ = replace(PAPER, rate=0.4, multiple=8)
    with_it = pass_.plan(program, context(data))
    monkeypatch.setattr("graphcomp.passes.cc.gradients.hand_back", lambda layers, goals, forms: forms)
    without = pass_.plan(program, context(data))
    removed = [sum(r.macs * r.reached for r in rows(p)) for p in (with_it, without)]
    assert 0.4 * macs(program) <= removed[0] < removed[1]


# ---------------------------------------------------------------------- what does not pay


class Stream(nn.Module):
    """Three blocks of one layer each on a residual stream of 16 channels, which none of them reads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in (self.a, self.b, self.c):
            x = (x + layer(x)).relu()
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def stream() -> Program:
    torch.manual_seed(0)
    return traced(Stream(), 1, *SHAPE)


def on(machine: Machine, timed: bool = True) -> Context:
    return replace(context(make_data()), timer=machine, timed=timed)


def forms(plan: Plan) -> dict[str, tuple[int, int | None]]:
    """Layer -> channels that are read, rank."""
    return {f.layer: (len(f.keep or range(16)), f.rank) for f in read_factors(plan.decisions)}


STREAM = CC(rate=0.4, multiple=1, samples=64)


@pytest.mark.slow
def test_layers_that_would_be_slower_stay_or_become_one_weight() -> None:
    """Two factors of these ranks take long; reading 12 of 16 channels does not, and 11 leave the layout."""
    program, machine = stream(), Machine(odd=3.0)
    planned = forms(STREAM.plan(program, on(machine, timed=False)))
    step, plan, result = run_pass(STREAM, program, on(machine))
    read_well = {layer: (width, None) for layer, (width, _) in planned.items() if width % 4 == 0}
    assert read_well and len(read_well) < len(planned) == 3 and None not in {r for _, r in planned.values()}
    assert forms(plan) == read_well and step.verify_error <= TOLERANCE
    ratios = plan.evidence["reverted"]["layers"]
    assert min(ratios.values()) > 1.02
    reasons = {k.where: k.reason for k in plan.kept if "predicted" in k.reason}
    by_layer = {row.factor.layer: row for row in rows(plan)}
    for layer, (width, rank) in planned.items():
        reads = f"{width} of 16 channels"
        slower = f"rank {rank} with {reads} predicted {ratios[layer]:.2f}x slower"
        row = by_layer[layer]
        if layer in read_well:
            assert reasons[layer] == f"{slower}; one weight that reads {reads}"
            assert (row.reason, row.factor.rank, row.reached) == (None, None, 1 - width / 16)
        else:
            assert reasons[layer] == row.reason == f"{slower}; left alone"
    times = plan.evidence["reverted"]["milliseconds"]
    assert times["restored"] <= times["before"] < times["planned"]
    target = plan.evidence["target"]
    assert target == {"of": "macs", "asked": 0.6, "reached": pytest.approx(macs(result) / macs(program))}
    said = f"{target['reached']:.3f} of the macs left, 0.6 asked for"
    assert plan.summary == f"compressed {len(read_well)} of 3 layers, 0 of them into two factors; {said}"
    again = Plan.model_validate_json(plan.model_dump_json())
    assert digest(STREAM.rewrite(STREAM.simulate(program, again), again)) == digest(result)


@pytest.mark.slow
def test_a_plan_that_is_not_timed_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is one of which only single kernels are slow."""
    program, machine = stream(), Machine(odd=3.0)
    untimed = STREAM.plan(program, on(machine, timed=False))
    never = replace(STREAM, revert="never").plan(program, on(machine))
    assert machine.asked == 0 and untimed.evidence.keys() == {"multiple", "layers"}
    for plan in (untimed, never):
        assert plan.model_copy(update={"options": {}}) == untimed.model_copy(update={"options": {}})
    monkeypatch.setattr(Stopwatch, "times", lambda self, others: [4.0, 3.0, 3.5])
    times = {"before": 4.0, "planned": 3.0, "restored": 3.5}
    evidence = {**untimed.evidence, "reverted": {"layers": {}, "milliseconds": times}}
    told: list[float] = []
    where = replace(on(machine), progress=lambda message, part: told.append(part))
    assert STREAM.plan(program, where) == untimed.model_copy(update={"evidence": evidence})
    assert told == sorted(told) and told[-1] > 0.8


def test_only_the_region_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which no rate was asked for."""
    monkeypatch.setattr(Stopwatch, "times", lambda self, others: [4.0, 5.0, 3.5])
    plan = replace(STREAM, only=("[ac]",)).plan(stream(), on(Machine(odd=3.0)))
    assert set(plan.evidence["reverted"]["layers"]) == {"a", "c"} and "target" not in plan.evidence
    assert {k.where: k.reason for k in plan.kept}["b"] == "outside of the region (only)"


# ---------------------------------------------------------------------- layers


def test_the_first_and_the_last_layer_stay_by_default(resnet: tuple[Program, Data]) -> None:
    program, _ = resnet
    assert set(network_ends(program)) == {"conv1", "linear"}
    names, kept = CC(rate=0.5).layers(program)
    assert len(names) == 18 and {k.where for k in kept} == {"conv1", "linear"}
    names, _ = CC(rate=0.5, include=("conv1", "layer1.*"), exclude=("*.conv2",)).layers(program)
    assert names == ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1"]


def test_huge_layers_are_left_to_others() -> None:
    """The first linear layer of an ImageNet VGG, without weights; the largest of a ResNet-50 is analysed."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.stem, self.down = nn.Conv2d(3, 1024, 1), nn.Conv2d(1024, 2048, 1)
                self.fc6, self.fc7 = nn.Linear(2048 * 9, 4096), nn.Linear(4096, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc7(self.fc6(self.down(self.stem(x)).flatten(1)))  # type: ignore[no-any-return]

    program = trace(Wide(), torch.zeros(1, 3, 3, 3), copy_weights=False)
    assert set(too_large(program, ["down", "fc6"])) == {"fc6"}
    names, kept = CC(rate=0.5).layers(program)
    assert names == ["down"]
    assert "18,432 channels and 4,096 directions" in next(k.reason for k in kept if k.where == "fc6")
    assert CC(rate=0.5, include="fc6").layers(program)[0] == ["fc6"]


def test_several_first_and_last_layers() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.inner = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            x = self.inner((self.a(x) + self.b(x)).relu()).mean((2, 3))
            return [head(x) for head in self.heads]

    ends = network_ends(traced(Branches(), 1, 3, 6, 6))
    assert set(ends) == {"a", "b", "heads.0", "heads.1"}
    assert "reads the input" in ends["a"] and "makes the output" in ends["heads.1"]


@pytest.mark.slow
def test_linear_and_plain_convolutions_with_bias() -> None:
    """VGG-like: a linear layer behind a flatten loses blocks of columns like any other."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip
    program = traced(net, 1, *SHAPE)
    step, plan, _ = run_pass(CC(rate=0.35, multiple=1), program, context(make_data()))
    assert [row.factor.layer for row in rows(plan)] == ["2", "5"]
    assert step.verify_error <= TOLERANCE


def test_grouped_convolutions_are_no_units() -> None:
    """Their MACs count all the same (METHODS 1.5)."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(576, 4),
    )  # fmt: skip
    program = traced(net, 1, *SHAPE)
    step, plan, _ = run_pass(CC(rate=0.3, multiple=1), program, context(make_data()))
    assert [row.factor.layer for row in rows(plan)] == ["2"]
    assert rows(plan)[0].rate * rows(plan)[0].macs == pytest.approx(0.3 * macs(program), rel=1e-9)
    assert "8 groups" in next(k.reason for k in plan.kept if k.where == "1")
    assert step.verify_error <= TOLERANCE


def test_layers_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.shared, self.fc = (
                nn.Conv2d(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Linear(8, 4),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.shared(self.shared(self.stem(x)).relu()).relu()
            return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]

    program = traced(Twice(), 1, *SHAPE)
    step, plan, result = run_pass(CC(rate=0.35, multiple=1), program, context(make_data()))
    assert rows(plan)[0].macs == 2 * 8 * 8 * 9 * 36
    assert macs(result) <= 0.65 * macs(program) and step.verify_error <= TOLERANCE


def test_no_gradient_no_rate() -> None:
    """METHODS 1.5: a layer that the loss ignores has no fit."""
    program = normalised_net()
    dead = program.clone()
    with torch.no_grad():
        dead.tensors["1.weight"].zero_()  # nothing arrives at the second convolution
        dead.tensors["1.bias"].zero_()
    with pytest.raises(PassError, match=r"expected at most 0\.0000, which is what 0 layers of 1"):
        CC(rate=0.1, multiple=1).plan(dead, context(make_data()))
    plan = CC(rate=0.0, multiple=1).plan(dead, context(make_data()))
    assert "does not rise with the rate" in next(k.reason for k in plan.kept if k.where == "4")


# ---------------------------------------------------------------------- options and errors


def test_options() -> None:
    for wrong in (
        {},
        {"rate": 1.0},
        {"rate": -0.1},
        {"rate": 0.5, "step": 0},
        {"rate": 0.5, "slope": "steep"},
    ):
        with pytest.raises(ValidationError):
            CC(**wrong)  # type: ignore[arg-type]
    assert CC(rate=0.5, only="layer1.*").only == ("layer1.*",)


@pytest.mark.slow
def test_options_reach_the_decision(resnet: tuple[Program, Data]) -> None:
    """On the first stage, whose small layers are quick."""
    program, data = resnet

    def decided(**options: Any) -> list[Allocated]:
        pass_ = CC(**{"rate": 0.15, "multiple": 1, "include": "layer1.*", **options})
        return rows(pass_.plan(program, context(data)))

    base = decided()
    for options in ({"slope": "per_flop", "include": "layer[12].0.*"}, {"ceiling": 0.45}, {"samples": 100}):
        assert [r.rate for r in decided(**options)] != [r.rate for r in base]
    for units in ({"gamma": 0.0}, {"step": 5}, {"lookahead": "held"}):
        other = decided(**units)
        assert [r.rate for r in other] == [r.rate for r in base]
        assert [r.removed for r in other] != [r.removed for r in base]
    assert all(r.exact for r in base) and not any(r.exact for r in other)


def test_data_with_labels_is_needed() -> None:
    with pytest.raises(DataError, match=r"found no data, .*give --data"):
        CC(rate=0.3).plan(tiny_program(), context())
    with pytest.raises(DataError, match="without labels"):
        CC(rate=0.3).plan(tiny_program(), context(random_data(3, 8, 8)))


@pytest.mark.slow
def test_nothing_to_compress(resnet: tuple[Program, Data]) -> None:
    program, data = resnet
    with pytest.raises(PassError, match=r"cc: found nothing to change \(conv1: the first layer"):
        Pipeline([CC(rate=0.0)]).run(program, context(data))
    with pytest.raises(PassError, match=r"found no layer that 'layr1\.\*' matches, expected one of conv1,"):
        CC(rate=0.3, only=("layr1.*",)).plan(program, context(data))


def test_progress_runs_to_the_end(resnet: tuple[Program, Data]) -> None:
    program, data = resnet
    seen: list[float] = []
    where = context(data)
    replace(PAPER, rate=0.2).plan(
        program, Context(where.target, data, progress=lambda message, part: seen.append(part))
    )
    assert seen == sorted(seen) and seen[-1] == 1.0
