"""Saved programs: `program.json` (graph, modules, names) and `weights.safetensors` (every number).

Nothing that is read can run code of its own, or take time and memory without bounds: the grammar of what a
program may say is closed (`saved_grammar`, `saved_schemas`, `saved_values`), modules are single layers of
`torch.nn` or of `ir.coefficients` built from plain arguments (`saved_modules`), and a loaded program has been
run within bounds, on tensors without numbers, before anybody gets it (`saved_bounds`). A program is rebuilt
from its own record before it is written, so what cannot be read back as it was is refused at save time.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from graphcomp.base import atomic_directory, nests_at_most, settled
from graphcomp.errors import LoadError
from graphcomp.ir.program import PASS_KEY, Program, named_tensors, output_tensors
from graphcomp.ir.saved.bounds import check_runs
from graphcomp.ir.saved.grammar import add_node, check_nodes, check_source, function_name, is_identifier
from graphcomp.ir.saved.modules import attach, attach_tensors, flaw_of_coefficients, module_records
from graphcomp.ir.saved.records import CONTAINER, NodeRecord, ProgramRecord, TensorRecord
from graphcomp.ir.saved.values import MAX_DEPTH, encode, torch_name

PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "weights.safetensors"
FORMAT = 1

_INPUT = "#input"  # `#` is in no module path, so an input cannot be mistaken for a weight
_MAX_RECORD = 1 << 28  # bytes of `program.json`


def save(program: Program, directory: str | Path) -> None:
    """Write `program.json` and `weights.safetensors` into `directory`, whole or not at all.

    An older program there is replaced.

    Raises:
        LoadError: naming the node, module or tensor that could not be read back as it is.
        OutputError: if the disk refuses, or `directory` holds anything but a program.
    """
    names = named_tensors(program.module)
    record = _record(program, names)
    text = _json(record)
    meta = {name: torch.empty_like(t, device="meta") for name, t in names.items()}
    loaded = _module(record, meta)
    _check_same(program.module, record, loaded)
    check_runs(rehearsed := Program(loaded, program.example_inputs, interface=record.interface))
    _check_interface(rehearsed)
    stored = {name: names[name] for name, r in record.tensors.items() if r.same_as is None}
    stored |= {f"{_INPUT}.{i}": x for i, x in enumerate(program.example_inputs)}
    with atomic_directory(Path(directory), _is_only_program) as temporary:
        (temporary / PROGRAM_FILE).write_text(text, encoding="utf-8")
        _write_weights(stored, temporary / WEIGHTS_FILE)


def load(directory: str | Path) -> Program:
    """Read what `save` wrote, onto the CPU; needs neither the model's source nor pickle.

    Raises:
        LoadError: naming the file and the entry that is missing, damaged or not allowed.
    """
    return settled(Path(directory), _load)


def _load(directory: Path) -> Program:
    file, weights = directory / PROGRAM_FILE, directory / WEIGHTS_FILE
    record = _read_record(file)
    stored = _read_weights(weights)
    try:
        inputs, tensors = _checked_tensors(record, stored)
    except LoadError as error:
        raise LoadError(f"{weights}: {error}") from error
    try:
        program = Program(_module(record, tensors), inputs, tuple(record.history), record.interface)
        check_runs(program)
        _check_interface(program)
    except LoadError as error:
        raise LoadError(f"{file}: {error}") from error
    flaw = flaw_of_coefficients(program.module)
    if flaw is not None:
        raise LoadError(f"{weights}: {flaw}; save the program again")
    return program


def without_inputs(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a program's `weights.safetensors`, which holds its example inputs as well."""
    return {name: tensor for name, tensor in stored.items() if not name.startswith(f"{_INPUT}.")}


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
        modules=dict(module_records(root, "", called, root.training)),
        tensors=_tensor_records(root, names),
        history=list(program.history),
        interface=program.interface,
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
    target = node.target if isinstance(node.target, str) else function_name(node.name, node.target)
    try:
        args = [encode(a) for a in node.args]
        kwargs = {k: encode(v) for k, v in node.kwargs.items()}
    except TypeError as error:
        raise LoadError(f"{node.name} ({target}): {error}") from error
    made_by = node.meta.get(PASS_KEY)
    return NodeRecord(
        name=node.name, op=cast(Any, node.op), target=target, args=args, kwargs=kwargs, made_by=made_by
    )


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
            dtype=torch_name(tensor.dtype),
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
        _check_regular(file, _MAX_RECORD)
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
    _check_depth(file, document)
    try:
        return ProgramRecord.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise LoadError(f"{file}: {place}: {first['msg']}; save the program again") from error


def _check_regular(file: Path, most: int | None = None) -> None:
    """Refuse what has no end (a device, a pipe), and what is too large to be what it says."""
    if not file.exists():
        return  # opening it says why
    size = file.stat().st_size
    if not file.is_file() or (most is not None and size > most):
        found = f"{size} bytes" if file.is_file() else "no regular file"
        raise LoadError(f"{file}: found {found}, expected a file that graphcomp saved; check the path")


def _check_depth(file: Path, document: Any) -> None:
    if not nests_at_most(document, 4 * MAX_DEPTH):
        raise LoadError(f"{file}: found values nested more than {4 * MAX_DEPTH} deep; save the program again")


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        _check_regular(file)
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
    inputs = sum(name.startswith(f"{_INPUT}.") for name in stored)
    if record.inputs < 1 or record.inputs > inputs + 1:  # before anything is made of that many
        raise LoadError(
            f"found {inputs} example inputs, expected {record.inputs} as {PROGRAM_FILE} says, and at least "
            "one; both files must come from one save"
        )
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
        if (tuple(tensor.shape), torch_name(tensor.dtype)) != (r.shape, r.dtype):
            raise LoadError(
                f"{name}: found {tuple(tensor.shape)} {torch_name(tensor.dtype)}, expected {r.shape} "
                f"{r.dtype} as {PROGRAM_FILE} says; both files must come from one save"
            )
        if r.order is not None and sorted(r.order) != list(range(tensor.dim())):
            raise LoadError(f"{name}: found memory order {r.order}, expected each of {tensor.dim()} once")
        tensors[name] = _laid_out(tensor, r.order)
    return tuple(stored[n].clone() for n in names), tensors


def _module(record: ProgramRecord, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The GraphModule of `record` with `tensors` (real ones, or meta ones for a rehearsal)."""
    if not is_identifier(record.name):
        raise LoadError(f"name: found {record.name!r:.100}, expected an identifier")
    check_nodes(record.nodes, record.inputs)
    root = fx.GraphModule(nn.Module(), fx.Graph(), record.name).train(record.training)
    for path, module in record.modules.items():
        attach(root, path, module)
    attach_tensors(root, record.tensors, tensors)
    graph = fx.Graph()
    env: dict[str, fx.Node] = {}
    for node in record.nodes:
        env[node.name] = add_node(graph, node, env, root, record.tensors)
    try:
        root.graph = graph  # compiles the generated source
        graph.lint()
    except Exception as error:
        raise LoadError(f"nodes: {error}; expected a valid graph; save the program again") from error
    check_source(root)
    return root


def _check_interface(program: Program) -> None:
    """Those who write a file trust in the interface: it has to be this network's."""
    flaw = program.interface.misfit(program.example_inputs, output_tensors(program.output))
    if flaw is not None:
        raise LoadError(f"interface.{flaw}; save the program again")


# ---- rehearsal -------------------------------------------------------------------------------------------


def _check_same(module: fx.GraphModule, record: ProgramRecord, loaded: fx.GraphModule) -> None:
    """Refuse to write a program that would be read back as another one."""
    for node, again in zip(record.nodes, map(_node_record, loaded.graph.nodes), strict=True):
        if node != again:
            raise LoadError(f"{node.name}: found {node}, expected {again} as it would load; rewrite the node")
    for path in record.modules:
        own, again_module = module.get_submodule(path), loaded.get_submodule(path)
        if record.modules[path].kind != CONTAINER and repr(own) != repr(again_module):
            raise LoadError(f"{path}: found {own}, expected {again_module} as it would load; replace it")
