"""Statistics from one pass over the data: as numpy computes them, whatever the batches and layouts."""

import json
import math
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcomp.base.cache import VARIABLE
from graphcomp.data.split import Split
from graphcomp.errors import AnalysisError, DataError
from graphcomp.ir import trace
from graphcomp.ir.program import Program
from graphcomp.measure import calibrate
from graphcomp.measure.calibrate import BATCHES, batch_size, collect, watch
from graphcomp.measure.statistics import Covariance, Request, Zeros
from tests.nets import Net, scramble
from tests.tiny import traced


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the computation; test_cached_* give their own folder."""
    monkeypatch.setenv(VARIABLE, "")


def split(x: Tensor) -> Split:
    """Unlabelled samples that are exactly `x`."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    return Split(labels, np.arange(len(x)), lambda i: (x[torch.from_numpy(i)],), labelled=False)


def covariance(program: Program, x: Tensor, node: str, dim: int = 1, **options: Any) -> Covariance:
    request = Request(node, "covariance", dim)
    return cast(Covariance, collect(program, split(x), [request], **options)[request])


def zeros(program: Program, x: Tensor, node: str, dim: int = 1, **options: Any) -> Zeros:
    request = Request(node, "zeros", dim)
    return cast(Zeros, collect(program, split(x), [request], **options)[request])


def identity(*shape: int) -> Program:
    """A network whose node `_0` yields its input."""
    return traced(nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(math.prod(shape), 2)), 1, *shape)


def conv_net() -> Program:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1))
    return traced(scramble(net, 1), 1, 3, 8, 8)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Relative to the largest entry."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# ---------------------------------------------------------------------- covariance


@pytest.mark.parametrize(
    ("shape", "dim", "pooled"),
    [
        ((5,), 1, ()),
        ((5, 4, 3), 1, (2, 3)),
        ((5, 7), 1, (2,)),
        ((7, 5), -1, (1,)),
        ((7, 5), 2, (1,)),
        ((5, 2, 3, 2), 1, (2, 3, 4)),
        ((3, 5, 2), 2, (1, 3)),
    ],
)
def test_covariance_is_that_of_numpy(shape: tuple[int, ...], dim: int, pooled: tuple[int, ...]) -> None:
    """T5.2: the response matrix is [m, n]: the largest value over all positions."""
    x = torch.randn(50, *shape) * 3 + 1
    a = x.double().numpy().max(pooled) if pooled else x.double().numpy()
    assert a.shape == (50, 5)
    found = covariance(identity(*shape), x, "_0", dim, batch=7)
    assert found.samples == 50
    assert found.mean.dtype == found.matrix.dtype == torch.float64
    np.testing.assert_allclose(found.mean.numpy(), a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.matrix.numpy(), np.cov(a, rowvar=False, ddof=1), rtol=0, atol=1e-13)
    assert torch.equal(found.matrix, found.matrix.T)


def test_t5_2_one_peak_counts_in_full() -> None:
    x = torch.zeros(20, 2, 8, 8)
    x[:10, 0, 3, 5] = 4.0
    x[10:, 1, 7, 0] = 6.0
    found = covariance(identity(2, 8, 8), x, "_0")
    assert found.mean.tolist() == [2.0, 3.0]
    assert torch.allclose(found.matrix, torch.tensor([[4.0, -6.0], [-6.0, 9.0]]).double() * 20 / 19)


def test_t5_1_a_constant_added_to_a_response_changes_nothing() -> None:
    """Centred second moments of the data's responses, not of the weights."""
    program, x = conv_net(), torch.randn(100, 3, 8, 8)
    before = covariance(program, x, "_0")
    bias = cast(Tensor, program.layer("0").bias)
    bias.data[2] += 1.0
    after = covariance(program, x, "_0")
    assert float(after.mean[2] - before.mean[2]) == pytest.approx(1.0, abs=1e-6)
    assert close(after.matrix, before.matrix, 1e-6)


def test_t5_3_responses_are_the_layers_own() -> None:
    """The scale of the normalisation behind a convolution is not in its node's output."""
    program, x = conv_net(), torch.randn(64, 3, 8, 8)
    before = covariance(program, x, "_0"), covariance(program, x, "_1")
    cast(Tensor, program.layer("1").weight).data[3] *= 100
    after = covariance(program, x, "_0"), covariance(program, x, "_1")
    assert torch.equal(after[0].matrix, before[0].matrix)
    assert float(after[1].matrix[3, 3] / before[1].matrix[3, 3]) == pytest.approx(1e4, rel=1e-5)


def test_t5_11_an_offset_does_not_cancel_the_variance() -> None:
    """Samples that float32 holds exactly, with and without the offset."""
    x = (torch.randn(500, 6) * 64).round() / 64
    assert torch.equal((x + 1e4) - 1e4, x)
    plain, offset = (covariance(identity(6), x + shift, "_0", batch=64) for shift in (0.0, 1e4))
    values = [torch.linalg.eigvalsh(c.matrix) for c in (plain, offset)]
    assert close(offset.matrix, plain.matrix, 1e-12)
    assert float((values[1] / values[0] - 1).abs().max()) < 1e-6
    assert torch.allclose(offset.mean, plain.mean + 1e4, rtol=1e-14)


def test_t5_11_whatever_the_first_sample_is() -> None:
    """It gives the shift, so it may be as far from all others as it likes."""
    x = torch.randn(300, 4) + 1e4
    x[0] = -1e4
    expected = np.cov(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(covariance(identity(4), x, "_0").matrix.numpy(), expected, rtol=1e-10)


def test_constant_channels_have_no_variance_at_all() -> None:
    """Exactly none, so that a dead channel is seen as one: also if the constant is not a round number."""
    x = torch.randn(200, 3)
    x[:, 1] = 0.1
    found = covariance(identity(3), x, "_0", batch=7)
    assert not found.matrix[1].any() and not found.matrix[:, 1].any()
    assert float(found.mean[1]) == float(torch.tensor(0.1))
    constant = covariance(identity(3), torch.full((10, 3), 1e-3), "_0")
    assert not constant.matrix.any()


def test_t5_12_fewer_samples_than_channels() -> None:
    """The number of samples is there to be looked at: the matrix alone does not tell."""
    found = covariance(identity(40), torch.randn(100, 40), "_0", samples=10)
    assert found.samples == 10
    assert int(torch.linalg.matrix_rank(found.matrix, hermitian=True)) == 9


def test_calls_of_a_shared_layer_add_up() -> None:
    """Each call has a node; together they are as if all responses had been seen at once."""
    net = Net(lambda m, x: m.out(m.conv(m.conv(x).relu())), conv=nn.Conv2d(4, 4, 1), out=nn.Conv2d(4, 2, 1))
    program, x = traced(net, 1, 4, 5, 5), torch.randn(90, 4, 5, 5)
    first, second = (Request(name, "covariance") for name in ("conv", "conv_1"))
    stats = collect(program, split(x), [first, second])
    both = cast(Covariance, stats[first]) + cast(Covariance, stats[second])
    with torch.no_grad():
        one = net.conv(x)  # type: ignore[operator]
        two = net.conv(one.relu())  # type: ignore[operator]
    a = torch.cat([one, two]).amax((2, 3)).double().numpy()
    assert both.samples == 180
    np.testing.assert_allclose(both.mean.numpy(), a.mean(0), rtol=1e-6)
    np.testing.assert_allclose(both.matrix.numpy(), np.cov(a, rowvar=False), rtol=1e-5, atol=1e-7)


def test_one_sample_has_no_covariance() -> None:
    with pytest.raises(DataError, match="calibration: _0: found 1 sample, expected at least 2"):
        covariance(identity(3), torch.randn(5, 3), "_0", samples=1)
    assert zeros(identity(3), torch.randn(5, 3), "_0", samples=1).entries == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_responses_that_are_not_numbers(value: float) -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    program, x = traced(net, 1, 2, 3, 3), torch.full((4, 2, 3, 3), 10.0)
    program.tensors["0.weight"].data[0] = value
    with pytest.raises(DataError, match="calibration: _0: found NaN or infinite responses"):
        covariance(program, x, "_0")


# ---------------------------------------------------------------------- zeros


def test_zeros_by_hand() -> None:
    x = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [-1.0, 2.0]], [[-0.0, 0.0], [3.0, 1e-30], [1.0, 1.0]]])
    found = zeros(identity(3, 2), x, "_0")
    assert (found.zeros.tolist(), found.entries) == ([3, 2, 0], 4)
    assert found.fraction.tolist() == [3 / 4, 2 / 4, 0.0]
    assert found.fraction.dtype == torch.float64


@pytest.mark.parametrize(("shape", "dim"), [((5,), 1), ((5, 3, 3), 1), ((6, 5), -1), ((2, 5, 3), 2)])
def test_zeros_are_exact(shape: tuple[int, ...], dim: int) -> None:
    """Also where more than 255 samples of one position are zero."""
    x = torch.randn(600, *shape).relu()
    x[:, ..., 0] = 0
    found = zeros(identity(*shape), x, "_0", dim, batch=600)
    expected = (x == 0).movedim(dim, 0).flatten(1)
    assert found.zeros.tolist() == expected.sum(1).tolist()
    assert found.entries == expected.shape[1]


def test_zeros_of_several_calls_add_up() -> None:
    both = Zeros(torch.tensor([1, 2]), 4) + Zeros(torch.tensor([3, 0]), 6)
    assert both.zeros.tolist() == [4, 2] and both.fraction.tolist() == [4 / 10, 2 / 10]


def test_t2_1_zeros_are_counted_where_the_request_says() -> None:
    """A shift far below zero makes a channel zero everywhere behind the ReLU, and nowhere in front of it."""
    program, x = conv_net(), torch.randn(30, 3, 8, 8)
    cast(Tensor, program.layer("1").bias).data[:] = torch.tensor([-1e3] + [1e3] * 7)
    assert zeros(program, x, "_2").fraction.tolist() == [1.0] + [0.0] * 7
    assert zeros(program, x, "_1").fraction.tolist() == [0.0] * 8


# ---------------------------------------------------------------------- one pass


@pytest.mark.parametrize("kind", ["covariance", "zeros"])
def test_t2_2_batches_do_not_matter(kind: Any) -> None:
    """Unequal last batches, also of one sample: sums are added, never means averaged."""
    program, x = conv_net(), torch.randn(130, 3, 8, 8)
    request = Request("_2", kind)
    found = [collect(program, split(x), [request], batch=size)[request] for size in (7, 64, 129, 130)]
    for other in found[1:]:
        if isinstance(other, Zeros):
            assert torch.equal(other.zeros, cast(Zeros, found[0]).zeros)
        else:
            assert close(other.matrix, cast(Covariance, found[0]).matrix, 1e-6)  # float32 inference


def test_t2_2_only_inference_depends_on_the_batch() -> None:
    """On responses that are the same to the last bit the sums are those of float64."""
    x = torch.randn(700, 5) + 7
    one, *others = [covariance(identity(5), x, "_0", batch=size).matrix for size in (len(x), 3, 7, 64)]
    assert all(close(other, one, 1e-14) for other in others)
    np.testing.assert_allclose(one.numpy(), np.cov(x.double().numpy(), rowvar=False), atol=1e-13)


def test_everything_from_one_pass() -> None:
    """Several kinds and nodes, the same one twice: the samples are read once, the first one twice."""
    program, x = conv_net(), torch.randn(20, 3, 8, 8)
    read: list[int] = []

    def fetch(indices: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Tensor]:
        read.extend(indices.tolist())
        return (x[torch.from_numpy(indices)],)

    requests = [Request("_0", "covariance"), Request("_0", "zeros"), Request("_3", "covariance")]
    data = Split(torch.zeros(20, dtype=torch.int64), np.arange(20), fetch, labelled=False)
    found = collect(program, data, [*requests, requests[0]], batch=8, cache=False)
    assert list(found) == requests
    assert sorted(read) == sorted([0, *range(20)])
    assert torch.equal(
        cast(Covariance, found[requests[0]]).matrix, covariance(program, x, "_0", batch=8).matrix
    )


def test_sees_a_value_before_it_is_changed_in_place() -> None:
    net = Net(lambda m, x: torch.relu_(m.conv(x)), conv=nn.Conv2d(1, 2, 1))
    program, x = traced(net, 1, 1, 3, 3), torch.randn(40, 1, 3, 3)
    with torch.no_grad():
        a = net.conv(x)  # type: ignore[operator]
    assert zeros(program, x, "conv").zeros.tolist() == [0, 0]
    assert zeros(program, x, "relu_").zeros.tolist() == (a <= 0).sum((0, 2, 3)).tolist()


def test_runs_in_eval_mode_and_leaves_the_program_as_it_was() -> None:
    program = traced(nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)), 1, 3, 2, 2)
    program.module.train()
    program.layer("1").eval()
    modes = {name: m.training for name, m in program.modules.items()}
    before = {k: t.clone() for k, t in program.tensors.items()}
    x = torch.randn(12, 3, 2, 2)
    found = covariance(program, x, "_0")
    np.testing.assert_allclose(found.mean.numpy(), x.amax((2, 3)).double().numpy().mean(0), rtol=1e-12)
    assert {name: m.training for name, m in program.modules.items()} == modes
    assert all(torch.equal(t, before[k]) for k, t in program.tensors.items())


def test_the_mode_is_restored_after_a_failure() -> None:
    program = traced(nn.Sequential(nn.Dropout(0.5)), 1, 3)
    program.module.train()

    def interrupt(message: str, fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        covariance(program, torch.randn(4, 3), "_0", progress=interrupt)
    assert program.layer("0").training


def test_progress_counts_samples() -> None:
    told: list[tuple[str, float]] = []
    x = torch.randn(1250, 3)
    covariance(identity(3), x, "_0", batch=500, progress=lambda m, f: told.append((m, f)))
    shown = [f"calibrate: {seen} of 1,250 samples" for seen in ("500", "1,000", "1,250")]
    assert told == list(zip(shown, (0.4, 0.8, 1.0), strict=True))


def test_batches_fit_the_caches() -> None:
    assert batch_size(identity(3)) == BATCHES[1]
    large = traced(nn.Conv2d(3, 64, 1), 1, 3, 256, 256)
    assert batch_size(large) == BATCHES[0]
    middle = traced(nn.Conv2d(3, 64, 1), 1, 3, 32, 32)
    assert batch_size(middle) == calibrate.ELEMENTS // (64 * 32 * 32)


def test_watches_every_batch_of_the_nodes_asked_for() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    program = traced(net, 1, 3, 4, 4)
    batches = [torch.randn(n, 3, 4, 4) for n in (3, 1, 2)]
    seen: list[Tensor] = []
    told: list[int] = []
    assert watch(program, ((x,) for x in batches), {"_0": seen.append}, told.append) == 6
    assert told == [3, 4, 6]
    with torch.no_grad():
        assert all(torch.equal(conv, net[0](x)) for x, conv in zip(batches, seen, strict=True))
    assert not seen[0].requires_grad


# ---------------------------------------------------------------------- what cannot be answered


def test_requests_are_json_and_keys() -> None:
    request = Request("conv", "covariance", -1)
    assert Request(**json.loads(json.dumps(asdict(request)))) == request
    assert len({request, Request("conv", "covariance", -1), Request("conv", "zeros", -1)}) == 2


def test_no_samples() -> None:
    with pytest.raises(DataError, match="calibration: found no samples, expected at least one; give --data"):
        covariance(identity(3), torch.empty(0, 3), "_0")


def test_no_such_node() -> None:
    with pytest.raises(AnalysisError, match=r"found no node 'conv9', expected one of .*_0"):
        covariance(identity(3), torch.randn(4, 3), "conv9")


@pytest.mark.parametrize("dim", [0, 2, -2, 5])
def test_no_such_dimension(dim: int) -> None:
    with pytest.raises(AnalysisError, match=rf"_0: found an output of shape \(1, 3\), .* dimension {dim} "):
        covariance(identity(3), torch.randn(4, 3), "_0", dim)


def test_not_a_tensor() -> None:
    net = Net(lambda m, x: torch.cat(m.act(x).chunk(2, 1), 1), act=nn.ReLU())
    with pytest.raises(AnalysisError, match="chunk: found no single tensor"):
        covariance(traced(net, 1, 4), torch.randn(4, 4), "chunk")


def test_several_inputs() -> None:
    """Every input is its own, in the order of forward's arguments."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Identity()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cast(Tensor, self.act(x - 2 * y))

    program = trace(Two(), (torch.ones(1, 4), torch.ones(1, 4)))
    x, y = torch.randn(2, 9, 4, dtype=torch.float32)
    labels = torch.zeros(9, dtype=torch.int64)
    data = Split(labels, np.arange(9), lambda i: (x[i], y[i]), labelled=False)
    request = Request("act", "covariance")
    found = cast(Covariance, collect(program, data, [request], batch=4, cache=False)[request])
    alone = covariance(identity(4), x - 2 * y, "_0")
    assert close(found.mean, alone.mean, 1e-12) and close(found.matrix, alone.matrix, 1e-12)


# ---------------------------------------------------------------------- never twice


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Request]]:
    """What each pass over the data was for."""
    done: list[list[Request]] = []
    measure = calibrate._measure

    def counting(program: Any, data: Any, requests: Any, *rest: Any) -> Any:
        done.append(list(requests))
        return measure(program, data, requests, *rest)

    monkeypatch.setattr(calibrate, "_measure", counting)
    return done


REQUESTS = [Request("_0", "covariance"), Request("_2", "zeros")]


def same(a: Any, b: Any) -> bool:
    return all(
        torch.equal(value, vars(b)[name]) if isinstance(value, Tensor) else value == vars(b)[name]
        for name, value in vars(a).items()
    )


def test_cached_on_disk(passes: list[list[Request]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The same content is computed once, even if it is another object; new requests only are computed."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    program, x = conv_net(), torch.randn(20, 3, 8, 8)
    first = collect(program, split(x), REQUESTS)
    again = collect(program.clone(), split(x.clone()), REQUESTS)
    assert passes == [REQUESTS]
    assert all(same(first[r], again[r]) for r in REQUESTS)
    third = Request("_3", "covariance")
    collect(program, split(x), [*REQUESTS, third])
    assert passes == [REQUESTS, [third]]
    collect(program, split(x), REQUESTS, cache=False)
    assert passes[2:] == [REQUESTS]


def test_cached_by_content(
    passes: list[list[Request]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A weight, a sample, the number of samples or the code makes it something else."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    program, x = conv_net(), torch.randn(20, 3, 8, 8)
    collect(program, split(x), REQUESTS)
    program.tensors["0.weight"].data[0, 0, 0, 0] += 1e-3
    collect(program, split(x), REQUESTS)
    x[7, 1, 2, 3] += 1e-3
    collect(program, split(x), REQUESTS)
    collect(program, split(x), REQUESTS, samples=19)
    monkeypatch.setattr("graphcomp.base.cache.digest_of", lambda module: "another")
    collect(program, split(x), REQUESTS)
    assert passes == [REQUESTS] * 5
    collect(program, split(x), REQUESTS, samples=20)
    assert len(passes) == 5


def test_cached_in_memory(passes: list[list[Request]]) -> None:
    program, x = conv_net(), torch.randn(20, 3, 8, 8)
    memory: dict[str, Any] = {}
    first = collect(program, split(x), REQUESTS, memory=memory)
    assert collect(program, split(x), REQUESTS, memory=memory) == first
    assert passes == [REQUESTS] and len(memory) == 2
