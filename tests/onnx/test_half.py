"""Weights that are stored as float16."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from graphcomp.errors import ExportError
from graphcomp.ir import Program, trace
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.onnx.half import LEAST, store_half, with_full_weights
from graphcomp.onnx.quantization.checks import run_all, snr
from graphcomp.onnx.quantization.quantize import quantize_onnx
from graphcomp.runtime import onnxfile, open_session
from tests.onnx.quantised_files import Small, samples
from tests.onnx.test_quantization import split_of


def network(scale: float = 1.0) -> Program:
    torch.manual_seed(0)
    net = Small().eval()
    with torch.no_grad():
        net.inner.weight *= scale
    return trace(net, (torch.randn(1, 3, 12, 12),))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((64, 64), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(2)


def test_the_file_is_the_rounded_network(tmp_path: Path) -> None:
    """Exactly: against the program with weights that torch rounded."""
    program, rounded = network(), network()
    record = export_onnx(program, tmp_path / "half.onnx", batches=(1, 3), weights="fp16")
    with torch.no_grad():
        for parameter in rounded.module.parameters():
            if parameter.ndim > 1 and parameter.numel() >= LEAST:
                parameter.copy_(parameter.half().float())
    export_onnx(rounded, tmp_path / "rounded.onnx", batches=(1,))
    a, b = (run_all((tmp_path / n).read_bytes(), samples())[0][0] for n in ("half.onnx", "rounded.onnx"))
    np.testing.assert_array_equal(a, b)
    assert record.half is not None and record.half.tensors == 5 and not record.half.kept
    assert record.half.float32_bytes == 2 * record.half.float16_bytes
    assert record.bytes == (tmp_path / "half.onnx").stat().st_size
    assert 1e-5 < max(record.parity.values()) < 2e-2


def test_half_the_file_and_the_same_operators(tmp_path: Path) -> None:
    """The casts are gone once it is loaded."""
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3)).eval()
    program = trace(net, (torch.randn(1, 3, 12, 12),))
    full = export_onnx(program, tmp_path / "full.onnx", batches=(1,))
    half = export_onnx(program, tmp_path / "half.onnx", batches=(1,), weights="fp16")
    assert half.bytes < 0.51 * full.bytes and full.half is None
    dumps = []
    for name in ("full.onnx", "half.onnx"):
        open_session(tmp_path / name, dump=tmp_path / "dump.onnx")
        dumps.append([(n.op_type, n.name) for n in onnx.load(tmp_path / "dump.onnx").graph.node])
    assert dumps[0] == dumps[1]
    macs = [onnxfile.onnx_macs(tmp_path / name) for name in ("full.onnx", "half.onnx")]
    assert macs[0] == macs[1] > 0


@pytest.mark.parametrize(
    ("scale", "why"),
    [(1e7, "beyond float16"), (1e-7, "float16 would lose .* of its norm: its values are too small")],
)
def test_what_float16_does_not_hold_stays(scale: float, why: str, tmp_path: Path) -> None:
    record = export_onnx(network(scale), tmp_path / "half.onnx", batches=(1,), weights="fp16")
    assert record.half is not None and list(record.half.kept) == ["inner.weight"]
    assert re.search(why, record.half.kept["inner.weight"])
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert kinds["inner.weight"] == TensorProto.FLOAT and kinds["outer.weight.float16"] == TensorProto.FLOAT16


def test_masks_become_float16(tmp_path: Path) -> None:
    program = trace(Masked(), (torch.ones(1, 64, 64),))
    record = export_onnx(program, tmp_path / "half.onnx", batches=(1, 2), weights="fp16")
    assert record.half is not None and record.half.kept == {} and record.half.tensors == 1


def test_it_can_be_undone_and_read(tmp_path: Path) -> None:
    program = network()
    path = tmp_path / "half.onnx"
    export_onnx(program, path, batches=(1,), weights="fp16")
    model = onnx.load(path)
    with_full_weights(model)
    onnx.checker.check_model(model, full_check=True)
    assert not [n for n in model.graph.node if n.op_type == "Cast"]
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    weight = program.module.get_submodule("outer").weight.detach()  # type: ignore[union-attr, operator]
    np.testing.assert_array_equal(stored["outer.weight"], weight.half().float().numpy())
    again = read_onnx(path)
    assert any("float16" in remark for remark in again.interface.remarks)
    twice = onnx.load(path)
    assert store_half(twice).tensors == 0


@pytest.mark.slow
def test_it_can_be_quantised(tmp_path: Path) -> None:
    export_onnx(network(), tmp_path / "half.onnx", batches=(1,), weights="fp16")
    made = quantize_onnx(tmp_path / "half.onnx", tmp_path / "int8.onnx", split_of(64), faster_only=False)
    assert not made.in_float and len(made.layers) == 5 and made.snr_db > 20


def test_the_tolerance_is_that_of_float16_or_what_was_asked_for(tmp_path: Path) -> None:
    """Where a network amplifies what is rounded, nothing is written; in float32 it is."""
    with pytest.raises(ExportError, match="output"):
        export_onnx(network(), tmp_path / "half.onnx", batches=(1,), weights="fp16", tolerance=2e-5)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        first, last = (m for m in net if isinstance(m, nn.Linear))
        first.weight.copy_(torch.full((64, 64), 1.0003))
        first.bias.zero_()
        signs = torch.tensor([1.0, -1.0]).repeat(32)
        first.weight[1::2] = 1.0
        last.weight.copy_(signs.expand(4, 64))
        last.bias.zero_()
    program = trace(net, (torch.randn(1, 64),))
    with pytest.raises(ExportError, match="output"):
        export_onnx(program, tmp_path / "half.onnx", batches=(1,), weights="fp16")
    assert not (tmp_path / "half.onnx").exists()
    export_onnx(program, tmp_path / "full.onnx", batches=(1,), tolerance=1e-2)


def test_snr_of_a_usual_network(tmp_path: Path) -> None:
    program = network()
    export_onnx(program, tmp_path / "full.onnx", batches=(1,))
    export_onnx(program, tmp_path / "half.onnx", batches=(1,), weights="fp16")
    full, half = (run_all((tmp_path / n).read_bytes(), samples())[0] for n in ("full.onnx", "half.onnx"))
    assert snr(full, half) > 45
