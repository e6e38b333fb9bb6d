"""A file of channels-first layers as TensorFlow's converters write one: channels last, Transposes between.

`channels_last` keeps the function but for the layout of the images: every layer that ONNX has for channels
first alone stands between two Transposes, everything else works on the other layout, dense layers are a
MatMul and an Add, and a global mean is a ReduceMean over height and width.
"""

from typing import Any

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
LAYERS = {"Conv", "MaxPool", "AveragePool", "BatchNormalization"}
ELEMENTWISE = {"Relu", "Clip", "Add", "Mul", "Sigmoid", "HardSigmoid", "HardSwish", "Identity"}


def weights(model: ModelProto) -> int:
    """Elements of the floating-point initialisers and constants of a file."""
    graph = model.graph
    held = [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    return sum(int(np.prod(t.dims)) for t in [*graph.initializer, *held] if t.data_type in kinds)


def channels_last(model: ModelProto) -> ModelProto:
    """The same network for images of N, H, W, C.

    Raises:
        ValueError: an operator that this does not know.
    """
    return _Rewriting(model).model


class _Rewriting:
    """The nodes so far."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes: list[NodeProto] = []
        self.added: list[TensorProto] = []
        self.constants = {t.name: t for t in model.graph.initializer}
        self.images = {i.name for i in model.graph.input} - set(self.constants)
        """Values that are images, now channels last."""
        for node in model.graph.node:
            self._node(node)
        graph = model.graph
        inputs = [_image(i) for i in graph.input]
        read = {name for node in self.nodes for name in node.input}
        held = [t for t in [*graph.initializer, *self.added] if t.name in read]
        new = helper.make_graph(self.nodes, "nhwc", inputs, list(graph.output), held)
        self.model = helper.make_model(new, opset_imports=model.opset_import, ir_version=model.ir_version)

    def _node(self, node: NodeProto) -> None:
        image = bool(node.input) and node.input[0] in self.images
        match node.op_type:
            case kind if kind in LAYERS and image:
                first = self._transposed(node.input[0], FIRST)
                made = self._copy(node, [first, *node.input[1:]], [f"{node.output[0]}/first"])
                self._add("Transpose", [made.output[0]], node.output[0], perm=LAST)
                self.images.add(node.output[0])
            case "GlobalAveragePool":
                self._add("ReduceMean", [node.input[0]], node.output[0], axes=[1, 2], keepdims=1)
                self.images.add(node.output[0])
            case "ReduceMean" if image and _over_plane(node):
                keepdims = helper.get_node_attr_value(node, "keepdims")
                self._copy(node, node.input, node.output, axes=[1, 2])
                if keepdims:
                    self.images.add(node.output[0])
            case "Concat" if image:
                self._copy(
                    node, node.input, node.output, axis={1: 3}[helper.get_node_attr_value(node, "axis")]
                )
                self.images.add(node.output[0])
            case "Flatten" if image:
                first = self._transposed(node.input[0], FIRST)
                self._copy(node, [first], node.output)
            case "Gemm":
                self._gemm(node)
            case kind if kind in ELEMENTWISE:
                self._copy(node, node.input, node.output)
                if any(i in self.images for i in node.input):
                    self.images.add(node.output[0])
            case _ if not any(i in self.images for i in node.input):
                self._copy(node, node.input, node.output)
            case kind:
                raise ValueError(f"{node.name} ({kind}): not known channels last")

    def _gemm(self, node: NodeProto) -> None:
        matrix = numpy_helper.to_array(self.constants[node.input[1]])
        name = f"{node.input[1]}/kernel"
        self.added.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), name))
        self._add("MatMul", [node.input[0], name], f"{node.output[0]}/product")
        self._add("Add", [f"{node.output[0]}/product", node.input[2]], node.output[0])

    def _transposed(self, value: str, perm: tuple[int, ...]) -> str:
        name = f"{value}/for{len(self.nodes)}"
        self._add("Transpose", [value], name, perm=perm)
        return name

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))

    def _copy(self, node: NodeProto, inputs: Any, outputs: Any, **attributes: Any) -> NodeProto:
        made = helper.make_node(node.op_type, list(inputs), list(outputs), name=node.name)
        kept: list[AttributeProto] = [a for a in node.attribute if a.name not in attributes]
        made.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in attributes.items())])
        self.nodes.append(made)
        return made


def _over_plane(node: NodeProto) -> bool:
    """Whether it is a mean over height and width, which the attribute says in these operator sets."""
    axes = next((list(a.ints) for a in node.attribute if a.name == "axes"), [])
    return sorted(a % 4 for a in axes) == [2, 3]


def _image(value: Any) -> Any:
    """The input, channels last."""
    dims = value.type.tensor_type.shape.dim
    sizes = [d.dim_param or d.dim_value for d in dims]
    return helper.make_tensor_value_info(
        value.name, value.type.tensor_type.elem_type, [sizes[d] for d in LAST]
    )
