"""The mean gradient: what it is, what it does not depend on, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.data.split import Split
from graphcomp.errors import AnalysisError, DataError
from graphcomp.ir.program import Program
from graphcomp.measure import gradients
from graphcomp.measure.gradients import batch_size, mean_gradients
from tests.learnable import SHAPE, exact, make_split, normalised_net, plain_net
from tests.processes import in_processes
from tests.removing import digest
from tests.tiny import random_data, traced

F64 = torch.float64


def convolutions(program: Program) -> list[str]:
    return [name for name, t in program.tensors.items() if t.ndim == 4]


def all_at_once(program: Program, split: Split, names: list[str]) -> dict[str, Tensor]:
    """The definition: one batch, mean loss, on a module in eval mode."""
    module = program.clone().module.eval()
    own = dict(module.named_parameters())
    (((x,), y),) = split.batches(len(split))
    found = torch.autograd.grad(F.cross_entropy(module(x), y), [own[n] for n in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("batch", [7, 64, 96, None])
def test_t1_4_is_the_gradient_of_the_mean_loss(batch: int | None) -> None:
    """In eval mode, and the mean over samples, also with a smaller last batch."""
    program, split = normalised_net(F64, dropout=0.5), exact(make_split())
    names = convolutions(program)
    program.module.train()
    found = mean_gradients(program, split, names, batch=batch)
    for name, expected in all_at_once(program, split, names).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)
    assert program.module.training


def test_t1_4_does_not_depend_on_the_batch_size() -> None:
    program, split = normalised_net(), make_split()
    names = convolutions(program)
    small, large = (mean_gradients(program, split, names, batch=b, cache=False) for b in (7, 64))
    for name in names:
        assert (small[name] - large[name]).norm() <= 1e-5 * large[name].norm()


def test_t1_4_halves_average_to_the_whole() -> None:
    program, split = plain_net(F64), exact(make_split())
    (name, *_) = names = convolutions(program)
    halves = [mean_gradients(program, split.subset(np.arange(48) + s), names)[name] for s in (0, 48)]
    whole = mean_gradients(program, split, names)[name]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-10, atol=1e-14)


def test_t1_13_leaves_no_trace() -> None:
    """Bitwise, with frozen weights, and twice the same."""
    program, split = normalised_net(), make_split()
    for parameter in list(program.module.parameters())[::2]:
        parameter.requires_grad_(False)
    before, frozen = digest(program), [p.requires_grad for p in program.module.parameters()]
    names = convolutions(program)
    first, second = (mean_gradients(program, split, names, cache=False) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in names)
    assert digest(program) == before
    assert [p.requires_grad for p in program.module.parameters()] == frozen
    assert all(p.grad is None for p in program.module.parameters())
    assert all(float(first[n].abs().max()) > 0 and not first[n].requires_grad for n in names)


def test_samples_are_spread_over_the_split() -> None:
    """A folder of images is sorted by class: the first hundred would be of one class."""
    program, split = plain_net(F64), exact(make_split())
    names = convolutions(program)
    found = mean_gradients(program, split, names, samples=10)
    part = split.subset(np.array([0, 9, 19, 28, 38, 48, 57, 67, 76, 86]))
    for name, expected in all_at_once(program, part, names).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)
    assert mean_gradients(program, split, names, samples=1000).keys() == found.keys()


def test_inplace_operators_and_buffers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 4))
    program = traced(net, 1, *SHAPE)
    found = mean_gradients(program, make_split(), ["0.weight", "3.bias"])
    assert found["0.weight"].shape == (4, 3, 3, 3) and found["3.bias"].shape == (4,)


def test_kept_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    program, split = plain_net(), make_split()
    names = convolutions(program)
    first = mean_gradients(program, split, names)
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "_measure", None)
        again = mean_gradients(program.clone(), make_split(), names)
        assert all(torch.equal(first[n], again[n]) for n in names)
        for other in ({"samples": 50}, {"cache": False}):
            with pytest.raises(TypeError, match="not callable"):
                mean_gradients(program, split, names, **other)  # type: ignore[arg-type]


def test_progress() -> None:
    seen: list[tuple[str, float]] = []
    mean_gradients(plain_net(), make_split(), ["0.weight"], batch=50, progress=lambda *m: seen.append(m))
    assert seen == [("gradients: 50 of 96 samples", 50 / 96), ("gradients: 96 of 96 samples", 1.0)]


def test_batches_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    program = plain_net()
    each = sum(int(np.prod(program.shape(n) or ())) for n in program.graph.nodes)
    assert batch_size(program) == gradients.BATCH
    monkeypatch.setattr(gradients, "ELEMENTS", 10 * each + 1)
    assert batch_size(program) == 10
    monkeypatch.setattr(gradients, "ELEMENTS", 1)
    assert batch_size(program) == 1


def shares() -> dict[str, Tensor]:
    return mean_gradients(plain_net(F64), exact(make_split()), ["0.weight"], batch=7, cache=False)


@pytest.mark.slow
def test_two_processes_are_as_one() -> None:
    one = shares()["0.weight"]
    for found in in_processes(2, shares):
        torch.testing.assert_close(found["0.weight"], one, rtol=1e-10, atol=1e-15)


def test_labels_are_needed() -> None:
    unlabelled = random_data(*SHAPE).train
    with pytest.raises(DataError, match="without labels, expected labelled ones"):
        mean_gradients(plain_net(), unlabelled, ["0.weight"])


def test_refusals() -> None:
    program, split = plain_net(), make_split()
    with pytest.raises(AnalysisError, match=r"found 'nothing', expected a floating point tensor"):
        mean_gradients(program, split, ["0.weight", "nothing"])
    with pytest.raises(DataError, match="found no samples"):
        mean_gradients(program, split.subset(np.arange(0)), ["0.weight"])
    wrong = replace(split, labels=split.labels + 3)
    with pytest.raises(DataError, match=r"labels: found class \d, expected classes below 4"):
        mean_gradients(program, wrong, ["0.weight"])
    with pytest.raises(AnalysisError, match="expected a classifier, whose loss"):
        mean_gradients(traced(nn.Conv2d(3, 4, 3), 1, *SHAPE), split, ["weight"])
    infinite = replace(split, fetch=lambda i: (split.fetch(i)[0] * torch.inf,))
    with pytest.raises(DataError, match=r"0.weight: found NaN or infinite values"):
        mean_gradients(program, infinite, ["0.weight"])
