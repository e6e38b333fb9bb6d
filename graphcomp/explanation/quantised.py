"""Files with 8 bit weights (QDQ), of which the names say what they were made from.

Quantizers keep the tensors of the float file: an operator still makes the tensor of its name, and a weight
`w` is stored as bytes and dequantised to `w_DequantizeLinear_Output`. So nodes are known by these names where
they carry no metadata, and none of their own.
"""

from collections.abc import Mapping

from onnx import ModelProto, NodeProto

from graphcomp.onnx import MODULE_PROP, NODE_PROP, PASS_PROP, Origin

ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_SUFFIXES = ("_DequantizeLinear_Output", "_QuantizeLinear_Input", "_quantized")


def is_quantised(model: ModelProto) -> bool:
    """Whether some weight is stored in 8 bits."""
    return bool(dequantised(model))


def dequantised(model: ModelProto) -> dict[str, str]:
    """What is dequantised from stored numbers -> the tensor that stores them."""
    stored = {i.name for i in model.graph.initializer}
    return {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }


def origins_by_tensor(model: ModelProto, other: ModelProto) -> Mapping[str, Origin]:
    """Origins of the nodes of `model` from those of `other`, where both have tensors of one name.

    By first output. What multiplies is known by its weight, since a quantizer that takes out a Relu gives its
    tensor to the layer before it; anything else by the tensor that it makes.
    """
    known = {key: _origin(node) for node in other.graph.node for key in _keys(node)}
    found: dict[str, Origin] = {}
    for node in model.graph.node:
        origin = next((known[key] for key in _keys(node) if key in known), None)
        if origin is not None:
            found[node.output[0]] = origin
    return found


def _keys(node: NodeProto) -> list[tuple[str, str]]:
    if node.op_type in ROUNDING:
        return []
    if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return [(node.op_type, _plain(node.input[1]))]
    return [(node.op_type, _plain(node.output[0]))]


def _plain(name: str) -> str:
    """A tensor's name in the float file."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _origin(node: NodeProto) -> Origin:
    said = {p.key: p.value for p in node.metadata_props}
    name = node.name or node.output[0]
    return Origin(said.get(MODULE_PROP, name), said.get(NODE_PROP, name), said.get(PASS_PROP, ""))
