"""Factors and gathers in programs: exact for every kind and geometry, on trap nets and random networks."""

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, cast, get_args

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx, nn

import graphcomp
from graphcomp.channels import analyse
from graphcomp.errors import SurgeryError
from graphcomp.factors.decompose import (
    Factor,
    Kind,
    approximate,
    compose,
    decompose,
    full_ranks,
    read_factors,
)
from graphcomp.factors.layers import can_be, candidates, layer_macs, obstacle, planes
from graphcomp.factors.replacing import layers_of
from graphcomp.factors.surgery import rewrite, simulate
from graphcomp.ir import save
from graphcomp.ir.program import PASS_KEY, Program
from graphcomp.measure.cost import layer_rows, macs, params_trainable
from graphcomp.passes import L1, LowRank
from graphcomp.pipeline.verify import TOLERANCE, check, difference, verify_pass
from graphcomp.records import Plan
from tests.nets import TRAPS, Net, Spec, build, random_cnn
from tests.removing import digest, exact_program, plain_program
from tests.running import run_pass
from tests.tiny import context, tiny_program

KINDS: tuple[Kind, ...] = get_args(Kind)
EVEN, ODD = [0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15]


@dataclasses.dataclass(frozen=True)
class Factoring:
    """`simulate` and `rewrite` as a pass whose plan is the factors."""

    name: ClassVar[str] = "factoring"
    multiple: int = 1

    def simulate(self, program: Program, plan: Sequence[Factor]) -> Program:
        return simulate(program, plan)

    def rewrite(self, program: Program, plan: Sequence[Factor]) -> Program:
        return rewrite(program, plan, self.name, self.multiple)


def rewritten(program: Program, *factors: Factor) -> Program:
    """Simulated, rewritten and checked; equal to what was simulated."""
    before = digest(program)
    simulated = simulate(program, factors)
    result = rewrite(simulated, factors, "test")
    check(result)
    assert difference(simulated.to(torch.float64), result.to(torch.float64)) <= 1e-6
    assert verify_pass(Factoring(), program, factors) <= TOLERANCE
    assert digest(program) == before
    return result


def gathers(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is torch.index_select]


def picked_from(node: fx.Node) -> tuple[str, str]:
    """Name and operator of the node that a gather reads."""
    source = cast(fx.Node, node.args[0])
    return source.name, source.op


def width(program: Program, layer: str) -> tuple[int, int]:
    """(output, input) channels of a layer."""
    n, c = program.tensors[f"{layer}.weight"].shape[:2]
    return n, c


# ---------------------------------------------------------------------- geometry

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(4, 6, 3), (9, 8)),
    "1x1, stride": (nn.Conv2d(4, 6, 1, stride=2, bias=False), (9, 8)),
    "stride and padding": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (9, 8)),
    "all different": (nn.Conv2d(4, 6, (3, 5), (2, 3), (2, 1), (1, 2)), (12, 13)),
    "even kernel": (nn.Conv2d(4, 6, (2, 4), padding=(1, 2)), (7, 8)),
    "asymmetric padding": (nn.Conv2d(4, 6, (2, 4), padding="same"), (7, 8)),
    "same, dilated": (nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(3, 2)), (9, 8)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", dilation=2), (9, 8)),
    "row": (nn.Conv2d(4, 6, (1, 5), padding=(0, 2)), (7, 8)),
    "column": (nn.Conv2d(4, 6, (5, 1), (2, 1), (2, 0)), (7, 8)),
    "reflect": (nn.Conv2d(4, 6, (3, 5), 2, (1, 2), padding_mode="reflect"), (9, 8)),
    "replicate, same": (nn.Conv2d(4, 6, (4, 3), padding="same", padding_mode="replicate"), (9, 8)),
    "circular": (nn.Conv2d(4, 6, (5, 3), (1, 2), (2, 1), padding_mode="circular"), (9, 8)),
    "more padding than kernel": (nn.Conv2d(4, 6, 3, padding=4), (5, 5)),
    "1d": (nn.Conv1d(4, 6, 4, 2, 3, 2), (11,)),
    "3d": (nn.Conv3d(4, 6, (2, 3, 2), (1, 2, 1), (1, 0, 2)), (4, 6, 5)),
    "linear": (nn.Linear(4, 6), ()),
    "linear without bias": (nn.Linear(4, 6, bias=False), ()),
}
SPLITS = [
    (name, kind)
    for name, (layer, _) in LAYERS.items()
    for kind in KINDS
    if can_be(cast(Tensor, layer.weight).shape, kind)
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rank", [2, 100])
@pytest.mark.parametrize(("name", "kind"), SPLITS)
def test_factors_are_the_layer_with_their_product(name: str, kind: Kind, rank: int) -> None:
    """At full rank: the layer itself."""
    layer, plane = LAYERS[name]
    layer = layer.double()
    weight = cast(Tensor, layer.weight)
    x = torch.randn(3, 4, *plane, dtype=torch.float64)
    factor = Factor(layer="x", rank=rank, kind=kind)
    weights = decompose(weight, factor)
    found = nn.Sequential(*layers_of(layer, weights, kind))(x)
    if rank > 2:
        assert (found - layer(x)).abs().max() < 1e-12
    with torch.no_grad():
        full, weight.data = weight.data, compose(weights, kind)
        expected = layer(x)
        weight.data = full
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-13


def test_modules_of_a_factored_layer() -> None:
    """Stride, padding and dilation go with the kernel, the bias with the last; a 1x1 pads nothing."""
    conv = nn.Conv2d(8, 6, (3, 5), (2, 1), (1, 2), (1, 2), padding_mode="reflect")
    made = {k: layers_of(conv, decompose(conv.weight, Factor(layer="x", rank=2, kind=k)), k) for k in KINDS}
    shown = {k: [str(m) for m in modules] for k, modules in made.items()}
    assert shown == {
        "svd": [
            "Conv2d(8, 2, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False, "
            "padding_mode=reflect)",
            "Conv2d(2, 6, kernel_size=(1, 1), stride=(1, 1))",
        ],
        "spatial": [
            "Conv2d(8, 2, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), bias=False, "
            "padding_mode=reflect)",
            "Conv2d(2, 6, kernel_size=(1, 5), stride=(1, 1), padding=(0, 2), dilation=(1, 2), "
            "padding_mode=reflect)",
        ],
        "tucker2": [
            "Conv2d(8, 2, kernel_size=(1, 1), stride=(1, 1), bias=False)",
            "Conv2d(2, 2, kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False, "
            "padding_mode=reflect)",
            "Conv2d(2, 6, kernel_size=(1, 1), stride=(1, 1))",
        ],
    }


# ---------------------------------------------------------------------- networks of every kind


def some_factors(program: Program, seed: int) -> list[Factor]:
    """Random factors for most layers; readers of one tensor often keep the same channels."""
    rng = np.random.default_rng(seed)
    keeps: dict[Any, list[int]] = {}
    factors = []
    for layer in (name for name, reason in candidates(program).items() if reason is None):
        shape = program.tensors[f"{layer}.weight"].shape
        c = shape[1]
        key = next(n for n in program.graph.nodes if n.target == layer).args[0]
        if key not in keeps or rng.random() < 0.3:
            size = max(1, int(c * rng.uniform(0.5, 1)))
            keeps[key] = sorted(rng.choice(c, size, replace=False).tolist())
        keep = keeps[key] if rng.random() < 0.8 and keeps[key][-1] < c else None
        kind = cast(Kind, rng.choice([k for k in KINDS if can_be(shape, k)]))
        rank = int(rng.integers(1, full_ranks(shape, kind)[0] + 2)) if rng.random() < 0.7 else None
        rank_in = int(rng.integers(1, c + 2)) if kind == "tucker2" and rank else None
        factors.append(Factor(layer=layer, keep=keep, rank=rank, kind=kind, rank_in=rank_in))
    return factors


def seen(program: Program, factors: Sequence[Factor], result: Program) -> Counter[str]:
    """What a rewrite did, so that a test over many networks is known to have tried everything."""
    rows = {r.name: r.out_channels for r in layer_rows(result)}
    before = {r.name: r.out_channels for r in layer_rows(program)}
    found: dict[str, int] = {k: sum(f.kind == k and f.rank is not None for f in factors) for k in KINDS}
    found["gathers"] = len(gathers(result)) - len(gathers(program))
    found["narrower"] = sum(rows[name] < n for name, n in before.items() if name in rows)
    return Counter(found)


@pytest.mark.slow
def test_trap_nets() -> None:
    total: Counter[str] = Counter()
    for name, built in TRAPS.items():
        program = exact_program(built())
        factors = some_factors(program, seed=len(name))
        simulated = simulate(program, factors)
        result = rewrite(simulated, factors, "test")
        check(result)
        assert difference(simulated, result) <= TOLERANCE, name
        total += seen(program, factors, result)
    assert all(total[k] >= 20 for k in ("gathers", "narrower", *KINDS)), total


@pytest.mark.slow
def test_random_networks() -> None:
    """T0.7: nothing depends on a known architecture."""
    total: Counter[str] = Counter()

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(random_cnn())
    def check_one(spec: Spec) -> None:
        program = exact_program(build(spec))
        factors = some_factors(program, spec["seed"])
        simulated = simulate(program, factors)
        result = rewrite(simulated, factors, "test", multiple=1 + spec["seed"] % 3)
        check(result)
        assert difference(simulated, result) <= TOLERANCE
        again = some_factors(result, spec["seed"] + 1)
        twice = simulate(result, again)
        assert difference(twice, rewrite(twice, again, "test")) <= TOLERANCE
        total.update(seen(program, factors, result))

    check_one()
    assert all(total[k] >= 5 for k in ("gathers", "narrower", *KINDS)), total


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_of_a_network(kind: Kind) -> None:
    """Scrambled and calibrated as in every run; the linear layer has no kernel and stays."""
    program = tiny_program()
    layers = [n for n in candidates(program) if can_be(program.tensors[f"{n}.weight"].shape, kind)]
    result = rewritten(program, *(Factor(layer=n, rank=3, kind=kind) for n in layers))
    assert macs(result) == sum(
        layer_macs(program, Factor(layer=n, rank=3 if n in layers else None, kind=kind))
        for n in candidates(program)
    )
    full = [Factor(layer=n, rank=10_000, kind=kind) for n in layers]
    exact = program.to(torch.float64)
    assert difference(exact, rewrite(simulate(exact, full), full, "test")) < 1e-12


# ---------------------------------------------------------------------- channels that are not read


def two_readers() -> Net:
    """A stem of 16 channels, read by `a` and `b`."""
    return Net(
        lambda m, x: (m.a(y := m.act(m.stem(x))), m.b(y)),
        stem=nn.Conv2d(3, 16, 3, padding=1),
        act=nn.ReLU(),
        a=nn.Conv2d(16, 8, 3),
        b=nn.Conv2d(16, 4, 1),
    )


def test_t1_6_only_the_reader_changes() -> None:
    """T1.6: input channels go, not filters; the producer is left alone while anybody reads it."""
    program = plain_program(two_readers(), 1, 3, 8, 8)
    result = rewritten(program, Factor(layer="a", keep=[0, 3, 4, 9], rank=2))
    assert [width(result, n) for n in ("stem", "a.0", "a.1", "b")] == [(16, 3), (2, 4), (8, 2), (4, 16)]
    assert torch.equal(result.tensors["stem.weight"], program.tensors["stem.weight"])
    (picked,) = gathers(result)
    index = cast(fx.Node, picked.args[2])
    assert result.tensors[str(index.target)].tolist() == [0, 3, 4, 9]
    assert result.tensors["a.1.bias"].tolist() == program.tensors["a.bias"].tolist()


def test_what_nobody_reads_is_not_made() -> None:
    """METHODS 1.5: channels outside of both readers' keep lists go with their producer."""
    program = plain_program(two_readers(), 1, 3, 8, 8)
    both = (Factor(layer="a", keep=EVEN), Factor(layer="b", keep=[0, 1, 2, 4], rank=2))
    result = rewritten(program, *both)
    assert width(result, "stem") == (9, 3)
    assert [width(result, n) for n in ("a", "b.0")] == [(8, 8), (2, 4)]
    assert [picked_from(n)[0] for n in gathers(result)] == ["act", "act"]


STATISTICS = {
    "group_norm": lambda m, y: m.norm(y),
    "layer_norm": lambda m, y: nn.functional.layer_norm(y.movedim(1, -1), (16,)).movedim(-1, 1),
    "softmax": lambda m, y: y.softmax(1),
    "mean": lambda m, y: y - y.mean(1, keepdim=True),
}


@pytest.mark.parametrize("how", STATISTICS)
def test_statistics_over_channels_read_all_of_them(how: str) -> None:
    """What the layer behind them does not read is in the statistics all the same."""
    net = Net(
        lambda m, x: m.a(STATISTICS[how](m, m.stem(x))),
        stem=nn.Conv2d(3, 16, 1),
        norm=nn.GroupNorm(4, 16),
        a=nn.Conv2d(16, 4, 3),
    )
    result = rewritten(plain_program(net, 1, 3, 6, 6), Factor(layer="a", keep=[0, 3, 5]))
    assert (width(result, "stem"), width(result, "a")) == ((16, 3), (4, 3))


def test_readers_that_read_the_same_share_one_gather() -> None:
    net = Net(
        lambda m, x: (m.a(y := m.stem(x)), m.b(y), m.c(y)),
        stem=nn.Conv2d(3, 8, 1),
        a=nn.Conv2d(8, 4, 3),
        b=nn.Conv2d(8, 4, 1),
        c=nn.Conv2d(8, 4, 1),
    )
    program = plain_program(net, 1, 3, 6, 6)
    result = rewritten(program, Factor(layer="a", keep=[1, 5], rank=1), Factor(layer="b", keep=[1, 5]))
    assert len(gathers(result)) == 1 and len(gathers(result)[0].users) == 2
    alone = rewritten(program, *(Factor(layer=n, keep=[1, 5]) for n in "abc"))
    assert gathers(alone) == [] and width(alone, "stem") == (2, 3)


def test_a_gather_is_not_shared_across_a_write() -> None:
    """`a` reads before, `b` after an in-place ReLU of the same tensor."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.stem(x)
        a = m.a(y)
        z = F.relu(y, inplace=True)
        return a, m.b(y), z

    net = Net(forward, stem=nn.Conv2d(3, 8, 1), a=nn.Conv2d(8, 4, 3), b=nn.Conv2d(8, 4, 1))
    result = rewritten(
        plain_program(net, 1, 3, 6, 6), Factor(layer="a", keep=[1, 5]), Factor(layer="b", keep=[1, 5])
    )
    assert len(gathers(result)) == 2


def test_a_gather_of_a_gather_is_one() -> None:
    """Twice in a row, as in two steps of a pipeline: picked once, from the tensor itself."""
    program = plain_program(two_readers(), 1, 3, 8, 8)
    once = rewritten(program, Factor(layer="a", keep=ODD))
    twice = rewritten(once, Factor(layer="a", keep=[0, 2, 7]))
    (picked,) = gathers(twice)
    assert picked_from(picked)[0] == "act"
    assert twice.tensors[str(cast(fx.Node, picked.args[2]).target)].tolist() == [1, 5, 15]
    assert len([n for n in twice.tensors if n.startswith("graphcomp_index")]) == 1


def test_a_gather_is_not_passed_over_a_write() -> None:
    """The tensor that it picked from is written in place before the reader."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = m.stem(x)
        picked = torch.index_select(y, 1, m.order)
        z = F.relu(y, inplace=True)
        return m.a(picked), z

    net = Net(forward, stem=nn.Conv2d(3, 8, 1), a=nn.Conv2d(4, 4, 3), order=torch.tensor([6, 1, 0, 3]))
    result = rewritten(plain_program(net, 1, 3, 6, 6), Factor(layer="a", keep=[0, 3]))
    assert len(gathers(result)) == 2


@pytest.mark.parametrize("index", [{"dim": 1, "index": None}, {"dim": -3, "index": None}])
def test_an_index_select_of_the_network_itself(index: dict[str, Any]) -> None:
    net = Net(
        lambda m, x: m.a(torch.index_select(m.stem(x), **{**index, "index": m.order})),
        stem=nn.Conv2d(3, 8, 1),
        a=nn.Conv2d(4, 4, 3),
        order=torch.tensor([6, 1, 0, 6]),
    )
    program = plain_program(net, 1, 3, 6, 6)
    assert width(rewritten(program, Factor(layer="a", keep=[0, 1])), "a") == (4, 2)


def test_residual_streams_keep_what_any_block_reads() -> None:
    """Channel 0 is read by the block only, channel 1 by the classifier only, 2 and 3 by nobody."""
    net = Net(
        lambda m, x: m.fc((y := m.stem(x)).add(m.outer(m.inner(y).relu())).mean((2, 3))),
        stem=nn.Conv2d(3, 6, 1),
        inner=nn.Conv2d(6, 5, 3, padding=1),
        outer=nn.Conv2d(5, 6, 1),
        fc=nn.Linear(6, 3),
    )
    factors = (Factor(layer="inner", keep=[0, 4, 5]), Factor(layer="fc", keep=[1, 4, 5], rank=2))
    result = rewritten(plain_program(net, 1, 3, 6, 6), *factors)
    assert [width(result, n) for n in ("stem", "outer", "inner", "fc.0")] == [(4, 3), (4, 5), (5, 3), (2, 3)]
    assert len(gathers(result)) == 2


def test_features_behind_a_flatten() -> None:
    """T0.4: `keep` names columns; a channel goes when none of its positions is read."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    program = plain_program(net, 1, 3, 3, 3)
    part = [*range(0, 9), *range(18, 22)]  # all of channel 0, a part of 2
    result = rewritten(program, Factor(layer="3", keep=part))
    assert (width(result, "0"), width(result, "3")) == ((2, 3), (5, 13))
    whole = rewritten(program, Factor(layer="3", keep=[*range(0, 9), *range(18, 27)], rank=3))
    assert gathers(whole) == [] and width(whole, "3.0") == (3, 18)


def test_tokens() -> None:
    """A linear layer reads along the last axis, whatever is in front of it."""
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 2))
    program = plain_program(net, 1, 7, 8)
    result = rewritten(
        program, Factor(layer="0", keep=[0, 7], rank=2), Factor(layer="2", keep=[1, 2, 3], rank=2)
    )
    assert [width(result, n) for n in ("0.0", "0.1", "2.0", "2.1")] == [(2, 2), (3, 2), (2, 3), (6, 2)]
    assert layer_macs(program, Factor(layer="2", rank=2)) == 7 * 2 * (12 + 6)


def test_the_image_cannot_get_narrower() -> None:
    program = plain_program(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)), 1, 3, 6, 6)
    result = rewritten(program, Factor(layer="0", keep=[0, 2]))
    assert [picked_from(n)[1] for n in gathers(result)] == ["placeholder"]


def test_a_layer_called_twice() -> None:
    """Both calls go through the same factors and each has a gather of its own input."""
    net = Net(
        lambda m, x: m.fc(m.conv(m.conv(m.stem(x)).relu()).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 1),
        conv=nn.Conv2d(8, 8, 3, padding=1),
        fc=nn.Linear(8, 2),
    )
    program = plain_program(net, 1, 3, 6, 6)
    factor = Factor(layer="conv", keep=[0, 2, 3, 5, 6], rank=3)
    result = rewritten(program, factor)
    found = planes(result, ["conv.0", "conv.1"])
    assert [len(at) for at in found.values()] == [2, 2] and len(gathers(result)) == 2
    dense = {r.name: r.macs for r in layer_rows(program)}
    assert macs(result) == dense["stem"] + dense["fc"] + layer_macs(program, factor)


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (2, 6), (4, 8), (16, 8)])
def test_widths_are_rounded_up_to_the_multiple(multiple: int, left: int) -> None:
    """Some channels that nobody reads stay, since an odd width is no faster."""
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
    program = plain_program(net, 1, 3, 6, 6)
    factors = [Factor(layer="2", keep=[0, 4, 5, 11, 15])]
    result = rewrite(simulate(program, factors), factors, "test", multiple)
    assert width(result, "0")[0] == left and width(result, "2")[1] == 5
    assert len(gathers(result)) == (left > 5)
    assert verify_pass(Factoring(multiple), program, factors) <= TOLERANCE


def test_one_weight_again_where_few_rows_are_left() -> None:
    """Rank 6 saves on 16 rows; of the 4 rows that are read, one weight is cheaper than two factors."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.Flatten())
    program = plain_program(net, 1, 3, 6, 6)
    few = rewritten(program, Factor(layer="0", rank=6), Factor(layer="2", keep=[0, 1, 5, 8]))
    assert width(few, "0") == (4, 3)
    some = rewritten(program, Factor(layer="0", rank=6), Factor(layer="2", keep=list(range(12))))
    assert [width(some, n) for n in ("0.0", "0.1")] == [(6, 3), (12, 6)]
    assert macs(few) < macs(some)


# ---------------------------------------------------------------------- what is refused


def refused(module: nn.Module, layer: str, shape: tuple[int, ...] = (1, 4, 6, 6)) -> str:
    program = plain_program(module, *shape)
    reason = obstacle(program, layer)
    assert reason is not None
    for verb in (simulate, lambda p, f: rewrite(p, f, "test")):
        with pytest.raises(SurgeryError, match=f"{layer}: found a factor, expected none"):
            verb(program, [Factor(layer=layer, rank=1)])
    return reason


class OwnConv(nn.Conv2d):
    """Whose forward is not a convolution's."""


def test_layers_that_must_stay() -> None:
    assert refused(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0") == "a convolution with 2 groups"
    assert "ConvTranspose2d is neither" in refused(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "0")
    assert "ReLU is neither" in refused(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), "1")
    assert "no layer that the network calls" in refused(nn.Sequential(nn.Conv2d(4, 4, 3)), "conv9")
    hooked = nn.Sequential(nn.Conv2d(4, 4, 3))
    hooked[0].register_forward_hook(lambda m, i, o: o + 1)
    assert refused(hooked, "0") == "it has forward hooks"
    used = Net(lambda m, x: m.conv(x) * m.conv.weight.mean(), conv=nn.Conv2d(4, 4, 3))
    assert refused(used, "conv") == "its weight is also used as a tensor"


def test_tied_weights_stay() -> None:
    """One factored and the other not would need both, and would no longer be one parameter."""
    program = plain_program(TRAPS["tied-convs"]()[0], *TRAPS["tied-convs"]()[1])
    tied = {n: r for n, r in candidates(program).items() if r is not None}
    assert len(tied) == 2 and all("its weight is tied to" in r for r in tied.values())


def test_candidates_are_all_layers_in_order() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(96, 2))
    program = plain_program(net, 1, 4, 6, 6)
    assert candidates(program) == {"0": "a convolution with 4 groups", "1": None, "3": None}


def test_factors_that_do_not_fit() -> None:
    program = tiny_program()
    for factors, message in (
        ([Factor(layer="inner", keep=[3, 16])], "inner: found input channel 16, expected 0 to 15"),
        ([Factor(layer="fc", rank=2, kind="spatial")], "fc: found spatial .* expected a 2-d kernel; use svd"),
        ([Factor(layer="fc", rank=2, kind="tucker2")], "fc: found tucker2 .* expected a kernel; use svd"),
        ([Factor(layer="fc", rank=2), Factor(layer="fc")], "fc: found two factors, expected one"),
    ):
        for verb in (simulate, lambda p, f: rewrite(p, f, "test")):
            with pytest.raises(SurgeryError, match=message):
                verb(program, factors)


# ---------------------------------------------------------------------- a program like any other


def test_printed() -> None:
    program = plain_program(two_readers(), 1, 3, 8, 8)
    factors = [Factor(layer="a", keep=[0, 3, 4], rank=2, kind="spatial")]
    result = rewrite(simulate(program, factors), factors, "test")
    assert str(result).splitlines() == [
        "%x: 1x3x8x8 = input x",
        "%stem: 1x16x8x8 = conv 3->16 k3 s1 (%x)",
        "%act: 1x16x8x8 = relu (%stem)",
        "%graphcomp_index_a: 3 = tensor graphcomp_index_a",
        "%index_select: 1x3x8x8 = index_select (%act, 1, %graphcomp_index_a)",
        "%a_0: 1x2x6x8 = conv 3->2 k3x1 s1 (%index_select)",
        "%a_1: 1x8x6x6 = conv 2->8 k1x3 s1 (%a_0)",
        "%b: 1x4x8x8 = conv 16->4 k1 s1 (%act)",
        "%output: tuple = output ([%a_1, %b])",
    ]
    made = {n.name for n in result.graph.nodes if n.meta[PASS_KEY] == "test"}
    assert made == {"graphcomp_index_a", "index_select", "a_0", "a_1"}


def test_nothing_to_do() -> None:
    """No factors, and factors that keep all: the same program."""
    program = tiny_program()
    for factors in ([], [Factor(layer="inner")], [Factor(layer="inner", keep=list(range(16)))]):
        result = rewrite(simulate(program, factors), factors, "test")
        assert digest(result) == digest(program)


def test_t1_13_twice_the_same_and_the_input_untouched() -> None:
    """T1.13: run twice, the input is bitwise what it was, and so is the result."""
    program = tiny_program()
    before = digest(program)
    factors = [Factor(layer="inner", keep=EVEN, rank=3), Factor(layer="outer", rank=2, kind="tucker2")]
    first, second = (rewrite(simulate(program, factors), factors, "test") for _ in range(2))
    assert digest(program) == before
    assert digest(first) == digest(second)
    state = torch.get_rng_state()
    rewrite(simulate(program, factors), factors, "test")
    assert torch.equal(torch.get_rng_state(), state)


def test_trains_and_stays_frozen() -> None:
    """T0.8: one optimiser step after the rewrite; a frozen weight gives frozen factors."""
    program = tiny_program()
    program.tensors["outer.weight"].requires_grad_(False)
    factors = [Factor(layer="inner", keep=EVEN, rank=3), Factor(layer="outer", rank=2)]
    result = rewrite(simulate(program, factors), factors, "test")
    trainable = {n for n, p in result.module.named_parameters() if p.requires_grad}
    assert {"inner.0.weight", "inner.1.weight"} <= trainable
    assert not {"outer.0.weight", "outer.1.weight"} & trainable
    module = result.module.train()
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1, momentum=0.9)
    module(torch.randn(4, 3, 8, 8)).square().mean().backward()
    before = result.tensors["inner.0.weight"].clone()
    optimiser.step()
    assert not torch.equal(result.tensors["inner.0.weight"], before)
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_later_passes_work_on_it() -> None:
    """Ranks are channels as any other to the analysis; factors can be factored again."""
    factors = [Factor(layer="inner", keep=EVEN, rank=8), Factor(layer="outer", rank=6, kind="tucker2")]
    program = tiny_program()
    result = rewrite(simulate(program, factors), factors, "test")
    assert {"inner.0", "outer.0", "outer.1"} <= {g.name for g in analyse(result).removable}
    step, _, thinner = run_pass(L1(ratio=0.5, multiple=1), result, context())
    assert step.verify_error <= TOLERANCE
    assert width(thinner, "inner.0")[0] == 4 and width(thinner, "outer.1") == (3, 3)
    step, _, again = run_pass(LowRank(rank=2, multiple=1, include=("outer.1",)), result, context())
    assert step.verify_error <= TOLERANCE
    assert {"outer.1.0", "outer.1.1"} <= set(candidates(again))


LOADER = """
import sys, torch
import graphcomp
program = graphcomp.load(sys.argv[1])
outputs = program(torch.load(sys.argv[2], weights_only=True))
torch.save(outputs, sys.argv[3])
"""


@pytest.mark.slow
def test_t1_15_reload_in_a_fresh_process(tmp_path: Path) -> None:
    """T1.15: from JSON and tensors, without the model's source; bitwise the same outputs."""
    factors = [
        Factor(layer="inner", keep=EVEN, rank=3),
        Factor(layer="outer", keep=ODD, rank=4, kind="spatial"),
        Factor(layer="fc", keep=[0, 1, 2], rank=2),
    ]
    program = tiny_program()
    result = rewrite(simulate(program, factors), factors, "test")
    save(result, tmp_path / "program")
    x = torch.randn(3, 3, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    with torch.no_grad():
        expected = result(x)
    paths = [str(tmp_path / name) for name in ("program", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", LOADER, *paths], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), expected)
    assert digest(graphcomp.load(tmp_path / "program")) == digest(result)


@pytest.mark.slow
def test_onnx_nodes_are_attributed(tmp_path: Path) -> None:
    factors = [Factor(layer="inner", keep=EVEN, rank=3), Factor(layer="fc", rank=2)]
    program = tiny_program()
    result = rewrite(simulate(program, factors), factors, "cc")
    graphcomp.export_onnx(result, tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    made = {
        (n.op_type, props["graphcomp.module"])
        for n in nodes
        if (props := {p.key: p.value for p in n.metadata_props})["graphcomp.pass"] == "cc"
    }
    heavy = {(op, module) for op, module in made if op in ("Conv", "Gemm", "MatMul", "Gather")}
    assert {module for _, module in heavy} == {"inner.0", "inner.1", "index_select", "fc.0", "fc.1"}


# ---------------------------------------------------------------------- regions


def compressed(program: Program, factors: Sequence[Factor]) -> Program:
    result = rewrite(simulate(program, factors), factors, "cc")
    decisions = {"factors": [f.model_dump(mode="json") for f in factors]}
    plan = Plan(name="cc", decisions=decisions, summary="all of it").model_dump(mode="json")
    return Program(result.module, result.example_inputs, (*program.history, plan))


def region(dense: Program, small: Program, globs: Sequence[str]) -> Program:
    """The dense network with the choices of the small one in a region of it, read from its history."""
    factors = read_factors(small.history[-1]["decisions"])
    inside = [f for f in factors if any(fnmatch(f.layer, g) for g in globs)]
    return rewrite(simulate(dense, inside), inside, "cc")


FACTORS = [
    Factor(layer="stem", rank=4),
    Factor(layer="inner", keep=EVEN, rank=3),
    Factor(layer="outer", keep=ODD, rank=4),
    Factor(layer="fc", keep=[0, 5, 6]),
]


def test_t1_14_a_region_from_two_saved_programs(tmp_path: Path) -> None:
    """METHODS 1.7: any region is the direct compression of it, none is the dense program, all is all."""
    dense = tiny_program()
    save(dense, tmp_path / "dense")
    save(compressed(dense, FACTORS), tmp_path / "small")
    dense, small = graphcomp.load(tmp_path / "dense"), graphcomp.load(tmp_path / "small")
    inside = [f for f in FACTORS if f.layer in ("inner", "outer")]
    found = region(dense, small, ["inner", "out*"])
    assert digest(found) == digest(rewrite(simulate(dense, inside), inside, "cc"))
    assert digest(region(dense, small, ["*"])) == digest(small)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(region(dense, small, [])(x), dense(x))


def test_g1_9_savings_of_regions_add_up() -> None:
    """Where no producer is shared, what regions save is what all of it saves."""
    dense = tiny_program()
    factors = [Factor(layer=n, rank=2) for n in ("stem", "inner", "outer", "fc")]
    small, size = compressed(dense, factors), params_trainable(dense)
    saved = [size - params_trainable(region(dense, small, [f.layer])) for f in factors]
    assert size - sum(saved) == params_trainable(small)


def test_approximate_is_what_simulate_writes() -> None:
    program = tiny_program()
    simulated = simulate(program, FACTORS)
    for factor in FACTORS:
        name = f"{factor.layer}.weight"
        assert torch.equal(simulated.tensors[name], approximate(program.tensors[name], factor))
    untouched = [n for n in program.tensors if n not in {f"{f.layer}.weight" for f in FACTORS}]
    assert all(torch.equal(simulated.tensors[n], program.tensors[n]) for n in untouched)
    assert [n.name for n in simulated.graph.nodes] == [n.name for n in program.graph.nodes]
