"""Channel selections, in the exact form that is cheapest where the model will run.

What a removal leaves between layers is `y[:, i] = x[:, index[i]]`, or zero where `index[i]` is -1: padding
of a narrow branch before an addition, or what a reader reads of a wider tensor. The exporter writes it as Pad
and Gather. On a CPU these leave the blocked layout of the convolutions around them, for the whole trunk of a
residual network, which can cost more than the arithmetic that was saved. The same can be computed by

    moves      Pad and Gather, as exported
    conv       a 1x1 convolution whose kernel is 0 and 1, in the layout of its neighbours
    producer   rows of zeros in the weights of the convolution in front of it, if nothing else reads that
    consumer   the columns of the convolutions behind it put where the wider tensor has them

A layout spreads from one operator to the next, so sites cannot be judged one by one: whole networks are timed
against each other, with `moves` everywhere, `conv` everywhere, and at every site what costs least arithmetic.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import ModelProto

from graphcomp.channels import Ints
from graphcomp.runtime import Provider, race

CHANNELS = 1
"""The axis of channels; activations have four dimensions here."""

SELECT = "/select"
"""How the name of the weight of a convolution ends that only selects channels."""


@dataclass(frozen=True, eq=False)
class Site:
    """One selection in a graph.

    Attributes:
        nodes: what does it now (Pad, Gather, or both), in order.
        index: for every channel of the result, the channel of the source, or -1 for zeros.
    """

    nodes: tuple[Any, ...]
    index: Ints = field(repr=False)

    @property
    def source(self) -> Any:
        """The tensor that is selected from."""
        return self.nodes[0].inputs[0]

    @property
    def result(self) -> Any:
        """The tensor that comes out."""
        return self.nodes[-1].outputs[0]


def cheapest(
    model: ModelProto,
    names: set[str],
    feeds: Mapping[str, NDArray[Any]],
    provider: Provider,
    threads: int = 1,
    known: MutableMapping[str, dict[str, float]] | None = None,
) -> tuple[ModelProto, list[str]]:
    """The same network with its selections in the cheapest form, and a line that says what was chosen.

    Args:
        model: left as it is.
        names: nodes that may be replaced. A replacement has the name of the last node that it replaces.
        feeds: inputs to time with.
        provider, threads: where candidates are timed.
        known: times by form of models that were timed before, by content; read and extended.

    Raises:
        ProviderError: if the provider does not work here.
    """
    model = onnx.shape_inference.infer_shapes(model)
    if not _ours(gs.import_onnx(model), names):
        return model, []
    candidates = {name: _rewritten(model, names, policy) for name, policy in POLICIES.items()}
    forms: dict[bytes, str] = {}
    for name, candidate in candidates.items():  # two policies may come to the same
        forms.setdefault(candidate.SerializeToString(deterministic=True), name)
    key = _digest(forms, provider, threads)
    known = {} if known is None else known
    if key not in known:
        times = race(list(forms), feeds, provider, threads)
        known[key] = dict(zip(forms.values(), times, strict=True))
    by_name = known[key]
    best = min(by_name, key=by_name.__getitem__)
    listed = ", ".join(f"{name} {ms:.3g} ms" for name, ms in by_name.items())
    return candidates[best], [f"channel selections as {best}, the fastest on {provider}: {listed}"]


def _digest(forms: Iterable[bytes], provider: Provider, threads: int) -> str:
    digest = hashlib.sha256(f"{provider} {threads}".encode())
    for content in forms:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _ours(graph: Any, names: set[str]) -> list[Site]:
    return [site for site in find_sites(graph) if all(node.name in names for node in site.nodes)]


def _rewritten(model: ModelProto, names: set[str], policy: Callable[[Any, Site], str]) -> ModelProto:
    graph = gs.import_onnx(model)
    for site in _ours(graph, names):
        FORMS[policy(graph, site)].apply(graph, site)
    graph.cleanup().toposort()
    rewritten: ModelProto = gs.export_onnx(graph)
    return rewritten


# ---------------------------------------------------------------------- finding them


def find_sites(graph: Any) -> list[Site]:
    """Every Pad by zeros on the channels, Gather by a constant index on them, and Gather of such a Pad."""
    sites = [site for node in graph.nodes if (site := _site(node)) is not None]
    halves = {id(site.nodes[0]) for site in sites if len(site.nodes) > 1}
    return [site for site in sites if len(site.nodes) > 1 or id(site.nodes[0]) not in halves]


def _site(node: Any) -> Site | None:
    index = _gather_index(node)
    if index is None:
        padded = _padded_index(node)
        return None if padded is None else Site((node,), padded)
    before = node.inputs[0].inputs
    if len(before) == 1 and len(node.inputs[0].outputs) == 1:
        padded = _padded_index(before[0])
        if padded is not None:
            return Site((before[0], node), padded[index])
    return Site((node,), index)


def _gather_index(node: Any) -> Ints | None:
    if node.op != "Gather" or node.attrs.get("axis", 0) != CHANNELS:
        return None
    values = _constant(node.inputs[1])
    width = _width(node.inputs[0])
    if values is None or values.ndim != 1 or width is None:
        return None
    return np.asarray(np.where(values < 0, values + width, values), np.int64)


def _padded_index(node: Any) -> Ints | None:
    """The index of a Pad that puts zeros beside the channels and nothing elsewhere."""
    if node.op != "Pad" or node.attrs.get("mode", "constant") != "constant" or len(node.inputs) > 3:
        return None
    fill = _constant(node.inputs[2]) if len(node.inputs) == 3 and not node.inputs[2].is_empty() else None
    pads, width = _constant(node.inputs[1]), _width(node.inputs[0])
    if pads is None or width is None or (fill is not None and fill.any()):
        return None
    before, after = np.asarray(pads, np.int64).reshape(2, -1)
    others = np.arange(len(before)) != CHANNELS
    if (pads < 0).any() or before[others].any() or after[others].any():
        return None
    sides = int(before[CHANNELS]), int(after[CHANNELS])
    return np.pad(np.arange(width), sides, constant_values=-1)


def _constant(tensor: Any) -> NDArray[Any] | None:
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    made = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    if made is not None and made.op == "Constant":
        return np.asarray(made.attrs["value"].values)
    return None


def _width(tensor: Any) -> int | None:
    shape = tensor.shape
    return shape[CHANNELS] if shape and len(shape) == 4 and isinstance(shape[CHANNELS], int) else None


def _known_width(tensor: Any) -> int:
    return int(tensor.shape[CHANNELS])


# ---------------------------------------------------------------------- the forms


def _as_conv(graph: Any, site: Site) -> None:
    kernel = (site.index[:, None] == np.arange(_known_width(site.source))).astype(site.source.dtype)
    name, result = site.nodes[-1].name, site.result
    _disconnect(site)
    weight = gs.Constant(f"{name}{SELECT}", kernel[:, :, None, None])
    graph.nodes.append(gs.Node("Conv", name, {"kernel_shape": [1, 1]}, [site.source, weight], [result]))


def _into_producer(graph: Any, site: Site) -> None:
    conv, result, kept = site.source.inputs[0], site.result, site.index >= 0
    for position, parameter in enumerate(conv.inputs[1:], 1):
        old = parameter.values
        new = np.zeros((len(site.index), *old.shape[1:]), old.dtype)
        new[kept] = old[site.index[kept]]
        conv.inputs[position] = gs.Constant(f"{conv.name}/rows_{position}", new)
    _disconnect(site)
    conv.outputs = [result]


def _into_consumers(graph: Any, site: Site) -> None:
    source = site.source
    for conv in list(site.result.outputs):
        old = conv.inputs[1].values
        new = np.zeros((old.shape[0], _known_width(source), *old.shape[2:]), old.dtype)
        for column in np.flatnonzero(site.index >= 0):
            new[:, site.index[column]] += old[:, column]
        conv.inputs[0], conv.inputs[1] = source, gs.Constant(f"{conv.name}/columns", new)
    _disconnect(site)


def _disconnect(site: Site) -> None:
    for node in site.nodes:
        node.outputs = []


# ---------------------------------------------------------------------- which form a site gets


def _conv_extra(graph: Any, site: Site) -> int:
    return len(site.index) * _known_width(site.source) * _plane(site.result)


def _producer_extra(graph: Any, site: Site) -> int | None:
    source = site.source
    convs = [node for node in source.inputs if _is_plain_conv(node)]
    if not convs or len(source.outputs) > 1 or _is_output(graph, source):
        return None
    row = int(np.prod(convs[0].inputs[1].shape[1:]))
    return (len(site.index) - _known_width(source)) * row * _plane(source)


def _consumer_extra(graph: Any, site: Site) -> int | None:
    readers = site.result.outputs
    if not readers or _is_output(graph, site.result) or not all(map(_is_plain_conv, readers)):
        return None
    added = _known_width(site.source) - len(site.index)
    columns = ((n.inputs[1].values[:, 0].size, _plane(n.outputs[0])) for n in readers)
    return int(sum(added * column * plane for column, plane in columns))


def _is_plain_conv(node: Any) -> bool:
    constant = node.op == "Conv" and all(isinstance(p, gs.Constant) for p in node.inputs[1:])
    return constant and node.attrs.get("group", 1) == 1


def _is_output(graph: Any, tensor: Any) -> bool:
    return any(tensor is output for output in graph.outputs)


def _plane(tensor: Any) -> int:
    """Positions of an activation; 1 if the exporter left them open, the same for every form of a site."""
    height, width = (tensor.shape or (0, 0, None, None))[2:]
    return height * width if isinstance(height, int) and isinstance(width, int) else 1


@dataclass(frozen=True)
class SelectionForm:
    """One way to compute a selection: the change that makes it, and the MACs it adds (None: impossible)."""

    apply: Callable[[Any, Site], None]
    extra: Callable[[Any, Site], int | None]


FORMS = {
    "moves": SelectionForm(lambda graph, site: None, lambda graph, site: 0),
    "conv": SelectionForm(_as_conv, _conv_extra),
    "producer": SelectionForm(_into_producer, _producer_extra),
    "consumer": SelectionForm(_into_consumers, _consumer_extra),
}


def _least_arithmetic(graph: Any, site: Site) -> str:
    """Of the forms that keep the layout, the one that adds the fewest MACs."""
    extras = {name: FORMS[name].extra(graph, site) for name in ("producer", "consumer", "conv")}
    possible = {name: extra for name, extra in extras.items() if extra is not None}
    return min(possible, key=possible.__getitem__)


POLICIES: dict[str, Callable[[Any, Site], str]] = {
    "moves": lambda graph, site: "moves",
    "conv": lambda graph, site: "conv",
    "merged": _least_arithmetic,
}
