"""Layers of a saved program: which there are, what they are built from, and their tensors."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphcomp.errors import LoadError
from graphcomp.ir.coefficients import LAYERS as COEFFICIENT_LAYERS
from graphcomp.ir.coefficients import DctLayer
from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.program import named_tensors
from graphcomp.ir.recurrent import GruLayer, LstmLayer
from graphcomp.ir.saved.grammar import is_attribute, is_path, module_at
from graphcomp.ir.saved.records import CONTAINER, ModuleRecord, TensorRecord
from graphcomp.ir.saved.schemas import Schema, of_signature
from graphcomp.ir.saved.values import decode_at, encode

# Each is built from plain values in a time that does not depend on them. Not here: containers, stacks of
# layers (LSTM, Transformer), layers without tensors yet (Lazy…), and losses that are given a function.
_LAYERS = """Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Bilinear Identity
    BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm
    LayerNorm RMSNorm LocalResponseNorm CrossMapLRN2d MultiheadAttention Embedding EmbeddingBag
    RNNCell LSTMCell GRUCell
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid LogSoftmax Mish PReLU
    RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink
    Threshold AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d
    MaxUnpool3d LPPool1d LPPool2d LPPool3d FractionalMaxPool2d FractionalMaxPool3d
    CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d
    ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d
    ZeroPad3d ChannelShuffle Flatten Fold PixelShuffle PixelUnshuffle Unflatten Unfold Upsample
    UpsamplingBilinear2d UpsamplingNearest2d CosineSimilarity PairwiseDistance
    BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss HingeEmbeddingLoss
    HuberLoss KLDivLoss L1Loss MSELoss MarginRankingLoss MultiLabelMarginLoss MultiLabelSoftMarginLoss
    MultiMarginLoss NLLLoss NLLLoss2d PoissonNLLLoss SmoothL1Loss SoftMarginLoss TripletMarginLoss"""
_PLACED = ("device", "dtype")  # a layer is built on the meta device; its tensors say the rest
_MACHINERY = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@cache
def layers() -> dict[str, tuple[type[nn.Module], Schema]]:
    """The layers that a program may hold, with the schemas of their constructors."""
    table: dict[str, tuple[type[nn.Module], Schema]] = {}
    for name in _LAYERS.split():
        if hasattr(nn, name):
            cls = getattr(nn, name)
            table[name] = (cls, _constructor_schema(cls))
    ours = {**COEFFICIENT_LAYERS, **{c.__name__: c for c in (FrozenBatchNorm2d, GruLayer, LstmLayer)}}
    return table | {n: (c, _constructor_schema(c)) for n, c in ours.items()}


def _constructor_schema(cls: type[nn.Module]) -> Schema:
    schema = of_signature(cls.__init__, skip=1)
    return Schema(names={n: kinds for n, kinds in schema.names.items() if n not in _PLACED})


# ---- to records ------------------------------------------------------------------------------------------


def module_records(
    parent: nn.Module, path: str, called: set[str], training: bool
) -> Iterator[tuple[str, ModuleRecord]]:
    """The record of every module below `parent`, by dotted path, containers before what they hold.

    Args:
        parent: at `path`, "" for the root.
        path: dotted.
        called: paths of the modules that the graph calls: they are layers, the others containers.
        training: the mode of the program.

    Raises:
        LoadError: naming a layer that could not be rebuilt as it is.
    """
    for name, child in parent._modules.items():
        here = f"{path}.{name}" if path else name
        if child is None:
            continue
        if here in called:
            yield here, _layer_record(here, child, training)
        else:
            yield here, ModuleRecord(kind=CONTAINER)
            yield from module_records(child, here, called, training)


def _layer_record(path: str, layer: nn.Module, training: bool) -> ModuleRecord:
    kind = type(layer).__name__
    if kind not in layers() or layers()[kind][0] is not type(layer):
        raise LoadError(
            f"{path}: found {type(layer).__module__}.{kind}, expected a public class of torch.nn that is one "
            "layer (the source of another one may be missing at load); trace through it, or bake its "
            "parametrization"
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
                arguments[name] = encode(vars(layer)[name])
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
            changed[name] = encode(own[name])
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
        return value is other or bool(encode(value) == encode(other))
    except TypeError:
        return False


def _may_set(module: nn.Module, name: str) -> bool:
    if name in _MACHINERY or not is_attribute(name):
        return False
    return name in vars(module) or not hasattr(type(module), name)


# ---- from records ----------------------------------------------------------------------------------------


def attach(root: nn.Module, path: str, record: ModuleRecord) -> None:
    """Build the module of a record, without numbers, and put it where it belongs.

    Raises:
        LoadError: naming the module and what is wrong with it.
    """
    owner, _, leaf = path.rpartition(".")
    parent = _container(root, owner)
    if not is_path(path) or parent is None or hasattr(parent, leaf):
        raise LoadError(f"modules.{path}: expected a new name in a container that comes before it")
    if record.kind == CONTAINER:
        module = nn.Module().train(root.training)
    else:
        module = _build_layer(f"modules.{path}", record).train(root.training)
        _set_attributes(f"modules.{path}", module, record.attributes)
    parent.add_module(leaf, module)


def _container(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` if it is the root or a plain container, in which anything may be put."""
    module = module_at(root, path)
    return module if module is root or type(module) is nn.Module else None


def _build_layer(path: str, record: ModuleRecord) -> nn.Module:
    if record.kind not in layers():
        raise LoadError(f"{path}: found class {record.kind!r:.100}, expected a layer of torch.nn")
    cls, schema = layers()[record.kind]
    arguments = {name: decode_at(path, value, {}) for name, value in record.arguments.items()}
    flaw = schema.flaw((), arguments)
    if flaw is not None:
        raise LoadError(f"{path} ({record.kind}): {flaw}; save the program again")
    try:
        with torch.device("meta"):
            return cls(**arguments)
    except Exception as error:
        raise LoadError(
            f"{path} ({record.kind}): {error}; expected its constructor to take {sorted(record.arguments)}; "
            "use a module that its attributes describe, or the version of torch that saved it"
        ) from error


def flaw_of_coefficients(module: nn.Module) -> str | None:
    """What shapes do not say of a coefficient layer: that its index is a permutation."""
    for path, layer in module.named_modules():
        flaw = layer.flaw() if isinstance(layer, DctLayer) else None
        if flaw is not None:
            return f"{path}.{flaw}"
    return None


def _set_attributes(path: str, layer: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    modules = dict(layer.named_modules())
    for child, values in attributes.items():
        for name, value in values.items():
            if child not in modules or not _may_set(modules[child], name):
                raise LoadError(f"{path}: found attribute {child}.{name}, expected one that may be set")
            modules[child].__dict__[name] = decode_at(path, value, {})


def attach_tensors(
    root: nn.Module, records: Mapping[str, TensorRecord], tensors: Mapping[str, Tensor]
) -> None:
    """Give the modules of `root` their tensors.

    Args:
        root: with all its modules.
        records: of all tensors, by dotted name.
        tensors: those that are stored under a name of their own.

    Raises:
        LoadError: naming a tensor that does not fit, or that is missing.
    """
    shared: dict[str, Tensor] = {}
    expected = named_tensors(root)
    for name, record in records.items():
        source = record.same_as or name
        stored = source in tensors and (tensors[source].shape, records[source].kind)
        if not is_path(name) or stored != (record.shape, record.kind):
            raise LoadError(
                f"tensors.{name}: expected itself or `same_as` to be stored, with the same shape and kind; "
                "save the program again"
            )
        if source not in shared:
            shared[source] = _leaf_tensor(source, records[source], tensors[source])
        owner, _, leaf = name.rpartition(".")
        if name in expected:
            holder = cast(nn.Module, module_at(root, owner))
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
