"""The file that a program becomes, while it is written: what write rows add their nodes to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto
from torch import Tensor, fx, nn


@dataclass(frozen=True)
class Call:
    """A node of a program as a write row sees it: one form for module, function and method.

    Attributes:
        node: of the program.
        operator: its name, as `graphcomp.ir.op_name` has it.
        given: every argument by the name that the operator's signature has for it, defaults filled in; of a
            module its settings and tensors.
        module: that it calls; None for functions and methods.
        value: what it yields for the example inputs: meta tensors.
    """

    node: fx.Node
    operator: str
    given: Mapping[str, Any]
    module: nn.Module | None
    value: Any


class Writing:
    """Nodes and initialisers that grow."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._names: dict[fx.Node, str] = {}
        self._taken: set[str] = set()

    def value(self, given: Any) -> str:
        """The name of the value that an argument stands for; "" for None. Tensors become initialisers."""
        if given is None:
            return ""
        if isinstance(given, fx.Node):
            return self._names[given]
        if isinstance(given, Tensor):
            return self.array("tensor", given.detach().numpy())
        return self.array("constant", np.asarray(given))

    def bind(self, node: fx.Node, name: str) -> None:
        """Say what the value of a node is called."""
        self._names[node] = name

    def array(self, name: str, array: NDArray[Any]) -> str:
        """Hold numbers as an initialiser; its name."""
        name = self._free(name)
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output; the name of the output. Attributes that are None are left out."""
        name = self._free(operator.lower())
        left = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [name], name=name, **left))
        return name

    def _free(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name
