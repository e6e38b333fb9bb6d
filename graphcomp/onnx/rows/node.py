"""A node of an ONNX file as a read row sees it: typed attributes and inputs, and what was not looked at."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import onnx
from onnx import AttributeProto, NodeProto

from graphcomp.errors import LoadError
from graphcomp.onnx.rows.values import Known, Made, Value


class Node:
    """A node whose inputs have been read.

    A row asks for every attribute and input that it knows. What is left when it returns is something that it
    does not know, and the file is refused: an attribute that is overlooked is a wrong number.

    Attributes:
        operator: its ONNX operator.
        name: for messages and for names of layers; its first output's where the file has none.
        opset: version of the default operator set that the file asks for.
        outputs: names of its outputs, "" for those that are left out; trailing ones are dropped.
    """

    def __init__(self, proto: NodeProto, opset: int, inputs: Sequence[Value | None]) -> None:
        self.proto = proto
        self.operator: str = proto.op_type
        self.opset = opset
        outputs = list(proto.output)
        while outputs and not outputs[-1]:
            outputs.pop()
        self.outputs: tuple[str, ...] = tuple(outputs)
        self.name: str = proto.name or next(filter(None, outputs), "")
        self._inputs = tuple(inputs)
        self._attributes: Mapping[str, AttributeProto] = {a.name: a for a in proto.attribute}
        self._asked: set[str] = set()
        self._asked_inputs: set[int] = set()

    # ---- inputs

    @property
    def count(self) -> int:
        """How many inputs there are, left out ones in between counted."""
        return len(self._inputs)

    def input(self, index: int) -> Value:
        """An input that must be there."""
        value = self.optional(index)
        if value is None:
            raise self.refusal(f"no input {index}", "one", "the file is not valid ONNX")
        return value

    def optional(self, index: int) -> Value | None:
        """An input that may be left out."""
        self._asked_inputs.add(index)
        return self._inputs[index] if index < len(self._inputs) else None

    def known(self, index: int, what: str) -> Known | None:
        """An optional input that must be known when the file is read; `what` it is, for the message."""
        value = self.optional(index)
        if isinstance(value, Made):
            raise self.refusal(
                f"{what} computed from the network's inputs",
                "one that is known when the file is read",
                "export the network with a constant one",
            )
        return value

    def constant(self, index: int, what: str) -> Known | None:
        """A known input that does not depend on the sizes of the network's inputs."""
        value = self.known(index, what)
        if value is not None and not value.is_constant:
            raise self.refusal(
                f"{what} that follows from the size of an input", "a constant one", "give --input-shape"
            )
        return value

    def listed(self, name: str, index: int) -> tuple[int, ...] | None:
        """Whole numbers that are an attribute in old operator sets and an input in new ones, or left out."""
        if self.has(name):
            return self.integers(name)
        value = self.constant(index, name)
        return None if value is None else tuple(int(n) for n in value.array.reshape(-1))

    def axis(self, name: str, default: int, rank: int) -> int:
        """An attribute that counts axes, as a number that is not negative."""
        return self.along(self.integer(name, default), rank)

    def along(self, axis: int, rank: int) -> int:
        """An axis counted from the front; refuses those that are not there."""
        if not -rank <= axis < max(rank, 1):
            raise self.refusal(f"axis {axis} of {rank}", "one that is there", "the file is not valid ONNX")
        return axis % rank if rank else 0

    def all_inputs(self) -> list[Value]:
        """Every input, all of which must be there."""
        return [self.input(i) for i in range(self.count)]

    # ---- attributes

    def _attribute(self, name: str, kind: int) -> Any:
        self._asked.add(name)
        found = self._attributes.get(name)
        if found is None:
            return None
        if found.type != kind or found.ref_attr_name:
            expected = AttributeProto.AttributeType.Name(kind)
            raise self.refusal(f"another kind of attribute {name!r}", expected, "the file is not valid ONNX")
        return onnx.helper.get_attribute_value(found)

    def has(self, name: str) -> bool:
        """Whether the attribute is there."""
        return name in self._attributes

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._attribute(name, AttributeProto.INT)
        return default if value is None else cast(int, value)

    def number(self, name: str, default: float) -> float:
        """A floating point number."""
        value = self._attribute(name, AttributeProto.FLOAT)
        return default if value is None else cast(float, value)

    def word(self, name: str, default: str) -> str:
        """A word."""
        value = self._attribute(name, AttributeProto.STRING)
        return default if value is None else cast(bytes, value).decode("ascii", "replace")

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...] | None:
        """Whole numbers."""
        value = self._attribute(name, AttributeProto.INTS)
        return (None if default is None else tuple(default)) if value is None else tuple(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """Floating point numbers."""
        value = self._attribute(name, AttributeProto.FLOATS)
        return None if value is None else tuple(value)

    def words(self, name: str) -> tuple[str, ...] | None:
        """Words."""
        value = self._attribute(name, AttributeProto.STRINGS)
        return None if value is None else tuple(v.decode("ascii", "replace") for v in value)

    def only(self, name: str, value: int | str, default: int | str) -> None:
        """Refuse the file unless the attribute has the one value that the row knows."""
        found = self.integer(name, default) if isinstance(default, int) else self.word(name, default)
        if found != value:
            raise self.refusal(f"{name}={found!r}", f"{name}={value!r}", "no layer of torch computes this")

    def ignore(self, *names: str) -> None:
        """Attributes that do not change what the node computes here."""
        self._asked.update(names)

    # ---- names

    @property
    def weight(self) -> tuple[str, int]:
        """Name and number of axes of the first initialiser among its inputs, "" without any."""
        held = (v for v in self._inputs if isinstance(v, Known) and v.name)
        return next(((v.name, v.array.ndim) for v in held), ("", 0))

    def tag(self, key: str) -> str:
        """What its metadata say under a key."""
        return next((p.value for p in self.proto.metadata_props if p.key == key), "")

    # ---- refusing

    def unread(self) -> list[str]:
        """Attributes and inputs that nobody has asked for."""
        attributes = [f"attribute {name!r}" for name in self._attributes if name not in self._asked]
        return attributes + [
            f"input {i}"
            for i, value in enumerate(self._inputs)
            if value is not None and i not in self._asked_inputs
        ]

    def refusal(self, found: object, expected: str, advice: str) -> LoadError:
        """An error that names this node."""
        return LoadError.at(f"{self.operator} {self.name!r:.120}", found, expected, advice)
