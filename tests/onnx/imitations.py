"""Files as other exporters write them, node by node: their ways with shapes, layouts and old operators."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from tests.onnx.onnx_files import OPEN

Array = NDArray[Any]
NETWORKS: dict[str, Callable[[], ModelProto]] = {}


def imitation(build: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
    NETWORKS[build.__name__] = build
    return build


class Graph:
    """Nodes in order; a node's first output is its name."""

    def __init__(self, opset: int, seed: int = 0, ir_version: int = 8) -> None:
        self.opset, self.ir_version = opset, ir_version
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def weight(self, *shape: int, scale: float = 0.4, shift: float = 0.0) -> str:
        return self.const((self.rng.normal(size=shape) * scale + shift).astype(np.float32), "weight")

    def const(self, value: Any, name: str = "const") -> str:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        name = f"{name}_{len(self.held)}"
        self.held.append(onnx.numpy_helper.from_array(array, name))
        return name

    def empty(self) -> str:
        """What operator set 11 has for an input that is left out."""
        return self.const(np.zeros(0, np.float32))

    def inline(self, value: Any) -> str:
        """A Constant node."""
        array = np.asarray(value)
        return self.add("Constant", value=onnx.numpy_helper.from_array(array))

    def add(self, operator: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> Any:
        names = [f"{operator.lower()}_{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def model(
        self,
        inputs: dict[str, Sequence[int | str | None]],
        outputs: dict[str, Sequence[int | str | None] | None],
        kinds: dict[str, int] | None = None,
        as_inputs: bool = False,
        producer: str = "",
    ) -> ModelProto:
        kinds = kinds or {}
        given = [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()
        ]
        if as_inputs:
            given += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in self.held]
        made = [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in outputs.items()
        ]
        graph = helper.make_graph(self.nodes, "graph", given, made, self.held)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
            producer_name=producer,
        )

    # ---- what exporters write for one thing

    def conv(self, x: str, into: int, out: int, k: int = 3, bias: bool = True, **attributes: Any) -> str:
        group = attributes.get("group", 1)
        rest = [self.weight(out, scale=0.1)] if bias else []
        said = {"pads": [k // 2] * 4} if k > 1 and not {"pads", "auto_pad"} & attributes.keys() else {}
        return self.add("Conv", x, self.weight(out, into // group, k, k), *rest, **(said | attributes))

    def norm(self, x: str, channels: int, outputs: int = 1, **attributes: Any) -> str:
        made = self.add(
            "BatchNormalization",
            x,
            self.weight(channels, shift=1.0, scale=0.1),
            self.weight(channels),
            self.weight(channels),
            self.const(self.rng.uniform(0.5, 1.5, channels).astype(np.float32), "var"),
            outputs=outputs,
            **attributes,
        )
        return made if outputs == 1 else made[0]

    def size(self, x: str, axis: int, of_slice: bool = False) -> str:
        """One size, as a vector: by Gather and Unsqueeze (PyTorch), or by Slice (TensorFlow, Paddle)."""
        shape = self.add("Shape", x)
        if of_slice:
            ends = [self.const(np.array([v], np.int64)) for v in (axis, axis + 1, 0)]
            return str(self.add("Slice", shape, *ends))
        one = self.add("Gather", shape, self.inline(np.int64(axis)), axis=0)
        if self.opset < 13:
            return str(self.add("Unsqueeze", one, axes=[0]))
        return str(self.add("Unsqueeze", one, self.const(np.array([0], np.int64))))

    def numbers(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))


# ---------------------------------------------------------------------- TensorFlow and Keras


@imitation
def tf2onnx_channels_last() -> ModelProto:
    g = Graph(13)
    x = g.add("Transpose", "input_1:0", perm=[0, 3, 1, 2])
    x = g.add("Conv", x, g.weight(16, 3, 3, 3), g.weight(16), pads=[0, 0, 1, 1], strides=[2, 2])
    x = g.add("Clip", x, g.const(np.float32(0)), g.const(np.float32(6)))
    x = g.add("Conv", x, g.weight(16, 1, 3, 3), g.weight(16), group=16, auto_pad="SAME_UPPER")
    x = g.add("Min", g.add("Max", x, g.const(np.float32(0))), g.const(np.float32(6)))
    x = g.conv(x, 16, 24, 1)
    y = g.add("Transpose", x, perm=[0, 2, 3, 1])
    y = g.add("Mul", y, g.const(np.full((1, 1, 1, 24), 0.5, np.float32)))
    y = g.add("Add", y, g.weight(24))
    y = g.add("Pad", y, g.numbers(0, 1, 1, 0, 0, 1, 1, 0), g.const(np.float32(0)))
    x = g.add("Transpose", y, perm=[0, 3, 1, 2])
    x = g.conv(x, 24, 32, 3, pads=[0, 0, 0, 0])
    x = g.add("Mul", x, g.add("Sigmoid", x))
    x = g.add("ReduceMean", g.add("Transpose", x, perm=[0, 2, 3, 1]), axes=[1, 2], keepdims=0)
    x = g.add("Add", g.add("MatMul", x, g.weight(32, 5)), g.weight(5))
    g.add("Softmax", x, axis=1)
    g.nodes[-1].output[0] = "Identity:0"
    return g.model({"input_1:0": ["unk__7", 12, 12, 3]}, {"Identity:0": ["unk__8", 5]}, producer="tf2onnx")


@imitation
def tf2onnx_resize_and_reshape() -> ModelProto:
    g = Graph(11)
    x = g.conv(g.add("Transpose", "x", perm=[0, 3, 1, 2]), 3, 16)
    x = g.add("Relu", x)
    low = g.conv(x, 16, 16, strides=[2, 2])
    # tf.image.resize to the size of another map, computed in int32
    shape = g.add("Cast", g.add("Shape", g.add("Transpose", x, perm=[0, 2, 3, 1])), to=TensorProto.INT32)
    hw = g.add("Slice", shape, *(g.const(np.array([v], np.int32)) for v in (1, 3, 0)))
    n = g.add("Slice", g.add("Shape", low), g.numbers(0), g.numbers(2), g.numbers(0))
    sizes = g.add("Concat", n, g.add("Cast", hw, to=TensorProto.INT64), axis=0)
    up = g.add(
        "Resize", low, g.empty(), g.empty(), sizes,
        mode="linear", coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    x = g.add("Concat", up, x, axis=1)
    x = g.add("Transpose", g.conv(x, 32, 12, 1), perm=[0, 2, 3, 1])
    batch = g.size("x", 0, of_slice=True)
    target = g.add("Concat", batch, g.numbers(-1, 4), axis=0)
    g.add("Reshape", x, target)
    g.nodes[-1].output[0] = "boxes"
    return g.model({"x": [OPEN, 8, 8, 3]}, {"boxes": [OPEN, None, 4]}, producer="tf2onnx")


@imitation
def keras2onnx() -> ModelProto:
    g = Graph(9, ir_version=4)
    x = "input_1"
    into = 3
    for out, stride in ((8, 2), (16, 1)):
        x = g.add("Transpose", x, perm=[0, 3, 1, 2], name=f"Transpose{out}")
        x = g.conv(x, into, out, auto_pad="SAME_LOWER", strides=[stride, stride], dilations=[1, 1])
        x = g.add("Transpose", x, perm=[0, 2, 3, 1], name=f"Back{out}")
        x = g.add("Transpose", x, perm=[0, 3, 1, 2])
        x = g.norm(x, out, epsilon=1e-3, momentum=0.99)
        x = g.add("Transpose", x, perm=[0, 2, 3, 1])
        x = g.add("LeakyRelu", x, alpha=0.1)
        into = out
    x = g.add("Transpose", x, perm=[0, 3, 1, 2])
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID")
    x = g.add("Upsample", x, g.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = g.add("Transpose", g.add("GlobalAveragePool", x), perm=[0, 2, 3, 1])
    x = g.add("Reshape", x, g.numbers(-1, 16))
    x = g.add("Add", g.add("MatMul", x, g.weight(16, 7)), g.weight(7))
    g.add("Softmax", x, axis=-1)
    g.nodes[-1].output[0] = "dense"
    return g.model({"input_1": [OPEN, 12, 12, 3]}, {"dense": [OPEN, 7]}, producer="keras2onnx")


@imitation
def keras_separable_and_excite() -> ModelProto:
    g = Graph(12)
    x = g.add("Sub", g.add("Div", "x", g.const(np.float32(127.5))), g.const(np.float32(1)))
    x = g.add("Transpose", x, perm=[0, 3, 1, 2])
    x = g.add("Relu", g.norm(g.conv(x, 3, 16, bias=False), 16))
    s = g.add("GlobalAveragePool", x)
    s = g.add("Transpose", s, perm=[0, 2, 3, 1])
    batch = g.size(s, 0, of_slice=True)
    s = g.add("Squeeze", s, axes=[1, 2])
    s = g.add("Reshape", s, g.add("Concat", batch, g.numbers(1, 1, 16), axis=0))
    s = g.add("Relu", g.conv(g.add("Transpose", s, perm=[0, 3, 1, 2]), 16, 4, 1))
    s = g.add("HardSigmoid", g.conv(s, 4, 16, 1), alpha=1 / 6)
    x = g.add("Mul", x, s)
    x = g.conv(x, 16, 16, group=16, bias=False)
    x = g.add("Relu", g.conv(x, 16, 24, 1))
    x = g.add("Squeeze", g.add("GlobalMaxPool", x), axes=[2, 3])
    g.add("Gemm", x, g.weight(24, 5), g.weight(5))
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 10, 10, 3]}, {"y": [OPEN, 5]})


@imitation
def tf_bytes_in() -> ModelProto:
    """An image of bytes, normalised in the file."""
    g = Graph(11)
    x = g.add("Transpose", g.add("Cast", "image", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = g.add("Mul", g.add("Sub", x, g.weight(1, 3, 1, 1)), g.const(np.float32(1 / 64)))
    x = g.add("Relu", g.conv(x, 3, 16, strides=[2, 2]))
    x = g.add("ReduceMean", x, axes=[2, 3], keepdims=1)
    x = g.conv(x, 16, 6, 1)
    x = g.add("Squeeze", x, axes=[2, 3])
    g.add("ArgMax", x, axis=1, keepdims=0)
    g.nodes[-1].output[0] = "classes"
    x = g.add("Softmax", x, axis=1)
    g.nodes[-1].output[0] = "scores"
    kinds = {"image": TensorProto.UINT8, "classes": TensorProto.INT64}
    return g.model({"image": [OPEN, 8, 8, 3]}, {"classes": [OPEN], "scores": [OPEN, 6]}, kinds)


@imitation
def tf_space_to_batch() -> ModelProto:
    """Dilated convolutions as TensorFlow has them: the batch becomes part of the image and comes back."""
    g = Graph(11)
    x = g.add("Relu", g.conv("x", 3, 8))
    x = g.add("Pad", x, g.numbers(0, 0, 2, 2, 0, 0, 2, 2), g.const(np.float32(0)))
    x = g.add("Conv", x, g.weight(12, 8, 3, 3), dilations=[2, 2])
    x = g.add("Add", x, g.weight(1, 12, 1, 1))
    x = g.add("DepthToSpace", x, blocksize=2)
    g.conv(x, 3, 4, 1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 8, 8]}, {"y": [OPEN, 4, 16, 16]})


# ---------------------------------------------------------------------- Caffe, Caffe2, MXNet, CNTK


@imitation
def caffe2_opset_7() -> ModelProto:
    g = Graph(7, ir_version=3)
    x = g.add("Relu", g.conv("data_0", 3, 16))
    x = g.add("LRN", x, alpha=1e-4, beta=0.75, bias=1.0, size=5)
    x = g.add("MaxPool", x, kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2])
    a, b = g.add("Split", x, axis=1, split=[8, 8], outputs=2)
    x = g.add("Concat", g.conv(a, 8, 8), g.conv(b, 8, 12, 1), axis=1)
    x = g.add("Sum", x, g.conv(x, 20, 20), x)
    x, _ = g.add("Dropout", x, ratio=0.5, outputs=2)
    x = g.add("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = g.add("Reshape", x, g.numbers(1, 180))
    x = g.add("Relu", g.add("Gemm", x, g.weight(24, 180), g.weight(24), transB=1))
    x, _ = g.add("Dropout", x, outputs=2)
    x = g.add("Gemm", x, g.weight(5, 24), g.weight(5), transB=1)
    g.add("Softmax", x)
    g.nodes[-1].output[0] = "prob_1"
    return g.model({"data_0": [1, 3, 12, 12]}, {"prob_1": [1, 5]}, as_inputs=True, producer="onnx-caffe2")


@imitation
def mxnet_face() -> ModelProto:
    """Face embeddings: normalisation of images and vectors, PReLU of slopes by channel."""
    g = Graph(8, ir_version=3)
    x = g.add("Mul", g.add("Sub", "data", g.const(np.float32([127.5]))), g.const(np.float32([0.0078125])))
    x = g.norm(x, 3, spatial=1)
    x = g.conv(x, 3, 16, bias=False)
    x = g.add("PRelu", g.norm(x, 16), g.weight(16, 1, 1))
    y = g.add("PRelu", g.norm(g.conv(x, 16, 16), 16), g.weight(16, 1, 1))
    y = g.norm(g.conv(y, 16, 16, strides=[2, 2]), 16)
    x = g.add("Add", y, g.norm(g.conv(x, 16, 16, 1, strides=[2, 2]), 16))
    x = g.add("Dropout", x, ratio=0.4)
    x = g.add("Flatten", x)
    x = g.add("Gemm", x, g.weight(12, 16 * 25), g.weight(12), transB=1, alpha=1.0, beta=1.0)
    g.norm(x, 12)
    g.nodes[-1].output[0] = "fc1"
    return g.model({"data": [1, 3, 10, 10]}, {"fc1": [1, 12]}, as_inputs=True)


@imitation
def mxnet_slices() -> ModelProto:
    g = Graph(9, ir_version=3)
    x = g.add("Relu", g.conv("data", 3, 24, 1))
    a = g.add("Slice", x, axes=[1], starts=[0], ends=[12])
    b = g.add("Slice", x, axes=[1], starts=[12], ends=[9223372036854775807])
    x = g.add("Concat", g.conv(a, 12, 12, group=12), b, axis=1)
    # a shuffle of channels
    x = g.add("Reshape", x, g.numbers(0, 2, 12, 8, 8))
    x = g.add("Transpose", x, perm=[0, 2, 1, 3, 4])
    x = g.add("Reshape", x, g.numbers(0, -1, 8, 8))
    x = g.conv(x, 24, 16, 1)
    x = g.add("LpNormalization", g.add("Flatten", g.add("GlobalAveragePool", x)), axis=1, p=2)
    g.add("Identity", x)
    g.nodes[-1].output[0] = "y"
    return g.model({"data": [OPEN, 3, 8, 8]}, {"y": [OPEN, 16]}, as_inputs=True)


@imitation
def cntk_digits() -> ModelProto:
    g = Graph(8, ir_version=3)
    x = g.add("Conv", "Input3", g.weight(8, 1, 5, 5), kernel_shape=[5, 5], auto_pad="SAME_UPPER",
              strides=[1, 1], dilations=[1, 1], group=1)  # fmt: skip
    x = g.add("Relu", g.add("Add", x, g.weight(8, 1, 1)))
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0], auto_pad="NOTSET")
    x = g.add("Conv", x, g.weight(16, 8, 5, 5), auto_pad="SAME_UPPER", kernel_shape=[5, 5])
    x = g.add("Relu", g.add("Add", x, g.weight(16, 1, 1)))
    x = g.add("MaxPool", x, kernel_shape=[3, 3], strides=[3, 3])
    x = g.add("Reshape", x, g.numbers(1, 64))
    w = g.add("Reshape", g.weight(16, 2, 2, 10), g.numbers(64, 10))
    g.add("Add", g.add("MatMul", x, w), g.weight(1, 10))
    g.nodes[-1].output[0] = "Plus214_Output_0"
    return g.model({"Input3": [1, 1, 12, 12]}, {"Plus214_Output_0": [1, 10]}, as_inputs=True)


# ---------------------------------------------------------------------- PaddlePaddle, and OCR


@imitation
def paddle_detector_of_text() -> ModelProto:
    """A feature pyramid at any size of image; sizes by Shape, Slice, Cast and Concat."""
    g = Graph(11)
    x = g.conv("x", 3, 16, strides=[2, 2])
    x = g.add("Mul", x, g.add("Div", g.add("Clip", g.add("Add", x, g.const(np.float32(3))),
              g.const(np.float32(0)), g.const(np.float32(6))), g.const(np.float32(6))))  # fmt: skip
    low = g.add("Relu", g.norm(g.conv(x, 16, 24, strides=[2, 2], bias=False), 24))
    lateral, top = g.conv(x, 16, 24, 1), g.conv(low, 24, 24, 1)
    hw = g.add("Cast", g.add("Slice", g.add("Shape", lateral), g.numbers(2), g.numbers(4), g.numbers(0)),
               to=TensorProto.INT32)  # fmt: skip
    nc = g.add("Slice", g.add("Shape", top), g.numbers(0), g.numbers(2), g.numbers(0))
    sizes = g.add("Concat", nc, g.add("Cast", hw, to=TensorProto.INT64), axis=0)
    up = g.add("Resize", top, g.empty(), g.empty(), sizes,
               mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    x = g.add("Add", lateral, up)
    x = g.add("Concat", x, g.add("Resize", low, g.empty(), g.const(np.float32([1, 1, 2, 2])), mode="nearest",
              coordinate_transformation_mode="asymmetric", nearest_mode="floor"), axis=1)  # fmt: skip
    x = g.add("ConvTranspose", x, g.weight(48, 8, 2, 2), strides=[2, 2], kernel_shape=[2, 2])
    x = g.add("Relu", g.norm(g.add("Add", x, g.weight(1, 8, 1, 1)), 8))
    g.add("Sigmoid", g.add("ConvTranspose", x, g.weight(8, 1, 2, 2), g.weight(1), strides=[2, 2]))
    g.nodes[-1].output[0] = "maps"
    return g.model({"x": [OPEN, 3, 16, 24]}, {"maps": [OPEN, 1, 32, 48]}, producer="PaddlePaddle")


@imitation
def paddle_reader_of_text() -> ModelProto:
    """Convolutions, then recurrent layers over the width, then characters."""
    g = Graph(11)
    x = g.add("Relu", g.conv("x", 3, 12, strides=[2, 1]))
    x = g.add("MaxPool", x, kernel_shape=[4, 1], strides=[4, 1])
    x = g.add("Transpose", g.add("Squeeze", x, axes=[2]), perm=[0, 2, 1])
    x = g.add("Transpose", x, perm=[1, 0, 2])
    batch = g.add("Slice", g.add("Shape", x), g.numbers(1), g.numbers(2), g.numbers(0))
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.float32))
    state = g.add("ConstantOfShape", g.add("Concat", g.numbers(2), batch, g.numbers(6), axis=0), value=zero)
    x, _, _ = g.add("LSTM", x, g.weight(2, 24, 12), g.weight(2, 24, 6), g.weight(2, 48), "", state, state,
                    direction="bidirectional", hidden_size=6, outputs=3)  # fmt: skip
    x = g.add("Transpose", x, perm=[0, 2, 1, 3])
    x = g.add("Transpose", g.add("Reshape", x, g.numbers(0, 0, -1)), perm=[1, 0, 2])
    x = g.add("Add", g.add("MatMul", x, g.weight(12, 9)), g.weight(9))
    g.add("Softmax", x, axis=2)
    g.nodes[-1].output[0] = "characters"
    return g.model({"x": [OPEN, 3, 8, 14]}, {"characters": [OPEN, 14, 9]})


@imitation
def paddle_attention() -> ModelProto:
    """Tokens with a normalisation that is written out, GELU by Erf, heads by Reshape with zeros."""
    g = Graph(11)
    x = g.conv("x", 3, 24, 4, pads=[0, 0, 0, 0], strides=[4, 4])
    x = g.add("Transpose", g.add("Reshape", x, g.numbers(0, 24, -1)), perm=[0, 2, 1])

    def norm(t: str) -> str:
        d = g.add("Sub", t, g.add("ReduceMean", t, axes=[-1]))
        v = g.add("ReduceMean", g.add("Pow", d, g.const(np.float32(2))), axes=[-1])
        d = g.add("Div", d, g.add("Sqrt", g.add("Add", v, g.const(np.float32(1e-5)))))
        return str(g.add("Add", g.add("Mul", d, g.weight(24, shift=1.0)), g.weight(24)))

    qkv = g.add("Add", g.add("MatMul", norm(x), g.weight(24, 72)), g.weight(72))
    qkv = g.add("Transpose", g.add("Reshape", qkv, g.numbers(0, -1, 3, 4, 6)), perm=[2, 0, 3, 1, 4])
    q, k, v = (
        g.add("Squeeze", g.add("Slice", qkv, g.numbers(i), g.numbers(i + 1), g.numbers(0)), axes=[0])
        for i in range(3)
    )
    q = g.add("Mul", q, g.const(np.float32(6**-0.5)))
    a = g.add("Softmax", g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    a = g.add("Transpose", g.add("MatMul", a, v), perm=[0, 2, 1, 3])
    a = g.add("Reshape", a, g.numbers(0, -1, 24))
    x = g.add("Add", x, g.add("Add", g.add("MatMul", a, g.weight(24, 24)), g.weight(24)))
    h = g.add("Add", g.add("MatMul", norm(x), g.weight(24, 48)), g.weight(48))
    erf = g.add("Add", g.add("Erf", g.add("Div", h, g.const(np.float32(2**0.5)))), g.const(np.float32(1)))
    h = g.add("Mul", g.add("Mul", h, erf), g.const(np.float32(0.5)))
    x = g.add("Add", x, g.add("Add", g.add("MatMul", h, g.weight(48, 24)), g.weight(24)))
    g.add("ReduceMean", norm(x), axes=[1], keepdims=0)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 16, 16]}, {"y": [OPEN, 24]})


# ---------------------------------------------------------------------- PyTorch of years ago


@imitation
def pytorch_1_2_upsample() -> ModelProto:
    """`F.interpolate` as sizes in floating point, divided by what they were."""
    g = Graph(9, ir_version=4)
    x = g.add("Relu", g.conv("input.1", 3, 16))
    low = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    low = g.add("Relu", g.conv(low, 16, 16))
    parts = []
    for axis in (2, 3):
        one = g.add("Gather", g.add("Shape", low), g.inline(np.int64(axis)), axis=0)
        wide = g.add("Floor", g.add("Mul", g.add("Cast", one, to=TensorProto.FLOAT), g.inline(np.float32(2))))
        parts.append(g.add("Unsqueeze", wide, axes=[0]))
    wanted = g.add("Cast", g.add("Cast", g.add("Concat", *parts, axis=0), to=TensorProto.INT64),
                   to=TensorProto.FLOAT)  # fmt: skip
    had = g.add(
        "Cast", g.add("Slice", g.add("Shape", low), axes=[0], starts=[2], ends=[4]), to=TensorProto.FLOAT
    )
    scales = g.add("Concat", g.inline(np.float32([1, 1])), g.add("Div", wanted, had), axis=0)
    up = g.add("Upsample", low, scales, mode="nearest")
    x = g.add("Concat", up, x, axis=1)
    x = g.conv(x, 32, 8, 1)
    # view(x.size(0), -1)
    first = g.add("Unsqueeze", g.add("Gather", g.add("Shape", x), g.inline(np.int64(0)), axis=0), axes=[0])
    flat = g.add("Reshape", x, g.add("Concat", first, g.inline(np.int64([-1])), axis=0))
    g.add("Gemm", flat, g.weight(5, 8 * 64), g.weight(5), transB=1)
    g.nodes[-1].output[0] = "60"
    return g.model({"input.1": [OPEN, 3, 8, 8]}, {"60": [OPEN, 5]}, producer="pytorch")


@imitation
def pytorch_yolo() -> ModelProto:
    """A detector's focus, its pyramid, and a decoder that writes into parts by ScatterND."""
    g = Graph(12)
    parts = []
    for h, w in ((0, 0), (1, 0), (0, 1), (1, 1)):
        rows = g.add("Slice", "images", g.numbers(h), g.numbers(2**31 - 1), g.numbers(2), g.numbers(2))
        parts.append(g.add("Slice", rows, g.numbers(w), g.numbers(2**31 - 1), g.numbers(3), g.numbers(2)))
    x = g.conv(g.add("Concat", *parts, axis=1), 12, 16)
    x = g.add("Mul", x, g.add("Sigmoid", x))
    deep = g.conv(x, 16, 32, strides=[2, 2])
    deep = g.add("Mul", deep, g.add("Sigmoid", deep))
    pools = [g.add("MaxPool", deep, kernel_shape=[k, k], pads=[k // 2] * 4, strides=[1, 1]) for k in (3, 5)]
    deep = g.conv(g.add("Concat", deep, *pools, axis=1), 96, 16, 1)
    up = g.add("Resize", deep, g.empty(), g.const(np.float32([1, 1, 2, 2])),
               coordinate_transformation_mode="asymmetric", mode="nearest", nearest_mode="floor")  # fmt: skip
    x = g.conv(g.add("Concat", up, x, axis=1), 32, 16)
    outs = []
    for t, size, stride in ((x, 8, 8.0), (deep, 4, 16.0)):
        y = g.add("Reshape", g.conv(t, 16, 21, 1), g.numbers(1, 3, 7, size, size))
        y = g.add("Sigmoid", g.add("Transpose", y, perm=[0, 1, 3, 4, 2]))
        grid = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1).astype(np.float32)[None, None]
        ends = [[g.numbers(v) for v in (a, b, 4)] for a, b in ((0, 2), (2, 4), (4, 7))]
        xy = g.add("Slice", y, *ends[0])
        xy = g.add("Sub", g.add("Mul", xy, g.const(np.float32(2))), g.const(np.float32(0.5)))
        xy = g.add("Mul", g.add("Add", xy, g.const(grid)), g.const(np.float32(stride)))
        wh = g.add("Slice", y, *ends[1])
        wh = g.add("Pow", g.add("Mul", wh, g.const(np.float32(2))), g.const(np.float32(2)))
        wh = g.add("Mul", wh, g.const(np.full((1, 3, 1, 1, 2), 1.5 * stride, np.float32)))
        y = g.add("Concat", xy, wh, g.add("Slice", y, *ends[2]), axis=-1)
        outs.append(g.add("Reshape", y, g.numbers(1, -1, 7)))
    g.add("Concat", *outs, axis=1)
    g.nodes[-1].output[0] = "output"
    return g.model({"images": [1, 3, 16, 16]}, {"output": [1, 240, 7]})


@imitation
def pytorch_writes_into_parts() -> ModelProto:
    """`y[..., 0:2] = …` as ScatterND with indices that are known."""
    g = Graph(12)
    y = g.add("Sigmoid", g.conv("x", 3, 8, 1))
    y = g.add("Transpose", y, perm=[0, 2, 3, 1])
    for first, last, factor in ((0, 2, 4.0), (2, 4, 0.5)):
        part = g.add("Slice", y, g.numbers(first), g.numbers(last), g.numbers(3))
        part = g.add("Mul", part, g.const(np.float32(factor)))
        axes = (np.arange(1), np.arange(4), np.arange(4), np.arange(first, last))
        indices = g.inline(np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.int64))
        target = g.add("Slice", g.add("Shape", indices), g.numbers(0), g.numbers(-1), g.numbers(0))
        y = g.add("ScatterND", y, indices, g.add("Reshape", part, target))
    g.add("Reshape", y, g.numbers(1, -1, 8))
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [1, 3, 4, 4]}, {"y": [1, 16, 8]})


@imitation
def ssd_head() -> ModelProto:
    """Boxes and scores of two maps, decoded with anchors; batch by Shape and Gather."""
    g = Graph(11)
    x = g.add("Relu", g.norm(g.conv("input", 3, 16, strides=[2, 2], bias=False), 16))
    y = g.add("Relu", g.conv(x, 16, 24, strides=[2, 2]))
    found: dict[int, list[str]] = {4: [], 3: []}
    for t, into in ((x, 16), (y, 24)):
        for last in found:
            depth = g.conv(t, into, into, group=into)
            head = g.add("Transpose", g.conv(g.add("Relu", depth), into, 2 * last, 1), perm=[0, 2, 3, 1])
            target = g.add(
                "Concat", g.size(head, 0), g.inline(np.int64([-1])), g.inline(np.int64([last])), axis=0
            )
            found[last].append(g.add("Reshape", head, target))
    boxes, scores = (g.add("Concat", *found[last], axis=1) for last in found)
    g.add("Softmax", scores, axis=2)
    g.nodes[-1].output[0] = "scores"
    priors = g.rng.uniform(0.1, 0.9, (1, 160, 4)).astype(np.float32)
    ends = [[g.numbers(v) for v in (a, a + 2, 2)] for a in (0, 2)]
    centre = g.add("Mul", g.add("Slice", boxes, *ends[0]), g.const(np.float32(0.1)))
    centre = g.add("Add", g.add("Mul", centre, g.const(priors[..., 2:])), g.const(priors[..., :2]))
    size = g.add("Exp", g.add("Mul", g.add("Slice", boxes, *ends[1]), g.const(np.float32(0.2))))
    size = g.add("Mul", size, g.const(priors[..., 2:]))
    half = g.add("Div", size, g.const(np.float32(2)))
    g.add("Concat", g.add("Sub", centre, half), g.add("Add", centre, half), axis=2)
    g.nodes[-1].output[0] = "boxes"
    return g.model({"input": [OPEN, 3, 16, 16]}, {"scores": [OPEN, 160, 3], "boxes": [OPEN, 160, 4]})


@imitation
def style_transfer() -> ModelProto:
    """Reflected borders, normalised instances, any height and width."""
    g = Graph(11)
    x = g.add("Pad", "x", g.numbers(0, 0, 2, 2, 0, 0, 2, 2), mode="reflect")
    x = g.conv(x, 3, 16, 5, pads=[0, 0, 0, 0])
    x = g.add("Relu", g.add("InstanceNormalization", x, g.weight(16, shift=1.0), g.weight(16)))
    y = g.add("Pad", x, g.numbers(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")
    y = g.add("Relu", g.conv(y, 16, 16, pads=[0, 0, 0, 0]))
    x = g.add("Add", x, y)
    sizes = [g.add("Mul", g.size(x, axis), g.numbers(2)) for axis in (2, 3)]
    n = g.add("Slice", g.add("Shape", x), g.numbers(0), g.numbers(2), g.numbers(0))
    up = g.add("Resize", x, g.empty(), g.empty(), g.add("Concat", n, *sizes, axis=0), mode="nearest",
               coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    g.conv(up, 16, 3)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [1, 3, "height", "width"]}, {"y": [1, 3, "h2", "w2"]})


@imitation
def old_softmax_and_norms() -> ModelProto:
    """Softmax of operator sets below 13 takes all axes behind its own together; padding by Pad-2."""
    g = Graph(10)
    x = g.add("Pad", "x", pads=[0, 0, 1, 1, 0, 0, 1, 1], mode="constant", value=0.0)
    x = g.add("Relu", g.norm(g.conv(x, 3, 12, pads=[0, 0, 0, 0]), 12))
    x = g.add("AveragePool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1)
    x = g.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    x = g.add("Softmax", g.conv(x, 12, 6), axis=1)
    x = g.add("TopK", g.add("Flatten", x), g.numbers(5), axis=1, outputs=2)[0]
    g.add("Clip", x, min=0.0, max=0.9)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 9, 9]}, {"y": [OPEN, 5]})


@imitation
def branches_that_are_dead() -> ModelProto:
    """Outputs that nothing reads, a value twice, an input that goes out as it is."""
    g = Graph(13)
    x = g.add("Relu", g.conv("x", 3, 8))
    g.add("Sigmoid", g.conv(x, 8, 8))
    a, b = g.add("Split", x, g.numbers(3, 5), axis=1, outputs=2)
    del b
    y = g.add("Concat", a, a, axis=1)
    z = g.add("Gather", g.conv(y, 6, 10, 1), g.numbers(9, 3, 3, 0), axis=1)
    g.add("ReduceSum", z, g.numbers(2, 3), keepdims=0)
    g.nodes[-1].output[0] = "y"
    g.nodes.append(helper.make_node("Identity", ["x"], ["copy"]))
    return g.model({"x": [OPEN, 3, 6, 6]}, {"y": [OPEN, 4], "copy": [OPEN, 3, 6, 6]})


@imitation
def vectors_with_two_inputs() -> ModelProto:
    g = Graph(17)
    x = g.add("Flatten", g.add("Relu", g.conv("image", 3, 8, strides=[2, 2])))
    a = g.add("Gemm", x, g.weight(16, 72), g.weight(16), transB=1)
    b = g.add("Gemm", "state", g.weight(16, 5), g.weight(16), transB=1)
    x = g.add("Tanh", g.add("Concat", a, b, axis=-1))
    x = g.add("LayerNormalization", x, g.weight(32, shift=1.0), g.weight(32), axis=-1)
    g.add("Gemm", x, g.weight(32, 4))
    g.nodes[-1].output[0] = "y"
    return g.model({"image": ["n", 3, 6, 6], "state": ["n", 5]}, {"y": ["n", 4]})


@imitation
def shared_heads() -> ModelProto:
    """One tower called on every level, fusion by weights that are normalised in the file."""
    g = Graph(11)
    a = g.add("Relu", g.conv("x", 3, 16))
    b = g.add("Relu", g.conv(a, 16, 16, strides=[2, 2]))
    raw = g.add("Relu", g.const(np.float32([0.7, 0.4])))
    share = g.add(
        "Div", raw, g.add("Add", g.add("ReduceSum", raw, axes=[0], keepdims=0), g.const(np.float32(1e-4)))
    )
    up = g.add("Resize", b, g.empty(), g.const(np.float32([1, 1, 2, 2])), mode="nearest",
               coordinate_transformation_mode="tf_half_pixel_for_nn")  # fmt: skip
    parts = [
        g.add(
            "Mul",
            t,
            g.add("Squeeze", g.add("Slice", share, *(g.numbers(v) for v in (i, i + 1, 0))), axes=[0]),
        )
        for i, t in enumerate((a, up))
    ]
    a = g.add("Add", *parts)
    tower, bias, last = g.weight(16, 16, 3, 3), g.weight(16), g.weight(6, 16, 1, 1)
    outs = []
    for t in (a, b):
        t = g.add("Relu", g.add("Conv", t, tower, bias, pads=[1, 1, 1, 1]))
        t = g.add("Sigmoid", g.add("Conv", t, last))
        outs.append(g.add("Reshape", g.add("Transpose", t, perm=[0, 2, 3, 1]), g.numbers(0, -1, 3)))
    g.add("Concat", *outs, axis=1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 8, 8]}, {"y": [OPEN, 160, 3]})


@imitation
def group_norm_of_old() -> ModelProto:
    """Reshape, InstanceNormalization with ones and zeros, Reshape back, scale and shift."""
    g = Graph(11)
    x = g.conv("x", 3, 16)
    shape = g.add("Shape", x)
    y = g.add("Reshape", x, g.numbers(0, 4, -1))
    y = g.add("InstanceNormalization", y, g.inline(np.ones(4, np.float32)), g.inline(np.zeros(4, np.float32)))
    y = g.add("Reshape", y, shape)
    y = g.add("Add", g.add("Mul", y, g.weight(16, 1, 1, shift=1.0)), g.weight(16, 1, 1))
    y = g.add("Mul", y, g.add("Tanh", g.add("Softplus", y)))
    y = g.conv(y, 16, 12)
    y = g.add("ReduceMean", y, axes=[2, 3], keepdims=0)
    g.add("MatMul", y, g.weight(12, 4))
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 8, 8]}, {"y": [OPEN, 4]})


@imitation
def squeezed_of_all() -> ModelProto:
    """One sample: Squeeze without axes takes its axis away, Unsqueeze brings it back."""
    g = Graph(11)
    x = g.add("GlobalAveragePool", g.add("Relu", g.conv("x", 3, 16)))
    x = g.add("Unsqueeze", g.add("Squeeze", x), axes=[0])
    g.add("Gemm", x, g.weight(5, 16), g.weight(5), transB=1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [1, 3, 8, 8]}, {"y": [1, 5]})


@imitation
def an_input_that_is_not_used() -> ModelProto:
    g = Graph(11)
    x = g.add("Relu", g.conv("x", 3, 16))
    g.conv(x, 16, 4, 1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 8, 8], "im_info": [OPEN, 3]}, {"y": [OPEN, 4, 8, 8]})


@imitation
def sizes_of_images_beside() -> ModelProto:
    """Boxes scaled by an input that says how large the image was."""
    g = Graph(11)
    x = g.add("Relu", g.conv("x", 3, 16, strides=[2, 2]))
    y = g.add("Reshape", g.add("Transpose", g.conv(x, 16, 8, 1), perm=[0, 2, 3, 1]), g.numbers(0, -1, 4))
    hw = g.add("Concat", "image_shape", "image_shape", axis=1)
    g.add("Mul", g.add("Sigmoid", y), g.add("Unsqueeze", hw, axes=[1]))
    g.nodes[-1].output[0] = "y"
    return g.model({"x": ["N", 3, 8, 8], "image_shape": [1, 2]}, {"y": ["N", 32, 4]})


@imitation
def tokens() -> ModelProto:
    """Words: a table, positions, a mask by Where with a very small number, masked attention."""
    g = Graph(14)
    e = g.add("Gather", g.weight(50, 24), "input_ids")
    e = g.add("Add", e, g.weight(1, 6, 24))
    e = g.add("LayerNormalization", e, g.weight(24), g.weight(24), axis=-1) if g.opset >= 17 else e
    mask = g.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    mask = g.add("Unsqueeze", mask, g.numbers(1, 2))
    mask = g.add(
        "Mul", g.add("Sub", g.const(np.float32(1)), mask), g.const(np.float32(np.finfo(np.float32).min))
    )
    heads = []
    for _ in range(3):
        t = g.add("Add", g.weight(24), g.add("MatMul", e, g.weight(24, 24)))
        size = [g.size(t, 0), g.size(t, 1)]
        shape = g.add("Concat", *size, g.numbers(4), g.numbers(6), axis=0)
        heads.append(g.add("Transpose", g.add("Reshape", t, shape), perm=[0, 2, 1, 3]))
    q, k, v = heads
    a = g.add(
        "Div", g.add("MatMul", q, g.add("Transpose", k, perm=[0, 1, 3, 2])), g.const(np.float32(6**0.5))
    )
    a = g.add("Softmax", g.add("Add", a, mask), axis=-1)
    a = g.add("Reshape", g.add("Transpose", g.add("MatMul", a, v), perm=[0, 2, 1, 3]), g.numbers(0, 0, 24))
    x = g.add("Add", e, g.add("MatMul", a, g.weight(24, 24)))
    first = g.add("Gather", x, g.const(np.int64(0)), axis=1)
    g.add("Gemm", g.add("Tanh", first), g.weight(24, 3), g.weight(3))
    g.nodes[-1].output[0] = "y"
    ids = dict.fromkeys(("input_ids", "attention_mask"), TensorProto.INT64)
    return g.model({"input_ids": [OPEN, 6], "attention_mask": [OPEN, 6]}, {"y": [OPEN, 3]}, ids)


@imitation
def half_weights_in_a_full_network() -> ModelProto:
    """Weights of 16 bits that the file makes 32 of, and a part that runs in 16."""
    g = Graph(13)
    half = TensorProto.FLOAT16

    def wide(*shape: int) -> str:
        return str(
            g.add("Cast", g.const((g.rng.normal(size=shape) * 0.3).astype(np.float16)), to=TensorProto.FLOAT)
        )

    x = g.add("Relu", g.add("Conv", "x", wide(16, 3, 3, 3), wide(16), pads=[1, 1, 1, 1]))
    y = g.add("Cast", x, to=half)
    w = g.const((g.rng.normal(size=(16, 16, 1, 1)) * 0.3).astype(np.float16))
    y = g.add("Cast", g.add("Conv", y, w), to=TensorProto.FLOAT)
    y = g.add("ReduceMean", g.add("Add", x, y), axes=[2, 3], keepdims=0)
    g.add("Gemm", y, wide(5, 16), transB=1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 8, 8]}, {"y": [OPEN, 5]})


@imitation
def sound_and_volumes() -> ModelProto:
    """Convolutions of one and of three axes, weights on the left of a product."""
    g = Graph(13)
    x = g.add("Conv", "x", g.weight(16, 2, 5), g.weight(16), strides=[2], pads=[2, 2], kernel_shape=[5])
    x = g.add("Relu", x)
    x = g.add("Add", g.add("MatMul", g.weight(8, 16), x), g.weight(8, 1))
    x = g.add("MaxPool", x, kernel_shape=[2], strides=[2])
    x = g.add("Reshape", x, g.numbers(0, 8, 2, 2, 2))
    x = g.add("Relu", g.add("Conv", x, g.weight(12, 8, 2, 2, 2), g.weight(12)))
    x = g.add("Flatten", x)
    g.add("Gemm", x, g.weight(4, 12), g.const(np.float32(0.5)), transB=1, alpha=0.5, beta=2.0)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 2, 32]}, {"y": [OPEN, 4]})


@imitation
def names_of_functions() -> ModelProto:
    """A local function, as newer exporters write modules."""
    g = Graph(18, ir_version=9)
    x = g.conv("x", 3, 16)
    g.nodes.append(helper.make_node("Swish_of_mine", [x], ["s"], domain="pkg", name="act"))
    g.conv("s", 16, 4, 1)
    g.nodes[-1].output[0] = "y"
    model = g.model({"x": [OPEN, 3, 8, 8]}, {"y": [OPEN, 4, 8, 8]})
    body = [helper.make_node("Sigmoid", ["a"], ["b"]), helper.make_node("Mul", ["a", "b"], ["c"])]
    known = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("pkg", "Swish_of_mine", ["a"], ["c"], body, known))
    model.opset_import.append(helper.make_opsetid("pkg", 1))
    return model


@imitation
def lists_of_tensors() -> ModelProto:
    """Pieces of a channel axis as a list, as newer exporters have them, and a list that is joined."""
    g = Graph(18)
    x = g.add("Relu", g.conv("x", 3, 16))
    pieces = g.add("SplitToSequence", x, g.const(np.int64(8)), axis=1)
    a, b = (g.add("SequenceAt", pieces, g.const(np.int64(i))) for i in (0, -1))
    b = g.add("Relu", g.conv(b, 8, 8))
    uneven = g.add("SplitToSequence", b, g.numbers(3, 5), axis=1)
    c = g.add("SequenceAt", uneven, g.const(np.int64(1)))
    x = g.add("ConcatFromSequence", g.add("SequenceConstruct", a, c, b), axis=1)
    rows = g.add("SplitToSequence", g.conv(x, 21, 6, 1), axis=2, keepdims=0)
    g.add("ConcatFromSequence", rows, axis=2, new_axis=1)
    g.nodes[-1].output[0] = "y"
    return g.model({"x": [OPEN, 3, 4, 4]}, {"y": [OPEN, 6, 4, 4]})
