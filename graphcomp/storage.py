"""Saved programs: `program.json` (graph, modules, names) and `weights.safetensors` (every number).

Nothing that is read can run code of its own: functions and methods come from allow-lists, modules are public
classes of `torch.nn` or layers of `graphcomp.dct` built from plain arguments, and names are checked before fx
writes them into the Python source that it compiles. A program is rebuilt from its own record before it is
written, so what cannot be read back as it was is refused at save time.
"""

import builtins
import importlib
import importlib.metadata
import inspect
import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from graphcomp.dct import LAYERS as COEFFICIENT_LAYERS
from graphcomp.dct import DctLayer
from graphcomp.errors import LoadError
from graphcomp.files import atomic_directory
from graphcomp.program import PASS_KEY, Program, named_tensors
from graphcomp.records import Record

PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT = 1

_CONTAINER = "Module"
_INPUT = "#input"  # `#` is in no module path, so an input cannot be mistaken for a weight

# fx pastes names into generated source: identifiers bare, other path elements between double quotes.
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"[\w \-+:/@]+(\.[\w \-+:/@]+)*", re.ASCII)

_NAMESPACES = (torch, F, torch.functional, torch.linalg, torch.special, torch.fft)
_TORCH = """_assert arange as_tensor eye full linspace logspace ones rand rand_like randint randint_like randn
    randn_like randperm scalar_tensor tensor zeros"""
_FUNCTIONAL = "hardsigmoid hardswish logsigmoid sigmoid tanh upsample upsample_bilinear upsample_nearest"
_KERNELS = ("cudnn_", "fbgemm_", "miopen_", "mkldnn_", "quantized_")  # may trust pointers in a tensor
_OPERATORS = """abs add and_ concat contains eq floordiv ge getitem gt iadd iand iconcat ifloordiv ilshift
    imatmul imod imul index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod
    mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor"""
_BUILTINS = "abs bool divmod float getattr int len max min pow round sum"
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
    untyped_storage"""
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NodeRecord(Record):
    """One fx node; nodes, tuples, slices, … within `args` are objects of one key (`{"node": "relu"}`)."""

    name: str
    op: Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
    target: str
    args: list[Any] = Field(default_factory=list)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    made_by: str | None = Field(default=None, description="the pass that made the node or changed it last")


class ModuleRecord(Record):
    """One module that the graph calls, or a container on the way to one (class `Module`)."""

    kind: str = Field(description="name of a public class of torch.nn or of a layer of graphcomp.dct")
    arguments: dict[str, Any] = Field(default_factory=dict, description="for the constructor")
    attributes: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by submodule: plain attributes that the constructor sets otherwise"
    )


class TensorRecord(Record):
    """One parameter or buffer."""

    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool = False
    persistent: bool = True
    same_as: str | None = Field(default=None, description="the name that this tied tensor is stored under")
    order: tuple[int, ...] | None = Field(
        default=None, description="dimensions from outermost to innermost in memory, if not 0, 1, 2, …"
    )


class ProgramRecord(Record):
    """The content of `program.json`."""

    format: Literal[1] = 1
    graphcomp: str
    torch: str
    name: str = Field(description="class name of the traced network")
    training: bool
    inputs: int
    nodes: list[NodeRecord]
    modules: dict[str, ModuleRecord]
    tensors: dict[str, TensorRecord]
    history: list[dict[str, Any]]


def save(program: Program, directory: Path) -> None:
    """Write `program` into `directory`, whole or not at all; an older program there is replaced.

    Raises:
        LoadError: naming the node, module or tensor that could not be read back as it is.
        OutputError: if the disk refuses, or `directory` holds anything but a program.
    """
    names = named_tensors(program.module)
    record = _record(program, names)
    text = _json(record)
    meta = {name: torch.empty_like(t, device="meta") for name, t in names.items()}
    _check_same(program.module, record, _module(record, meta))
    stored = {name: names[name] for name, r in record.tensors.items() if r.same_as is None}
    stored |= {f"{_INPUT}.{i}": x for i, x in enumerate(program.example_inputs)}
    with atomic_directory(directory, _is_only_program) as temporary:
        (temporary / PROGRAM_FILE).write_text(text, encoding="utf-8")
        _write_weights(stored, temporary / WEIGHTS_FILE)


def load(directory: Path) -> Program:
    """Read what `save` wrote, onto the CPU; needs neither the model's source nor pickle.

    Raises:
        LoadError: naming the file and the entry that is missing, damaged or not allowed.
    """
    file, weights = directory / PROGRAM_FILE, directory / WEIGHTS_FILE
    record = _read_record(file)
    stored = _read_weights(weights)
    try:
        inputs, tensors = _checked_tensors(record, stored)
    except LoadError as error:
        raise LoadError(f"{weights}: {error}") from error
    try:
        module = _module(record, tensors)
    except LoadError as error:
        raise LoadError(f"{file}: {error}") from error
    _check_coefficients(module, weights)
    return Program(module, inputs, tuple(record.history))


def is_program(directory: Path) -> bool:
    """Whether `directory` holds a saved program (complete, not necessarily undamaged)."""
    return (directory / PROGRAM_FILE).is_file() and (directory / WEIGHTS_FILE).is_file()


def _is_only_program(directory: Path) -> bool:
    return {f.name for f in directory.iterdir()} == {PROGRAM_FILE, WEIGHTS_FILE}


# ---- record ----------------------------------------------------------------------------------------------


def _record(program: Program, names: Mapping[str, Tensor]) -> ProgramRecord:
    root = program.module
    called = set(program.called_modules())
    return ProgramRecord(
        graphcomp=_version("graphcomp"),
        torch=torch.__version__,
        name=root.__class__.__name__,
        training=root.training,
        inputs=len(program.example_inputs),
        nodes=[_node_record(node) for node in root.graph.nodes],
        modules=dict(_module_records(root, "", called, root.training)),
        tensors=_tensor_records(root, names),
        history=list(program.history),
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _json(record: ProgramRecord) -> str:
    try:
        return json.dumps(record.model_dump(exclude_defaults=True) | {"format": FORMAT}, indent=1)
    except (TypeError, ValueError) as error:
        raise LoadError(f"history: {error}; expected plans that are plain JSON") from error


def _node_record(node: fx.Node) -> NodeRecord:
    target = node.target if isinstance(node.target, str) else _function_name(node.name, node.target)
    try:
        args = [_encode(a) for a in node.args]
        kwargs = {k: _encode(v) for k, v in node.kwargs.items()}
    except TypeError as error:
        raise LoadError(f"{node.name} ({target}): {error}") from error
    made_by = node.meta.get(PASS_KEY)
    return NodeRecord(
        name=node.name, op=cast(Any, node.op), target=target, args=args, kwargs=kwargs, made_by=made_by
    )


def _module_records(
    parent: nn.Module, path: str, called: set[str], training: bool
) -> Iterator[tuple[str, ModuleRecord]]:
    for name, child in parent._modules.items():
        here = f"{path}.{name}" if path else name
        if child is None:
            continue
        if here in called:
            yield here, _layer_record(here, child, training)
        else:
            yield here, ModuleRecord(kind=_CONTAINER)
            yield from _module_records(child, here, called, training)


def _layer_record(path: str, layer: nn.Module, training: bool) -> ModuleRecord:
    kind = type(layer).__name__
    if _layer_class(kind) is not type(layer):
        raise LoadError(
            f"{path}: found {type(layer).__module__}.{kind}, expected a public class of torch.nn (the "
            "source of another one may be missing at load); trace through it, or bake its parametrization"
        )
    for module in layer.modules():
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise LoadError(f"{path} ({kind}): found hooks, expected none; remove them before saving")
    record = ModuleRecord(kind=kind, arguments=_constructor_arguments(layer))
    fresh = dict(_build_layer(path, record).train(training).named_modules())
    own = dict(layer.named_modules())
    if {n: type(m) for n, m in fresh.items()} != {n: type(m) for n, m in own.items()}:
        raise LoadError(
            f"{path} ({kind}): found submodules {sorted(own)}, expected {sorted(fresh)} as its attributes "
            "say; undo the change inside it, or trace through it"
        )
    attributes = {n: _changed_attributes(f"{path} ({kind})", m, fresh[n]) for n, m in own.items()}
    return record.model_copy(update={"attributes": {n: a for n, a in attributes.items() if a}})


def _constructor_arguments(layer: nn.Module) -> dict[str, Any]:
    """What a constructor of torch.nn was called with, as far as the module remembers it."""
    tensors = {name.rpartition(".")[2] for name, _ in layer.named_parameters()}
    arguments: dict[str, Any] = {}
    for name in inspect.signature(type(layer).__init__).parameters:
        if name in vars(layer):
            with suppress(TypeError):  # a default stands in, and the comparison of attributes finds out
                arguments[name] = _encode(vars(layer)[name])
        elif name == "bias":
            arguments[name] = not tensors.isdisjoint({"bias", "in_proj_bias"})
        elif name == "add_bias_kv":
            arguments[name] = "bias_k" in tensors
    return arguments


def _changed_attributes(place: str, module: nn.Module, fresh: nn.Module) -> dict[str, Any]:
    """Attributes of `module` that a freshly built one has otherwise or not at all, encoded."""
    own, built = vars(module), vars(fresh)
    changed: dict[str, Any] = {}
    lost = list(built.keys() - own.keys())
    for name in own:
        if name in _MACHINERY or (name in built and _same(own[name], built[name])):
            continue
        try:
            changed[name] = _encode(own[name])
        except TypeError:
            lost.append(name)
    lost += [name for name in changed if not _may_set(fresh, name)]
    if lost:
        raise LoadError(
            f"{place}: found {', '.join(sorted(lost))} unlike what the constructor of torch.nn sets, "
            "expected an unchanged module or plain values; trace through the module"
        )
    return changed


def _same(value: Any, other: Any) -> bool:
    try:
        return value is other or bool(_encode(value) == _encode(other))
    except TypeError:
        return False


def _may_set(module: nn.Module, name: str) -> bool:
    if name in _MACHINERY or not _IDENTIFIER.fullmatch(name):
        return False
    return name in vars(module) or not hasattr(type(module), name)


def _tensor_records(root: nn.Module, names: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    first: dict[int, str] = {}
    records: dict[str, TensorRecord] = {}
    for name, tensor in names.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise LoadError(f"{name}: found a sparse or quantized tensor, expected a dense one; convert it")
        owner, _, leaf = name.rpartition(".")
        original = first.setdefault(id(tensor), name)
        holder = root.get_submodule(owner)
        records[name] = TensorRecord(
            kind="parameter" if leaf in holder._parameters else "buffer",
            shape=tuple(tensor.shape),
            dtype=_torch_name(tensor.dtype),
            requires_grad=tensor.requires_grad,
            persistent=leaf not in holder._non_persistent_buffers_set,
            same_as=None if original == name else original,
            order=_memory_order(tensor),
        )
    return records


def _memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions from outermost to innermost; None if contiguous, or if memory has gaps (then packed)."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    packed = torch.empty(tensor.shape, device="meta")
    if strides == packed.stride() or strides != _laid_out(packed, order).stride():
        return None
    return order


def _laid_out(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """A copy of `tensor` that is dense in the given order of dimensions."""
    if order is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def _write_weights(tensors: Mapping[str, Tensor], file: Path) -> None:
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        if packed.untyped_storage().data_ptr() in storages:  # safetensors takes no views of one memory
            packed = packed.clone()
        own[name] = packed
        storages.add(packed.untyped_storage().data_ptr())
    try:
        save_file(own, file)
    except KeyError as error:  # the table of dtypes
        names = [n for n, t in own.items() if t.dtype == error.args[0]]
        raise LoadError(
            f"{names}: found {error.args[0]}, expected a type that safetensors has; convert it"
        ) from error
    except SafetensorError as error:
        raise OSError(str(error)) from error


# ---- reading ---------------------------------------------------------------------------------------------


def _read_record(file: Path) -> ProgramRecord:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(
            f"{file}: found '{error.strerror}', expected a saved program; check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{file}: {error}; expected JSON as graphcomp writes it; save the program again"
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        raise LoadError(
            f"{file}: found format {version!r}, expected {FORMAT}; load it with the graphcomp that wrote it"
        )
    try:
        return ProgramRecord.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise LoadError(f"{file}: {place}: {first['msg']}; save the program again") from error


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except OSError as error:
        raise LoadError(
            f"{file}: found '{error.strerror or error}', expected weights; check the path"
        ) from error
    except SafetensorError as error:
        raise LoadError(f"{file}: {error}; expected a safetensors file; save the program again") from error


def _checked_tensors(
    record: ProgramRecord, stored: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The example inputs and the stored tensors by name, in memory of their own and in their own order."""
    names = [f"{_INPUT}.{i}" for i in range(record.inputs)]
    expected = {*names, *(n for n, r in record.tensors.items() if r.same_as is None)}
    if expected != stored.keys():
        raise LoadError(
            f"found {sorted(stored.keys() - expected)} that {PROGRAM_FILE} does not name, expected also "
            f"{sorted(expected - stored.keys())}; both files must come from one save"
        )
    tensors: dict[str, Tensor] = {}
    for name in stored.keys() - names:
        r, tensor = record.tensors[name], stored[name]
        if (tuple(tensor.shape), _torch_name(tensor.dtype)) != (r.shape, r.dtype):
            raise LoadError(
                f"{name}: found {tuple(tensor.shape)} {_torch_name(tensor.dtype)}, expected {r.shape} "
                f"{r.dtype} as {PROGRAM_FILE} says; both files must come from one save"
            )
        if r.order is not None and sorted(r.order) != list(range(tensor.dim())):
            raise LoadError(f"{name}: found memory order {r.order}, expected each of {tensor.dim()} once")
        tensors[name] = _laid_out(tensor, r.order)
    return tuple(stored[n].clone() for n in names), tensors


def _module(record: ProgramRecord, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The GraphModule of `record` with `tensors` (real ones, or meta ones for a rehearsal)."""
    if not _is_identifier(record.name):
        raise LoadError(f"name: found {record.name!r}, expected an identifier")
    root = fx.GraphModule(nn.Module(), fx.Graph(), record.name).train(record.training)
    for path, module in record.modules.items():
        _attach(root, path, module)
    _attach_tensors(root, record.tensors, tensors)
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for node in record.nodes:
        env[node.name] = _add_node(graph, node, env, root, record)
    try:
        root.graph = graph  # compiles the generated source
        graph.lint()
    except Exception as error:
        raise LoadError(f"nodes: {error}; expected a valid graph; save the program again") from error
    return root


def _attach(root: nn.Module, path: str, record: ModuleRecord) -> None:
    owner, _, leaf = path.rpartition(".")
    parent = _container(root, owner)
    if not _PATH.fullmatch(path) or parent is None or hasattr(parent, leaf):
        raise LoadError(f"modules.{path}: expected a new name in a container that comes before it")
    if record.kind == _CONTAINER:
        module = nn.Module().train(root.training)
    else:
        module = _build_layer(f"modules.{path}", record).train(root.training)
        _set_attributes(f"modules.{path}", module, record.attributes)
    parent.add_module(leaf, module)


def _container(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` if it is the root or a plain container, in which anything may be put."""
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    return module if module is root or type(module) is nn.Module else None


def _build_layer(path: str, record: ModuleRecord) -> nn.Module:
    cls = _layer_class(record.kind)
    if cls is None:
        raise LoadError(f"{path}: found class {record.kind!r}, expected a layer of torch.nn")
    try:
        arguments = {name: _decode(value, {}) for name, value in record.arguments.items()}
        with torch.device("meta"):
            return cls(**arguments)
    except Exception as error:
        raise LoadError(
            f"{path} ({record.kind}): {error}; expected its constructor to take {sorted(record.arguments)}; "
            "use a module that its attributes describe, or the version of torch that saved it"
        ) from error


def _layer_class(kind: str) -> type[nn.Module] | None:
    """The layer of this name that a program may hold."""
    if kind in COEFFICIENT_LAYERS:
        return COEFFICIENT_LAYERS[kind]
    cls = None if kind.startswith("_") else getattr(nn, kind, None)
    found = isinstance(cls, type) and issubclass(cls, nn.Module) and cls is not nn.Module
    return cls if found else None


def _check_coefficients(module: nn.Module, weights: Path) -> None:
    """What shapes do not say of a coefficient layer: that its index is a permutation."""
    for path, layer in module.named_modules():
        flaw = layer.flaw() if isinstance(layer, DctLayer) else None
        if flaw is not None:
            raise LoadError(f"{weights}: {path}.{flaw}; save the program again")


def _set_attributes(path: str, layer: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    modules = dict(layer.named_modules())
    for child, values in attributes.items():
        for name, value in values.items():
            if child not in modules or not _may_set(modules[child], name):
                raise LoadError(f"{path}: found attribute {child}.{name}, expected one that may be set")
            modules[child].__dict__[name] = _decode_at(path, value, {})


def _attach_tensors(
    root: nn.Module, records: Mapping[str, TensorRecord], tensors: Mapping[str, Tensor]
) -> None:
    shared: dict[str, Tensor] = {}
    expected = named_tensors(root)
    for name, record in records.items():
        source = record.same_as or name
        stored = source in tensors and (tensors[source].shape, records[source].kind)
        if not _PATH.fullmatch(name) or stored != (record.shape, record.kind):
            raise LoadError(
                f"tensors.{name}: expected itself or `same_as` to be stored, with the same shape and kind; "
                "save the program again"
            )
        if source not in shared:
            shared[source] = _leaf_tensor(source, records[source], tensors[source])
        owner, _, leaf = name.rpartition(".")
        if name in expected:
            holder = root.get_submodule(owner)
            _check_fits(name, record, expected.pop(name), holder)
        else:
            holder = _new_holder(root, owner, leaf, name)
        if record.kind == "parameter":
            holder.register_parameter(leaf, cast(nn.Parameter, shared[source]))
        else:
            holder.register_buffer(leaf, shared[source], persistent=record.persistent)
    if expected:
        raise LoadError(f"tensors: found none for {sorted(expected)}, expected all that the modules have")


def _leaf_tensor(name: str, record: TensorRecord, tensor: Tensor) -> Tensor:
    if record.requires_grad and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        raise LoadError(f"tensors.{name}: found {tensor.dtype} with requires_grad, expected a float type")
    if record.kind == "parameter":
        return nn.Parameter(tensor, requires_grad=record.requires_grad)
    return tensor.requires_grad_(record.requires_grad)


def _check_fits(name: str, record: TensorRecord, expected: Tensor, holder: nn.Module) -> None:
    kind = "parameter" if isinstance(expected, nn.Parameter) else "buffer"
    if (record.kind, record.shape) != (kind, tuple(expected.shape)):
        raise LoadError(
            f"{name}: found {record.kind} {record.shape}, expected {kind} {tuple(expected.shape)} as the "
            f"attributes of its {type(holder).__name__} say; make the attributes agree with the tensors"
        )


def _new_holder(root: nn.Module, owner: str, leaf: str, name: str) -> nn.Module:
    holder = _container(root, owner)
    if holder is None or hasattr(holder, leaf):
        raise LoadError(f"{name}: found a tensor, expected none of this name; save the program again")
    return holder


def _add_node(
    graph: fx.Graph, record: NodeRecord, env: Mapping[str, fx.Node], root: nn.Module, program: ProgramRecord
) -> fx.Node:
    place = f"nodes.{record.name}"
    if not _is_identifier(record.name) or not all(map(_is_identifier, record.kwargs)):
        raise LoadError(f"{place}: found {[record.name, *record.kwargs]}, expected identifiers")
    args = tuple(_decode_at(place, a, env) for a in record.args)
    kwargs = {k: _decode_at(place, v, env) for k, v in record.kwargs.items()}
    target = _target(place, record, args, root, program)
    node = graph.create_node(record.op, target, args, kwargs, name=record.name)
    if node.name != record.name:
        raise LoadError(f"{place}: found a name that fx makes {node.name}, expected a free one; rename it")
    node.meta = {} if record.made_by is None else {PASS_KEY: record.made_by}
    return node


def _target(
    place: str, record: NodeRecord, args: tuple[Any, ...], root: nn.Module, program: ProgramRecord
) -> str | Callable[..., Any]:
    """The checked target of a node; fx would run any callable and paste any string into source."""
    target = record.target
    if record.op == "call_function":
        return _function(place, target, args, record.kwargs)
    allowed = {
        "placeholder": _is_identifier(target) and len(args) < 2 and not record.kwargs,
        "output": target == "output",
        "get_attr": target in program.tensors,
        "call_module": _is_layer(root, target),
        "call_method": target in _methods(),
    }[record.op]
    if not allowed:
        raise LoadError(
            f"{place}: found {record.op} {target!r}, expected an input name, a stored tensor, a stored "
            "module or an arithmetic method of torch.Tensor; rewrite the node with those"
        )
    return target


def _is_layer(root: nn.Module, path: str) -> bool:
    if not _PATH.fullmatch(path):
        return False
    module: nn.Module | None = root
    for part in path.split("."):
        module = module._modules.get(part) if module is not None else None
    return module is not None and type(module) is not nn.Module


def _is_identifier(name: str) -> bool:
    return _IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)


# ---- allow-lists -----------------------------------------------------------------------------------------


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """Every function that a stored graph may call, by the name that it is stored under."""
    tensor_functions = {
        id(f)
        for namespace, functions in torch.overrides.get_overridable_functions().items()
        if any(namespace is n for n in _NAMESPACES)
        for f in functions
    }
    table: dict[str, Callable[..., Any]] = {}
    for module in _NAMESPACES:
        for name, value in vars(module).items():
            if name.startswith(("_", *_KERNELS)) or isinstance(value, type) or not callable(value):
                continue
            out_of_place = getattr(module, name[:-1], None) if name.endswith("_") else None
            if id(value) in tensor_functions or id(out_of_place) in tensor_functions:
                table[f"{module.__name__}.{name}"] = value
    for namespace, names in (
        (torch, _TORCH),
        (F, _FUNCTIONAL),
        (operator, _OPERATORS),
        (builtins, _BUILTINS),
    ):
        table |= {f"{namespace.__name__}.{n}": getattr(namespace, n) for n in names.split()}
    table |= {f"math.{n}": f for n, f in vars(math).items() if not n.startswith("_") and callable(f)}
    return table


@cache
def _torchvision_functions() -> dict[str, Callable[..., Any]]:
    """What torchvision's networks keep whole (`torch.fx.wrap`), as far as this version has it."""
    return {
        f"{path}.{name}": getattr(module, name)
        for path, names in _TORCHVISION.items()
        for module in [importlib.import_module(path)]
        for name in names.split()
        if hasattr(module, name)
    }


@cache
def _function_names() -> dict[Any, str]:
    names: dict[Any, str] = {}
    for name, function in _functions().items():
        names.setdefault(function, name)
    return names


@cache
def _methods() -> frozenset[str]:
    """The methods of torch.Tensor that a stored graph may call: public ones, and those of operators."""
    public = {
        f.__name__
        for f in torch.overrides.get_overridable_functions()[torch.Tensor]
        if not f.__name__.startswith("_")
    }
    dunder = {f"__{n.strip('_')}__" for n in _OPERATORS.split()}
    reflected = {f"__r{n[2:]}" for n in dunder}
    others = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "stride", "unflatten"}
    known = frozenset(n for n in public | dunder | reflected | others if hasattr(Tensor, n))
    return known - set(_NO_METHODS.split())


def _function_name(node: str, function: Callable[..., Any]) -> str:
    found = _function_names().get(function)
    module = str(getattr(function, "__module__", ""))
    if found is None and module.startswith("torchvision."):
        found = next((n for n, f in _torchvision_functions().items() if f is function), None)
    if found is None:
        raise LoadError(
            f"{node}: found function {module}.{getattr(function, '__qualname__', function)}, expected one of "
            "torch, operator or math: only those load without the model's source; write it with them"
        )
    return found


def _function(place: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    table = _torchvision_functions() if name.startswith("torchvision.") else _functions()
    if name not in table:
        raise LoadError(
            f"{place}: found function {name!r}, expected one of those of torch, operator or math that "
            "a program may call; load only programs that graphcomp saved"
        )
    if table[name] is getattr and (len(args) != 2 or kwargs or args[1] not in _ATTRIBUTES.split()):
        raise LoadError(f"{place}: found getattr of {args[1:]}, expected one of {_ATTRIBUTES.split()}")
    return table[name]


# ---- values ----------------------------------------------------------------------------------------------


def _torch_name(constant: object) -> str:
    return str(constant).removeprefix("torch.")


def _encode(value: Any) -> Any:
    """An argument as JSON; what JSON has no word for is an object of one key. TypeError if it has no form."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str.__str__(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [int(n) for n in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if type(value) is tuple:
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(v) for v in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _CONSTANTS.items():
        if isinstance(value, kind):
            return {tag: _torch_name(value)}
    raise TypeError(
        f"found a {type(value).__module__}.{type(value).__qualname__}, expected nodes, numbers, strings, "
        "tuples, lists, dicts, slices or torch constants; rewrite the node with those"
    )


_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}


def _decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `_encode`; ValueError or whatever the damaged entry causes."""
    if isinstance(value, list):
        return [_decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"found an object with keys {sorted(value)}, expected one key")
    ((tag, content),) = value.items()
    match tag:
        case "node":
            return nodes[content]
        case "tuple":
            return tuple(_decode(v, nodes) for v in content)
        case "dict":
            return {_decode(k, nodes): _decode(v, nodes) for k, v in content}
        case "slice":
            start, stop, step = content
            return slice(_decode(start, nodes), _decode(stop, nodes), _decode(step, nodes))
        case "float":
            return float(content)
        case "size":
            return torch.Size(content)
        case "ellipsis":
            return ...
        case "device":
            return torch.device(content)
        case "dtype" | "memory_format" | "layout":
            constant = getattr(torch, content)
            if isinstance(constant, _CONSTANTS[tag]):
                return constant
    raise ValueError(f"found {tag} {content!r}, expected a value that graphcomp writes")


def _decode_at(place: str, value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    try:
        return _decode(value, nodes)
    except KeyError as error:
        raise LoadError(f"{place}: found node {error}, expected one that comes before it") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise LoadError(f"{place}: {error}; save the program again") from error


# ---- rehearsal -------------------------------------------------------------------------------------------


def _check_same(module: fx.GraphModule, record: ProgramRecord, loaded: fx.GraphModule) -> None:
    """Refuse to write a program that would be read back as another one."""
    for node, again in zip(record.nodes, map(_node_record, loaded.graph.nodes), strict=True):
        if node != again:
            raise LoadError(f"{node.name}: found {node}, expected {again} as it would load; rewrite the node")
    for path in record.modules:
        own, again_module = module.get_submodule(path), loaded.get_submodule(path)
        if record.modules[path].kind != _CONTAINER and repr(own) != repr(again_module):
            raise LoadError(f"{path}: found {own}, expected {again_module} as it would load; replace it")
