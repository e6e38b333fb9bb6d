"""Statistics of normalisations: estimated anew, equal to those of all samples together."""

import pytest
import torch
from torch import nn

from graphcomp.errors import PassError
from graphcomp.ir.program import Program
from graphcomp.passes import FoldBN
from graphcomp.train.normalisation import SyncedBatchNorm, normalisations, reestimate, synchronise
from tests.learnable import make_split, normalised_net, plain_net, weights
from tests.running import run_pass
from tests.tiny import context, traced


def inputs(samples: int = 60) -> torch.Tensor:
    split = make_split(samples)
    return split.fetch(split.indices)[0]


def each(x: torch.Tensor, size: int) -> list[tuple[torch.Tensor]]:
    return [(part,) for part in x.split(size)]


def statistics(program: Program, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    return program.tensors[f"{layer}.running_mean"], program.tensors[f"{layer}.running_var"]


@pytest.mark.parametrize("size", [7, 60])
def test_first_normalisation_gets_the_statistics_of_all_samples(size: int) -> None:
    """Whatever the batches are: unequal ones weigh by their size."""
    program, x = normalised_net(torch.float64), inputs().double()
    found = reestimate(program, each(x, size))
    rows = program.layer("0")(x).movedim(1, 0).flatten(1)
    mean, var = statistics(found, "1")
    assert torch.allclose(mean, rows.mean(1), rtol=1e-9)
    assert torch.allclose(var, rows.var(1), rtol=1e-9)


def test_deeper_ones_see_normalised_inputs() -> None:
    """One batch: what training would compute with momentum 1."""
    program, x = normalised_net(torch.float64, dropout=0.5), inputs().double()
    found = reestimate(program, [(x,)])
    net = program.clone().module.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout):
            module.eval()
    net(x)
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        assert torch.allclose(found.tensors[name], net.get_buffer(name), rtol=1e-9), name


def test_nothing_else_changes() -> None:
    program = normalised_net()
    before = weights(program)
    found = reestimate(program, each(inputs(), 20))
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    changed = {n for n, t in found.tensors.items() if not torch.equal(t, before[n])}
    assert changed == {"1.running_mean", "1.running_var", "5.running_mean", "5.running_var"}
    assert not found.module.training and str(found) == str(program)
    assert not any(m._forward_pre_hooks for m in found.module.modules())


def test_large_offset_does_not_hurt() -> None:
    program, x = normalised_net(torch.float64), inputs().double()
    shifted = normalised_net(torch.float64)
    plain = reestimate(program, each(x, 20))
    shifted.tensors["0.weight"].data.copy_(program.tensors["0.weight"])
    moved = reestimate(shifted, each(x + 1e4, 20))
    inner = program.layer("0")(x + 1e4).movedim(1, 0).flatten(1)
    assert torch.allclose(statistics(moved, "1")[1], inner.var(1), rtol=1e-6)
    assert torch.allclose(statistics(plain, "1")[1], program.layer("0")(x).var((0, 2, 3)), rtol=1e-9)


def test_a_normalisation_called_twice_sees_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(x + 2)  # type: ignore[no-any-return]

    x = inputs().double()
    found = reestimate(traced(Twice(), 1, 3, 8, 8).to(torch.float64), [(x,)])
    both = torch.cat([x, x + 2])
    assert torch.allclose(found.tensors["norm.running_mean"], both.mean((0, 2, 3)))
    assert torch.allclose(found.tensors["norm.running_var"], both.var((0, 2, 3)))


def test_without_normalisations() -> None:
    folded = run_pass(FoldBN(), normalised_net(), context())[2]
    for program in (plain_net(), folded):
        with pytest.raises(PassError, match="found no batch normalisation"):
            reestimate(program, [(inputs(),)])


def test_without_samples() -> None:
    with pytest.raises(PassError, match=r"1: found 0 value\(s\) a channel, expected two or more"):
        reestimate(normalised_net(), [])


# What processes share is tested with two of them in test_train; alone, a synchronised one is torch's own.


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 7), (5, 4, 6, 3)])
def test_synchronised_alone_is_torchs(shape: tuple[int, ...], momentum: float | None) -> None:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    torch.manual_seed(0)
    plain, synced = (kinds[len(shape)](4, momentum=momentum).double() for _ in range(2))
    for norm in (plain, synced):
        norm.weight.data, norm.bias.data = torch.linspace(0.5, 2, 4).double(), torch.ones(4).double()
    synchronise(synced)
    assert type(synced) is SyncedBatchNorm
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, found = plain(a), synced(b)
        weight = torch.randn_like(expected)
        (expected * weight).sum().backward()
        (found * weight).sum().backward()
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(b.grad, a.grad, rtol=1e-7, atol=1e-10)
    for name, value in plain.state_dict().items():
        assert torch.allclose(synced.state_dict()[name], value, rtol=1e-9), name
    synced.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(x), synced.eval()(x))


def test_synchronised_in_bf16_computes_in_float32() -> None:
    norm = nn.BatchNorm2d(3)
    synchronise(norm)
    x = torch.randn(8, 3, 4, 4) + 100
    found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert norm.running_var is not None and torch.allclose(
        norm.running_var, 0.9 + 0.1 * x.bfloat16().float().var((0, 2, 3)), rtol=1e-4
    )


def test_which_are_found() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3))
    assert list(normalisations(net)) == ["0"]
