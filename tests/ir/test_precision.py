"""Programs in another precision, with complex numbers among their weights."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.ir import load, save
from graphcomp.ir.tracing import trace
from graphcomp.pipeline.verify import verify_pass
from tests.removing import ByRows, half


class Fourier(nn.Module):
    """Weights for the lowest frequencies of every channel, as neural operators have them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3, dtype=torch.complex64))
        self.register_buffer("phase", torch.exp(1j * torch.arange(4.0)).reshape(4, 1, 1))
        self.lift, self.hidden, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        waves = torch.fft.rfft2(x) * self.phase
        kept = torch.zeros_like(waves)
        kept[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", waves[:, :, :3, :3], self.weight)
        y = x + torch.fft.irfft2(kept, s=x.shape[-2:])
        return cast(Tensor, self.head(self.hidden(y).relu()))


def test_complex_weights_follow(tmp_path: Path) -> None:
    model, x = Fourier().eval(), torch.randn(2, 3, 8, 8)
    program = trace(model, x)
    exact = program.to(torch.float64)
    assert exact.tensors["weight"].dtype == exact.tensors["phase"].dtype == torch.complex128
    assert torch.equal(exact.tensors["weight"].to(torch.complex64), model.weight)
    with torch.no_grad():
        torch.testing.assert_close(exact(x.double()), model(x).double(), rtol=1e-4, atol=1e-5)
    drop = half(analyse(program))
    assert list(drop.rows) == ["hidden.weight"]
    verify_pass(ByRows(), program, drop.rows)
    save(program, tmp_path / "p")
    assert torch.equal(load(tmp_path / "p")(x), program(x))
