"""One name for every operator, whichever way a network calls it.

`x + y`, `x += y`, `torch.add`, `x.add_(y)` are all `add`; `F.relu`, `x.relu_()` and `nn.ReLU` are all `relu`.
The name follows from the function, the method or the class of the module, and never from what a network
calls its attribute. Tables of operators (rules, costs, times) have one row a name.
"""

import builtins
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from graphcomp.ir.frozen import FrozenBatchNorm2d
from graphcomp.ir.places import put_in_places
from graphcomp.ir.recurrent import GruLayer, LstmLayer

NAMESPACES = (torch, F, operator, torch.Tensor, torch.special, torch.linalg, torch.fft, math, builtins)

OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""`x += y` and its like -> the operator that yields the same value and leaves x alone."""

ALIASES = {
    **dict.fromkeys(["concat", "concatenate"], "cat"),
    "row_stack": "vstack",
    **dict.fromkeys(["swapaxes", "swapdims"], "transpose"),
    "moveaxis": "movedim",
    **dict.fromkeys(["truediv", "true_divide", "divide"], "div"),
    "floor_divide": "floordiv",
    "multiply": "mul",
    "subtract": "sub",
    "mod": "remainder",
    "negative": "neg",
    "pos": "positive",
    "absolute": "abs",
    "clip": "clamp",
    "fix": "trunc",
    "expit": "sigmoid",
    "arctan2": "atan2",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "upsample": "interpolate",
    "dsmm": "mm",
    **dict.fromkeys(["ndimension", "ndim"], "dim"),
    "nelement": "numel",
}
"""Other names of an operator -> the one that is used here."""

MODULE_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.ELU: "elu", nn.SELU: "selu", nn.CELU: "celu", nn.GELU: "gelu",
    nn.SiLU: "silu", nn.Mish: "mish", nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid",
    nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.RReLU: "rrelu", nn.LogSigmoid: "logsigmoid",
    nn.Softplus: "softplus", nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh", nn.Hardshrink: "hardshrink", nn.Softshrink: "softshrink", nn.Threshold: "threshold",
    nn.Dropout: "dropout", nn.Dropout1d: "dropout1d", nn.Dropout2d: "dropout2d", nn.Dropout3d: "dropout3d",
    nn.AlphaDropout: "alpha_dropout", nn.FeatureAlphaDropout: "feature_alpha_dropout",
    nn.AvgPool1d: "avg_pool1d", nn.AvgPool2d: "avg_pool2d", nn.AvgPool3d: "avg_pool3d",
    nn.MaxPool1d: "max_pool1d", nn.MaxPool2d: "max_pool2d", nn.MaxPool3d: "max_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d", nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d", nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
    nn.LPPool1d: "lp_pool1d", nn.LPPool2d: "lp_pool2d", nn.LPPool3d: "lp_pool3d",
    nn.MaxUnpool1d: "max_unpool1d", nn.MaxUnpool2d: "max_unpool2d", nn.MaxUnpool3d: "max_unpool3d",
    nn.Upsample: "interpolate", nn.UpsamplingBilinear2d: "interpolate",
    nn.UpsamplingNearest2d: "interpolate",
    nn.Softmax: "softmax", nn.Softmax2d: "softmax", nn.LogSoftmax: "log_softmax", nn.Softmin: "softmin",
    nn.GLU: "glu", nn.PReLU: "prelu",
    nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm", nn.GroupNorm: "group_norm",
    nn.BatchNorm1d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.BatchNorm3d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm", nn.InstanceNorm1d: "instance_norm", nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm", FrozenBatchNorm2d: "batch_norm",
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d", nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d", nn.ConvTranspose3d: "conv_transpose3d", nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.Flatten: "flatten", nn.Unflatten: "unflatten", nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle", nn.ChannelShuffle: "channel_shuffle",
    nn.ZeroPad1d: "pad", nn.ZeroPad2d: "pad", nn.ZeroPad3d: "pad",
    nn.ConstantPad1d: "pad", nn.ConstantPad2d: "pad", nn.ConstantPad3d: "pad",
    nn.ReflectionPad1d: "pad", nn.ReflectionPad2d: "pad", nn.ReflectionPad3d: "pad",
    nn.ReplicationPad1d: "pad", nn.ReplicationPad2d: "pad", nn.ReplicationPad3d: "pad",
    nn.CircularPad1d: "pad", nn.CircularPad2d: "pad", nn.CircularPad3d: "pad",
    nn.Unfold: "unfold", nn.Fold: "fold",
    nn.Identity: "identity", LstmLayer: "lstm", GruLayer: "gru",
}  # fmt: skip
"""The module form of an operator -> its name."""

CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64,
}  # fmt: skip
"""Methods that cast -> the type that they cast to."""

_LEGACY_TYPES = {
    f"torch.{device}{name}Tensor": dtype
    for device in ("", "cuda.")
    for name, dtype in (
        ("Float", torch.float32), ("Double", torch.float64), ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
    )
}  # fmt: skip
"""What `x.type(…)` takes beside types."""

_ON_SEQUENCES = (operator.concat, operator.iconcat)
"""Namesakes of operators on tensors."""

_AUGMENTED = {k.__name__: v.__name__ for k, v in OUT_OF_PLACE.items()}


@cache
def function_name(target: Any) -> str:
    """The name of a function or of a method (a string): `relu` for F.relu_, torch.relu and x.relu_().

    Functions that are not of torch, Python's operators or math keep the name of their module in front.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if not isinstance(target, str):
        if target is torchvision.ops.stochastic_depth:
            return "stochastic_depth"
        name = _owned(target, name)
        if name is None:
            return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', str(target))}"
    name = _AUGMENTED.get(name, name) if not isinstance(target, str) else name
    if name not in ALIASES and not name.startswith("_"):
        name = name.rstrip("_")
    return ALIASES.get(name, name)


_INNER = ("torch._C._nn", "torch.nn.functional")


def _owned(target: Any, name: str) -> str | None:
    """The name that a known namespace has for a function: torch.special.expit calls itself special_expit."""
    if target in _ON_SEQUENCES:
        return None
    for space in NAMESPACES:
        for spelled in (name, name.removeprefix("special_").removeprefix("linalg_")):
            if getattr(space, spelled, None) is target:
                return spelled
    hidden = getattr(torch._VF, name, None) is target  # what torch.meshgrid itself calls
    return name if hidden or getattr(target, "__module__", "") in _INNER else None


def spelling(target: Any) -> str:
    """The name of a function or method as it is printed: one of all aliases, in-place forms told apart."""
    name = target if isinstance(target, str) else target.__name__
    if name in ALIASES:
        return ALIASES[name]
    return f"{ALIASES[name[:-1]]}_" if name.endswith("_") and name[:-1] in ALIASES else name


def follow_type(graph: fx.Graph, dtype: torch.dtype) -> None:
    """Make a graph compute in `dtype`, in place: all floating point (complex) types that it names become it.

    So `x.float()` and `torch.zeros(n, dtype=torch.half)` do not mix types once the weights have another one.
    Types that memory is reinterpreted as (`x.view(torch.float32)`) stay.
    """
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = function_name(node.target)
        if name == "view":
            continue
        if node.op == "call_method" and CASTS.get(name, torch.int).is_floating_point:
            node.target, node.args = "to", (*node.args, dtype)
        node.args, node.kwargs = (
            _map(given, lambda a: _followed(a, dtype)) for given in (node.args, node.kwargs)
        )


def spell_alike(graph: fx.Graph) -> None:
    """Give a traced graph, in place, the one form of every call that tables of operators know."""
    reshape_out_of_place(graph)
    name_types(graph)
    name_attributes(graph)
    put_in_places(graph)


RESHAPES_IN_PLACE = ("squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_")


def reshape_out_of_place(graph: fx.Graph) -> None:
    """Turn `x.unsqueeze_(1)` into `y = x.unsqueeze(1)`, in place; what reads x later reads y.

    The same function: x has another shape from there on, and its memory does not change.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_method" or node.target not in RESHAPES_IN_PLACE:
            continue
        source, node.target = node.args[0], node.target[:-1]
        while True:
            for user in [u for u in source.users if order[u] > order[node]]:
                user.replace_input_with(source, node)
            if source.op != "call_method" or not source.target.endswith("_"):
                break
            source = source.args[0]  # an in-place method returns its operand


def name_attributes(graph: fx.Graph) -> None:
    """Turn `x.mT` into `x.transpose(-2, -1)` and `x.data` into `x.detach()`, in place: tables know these."""
    for node in graph.nodes:
        if node.target is getattr and node.args[1] == "mT":
            node.op, node.target, node.args = "call_method", "transpose", (node.args[0], -2, -1)
        elif node.target is getattr and node.args[1] == "data":
            node.op, node.target, node.args = "call_method", "detach", node.args[:1]


def name_types(graph: fx.Graph) -> None:
    """Turn `x.type("torch.FloatTensor")`, which is of one device, into `x.type(torch.float32)`, in place."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "type":
            node.args, node.kwargs = _map(node.args, _legacy), _map(node.kwargs, _legacy)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    return fx.node.map_aggregate(value, change)


def _legacy(value: Any) -> Any:
    """The type that "torch.FloatTensor" stands for."""
    return _LEGACY_TYPES.get(value, value) if isinstance(value, str) else value


def _followed(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.dtype):
        return value
    if value.is_floating_point:
        return dtype
    return dtype.to_complex() if value.is_complex else value
