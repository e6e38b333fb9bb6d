"""What all channel removers share: amounts, rounding, globs, joins, costs, plans."""

import contextlib
import json
import math
import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import nn

from graphcomp.bases import OPTIONS, ChannelRemoval, RatioRemoval, options_of
from graphcomp.budget.allocation import Scores
from graphcomp.channels import Channels, analyse
from graphcomp.compiler.recipe import parse_passes
from graphcomp.errors import PassError, RecipeError, SurgeryError
from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.onnx.export import export_onnx
from graphcomp.passes import L1, PASSES, FoldBN, Random
from graphcomp.pipeline import Context, Pipeline
from graphcomp.pipeline.verify import TOLERANCE, difference, verify_pass
from graphcomp.records import Plan
from tests.nets import TRAPS, Net, scramble
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced

ROOT = Path(__file__).parents[2]


def widths(program: Program) -> dict[str, int]:
    """Output channels of every layer."""
    return {
        name: module.weight.shape[0]
        for name, module in program.called_modules().items()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def apply(pass_: ChannelRemoval, program: Program, ctx: Context | None = None) -> tuple[Plan, Program]:
    plan = pass_.plan(program, ctx or context())
    return plan, pass_.rewrite(pass_.simulate(program, plan), plan)


def chain(*sizes: int) -> Program:
    """Convolutions in a row, of these widths, on 4x4 maps."""
    layers = [nn.Conv2d(a, b, 1) for a, b in pairwise(sizes)]
    return traced(nn.Sequential(*layers), 1, sizes[0], 4, 4)


@dataclass(frozen=True, config=OPTIONS)
class ByRow(RatioRemoval):
    """Scores that are known: the row number."""

    name: ClassVar[str] = "by-row"

    def score(self, channels: Channels, context: Context) -> tuple[Scores, dict[str, str]]:
        scores = np.zeros(len(channels.channel_of))
        for group in channels.groups:
            scores[group.channels] = np.arange(len(group.channels))
        return scores, {}


# ---------------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("ratio", "gone"),
    [(0.05, 0), (0.1, 1), (0.29, 2), (0.3, 3), (0.5, 5), (0.7, 7), (0.89, 8), (0.9, 9), (0.999, 9)],
)
def test_ratio_of_ten(ratio: float, gone: int) -> None:
    """floor(ratio * n) go: 0.3 * 10 is 3 although it is not in floating point; the last one stays."""
    plan, result = apply(ByRow(ratio=ratio, multiple=1), chain(2, 10, 3))
    assert widths(result) == {"0": 10 - gone, "1": 3}
    assert plan.decisions["rows"].get("0.weight", []) == list(range(gone))  # lowest scores


@pytest.mark.parametrize(("multiple", "kept"), [(1, 5), (2, 6), (3, 6), (4, 8), (8, 8), (9, 6), (16, 8)])
def test_kept_counts_are_rounded_up(multiple: int, kept: int) -> None:
    _, result = apply(ByRow(ratio=0.5, multiple=multiple), chain(2, 10, 3))
    assert widths(result)["0"] == kept


@pytest.mark.parametrize(("target", "kept"), [("cpu-avx512", 16), ("cpu-avx2", 8), ("cuda-tf32", 4)])
def test_multiple_is_the_targets(target: str, kept: int) -> None:
    plan, result = apply(ByRow(ratio=0.9), chain(2, 40, 3), context(target=target))
    assert widths(result)["0"] == kept
    assert plan.evidence["multiple"] == {"cpu-avx512": 16, "cpu-avx2": 8, "cuda-tf32": 4}[target]


@pytest.mark.parametrize(("least", "kept"), [(1, 1), (4, 4), (7, 7), (10, 10), (99, 10)])
def test_min_channels(least: int, kept: int) -> None:
    pass_ = ByRow(ratio=0.95, multiple=1, min_channels=least)
    _, result = apply(pass_, chain(2, 10, 3))
    assert widths(result)["0"] == kept


def test_min_channels_is_rounded_up_too() -> None:
    _, result = apply(ByRow(ratio=0.9, multiple=8, min_channels=9), chain(2, 40, 3))
    assert widths(result)["0"] == 16


def test_options_are_checked() -> None:
    for options in (
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": 0.5, "target": {"macs": 0.5}},
        {},
        {"rate": 1},
    ):
        with pytest.raises(ValueError):
            L1(**cast(dict[str, Any], options))
    assert L1(target="macs: 0.5").target == {"macs": 0.5}  # type: ignore[arg-type]
    assert L1(ratio=0.5, include="a.*").include == ("a.*",)  # type: ignore[arg-type]


def test_options_are_plain_json() -> None:
    for name, kind in PASSES.items():
        made = _made(kind)
        assert kind(**json.loads(json.dumps(options_of(made)))) == made, name


def _made(kind: type[Any]) -> Any:
    """The pass with the least that it asks for."""
    for options in ({}, {"ratio": 0.5}, {"energy": 0.5}, {"rate": 0.5}, {"rate": 8}, {"epochs": 1}):
        with contextlib.suppress(ValueError, TypeError):
            return kind(**options)
    raise AssertionError(f"{kind.name}: say here what it cannot do without")


def test_joins_that_a_criterion_has_no_meaning_for() -> None:
    """`project` judges what additions yield: nothing for scores that do not come from responses."""
    with pytest.raises(ValueError, match="Input should be 'couple' or 'pad'"):
        L1(ratio=0.5, join="project")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"l1.join: found 'project', Input should be 'couple' or 'pad'"):
        parse_passes("l1{ratio=0.5, join=project}", PASSES)


def test_every_option_is_described() -> None:
    for name, kind in PASSES.items():
        if issubclass(kind, ChannelRemoval):
            schema = TypeAdapter(kind).json_schema()["properties"]
            assert [o for o, s in schema.items() if not s.get("description")] == [], name


# ---------------------------------------------------------------------- which


def reasons(plan: Plan) -> dict[str, str]:
    return {k.where: k.reason for k in plan.kept}


def test_include_and_exclude_are_globs() -> None:
    program = chain(2, 8, 8, 8, 3)
    plan, result = apply(ByRow(ratio=0.5, multiple=1, include=("[01]",), exclude=("1*",)), program)
    assert widths(result) == {"0": 4, "1": 8, "2": 8, "3": 3}
    assert reasons(plan) == {"1": "excluded", "2": "not included", "3": "network output (output)"}


def test_excluding_one_of_coupled_layers_keeps_them_all() -> None:
    plan, result = apply(L1(ratio=0.5, exclude=("outer",)), tiny_program())
    assert widths(result) == {"stem": 16, "inner": 8, "outer": 16, "fc": 4}
    assert reasons(plan)["stem"] == "excluded"


def test_including_one_of_coupled_layers_takes_them_all() -> None:
    plan, result = apply(L1(ratio=0.5, include=("outer",)), tiny_program())
    assert widths(result) == {"stem": 8, "inner": 16, "outer": 8, "fc": 4}
    assert reasons(plan)["inner"] == "not included"


@pytest.mark.slow
def test_every_group_is_accounted_for() -> None:
    """Removed, or kept because …: never silence."""
    for name in ("glu-module", "grouped-resnext", "two-outputs", "softmax-channels", "attention-heads"):
        module, shape = TRAPS[name]()
        plan = L1(ratio=0.5, multiple=1).plan(traced(module, *shape), context())
        touched = {layer.removesuffix(".weight") for layer in plan.decisions["rows"]}
        named = touched | set(reasons(plan))
        for group in analyse(traced(module, *shape)).groups:
            assert group.name in named or set(group.producers) & touched, (name, group.name)
        assert all(k.reason for k in plan.kept)


def test_removing_nothing_is_an_error_that_says_why() -> None:
    message = r"l1: found nothing to change \(.*\), expected something; .* --allow-nothing"
    with pytest.raises(PassError, match=message) as caught:
        Pipeline([L1(ratio=0.5, include=("fc",))]).run(tiny_program(), context())
    for name in ("(stem, inner: not included;", "fc: network output (output)"):
        assert name in str(caught.value)


def test_every_reason_is_among_those_that_are_said() -> None:
    """However many layers the first has: six outputs are one reason, and rounding the one that helps."""
    heads = Net(
        lambda m, x: tuple(head(m.stem(x)) for head in m.heads),
        stem=nn.Conv2d(3, 16, 1),
        heads=nn.ModuleList(nn.Conv2d(16, 2, 1) for _ in range(6)),
    )
    with pytest.raises(PassError) as caught:
        Pipeline([L1(ratio=0.1, multiple=8)]).run(traced(heads, 1, 3, 4, 4), context())
    assert "and 3 more: network output" in str(caught.value)
    assert "stem: nothing left to remove after rounding up to steps of 8" in str(caught.value)


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    for options in ({"include": ("sten",)}, {"exclude": ("*.conv9",)}):
        with pytest.raises(PassError, match=r"found no layer that '.*' matches, expected one of fc, inner"):
            L1(ratio=0.5, **options).plan(tiny_program(), context())


def test_removing_nothing_by_rounding_says_so() -> None:
    def refused(pass_: L1, program: Program) -> str:
        with pytest.raises(PassError, match="found nothing to change") as caught:
            Pipeline([pass_]).run(program, context())
        return str(caught.value)

    assert "0: all 8 channels are the fewest that stay in steps of 4" in refused(
        L1(ratio=0.5, min_channels=5), chain(2, 8, 3)
    )
    assert "0: nothing left to remove after rounding up" in refused(L1(ratio=0.1), chain(2, 16, 3))
    assert "0: 1 channel(s) wide" in refused(L1(ratio=0.9, multiple=1), chain(2, 1, 3))
    assert "(the network has nothing that" in refused(L1(ratio=0.5), traced(nn.ReLU(), 1, 3))


def test_removing_nothing_is_fine_if_allowed() -> None:
    program = tiny_program()
    step, plan, result = run_pass(L1(ratio=0.0), program, context())
    assert plan.decisions["rows"] == {}
    assert step.summary.startswith("removed 0 of ")
    assert str(result) == str(program) and difference(program, result) == 0 and not step.changed
    same, _ = Pipeline([L1(ratio=0.0)], allow_nothing=True).run(program, context())
    assert same.fingerprint() == program.fingerprint()


# ---------------------------------------------------------------------- joins and blocks


def test_couple_takes_the_same_from_both_sides() -> None:
    plan, result = apply(L1(ratio=0.5, join="couple"), tiny_program())
    rows = plan.decisions["rows"]
    assert rows["stem.weight"] == rows["outer.weight"] != rows["inner.weight"]
    assert widths(result) == {"stem": 8, "inner": 8, "outer": 8, "fc": 4}


def test_pad_lets_each_side_choose() -> None:
    plan, result = apply(L1(ratio=0.5, join="pad"), tiny_program())
    rows = plan.decisions["rows"]
    assert rows["stem.weight"] != rows["outer.weight"]
    norms = tiny_program().tensors["outer.weight"].abs().sum((1, 2, 3))
    assert rows["outer.weight"] == sorted(norms.argsort()[:8].tolist())
    assert widths(result) == {"stem": 8, "inner": 8, "outer": 8, "fc": 4}
    both = set(rows["stem.weight"]) & set(rows["outer.weight"])
    assert result.tensors["fc.weight"].shape == (4, 16 - len(both))  # what neither side has is gone


@pytest.mark.parametrize("join", ["couple", "pad"])
@pytest.mark.parametrize("pass_", [L1, Random])
def test_exact_and_nothing_else_moves(join: Any, pass_: Any) -> None:
    program = tiny_program()
    text, before = str(program), {k: t.clone() for k, t in program.tensors.items()}
    step, plan, result = run_pass(pass_(ratio=0.6, multiple=1, join=join), program, context())
    assert step.verify_error <= TOLERANCE
    assert str(program) == text
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())
    assert macs(result) < macs(program) and params_trainable(result) < params_trainable(program)
    assert result.history == (plan.model_dump(mode="json", exclude={"bulk"}),)
    filters = [t for k, t in result.tensors.items() if k.endswith(("stem.weight", "inner.weight"))]
    assert all(bool(f.flatten(1).abs().sum(1).all()) for f in filters)  # smaller, not masked


@pytest.mark.parametrize("join", ["couple", "pad"])
def test_a_smaller_program_trains(join: Any) -> None:
    """With an optimiser of its own: one step moves every parameter."""
    _, result = apply(L1(ratio=0.5, join=join), tiny_program())
    before = {k: p.detach().clone() for k, p in result.module.named_parameters()}
    optimiser = torch.optim.SGD(result.module.parameters(), 0.1, momentum=0.9)
    result.module.train()
    result.module(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimiser.step()
    assert [k for k, p in result.module.named_parameters() if torch.equal(p, before[k])] == []


def test_simulate_keeps_graph_and_shapes() -> None:
    program = tiny_program()
    pass_ = L1(ratio=0.5)
    plan = pass_.plan(program, context())
    simulated = pass_.simulate(program, plan)
    assert str(simulated) == str(program)
    rows = plan.decisions["rows"]
    for layer, source in (("inner", "stem"), ("outer", "inner"), ("fc", "stem")):
        gone = rows[f"{source}.weight"]
        kept = [i for i in range(16) if i not in gone]
        old, new = program.tensors[f"{layer}.weight"], simulated.tensors[f"{layer}.weight"]
        assert not new[:, gone].any() and torch.equal(new[:, kept], old[:, kept])
    untouched = [k for k in program.tensors if k not in ("inner.weight", "outer.weight", "fc.weight")]
    assert all(torch.equal(simulated.tensors[k], program.tensors[k]) for k in untouched)


def test_blocks_of_grouped_convolutions_lose_equally() -> None:
    """Rows of a grouped convolution with very unequal norms: the best of every block stay."""
    net = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 2, 1))
    with torch.no_grad():
        for i in range(12):
            net[1].weight[i] = float(i + 1)  # type: ignore[index]
    program = traced(net, 1, 2, 4, 4)
    plan, result = apply(L1(ratio=0.5, multiple=1), program)
    assert plan.decisions["rows"]["1.weight"] == [0, 1, 4, 5, 8, 9]
    first = plan.decisions["rows"]["0.weight"]
    assert [sum(r // 4 == block for r in first) for block in range(3)] == [2, 2, 2]
    assert result.layer("1", nn.Conv2d).groups == 3
    assert widths(result) == {"0": 6, "1": 6, "2": 2}
    assert verify_pass(L1(ratio=0.5, multiple=1), program, plan) <= TOLERANCE


@pytest.mark.parametrize(("multiple", "kept"), [(1, 6), (2, 6), (4, 12), (6, 6)])
def test_multiples_and_blocks_together(multiple: int, kept: int) -> None:
    """Three blocks: kept counts are multiples of both."""
    net = nn.Sequential(nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 2, 1))
    _, result = apply(L1(ratio=0.5, multiple=multiple), traced(net, 1, 2, 4, 4))
    assert widths(result)["1"] == kept


# ---------------------------------------------------------------------- targets


COUNTERS = {"macs": macs, "params": params_trainable}


def uniform(program: Program, ratio: float, counter: str, **options: Any) -> int:
    """The counter after one ratio everywhere."""
    pass_ = L1(ratio=max(ratio, 0.0), **options)
    return COUNTERS[counter](apply(pass_, program)[1])


@pytest.mark.parametrize("join", ["couple", "pad"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize(("counter", "fraction"), [("macs", 0.3), ("macs", 0.8), ("params", 0.5)])
def test_target_is_met_and_only_just(join: Any, multiple: int, counter: Any, fraction: float) -> None:
    program = tiny_program()
    goal = fraction * COUNTERS[counter](program)
    pass_ = L1(target={counter: fraction}, multiple=multiple, join=join)
    plan, result = apply(pass_, program)
    found = COUNTERS[counter](result)
    assert found <= goal
    ratios = [1 - group["share"] for group in plan.evidence["groups"]]
    options = {"multiple": multiple, "join": join}
    assert uniform(program, max(ratios), counter, **options) <= found  # no more than that, and given back
    assert (
        uniform(program, min(ratios) - 1e-6, counter, **options) > goal
    )  # the next smaller ratio is too small
    assert set(widths(result).values()) <= {w for w in range(17) if w % multiple == 0} | {4}


def test_target_of_one_group_is_the_smallest_removal() -> None:
    """One layer of 40: MACs are linear in its width, so what is kept is floor(fraction * 40)."""
    program = chain(2, 40, 3)
    for fraction in (0.1, 0.33, 0.5, 0.975):
        _, result = apply(L1(target={"macs": fraction}, multiple=1), program)
        assert widths(result)["0"] == math.floor(fraction * 40 + 1e-9)


def test_target_gives_back_what_rounding_took() -> None:
    """All three layers would jump from 16 to 8 at one ratio; some get their channels back."""
    program = chain(4, 16, 16, 16, 4)
    _, result = apply(L1(target={"macs": 0.8}, multiple=8), program)
    found = list(widths(result).values())[:3]
    assert sorted(found) == [8, 16, 16] and macs(result) <= 0.8 * macs(program)
    assert uniform(program, 0.5, "macs", multiple=8) < 0.5 * macs(program)


class Dense(nn.Module):
    """What three layers make is concatenated, and read by the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.ModuleList([nn.BatchNorm2d(8 * n) for n in (1, 2, 3)])
        self.inner = nn.ModuleList([nn.Conv2d(8 * n, 16, 1) for n in (1, 2, 3)])
        self.outer = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1) for _ in range(3)])
        self.act, self.head = nn.ReLU(inplace=True), nn.Conv2d(32, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        found = [self.stem(x)]
        for norm, inner, outer in zip(self.norm, self.inner, self.outer, strict=True):
            found.append(outer(inner(self.act(norm(torch.cat(found, 1))))))
        return self.head(torch.cat(found, 1))


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["auto", "greedy"])
def test_whole_layers_go_for_a_target(allocation: Any, tmp_path: Path) -> None:
    """Planned, replayed, verified, saved, loaded and exported like any other removal."""
    program = traced(scramble(Dense(), 0), 1, 3, 6, 6)
    pass_ = L1(target={"macs": 0.5}, multiple=8, allocation=allocation)
    plan, result = apply(pass_, program)
    gone = [g["group"] for g in plan.evidence["groups"] if g["kept"] == 0]
    assert gone and f", {len(gone)} of them whole" in plan.summary
    assert not {"norm.2", *gone} & set(result.called_modules())
    assert macs(result) <= 0.5 * macs(program)
    verify_pass(pass_, program, plan)
    again = pass_.rewrite(pass_.simulate(program, Plan.model_validate_json(plan.model_dump_json())), plan)
    assert str(again) == str(result)
    save(result, tmp_path / "program")
    loaded = load(tmp_path / "program")
    assert difference(loaded, result) == 0
    export_onnx(result, tmp_path / "model.onnx", batches=(1, 3))  # compares with torch on both
    _, kept = apply(L1(target={"macs": 0.6}, multiple=8, min_channels=1), program)
    assert set(kept.called_modules()) == set(program.called_modules())


@pytest.mark.parametrize("counter", ["macs", "params"])
def test_unreachable_target_says_what_is(counter: Any) -> None:
    program = tiny_program()
    with pytest.raises(
        PassError, match=rf"target {counter}: found [0-9.]+ of the {counter} left when every group "
    ) as e:
        L1(target={counter: 0.05}).plan(program, context())
    best = uniform(program, 0.999, counter) / COUNTERS[counter](program)
    assert f"found {best:.3f} of" in str(e.value)
    assert "expected 0.05; ask for less, include more layers, or set multiple=1" in str(e.value)
    assert uniform(program, 0.999, counter, multiple=1) < 0.05 * COUNTERS[counter](program)  # as advised


def test_target_counts_what_may_go() -> None:
    """Excluded layers count in the goal, so the others pay for them."""
    program = tiny_program()
    _, free = apply(L1(target={"macs": 0.7}, multiple=1), program)
    _, bound = apply(L1(target={"macs": 0.7}, multiple=1, exclude=("inner",)), program)
    assert macs(bound) <= 0.7 * macs(program)
    assert widths(bound)["stem"] < widths(free)["stem"]


def test_evidence_says_what_was_decided() -> None:
    """Asked for, wanted before rounding, kept after it: for every group that was judged."""
    plan, _ = apply(L1(ratio=0.6, exclude=("inner",)), tiny_program())
    assert plan.evidence == {
        "multiple": 8,
        "groups": [{"group": "stem", "channels": 16, "share": 0.4, "wanted": 7, "kept": 8}],
    }


# ---------------------------------------------------------------------- plans


MADE = {
    "fold-bn": FoldBN(),
    "l1": L1(ratio=0.5),
    "l1-pad": L1(ratio=0.5, join="pad"),
    "random": Random(ratio=0.5),
}


def same(a: Program, b: Program) -> bool:
    tensors = a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(t, b.tensors[k]) and t.requires_grad == b.tensors[k].requires_grad
        for k, t in a.tensors.items()
    )
    return str(a) == str(b) and tensors


@pytest.mark.parametrize("name", MADE)
def test_plan_survives_json_and_replays_bitwise(name: str) -> None:
    pass_ = MADE[name]
    plan = pass_.plan(tiny_program(), context())
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    program, other = tiny_program(), tiny_program()
    expected = pass_.rewrite(pass_.simulate(program, plan), plan)
    assert same(pass_.rewrite(pass_.simulate(other, again), again), expected)


@pytest.mark.slow
def test_plans_replay_in_a_fresh_process(tmp_path: Path) -> None:
    """Only the saved program and the plans go there: no data, no source, no options."""
    program = tiny_program()
    save(program, tmp_path / "before")
    for name, pass_ in MADE.items():
        (tmp_path / f"{name}.json").write_text(pass_.plan(program, context()).model_dump_json())
    code = """
        import sys, torch
        from pathlib import Path
        from graphcomp.passes import FoldBN, L1, Random
        from graphcomp.records import Plan
        from graphcomp import load, save
        out = Path(sys.argv[1])
        program = load(out / "before")
        for file in sorted(out.glob("*.json")):
            plan = Plan.model_validate_json(file.read_text())
            pass_ = {"fold-bn": FoldBN, "l1": L1, "random": Random}[plan.name](**plan.options)
            save(pass_.rewrite(pass_.simulate(program, plan), plan), out / file.stem)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    for name, pass_ in MADE.items():
        plan = pass_.plan(program, context())
        assert same(load(tmp_path / name), pass_.rewrite(pass_.simulate(program, plan), plan)), name


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            {"layer9.weight": [0]},
            "layer9.weight: found no such layer, expected ",
        ),
        ({"inner.weight": [3, 16]}, "inner.weight: found row 16, expected "),
        (
            {"stem.weight": [1]},
            "outer.weight: found a plan that splits coupled channels, expected a plan made",
        ),
        ({"fc.weight": [1]}, "plan: found 1 channels that cannot be removed, expected a legal choice"),
    ],
)
def test_plan_of_another_program(rows: dict[str, list[int]], message: str) -> None:
    plan = Plan(name="l1", decisions={"join": "couple", "rows": rows})
    for verb in (L1(ratio=0.5).simulate, L1(ratio=0.5).rewrite):
        with pytest.raises(SurgeryError) as caught:
            verb(tiny_program(), plan)
        assert str(caught.value).startswith(message)


def test_plan_twice_is_refused() -> None:
    """What is gone cannot go again."""
    pass_ = L1(ratio=0.6)
    plan, result = apply(pass_, tiny_program())
    with pytest.raises(SurgeryError):
        pass_.simulate(result, plan)


# ---- widths at random


def drawn_widths(seed: int, amount: float = 0.4, **options: Any) -> tuple[dict[str, int], float]:
    """Kept counts by group, and what is left of the parameters."""
    program = chain(3, *[64] * 8, 4)
    pass_ = L1(target={"params": amount}, allocation="random", multiple=1, **options)
    plan = pass_.plan(program, context(seed=seed))
    widths = {g["group"]: g["kept"] for g in plan.evidence["groups"]}
    return widths, params_trainable(pass_.rewrite(program, plan)) / params_trainable(program)


def test_random_widths_meet_the_target_each_in_its_own_way() -> None:
    found = [drawn_widths(seed) for seed in range(4)]
    assert all(0.38 < left <= 0.4 for _, left in found)
    assert len({str(widths) for widths, _ in found}) == 4
    assert drawn_widths(2)[0] == found[2][0]
    kept = [n for widths, _ in found for n in widths.values()]
    assert len(kept) == 32 and min(kept) < 16 and max(kept) > 60  # no layer is safe, none is favoured


def test_a_smaller_target_is_narrower_everywhere() -> None:
    """One draw is a direction; how far along it, the target says."""
    wide, narrow = drawn_widths(1, 0.6)[0], drawn_widths(1, 0.3)[0]
    assert all(narrow[g] <= wide[g] for g in wide) and narrow != wide


def test_channels_go_by_the_criterion_all_the_same() -> None:
    program = chain(3, 16, 16, 16, 4)
    pass_ = L1(target={"params": 0.5}, allocation="random", multiple=1)
    gone = pass_.plan(program, context(seed=3)).decisions["rows"]
    assert len(gone) > 1
    for layer, rows in gone.items():
        norms = program.tensors[layer].abs().sum((1, 2, 3))
        assert set(rows) == set(norms.argsort()[: len(rows)].tolist())


def test_random_widths_need_a_target() -> None:
    with pytest.raises(ValidationError, match="found allocation=random without target"):
        L1(ratio=0.5, allocation="random")


def test_random_widths_are_verified() -> None:
    pass_ = Random(target={"macs": 0.5}, allocation="random", multiple=1)
    step, _, _ = run_pass(pass_, tiny_program(), context())
    assert step.verify_error <= TOLERANCE
