"""A file that graphcomp wrote comes back, and is written again as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torchvision.models import DenseNet, mobilenet_v2, resnet18

from graphcomp.channels import analyse
from graphcomp.ir import PASS_KEY, Program, trace
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.onnx import export_onnx, read_onnx
from graphcomp.passes.dct import Dct
from graphcomp.passes.l1 import L1
from graphcomp.passes.low_rank import LowRank
from graphcomp.pipeline import Pass
from tests.nets import scramble
from tests.running import run_pass
from tests.tiny import context

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet-8": lambda: ResNet(8),
    "resnet-18": lambda: resnet18(num_classes=5),
    "mobilenet-v2": lambda: mobilenet_v2(width_mult=0.35, num_classes=5),
    "densenet": lambda: DenseNet(8, (2, 2), 16, num_classes=5),
}
PASSES: dict[str, Pass | None] = {
    "none": None,
    "l1": L1(ratio=0.5, multiple=1),
    "padded-joins": L1(ratio=0.5, multiple=1, join="pad"),
    "low-rank": LowRank(energy=0.6),
    "dct": Dct(rate=2),
}


def operators(path: Path) -> list[tuple[Any, ...]]:
    """The nodes of a file; values are numbers in the order of making, stored ones their bytes."""
    graph = onnx.load(path).graph
    ids: dict[str, Any] = {"": ""}
    for value in graph.input:
        ids[value.name] = len(ids)
    for tensor in graph.initializer:
        ids[tensor.name] = (tensor.data_type, *tensor.dims, tensor.raw_data)
    found = []
    for node in graph.node:
        inputs = [ids[name] for name in node.input]
        ids |= {name: len(ids) for name in node.output}
        attributes = sorted(a.SerializeToString() for a in node.attribute)
        made_by = next(p.value for p in node.metadata_props if p.key == "graphcomp.pass")
        found.append((node.op_type, inputs, len(node.output), attributes, made_by))
    return [*found, [ids[value.name] for value in graph.output]]


def groups(program: Program) -> list[tuple[str, int]]:
    return sorted((group.name, len(group.channels)) for group in analyse(program).removable)


@pytest.mark.slow
@pytest.mark.parametrize("done", PASSES)
@pytest.mark.parametrize("net", NETS)
def test_a_file_of_ours_comes_back_and_is_written_again(net: str, done: str, tmp_path: Path) -> None:
    program = trace(scramble(NETS[net](), 0).eval(), torch.randn(1, 3, 32, 32))
    pass_ = PASSES[done]
    if pass_ is not None:
        program = run_pass(pass_, program, context())[2]
    paths = [tmp_path / f"{i}.onnx" for i in range(3)]
    assert export_onnx(program, paths[0], dct="dense").fallback is None
    back = read_onnx(paths[0])
    assert back.interface.remarks == ()
    # weights that come from coefficients cannot lose channels; written dense they are plain ones
    assert set(groups(program)) <= set(groups(back)) if done == "dct" else groups(back) == groups(program)
    assert [plan["name"] for plan in back.history] == [plan["name"] for plan in program.history]
    layers = set(back.called_modules())
    assert layers <= set(program.called_modules())
    made = {node.meta[PASS_KEY] for node in program.graph.nodes if PASS_KEY in node.meta}
    assert made <= {node.meta.get(PASS_KEY) for node in back.graph.nodes} | {"trace"}
    export_onnx(back, paths[1])
    assert operators(paths[1]) == operators(paths[0])
    export_onnx(read_onnx(paths[1]), paths[2])
    assert paths[2].read_bytes() == paths[1].read_bytes()
