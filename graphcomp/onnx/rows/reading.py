"""The program that a file becomes, while it is read: what read rows add their nodes to."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphcomp.errors import GraphcompError, LoadError, first_line
from graphcomp.ir import PASS_KEY, with_tensors
from graphcomp.onnx.rows.naming import Names
from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.values import Array, Made, Value, map_made


class Reading:
    """A graph that grows, with the modules that it calls.

    Every node is run on the meta device in all cases when it is added, so that its shapes are known to the
    rows of what reads it, and what does not run is refused where it stands.

    Attributes:
        root: holds the modules and tensors.
        graph: of the program.
        batches: the batch size of every case.
    """

    def __init__(self, batches: Sequence[int], names: Names | None = None) -> None:
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.batches = tuple(batches)
        self.names = Names() if names is None else names
        self.inputs: list[Made] = []
        self._layers: dict[tuple[Any, ...], str] = {}
        self._meta: dict[str, nn.Module] = {}

    # ---- nodes

    def placeholder(self, name: str, values: Sequence[Tensor]) -> Made:
        """An input of the network; its meta tensor in every case."""
        node = self.graph.placeholder(name)
        node.meta[PASS_KEY] = "trace"
        made = Made(node, tuple(values))
        self.inputs.append(made)
        return made

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Made:
        """Call a function of torch on values and literals."""
        node = self.graph.call_function(function, *self._nodes(args, kwargs))
        return self._add(node, function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> Made:
        """Call a method of the first argument."""
        node = self.graph.call_method(name, *self._nodes(args, kwargs))
        return self._add(node, lambda x, *rest, **more: getattr(x, name)(*rest, **more), args, kwargs)

    def layer(self, node: Node, module: nn.Module, *args: Any, key: tuple[Any, ...] | None = None) -> Made:
        """Call a module on values.

        Args:
            node: that the module comes from, and is named after.
            module: new, in eval mode from now on.
            args: its inputs.
            key: where two nodes have equal ones they are calls of one layer (see `shared`).
        """
        path = None if key is None else self._layers.get(key)
        if path is None:
            path = self.names.place(self.root, node, module)
            self._meta[path] = with_tensors(module.eval(), _on_meta)
            if key is not None:
                self._layers[key] = path
        made = self.graph.call_module(path, *self._nodes(args, {}))
        return self._add(made, self._meta[path], args, {})

    def tensor(self, value: Value, what: str = "constant") -> Made:
        """A value as a node: known numbers become a tensor that the program holds.

        Floating point initialisers become parameters; numbers that were computed, or stand in a node, are
        buffers: they are not weights that somebody trained.
        """
        if isinstance(value, Made):
            return value
        if not value.is_constant:
            raise LoadError.at(what, "numbers that depend on a size of an input", "others", "not yet")
        tensor = as_tensor(value.array)
        trained = bool(value.name) and tensor.is_floating_point() and tensor.ndim > 0
        held: Tensor = nn.Parameter(tensor) if trained else tensor
        path = self.names.place_tensor(self.root, value.name or what, held)
        node = self.graph.get_attr(path)
        node.meta[PASS_KEY] = "trace"
        return Made(node, (_on_meta(tensor),) * len(self.batches))

    # ---- inside

    def _nodes(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        def nodes(value: Any) -> Any:
            return map_made(value, lambda m: m.node)

        return nodes(args), {k: nodes(v) for k, v in kwargs.items()}

    def _add(
        self, node: fx.Node, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Made:
        node.meta[PASS_KEY] = "trace"
        values = []
        for case in range(len(self.batches)):

            def here(value: Any, case: int = case) -> Any:
                return map_made(value, lambda m: m.values[case])

            try:
                with torch.no_grad():
                    values.append(run(*here(args), **{k: here(v) for k, v in kwargs.items()}))
            except GraphcompError:
                raise
            # Whatever the operators of torch raise; the reader adds the node of the file.
            except Exception as error:
                raise LoadError.at(
                    node.name,
                    f"{first_line(error)!r} at batch {self.batches[case]}",
                    "shapes that torch takes",
                    "the file is not valid, or bakes in a batch size",
                ) from error
        return Made(node, tuple(values))


def as_tensor(array: Array) -> Tensor:
    """Numbers of a file as a tensor of its own memory; every floating point type becomes float32."""
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array, order="C", copy=True))


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
