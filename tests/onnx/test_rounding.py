"""What rounding explains of a written file: as of one that is read (`test_reading.py` has these)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.errors import ExportError
from graphcomp.ir import trace
from graphcomp.onnx import export_onnx
from graphcomp.onnx.rows import WRITES


class Amplifying(nn.Module):
    """What is left of tanh(x) behind a large number: float32 keeps four digits of it."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.full((64,), 3e3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * 1.1) + self.large - self.large


def stretched(factor: float) -> Callable[..., Any]:
    def row(writing: Any, input: Any) -> str:
        return str(writing.op("Mul", writing.op("Tanh", input), writing.number(factor, writing.dtype)))

    return row


def export(folder: Path, **options: Any) -> list[str]:
    program = trace(Amplifying(), torch.zeros(1, 64))
    return export_onnx(program, folder / "x.onnx", batches=(1, 2), **options).remarks


@pytest.mark.parametrize("opset", [18, 21])
def test_a_network_that_amplifies_rounding_is_written(
    opset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another runtime may be as far as float32 is from float64, but for nodes that differ alone."""

    def row(writing: Any, *given: Any) -> str:
        name = writing.op("Sub", *(writing.typed(x, writing.dtype) for x in given))
        return str(writing.op("Mul", name, writing.number(1 + 3e-4, writing.dtype)))

    monkeypatch.setitem(WRITES, "sub", row)
    with pytest.raises(ExportError, match=r"relative error of 0\.0003 .*alone: sub"):
        export(tmp_path, opset=opset)
    monkeypatch.undo()
    monkeypatch.setattr("graphcomp.onnx.parity.disagreement", lambda *_: 3e-4)
    (said,) = export(tmp_path, opset=opset)
    assert said == "the network amplifies rounding: ONNX Runtime's numbers are up to 0.0003 off"


def test_a_tolerance_that_is_asked_for_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.onnx.parity.disagreement", lambda *_: 3e-4)
    with pytest.raises(ExportError, match=r"found a relative error of 0\.0003 .*at most 0\.0001"):
        export(tmp_path, tolerance=1e-4)


@pytest.mark.parametrize("off", [5e-5, 2e-3])
def test_a_wrong_row_cannot_hide_behind_rounding(
    off: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WRITES, "tanh", stretched(1 + off))
    with pytest.raises(ExportError, match=r"relative error of .* \(alone: tanh: .* from 'tanh'\)"):
        export(tmp_path)


def test_what_is_far_from_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.onnx.parity.disagreement", lambda *_: 0.02)
    with pytest.raises(ExportError, match=r"relative error of 0\.02 .*at most 0\.0"):
        export(tmp_path)
