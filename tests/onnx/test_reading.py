"""Files become programs: what exporters do to them, what stays open, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.helper import make_node as node
from torch import nn

from graphcomp.channels import analyse
from graphcomp.errors import LoadError
from graphcomp.ir import LstmLayer, Program, damaged, load, save
from graphcomp.onnx import read_onnx
from graphcomp.onnx.reading.comparison import _File
from tests.onnx.onnx_files import OPEN, Array, make, read_unchecked, run
from tests.onnx.onnx_files import save as write
from tests.onnx.read_examples import ints, weight

F32 = np.float32


def conv(name: str, source: str, result: str, weight: str, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", [source, weight], [result], name=name, **attributes)


def removable(program: Program) -> int:
    return sum(len(group.channels) for group in analyse(program).removable)


def two_samples(program: Program, *shape: int) -> tuple[Array, Array]:
    """What two samples yield together, and each alone."""
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(F32)
    (together,) = run(program, {"x": x})
    return together, np.concatenate([run(program, {"x": x[i : i + 1]})[0] for i in range(2)])


# ---- 1: files of one sample


def test_a_file_of_one_sample_takes_any_number(tmp_path: Path) -> None:
    """At batch 2 the numbers of the file would mix samples, and torch would not mind."""
    model = make(
        [node("Reshape", ["x", "s"], ["r"]), node("Softmax", ["r"], ["y"], axis=1)],
        {"x": (1, 4, 6)},
        {"s": ints(1, -1, 2)},
    )
    program = read_onnx(write(model, tmp_path))
    together, alone = two_samples(program, 4, 6)
    assert together.shape == (2, 12, 2)
    np.testing.assert_allclose(together, alone, rtol=1e-6)
    assert [p.axes for p in program.interface.inputs] == [{0: "batch"}]
    assert "any number" in program.interface.remarks[0]


@pytest.mark.parametrize("large", [0, 1e7], ids=["plainly", "behind rounding"])
def test_a_file_that_mixes_samples_stays_at_one(large: float, tmp_path: Path) -> None:
    """Where float32 yields noise float64 tells."""
    model = make(
        [
            node("Add", ["x", "l"], ["p"]),
            node("Sub", ["p", "l"], ["q"]),
            node("Transpose", ["q"], ["t"], perm=[1, 0, 2]),
            node("Reshape", ["t", "s"], ["r"]),
            node("ReduceMax", ["r", "a"], ["y"]),
        ],
        {"x": (1, 4, 6)},
        {"s": ints(4, 6), "a": ints(1), "l": np.array([large] * 6, F32)},
    )
    program = read_onnx(write(model, tmp_path))
    assert [p.axes for p in program.interface.inputs] == [{}]
    assert "one sample at a time" in program.interface.remarks[0]
    assert run(program, {"x": np.zeros((1, 4, 6), F32)})[0].shape == (4, 1)


def test_constants_of_one_sample_are_repeated(tmp_path: Path) -> None:
    """A class token, concatenated as an exporter for one sample wrote it."""
    model = make(
        [node("Concat", ["token", "x"], ["y"], axis=1)], {"x": (1, 3, 4)}, {"token": weight(1, 1, 4)}
    )
    together, alone = two_samples(read_onnx(write(model, tmp_path)), 3, 4)
    assert together.shape == (2, 4, 4)
    np.testing.assert_array_equal(together, alone)


# ---- 2: tiny outputs


def test_outputs_that_are_tiny_agree(tmp_path: Path) -> None:
    """Differences of a detector that is sure of nothing are rounding of what it computed before."""
    constants = {"w": weight(8, 64), "big": F32(1e4), "tiny": F32(1e-12)}
    nodes = [
        node("MatMul", ["x", "w2"], ["a"]),
        node("Add", ["a", "big"], ["b"]),
        node("Sub", ["b", "big"], ["c"]),
        node("Mul", ["c", "tiny"], ["y"]),
    ]
    read_onnx(write(make(nodes, {"x": (OPEN, 64)}, {**constants, "w2": weight(64, 8)}), tmp_path))


# ---- 3: merged initialisers


def norm(name: str, source: str, result: str, scale: str) -> onnx.NodeProto:
    return node("BatchNormalization", [source, scale, "zero", "zero", scale], [result], name=name)


def test_equal_vectors_that_an_exporter_merged_are_copied(tmp_path: Path) -> None:
    nodes = [
        conv("c1", "x", "a", "w1"), norm("n1", "a", "b", "one"), conv("c2", "b", "c", "w2"),
        norm("n2", "c", "y", "one"),
    ]  # fmt: skip
    constants = {
        "w1": weight(6, 3, 1, 1),
        "w2": weight(6, 6, 1, 1, seed=1),
        "one": np.ones(6, F32),
        "zero": np.zeros(6, F32),
    }
    program = read_onnx(write(make(nodes, {"x": (OPEN, 3, 4, 4)}, constants), tmp_path))
    tensors = [t.data_ptr() for t in program.tensors.values()]
    assert len(set(tensors)) == len(tensors) and removable(program) == 6


def test_nodes_that_call_one_layer_share_it(tmp_path: Path) -> None:
    nodes = [
        conv("c1", "x", "a", "head.conv.weight"), conv("c2", "a", "b", "head.conv.weight"),
        conv("c3", "b", "y", "head.conv.weight", strides=[2, 2]),
    ]  # fmt: skip
    model = make(nodes, {"x": (OPEN, 3, 8, 8)}, {"head.conv.weight": weight(3, 3, 1, 1)})
    program = read_onnx(write(model, tmp_path))
    calls = [n.target for n in program.graph.nodes if n.op == "call_module"]
    assert calls == ["head.conv", "head.conv", "head.conv_1"]
    assert program.tensors["head.conv.weight"] is not program.tensors["head.conv_1.weight"]


# ---- 4: casts


def test_casts_between_floats_are_none_and_others_follow_the_type(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE),
        node("Cast", ["d"], ["f"], to=TensorProto.FLOAT),
        node("ArgMax", ["f"], ["i"], axis=1),
        node("Cast", ["i"], ["n"], to=TensorProto.FLOAT),
        node("Mul", ["n", "f"], ["y"]),
    ]
    program = read_onnx(write(make(nodes, {"x": (OPEN, 5)}), tmp_path))
    assert [n.target for n in program.graph.nodes if n.op == "call_method"] == ["to"]
    x = torch.randn(3, 5, dtype=torch.float64)
    found = program.to(torch.float64)(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x * x.argmax(1, keepdim=True))


# ---- 5: movement by positions


def shuffled(by: str) -> onnx.ModelProto:
    """A channel shuffle between two convolutions, as positions of channels or of all elements."""
    order = np.arange(8).reshape(2, 4).T.reshape(-1)
    constants: dict[str, Array] = {"w1": weight(8, 3, 1, 1), "w2": weight(4, 8, 1, 1)}
    if by == "channels":
        move = [node("Gather", ["a", "i"], ["b"], axis=1)]
        constants["i"] = order
    else:  # as_strided of a tensor of one sample
        move = [
            node("Reshape", ["a", "flat"], ["f"]), node("Gather", ["f", "i"], ["g"]),
            node("Reshape", ["g", "back"], ["b"]),
        ]  # fmt: skip
        whole = np.arange(8 * 25).reshape(1, 8, 5, 5)
        constants |= {"flat": ints(-1), "i": whole.transpose(0, 1, 3, 2), "back": ints(1, 8, 5, 5)}
    if by == "samples":  # of any number of them
        constants |= {
            "zero": np.int64(0),
            "one": np.int64(1),
            "each": np.int64(200),
            "tall": ints(-1, 1, 1, 1),
        }
        constants["back"] = ints(-1, 8, 5, 5)
        move = [
            node("Shape", ["a"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
            node("Range", ["zero", "n", "one"], ["r"]), node("Mul", ["r", "each"], ["m"]),
            node("Reshape", ["m", "tall"], ["t"]), node("Add", ["t", "i"], ["p"]),
            node("Reshape", ["a", "flat"], ["f"]), node("Gather", ["f", "p"], ["g"]),
            node("Reshape", ["g", "back"], ["b"]),
        ]  # fmt: skip
    return make(
        [conv("c1", "x", "a", "w1"), *move, conv("c2", "b", "y", "w2")],
        {"x": (1 if by == "elements" else OPEN, 3, 5, 5)},
        constants,
    )


@pytest.mark.parametrize("by", ["channels", "elements", "samples"])
def test_a_gather_of_positions_is_movement(by: str, tmp_path: Path) -> None:
    program = read_onnx(write(shuffled(by), tmp_path))
    assert removable(program) == 8 and not program.interface.remarks[1:]


# ---- 6: where weights are


def test_weights_as_constants_and_as_inputs(tmp_path: Path) -> None:
    """Nodes that hold weights, and initialisers that are listed as inputs, as before IR version 4."""
    held = onnx.numpy_helper.from_array(weight(4, 3, 3, 3), "value")
    nodes = [
        node("Constant", [], ["w"], value=held),
        conv("c", "x", "a", "w"),
        node("Add", ["a", "b"], ["y"]),
    ]
    model = make(nodes, {"x": (OPEN, 3, 6, 6), "b": (4, 1, 1)}, {"b": weight(4, 1, 1)})
    model.ir_version = 3
    program = read_onnx(write(model, tmp_path))
    assert len(program.example_inputs) == 1
    layer = program.layer("c", nn.Conv2d)
    assert layer.bias is not None and list(program.called_modules()) == ["c"]


def test_a_bias_that_takes_the_inputs_type_is_a_bias(tmp_path: Path) -> None:
    """As torch's exporter writes a layer without one, when it folds nothing."""
    nodes = [
        node("CastLike", ["zero", "x"], ["typed"]),
        node("Shape", ["w"], ["size"], start=0, end=1),
        node("Expand", ["typed", "size"], ["b"]),
        node("Conv", ["x", "w", "b"], ["y"], name="c"),
    ]
    arrays = {"w": weight(4, 3, 3, 3), "zero": np.array(2, np.int64)}
    program = read_onnx(write(make(nodes, {"x": (OPEN, 3, 6, 6)}, arrays), tmp_path))
    assert list(program.called_modules()) == ["c"]
    bias = program.layer("c", nn.Conv2d).bias
    assert bias is not None
    torch.testing.assert_close(bias.detach(), torch.full((4,), 2.0))


def external(tmp_path: Path, location: str = "weights.bin") -> tuple[onnx.ModelProto, Path]:
    model = make([conv("c", "x", "y", "w")], {"x": (OPEN, 3, 6, 6)}, {"w": weight(4, 3, 3, 3)})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    stored = onnx.load(path, load_external_data=False)
    for entry in stored.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(stored.SerializeToString())
    return model, path


def test_external_data_are_read(tmp_path: Path) -> None:
    _, path = external(tmp_path)
    torch.testing.assert_close(
        read_onnx(path).tensors["c.weight"].detach(), torch.from_numpy(weight(4, 3, 3, 3))
    )


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/passwd", "link.bin", "folder/../weights.bin", "missing", "."]
)
def test_external_data_stay_in_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    _, path = external(tmp_path / "inner", location)
    (tmp_path / "weights.bin").write_bytes(bytes(4 * 3 * 9 * 4))
    (tmp_path / "inner" / "link.bin").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(LoadError, match="external data"):
        read_onnx(path)


def test_half_precision_becomes_float32_and_is_said(tmp_path: Path) -> None:
    model = make(
        [conv("c", "x", "a", "w"), node("Relu", ["a"], ["y"])],
        {"x": (OPEN, 3, 6, 6)},
        {"w": weight(4, 3, 3, 3).astype(np.float16)},
        kinds={"x": TensorProto.FLOAT16},
    )
    program = read_onnx(write(model, tmp_path))
    assert {t.dtype for t in (*program.tensors.values(), *program.example_inputs)} == {torch.float32}
    assert "float16 numbers were read as float32" in program.interface.remarks


# ---- 7: channels last


def test_transposes_of_channels_last_are_composed(tmp_path: Path) -> None:
    to_first, to_last = [0, 3, 1, 2], [0, 2, 3, 1]
    nodes = [node("Transpose", ["x"], ["t0"], perm=to_first)]
    last = "t0"
    for i in range(6):
        nodes += [
            conv(f"c{i}", last, f"a{i}", f"w{i}"),
            node("Transpose", [f"a{i}"], [f"l{i}"], perm=to_last),
            node("Transpose", [f"l{i}"], [f"f{i}"], perm=to_first),
        ]
        last = f"f{i}"
    nodes.append(node("Transpose", [last], ["y"], perm=to_last))
    constants = {f"w{i}": weight(5, 3 if i == 0 else 5, 1, 1, seed=i) for i in range(6)}
    program = read_onnx(write(make(nodes, {"x": (OPEN, 4, 4, 3)}, constants), tmp_path))
    assert sum(n.target is torch.permute for n in program.graph.nodes) == 2
    assert removable(program) == 25


# ---- 8: what is infinite


def test_infinite_masks_are_no_weights(tmp_path: Path) -> None:
    mask = np.triu(np.full((4, 4), -np.inf, F32), 1)
    nodes = [node("Add", ["x", "mask"], ["m"]), node("Softmax", ["m"], ["y"], axis=-1)]
    program = read_onnx(write(make(nodes, {"x": (OPEN, 4, 4)}, {"mask": mask}), tmp_path))
    assert not damaged(program.module, program.tensors)
    assert not list(program.module.parameters())


# ---- names, branches, open sizes


def test_layers_are_called_as_in_the_module_they_were_exported_from(tmp_path: Path) -> None:
    names = {
        "/model.0/conv/Conv": "w.1", "/layer1/layer1.0/conv2/Conv": "w.2", "Conv_7": "backbone.stem.weight",
        "StatefulPartitionedCall/net/block/Conv2D": "w.3", "/training/half/Conv": "w.4",
    }  # fmt: skip
    nodes, last = [], "x"
    for i, (name, held) in enumerate(names.items()):
        nodes.append(conv(name, last, f"v{i}" if i < len(names) - 1 else "y", held))
        last = f"v{i}"
    model = make(
        nodes, {"x": (OPEN, 3, 4, 4)}, {w: weight(3, 3, 1, 1, seed=i) for i, w in enumerate(names.values())}
    )
    program = read_onnx(write(model, tmp_path))
    assert list(program.called_modules()) == [
        "model.0.conv", "layer1.0.conv2", "backbone.stem", "net.block", "training_half",
    ]  # fmt: skip
    save(program, tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint() == program.fingerprint()


def test_a_branch_that_is_known_is_read(tmp_path: Path) -> None:
    """torch exports a squeeze without an axis as an If on a shape."""
    then = onnx.helper.make_graph(
        [node("Squeeze", ["x", "a"], ["s"])], "then", [], [onnx.helper.make_empty_tensor_value_info("s")]
    )
    other = onnx.helper.make_graph(
        [node("Identity", ["x"], ["o"])], "else", [], [onnx.helper.make_empty_tensor_value_info("o")]
    )
    nodes = [
        node("Shape", ["x"], ["shape"]), node("Gather", ["shape", "one"], ["size"]),
        node("Equal", ["size", "one"], ["is"]),
        node("If", ["is"], ["y"], then_branch=then, else_branch=other),
    ]  # fmt: skip
    model = make(nodes, {"x": (OPEN, 1, 4)}, {"one": np.int64(1), "a": ints(1)})
    assert run(read_onnx(write(model, tmp_path)), {"x": np.zeros((3, 1, 4), F32)})[0].shape == (3, 4)


def upsampled(by: str, **rule: str) -> onnx.ModelProto:
    """A network that resizes back to the input's size."""
    nodes = [
        conv("c", "x", "a", "w", strides=[2, 2]), node("Shape", ["x"], ["all"]),
        node("Slice", ["all", "two", "four"], ["hw"]), node("Shape", ["a"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["nc"]), node("Concat", ["nc", "hw"], ["size"], axis=0),
        node("Resize", ["a", "", "", "size"], ["y"], mode=by, **rule),
    ]  # fmt: skip
    constants = {"w": weight(2, 3, 1, 1), "two": ints(2), "four": ints(4), "zero": ints(0)}
    return make(nodes, {"x": ("N", 3, "H", "W")}, constants)


@pytest.mark.parametrize("by", ["nearest", "linear"])
def test_height_and_width_stay_open(by: str, tmp_path: Path) -> None:
    rule = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}  # as torch exports it
    path = write(upsampled(by, **rule if by == "nearest" else {}), tmp_path)
    with pytest.raises(LoadError, match="--input-shape x=1"):
        read_onnx(path)
    program = read_onnx(path, {"x": (1, 3, 8, 12)})
    assert program.interface.inputs[0].axes == {0: "N", 2: "H", 3: "W"}
    assert run(program, {"x": np.zeros((2, 3, 20, 18), F32)})[0].shape == (2, 2, 20, 18)


def test_what_torch_computes_at_some_sizes_only_is_read_for_one(tmp_path: Path) -> None:
    """Twice as large, its nearest neighbours are those of this rule; 15 from 8 they are others."""
    program = read_onnx(write(upsampled("nearest"), tmp_path), {"x": (1, 3, 8, 12)})
    assert program.interface.inputs[0].axes == {0: "N"}
    assert any("inputs of the example's size only" in said for said in program.interface.remarks)


def test_an_input_shape_must_be_the_files(tmp_path: Path) -> None:
    path = write(upsampled("nearest"), tmp_path)
    for shapes in ({"z": (1, 3, 8, 8)}, {"x": (1, 4, 8, 8)}, {"x": (1, 3, 8)}, {"x": (1, 3, 0, 8)}):
        with pytest.raises(LoadError, match="--input-shape"):
            read_onnx(path, shapes)


def test_an_open_size_is_asked_for_in_the_form_to_give_it_in(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"give --input-shape x=1,3,\?,\?, with a size for every \?"):
        read_onnx(write(upsampled("nearest"), tmp_path))


def test_layers_of_parts_that_were_fused_are_called_after_the_first(tmp_path: Path) -> None:
    """TFLite's names of what it fuses: all parts, joined."""
    fused = "net/re_lu/Relu;net/conv/BiasAdd;net/conv/Conv2D"
    model = make([conv(fused, "x", "y", "w")], {"x": ("n", 3, 8, 8)}, {"w": weight(4, 3, 3, 3)})
    program = read_onnx(write(model, tmp_path))
    assert list(program.called_modules()) == ["net.re_lu"]


def test_a_recurrent_network_with_time_in_front(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "w", "r", "b", "", "h", "h"], ["o"], hidden_size=3, direction="bidirectional"),
        node("Transpose", ["o"], ["p"], perm=[2, 0, 1, 3]), node("Reshape", ["p", "s"], ["y"]),
    ]  # fmt: skip
    constants = {
        "w": weight(2, 12, 5), "r": weight(2, 12, 3), "b": weight(2, 24), "h": np.zeros((2, 1, 3), F32),
        "s": ints(0, 4, 6),
    }  # fmt: skip
    model = make(nodes, {"x": (1, 4, 5)}, constants)
    program = read_onnx(write(model, tmp_path))
    assert any(isinstance(m, LstmLayer) for m in program.called_modules().values())
    together, alone = two_samples(program, 4, 5)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    save(program, tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.fingerprint() == program.fingerprint()
    torch.testing.assert_close(again(torch.ones(2, 4, 5)), program(torch.ones(2, 4, 5)))


# ---- what is refused


def refused(
    tmp_path: Path, operator: str, match: str, opset: int = 18, domain: str = "", **attributes: Any
) -> None:
    model = make(
        [node(operator, ["x"], ["y"], name="the node", domain=domain, **attributes)],
        {"x": (OPEN, 4)},
        opset=opset,
    )
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(LoadError, match=match) as caught:
        read_onnx(path)
    assert operator in str(caught.value) and "the node" in str(caught.value)


@pytest.mark.parametrize(
    "operator", ["QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear"]
)
def test_quantised_files_are_refused_by_name(operator: str, tmp_path: Path) -> None:
    refused(tmp_path, operator, "compress the floating point file")


@pytest.mark.parametrize(
    "operator",
    ["Loop", "Scan", "If", "NonZero", "NonMaxSuppression", "RandomNormalLike", "Upsample", "Scatter"],
)
def test_operators_that_cannot_be_read_are_refused_by_name(operator: str, tmp_path: Path) -> None:
    refused(tmp_path, operator, "expected")


def test_operators_of_others_are_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, "FusedConv", "ONNX Runtime's optimiser", domain="com.microsoft")
    refused(tmp_path, "Scaler", "no neural network", domain="ai.onnx.ml")


def test_what_a_row_does_not_know_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "Relu", "attribute 'slope'", slope=0.5)


def test_a_wrong_row_cannot_be_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(make([node("Tanh", ["x"], ["y"])], {"x": (OPEN, 4)}), tmp_path)
    monkeypatch.setattr("graphcomp.onnx.rows.activations._PLAIN", {"Tanh": torch.relu})
    with pytest.raises(LoadError, match="relative error"):
        read_onnx(path)


@pytest.mark.parametrize(("large", "off"), [(1e4, 5e-4), (1.0, 5e-4), (1e4, 0.1), (1e6, 0.1)])
def test_rounding_that_a_network_amplifies_is_no_wrong_row(
    large: float, off: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float32 is as far from float64: another runtime may be, too, however far that is."""
    nodes = [node("Add", ["x", "l"], ["s"]), node("Sub", ["s", "l"], ["y"])]
    path = write(make(nodes, {"x": (OPEN, 4)}, {"l": np.array([large] * 4, F32)}), tmp_path)
    runs = _File.run
    monkeypatch.setattr(_File, "run", lambda self, samples: [y * (1 + off) for y in runs(self, samples)])
    if off / large < 1e-6:
        assert any("amplifies rounding" in said for said in read_onnx(path).interface.remarks)
    else:
        with pytest.raises(LoadError, match="relative error"):
            read_onnx(path)


@pytest.mark.parametrize(("wrong", "large"), [(None, 1e4), (5e-5, 1e4), (2e-3, 1e4), (2e-3, 1e6)])
def test_a_wrong_row_cannot_hide_behind_rounding(
    wrong: float | None, large: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row is held to the runtime's own values where the outputs alone would not tell."""
    nodes = [node("Tanh", ["x"], ["t"]), node("Add", ["t", "l"], ["s"]), node("Sub", ["s", "l"], ["y"])]
    path = write(make(nodes, {"x": (OPEN, 64)}, {"l": np.array([large] * 64, F32)}), tmp_path)
    if wrong is None:
        read_onnx(path)
        return
    monkeypatch.setattr("graphcomp.onnx.rows.activations._PLAIN", {"Tanh": _STRETCHED[wrong]})
    with pytest.raises(LoadError, match=r"relative error of .* \(alone: .* from 't'\)"):
        read_onnx(path)


def _a_little(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (1 + 5e-5)


def _more(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (1 + 2e-3)


_STRETCHED = {5e-5: _a_little, 2e-3: _more}


# ---- lists of tensors

LISTS: dict[str, list[onnx.NodeProto]] = {
    "a list of tensors": [node("SplitToSequence", ["x"], ["s"]), node("Relu", ["s"], ["y"])],
    "a tensor": [node("SequenceAt", ["x", "one"], ["y"])],
    "item 1 of 1": [node("SequenceConstruct", ["x"], ["s"]), node("SequenceAt", ["s", "one"], ["y"])],
    "no position": [node("SequenceConstruct", ["x"], ["s"]), node("SequenceAt", ["s"], ["y"])],
    "an axis of an open size": [
        node("SplitToSequence", ["x"], ["s"]),
        node("ConcatFromSequence", ["s"], ["y"]),
    ],
    "pieces": [
        node("SplitToSequence", ["x", "one"], ["s"], axis=1),
        node("SequenceAt", ["s", "many"], ["y"]),
    ],
}


@pytest.mark.parametrize("flaw", LISTS)
def test_lists_that_are_none_are_refused(flaw: str) -> None:
    constants = {"one": np.array(1), "many": np.array(1 << 40)}
    with pytest.raises(
        LoadError, match=r"found (a list of tensors|a tensor|item|an axis of an open|'|NoneType)"
    ):
        read_unchecked(make(LISTS[flaw], {"x": (OPEN, 4)}, constants))
