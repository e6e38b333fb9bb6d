"""low-rank: ranks by energy, ratio or target, and no factors where they do not pay."""

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from graphcomp.errors import PassError
from graphcomp.factors.decompose import Factor, Kind
from graphcomp.factors.layers import layer_macs, planes
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.models import MODELS
from graphcomp.passes import LowRank
from graphcomp.passes.low_rank.layer import split_layers
from graphcomp.pipeline import Pipeline
from graphcomp.pipeline.verify import TOLERANCE, difference
from graphcomp.records import Plan
from tests.removing import digest
from tests.running import run_pass
from tests.tiny import context, tiny_program, traced

KINDS: tuple[Kind, ...] = get_args(Kind)


def made(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Layer -> its ranks."""
    return {
        f["layer"]: (f["rank"], *([f["rank_in"]] if f["rank_in"] else [])) for f in plan.decisions["factors"]
    }


def reasons(plan: Plan) -> dict[str, str]:
    return {k.where: k.reason for k in plan.kept}


def with_spectra(spectra: Mapping[str, list[float]]) -> Program:
    """Linear layers of 16 -> 16 in a row, with these singular values and zeros."""
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in spectra)).double()
    for layer, values in zip(net, spectra.values(), strict=True):
        u, v = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
        s = torch.tensor(values + [0.0] * (16 - len(values)), dtype=torch.float64)
        with torch.no_grad():
            cast(Tensor, layer.weight).copy_(u @ torch.diag(s) @ v)
    return trace(net, torch.zeros(1, 16, dtype=torch.float64))


# ---------------------------------------------------------------------- ranks


def test_energy_by_hand() -> None:
    """4 + 3 + 2 + 1 of 10: .4, .7, .9, 1 are preserved by 1, 2, 3 and 4 directions."""
    root = [math.sqrt(x) for x in (4.0, 3.0, 2.0, 1.0)]
    program = with_spectra({"0": root})
    for energy, rank in ((0.39, 1), (0.41, 2), (0.7 - 1e-9, 2), (0.71, 3), (0.89, 3), (0.95, 4), (1.0, 4)):
        plan = LowRank(energy=energy, multiple=1).plan(program, context())
        assert made(plan) == {"0": (rank,)}, energy
    assert plan.evidence["layers"] == [
        {"layer": "0", "kind": "svd", "full": [16], "kept": [4], "energy": [1.0], "macs": [256, 128]}
    ]


def test_equal_directions() -> None:
    """Ten equal values: eight keep 80 % (a naive sum would say nine)."""
    program = with_spectra({"0": [1.0] * 10})
    # 16 x 16 pays below rank 8, so look at what was wanted
    (kept,) = LowRank(energy=0.8, multiple=1).plan(program, context()).kept
    assert kept.reason == "rank 8 would cost 256 MACs, one weight 256; two factors pay below rank 8.0"


def test_ratio_and_rank() -> None:
    program = traced(nn.Sequential(nn.Conv2d(12, 40, 3), nn.Conv2d(40, 20, 1)), 1, 12, 8, 8)
    assert made(LowRank(ratio=0.1, multiple=1).plan(program, context())) == {"0": (4,), "1": (2,)}
    assert made(LowRank(ratio=0.26, multiple=1).plan(program, context())) == {"0": (11,), "1": (6,)}
    assert made(LowRank(rank=5, multiple=1).plan(program, context())) == {"0": (5,), "1": (5,)}


def test_ranks_are_rounded_up_to_what_the_target_computes() -> None:
    program = traced(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3)), 1, 64, 8, 8)
    for target, rank in (("cpu-avx2", 16), ("cpu-avx512", 16), ("cuda-tf32", 12)):
        plan = LowRank(rank=9).plan(program, context(target=target))
        assert made(plan) == {"0": (rank,), "1": (rank,)}
    assert made(LowRank(rank=9, multiple=5).plan(program, context())) == {"0": (10,), "1": (10,)}


@pytest.mark.parametrize(("kind", "ranks"), [("svd", (9,)), ("spatial", (14,)), ("tucker2", (9, 6))])
def test_kinds_have_full_ranks_of_their_own(kind: Kind, ranks: tuple[int, ...]) -> None:
    """24 x 16 x 3 x 3: min(24, 144), min(48, 72), and (24, 16)."""
    program = traced(nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 1)), 1, 16, 8, 8)
    plan = LowRank(ratio=0.375 if kind != "spatial" else 0.28, kind=kind, multiple=1).plan(program, context())
    assert made(plan)["0"] == ranks
    factor = next(f for f in plan.decisions["factors"] if f["layer"] == "1")
    assert factor["kind"] == "svd"  # a 1x1 has no kernel to split


# ---------------------------------------------------------------------- what does not pay


def test_t1_8_no_factors_that_cost_more() -> None:
    """T1.8, G1.2: 16 x 16 x 3 x 3 pays up to rank 14; the plan says so with numbers."""
    program = traced(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False)), 1, 16, 4, 4)
    plan = LowRank(rank=14, multiple=1).plan(program, context())
    assert made(plan) == {"0": (14,)}
    step, _, result = run_pass(LowRank(rank=14, multiple=1), program, context())
    assert macs(result) == step.after.macs == 14 * (144 + 16) * 16 < macs(program)
    with pytest.raises(PassError) as error:
        Pipeline([LowRank(rank=15, multiple=1)]).run(program, context())
    assert str(error.value).startswith(
        "low-rank: found nothing to change (0: rank 15 would cost 38,400 MACs, one weight 36,864; "
        "two factors pay below rank 14.4), expected something; "
    )
    plan = LowRank(rank=15, multiple=1).plan(program, context())
    assert made(plan) == {} and "36,864" in reasons(plan)["0"]
    rounded = LowRank(rank=9).plan(program, context(target="cpu-avx512"))
    assert reasons(rounded)["0"].startswith("rank 16 would cost 40,960 MACs")


def test_layers_of_other_sorts_are_named() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 32, 3),
        nn.ConvTranspose2d(32, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3),
    )
    plan = LowRank(rank=2, exclude=("3",), include=("[0-3]",), multiple=1).plan(
        traced(net, 1, 8, 12, 12), context()
    )
    assert made(plan) == {"1": (2,)}
    assert reasons(plan) == {
        "0": "a convolution with 8 groups",
        "2": "ConvTranspose2d is neither a convolution nor a linear layer",
        "3": "excluded",
        "4": "not included",
    }
    assert plan.summary == "factored 1 of 5 layers (svd)"


def test_kernels_that_are_not_2d() -> None:
    program = traced(nn.Sequential(nn.Conv1d(16, 32, 5), nn.Conv1d(32, 32, 1)), 1, 16, 20)
    plan = LowRank(rank=4, kind="spatial", multiple=1).plan(program, context())
    assert made(plan) == {"1": (4,)} and reasons(plan) == {"0": "spatial needs a 2-d kernel"}
    for kind in cast(tuple[Kind, ...], ("svd", "tucker2")):
        step, _, _ = run_pass(LowRank(rank=4, kind=kind, multiple=1), program, context())
        assert step.verify_error <= TOLERANCE


def test_weights_of_zeros() -> None:
    program = with_spectra({"0": [], "1": [2.0, 1.0]})
    plan = LowRank(energy=0.9, multiple=1).plan(program, context())
    assert made(plan) == {"0": (1,), "1": (2,)}


# ---------------------------------------------------------------------- targets


def counted(program: Program, counter: str) -> int:
    return macs(program) if counter == "macs" else params_trainable(program)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counter", ["macs", "params"])
@pytest.mark.parametrize(("fraction", "multiple"), [(0.4, 1), (0.7, 4), (0.95, 1)])
def test_a_target_is_met_by_the_largest_energy(
    kind: Kind, counter: str, fraction: float, multiple: int
) -> None:
    """The next larger energy at which any rank changes violates it, and so do all others (brute force)."""
    program = tiny_program()
    budget: Any = {counter: fraction}
    goal = fraction * counted(program, counter)
    plan = LowRank(target=budget, kind=kind, multiple=multiple).plan(program, context())
    energy = plan.evidence["energy"]
    pass_ = LowRank(target=budget, kind=kind, multiple=multiple)
    result = pass_.rewrite(pass_.simulate(program, plan), plan)
    assert counted(result, counter) <= goal
    assert made(plan) == made(LowRank(energy=energy, kind=kind, multiple=multiple).plan(program, context()))
    layers = split_layers(program, kind, multiple, lambda name: None, None)[0]
    rungs = np.unique(np.concatenate([p for layer in layers for p in layer.preserved]))
    for more in rungs[rungs > energy][[0, len(rungs[rungs > energy]) // 2, -1]]:
        other = LowRank(energy=min(float(more), 1.0), kind=kind, multiple=multiple)
        plan = other.plan(program, context())
        assert counted(other.rewrite(other.simulate(program, plan), plan), counter) > goal


def energies_lost(plan: Plan) -> float:
    return -sum(math.log(e) for layer in plan.evidence["layers"] for e in layer["energy"])


def test_greedy_splits_what_loses_least() -> None:
    """Equal layers, one of them nearly of rank 4: it alone is split, as far as that goes."""
    steep, flat = [8.0, 8.0, 8.0, 8.0, 0.01, 0.01], [1.0] * 16
    program = with_spectra({"0": flat, "1": steep, "2": flat})
    plan = LowRank(target="macs:0.85", multiple=1, allocation="greedy").plan(program, context())  # type: ignore[arg-type]
    assert made(plan) == {"1": (4,)}
    assert reasons(plan) == dict.fromkeys(("0", "2"), "the target is met without it")
    assert plan.evidence["energy"] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counter", ["macs", "params"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_greedy_meets_a_target_and_only_just(kind: Kind, counter: str, multiple: int) -> None:
    """With any layer whole it is missed; and no more energy is lost here than by one for all."""
    program = tiny_program()
    budget: Any = {counter: 0.7}
    pass_ = LowRank(target=budget, kind=kind, multiple=multiple, allocation="greedy")
    plan = pass_.plan(program, context())
    result = pass_.rewrite(pass_.simulate(program, plan), plan)
    assert counted(result, counter) <= 0.7 * counted(program, counter)
    layers = {x.name: x for x in split_layers(program, kind, multiple, lambda name: None, None)[0]}
    factors = {f["layer"]: Factor.model_validate(f) for f in plan.decisions["factors"]}
    saved = sum(layers[name].saving(f, counter) for name, f in factors.items())
    needed = 0.3 * counted(program, counter)
    for name, factor in factors.items():
        assert saved - layers[name].saving(factor, counter) < needed, f"{name} could stay whole"
    even = LowRank(target=budget, kind=kind, multiple=multiple).plan(program, context())
    assert energies_lost(plan) <= energies_lost(even) + 1e-9


def test_the_graph_is_scanned_once_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many ranks are compared for a target."""
    scans: list[int] = []

    def counting(program: Program, layers: Any) -> Any:
        scans.append(1)
        return planes(program, layers)

    for module in ("graphcomp.passes.low_rank.layer", "graphcomp.factors.layers"):
        monkeypatch.setattr(f"{module}.planes", counting)
    LowRank(target={"macs": 0.7}, multiple=1, allocation="greedy").plan(tiny_program(), context())
    assert len(scans) == 1


def test_params_count_only_what_trains() -> None:
    """Factoring a frozen layer saves no trainable parameter."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    cast(Tensor, net[0].weight).requires_grad_(False)
    program = traced(net, 1, 32)
    with pytest.raises(PassError, match=r"target params: found 0\.[0-9]+ of the params left"):
        LowRank(target="params:0.1", multiple=1).plan(program, context())  # type: ignore[arg-type]
    plan = LowRank(target="params:0.6", multiple=1).plan(program, context())  # type: ignore[arg-type]
    pass_ = LowRank(rank=1)
    assert params_trainable(pass_.rewrite(program, plan)) <= 0.6 * params_trainable(program)


def test_a_target_out_of_reach() -> None:
    with pytest.raises(PassError) as error:
        LowRank(target={"macs": 0.05}, multiple=4).plan(tiny_program(), context())
    assert str(error.value).startswith("target macs: found 0.288 of the macs left at the lowest ranks")
    assert "expected 0.05; ask for less, include more layers, or set multiple=1" in str(error.value)


# ---------------------------------------------------------------------- the pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_verified(kind: Kind) -> None:
    program = traced(MODELS["resnet20"].factory(), 1, 3, 16, 16)
    before = digest(program)
    step, plan, result = run_pass(LowRank(target={"macs": 0.5}, kind=kind, multiple=2), program, context())
    assert step.verify_error <= TOLERANCE
    assert step.after.macs == macs(result) <= 0.5 * macs(program)
    assert digest(program) == before
    assert sum(layer_macs(program, Factor.model_validate(f)) for f in plan.decisions["factors"]) + sum(
        layer_macs(program, Factor(layer=k.where)) for k in plan.kept
    ) == macs(result)


def test_stem_and_classifier_take_part() -> None:
    """No data is involved, so nothing speaks against them but their cost; `exclude` does."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100)
    )
    program = traced(net, 1, 3, 16, 16)
    assert set(made(LowRank(rank=8).plan(program, context()))) == {"0", "4"}
    assert set(made(LowRank(rank=8, exclude=("0", "4*")).plan(program, context()))) == set()


def test_energy_one_is_the_network() -> None:
    """Where nothing is lost but the directions of no energy, the outputs stay."""
    program = with_spectra({"0": [3.0, 2.0, 1.0], "1": [5.0, 1.0]})
    pass_ = LowRank(energy=1.0, multiple=1)
    plan = pass_.plan(program, context())
    assert made(plan) == {"0": (3,), "1": (2,)}
    assert difference(program, pass_.rewrite(pass_.simulate(program, plan), plan)) < 1e-12


def test_a_plan_is_replayed_from_json() -> None:
    program = tiny_program()
    pass_ = LowRank(ratio=0.3, kind="tucker2", multiple=1)
    plan = pass_.plan(program, context())
    again = Plan.model_validate_json(plan.model_dump_json())
    simulated = pass_.simulate(program, plan)
    assert digest(pass_.rewrite(simulated, again)) == digest(pass_.rewrite(simulated, plan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found neither rank nor ratio nor energy nor target, expected one of them, e.g. energy=0.9"),
        ({"rank": 4, "energy": 0.5}, "found both rank and energy"),
        ({"ratio": 0.0}, "greater than 0"),
        ({"energy": 1.5}, "less than or equal to 1"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rank": 4, "kind": "cp"}, "svd"),
        ({"target": "macs"}, "expected macs:FRACTION"),
        ({"rank": 4, "join": "pad"}, "join"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LowRank(**options)


def test_globs_are_checked() -> None:
    for options in ({"include": "conv9"}, {"exclude": ("conv9",)}):
        with pytest.raises(PassError, match="include/exclude: found no layer that 'conv9' matches"):
            LowRank(rank=2, **cast(Any, options)).plan(tiny_program(), context())
