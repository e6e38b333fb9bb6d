import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from graphcomp.errors import BenchError
from graphcomp.runtime import onnxfile
from graphcomp.runtime.constants import fold_small_constants
from graphcomp.runtime.onnxfile import onnx_macs

Dims = list[int | str]


def model(
    nodes: list[NodeProto],
    inputs: dict[str, Dims],
    weights: dict[str, tuple[int, ...]],
    outputs: list[str] | None = None,
    opset: int = 18,
) -> ModelProto:
    outputs = outputs or [nodes[-1].output[0]]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.ones(dims, np.float32), name) for name, dims in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def conv(x: str = "x", w: str = "w", y: str = "y", **attributes: object) -> NodeProto:
    return helper.make_node("Conv", [x, w], [y], name=y, **attributes)


CONV = model([conv(pads=[1, 1, 1, 1])], {"x": ["batch", 3, 8, 8]}, {"w": (4, 3, 3, 3)})


def test_conv() -> None:
    assert onnx_macs(CONV) == 4 * 3 * 9 * 8 * 8


def test_macs_follow_the_batch() -> None:
    assert onnx_macs(CONV, batch=5) == 5 * onnx_macs(CONV)


def test_strided_and_grouped_conv() -> None:
    net = model([conv(strides=[2, 2], group=2)], {"x": ["n", 4, 9, 9]}, {"w": (6, 2, 3, 3)})
    assert onnx_macs(net) == 6 * 2 * 9 * 4 * 4


def test_conv_transpose_counts_each_input_once_per_weight() -> None:
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    net = model([node], {"x": ["n", 4, 5, 5]}, {"w": (4, 6, 2, 2)})
    assert onnx_macs(net) == 4 * 5 * 5 * 6 * 2 * 2


@pytest.mark.parametrize(("transposed", "shape"), [(0, (7, 10)), (1, (10, 7))])
def test_gemm(transposed: int, shape: tuple[int, int]) -> None:
    net = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=transposed)], {"x": ["n", 7]}, {"w": shape}
    )
    assert onnx_macs(net, batch=3) == 3 * 7 * 10


def test_gemm_with_transposed_input() -> None:
    net = model([helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)], {"x": [7, 3]}, {"w": (7, 10)})
    assert onnx_macs(net, batch=7) == 7 * 3 * 10


def test_matmul_of_two_activations() -> None:
    net = model(
        [helper.make_node("MatMul", ["x", "z"], ["y"])], {"x": ["n", 2, 5, 6], "z": ["n", 2, 6, 7]}, {}
    )
    assert onnx_macs(net, batch=2) == 2 * 2 * 5 * 6 * 7


def test_everything_else_is_free() -> None:
    nodes = [
        conv(),
        helper.make_node("Relu", ["y"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
    ]
    net = model(nodes, {"x": ["n", 3, 4, 4]}, {"w": (8, 3, 1, 1)})
    assert onnx_macs(net) == 8 * 3 * 16


def test_weights_computed_from_constants_cost_nothing() -> None:
    nodes = [helper.make_node("MatMul", ["a", "b"], ["w2"]), helper.make_node("Gemm", ["x", "w2"], ["y"])]
    net = model(nodes, {"x": ["n", 6]}, {"a": (6, 9), "b": (9, 4)})
    assert onnx_macs(net) == 6 * 4


def test_shapes_are_found_behind_a_reshape_by_the_batch() -> None:
    nodes = [
        conv(pads=[1, 1, 1, 1]),
        helper.make_node("Shape", ["y"], ["size"], end=1),
        helper.make_node("Concat", ["size", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["y", "target"], ["flat"]),
        helper.make_node("Gemm", ["flat", "g"], ["z"]),
    ]
    net = model(nodes, {"x": ["n", 3, 8, 8]}, {"w": (4, 3, 3, 3), "g": (256, 10)})
    net.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "rest"))
    assert onnx_macs(net, batch=2) == 2 * (4 * 3 * 9 * 64 + 256 * 10)


def test_symbolic_shapes_left_by_the_exporter_do_not_hide_numbers() -> None:
    net = model(
        [conv(y="h"), conv("h", "v", "y")], {"x": ["n", 3, 4, 4]}, {"w": (5, 3, 1, 1), "v": (2, 5, 1, 1)}
    )
    net.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 5, "s0", "s1"]))
    assert onnx_macs(net) == (5 * 3 + 2 * 5) * 16


def test_local_functions_are_looked_into() -> None:
    body = helper.make_function(
        "local", "Twice", ["a", "m"], ["c"],
        [helper.make_node("MatMul", ["a", "m"], ["b"]), helper.make_node("MatMul", ["b", "m"], ["c"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    net = model(
        [helper.make_node("Twice", ["x", "m"], ["y"], domain="local")], {"x": ["n", 6]}, {"m": (6, 6)}
    )
    net.functions.append(body)
    net.opset_import.append(helper.make_opsetid("local", 1))
    assert onnx_macs(net) == 2 * 6 * 6


def test_fixed_batch_is_scaled() -> None:
    net = model([conv(pads=[1, 1, 1, 1])], {"x": [8, 3, 8, 8]}, {"w": (4, 3, 3, 3)})
    assert onnx_macs(net, batch=1) == onnx_macs(CONV)
    assert onnx_macs(net, batch=8) == onnx_macs(CONV, batch=8)


def test_counting_leaves_the_model_as_it_was() -> None:
    before = CONV.SerializeToString()
    onnx_macs(CONV)
    assert CONV.SerializeToString() == before


def test_other_dynamic_dimension_is_an_error() -> None:
    net = model([conv()], {"x": ["n", 3, "height", 8]}, {"w": (4, 3, 1, 1)})
    with pytest.raises(BenchError, match=r"input x FLOAT \?x3x\?x8 has a dynamic dimension 2"):
        onnx_macs(net)


@pytest.mark.parametrize(("op", "domain"), [("DeformConv", ""), ("FusedConv", "com.microsoft")])
def test_what_multiplies_without_a_rule_is_an_error(op: str, domain: str) -> None:
    net = model(
        [helper.make_node(op, ["x", "w"], ["y"], name="odd", domain=domain)], {"x": ["n", 3]}, {"w": (3,)}
    )
    with pytest.raises(BenchError, match=f"{op} 'odd': its multiply-accumulates cannot be counted"):
        onnx_macs(net)


@pytest.mark.parametrize(
    ("op", "inputs", "weights", "attributes", "macs"),
    [
        ("LSTM", {"x": [5, 2, 3]}, {"w": (1, 16, 3), "r": (1, 16, 4)}, {"hidden_size": 4}, 10 * 16 * 7),
        (
            "GRU",
            {"x": [5, 2, 3]},
            {"w": (2, 12, 3), "r": (2, 12, 4)},
            {"hidden_size": 4, "direction": "bidirectional"},
            10 * 2 * 12 * 7,
        ),
        ("Attention", {"q": [2, 3, 5, 4], "k": [2, 3, 7, 4], "v": [2, 3, 7, 6]}, {}, {}, 2 * 3 * 5 * 7 * 10),
        ("Einsum", {"a": [2, 3, 4]}, {"w": (4, 5)}, {"equation": "bij, jk -> bik"}, 2 * 3 * 4 * 5),
        ("Einsum", {"a": [2, 3, 4]}, {}, {"equation": "bij->b"}, 0),
    ],
)
def test_other_layers_are_counted(
    op: str, inputs: Any, weights: Any, attributes: dict[str, Any], macs: int
) -> None:
    node = helper.make_node(op, [*inputs, *weights], ["y"], **attributes)
    net = model([node], inputs, weights, opset=23)
    assert onnx_macs(net, batch=next(iter(inputs.values()))[0]) == macs


def test_a_shape_that_inference_does_not_find_is_seen() -> None:
    """Half of the channels, by arithmetic that inference does not follow."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("ReduceMax", ["s"], ["m"], keepdims=1),
        helper.make_node("Div", ["m", "two"], ["h"]),
        helper.make_node("Slice", ["x", "zero", "h", "one"], ["half"]),
        helper.make_node("MatMul", ["half", "w"], ["y"], name="last"),
    ]
    net = model(nodes, {"x": ["n", 8]}, {"w": (4, 3)})
    for name, number in (("zero", 0), ("one", 1), ("two", 2)):
        net.graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
    assert onnx_macs(net, batch=3) == 3 * 4 * 3


def test_shape_that_inference_does_not_find_is_an_error() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=1)]
    net = model(
        [*nodes, helper.make_node("MatMul", ["f", "w"], ["y"], name="last")], {"x": [2, 2]}, {"w": (4, 4)}
    )
    with pytest.raises(BenchError, match="MatMul 'last': shape inference finds no shape for 'f'"):
        onnx_macs(net, batch=2)


def test_model_that_inference_refuses_is_an_error() -> None:
    net = ModelProto()
    net.CopyFrom(CONV)
    del net.opset_import[:]
    with pytest.raises(BenchError, match="model: shape inference fails"):
        onnx_macs(net)


def test_read_knows_inputs_hash_and_size(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(CONV, path)
    file = onnxfile.read(path)
    assert file.inputs == (onnxfile.Input("x", "FLOAT", (None, 3, 8, 8)),)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.bytes == path.stat().st_size
    assert onnx_macs(path) == onnx_macs(CONV)


def test_hash_covers_external_data(tmp_path: Path) -> None:
    hashes = set()
    for value in (1, 2):
        net = model([conv()], {"x": ["n", 64, 4, 4]}, {"w": (64, 64, 1, 1)})
        net.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.full((64, 64, 1, 1), value, np.float32), "w")
        )
        path = tmp_path / "net.onnx"
        (tmp_path / "weights").unlink(missing_ok=True)
        onnx.save(net, path, save_as_external_data=True, location="weights")
        file = onnxfile.read(path)
        assert file.bytes == path.stat().st_size + (tmp_path / "weights").stat().st_size
        assert onnx_macs(path) == 64 * 64 * 16
        hashes.add(file.sha256)
    assert len(hashes) == 2


def test_missing_external_data_is_an_error(tmp_path: Path) -> None:
    net = model([conv()], {"x": ["n", 64, 4, 4]}, {"w": (64, 64, 1, 1)})
    onnx.save(net, tmp_path / "net.onnx", save_as_external_data=True, location="weights")
    (tmp_path / "weights").unlink()
    with pytest.raises(BenchError, match="external data cannot be read"):
        onnxfile.read(tmp_path / "net.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x00" * 64])
def test_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"bad\.onnx: found"):
        onnxfile.read(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"none\.onnx: cannot be read"):
        onnxfile.read(tmp_path / "none.onnx")


def test_fixed_batch_refuses_another() -> None:
    inputs = (onnxfile.Input("x", "FLOAT", (8, 3)),)
    assert onnxfile.feed_shapes(inputs, 8, "net") == {"x": (8, 3)}
    with pytest.raises(BenchError, match="net: found a fixed batch of 8, expected 2"):
        onnxfile.feed_shapes(inputs, 2, "net")


def test_sizes_that_constants_are_computed_for() -> None:
    """As exporters write the channels that a shortcut is padded with: zeros, the numbers, turned around."""
    numbers = {
        "few": [2],
        "pairs": [-1, 2],
        "from": [-1],
        "to": [-9],
        "axis": [0],
        "step": [-1],
    }
    net = model(
        [
            helper.make_node("ConstantOfShape", ["few"], ["zeros"],
                             value=numpy_helper.from_array(np.zeros(1, np.int64))),
            helper.make_node("Concat", ["front", "zeros"], ["eight"], axis=0),
            helper.make_node("Reshape", ["eight", "pairs"], ["table"]),
            helper.make_node("Slice", ["table", "from", "to", "axis", "step"], ["turned"]),
            helper.make_node("Transpose", ["turned"], ["across"], perm=[1, 0]),
            helper.make_node("Reshape", ["across", "flat"], ["pads"]),
            helper.make_node("Pad", ["x", "pads"], ["padded"]),
            conv("padded"),
        ],
        {"x": ["batch", 3, 8, 8]}, {"w": (4, 5, 3, 3)},
    )  # fmt: skip
    for name, values in {**numbers, "flat": [-1], "front": [0, 0, 0, 0, 1, 1]}.items():
        net.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    before = net.SerializeToString()
    assert onnx_macs(net, batch=2) == 2 * 4 * 5 * 9 * 6 * 6
    assert net.SerializeToString() == before


def test_a_constant_that_is_not_small_is_not_computed() -> None:
    net = model([helper.make_node("ConstantOfShape", ["huge"], ["zeros"])], {"x": ["batch"]}, {})
    net.graph.initializer.append(numpy_helper.from_array(np.array([2**40], np.int64), "huge"))
    fold_small_constants(net, [])
    assert [node.op_type for node in net.graph.node] == ["ConstantOfShape"]


def test_a_constant_of_any_size_is_not_made() -> None:
    """Shape inference fills ConstantOfShape with numbers: 2^40 of them end the process."""
    huge = numpy_helper.from_array(np.array([1 << 40], np.int64), "huge")
    nodes = [
        helper.make_node("ConstantOfShape", ["huge"], ["bomb"]),
        helper.make_node("Neg", ["bomb"], ["z"]),
    ]
    plain = model([conv()], {"x": (1, 3, 8, 8)}, {"w": (4, 3, 3, 3)})
    bomb = ModelProto.FromString(plain.SerializeToString())
    bomb.graph.node.extend(nodes)
    bomb.graph.initializer.append(huge)
    assert onnx_macs(bomb) == onnx_macs(plain)
