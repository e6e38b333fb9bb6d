"""Networks by way of torch.export: the same function, and layers where the module had them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import graphcomp
from graphcomp.channels import analyse
from graphcomp.errors import TraceError
from graphcomp.ir import fresh_inputs, load, output_tensors, save
from tests.nets import TRAPS, Net, scramble


def exported(module: nn.Module, shape: tuple[int, ...]) -> Any:
    x = torch.randn((2, *shape[1:]), dtype=next(module.parameters()).dtype)
    return torch.export.export(module, (x,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*their values are baked in")
@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_the_same_function(name: str) -> None:
    module, shape = TRAPS[name]()
    scramble(module, 0).eval()
    program = graphcomp.trace(exported(module, shape), torch.zeros(shape))
    (x,) = fresh_inputs(program, 3, 1)
    expected = output_tensors(module(x.clone()))
    for found, wanted in zip(output_tensors(program(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted)


ARGUMENTS = {
    "a default in front of another value": lambda x: F.hardtanh(x, -1, 2),
    "the same, in place": lambda x: F.hardtanh_(x.clone(), -1, 2),
    "a keyword of an in-place method": lambda x: x.clone().add_(x.relu(), alpha=2),
    "an order that is the default": lambda x: torch.linalg.vector_norm(x, 2, dim=1),
    "padding without stride": lambda x: F.avg_pool2d(x, 3, padding=1),
    "a window by keywords": lambda x: F.max_pool2d(x, kernel_size=2, ceil_mode=True),
    "an approximation": lambda x: F.gelu(x, approximate="tanh"),
    "a slope": lambda x: F.leaky_relu(x, 0.3),
    "both sides of a slice": lambda x: x[:, 1:3, ::2, -3:],
    "several places": lambda x: x[:, [0, 2], 1],
    "a causal mask": lambda x: F.scaled_dot_product_attention(*[x.flatten(1, 2)] * 3, is_causal=True),
    "a size that is made": lambda x: x + torch.full((x.shape[0], 1, 1, 1), 0.5, dtype=x.dtype),
    "corners": lambda x: F.interpolate(x, size=(5, 9), mode="bilinear", align_corners=True),
    "statistics": lambda x: x.var(1, unbiased=False) + x.std((2, 3)).sum(1)[:, None, None],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_stay_where_they_were(name: str) -> None:
    model = Net(lambda m, x: ARGUMENTS[name](m.a(x)), a=nn.Conv2d(3, 4, 3)).eval()
    program = graphcomp.trace(exported(model, (1, 3, 8, 8)), torch.zeros(1, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program(x), model(x))


class Block(nn.Module):
    """What fx cannot follow, around layers that it could."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.register_buffer("scale", torch.full((8, 1, 1), 2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.conv(x)), inplace=True) * self.scale
        assert isinstance(x, Tensor)
        x += torch.zeros(x.shape[0], 1, x.shape[2], x.shape[3])
        x = F.interpolate(F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)), scale_factor=2.0)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        picked = x[:, torch.tensor([0, 2])].mean((1, 2, 3))
        return {"scores": self.head(tokens.mean(1)), "picked": picked * math.pi}


def test_the_second_door_opens_where_the_first_does_not(tmp_path: Any) -> None:
    model, example = Block().eval(), torch.randn(1, 3, 8, 8)
    program = graphcomp.trace(model, example)
    assert "isinstance(x, Tensor)" in program.interface.remarks[0]
    assert program.interface.specialised
    kinds = {name: type(m) for name, m in program.called_modules().items()}
    assert kinds["conv"] is nn.Conv2d and kinds["norm"] is nn.BatchNorm2d and kinds["head"] is nn.Linear
    save(program, tmp_path / "p")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program(x), model(x))
        torch.testing.assert_close(load(tmp_path / "p")(x), model(x))


def test_an_exported_program_is_taken_with_its_layers() -> None:
    model = Block().eval()
    program = graphcomp.trace(exported(model, (1, 3, 8, 8)), torch.randn(1, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program(x), model(x))
    assert type(program.layer("norm")) is nn.BatchNorm2d


def test_the_same_channels_can_go_through_both_doors() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    ).eval()
    x = torch.zeros(1, 3, 8, 8)
    doors = [graphcomp.trace(model, x), graphcomp.trace(exported(model, (1, 3, 8, 8)), x)]
    first, second = ([(g.name, len(g.channels)) for g in analyse(p).removable] for p in doors)
    assert first == second and first


def test_one_batch_size_is_refused() -> None:
    program = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (torch.zeros(2, 3, 8, 8),))
    with pytest.raises(TraceError, match="one batch size, expected one that takes any"):
        graphcomp.trace(program, torch.zeros(1, 3, 8, 8))


def test_what_neither_door_takes_says_both() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(TraceError, match=r"only a run knows.*torch.export does not take it"):
        graphcomp.trace(Net(body, a=nn.Conv2d(3, 4, 3)).eval(), torch.zeros(1, 3, 8, 8))


def test_what_both_doors_refuse_is_one_short_line(capfd: pytest.CaptureFixture[str]) -> None:
    """torch.export logs the whole graph, and writes formulas of thousands of characters into its message."""

    class Ragged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            parts = [x.flatten()[x.flatten() > i].unsqueeze(0) for i in range(100)]
            return torch.cat(parts, 1)[:, :4] if sum(p.shape[1] for p in parts) > 40 else x

    with pytest.raises(TraceError) as found:
        graphcomp.trace(Ragged(), torch.randn(1, 8))
    said = capfd.readouterr()
    assert len(str(found.value)) < 1500 and said.out == said.err == ""
