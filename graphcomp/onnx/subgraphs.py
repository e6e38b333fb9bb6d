"""Who makes and reads the values of a file; bodies of If, Loop and Scan count: these read any around them."""

from collections import Counter
from collections.abc import Iterator, Mapping

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto


def reads(node: NodeProto) -> list[str]:
    """The values that a node reads, once for each time it does.

    Of its bodies all names are among them, also those that mean something only inside: who drops or renames
    what nobody reads must not take what one of them reads, and files name values once.
    """
    names = list(filter(None, node.input))
    for body in _bodies(node):
        names += [o.name for o in body.output]
        names += [name for inner in body.node for name in filter(None, inner.input)]
    return names


def makers_of(model: ModelProto) -> dict[str, NodeProto]:
    """The node that makes each value."""
    return {output: node for node in model.graph.node for output in node.output}


def count_reads(model: ModelProto) -> Counter[str]:
    """How often nodes read each value; the file's own outputs do not count."""
    return Counter(name for node in model.graph.node for name in reads(node))


def required_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """What a file has to be given: files may list stored weights as inputs too (before IR version 4)."""
    stored = {i.name for i in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def rename_reads(node: NodeProto, renamed: Mapping[str, str]) -> None:
    """Give the values that a node reads, and that its bodies read, their new names, in place."""
    for reader in with_inner(node):
        for index, name in enumerate(reader.input):
            if name in renamed:
                reader.input[index] = renamed[name]
    for body in _bodies(node):
        for output in body.output:
            output.name = renamed.get(output.name, output.name)


def with_inner(node: NodeProto) -> Iterator[NodeProto]:
    """A node, and those of its bodies."""
    yield node
    for body in _bodies(node):
        yield from body.node


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Of a node, and of the nodes in them, however deep; no recursion, for files come from anywhere."""
    stack = [node]
    while stack:
        for attribute in stack.pop().attribute:
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for body in bodies:
                yield body
                stack.extend(body.node)
