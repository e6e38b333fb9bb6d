# ruff: noqa: E501 - calls of the exporters
"""Networks that torch exports come back: the same function, the same channels, removed exactly."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from graphcomp.base import muted
from graphcomp.channels import analyse
from graphcomp.errors import LoadError
from graphcomp.ir import Program, output_tensors, trace
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.onnx import read_onnx
from graphcomp.passes.l1 import L1
from tests.nets import TRAPS, build, random_cnn, scramble
from tests.running import run_pass
from tests.tiny import context


def export(
    module: nn.Module, x: torch.Tensor, path: Path, *, opset: int = 17, dynamo: bool = False, **options: bool
) -> Path:
    """By torch's exporters, open in the batch unless `fixed`."""
    fixed, fold = options.get("fixed", False), options.get("fold", True)
    with warnings.catch_warnings(), muted():
        warnings.simplefilter("ignore")
        more = (
            {"dynamic_shapes": None if fixed else ({0: torch.export.Dim("batch")},), "external_data": False}
            if dynamo
            else {"dynamic_axes": None if fixed else {"x": {0: "batch"}}, "do_constant_folding": fold}
        )
        inputs = x if fixed or not dynamo else torch.cat([x, x])
        torch.onnx.export(
            module.eval(), (inputs,), str(path), dynamo=dynamo, opset_version=opset, input_names=["x"], verbose=False, **more
        )  # fmt: skip
    return path


def removable(program: Program) -> int:
    return sum(len(group.channels) for group in analyse(program).removable)


def check_same(module: nn.Module, program: Program, shape: tuple[int, ...]) -> None:
    for batch in (1, 3):
        x = torch.randn(batch, *shape[1:])
        with torch.no_grad():
            expected = output_tensors(module(x.clone()))
        for found, wanted in zip(output_tensors(program(x)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


_LESS_IS_KNOWN = {
    "attention-module": "the exporter merges samples and heads: the program stays at one sample",
    "batchnorm-of-batch": "statistics of the batch",
    "inplace-on-slice": "ScatterND",
    "shuffle-module": "the exporter has no channel shuffle",
}
"""Traps whose files cannot be read as the module is traced."""


@pytest.mark.slow
@pytest.mark.parametrize("trap", [n for n in TRAPS if n not in _LESS_IS_KNOWN])
def test_a_trap_comes_back_from_its_file(trap: str, tmp_path: Path) -> None:
    """Exported for one sample, which is the harder kind: as many channels can go as from the module."""
    built, shape = TRAPS[trap]()
    module = scramble(built, 0).eval()
    program = read_onnx(export(module, torch.randn(shape), tmp_path / "net.onnx", fixed=True))
    check_same(module, program, shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*forward computes from parameters alone")  # so does the file
        assert removable(program) >= removable(trace(module, torch.zeros(shape)))
    if removable(program):
        run_pass(L1(ratio=0.5, multiple=1), program, context())


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(spec=random_cnn())
def test_random_networks_come_back(tmp_path: Path, spec: dict[str, object]) -> None:
    module, shape = build(spec)
    module = scramble(module, 0).eval()
    path = export(module, torch.randn(shape), tmp_path / "net.onnx")
    try:
        program = read_onnx(path)
    except LoadError as error:
        assert "expected one of" in str(error)  # an operator that is not read, by name
        return
    check_same(module, program, shape)
    assert removable(program) >= removable(trace(module, torch.zeros(shape)))


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("opset", [11, 13, 17])
def test_every_operator_set(opset: int, fold: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = scramble(ResNet(8), 0)
    path = export(module, torch.randn(1, 3, 32, 32), tmp_path / "net.onnx", opset=opset, fold=fold)
    program = read_onnx(path)
    assert removable(program) == removable(trace(module, torch.zeros(1, 3, 32, 32)))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in program.modules.values()) == (
        0 if fold else sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    )
    check_same(module, program, (1, 3, 32, 32))
    run_pass(L1(ratio=0.5, multiple=1), program, context())
