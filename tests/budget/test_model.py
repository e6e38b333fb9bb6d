"""Predicted time: the operators of a network, the staircase, the fit, what is kept, what removal leaves."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphcomp.base.cache import VARIABLE
from graphcomp.budget.calls import calls
from graphcomp.budget.kernel_fit import MOST_POINTS, computed, design, fit, form_of
from graphcomp.budget.model import CACHES, LatencyModel, cold_bytes
from graphcomp.budget.remaining import LatencyCost, Remaining
from graphcomp.channels import Removal, analyse
from graphcomp.errors import TraceError
from graphcomp.runtime.kernel import Kernel
from graphcomp.runtime.targets import TARGETS
from tests.nets import TRAPS
from tests.removing import half, half_and_whole, random_scores
from tests.stopwatch import Machine, staircase
from tests.tiny import context, tiny_program, traced

AVX2, AVX512, CUDA = TARGETS["cpu-avx2"], TARGETS["cpu-avx512"], TARGETS["cuda-tf32"]
CONV = Kernel("conv", (8, 8), (3, 3), (1, 1), (1, 1), (1,) * 4)

# ---------------------------------------------------------------------- the operators of a network


class Light(nn.Module):
    """Everything that is counted beside layers, and its fused twin."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn, self.free = nn.BatchNorm2d(8), nn.BatchNorm2d(16)
        self.swish, self.pool = nn.Hardswish(), nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))  # normalisation and activation are fused
        x = self.swish(self.b(x))  # not fused
        x = F.relu(x + x * x)  # fused into the addition
        x = self.free(torch.cat([x, x], 1))  # nothing to fold into
        return self.fc(self.pool(x).mean((2, 3)))  # type: ignore[no-any-return]


def test_calls() -> None:
    found = [(c.kernel.describe(), c.into, c.out) for c in calls(traced(Light(), 1, 3, 8, 8))]
    assert found == [
        ("conv k3 s1 @ 8x8", 3, 8),
        ("depthwise k3 s1 @ 8x8", 8, 8),
        ("hardswish @ 8x8", 8, 8),
        ("mul @ 8x8", 8, 8),
        ("add @ 8x8", 8, 8),
        ("concat @ 8x8", 16, 16),
        ("norm @ 8x8", 16, 16),
        ("max_pool k3 s2 @ 8x8", 16, 16),
        ("avg_pool k4 s4 @ 4x4", 16, 16),
        ("linear @ 1", 16, 4),
    ]


class Recurrent(nn.Module):
    """Two layers, of which one also runs from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(6, 16, batch_first=True)
        self.b, self.fc = nn.GRU(16, 8, bidirectional=True, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x)[0])[0])  # type: ignore[no-any-return]


def test_recurrent_layers_are_a_product_and_a_recurrence_for_each_direction() -> None:
    found = [(c.kernel.describe(), c.into, c.out) for c in calls(traced(Recurrent(), 1, 5, 6))]
    assert found == [
        ("linear @ 5", 6, 4 * 16),
        ("lstm @ 5", 16, 16),
        ("linear @ 5", 16, 2 * 3 * 8),
        ("gru @ 5", 8, 8),
        ("gru @ 5", 8, 8),
        ("linear @ 5", 16, 4),
    ]
    assert Kernel("lstm", (5,)).work(16, 16) == 5 * 4 * 16 * 16


def test_what_is_left_of_recurrent_layers_is_known_before_their_units_go() -> None:
    channels = analyse(traced(Recurrent(), 1, 5, 6))
    removal, _ = half(channels).feasible(random_scores(channels))
    left = Remaining(channels).operators(removal)
    assert left == [c.operator for c in calls(removal.apply("test"))]
    assert [op[1:] for op in left if op is not None and op[0].op == "lstm"] == [(8, 8)]


class Activated(nn.Module):
    """Activations where the runtime computes them inside of something else, and where it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.bn, self.free = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.six, self.fc = nn.ReLU6(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.six(self.bn(self.a(x)))  # behind a normalisation that is folded
        x = F.max_pool2d(x, 2)
        x = self.six(x)  # nothing to be inside of
        x = torch.tanh(self.free(x))  # inside a normalisation
        y = self.b(x)
        x = self.six(y) + y  # of a value that something else needs too
        x = F.leaky_relu(x)  # inside an addition
        return torch.sigmoid(self.fc(x.mean((2, 3))))


def test_activations_belong_to_what_computes_them() -> None:
    assert [c.kernel.describe() for c in calls(traced(Activated(), 1, 3, 8, 8))] == [
        "conv k3 s1 + relu6 @ 8x8",
        "max_pool k2 s2 @ 8x8",
        "relu6 @ 4x4",
        "norm + tanh @ 4x4",
        "conv k1 s1 @ 4x4",
        "relu6 @ 4x4",
        "add + leaky_relu @ 4x4",
        "avg_pool k4 s4 @ 4x4",
        "linear + sigmoid @ 1",
    ]


def test_shuffles_move_an_image() -> None:
    """As the selections do that surgery puts in their place; other transpositions are not looked at."""

    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.view(1, 2, 4, 5, 6).transpose(1, 2).reshape(1, 8, 5, 6)
            return y.permute(0, 2, 3, 1)

    assert [(c.kernel.describe(), c.into, c.out) for c in calls(traced(Shuffle(), 1, 8, 5, 6))] == [
        ("move @ 5x6", 8, 8)
    ]


@pytest.mark.parametrize(
    ("layer", "shape", "plane"),
    [
        (nn.Conv2d(4, 6, (5, 3), (2, 3), (1, 2), (1, 2)), (1, 4, 17, 19), (8, 7)),
        (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 7, 7), (7, 7)),
        (nn.Conv1d(4, 6, 4, 2, 1), (1, 4, 16), (8,)),
    ],
)
def test_windows_yield_the_layers_plane(layer: nn.Module, shape: Any, plane: Any) -> None:
    """Padding is derived from planes: that of strides which leave a rest over included."""
    (call,) = calls(traced(nn.Sequential(layer), *shape))
    assert call.kernel.out_plane == plane


def test_functional_and_transposed_layers_are_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.up = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.ConvTranspose2d(8, 6, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(F.conv2d(x, self.weight, stride=2, padding=1))  # type: ignore[no-any-return]

    first, second = calls(traced(Net(), 1, 4, 8, 8))
    assert (first.kernel.stride, first.kernel.out_plane, first.into, first.out) == ((2, 2), (4, 4), 4, 8)
    assert (second.kernel.plane, second.kernel.out_plane, second.into, second.out) == ((8, 8), (4, 4), 6, 8)


@pytest.mark.slow
def test_all_trap_nets_can_be_predicted() -> None:
    model, seen = LatencyModel(AVX2, timer=lambda models, feeds: [1.0, 2.0]), Counter[str]()
    for name in ("residual", "depthwise", "grouped", *list(TRAPS)[::7]):
        if name in TRAPS:
            module, shape = TRAPS[name]()
            program = traced(module, *shape)
            seen.update(c.kernel.op for c in calls(program))
            assert model.predict(program) > 0 or not calls(program)
    assert seen["conv"] and seen["linear"]


# ---------------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    ("kernel", "into", "out", "form", "paid"),
    [
        (CONV, 64, 64, "blocked", (64, 64)),
        (CONV, 52, 60, "blocked", (64, 64)),
        (CONV, 57, 64, "plain", (57, 64)),
        (CONV, 3, 20, "direct", (3, 32)),
        (Kernel("conv", (8, 8), (1, 1), (1, 1), (1, 1), (0,) * 4, 2), 64, 32, "blocked", (64, 32)),
        (Kernel("conv", (8, 8), (1, 1), (1, 1), (1, 1), (0,) * 4, 2), 48, 32, "plain", (48, 32)),
        (Kernel("depthwise", (8, 8), (1, 1), (1, 1), (1, 1), (0,) * 4), 20, 20, "blocked", (32, 32)),
        (Kernel("depthwise", (8, 8), (1, 1), (1, 1), (1, 1), (0,) * 4), 21, 21, "plain", (21, 21)),
        (Kernel("linear", ()), 57, 10, "plain", (57, 10)),
    ],
)
def test_forms(kernel: Kernel, into: int, out: int, form: Any, paid: Any) -> None:
    """BENCHMARKING.md: blocks of 16 with AVX-512; a Cin that is no multiple of 4 leaves the layout."""
    assert form_of(kernel, into, out, AVX512) == form
    assert computed(form, into, out, 16) == paid


def test_gpus_round_both_widths() -> None:
    assert form_of(CONV, 57, 3, CUDA) == "blocked"
    assert computed("blocked", 57, 3, CUDA.multiple) == (60, 4)


# ---------------------------------------------------------------------- the fit


@given(st.lists(st.floats(0, 10), min_size=4, max_size=4), st.sampled_from([1, 8, 16]))
def test_a_fit_of_its_own_form_is_exact(coefficients: list[float], step: int) -> None:
    a, b, c, d = coefficients
    true = lambda x, y: 0.1 + a + b * x / 100 + c * y / 100 + d * x * y / 1e4  # noqa: E731
    points = {(x, y): true(x, y) for x, y in design([(16 * step, 12 * step)], (step, step), False)}
    found = fit(points)
    for x, y in ((step, step), (3 * step, 7 * step), (16 * step, step)):
        assert found(x, y) == pytest.approx(true(x, y), rel=1e-6)


@given(st.lists(st.floats(1e-6, 10), min_size=4, max_size=4))
def test_predictions_never_fall_with_width(times: list[float]) -> None:
    """Whatever was measured: a target's search relies on it."""
    found = fit(dict(zip([(8, 8), (8, 16), (16, 8), (16, 16)], times, strict=True)))
    grid = np.array([[found(x, y) for x in range(1, 40)] for y in range(1, 40)])
    assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
    assert (grid >= 0).all()


@pytest.mark.parametrize(("wrong", "by", "at"), [(8, 0.1, 32), (64, 1.4, 8)])
def test_what_one_point_does_not_tell_of_others(wrong: int, by: float, at: int) -> None:
    """A small time lost in noise bends no large ones, and a large one that was disturbed no small ones."""
    true = {(w, w): 0.05 + 0.95 * (w / 64) ** 2 for w in (8, 16, 32, 64)}
    found = fit(true | {(wrong, wrong): by * true[wrong, wrong]})
    assert found(at, at) == pytest.approx(true[at, at], rel=0.1)


def test_one_point_is_enough() -> None:
    assert fit({(8, 8): 2.0})(8, 8) == pytest.approx(2.0)


def test_design() -> None:
    assert design([(64, 32)], (16, 16), False) == [(32, 16), (32, 32), (64, 16), (64, 32)]
    assert design([(64, 64)], (16, 16), True) == [(32, 32), (64, 64)]
    assert design([(16, 16)], (16, 16), False) == [(16, 16)]
    assert design([(3, 64)], (1, 16), False) == [(1, 32), (1, 64), (3, 32), (3, 64)]
    many = design([(16 * i, 16 * j) for i in range(1, 9) for j in range(1, 9)], (16, 16), False)
    assert len(many) == MOST_POINTS and many[0] == (16, 16) and many[-1] == (128, 128)


# ---------------------------------------------------------------------- the model


def test_prediction_is_exact_on_a_staircase() -> None:
    """The tiny network: every layer's time is of the fitted form, so the sum is right to the last digit."""
    expected = (
        staircase(3, 16, 8, 9 * 64) + 2 * staircase(16, 16, 8, 9 * 64)  # stem, inner, outer
    )  # fmt: skip
    model = LatencyModel(AVX2, timer=Machine(block=8))
    found = sum(
        model.milliseconds(c.kernel, c.into, c.out) for c in calls(tiny_program()) if c.kernel.op == "conv"
    )
    # the stem reads its three channels directly: one block, of which no rounding is known
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.predict(tiny_program()) > expected


@pytest.mark.slow
def test_kept_on_disk() -> None:
    """Another model of the same machine measures nothing; one of other threads or timers' caches does."""
    machine = Machine()
    first = LatencyModel(AVX2, timer=machine).predict(tiny_program())
    asked = machine.asked
    assert asked > 0
    assert LatencyModel(AVX2, timer=machine).predict(tiny_program()) == pytest.approx(first, rel=1e-12)
    assert machine.asked == asked
    LatencyModel(AVX2, threads=2, timer=machine).predict(tiny_program())
    assert machine.asked == 2 * asked
    LatencyModel(AVX2, cold=1 << 20, timer=machine).predict(tiny_program())
    assert machine.asked == 3 * asked


def test_everything_is_measured_with_cold_caches(monkeypatch: Any) -> None:
    """What is read before every run is the network's: of convolutions, linear layers and all the others."""
    asked = []

    def timer(provider: str, threads: int, cold: int) -> Machine:
        asked.append((provider, threads, cold))
        return Machine()

    monkeypatch.setattr("graphcomp.budget.model.race_timer", timer)
    LatencyModel(AVX2, threads=2, cold=1 << 20).predict(traced(Light(), 1, 3, 8, 8))
    assert asked == [("cpu", 2, 1 << 20)]


def test_measured_once() -> None:
    machine = Machine()
    model = LatencyModel(AVX2, timer=machine)
    first, asked = model.predict(tiny_program()), machine.asked
    assert model.predict(tiny_program()) == first and machine.asked == asked


@pytest.mark.slow
def test_a_run_measures_once_without_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one run share what they measured; those of another run do not."""
    monkeypatch.setenv(VARIABLE, "")
    machine = Machine()
    run, other = (replace(context(), timer=machine) for _ in range(2))
    first, asked = run.clock.model(tiny_program()).predict(tiny_program()), machine.asked
    assert run.clock.model(tiny_program()).predict(tiny_program()) == first and machine.asked == asked
    assert other.clock.model(tiny_program()).predict(tiny_program()) == first
    assert machine.asked == 2 * asked


def test_no_channels_take_no_time() -> None:
    assert LatencyModel(AVX2, timer=Machine()).milliseconds(CONV, 0, 8) == 0


def test_cold_bytes() -> None:
    """Of small networks nothing; of large ones at most what a cache holds."""
    assert cold_bytes(tiny_program(), AVX2) == 0
    net = nn.Sequential(nn.Linear(1000, 400), nn.Linear(400, 10))
    assert cold_bytes(traced(net, 1, 1000), AVX2) == 1 << 21
    large = nn.Sequential(nn.Linear(3000, 3000))
    assert cold_bytes(traced(large, 1, 3000), AVX2) == CACHES
    assert cold_bytes(traced(large, 1, 3000), CUDA) == 0


# ---------------------------------------------------------------------- after a removal


@pytest.mark.slow
@pytest.mark.parametrize("join", ["couple", "pad"])
def test_cost_of_a_removal_is_the_smaller_networks(join: Any) -> None:
    """Layers alone: the light operators of a padded addition are estimated, not counted."""
    checked = 0
    for name in list(TRAPS)[::3]:
        module, shape = TRAPS[name]()
        try:
            program = traced(module, *shape)
        except TraceError:
            continue
        channels = analyse(program, join)
        scores = random_scores(channels)
        model = LatencyModel(AVX2, timer=Machine())
        cost = LatencyCost(channels, model)
        assert cost(Removal.of(channels)) == pytest.approx(model.predict(program)), name
        for chosen in (half, half_and_whole):
            drop, _ = chosen(channels).legal(scores).feasible(scores)
            small = calls(drop.apply("test"))
            expected = [(c.into, c.out) for c in small if c.kernel.op in ("conv", "linear")]
            operators = cost.after.operators(drop)[: len(cost.after.calls)]
            found = [op[1:] for op in operators if op is not None and op[0].op in ("conv", "linear")]
            assert found == expected, name
            checked += bool(drop)
    assert checked > 30


def test_layers_that_went_whole_take_no_time() -> None:
    """With them the normalisation and the concatenation in front that worked for them alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3)
            self.norm, self.side, self.head = nn.BatchNorm2d(16), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            made = self.outer(
                F.pad(self.inner(torch.relu(self.norm(torch.cat([x, self.side(x)], 1)))), [1] * 4)
            )
            return self.head(torch.cat([x, made], 1))

    channels = analyse(traced(Net(), 1, 8, 8, 8))
    model = LatencyModel(AVX2, timer=Machine())
    cost = LatencyCost(channels, model)
    outer = [c for group in channels.group_of("outer") for c in group.channels.tolist()]
    drop = Removal.of(channels, outer).legal(random_scores(channels))
    left = [c.node.name for c, o in zip(cost.after.calls, cost.after.operators(drop), strict=True) if o]
    assert set(left) == {"stem", "head", "cat_1"}
    assert cost(drop) < 0.5 * cost(Removal.of(channels))


def test_cost_sees_blocks() -> None:
    """Removing less than a block saves nothing."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3))
    channels = analyse(traced(net, 1, 8, 8, 8))
    cost = LatencyCost(channels, LatencyModel(AVX2, timer=Machine()))
    (group,) = channels.removable
    times = []
    for gone in (0, 4, 8, 12):
        times.append(cost(Removal.of(channels, group.channels[:gone])))
    assert times[0] == times[1] > times[2] == times[3]
