"""The nodes of a file, one after another: evaluated where all is known, else handed to the row of each."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import onnx
import torch
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto

from graphcomp.errors import GraphcompError, LoadError, first_line
from graphcomp.onnx.reading.bodies import body_of, written_out
from graphcomp.onnx.reading.file import array_of
from graphcomp.onnx.reading.known import RANDOM, constant_of, evaluate
from graphcomp.onnx.reading.sequences import MAKE, TAKE, Items
from graphcomp.onnx.rows import READS, VALUE_KEY, Array, Known, Made, Node, Reading, Value
from graphcomp.onnx.rows.registry import Read
from graphcomp.onnx.subgraphs import reads

_Result = TypeVar("_Result")

_MOST_HELD = 1 << 32
"""Bytes of all constants that were computed and are still read."""

_DEEPEST = 16
_WEIGHT = 16
"""Elements from which a constant that stands in a node is a weight, and not a number of a formula."""

_QUANTISED = "compress the floating point file and quantise what comes out of it"
_CUT = "cut the file in front of it with onnx.utils.extract_model, and go on from there in your code"
_ADVICE = {
    **dict.fromkeys(("Loop", "Scan", "If"), "export the network with fixed control flow, or cut it out"),
    **dict.fromkeys(("NonMaxSuppression", "NonZero", "RoiAlign", "Unique", "Compress", "MaxRoiPool"), _CUT),
    **dict.fromkeys(sorted(RANDOM), "a network that draws numbers cannot be checked; export it without"),
}


class Walk:
    """From values of a file, by name, to known numbers and nodes of the program."""

    def __init__(self, graph: GraphProto, opset: int, reading: Reading, inputs: Mapping[str, Made]) -> None:
        self.graph, self.opset, self.reading = graph, opset, reading
        self.held = 0
        self.arrays: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.values: dict[str, Value] = dict(inputs)
        self.lists: dict[str, Items] = {}
        self.uses = Counter(name for node in _needed(graph) for name in reads(node))
        self.uses.update(o.name for o in graph.output)

    def run(self) -> list[Value]:
        """The outputs of the file.

        Raises:
            LoadError: naming the node that cannot be read.
        """
        for proto in _needed(self.graph):
            self._read_node(proto, 0)
        return [self._value(o.name, "the file's outputs") for o in self.graph.output]

    def _value(self, name: str, place: str) -> Value:
        if name not in self.values and name in self.arrays:
            self.values[name] = Known((array_of(self.arrays[name]),) * len(self.reading.batches), name)
        if name not in self.values:
            raise LoadError.at(
                place,
                f"{name!r:.120}, which nothing before it computes",
                "values in order",
                "the file is not valid ONNX",
            )
        return self.values[name]

    def _read_node(self, proto: NodeProto, depth: int) -> None:
        place = f"{proto.op_type} {proto.name!r:.120}"
        names = _trimmed(proto.input)
        inputs = [self._value(n, place) if n and n not in self.lists else None for n in names]
        if any(n in self.lists for n in names) and proto.op_type not in TAKE:
            raise LoadError.at(place, "a list of tensors", "tensors", _CUT)
        if proto.op_type in MAKE:
            node = Node(proto, self.opset, inputs)
            made = self._called(node, lambda: MAKE[proto.op_type](node, self.reading, ()))
            self.lists |= dict.fromkeys(node.outputs[:1], made)
            return
        for name, value in zip(proto.output, self._outputs(proto, inputs, depth), strict=False):
            if name:
                if name in self.values or name in self.arrays:
                    raise LoadError.at(
                        place, f"a second {name!r:.120}", "a name for each value", "it is not valid ONNX"
                    )
                self.values[name] = value
                if isinstance(value, Made) and not depth:  # no runtime tells what a body computes
                    value.node.meta.setdefault(VALUE_KEY, name)
        for name in set(proto.input):
            self._release(name, list(proto.input).count(name))

    def _release(self, name: str, times: int) -> None:
        self.uses[name] -= times
        if self.uses[name] <= 0 and isinstance(self.values.get(name), Known):
            value = self.values.pop(name)
            assert isinstance(value, Known)
            self.held -= 0 if value.name else _bytes(value.values)

    def _outputs(self, proto: NodeProto, inputs: Sequence[Value | None], depth: int) -> Sequence[Value]:
        cases = len(self.reading.batches)
        if proto.op_type in TAKE:
            node = Node(proto, self.opset, inputs)
            node.optional(0)
            lists = [self.lists.get(name) for name in proto.input]
            return [self._called(node, lambda: TAKE[proto.op_type](node, self.reading, lists))]
        if proto.op_type == "Constant":
            array = constant_of(proto)
            weight = array.ndim >= 2 and array.size >= _WEIGHT and array.dtype.kind == "f"
            return [Known((array,) * cases, proto.output[0] if weight else "")]
        if proto.op_type == "If":
            return self._branch(proto, inputs, depth)
        known = [v for v in inputs if not isinstance(v, Made)]
        if len(known) == len(inputs) and proto.op_type not in _QUIET:
            if proto.op_type == "Identity" and known[0] is not None:
                return [Known(known[0].values, proto.output[0] if known[0].name else "")]
            results = evaluate(proto, self.opset, known, cases)
            self.held += sum(_bytes(r.values) for r in results)
            if self.held > _MOST_HELD:
                raise LoadError.at(
                    f"{proto.op_type} {proto.name!r:.120}",
                    "constants of several GiB",
                    "less",
                    "this is no network",
                )
            return results
        row = READS.get(proto.op_type)
        node = Node(proto, self.opset, inputs)
        if row is None and (body := body_of(proto, self.opset, inputs)) is not None and depth < _DEEPEST:
            return self._by_definition(node, body, depth)
        if row is None or not _exists(proto.op_type, self.opset):
            raise _refusal(node, self.opset, row is not None)
        return self._by_row(node, row)

    def _by_row(self, node: Node, row: Read) -> Sequence[Value]:
        result = self._called(node, lambda: row(node, self.reading))
        results = result if isinstance(result, tuple) else (result,)
        wanted = [i for i, name in enumerate(node.outputs) if self.uses[name] > 0]
        if max(wanted, default=0) >= len(results):
            raise node.refusal(
                f"output {max(wanted)}, which something reads",
                f"the first {len(results)} only",
                "the others cannot be computed; remove what reads them",
            )
        return results

    def _called(self, node: Node, row: Callable[[], _Result]) -> _Result:
        """What a row makes of a node; LoadError, naming the node, if it fails or something was overlooked."""
        if not _exists(node.operator, self.opset):
            raise _refusal(node, self.opset, True)
        self.reading.begin(node)
        try:
            result = row()
        except LoadError as error:
            place = f"{node.operator} {node.name!r:.120}"
            if str(error).startswith(place):
                raise
            raise LoadError(f"{place}: {error}") from error
        except GraphcompError:
            raise
        # A row that trips over a malformed node: it must not get through, and need not be told apart.
        except Exception as error:
            raise node.refusal(
                f"{type(error).__name__}: {first_line(error)!r:.200}",
                "a node of a valid file",
                "check it with onnx.checker",
            ) from error
        if node.unread():
            raise node.refusal(
                node.unread()[0], "only what is known of this operator", "export it with another opset"
            )
        return result

    def _branch(self, proto: NodeProto, inputs: Sequence[Value | None], depth: int) -> Sequence[Value]:
        """The branch of an If whose condition is known, or both."""
        node = Node(proto, self.opset, inputs)
        condition = inputs[0] if inputs else None
        if isinstance(condition, Made) and depth < _DEEPEST:
            return self._both(node, condition, depth)
        if (
            not isinstance(condition, Known)
            or not condition.is_constant
            or condition.array.size != 1
            or depth >= _DEEPEST
        ):
            raise _refusal(node, self.opset, False)
        wanted = "then_branch" if bool(condition.array.reshape(-1)[0]) else "else_branch"
        return self._body(node, wanted, depth)

    def _both(self, node: Node, condition: Made, depth: int) -> Sequence[Value]:
        """Both branches, and of every sample what its own condition chooses, where they yield alike."""
        first, second = (self._body(node, name, depth) for name in ("then_branch", "else_branch"))
        node.optional(0)
        node.ignore("then_branch", "else_branch")
        pairs = zip(first, second, strict=True)
        results = self._called(node, lambda: [self._chosen(node, condition, *pair) for pair in pairs])
        self.reading.remarks.append(
            f"If {node.name!r:.120} depends on data: both branches are computed, compared where samples go"
        )
        return results

    def _chosen(self, node: Node, condition: Made, first: Value, second: Value) -> Value:
        a, b = self.reading.tensor(first), self.reading.tensor(second)
        batches = self.reading.batches
        by_sample = all(s[:1] == (batch,) for s, batch in zip(condition.shapes, batches, strict=True))
        fits = math.prod(condition.shape[1:]) == 1 and (by_sample or set(batches) == {1})
        if a.shapes != b.shapes or a.dtype != b.dtype or a.rank < 1 or not fits:
            raise node.refusal(
                "a condition that depends on data, and branches that yield something else",
                "branches of one shape and type, and a condition a sample",
                _ADVICE["If"],
            )
        chosen = self.reading.method("reshape", condition, -1, *(1,) * (a.rank - 1))
        return self.reading.call(torch.where, chosen, a, b)

    def _body(self, node: Node, wanted: str, depth: int) -> Sequence[Value]:
        """A branch, whose nodes are read in place."""
        found = [a.g for a in node.proto.attribute if a.name == wanted and a.type == AttributeProto.GRAPH]
        if len(found) != 1:
            raise node.refusal(f"no {wanted}", "one", "the file is not valid ONNX")
        (graph,) = found
        inside = {t.name: t for t in graph.initializer}
        taken = inside.keys() & (self.arrays.keys() | self.values.keys())
        if taken:
            raise node.refusal(
                f"a second {min(taken)!r:.120}", "a name for each value", "it is not valid ONNX"
            )
        self.arrays |= inside
        try:
            return self._read_inside(
                graph.node, [o.name for o in graph.output], f"If {node.name!r:.120}", depth
            )
        finally:
            for name in inside:
                self.arrays.pop(name, None)
                self.values.pop(name, None)

    def _by_definition(self, node: Node, body: FunctionProto, depth: int) -> Sequence[Value]:
        """What the definition of an operator computes."""
        prefix = f"{node.name}/"
        nodes = written_out(body, node.proto, self.opset, prefix)
        place = f"{node.operator} {node.name!r:.120}"
        try:
            return self._read_inside(nodes, [prefix + name for name in body.output], place, depth)
        except LoadError as error:
            raise LoadError(f"{place}: {error}") from error

    def _read_inside(
        self, nodes: Sequence[NodeProto], outputs: Sequence[str], place: str, depth: int
    ) -> Sequence[Value]:
        """The outputs of nodes that mean something here only: their names are free again."""
        self.uses.update(name for inner in nodes for name in reads(inner))
        self.uses.update(outputs)
        for inner in nodes:
            self._read_node(inner, depth + 1)
        results = [self._value(name, place) for name in outputs]
        for name in (name for inner in nodes for name in inner.output):
            self.values.pop(name, None)
            self.lists.pop(name, None)
        return results


_QUIET = frozenset(READS) & {"Dropout"}
"""Operators whose rows see known inputs, too: the reference drops numbers out."""


_CALLED_DEPRECATED = frozenset({"GroupNormalization"})
"""In the version with one scale a group; files of operator sets 18 to 20 have it."""


def _exists(operator: str, opset: int) -> bool:
    try:
        return operator in _CALLED_DEPRECATED or not onnx.defs.get_schema(operator, opset).deprecated
    except onnx.defs.SchemaError:
        return False


def _refusal(node: Node, opset: int, has_row: bool) -> LoadError:
    name = node.operator
    if "QLinear" in name or name in (
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "ConvInteger",
        "MatMulInteger",
    ):
        return node.refusal("a quantised network", "a floating point one", _QUANTISED)
    if has_row:
        return node.refusal(
            f"an operator that operator set {opset} does not have", "one of its own", "it is not valid ONNX"
        )
    known = ", ".join(sorted(READS)[:4])
    return node.refusal(
        "an operator that is not read", f"one of {len(READS)} ({known}, ...)",
        _ADVICE.get(name, _CUT),
    )  # fmt: skip


def _trimmed(names: Sequence[str]) -> list[str]:
    names = list(names)
    while names and not names[-1]:
        names.pop()
    return names


def _bytes(arrays: Sequence[Array]) -> int:
    return sum({id(a): a.nbytes for a in arrays}.values())


def _needed(graph: GraphProto) -> list[NodeProto]:
    """The nodes that an output depends on, in the file's order."""
    wanted = {o.name for o in graph.output}
    needed: list[NodeProto] = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            needed.append(node)
            wanted.update(reads(node))
    return needed[::-1]
