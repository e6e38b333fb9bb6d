"""Program: a traced network as a value.

A Program is an fx graph that keeps `torch.nn` modules as modules (so it trains like any PyTorch model), the
example inputs it was traced with, and the plans of the passes that made it. It is saved as JSON and
safetensors, never as a pickle, and loads without the source of the model it came from (`ir.saved.storage`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from graphcomp.base import sha256, tensor_parts
from graphcomp.errors import InputError
from graphcomp.ir.interface import Interface
from graphcomp.ir.operators import ALIASES, OUT_OF_PLACE, follow_type
from graphcomp.ir.precision import converted, in_precision
from graphcomp.ir.shapes import Shape

if TYPE_CHECKING:
    import networkx as nx


PASS_KEY = "graphcomp_pass"
"""`node.meta` key: the name of the pass that made the node or changed it last."""

OWNER_KEY = "graphcomp_owner"
"""`node.meta` key: the path of the module whose code made the node, where a trace by torch.fx knows it."""


@dataclass(frozen=True, eq=False)
class Program:
    """A traced network: never changed in place, every pass returns a new one.

    Attributes:
        module: the fx GraphModule; called like the network that it was traced from. `trace` leaves it in eval
            mode, and what a program computes (`program(x)`, and all that evaluates one) is what it computes
            in eval mode: only who trains `module` sees its mode.
        example_inputs: one tensor an input, batch 1; they fix the spatial sizes that costs are counted at.
        history: the plans (JSON objects) of the passes that led here, oldest first.
        interface: what the file that it was read from says of itself: names, metadata, open axes.
    """

    module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    history: tuple[dict[str, Any], ...] = ()
    interface: Interface = field(default_factory=Interface)

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    def __call__(self, *inputs: Tensor) -> Any:
        """What the network yields for these inputs in eval mode, whatever mode its modules are in.

        To train, call `module`. Raises InputError for sizes that contradict those that the network was
        specialised to.
        """
        self._check_sizes(inputs)
        with evaluating(self.module):
            return nn.Module.__call__(self.module, *inputs)  # GraphModule's own prints its code when it fails

    def _check_sizes(self, inputs: tuple[Any, ...]) -> None:
        """Python's decisions were taken at the example's sizes: at others the graph is another network."""
        for index, (given, example) in enumerate(zip(inputs, self.example_inputs, strict=False)):
            found, expected = tuple(given.shape[1:]), tuple(example.shape[1:])
            if self.interface.specialised and found != expected:
                raise InputError(
                    f"input {index}: found {found}, expected {expected} (after the batch), which the network "
                    f"was specialised to by {self.interface.specialised[0]}; trace it at the other size"
                )

    def clone(self) -> "Program":
        """The same program with its own copy of graph, modules and tensors."""
        return replace(
            self, module=editable(self), example_inputs=tuple(x.clone() for x in self.example_inputs)
        )

    def in_eval_mode(self) -> "Program":
        """The program itself if none of its modules is in training mode, else one with the same tensors."""
        if not any(m.training for m in self.module.modules()):
            return self
        module = assemble(self, _root(self.module, lambda t: t), copy_graph(self.graph)).eval()
        return replace(self, module=module)

    def to(self, dtype: torch.dtype) -> "Program":
        """A clone that computes in `dtype`: its floating point tensors have it, and its casts follow."""
        inputs = tuple(in_precision(x, dtype).clone() for x in self.example_inputs)
        root, graph = parts(self, converted(self.tensors, dtype))  # converted while they are copied
        follow_type(graph, dtype)
        return replace(self, module=assemble(self, root, graph), example_inputs=inputs)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by dotted path."""
        return dict(self.module.named_modules(remove_duplicate=False))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by dotted name, tied ones under all of their names."""
        return named_tensors(self.module)

    def layer(self, target: str, kind: type[nn.Module] = nn.Module) -> nn.Module:
        """The module at dotted path `target`, checked to be a `kind`."""
        module = self.modules[target]
        if not isinstance(module, kind):
            raise TypeError(f"{target}: found {type(module).__name__}, expected {kind.__name__}")
        return module

    def called_modules(self) -> dict[str, nn.Module]:
        """Every module that the graph calls, by dotted path, in order of first call."""
        targets = dict.fromkeys(cast(str, n.target) for n in self.graph.nodes if n.op == "call_module")
        return {t: self.modules[t] for t in targets}

    @cached_property
    def values(self) -> dict[fx.Node, Any]:
        """What every node yields for the example inputs, as meta tensors (shapes and types, no numbers)."""
        from graphcomp.ir.meta import run_on_meta

        return run_on_meta(self)

    @cached_property
    def findings(self) -> dict[str, dict[Any, Any]]:
        """What was found out about the structure of this program, by who did: it never changes."""
        return {}

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Where in the graph every node is."""
        return {node: i for i, node in enumerate(self.graph.nodes)}

    @cached_property
    def _by_memory(self) -> dict[int, list[fx.Node]]:
        found: dict[int, list[fx.Node]] = {}
        for node, value in self.values.items():
            if isinstance(value, Tensor):
                found.setdefault(value.untyped_storage()._cdata, []).append(node)
        return found

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that yield a tensor in the same memory (see `same_memory`), itself with them."""
        value = self.values[node]
        return self._by_memory[value.untyped_storage()._cdata] if isinstance(value, Tensor) else []

    @property
    def output(self) -> Any:
        """What the network yields for the example inputs, as meta tensors."""
        return self.values[next(n for n in self.graph.nodes if n.op == "output")]

    def shape(self, node: fx.Node) -> Shape | None:
        """Shape of a node's output at batch 1; None if it is not one tensor."""
        value = self.values[node]
        return tuple(value.shape) if isinstance(value, Tensor) else None

    def fingerprint(self) -> str:
        """sha256 of what the program computes: graph, settings of the modules, every tensor.

        Not the history, the interface, nor the training mode. Computed anew each time: weights may be
        trained in place.
        """
        return _fingerprint(self)

    def to_networkx(self) -> "nx.MultiDiGraph":
        """The graph for networkx; attributes as `ir.graph` and docs/graphs.md list them."""
        from graphcomp.ir.graph import to_networkx

        return to_networkx(self)

    def __str__(self) -> str:
        from graphcomp.ir.text import format_node

        return "\n".join(format_node(self, node) for node in self.graph.nodes)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode while the block lasts; then every module is in the mode again that it was in."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def eliminate_dead_nodes(graph: fx.Graph, module: nn.Module) -> None:
    """Drop nodes without users, but those that act in place; `module` holds the graph's modules."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not acts_in_place(module, node):
            graph.erase_node(node)


def acts_in_place(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes into its operand."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(cast(str, node.target)), "inplace", False))
    if is_foreign(node.target):  # one whose result nobody reads is called for what it does
        return not node.users
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and name not in ALIASES  # `and_` does not
    return writes or node.target in OUT_OF_PLACE or bool(node.kwargs.get("inplace")) or name == "_assert"


def is_foreign(target: Any) -> bool:
    """Whether a node's target is a function of the user's own (torch.fx.wrap), of which nothing is known."""
    owner = str(getattr(target, "__module__", None) or "")
    known = owner.partition(".")[0] in ("torch", "graphcomp") or owner.startswith("torchvision.ops.")
    return inspect.isfunction(target) and not known


def same_memory(a: Any, b: Any) -> bool:
    """Whether two values are tensors (of `Program.values`, for one) that view the same memory."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def is_read_later(program: Program, writer: fx.Node) -> bool:
    """Whether what an in-place node writes is seen by later nodes that do not take its result."""
    order, at = program.order, program.order[writer]
    sharing = program.sharing(writer.all_input_nodes[0])
    return any(order[node] < at and any(order[user] > at for user in node.users) for node in sharing)


def editable(program: Program, replaced: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A copy of the program's GraphModule that a pass may edit; nothing is shared with the program.

    Args:
        program: left as it is.
        replaced: dotted tensor name -> new tensor to use in place of a clone of the old one. A tensor that
            has several names (a tied weight) is replaced under all of them.
    """
    return assemble(program, *parts(program, replaced))


def parts(program: Program, replaced: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, fx.Graph]:
    """What `editable` copies, not yet put together: modules with their tensors, and the graph.

    For edits that go through many states: a GraphModule compiles its code whenever it is given a graph.
    """
    memo = {id(program.tensors[name]): tensor for name, tensor in (replaced or {}).items()}
    return _root(program.module, cloning(memo)), copy_graph(program.graph)


def cloning(memo: Mapping[int, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """What copies tensors, one that has several names once; `memo`: what others become, by their `id`."""
    new: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            value = memo[id(tensor)] if memo and id(tensor) in memo else tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=tensor.requires_grad)
            new[id(tensor)] = value
        return new[id(tensor)]

    return copied


def _root(module: fx.GraphModule, f: Callable[[Tensor], Tensor]) -> nn.Module:
    """What a GraphModule holds, without its graph and code; tensors mapped through `f`."""
    root = nn.Module()
    for name, child in module._modules.items():
        root._modules[name] = with_tensors(cast(nn.Module, child), f)
    root._parameters = {k: cast(Any, p if p is None else f(p)) for k, p in module._parameters.items()}
    root._buffers = {k: b if b is None else f(b) for k, b in module._buffers.items()}
    return root


def assemble(program: Program, root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule of edited parts of `program`; modules and tensors that no node uses are left out."""
    return graph_module(root, graph, program.module.__class__.__name__).train(program.module.training)


def graph_module(root: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A GraphModule that compiles its code when it is first called: many are made and never run."""
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph, name)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same node names and metadata."""
    new, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
    return new


def with_tensors(module: nn.Module, f: Callable[[Tensor], Tensor]) -> nn.Module:
    """A shallow copy of `module` with every parameter and buffer mapped through `f`."""
    new = module.__new__(type(module))
    state: dict[str, Any] = {  # hooks are not shared
        k: v.copy() if isinstance(v, dict | set) else v for k, v in module.__dict__.items()
    }
    for kind in ("_parameters", "_buffers"):
        state[kind] = {k: t if t is None else f(t) for k, t in state[kind].items()}
    state["_modules"] = {k: m if m is None else with_tensors(m, f) for k, m in state["_modules"].items()}
    object.__setattr__(new, "__dict__", state)  # nn.Module's own is slow, and there is nothing to check
    return new


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by dotted name, tied ones under all of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _fingerprint(program: Program) -> str:
    return sha256(chain(_structure(program), tensor_parts(program.tensors)))


def _structure(program: Program) -> Iterator[bytes]:
    """The graph and the settings of its modules."""
    for node in program.graph.nodes:
        # annotations of inputs are not saved with a program
        text = f"{node.name} {node.target} {node.args}" if node.op == "placeholder" else node.format_node()
        yield f"{text}\n".encode()
        yield _own_code(node.target)
    for name, module in program.called_modules().items():
        for part, child in module.named_modules():
            yield f"{name} {part} {type(child).__qualname__} {_settings(child)}\n".encode()


def is_same(a: Program, b: Program) -> bool:
    """Whether two programs have the same fingerprint; where they differ it takes little time to see it."""
    if a is b:
        return True
    old, new = a.tensors, b.tensors
    if old.keys() != new.keys() or not all(
        t.shape == new[n].shape and t.dtype == new[n].dtype and torch.equal(t, new[n]) for n, t in old.items()
    ):
        return False
    return all(x == y for x, y in zip_longest(_structure(a), _structure(b)))


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    """A module's plain attributes; its repr leaves some out (the heads of an attention, for one)."""
    public = ((k, v) for k, v in sorted(vars(module).items()) if k != "training" and not k.startswith("_"))
    return [(k, getattr(v, "__qualname__", None) or repr(v)) for k, v in public]


def _own_code(target: Any) -> bytes:
    """The source file of a function of the user's own (torch.fx.wrap), whose name says nothing about it."""
    owner = str(getattr(target, "__module__", None) or "").partition(".")[0]
    if not inspect.isfunction(target) or owner in ("torch", "torchvision"):
        return b""
    try:
        return Path(inspect.getsourcefile(target) or "").read_bytes()
    except OSError:  # made in an interpreter
        return target.__code__.co_code


def map_leaves(value: Any, f: Callable[[Any], Any]) -> Any:
    """The same containers (mappings, lists, tuples, named ones too) with all that is none mapped by `f`."""
    if isinstance(value, Mapping):
        made = {key: map_leaves(item, f) for key, item in value.items()}
        return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
    if isinstance(value, tuple | list):
        items = [map_leaves(item, f) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return f(value)


def disagrees(found: Any, wanted: Any, tolerance: float) -> int | None:
    """The first tensor of two outputs, by number, that differs by more than a share of its largest value.

    None: there is none. Raises ValueError: there are more tensors in one of them.
    """
    for index, (x, y) in enumerate(zip(output_tensors(found), output_tensors(wanted), strict=True)):
        peak = float(y.abs().nan_to_num().max()) if y.numel() else 0.0  # equal NaNs are equal
        if x.shape != y.shape or not torch.allclose(x, y, rtol=0.0, atol=tolerance * peak, equal_nan=True):
            return index
    return None


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors of a network's output, which may be a tensor or nested tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return [output]
    items = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    return [t for item in items for t in output_tensors(item)]
