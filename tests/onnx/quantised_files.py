"""Files in 8 bits of one small network: ours, and as strangers write them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor, nn

from graphcomp.ir import trace
from graphcomp.onnx import export_onnx
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.qdq import Choice, write_qdq
from graphcomp.onnx.quantization.ranges import collect

NAMES = ["stem", "inner", "outer", "wise", "fc"]


class Small(nn.Module):
    """A residual block, a depthwise layer, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner, self.outer = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.wise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 10)."""
        x = self.stem(x).relu()
        x = (x + self.outer(self.inner(x).relu())).relu()
        y: Tensor = self.fc(self.wise(x).relu().mean((2, 3)))
        return y


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self._rest: Iterator[Any] = iter(samples())

    def get_next(self) -> Any:
        return next(self._rest, None)


def samples() -> list[dict[str, Any]]:
    """Two batches."""
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((4, 3, 12, 12)).astype(np.float32)} for _ in range(2)]


def float_file(folder: Path) -> Path:
    """As graphcomp writes it."""
    path = folder / "model.onnx"
    if not path.exists():
        torch.manual_seed(0)
        export_onnx(trace(Small().eval(), (torch.randn(1, 3, 12, 12),)), path, batches=(1,))
    return path


def ours(folder: Path) -> Path:
    """Written by graphcomp, with its metadata."""
    model = onnx.load(float_file(folder))
    layers, _ = find_layers(model)
    statistics = collect(model, layers, samples())
    names = tuple(layer.name for layer in layers)
    choice = Choice("plain", None, statistics.ranges(), statistics.means, names)
    onnx.save(write_qdq(model, layers, choice), folder / "ours.onnx")
    return folder / "ours.onnx"


def strangers(*, nameless: bool = False, **options: Any) -> Callable[[Path], Path]:
    """Written by ONNX Runtime from a file without metadata, and without names of nodes."""

    def write(folder: Path) -> Path:
        model = onnx.load(float_file(folder))
        del model.metadata_props[:]
        for node in model.graph.node:
            del node.metadata_props[:]
            if nameless:
                node.name = ""
        onnx.save(model, folder / "bare.onnx")
        quantize_static(folder / "bare.onnx", folder / "strangers.onnx", _Reader(), **options)
        return folder / "strangers.onnx"

    return write


U8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
FILES: dict[str, Callable[[Path], Path]] = {
    "ours": ours,
    "by channel": strangers(per_channel=True, **U8),
    "by tensor": strangers(**U8),
    "defaults": strangers(),
    "nameless": strangers(nameless=True, **U8),
}
