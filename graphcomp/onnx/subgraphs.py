"""What a node reads, its bodies counted: those of If, Loop and Scan may read any value around them."""

from collections.abc import Iterator, Mapping

from onnx import AttributeProto, GraphProto, NodeProto


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


def rename_reads(node: NodeProto, renamed: Mapping[str, str]) -> None:
    """Give the values that a node reads, and that its bodies read, their new names, in place."""
    for reader in (node, *(inner for body in _bodies(node) for inner in body.node)):
        for index, name in enumerate(reader.input):
            if name in renamed:
                reader.input[index] = renamed[name]
    for body in _bodies(node):
        for output in body.output:
            output.name = renamed.get(output.name, output.name)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Of a node, and of the nodes in them, however deep; no recursion, for files come from anywhere."""
    stack = [node]
    while stack:
        for attribute in stack.pop().attribute:
            bodies = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
            for body in bodies:
                yield body
                stack.extend(body.node)
