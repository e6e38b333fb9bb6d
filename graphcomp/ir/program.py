"""Program: a traced network as a value.

A Program is an fx graph that keeps `torch.nn` modules as modules (so it trains like any PyTorch model), the
example inputs it was traced with, and the plans of the passes that made it. It is saved as JSON and
safetensors, never as a pickle, and loads without the source of the model it came from (`ir.saved.storage`).
"""

import contextlib
import copy
import hashlib
import inspect
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from graphcomp.errors import GraphcompWarning, TraceError
from graphcomp.ir.coefficients import DctConv2d, DctLayer, DctLinear
from graphcomp.ir.frozen import FrozenBatchNorm2d, as_layers, holds_frozen
from graphcomp.ir.lifting import lift_layers
from graphcomp.ir.operators import (
    ALIASES,
    MODULE_NAMES,
    OUT_OF_PLACE,
    follow_type,
    function_name,
    name_types,
    reshape_out_of_place,
    spelling,
)
from graphcomp.ir.shapes import Shape

if TYPE_CHECKING:
    import networkx as nx

PASS_KEY = "graphcomp_pass"
"""`node.meta` key: the name of the pass that made the node or changed it last."""


@dataclass(frozen=True, eq=False)
class Program:
    """A traced network: never changed in place, every pass returns a new one.

    Attributes:
        module: the fx GraphModule; called like the network that it was traced from. `trace` leaves it in eval
            mode, and what a program computes (`program(x)`, and all that evaluates one) is what it computes
            in eval mode: only who trains `module` sees its mode.
        example_inputs: one tensor an input, batch 1; they fix the spatial sizes that costs are counted at.
        history: the plans (JSON objects) of the passes that led here, oldest first.
    """

    module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    history: tuple[dict[str, Any], ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.module.graph

    def __call__(self, *inputs: Tensor) -> Any:
        """What the network yields for these inputs in eval mode, whatever mode its modules are in.

        To train, call `module`.
        """
        with evaluating(self.module):
            return nn.Module.__call__(self.module, *inputs)  # GraphModule's own prints its code when it fails

    def clone(self) -> "Program":
        """The same program with its own copy of graph, modules and tensors."""
        return Program(editable(self), tuple(x.clone() for x in self.example_inputs), self.history)

    def in_eval_mode(self) -> "Program":
        """The program itself if none of its modules is in training mode, else one with the same tensors."""
        if not any(m.training for m in self.module.modules()):
            return self
        module = assemble(self, _root(self.module, lambda t: t), copy_graph(self.graph)).eval()
        return Program(module, self.example_inputs, self.history)

    def to(self, dtype: torch.dtype) -> "Program":
        """A clone that computes in `dtype`: its floating point tensors have it, and its casts follow."""
        inputs = tuple(x.to(dtype) if x.is_floating_point() else x.clone() for x in self.example_inputs)
        root, graph = parts(self, _as_type(self.tensors, dtype))  # converted while they are copied
        follow_type(graph, dtype)
        return Program(assemble(self, root, graph).to(dtype), inputs, self.history)

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

        Not the history, nor the training mode. Computed anew each time: weights may be trained in place.
        """
        return _fingerprint(self)

    def to_networkx(self) -> "nx.MultiDiGraph":
        """The graph for networkx; attributes as `ir.graph` and docs/graphs.md list them."""
        from graphcomp.ir.graph import to_networkx

        return to_networkx(self)

    def __str__(self) -> str:
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


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; under fx it would be `x + y`, and views of x would miss the change."""


def _recorder(function: Callable[..., Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in OUT_OF_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _recorder(_function))


class _Tracer(fx.Tracer):
    """Keeps `torch.nn` modules whole and remembers where it is, for error messages."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DctLayer | FrozenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = outer  # not in a `finally`: after a failure it names the innermost module
        return result


def trace(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], *, copy_weights: bool = True
) -> Program:
    """Trace `model` in eval mode with `torch.fx.symbolic_trace` into a Program.

    Args:
        model: left as it is. Computed weights (`torch.nn.utils.parametrize`, and the hooks of pruning,
            spectral norm and weight norm) are baked in; with a GraphcompWarning if training on would differ.
            Frozen batch normalisations become layers (`ir.frozen`).
        example_inputs: one tensor an input; only the first sample of each is kept.
        copy_weights: False shares the tensors with `model`, for callers that drop the model.

    Raises:
        TraceError: naming the module and source line that fx cannot follow, or the node whose shape
            cannot be derived from the example inputs; a program of torch.export; hooks on the network itself.
    """
    _refuse_exported(model)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if copy_weights or holds_frozen(model) or any(_is_parametrized(m) for m in model.modules()):
        model = _copied(model)
        _bake_parametrizations(model)
        as_layers(model)
    if model._forward_hooks or model._forward_pre_hooks:
        raise TraceError(
            f"{type(model).__name__}: found forward hooks on the network itself, which no trace sees, "
            "expected none; move what they do into forward, or remove them"
        )
    tracer = _Tracer()
    _check_names(model)
    try:
        with evaluating(model):
            graph = tracer.trace(model)
        reshape_out_of_place(graph)
        name_types(graph)
        eliminate_dead_nodes(graph, model)
        augmented = {n.name for n in graph.nodes if n.target in OUT_OF_PLACE}
        for node in graph.nodes:  # `x += y` becomes `x + y` for now
            node.target = (
                OUT_OF_PLACE.get(node.target, node.target) if node.op == "call_function" else node.target
            )
        # shallow copies: the caller's modules keep their training mode, these are in eval mode
        root = with_tensors(model, lambda t: t)
        lift_layers(root, graph)
        module = graph_module(root, graph, type(model).__name__).eval()
    except Exception as error:
        raise _trace_error(model, tracer.path, error) from error
    for node in module.graph.nodes:
        node.meta = {PASS_KEY: "trace"}
        _place_operand(node)
    program = Program(module, tuple(x[:1].detach().clone() for x in inputs))
    # shapes are derived now, so that a wrong input shape fails here
    return _without_seen_writes(program, [n for n in module.graph.nodes if n.name in augmented])


def _check_names(model: nn.Module) -> None:
    """torch.fx writes names between quotes into the source that it compiles."""
    for path, _ in chain(model.named_modules(), model.named_parameters(), model.named_buffers()):
        if not path.isprintable() or set(path) & set('"\\'):
            raise TraceError(
                f"{type(model).__name__}: found a module or tensor called {path!r}, expected names "
                "without double quotes, backslashes and control characters; rename it"
            )


def _without_seen_writes(program: Program, augmented: Sequence[fx.Node]) -> Program:
    """Turn `x + y` back into `x += y` where something else sees the change of x."""
    while True:
        values = program.values
        seen = [n for n in augmented if isinstance(values[n], Tensor) and is_read_later(program, n)]
        if not seen:
            break
        for node in seen:
            node.target = next(k for k, v in OUT_OF_PLACE.items() if v is node.target)
        augmented = [n for n in augmented if n not in seen]
        program = Program(program.module, program.example_inputs)
        program.module.recompile()
    if any(not n.users for n in augmented):
        eliminate_dead_nodes(program.graph, program.module)
        program.module.recompile()
    return program


def _place_operand(node: fx.Node) -> None:
    """torch.cat(tensors=…), conv(input=…): the operand comes first, where every rule looks for it."""
    torch_owned = str(getattr(node.target, "__module__", "")).partition(".")[0] == "torch"
    if node.args or not (node.op == "call_module" or node.op == "call_function" and torch_owned):
        return
    name = next((k for k in ("input", "tensors", "tensor") if k in node.kwargs), None)
    if name is not None:
        node.args = (node.kwargs[name],)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}


def eliminate_dead_nodes(graph: fx.Graph, module: nn.Module) -> None:
    """Drop nodes without users, but those that act in place; `module` holds the graph's modules."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output") and not acts_in_place(module, node):
            graph.erase_node(node)


def acts_in_place(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes into its operand."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(cast(str, node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and name not in ALIASES  # `and_` does not
    return writes or node.target in OUT_OF_PLACE or bool(node.kwargs.get("inplace")) or name == "_assert"


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


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of the old weight norm's computed weights, which torch refuses to copy."""
    held = (t for m in model.modules() for t in vars(m).values())
    computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(model, cast(dict[int, Any], computed))


_WEIGHT_HOOKS = (prune.BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks of torch that compute a parameter anew at every call."""


def _weight_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _WEIGHT_HOOKS)]


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or bool(_weight_hooks(module))


def _bake_parametrizations(model: nn.Module) -> None:
    """Replace computed weights by their values: exact in eval mode, and then the analysis can see them."""
    lost: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            _bake(module)
        for hook in _weight_hooks(module):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
                lost.setdefault("masks of nn.utils.prune", []).append(path)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
                lost.setdefault("spectral_norm", []).append(path)
            else:
                nn.utils.remove_weight_norm(module, hook.name)
    for what, paths in lost.items():
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warnings.warn(
            f"{', '.join(paths[:3])}{more}: found {what}; the weights that they yield are baked in, and "
            "training on moves these freely",
            GraphcompWarning,
            stacklevel=3,
        )


def _refuse_exported(model: Any) -> None:
    """TraceError for what holds operators of ATen instead of layers: nothing in it could be compressed."""
    found = None if isinstance(model, nn.Module) else type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        found = "a TorchScript module"
    elif isinstance(model, nn.Module) and any(map(_is_exported, model.modules())):
        found = "a program of torch.export"
    if found is not None:
        raise TraceError(
            f"{type(model).__name__}: found {found}, which has no layers any more, expected a "
            "torch.nn.Module; give the module that it was made from"
        )


def _is_exported(module: nn.Module) -> bool:
    graph = getattr(module, "graph", None)
    nodes = graph.nodes if isinstance(graph, fx.Graph) else ()
    return any(isinstance(n.target, OpOverload) and n.target.namespace == "aten" for n in nodes)


def _bake(module: nn.Module) -> None:
    """torch's own `remove_parametrizations` would take the property from the class, which copies share."""
    lists = dict(cast(nn.ModuleDict, module.parametrizations).items())
    values = {name: getattr(module, name).detach().clone() for name in lists}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        origin = list(lists[name].parameters())
        if origin:
            module.register_parameter(name, nn.Parameter(value, any(p.requires_grad for p in origin)))
        else:
            module.register_buffer(name, value)


def _trace_error(model: nn.Module, path: str, error: Exception) -> TraceError:
    torch_dir = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(torch_dir)]
    here = frames[-1] if frames and frames[-1].filename != __file__ else None
    module = model.get_submodule(path) if path else model
    where = f"{path or type(model).__name__} ({type(module).__name__})"
    line = f"{here.filename}:{here.lineno}: `{here.line}`" if here else "no source line"
    return TraceError(
        f"{where}: {line}: {type(error).__name__}: {error}; expected a forward whose control flow does not "
        "depend on tensor values; move the branch out of forward, or wrap it in a function marked with "
        "torch.fx.wrap (its channels are then left alone)"
    )


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
    new: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in new:
            value = memo[id(tensor)] if id(tensor) in memo else tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value.detach(), requires_grad=tensor.requires_grad)
            new[id(tensor)] = value
        return new[id(tensor)]

    return _root(program.module, copied), copy_graph(program.graph)


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
    digest = hashlib.sha256()
    for part in _structure(program):
        digest.update(part)
    digest_tensors(digest, program.tensors)
    return digest.hexdigest()


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


def digest_tensors(digest: "hashlib._Hash", tensors: Mapping[str, Tensor]) -> None:
    """Feed names, types, shapes and values of tensors to a hash, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


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


def run_on_meta(
    program: Program,
    before: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], None] = lambda node, args, kwargs: None,
    after: Callable[[fx.Node, Any], None] = lambda node, value: None,
) -> dict[fx.Node, Any]:
    """Run the graph on the meta device at batch 1: shapes without arithmetic.

    Args:
        program: is not changed.
        before: is shown every node with what it is about to be called with; what it raises stops the run.
        after: is shown every node with its value.

    Raises:
        TraceError: naming the node that does not run.
    """

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    modules = {t: with_tensors(m, meta).eval() for t, m in program.called_modules().items()}
    inputs = iter(program.example_inputs)
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        try:
            with torch.no_grad():
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                before(node, args, kwargs)
                values[node] = _run_node(node, args, kwargs, values, modules, inputs, program, meta)
                after(node, values[node])
        except Exception as error:
            shapes = [tuple(values[n].shape) for n in node.all_input_nodes if hasattr(values[n], "shape")]
            raise TraceError(
                f"{node.name} ({node.target}): {error} (input shapes {shapes}); expected shapes that follow "
                f"from the example inputs {[tuple(x.shape) for x in program.example_inputs]}; "
                "check --input-shape"
            ) from error
    return values


_SHAPE_KEEPING = """BatchNorm1d BatchNorm2d BatchNorm3d LayerNorm ReLU ReLU6 SiLU GELU ELU LeakyReLU Hardswish
    Hardsigmoid Sigmoid Tanh Softmax Dropout Identity"""
SAME_SHAPE = {FrozenBatchNorm2d, *(getattr(nn, name) for name in _SHAPE_KEEPING.split())}
SAME_SHAPE_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.silu,
    F.gelu,
    F.hardswish,
    F.hardsigmoid,
    torch.relu,
    torch.sigmoid,
}
BROADCASTS = {operator.add, operator.mul, operator.sub, torch.add, torch.mul}


def _quick_module(module: nn.Module, x: Any) -> Any:
    """Shape of the commonest modules without the meta device, which is slow at them; None for others."""
    if type(module) in SAME_SHAPE:
        same = getattr(module, "inplace", False) or isinstance(module, nn.Dropout | nn.Identity)
        return x if same else _empty(x, x.shape)  # views matter: see `same_memory`
    if type(module) is nn.Linear and x.shape[-1] == module.weight.shape[1]:
        return _empty(x, (*x.shape[:-1], module.weight.shape[0]))
    if type(module) is nn.Conv2d and x.ndim == 4 and x.shape[1] == module.weight.shape[1] * module.groups:
        shape = None if isinstance(module.padding, str) else _convolved(module, module.padding, x.shape)
        return _empty(x, shape) if shape and min(shape) > 0 else None
    if type(module) is nn.AdaptiveAvgPool2d:
        size = module.output_size
        height, width = size if isinstance(size, tuple) else (size, size)
        if isinstance(height, int) and isinstance(width, int):
            return _empty(x, (*x.shape[:-2], height, width))
    return None


def _convolved(module: nn.Conv2d, padding: tuple[int, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """Output shape of a convolution, as torch documents it."""
    axes = zip(shape[2:], padding, module.dilation, module.kernel_size, module.stride, strict=True)
    sizes = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in axes)
    return (shape[0], module.weight.shape[0], *sizes)


def _quick_function(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The same for activations, and for arithmetic on two tensors of one type."""
    if function in SAME_SHAPE_FUNCTIONS and len(args) == 1:
        return args[0] if kwargs.get("inplace") else _empty(args[0], args[0].shape)
    size = kwargs.get("size")
    if (
        function is F.interpolate
        and len(args) == 1
        and isinstance(size, tuple)
        and args[0].ndim == len(size) + 2
    ):
        return _empty(args[0], (*args[0].shape[:2], *size))
    if function not in BROADCASTS or len(args) != 2 or kwargs or not all(isinstance(a, Tensor) for a in args):
        return None
    a, b = args
    if a.dtype != b.dtype:
        return None
    shape = a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return _empty(a, shape)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta")


def _run_node(
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: Mapping[fx.Node, Any],
    modules: Mapping[str, nn.Module],
    inputs: Iterator[Tensor],
    program: Program,
    meta: Callable[[Tensor], Tensor],
) -> Any:
    if node.op == "placeholder":
        missing = next(inputs, None)
        return meta(missing) if missing is not None else node.args[0]
    if node.op == "get_attr":
        return meta(program.tensors[cast(str, node.target)])
    if node.op == "call_module":
        module = modules[cast(str, node.target)]
        quick = _quick_module(module, args[0]) if len(args) == 1 else None
        return module(*args, **kwargs) if quick is None else quick
    if node.op == "call_function":
        quick = _quick_function(node.target, args, kwargs)
        if quick is not None:
            return quick
        makes = not any(isinstance(values[n], Tensor) for n in node.all_input_nodes)  # torch.ones(…), for one
        with torch.device("meta") if makes else contextlib.nullcontext():
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    return args[0]


def _as_type(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those that are floating point, converted; tied ones once."""
    unlike = {id(t): (n, t) for n, t in tensors.items() if t.is_floating_point() and t.dtype != dtype}
    return {name: tensor.detach().to(dtype) for name, tensor in unlike.values()}


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors of a network's output, which may be a tensor or nested tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return [output]
    items = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    return [t for item in items for t in output_tensors(item)]


def format_node(program: Program, node: fx.Node) -> str:
    """One line of the printed program: `%name: 1x64x56x56 = conv 64->64 k3 s1 (%input)`."""
    shape = program.shape(node)
    shown = "x".join(map(str, shape)) if shape is not None else type(program.values[node]).__name__
    return f"%{node.name}: {shown} = {describe(program, node)}"


def describe(program: Program, node: fx.Node) -> str:
    """What a node computes, for people: `conv 64->64 k3 s1 (%maxpool)`."""
    if node.op in ("placeholder", "get_attr"):
        return f"{'input' if node.op == 'placeholder' else 'tensor'} {node.target}"
    args = ", ".join(_format_arg(a) for a in node.args)
    if node.op == "call_module":
        return f"{describe_module(program.layer(cast(str, node.target)))} ({args})"
    if node.op == "output":
        return f"output ({args})"
    extra = "".join(f", {k}={_format_arg(v)}" for k, v in node.kwargs.items())
    return f"{spelling(node.target)} ({args}{extra})"


def op_name(program: Program, node: fx.Node) -> str:
    """The name of the operator that a node calls (`ir.operators`); of other nodes what they are.

    It follows from the function, the method or the module's class, never from an attribute's name.
    """
    if node.op == "call_module":
        kind = type(program.layer(cast(str, node.target)))
        return MODULE_NAMES.get(kind, kind.__name__)
    return function_name(node.target) if node.op in ("call_function", "call_method") else node.op


def _format_arg(arg: Any) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, tuple | list):
        return "[" + ", ".join(map(_format_arg, arg)) + "]"
    if isinstance(arg, slice):
        return ":".join("" if a is None else _format_arg(a) for a in (arg.start, arg.stop, arg.step))
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{k}: {_format_arg(v)}" for k, v in arg.items()) + "}"
    return str(arg)


def describe_module(module: nn.Module) -> str:
    """A module in a few words: `conv 64->64 k3 s1 g1`, `linear 512->10`, `batchnorm2d 64`, `relu`."""
    kind = type(module).__name__.lower()
    if isinstance(module, nn.modules.conv._ConvNd | DctConv2d):
        words = [
            kind.removesuffix("1d").removesuffix("2d").removesuffix("3d"),
            f"{module.in_channels}->{module.out_channels}",
            "k" + _square(module.kernel_size),
            "s" + _square(module.stride),
        ]
        return " ".join(words + ([f"g{module.groups}"] if module.groups > 1 else []) + _stored(module))
    if isinstance(module, nn.Linear | DctLinear):
        return " ".join([f"{kind} {module.in_features}->{module.out_features}", *_stored(module)])
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return f"{kind} {module.num_features}"
    return kind


def _stored(module: nn.Module) -> list[str]:
    """How many coefficients of each row a computed weight has: `4x512 of 4x1024`."""
    if not isinstance(module, DctLayer):
        return []
    return [f"{module.rows}x{module.terms} of {module.rows}x{module.columns}"]


def _square(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "x".join(map(str, sizes))
