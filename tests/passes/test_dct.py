"""dct as a pass: which layers, what is lost, that rewriting is exact, what may come before and after."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.compiler.source import load_source
from graphcomp.data.sources import load_data
from graphcomp.errors import PassError
from graphcomp.ir import load, save
from graphcomp.ir.coefficients import DctLayer, decode, encode, spectrum
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure.cost import macs, params_order, params_state, params_trainable
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes import L1, Dct, Finetune, FoldBN, LowRank
from graphcomp.passes.dct.layout import LayoutRule
from graphcomp.passes.dct.ordering import chain
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.verify import TOLERANCE, difference
from graphcomp.records import Plan
from tests.learnable import make_data, normalised_net
from tests.nets import TRAPS, Spec, build, random_cnn
from tests.removing import digest, exact_program
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced

MOBILENET = {"exclude": "features.[0-7].*"}
"""What the paper leaves whole of MobileNet-V2, besides depthwise convolutions."""


def coded(**options: Any) -> Dct:
    return Dct(**{"rate": 4, "min_weights": 1, **options})


def reasons(plan: Plan) -> dict[str, str]:
    return {k.where: k.reason for k in plan.kept}


def chosen(plan: Plan) -> list[str]:
    return [x["layer"] for x in plan.decisions["layers"]]


def total(plan: Plan, name: str) -> int:
    return sum(x[name] for x in plan.evidence["layers"])


def unordered(x: np.ndarray[Any, Any], *_: Any) -> Any:
    return np.arange(x.shape[1])


@pytest.fixture(scope="module")
def digits() -> Program:
    """ResNet-20 with the bundled weights."""
    return load_source("models:resnet20-digits").program


@pytest.fixture(scope="module")
def ordered(digits: Program) -> Plan:
    """Half of the coefficients, in order."""
    return Dct(rate=2, min_weights=2000).plan(digits, context())


@pytest.fixture(scope="module")
def unordered_(digits: Program) -> Plan:
    """Half of the coefficients, columns as they are."""
    return Dct(rate=2, min_weights=2000, reorder=False).plan(digits, context())


# ---------------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("name", "options", "count", "dense"),
    [("resnet50", {}, 53, 63_528), ("mobilenet_v2", MOBILENET, 22, 162_536)],
)
def test_t4_11_the_sets_of_the_paper(name: str, options: dict[str, Any], count: int, dense: int) -> None:
    """T4.11: no stem, no normalisation, no depthwise convolution."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
        program = trace(net, torch.zeros(1, 3, 64, 64), copy_weights=False)
    found, kept = Dct(rate=8, **options).layout(program)
    assert len(found) == count
    assert params_trainable(program) - sum(x.weights for x in found) == dense
    first = "conv1" if name == "resnet50" else "features.0.0"
    assert {k.where: k.reason for k in kept}[first] in ("a first convolution", "excluded")


@pytest.fixture(scope="module")
def mobilenet() -> Program:
    return trace(torchvision.models.mobilenet_v2(weights=None), torch.zeros(1, 3, 32, 32), copy_weights=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "trainable", "params", "state"),
    [
        (0.5, 1_369_624, 2_205_208, 2_239_372),
        (2, 612_276, 1_447_860, 1_482_024),
    ],
)
def test_g4_1_counts_of_mobilenet_v2(
    monkeypatch: pytest.MonkeyPatch, mobilenet: Program, rate: float, trainable: int, params: int, state: int
) -> None:
    """By the counters of the network that comes out; the other rates are in `test_layout`."""
    monkeypatch.setattr("graphcomp.passes.dct.orders.chain", unordered)
    pass_ = Dct(rate=rate, strategy="progressive-r", **MOBILENET)  # type: ignore[arg-type]
    plan = pass_.plan(mobilenet, context())
    result = pass_.rewrite(mobilenet, plan)
    assert params_trainable(result) == trainable
    assert params_trainable(result) + params_order(result) == params
    assert params_state(result) == state  # "#params" of the paper's table
    assert total(plan, "positions") == 835_584
    assert total(plan, "coefficients") == trainable - 162_536  # "#trainable" of it
    assert macs(result) == macs(mobilenet)


class Zoo(nn.Module):
    """A layer of every kind that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.other_stem = nn.Conv2d(3, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.multiplied = nn.Conv2d(16, 32, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(32, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.small = nn.Conv2d(16, 4, 1)
        self.tied, self.same = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.same.weight = self.tied.weight
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.read = nn.Linear(4, 9)
        self.last = nn.Linear(9, 70)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu() + self.other_stem(x)
        x = self.grouped(self.multiplied(self.depthwise(x))).relu()
        x = self.small(self.up(x)).relu()
        x = self.twice(self.twice(self.same(self.tied(x)))).mean((2, 3))
        return self.last(self.read(x) + self.read.weight.sum(1))  # type: ignore[no-any-return]


def test_what_is_left_alone_and_why() -> None:
    program = traced(Zoo(), 1, 3, 8, 8)
    plan = coded(min_weights=100).plan(program, context())
    assert chosen(plan) == ["grouped", "twice", "last"]
    assert reasons(plan) == {
        "stem": "a first convolution",
        "other_stem": "a first convolution",
        "depthwise": "a depthwise convolution",
        "multiplied": "a depthwise convolution",
        "up": "ConvTranspose2d is neither Conv2d nor Linear",
        "small": "64 weights, fewer than 100",
        "tied": "its weight is tied to same.weight",
        "same": "its weight is tied to tied.weight",
        "read": "its weight is also used as a tensor",
    }
    step, _, result = run_pass(coded(min_weights=64, stem=True), program, context())
    layers = [n for n, m in result.called_modules().items() if isinstance(m, DctLayer)]
    assert layers == ["stem", "grouped", "small", "twice", "last"]
    assert step.verify_error <= TOLERANCE


def test_globs_choose() -> None:
    program = tiny_program()
    plan = coded(include=("inner", "fc"), exclude="f*").plan(program, context())
    assert chosen(plan) == ["inner"]
    assert reasons(plan) == {"stem": "not included", "outer": "not included", "fc": "excluded"}
    for options in ({"include": "conv9"}, {"exclude": ("conv9",)}):
        with pytest.raises(PassError, match="include/exclude: found no layer that 'conv9' matches, expected"):
            coded(**options).plan(program, context())


def test_nothing_to_compress() -> None:
    program = tiny_program()
    pass_ = Dct(rate=2)
    with pytest.raises(
        PassError, match=r"found nothing to change \(stem: a first convolution; inner, outer: 2304 w"
    ):
        Pipeline([pass_]).run(program, context())
    _, plan, result = run_pass(pass_, program, context())
    assert plan.decisions["layers"] == [] and plan.bulk == {}
    assert digest(result) == digest(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rate"),
        ({"rate": 0}, "greater than 0"),
        ({"rate": 0.5}, "rate: found 0.5, expected at least 1: it is the inverse of what stays, 8 keeps 1/8"),
        ({"rate": 0.5, "strategy": "progressive-g"}, "rate: found 0.5, expected at least 1"),
        ({"rate": 2, "groups": 0}, "greater than or equal to 1"),
        ({"rate": 2, "strategy": "progressive"}, "progressive-r"),
        ({"rate": 2, "distance": "hamming"}, "manhattan"),
        ({"rate": 2, "method": "magnitude", "reorder": False}, "expected true for magnitude"),
        ({"rate": 2, "ratio": 0.5}, "ratio"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dct(**options)
    assert Dct(rate=0.5, strategy="progressive-r").groups == 4


# ---------------------------------------------------------------------- exactness

VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "progressive-r": {"rate": 0.7, "strategy": "progressive-r"},
    "progressive-g": {"rate": 2, "strategy": "progressive-g", "groups": 2},
    "one row": {"groups": 1},
    "groups that do not divide": {"groups": 100},
    "not reordered": {"reorder": False},
    "magnitude": {"method": "magnitude"},
    "manhattan from l1": {"distance": "manhattan", "start_norm": "l1"},
    "cosine": {"distance": "cosine", "groups": 8},
    "next to nothing": {"rate": 1e9},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_rewriting_is_exact(name: str) -> None:
    """rewrite(simulate(p)) == simulate(p) in float64; in float32 the results are as near as float32 gets."""
    program = tiny_program()
    pass_ = coded(**VARIANTS[name])
    step, plan, result = run_pass(pass_, program, context())
    assert step.verify_error <= TOLERANCE
    assert chosen(plan) == ["inner", "outer", "fc"]
    assert difference(pass_.simulate(program, plan), result) < 1e-5
    assert step.after.macs == macs(program)
    assert step.after.params_order == total(plan, "positions")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRAPS))
def test_networks_of_one_trap_each(name: str) -> None:
    program = exact_program(TRAPS[name]())
    pass_ = coded(rate=2, stem=True)
    plan = pass_.plan(program, context())
    assert (
        difference(pass_.simulate(program, plan), pass_.rewrite(pass_.simulate(program, plan), plan)) < 1e-12
    )


@pytest.mark.slow
@settings(
    deadline=None,
    derandomize=True,
    max_examples=8,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(random_cnn())
def test_t0_7_random_networks(spec: Spec) -> None:
    program = exact_program(build(spec))
    pass_ = coded(rate=2, groups=3, stem=True)
    plan = pass_.plan(program, context())
    simulated = pass_.simulate(program, plan)
    assert str(simulated) == str(program)
    assert difference(simulated, pass_.rewrite(simulated, plan)) < 1e-12


@pytest.mark.parametrize("name", ["uniform", "not reordered", "magnitude", "cosine", "one row"])
def test_g4_6_with_all_coefficients_the_network_is_what_it_was(name: str) -> None:
    program = tiny_program().to(torch.float64)
    pass_ = coded(**VARIANTS[name] | {"rate": 1})
    plan = pass_.plan(program, context())
    assert difference(program, pass_.rewrite(program, plan)) < 1e-12
    assert all(x["nsse"] == 0 for x in plan.evidence["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_simulate_loses_what_the_plan_says(name: str) -> None:
    """nSSE = S[(W - W~)^2] / S[W^2], measured on the weights against Parseval's count in the plan."""
    program = tiny_program().to(torch.float64)
    pass_ = coded(**VARIANTS[name])
    plan = pass_.plan(program, context())
    simulated = pass_.simulate(program, plan)
    changed = {f"{x['layer']}.weight": x["nsse"] for x in plan.evidence["layers"]}
    for tensor, before in program.tensors.items():
        after = simulated.tensors[tensor]
        if tensor in changed:
            nsse = float((after - before).detach().square().sum() / before.detach().square().sum())
            assert nsse == pytest.approx(changed[tensor], rel=1e-9)
        else:
            assert torch.equal(after, before)


def test_a_weight_of_zeros_loses_nothing() -> None:
    program = tiny_program()
    with torch.no_grad():
        program.tensors["inner.weight"].zero_()
    _, plan, _ = run_pass(coded(), program, context())
    assert plan.evidence["layers"][0]["nsse"] == 0.0


def test_the_network_that_was_given_stays_as_it_is() -> None:
    """T1.13's check: the same bytes before and after all three verbs."""
    program = tiny_program()
    before = digest(program)
    pass_ = coded()
    plan = pass_.plan(program, context())
    pass_.rewrite(pass_.simulate(program, plan), plan)
    assert digest(program) == before


def test_frozen_weights_stay_frozen() -> None:
    program = tiny_program()
    program.tensors["inner.weight"].requires_grad_(False)
    _, _, result = run_pass(coded(), program, context())
    assert not result.tensors["inner.coefficients"].requires_grad
    assert result.tensors["outer.coefficients"].requires_grad


# ---------------------------------------------------------------------- what is decided


def test_the_options_reach_the_chain() -> None:
    program = tiny_program()
    for options in ({}, {"distance": "manhattan"}, {"start_norm": "l1"}, {"distance": "cosine", "groups": 8}):
        pass_ = coded(include="inner", **options)
        _, _, result = run_pass(pass_, program, context())
        x = program.tensors["inner.weight"].detach().double().reshape(pass_.groups, -1)
        expected = np.argsort(chain(x.numpy(), pass_.distance, pass_.start_norm))
        assert result.tensors["inner.index"].tolist() == expected.tolist(), options


def test_magnitude_keeps_the_columns_of_largest_norm() -> None:
    """METHODS 4.7, Table 1: floor(M / r) of them, as they were, and zeros elsewhere."""
    program = tiny_program()
    pass_ = coded(method="magnitude", include="inner")
    plan = pass_.plan(program, context())
    before = program.tensors["inner.weight"].detach().reshape(4, 576)
    after = pass_.simulate(program, plan).tensors["inner.weight"].detach().reshape(4, 576)
    kept = after.any(0)
    assert int(kept.sum()) == 144
    assert torch.equal(after[:, kept], before[:, kept])
    norms = before.norm(dim=0)
    assert float(norms[kept].min()) >= float(norms[~kept].max())


@pytest.mark.slow
def test_t4_8_the_chain_beats_sorting_by_norm_on_trained_layers(digits: Program, ordered: Plan) -> None:
    """T4.8: columns are not just sorted by norm."""
    for x in ordered.evidence["layers"]:
        weight = digits.tensors[f"{x['layer']}.weight"].detach().double()
        by_norm = torch.argsort(weight.reshape(x["rows"], -1).norm(dim=0), descending=True)
        energies = spectrum(weight, x["rows"], by_norm).square()
        assert x["nsse"] <= float(energies[:, x["terms"] :].sum() / energies.sum()), x["layer"]


@pytest.mark.slow
def test_a_trained_network_needs_the_order(digits: Program, ordered: Plan, unordered_: Plan) -> None:
    """The paper's first finding: with half of the frequencies it works in order; out of order it does not.

    What is lost out of order falls linearly in the coefficients kept: half of them lose about half.
    """
    data = load_data("digits?limit=240", input_shape=(3, 32, 32), seed=0)
    reached = {}
    for plan in (ordered, unordered_):
        simulated = Dct(**plan.options).simulate(digits, plan)
        reached[plan.decisions["reorder"]] = accuracy(simulated, data.eval).value
    assert reached[True] > 0.7 > 0.4 > reached[False]
    lost = {p.decisions["reorder"]: [x["nsse"] for x in p.evidence["layers"]] for p in (ordered, unordered_)}
    assert max(lost[True]) < 0.05 and 0.4 < min(lost[False]) < max(lost[False]) < 0.55


@pytest.mark.slow
def test_larger_layers_lose_less_at_the_same_rate(ordered: Plan) -> None:
    """The reason for the progressive strategies, on a trained network."""
    by_size: dict[int, list[float]] = {}
    for x in ordered.evidence["layers"]:
        by_size.setdefault(x["weights"], []).append(x["nsse"])
    assert np.mean(by_size[2304]) > np.mean(by_size[36_864])


def test_the_plan_says_what_is_stored() -> None:
    plan = coded(include=("inner", "fc"), groups=2).plan(tiny_program(), context())
    inner, fc = plan.evidence["layers"]
    assert inner.pop("nsse") > fc.pop("nsse") * 0
    assert inner == {
        "layer": "inner",
        "weights": 2304,
        "coefficients": 2 * 288,
        "positions": 1152,
        "rows": 2,
        "terms": 288,
        "bytes": [2304 * 4, 2 * 288 * 4 + 1152 * 2],
    }
    assert fc["bytes"] == [64 * 4, 2 * 8 * 4 + 32]
    assert plan.summary == (
        "stored 2 of 4 layers as coefficients: 2,368 weights as 592 coefficients and 1,184 positions, "
        "0.01 MB as 0.00 MB"
    )
    assert plan.kept and "order" not in plan.decisions


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    silent = context()
    plan = coded().plan(tiny_program(), replace(silent, progress=lambda m, f: told.append((m, f))))
    assert [m for m, _ in told] == [f"order the columns of {name}" for name in chosen(plan)]
    fractions = [f for _, f in told]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] < 1


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["uniform", "not reordered", "magnitude"])
def test_a_plan_survives_json_and_replays_bitwise(name: str) -> None:
    program, pass_ = tiny_program(), coded(**VARIANTS[name])
    plan = pass_.plan(program, context())
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    expected = pass_.rewrite(pass_.simulate(program, plan), plan)
    other = tiny_program()
    assert digest(pass_.rewrite(pass_.simulate(other, again), again)) == digest(expected)


def test_orders_are_in_the_plan_and_not_in_the_history() -> None:
    """A network whose point is to be small does not carry its orders twice."""
    program, pass_ = tiny_program(), coded()
    _, plan, result = run_pass(pass_, program, context())
    assert plan.bulk.keys() == set(chosen(plan))
    assert "bulk" not in result.history[-1] and result.history[-1]["decisions"] == plan.decisions
    remembered = Plan.model_validate(result.history[-1])
    with pytest.raises(
        PassError, match="inner: found no order, expected one under bulk; use the plan as it was"
    ):
        pass_.simulate(program, remembered)


def test_the_chain_of_what_is_simulated_is_another_one() -> None:
    """Why a plan holds the order: the truncated weight does not tell it."""
    program, pass_ = tiny_program(), coded(include="inner")
    plan = pass_.plan(program, context())
    simulated = pass_.simulate(program, plan)
    again = pass_.plan(simulated, context())
    assert again.bulk["inner"] != plan.bulk["inner"]
    weight = simulated.tensors["inner.weight"].detach().double()
    order = torch.argsort(pass_.rewrite(simulated, plan).tensors["inner.index"].long())
    exact = decode(encode(weight, 4, 144, order), 576, torch.argsort(order)).reshape(weight.shape)
    assert float((exact - weight).abs().max()) < 1e-6


def wider() -> Program:
    return traced(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)), 1, 3, 8, 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"layer": "9"}, "9: found the network has no such layer, expected a layer of 3456 weights"),
        ({"weights": 3460}, "1: found it has 3456 weights, expected a layer of 3460 weights to compress"),
        ({"rows": 5}, "plan: "),
        ({"terms": 2000}, "plan: "),
    ],
)
def test_plans_of_other_programs_are_refused(damage: dict[str, Any], message: str) -> None:
    program, pass_ = wider(), coded()
    plan = pass_.plan(program, context())
    decisions = copy.deepcopy(plan.decisions)
    decisions["layers"][0].update(damage)
    other = plan.model_copy(update={"decisions": decisions})
    for verb in (pass_.simulate, pass_.rewrite):
        with pytest.raises(PassError, match=message):
            verb(program, other)


# ---------------------------------------------------------------------- with other passes


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        FoldBN(),
        L1(ratio=0.5, multiple=1),
        LowRank(rank=4, multiple=1),
        LowRank(rank=4, multiple=1, kind="spatial"),
    ],
    ids=["fold-bn", "l1", "low-rank", "spatial"],
)
@pytest.mark.parametrize("strategy", ["uniform", "progressive-r", "progressive-g"])
def test_after_other_passes(before: Any, strategy: LayoutRule) -> None:
    program, steps = Pipeline([before, coded(strategy=strategy)]).run(tiny_program(), context())
    assert steps[-1].verify_error <= TOLERANCE
    assert any(isinstance(m, DctLayer) for m in program.called_modules().values())


def test_before_a_removal_its_channels_are_pinned_and_named() -> None:
    """Around a coefficient layer nothing goes; elsewhere it does."""
    net = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 16), (16, 4))))
    passes = [coded(include="3"), L1(ratio=0.5, multiple=1)]
    program, steps = Pipeline(passes).run(traced(net, 1, 3, 8, 8), context())
    reason = "its weight is stored as coefficients"
    assert ("_3", reason) in analyse(program).pinned.values()
    assert {k.where: k.reason for k in steps[-1].plan.kept}["2"] == f"{reason} (_3)"
    assert steps[-1].verify_error <= TOLERANCE
    assert isinstance(program.modules["3"], DctLayer)
    assert program.tensors["1.weight"].shape == (8, 8, 3, 3)


def test_when_all_is_coded_nothing_can_be_removed() -> None:
    """The run has changed something, so it is no error; l1 says why it did not."""
    _, steps = Pipeline([coded(stem=True), L1(ratio=0.5, multiple=1)]).run(tiny_program(), context())
    assert [step.changed for step in steps] == [True, False]
    assert steps[-1].summary.startswith("removed 0 of ") and steps[-1].plan.kept


def test_fold_bn_refuses_behind_coefficients() -> None:
    _, steps = Pipeline([coded(), FoldBN()]).run(tiny_program(), context())
    reason = "DctConv2d in front of it, not a convolution or linear layer"
    assert {k.where: k.reason for k in steps[-1].plan.kept} == {"bn1": reason, "bn2": reason}


def test_twice_is_once() -> None:
    program, steps = Pipeline([coded(), coded()]).run(tiny_program(), context())
    kept = {k.where: k.reason for k in steps[-1].plan.kept}
    assert kept["inner"] == "it is stored as coefficients already"
    assert len(program.history) == 2


def test_results_are_saved_and_loaded(tmp_path: Path) -> None:
    _, _, result = run_pass(coded(), tiny_program(), context())
    save(result, tmp_path / "p")
    loaded = load(tmp_path / "p")
    assert digest(loaded) == digest(result)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), result(x))


def trained(program: Program, steps: int = 40) -> list[float]:
    """A few steps with momentum and weight decay; the losses."""
    module = program.module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    module.eval()
    return losses


def still_coded(before: Program, after: Program) -> None:
    """T4.10: as many trainable parameters, and no energy beyond t in the weight that is computed with."""
    assert params_trainable(after) == params_trainable(before)
    for name, layer in after.called_modules().items():
        if not isinstance(layer, DctLayer):
            continue
        order = torch.argsort(after.tensors[f"{name}.index"].long())
        energies = spectrum(layer.weight().detach().double(), layer.rows, order).square()
        assert float(energies[:, layer.terms :].sum() / energies.sum()) < 1e-12
        assert torch.equal(after.tensors[f"{name}.index"], before.tensors[f"{name}.index"])
        assert not torch.equal(after.tensors[f"{name}.coefficients"], before.tensors[f"{name}.coefficients"])


@pytest.mark.slow
def test_t4_10_t4_4_training_changes_coefficients_and_nothing_else() -> None:
    """T4.10: the dense weight is rebuilt in every forward; T4.4: the index is neither trained nor decayed."""
    _, _, before = run_pass(coded(rate=8), tiny_program(), context())
    after = before.clone()
    losses = trained(after)
    assert losses[-1] < 0.5 * losses[0]
    still_coded(before, Program(after.module, after.example_inputs))


def test_t4_10_the_finetune_pass_after_dct() -> None:
    data = make_data()
    _, _, before = run_pass(coded(stem=True), normalised_net(), context(data))
    tuned = Finetune(epochs=1, batch=24, lr=0.05, precision="float32")
    step, _, after = run_pass(tuned, before, context(data))
    still_coded(before, after)
    assert step.after.params_order == sum(m.columns for m in _layers(before))


def _layers(program: Program) -> list[DctLayer]:
    return [m for m in program.called_modules().values() if isinstance(m, DctLayer)]
