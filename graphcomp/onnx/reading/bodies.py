"""Operators that ONNX defines by others: where none of the rows is theirs, their definition is read.

So an operator that runtimes have a kernel for and exporters write whole (RotaryEmbedding,
MeanVarianceNormalization) is what its body computes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto, helper

from graphcomp.onnx.rows import DTYPES, Known, Value
from graphcomp.onnx.subgraphs import rename_reads, with_inner


def body_of(node: NodeProto, opset: int, inputs: Sequence[Value | None]) -> FunctionProto | None:
    """The definition of a node's operator in this operator set; None if it has none.

    Args:
        node: of the default domain.
        opset: of the file.
        inputs: of the node, whose types some definitions depend on.
    """
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, opset)  # onnx's own types leave functions out
    except onnx.defs.SchemaError:
        return None
    content: bytes = b""
    if schema.has_function:
        content = _newest(schema.function_opset_versions, opset, schema.get_function_with_opset_version)
    elif schema.has_context_dependent_function:
        types = [b"" if v is None else _type_of(v).SerializeToString() for v in inputs]
        proto = node.SerializeToString()
        content = _newest(
            schema.context_dependent_function_opset_versions,
            opset,
            lambda version: schema.get_context_dependent_function_with_opset_version(version, proto, types),
        )
    return FunctionProto.FromString(content) if content else None


def _newest(versions: Sequence[int], opset: int, found: Callable[[int], bytes]) -> bytes:
    """Of definitions for several operator sets that of the last one up to the file's."""
    return next((found(v) for v in sorted(versions, reverse=True) if v <= opset), b"")


def _type_of(value: Value) -> TypeProto:
    kind = (
        helper.np_dtype_to_tensor_dtype(value.array.dtype)
        if isinstance(value, Known)
        else DTYPES[value.dtype]
    )
    columns = zip(*value.shapes, strict=True)
    return helper.make_tensor_type_proto(kind, [c[0] if len(set(c)) == 1 else None for c in columns])


def written_out(body: FunctionProto, node: NodeProto, opset: int, prefix: str) -> list[NodeProto]:
    """The nodes of a definition, on the node's inputs and with its attributes.

    Args:
        body: of the node's operator.
        node: whose inputs it gets.
        opset: of the file, which says what attributes that are left out stand for.
        prefix: of the names of all values that it computes, its outputs' too.
    """
    given = dict(zip(body.input, node.input, strict=False))
    names = {"": ""} | {name: given.get(name, "") for name in body.input}
    defaults = {n: a.default_value for n, a in onnx.defs.get_schema(node.op_type, opset).attributes.items()}
    attributes = {name: value for name, value in defaults.items() if value.name}
    attributes |= {a.name: a for a in (*body.attribute_proto, *node.attribute)}
    nodes = [NodeProto.FromString(inner.SerializeToString()) for inner in body.node]
    for made in nodes:
        made.name = prefix + (made.name or made.op_type)
        rename_reads(made, names)
        names |= {name: prefix + name for name in made.output if name}
        made.output[:] = [names[name] for name in made.output]
        for inner in with_inner(made):
            _fill_in(inner, attributes)
    return nodes


def _fill_in(node: NodeProto, values: dict[str, AttributeProto]) -> None:
    """Attributes that stand for one of the function's become that one, or go where there is none."""
    filled = []
    for attribute in node.attribute:
        value = values.get(attribute.ref_attr_name) if attribute.ref_attr_name else attribute
        if value is not None:
            filled.append(AttributeProto.FromString(value.SerializeToString()))
            filled[-1].name = attribute.name
    del node.attribute[:]
    node.attribute.extend(filled)
