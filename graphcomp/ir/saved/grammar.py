"""The grammar of saved programs: names, paths, and what a node may call with which arguments.

fx writes every node into the source of a function and compiles it, for a loaded program and again after every
pass. So what stands in that source is settled here, before fx sees it: names are plain identifiers that mean
nothing else there, paths lead through modules that were built and never through attributes, functions and
methods come from lists, and their arguments from schemas.
"""

import builtins
import importlib
import inspect
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphcomp.errors import LoadError
from graphcomp.ir.masked import MASKS
from graphcomp.ir.program import PASS_KEY
from graphcomp.ir.saved import schemas as schemas
from graphcomp.ir.saved.records import NodeRecord
from graphcomp.ir.saved.schemas import Schema
from graphcomp.ir.saved.values import decode_at

# ---- names -----------------------------------------------------------------------------------------------

# fx pastes names into generated source: identifiers bare, other path elements between double quotes.
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"(?!__)[\w \-+:/@]+(\.(?!__)[\w \-+:/@]+)*", re.ASCII)
_GENERATED = frozenset("self torch device inf nan NoneType fx_pytree pytree getattr slice complex".split())
_PASS_NAME = re.compile(r"[\w\-. /:]{1,200}", re.ASCII)


def is_identifier(name: str) -> bool:
    """Whether `name` is an ASCII identifier and no keyword."""
    return _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


def is_own_name(name: str) -> bool:
    """Whether generated source may bind `name`: it means nothing there, or in Python."""
    return is_input_name(name) and not hasattr(builtins, name)


def is_input_name(name: str) -> bool:
    """The same for a parameter, which networks do call `input`: only what generated source reads is taken."""
    return (
        is_identifier(name) and not name.startswith("__") and name not in _GENERATED and name not in _BUILTINS
    )


def is_path(path: str) -> bool:
    """Whether `path` can be written into source as a chain of modules that ends in one or in a tensor."""
    return _PATH.fullmatch(path) is not None


def is_attribute(name: str) -> bool:
    """Whether `name` can be a plain attribute of a layer."""
    return _IDENTIFIER.fullmatch(name) is not None and not name.startswith("__")


# ---- allow-lists -----------------------------------------------------------------------------------------

_NAMESPACES = (torch, F, torch.functional, torch.linalg, torch.special, torch.fft)
_TORCH = """_assert arange as_tensor eye full linspace logspace ones rand rand_like randint randint_like randn
    randn_like randperm scalar_tensor tensor zeros"""
_FUNCTIONAL = "hardsigmoid hardswish logsigmoid sigmoid tanh upsample upsample_bilinear upsample_nearest"
# Kernels that trust what is in a tensor: pointers, sparse indices, pivots, packed weights.
_TRUSTING = """_ cudnn_ fbgemm_ miopen_ mkldnn_ quantize q_ int_repr dequantize fake_quantize
    fused_moving choose_qparams sparse to_sparse to_mkldnn to_dense dense_dim coalesce is_coalesced sspaddmm
    saddmm spmm smm dsmm hsmm hspmm crow_indices ccol_indices col_indices row_indices indices_copy values_copy
    lu ldl_ ormqr orgqr householder geqrf resize set_ segment_reduce batch_norm_ rnn_ lstm gru ctc_loss"""
# They call what they are given, or go on for as long as a number says.
_OTHERS = """lobpcg triplet_margin_with_distance_loss linear_cross_entropy gradient combinations hash_tensor
    sym_ite chalf unravel_index binomial"""
_OPERATORS = """abs add and_ concat contains eq floordiv ge getitem gt iadd iand iconcat ifloordiv ilshift
    imatmul imod imul index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod
    mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor"""
_BUILTINS = frozenset("abs bool divmod float getattr int len max min pow round sum".split())
_NO_MATH = "factorial perm comb"  # a small number makes a result of any size
_TORCHVISION = {
    "torchvision.ops": "stochastic_depth drop_block2d drop_block3d",
    "torchvision.models.swin_transformer": """shifted_window_attention _get_relative_position_bias
        _patch_merging_pad""",
    "torchvision.models.video.swin_transformer": """shifted_window_attention_3d _get_relative_position_bias
        _get_window_and_shift_size _compute_pad_size_3d _compute_attention_mask_3d""",
    "torchvision.models.video.mvit": "_unsqueeze _squeeze _add_rel_pos _add_shortcut",
}
_ATTRIBUTES = """shape ndim dtype device layout T mT H mH real imag data requires_grad is_cuda is_meta
    is_sparse is_quantized itemsize nbytes values indices sign logabsdet mantissa exponent eigenvalues
    eigenvectors Q R U S V Vh L LU P pivots"""
# Public on Tensor, but not arithmetic: they reach for memory, hooks, processes and callables.
_NO_METHODS = """apply_ backward const_data_ptr data_ptr map2_ map_ module_load numpy pin_memory record_stream
    register_hook register_post_accumulate_grad_hook resize resize_ resize_as resize_as_ resize_as_sparse_
    retain_grad set_ share_memory_ sparse_resize_ sparse_resize_and_clear_ storage storage_type
    untyped_storage is_shared ipu xpu mtia qscheme"""


def _is_closed(name: str) -> bool:
    return name.startswith(tuple(_TRUSTING.split())) or name in _OTHERS.split()


@cache
def functions() -> dict[str, tuple[Callable[..., Any], Schema]]:
    """Every function that a stored graph may call, with its schema, by the name that it is stored under."""
    table = dict(_torch_functions())
    for name in _OPERATORS.split():
        table[f"operator.{name}"] = (getattr(operator, name), schemas.of_operator(name))
    for name, schema in schemas.BUILTINS.items():
        table[f"builtins.{name}"] = (getattr(builtins, name), schema)
    attribute = frozenset({schemas.WORD})
    table["builtins.getattr"] = (getattr, Schema((schemas.DATA, attribute), {}, None, 2))
    for function in MASKS:
        table[f"graphcomp.{function.__name__}"] = (function, schemas.of_signature(function))
    for name, function in vars(math).items():
        if not name.startswith("_") and callable(function) and name not in _NO_MATH.split():
            table[f"math.{name}"] = (function, schemas.of_math(function))
    return table


def _torch_functions() -> dict[str, tuple[Callable[..., Any], Schema]]:
    tensor_functions = {
        id(f)
        for namespace, listed in torch.overrides.get_overridable_functions().items()
        if any(namespace is n for n in _NAMESPACES)
        for f in listed
    }
    table: dict[str, tuple[Callable[..., Any], Schema]] = {}
    for module in _NAMESPACES:
        space = module.__name__.removeprefix("torch").strip(".")
        extra = {torch: _TORCH, F: _FUNCTIONAL}.get(module, "").split()
        for name, function in vars(module).items():
            if isinstance(function, type) or not callable(function):
                continue
            out_of_place = getattr(module, name[:-1], None) if name.endswith("_") else None
            listed_there = id(function) in tensor_functions or id(out_of_place) in tensor_functions
            if name not in extra and (_is_closed(name) or not listed_there):
                continue
            native = space if space in ("linalg", "special", "fft") else ""
            schema = schemas.of_torch(function, native, name)
            if schema is not None:
                table[f"{module.__name__}.{name}"] = (function, schema)
    return table


@cache
def _torchvision_functions() -> dict[str, tuple[Callable[..., Any], Schema]]:
    """What torchvision's networks keep whole (`torch.fx.wrap`), as far as this version has it."""
    return {
        f"{path}.{name}": (function, schemas.of_signature(function))
        for path, names in _TORCHVISION.items()
        for module in [importlib.import_module(path)]
        for name in names.split()
        for function in [getattr(module, name, None)]
        if function is not None
    }


@cache
def _function_names() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for name, (function, _) in functions().items():
        names.setdefault(function, name)
    return names


@cache
def methods() -> dict[str, Schema]:
    """The methods of torch.Tensor that a stored graph may call: public ones, and those of operators."""
    public = {
        f.__name__
        for f in torch.overrides.get_overridable_functions()[torch.Tensor]
        if not _is_closed(f.__name__)
    }
    dunder = {f"__{n.strip('_')}__" for n in _OPERATORS.split()}
    reflected = {f"__r{n[2:]}" for n in dunder}
    others = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "stride", "unflatten"}
    known = {n for n in public | dunder | reflected | others if hasattr(Tensor, n)}
    described = {name: schemas.of_method(name) for name in sorted(known - set(_NO_METHODS.split()))}
    return {name: schema for name, schema in described.items() if schema is not None}


def function_name(node: str, function: Callable[..., Any]) -> str:
    """The name that `function` is stored under; LoadError naming `node` if a program must not call it."""
    found = _function_names().get(function)
    module = str(getattr(function, "__module__", ""))
    if found is None and module.startswith("torchvision."):
        found = next((n for n, (f, _) in _torchvision_functions().items() if f is function), None)
    if found is None:
        raise LoadError(
            f"{node}: found function {module}.{getattr(function, '__qualname__', function)}, expected one of "
            "torch, operator or math: only those load without the model's source; write it with them"
        )
    return found


# ---- nodes -----------------------------------------------------------------------------------------------


def add_node(
    graph: fx.Graph,
    record: NodeRecord,
    env: Mapping[str, fx.Node],
    root: nn.Module,
    tensors: Mapping[str, Any],
) -> fx.Node:
    """Append the node of a record to `graph`.

    Args:
        graph: of the nodes in `env`.
        record: of the node.
        env: all nodes before it, by name: what it may refer to, so that there are no cycles.
        root: whose modules the node may call.
        tensors: whose names it may read.

    Raises:
        LoadError: naming the node and what is outside of the grammar.
    """
    place = f"nodes.{record.name}"
    if not is_own_name(record.name):
        raise LoadError(
            f"{place}: found name {record.name!r}, expected an identifier that Python and torch.fx have no "
            "use for; rename the node"
        )
    if record.made_by is not None and not _PASS_NAME.fullmatch(record.made_by):
        raise LoadError(f"{place}: found made_by {record.made_by!r:.60}, expected the name of a pass")
    args = tuple(decode_at(place, a, env) for a in record.args)
    kwargs = {k: decode_at(place, v, env) for k, v in record.kwargs.items()}
    if not all(map(is_identifier, kwargs)):
        raise LoadError(f"{place}: found arguments {list(kwargs)}, expected identifiers")
    target, schema = _target(place, record, root, tensors)
    flaw = schema.flaw(args, kwargs) if schema is not None else None
    flaw = flaw or _special_flaw(record, args)
    if flaw is not None:
        raise LoadError(f"{place} ({record.target}): {flaw}; rewrite the node, or save the program again")
    node = graph.create_node(record.op, target, args, kwargs, name=record.name)
    if node.name != record.name:
        raise LoadError(f"{place}: found a name that fx makes {node.name}, expected a free one; rename it")
    node.meta = {} if record.made_by is None else {PASS_KEY: record.made_by}
    return node


_ANY = None  # inputs and the output take any value that has a form
_NOTHING = Schema()


def _target(
    place: str, record: NodeRecord, root: nn.Module, tensors: Mapping[str, Any]
) -> tuple[str | Callable[..., Any], Schema | None]:
    """The checked target of a node, and the schema of its arguments."""
    target = record.target
    if record.op == "call_function":
        return _function(place, target)
    if record.op == "placeholder" and is_input_name(target):
        return target, _ANY
    if record.op == "output" and target == "output":
        return target, _ANY
    if record.op == "get_attr" and target in tensors:
        return target, _NOTHING
    if record.op == "call_method" and target in methods():
        return target, methods()[target]
    layer = module_at(root, target) if record.op == "call_module" and is_path(target) else None
    if layer is not None and type(layer) is not nn.Module:
        return target, _forward_schema(layer)
    raise LoadError(
        f"{place}: found {record.op} {target!r:.100}, expected an input name, a stored tensor, a stored "
        "module or an arithmetic method of torch.Tensor; rewrite the node with those"
    )


def _function(place: str, name: str) -> tuple[Callable[..., Any], Schema]:
    table = _torchvision_functions() if name.startswith("torchvision.") else functions()
    if name not in table:
        raise LoadError(
            f"{place}: found function {name!r:.100}, expected one of those of torch, operator or math that "
            "a program may call; load only programs that graphcomp saved"
        )
    return table[name]


def _forward_schema(layer: nn.Module) -> Schema:
    return schemas.of_signature(layer.forward)


def _special_flaw(record: NodeRecord, args: Sequence[Any]) -> str | None:
    """What a schema cannot say."""
    if record.op == "placeholder":
        holds = len(args) > 1 or bool(record.kwargs) or bool(_nodes(args))
        return f"found {record.args}, expected a constant default or nothing" if holds else None
    if record.op == "output":
        return None if len(args) == 1 and not record.kwargs else "found other than one value, expected one"
    if record.op == "call_method" and not isinstance(args[0], fx.Node):
        return f"found a method of {args[0]!r:.60}, expected one of a node"
    if record.target == "builtins.getattr" and (
        not isinstance(args[0], fx.Node) or args[1] not in _ATTRIBUTES.split()
    ):
        return f"found getattr of {args[1]!r:.60}, expected one of {_ATTRIBUTES.split()} of a node"
    return None


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, through `_modules` and nothing else; None if there is none."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return module


def check_nodes(records: Sequence[NodeRecord], inputs: int) -> None:
    """Check what is to be said of all nodes together.

    Raises:
        LoadError: unless inputs come first, as many as there are examples (more if they have a default), and
            the one output last.
    """
    ops = [r.op for r in records]
    leading = next((i for i, op in enumerate(ops) if op != "placeholder"), len(ops))
    if ops.count("placeholder") != leading or leading == 0:
        raise LoadError(
            f"nodes: found {ops.count('placeholder')} inputs, {leading} of them first, expected all of them, "
            "and at least one; save the program again"
        )
    if ops.count("output") != 1 or ops[-1] != "output":
        raise LoadError(
            f"nodes: found {ops.count('output')} outputs and {ops[-1]} at the end, expected one output, at "
            "the end; return several tensors as one tuple"
        )
    if not 1 <= inputs <= leading or not all(r.args for r in records[inputs:leading]):
        raise LoadError(
            f"inputs: found {inputs} example inputs for {leading} inputs of the graph, expected one for each "
            "that has no default; both files must come from one save"
        )


def check_source(module: fx.GraphModule) -> None:
    """A second lock: the function that fx compiled binds no name that it reads from elsewhere.

    Raises:
        LoadError: naming what would mean something else than the graph says.
    """
    forward = inspect.unwrap(type(module).forward)
    code = forward.__code__
    own = {"self"}
    for node in module.graph.nodes:
        own |= {node.name, str(node.target)} if node.op == "placeholder" else {node.name}
    strangers = set(code.co_varnames) - own
    shadowed = set(code.co_varnames) & (
        forward.__globals__.keys() - {"forward"} | set(dir(builtins)) & _GENERATED
    )
    if strangers or shadowed or code.co_freevars or code.co_varnames[:1] != ("self",):
        raise LoadError(
            f"nodes: found {sorted(strangers | shadowed)} among the names that the generated function binds, "
            "expected those of the nodes; rename the nodes"
        )
