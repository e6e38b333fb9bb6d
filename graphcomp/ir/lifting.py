"""Functions of parameters, as the layers of torch that they are.

torch.fx traces through every module that is not torch's own, so a subclass of a layer leaves the layer's
function behind, called with the module's parameters: a normalisation with an activation built in, a
convolution that pads by itself, `F.linear(x, self.weight)`. Such a call becomes a call of the plain layer
with the same tensors and the same value, so that there is one form of a layer for every analysis and pass
to know.

Left as functions: calls with weights that are computed, and batch normalisations whose module does not say
that it is one, since nobody knows whether they are to follow the batch in training.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

Tensors = Mapping[str, Tensor | None]
Build = Callable[[Tensors, Mapping[str, Any], nn.Module], nn.Module]
"""From a call's tensors, its other arguments and their owner the layer, its tensors still empty."""


@dataclass(frozen=True)
class Form:
    """How a function is called, and the layer that calls it so.

    Attributes:
        tensors: arguments that the layer holds, in its own names.
        arguments: name -> default, in the function's order, with the input first.
        build: makes the layer.
        bare: whether it is a layer without any tensors, too.
    """

    tensors: tuple[str, ...]
    arguments: Mapping[str, Any]
    build: Build
    bare: bool = False


def lift_layers(root: nn.Module, graph: fx.Graph) -> None:
    """Replace functions of parameters by layers, in place.

    Args:
        root: holds what the graph refers to; new layers are put into it, and take the place of the modules
            that called the functions where nothing else of these is used.
        graph: of a network in eval mode.
    """
    uses = _Uses(graph)
    layers: dict[str, nn.Module] = {}
    paths: dict[tuple[Any, ...], str] = {}
    for node in list(graph.nodes):
        found = _layer_of(root, node)
        if found is None:
            continue
        names, layer = found
        facts = _facts(layer) if names else (node,)  # what has no tensors is nobody else's layer
        if facts not in paths:
            paths[facts] = _place(root, uses, node, names, layers)
            layers[paths[facts]] = layer
        _call(graph, node, paths[facts])
    for path, layer in layers.items():
        owner, _, leaf = path.rpartition(".")
        root.get_submodule(owner)._modules[leaf] = layer


def _layer_of(root: nn.Module, node: fx.Node) -> tuple[dict[str, str], nn.Module] | None:
    """The layer that a call stands for, with the dotted names that its tensors had; None if there is none."""
    form = form_of(node)
    given = None if form is None else bound_arguments(form, node)
    if form is None or given is None:
        return None
    names: dict[str, str] = {}
    for part in form.tensors:
        value = given.pop(part)
        if isinstance(value, fx.Node) and value.op == "get_attr":
            names[part] = cast(str, value.target)
        elif value is not None:
            return None
    source = given.pop("input")
    if not isinstance(source, fx.Node) or any(_holds_node(a) for a in given.values()):
        return None
    if not (names or form.bare):
        return None
    tensors = {part: tensor_at(root, names[part]) if part in names else None for part in form.tensors}
    owner = root.get_submodule(next(iter(names.values()), "").rpartition(".")[0])
    if "running_mean" in form.tensors and not _follows_batches(owner, tensors, given):
        return None
    with torch.device("meta"):
        layer = form.build(tensors, given, owner)
    for part, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            layer._parameters[part] = tensor
        elif part in layer._buffers:
            layer._buffers[part] = tensor
        elif tensor is not None:  # a buffer in the place of a parameter: it is not trained
            layer._parameters[part] = nn.Parameter(tensor, requires_grad=False)
    missing = layer.state_dict().keys() - names.keys() - {"num_batches_tracked"}
    return None if missing else (names, layer)


def form_of(node: fx.Node) -> Form | None:
    """How a function of weights is called; None for other nodes."""
    return _FORMS.get(node.target) if node.op == "call_function" else None


def bound_arguments(form: Form, node: fx.Node) -> dict[str, Any] | None:
    """Every argument by name; None if the call has others."""
    arguments = form.arguments
    if len(node.args) > len(arguments) or not node.kwargs.keys() <= arguments.keys():
        return None
    return {**arguments, **dict(zip(arguments, node.args, strict=False)), **node.kwargs}


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)


def tensor_at(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer at a dotted name."""
    owner, _, leaf = name.rpartition(".")
    return cast(Tensor, getattr(root.get_submodule(owner), leaf))


def _follows_batches(owner: nn.Module, tensors: Tensors, given: Mapping[str, Any]) -> bool:
    """Whether it is torch's normalisation: by running statistics now, by those of the batch in training."""
    known = any(
        isinstance(owner, kind) and type(owner)._check_input_dim is kind._check_input_dim
        for kind in _BATCH_NORMS
    )
    whole = tensors["running_mean"] is not None and tensors["running_var"] is not None
    trained = all(isinstance(tensors[part], nn.Parameter | None) for part in ("weight", "bias"))
    return known and whole and trained and not given["training"]


def _facts(layer: nn.Module) -> tuple[Any, ...]:
    """Equal for layers of one kind with the same settings and the very same tensors."""
    settings = sorted((k, repr(v)) for k, v in vars(layer).items() if not k.startswith("_"))
    tensors = sorted((k, id(t)) for k, t in [*layer._parameters.items(), *layer._buffers.items()])
    return type(layer).__name__, tuple(settings), tuple(tensors)


class _Uses:
    """What a graph uses of the modules, before anything is lifted."""

    def __init__(self, graph: fx.Graph) -> None:
        self.readers: dict[str, set[fx.Node]] = defaultdict(set)
        """Tensor -> the nodes that read it."""
        self.inside: dict[str, set[str]] = defaultdict(set)
        """Module -> the tensors and modules in it (or itself) that nodes refer to."""
        for node in graph.nodes:
            if node.op not in ("get_attr", "call_module"):
                continue
            target = path = cast(str, node.target)
            if node.op == "get_attr":
                self.readers[target] |= set(node.users)
            while path:
                self.inside[path].add(target)
                path = path.rpartition(".")[0]


def _place(
    root: nn.Module, uses: _Uses, node: fx.Node, names: Mapping[str, str], taken: Container[str]
) -> str:
    """The module that held the tensors, if they have the layer's names and nothing else of it is used."""
    owner = next(iter(names.values()), "").rpartition(".")[0]
    own = all(name == f"{owner}.{part}" for part, name in names.items())
    readers = {user for name in names.values() for user in uses.readers[name]}
    if owner and own and readers == {node} and uses.inside[owner] <= set(names.values()):
        return owner
    stem = f"{owner}." if owner else ""
    name = path = f"{stem}{cast(Any, node.target).__name__}"
    count = 0
    while hasattr(root.get_submodule(owner), path.rpartition(".")[2]) or path in taken:
        count += 1
        path = f"{name}_{count}"
    return path


def _call(graph: fx.Graph, node: fx.Node, path: str) -> None:
    source = node.args[0] if node.args else node.kwargs["input"]
    operands = [n for n in node.all_input_nodes if n.op == "get_attr"]
    with graph.inserting_before(node):
        new = graph.call_module(path, (source,))
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    for operand in operands:
        if not operand.users:
            graph.erase_node(operand)


# ---------------------------------------------------------------------- the layers


def _arguments(text: str, **defaults: Any) -> dict[str, Any]:
    return {name: defaults.get(name) for name in text.split()}


def _convolution(kind: type[nn.modules.conv._ConvNd], transposed: bool) -> Form:
    def build(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
        weight, groups = cast(Tensor, tensors["weight"]), given["groups"]
        rows, columns = weight.shape[0], weight.shape[1] * groups
        into, out = (rows, columns) if transposed else (columns, rows)
        make = cast(Callable[..., nn.Module], kind)
        return make(into, out, tuple(weight.shape[2:]), bias=tensors["bias"] is not None, **given)

    order = (
        "stride padding output_padding groups dilation" if transposed else "stride padding dilation groups"
    )
    defaults = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    return Form(("weight", "bias"), _arguments(f"input weight bias {order}", **defaults), build)


def _linear(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    out, into = cast(Tensor, tensors["weight"]).shape
    return nn.Linear(into, out, bias=tensors["bias"] is not None)


def _batch_norm(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    norm = cast(nn.BatchNorm2d, owner)
    kind = next(k for k in _BATCH_NORMS if isinstance(norm, k))
    channels = cast(Tensor, tensors["running_mean"]).numel()
    layer = kind(channels, given["eps"], norm.momentum, affine=tensors["weight"] is not None)
    layer._buffers["num_batches_tracked"] = norm.num_batches_tracked
    return layer


def _layer_norm(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    affine, bias = tensors["weight"] is not None, tensors["bias"] is not None
    return nn.LayerNorm(given["normalized_shape"], given["eps"], elementwise_affine=affine, bias=bias)


def _rms_norm(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    return nn.RMSNorm(given["normalized_shape"], given["eps"], tensors["weight"] is not None)


def _group_norm(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    return nn.GroupNorm(given["num_groups"], cast(Tensor, tensors["weight"]).numel(), given["eps"])


def _embedding(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    return nn.Embedding(*cast(Tensor, tensors["weight"]).shape, **given)


def _prelu(tensors: Tensors, given: Mapping[str, Any], owner: nn.Module) -> nn.Module:
    return nn.PReLU(cast(Tensor, tensors["weight"]).numel())


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_FORMS: dict[Any, Form] = {
    F.conv1d: _convolution(nn.Conv1d, False),
    F.conv2d: _convolution(nn.Conv2d, False),
    F.conv3d: _convolution(nn.Conv3d, False),
    F.conv_transpose1d: _convolution(nn.ConvTranspose1d, True),
    F.conv_transpose2d: _convolution(nn.ConvTranspose2d, True),
    F.conv_transpose3d: _convolution(nn.ConvTranspose3d, True),
    F.prelu: Form(("weight",), _arguments("input weight"), _prelu),
    F.embedding: Form(
        ("weight",),
        _arguments(
            "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
            norm_type=2.0,
            scale_grad_by_freq=False,
            sparse=False,
        ),
        _embedding,
    ),
    F.linear: Form(("weight", "bias"), _arguments("input weight bias"), _linear),
    F.batch_norm: Form(
        ("weight", "bias", "running_mean", "running_var"),
        _arguments(
            "input running_mean running_var weight bias training momentum eps", training=False, eps=1e-5
        ),
        _batch_norm,
    ),
    F.layer_norm: Form(
        ("weight", "bias"), _arguments("input normalized_shape weight bias eps", eps=1e-5), _layer_norm, True
    ),
    F.rms_norm: Form(("weight",), _arguments("input normalized_shape weight eps"), _rms_norm, True),
    F.group_norm: Form(
        ("weight", "bias"), _arguments("input num_groups weight bias eps", eps=1e-5), _group_norm
    ),
}
