"""Frozen batch normalisation: a layer that everything knows, and that never follows the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as Torchvisions

from graphcomp.channels import analyse
from graphcomp.errors import PassError
from graphcomp.ir import load, save
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.program import Program
from graphcomp.ir.tracing import trace
from graphcomp.onnx.export import export_onnx
from graphcomp.passes import L1, FoldBN
from graphcomp.pipeline.verify import TOLERANCE, difference, relative_error, verify_pass
from graphcomp.train.normalisation import normalisations, synchronise
from tests.nets import scramble
from tests.tiny import context, traced
from tests.training import trained


class DetrFrozenBatchNorm2d(nn.Module):
    """As DETR writes it: eps stands in forward, and no attribute says it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, var = (t.reshape(1, -1, 1, 1) for t in tensors)
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class OtherEps(DetrFrozenBatchNorm2d):
    """Says another eps than it computes with."""

    eps = 0.5


class FrozenBatchNormAct2d(Torchvisions):
    """More than the normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def net(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
    parts = [first, norm(8), nn.ReLU(), second, norm(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return scramble(nn.Sequential(*parts, *head), 5)


def frozen(program: Program) -> list[str]:
    return [path for path, m in program.called_modules().items() if isinstance(m, FrozenBatchNorm2d)]


@pytest.mark.parametrize("norm", [Torchvisions, DetrFrozenBatchNorm2d, lambda n: Torchvisions(n, eps=0.3)])
def test_computes_the_same_in_eval_and_in_training(norm: Callable[[int], nn.Module]) -> None:
    model = net(norm).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    program = trace(model, x, copy_weights=False)
    assert frozen(program) == ["1", "4"]
    assert isinstance(model[1], norm if isinstance(norm, type) else Torchvisions)  # type: ignore[index]
    expected = model(x)
    assert relative_error(program(x), expected) <= TOLERANCE
    assert relative_error(program.module.train()(x), expected) <= TOLERANCE
    after = program.module.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("norm", [OtherEps, FrozenBatchNormAct2d])
def test_what_computes_something_else_is_traced_through(norm: Callable[[int], nn.Module]) -> None:
    model = net(norm).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    program = trace(model, x)
    assert not frozen(program)
    assert torch.equal(program(x), model(x))


def test_one_that_is_called_twice_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), Torchvisions(3)
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.conv(self.norm(x)))  # type: ignore[no-any-return]

    program = traced(scramble(Twice(), 0), 1, 3, 4, 4)
    assert len({id(m) for m in program.called_modules().values() if isinstance(m, FrozenBatchNorm2d)}) == 1


@pytest.mark.slow
def test_fold_bn_folds_all_of_a_detection_backbone_and_its_channels_go_as_ever() -> None:
    torch.manual_seed(0)
    plain = traced(torchvision.models.resnet50(weights=None), 1, 3, 64, 64)
    model = torchvision.models.resnet50(weights=None, norm_layer=Torchvisions)
    program = traced(scramble(model, 1), 1, 3, 64, 64)
    plan = FoldBN().plan(program, context())
    assert plan.summary == "folded 53 of 53 normalisations" and plan.kept == []
    folded = FoldBN().rewrite(program, plan)
    assert not frozen(folded)
    exact = program.to(torch.float64)
    assert difference(exact, FoldBN().rewrite(exact, plan)) <= 10 * TOLERANCE
    found, expected = ({g.name: len(g.channels) for g in analyse(p).removable} for p in (program, plain))
    assert found == expected


def test_channels_are_removed_exactly() -> None:
    program = traced(net(Torchvisions), 1, 3, 8, 8)
    pass_ = L1(ratio=0.5, multiple=1)
    plan = pass_.plan(program, context())
    assert verify_pass(pass_, program, plan) <= TOLERANCE
    small = pass_.rewrite(pass_.simulate(program, plan), plan)
    assert [small.tensors[f"{n}.running_var"].numel() for n in frozen(small)] == [4, 4]


@pytest.mark.slow
def test_saved_and_exported(tmp_path: Path) -> None:
    program = traced(net(lambda n: Torchvisions(n, eps=0.3)), 1, 3, 8, 8)
    save(program, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert frozen(loaded) == ["1", "4"] and str(loaded) == str(program)
    assert loaded.fingerprint() == program.fingerprint()
    assert export_onnx(program, tmp_path / "net.onnx", batches=(2,)).bytes > 0


def test_training_leaves_it_alone() -> None:
    program = traced(net(Torchvisions), 1, 3, 8, 8)
    after = trained(program)
    moved = {n for n, t in after.tensors.items() if not torch.equal(t, program.tensors[n])}
    assert moved == {"0.weight", "3.weight", "3.bias", "8.weight", "8.bias"}
    synchronise(after.module)
    assert frozen(after) == ["1", "4"]
    with pytest.raises(PassError, match="found no batch normalisation with running statistics"):
        normalisations(after.module)
