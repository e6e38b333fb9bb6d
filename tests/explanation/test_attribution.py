"""Operators of the runtime led back to the layers and passes of the file that it was given."""

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from graphcomp.errors import BenchError
from graphcomp.explanation.attribution import AttributedKernel, attribute
from graphcomp.explanation.profiling import Node, Operator, Profile
from graphcomp.runtime import onnxfile
from tests.explaining import NETS, kernels, recorded


def by_op(found: list[AttributedKernel], op: str) -> list[AttributedKernel]:
    return [kernel for kernel in found if kernel.operator.node.op == op]


def test_a_blocked_convolution_is_its_layer_with_what_was_fused_into_it(tmp_path: Path) -> None:
    """In the blocked layout, all three convolutions are named after a tensor, once before the addition."""
    found = by_op(kernels(tmp_path, "base"), "Conv")
    assert [k.operator.node.name for k in found] == [
        "relu_nchwc", "relu_1_nchwc", "block_conv2_nchwc", "relu_3_nchwc",
    ]  # fmt: skip
    assert [[s.key for s in k.sources] for k in found] == [
        ["stem", "relu"],
        ["block_conv1", "relu_1"],
        ["block_conv2", "add", "relu_2"],
        ["last", "relu_3"],
    ]
    assert [k.main.key for k in found if k.main] == ["stem", "block_conv1", "block_conv2", "last"]
    assert [k.layer for k in found] == ["stem", "block.conv1", "block.conv2", "last"]
    assert {k.form for k in found} == {"blocked"} and {k.made_by for k in found} == {None}


@pytest.mark.parametrize("name", NETS)
def test_every_multiplication_of_a_file_is_in_one_operator(name: str, tmp_path: Path) -> None:
    found = kernels(tmp_path, name)
    file = onnxfile.read(tmp_path / f"{name}.onnx")
    assert sum(k.macs for k in found) == onnxfile.count_macs(file, 1)
    keys = [s.key for k in found for s in k.sources]
    assert len(keys) == len(set(keys)) == len(file.model.graph.node)


def test_whole_blocks_are_counted_from_the_trace(tmp_path: Path) -> None:
    found = {k.layer: k for k in kernels(tmp_path, "pruned") if k.macs}
    plane = 16 * 16
    assert found["block.conv1"].computed == plane * 32 * 32 * 9  # 32 -> 21, in blocks of 16
    assert found["block.conv1"].macs == plane * 32 * 21 * 9
    assert found["last"].computed == plane // 4 * 32 * 48 * 9  # 32 -> 40
    plain = found["block.conv2"]  # 21 -> 24: not a multiple of 4
    assert (plain.form, plain.computed, plain.macs) == ("plain", plane * 21 * 24 * 9, plane * 21 * 24 * 9)


def test_what_is_unfused_or_added_belongs_to_the_layer_in_front_and_to_a_pass(tmp_path: Path) -> None:
    found = kernels(tmp_path, "pruned")
    around = {k.operator.node.op: k for k in found if k.layer == "block.conv2" and not k.macs}
    assert set(around) == {"Pad", "Add", "Relu", "ReorderInput"}
    assert {k.made_by for k in around.values()} == {"l1"}
    assert [s.made_by for s in around["Relu"].sources] == [None]  # the pass did not touch it itself
    assert around["ReorderInput"].sources == () and around["ReorderInput"].carries == "relu_2"


def test_a_reorder_is_due_to_who_needs_the_plain_layout(tmp_path: Path) -> None:
    """The stem's output is reordered for the addition, which the pass made plain."""
    file = onnxfile.read(NETS["pruned"](tmp_path / "x.onnx"))
    del file.model.graph.node[0].metadata_props[2:]  # the stem: no pass
    found = attribute(file, recorded("pruned"), 1)
    assert (found[0].layer, found[0].made_by) == ("stem", None)
    assert (found[1].operator.node.op, found[1].layer, found[1].made_by) == ("ReorderOutput", "stem", "l1")


def test_files_of_other_exporters_name_layers_but_no_pass(tmp_path: Path) -> None:
    file = onnxfile.read(NETS["pruned"](tmp_path / "x.onnx"))
    for node in file.model.graph.node:
        del node.metadata_props[:]
    found = attribute(file, recorded("pruned"), 1)
    assert {k.made_by for k in found} == {None}
    assert [k.layer for k in found if k.macs] == [
        "node_stem", "node_block_conv1", "node_block_conv2", "node_last", "node_fc",
    ]  # fmt: skip


def test_a_convolution_that_only_picks_channels_is_no_layer(tmp_path: Path) -> None:
    """As the exporter names its weight; it belongs to the layer in front."""
    file = onnxfile.read(NETS["factored"](tmp_path / "x.onnx"))
    graph, node = file.model.graph, file.model.graph.node[2]
    weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    weight.name = node.input[1] = f"{node.name}/select"
    found = attribute(file, recorded("factored"), 1)
    picking = [k for k in found if k.selects]
    assert [(k.layer, k.main.key) for k in picking if k.main] == [("stem", "block_conv1_0")]


def test_a_layer_that_the_runtime_does_not_show(tmp_path: Path) -> None:
    file, profile = onnxfile.read(NETS["base"](tmp_path / "x.onnx")), recorded("base")
    fewer = replace(profile, operators=profile.operators[:-1])
    with pytest.raises(BenchError, match=r"x\.onnx: found no operator of the runtime .* Gemm 'node_fc'"):
        attribute(file, fewer, 1)


def gpu(kernel: str, tmp_path: Path, multiple: int = 4) -> AttributedKernel:
    """A convolution 3 -> 6 that ran as `kernel`."""
    from tests.runtime.test_bench import write

    path = write(tmp_path / "x.onnx", 6)
    operators = []
    for node in onnx.load(path).graph.node:
        name = node.name or node.output[0]
        kept = Node(name, node.op_type, "", tuple(node.input), tuple(node.output))
        weight = {"conv": ((6, 3, 3, 3),), "head": ((6, 10),)}.get(name, ())
        shapes = ((1, 6, 8, 8), *weight)
        operators.append(Operator(kept, 0.1, "CUDAExecutionProvider", shapes, ((1, 6, 8, 8),), (kernel,)))
    return attribute(onnxfile.read(path), Profile(tuple(operators), 9, 1.0), 1, multiple)[0]


def test_gpu_kernels_round_channels_up_and_tell_their_cores(tmp_path: Path) -> None:
    found = gpu("sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nchw", tmp_path)
    assert (found.form, found.macs) == ("tensor cores", 64 * 6 * 27)
    assert found.computed == 64 * 8 * 4 * 9  # 3 -> 6 in multiples of 4
    other = gpu("implicit_convolve_sgemm", tmp_path, multiple=1)
    assert (other.form, other.computed) == ("CUDA cores", other.macs)
