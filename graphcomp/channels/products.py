"""Rules for products of activations: attention's q k and its weighted sum of v, as matmul or einsum.

A product contracts axes: position j of both operands live and die together, and zeros on one side are enough,
so a removal is simulated by a mask on the first operand. What an operand has beside the contracted axes goes
on. Axes that both have and the result keeps (batch, heads) keep their length: widths of all heads stay equal.

Where both operands have channels that go on (cross-covariance, k v of linear attention) the result is a table
of channels by channels. Its labels are those of the first axis; those of the second are kept beside them, in
`Tracker.second`, until a product contracts or passes on either. What happens to a table meanwhile must treat
all elements alike, mix along one of the two axes, or transpose it (`carry`); what does not pins the second.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import Tensor, fx

from graphcomp.channels.labels import along, compact, unlabelled, varying
from graphcomp.channels.mixing import mixed_dims, reduced_dims, stand_in
from graphcomp.channels.model import How
from graphcomp.channels.moves import MOVES, move
from graphcomp.channels.opaque import opaque, pin_value, what
from graphcomp.channels.tracker import Tracker, Unread
from graphcomp.ir import op_name

Letters = Sequence[Any]
"""A name an axis, as an equation of einsum has it."""


def matmul(tracker: Tracker, node: fx.Node) -> Any:
    """a @ b: ... x i x k times ... x k x j, with axes in front broadcast."""
    a, b = node.args[:2] if len(node.args) > 1 else (node.args[0], node.kwargs.get("mat2"))
    ranks = [len(tracker.shape(x)) if isinstance(x, fx.Node) else 0 for x in (a, b)]
    if min(ranks) < 2:
        return opaque(tracker, node)
    front = range(max(ranks) - 2, 0, -1)  # counted from the matrices
    terms = [
        (cast(fx.Node, x), (*front[len(front) - n + 2 :], *matrix))
        for x, n, matrix in ((a, ranks[0], "ik"), (b, ranks[1], "kj"))
    ]
    return _product(tracker, node, terms, (*front, *"ij"))


def einsum(tracker: Tracker, node: fx.Node) -> Any:
    """Of any number of operands, and an equation with every letter once in each."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    known = isinstance(equation, str) and all(isinstance(x, fx.Node) for x in operands)
    terms, arrow, out = str(equation).replace(" ", "").partition("->")
    if not known or not arrow and "." in terms:
        return opaque(tracker, node)
    if not arrow:
        out = "".join(sorted(c for c in set(terms) if terms.count(c) == 1 and c.isalpha()))
    ranks = [len(tracker.shape(cast(fx.Node, x))) for x in operands]
    letters = [_spelled(t, n) for t, n in zip(terms.split(","), ranks, strict=True)]
    result = _spelled(out, len(tracker.shape(node)))
    if len(operands) < 2 or any(len(set(t)) < len(t) for t in (*letters, result)):
        return opaque(tracker, node)
    return _product(tracker, node, list(zip(cast(list[fx.Node], operands), letters, strict=True)), result)


def _spelled(term: str, rank: int) -> Letters:
    """A name an axis; those that an ellipsis stands for are counted from its end."""
    before, dots, after = term.partition("...")
    many = rank - len(before) - len(after)
    return (*before, *(range(many, 0, -1) if dots else ()), *after)


def _product(tracker: Tracker, node: fx.Node, terms: Sequence[tuple[fx.Node, Letters]], out: Letters) -> Any:
    if all(source in tracker.constant for source, _ in terms):
        return opaque(tracker, node)
    others = [{x for j, (_, own) in enumerate(terms) if j != i for x in own} for i in range(len(terms))]
    found = [_lettered(tracker, node, term, other, out) for term, other in zip(terms, others, strict=True)]
    kept: list[tuple[int, Tensor]] = []
    for letter in dict.fromkeys((*out, *(x for _, own in terms for x in own))):
        sides = [i for i, own in enumerate(found) if letter in own]
        if not sides:
            continue
        labels, (source, letters) = found[sides[0]][letter], terms[sides[0]]
        shared = sum(letter in own for _, own in terms) > 1
        if shared and not _meets(tracker, node, labels, found, terms, letter, letter in out):
            tracker.pin(node, labels, f"{what(tracker, node)} meets no channels along them")
        elif letter in out:
            kept.append((list(out).index(letter), labels))
        else:
            how: How = "product" if shared else "zeros"
            tracker.mixings.append((node, source, list(letters).index(letter), labels, how, ()))
    tie_packed(tracker, node)
    shape = tracker.shape(node)
    for _, labels in kept[2:]:
        tracker.pin(node, labels, f"{what(tracker, node)} yields more than two axes of channels")
    if len(kept) > 1:
        tracker.second[node] = kept[1]
    return along(kept[0][1], kept[0][0], shape) if kept else _none(tracker, [s for s, _ in terms], shape)


def _lettered(
    tracker: Tracker, node: fx.Node, term: tuple[fx.Node, Letters], other: Collection[Any], out: Letters
) -> dict[Any, Tensor]:
    """The letters along which an activation has channels, and these; what else varies is coupled."""
    source, letters = term
    if source in tracker.constant:
        return {}
    labels = tracker.labels(source)
    axes, found = varying(labels), {}
    if axes:
        matrix = [d for d in axes if not (letters[d] in other and letters[d] in out)]
        contracted = [d for d in matrix if letters[d] not in out]
        heads = [d for d in axes if d not in matrix] if tracker.granularity == "head" else []
        axis = max(heads or contracted or matrix or axes)
        found[letters[axis]] = tracker.vector(node, labels, axis)
    if source in tracker.second:
        axis, second = tracker.second[source]
        found[letters[axis]] = second
    return found


def _meets(
    tracker: Tracker,
    node: fx.Node,
    labels: Tensor,
    found: Sequence[dict[Any, Tensor]],
    terms: Sequence[tuple[fx.Node, Letters]],
    letter: Any,
    passes: bool,
) -> bool:
    """Couple the channels along an axis that both operands have; False if one has none that could follow."""
    for (source, letters), own in zip(terms, found, strict=True):
        if letter not in letters:
            continue
        axis = list(letters).index(letter)
        if letter in own:
            tracker.couple(node, labels, own[letter])
        elif source in tracker.constant:
            theirs = tracker.labels(source)
            if axis not in varying(theirs) or not bool(compact(theirs).all()):
                return passes and theirs.size(axis) == 1
            tracker.couple(node, labels, tracker.vector(node, theirs, axis))
        elif not (passes and tracker.shape(source)[axis] == 1):
            return False
    return True


def attention(tracker: Tracker, node: fx.Node) -> Any:
    """F.scaled_dot_product_attention(q, k, v, mask): the scale is a number of its own since the trace."""
    names = ("query", "key", "value")
    q, k, v = (node.args[i] if len(node.args) > i else node.kwargs[n] for i, n in enumerate(names))
    if tracker.granularity == "head" and (found := _by_heads(tracker, node, (q, k, v))) is not None:
        return found
    left, right, moved = (_activation(tracker, x) for x in (q, k, v))
    if left is None or right is None or moved is None or node.kwargs.get("scale") is None:
        return opaque(tracker, node)
    for source in node.all_input_nodes:
        if source not in (q, k, v):
            pin_value(tracker, node, source, "is added to the scores of attention")
    contracted, shape = _varies(left, -1), tracker.shape(node)
    if any(_varies(x, -2) for x in (left, right, moved)) or contracted != _varies(right, -1):
        return opaque(tracker, node)
    if contracted:
        a = tracker.vector(node, left, left.ndim - 1)
        tracker.couple(node, a, tracker.vector(node, right, right.ndim - 1))
        tracker.mixings.append((node, cast(fx.Node, q), left.ndim - 1, a, "product", ()))
    tie_packed(tracker, node)
    if not _varies(moved, -1):
        return _none(tracker, [cast(fx.Node, v)], shape)
    return along(tracker.vector(node, moved, moved.ndim - 1), len(shape) - 1, shape)


def _by_heads(tracker: Tracker, node: fx.Node, operands: Sequence[Any]) -> Tensor | None:
    """Attention whose heads go whole; None if it has no heads, or not everybody has the same."""
    if any(not tracker.is_tensor(x) or x in tracker.constant for x in operands):
        return None
    given = [tracker.labels(x) for x in operands]
    axes = [{d - x.ndim for d in varying(x) if d < x.ndim - 2} for x in given]
    if node.kwargs.get("scale") is None or len(axes[0]) != 1 or any(a != axes[0] for a in axes):
        return None
    (axis,) = axes[0]
    heads = [tracker.vector(node, x, x.ndim + axis) for x in given]
    for other in heads[1:]:
        tracker.couple(node, heads[0], other)
    for source in node.all_input_nodes:
        if source in operands:
            continue
        theirs = tracker.labels(source)
        if _size(tracker, source, axis) == 1:
            pin_value(tracker, node, source, "is added to the scores of attention")
        elif theirs.ndim + axis in varying(theirs) and bool(compact(theirs).all()):
            tracker.couple(node, heads[0], tracker.vector(node, theirs, theirs.ndim + axis))
        else:
            tracker.pin(node, heads[0], "what is added to the scores of attention has these heads")
    tie_packed(tracker, node)
    shape = tracker.shape(node)
    return along(heads[0], len(shape) + axis, shape)


def _activation(tracker: Tracker, source: Any) -> Tensor | None:
    """Labels of an activation with at least two axes; None for others, parameters among them."""
    if not tracker.is_tensor(source) or isinstance(tracker.values[source], Unread):
        return None
    labels = tracker.labels(source)
    return None if labels.ndim < 2 or _in_front_only(labels) else labels


def _in_front_only(labels: Tensor) -> bool:
    """Whether the channels lie along batches or heads, as those that mix the heads' scores make."""
    return bool(varying(labels)) and not set(varying(labels)) & {labels.ndim - 1, labels.ndim - 2}


def _varies(labels: Tensor, axis: int) -> bool:
    return axis % labels.ndim in varying(labels)


def _none(tracker: Tracker, sources: Sequence[fx.Node], shape: tuple[int, ...]) -> Tensor:
    """A result without a channel axis: it belongs to what it is made of, if that is one channel each."""
    operands = [tracker.labels(s) for s in sources if s not in tracker.constant]
    single = [x for x in operands if not varying(x) and bool(compact(x).any())]
    lead = compact(single[0]).flatten()[:1] if single else unlabelled(())
    return lead.reshape([1] * len(shape)).expand(shape)


_PICKS = ("getitem", "select", "unbind")
"""Take one of several: what is left may vary along one axis, as with a single head, and what they take it of
along two."""


def tie_packed(tracker: Tracker, node: fx.Node) -> None:
    """Where q, k and v come out of one reshape their widths are equal: no rearrangement undoes that."""
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        source = waiting.pop()
        labels = tracker.values.get(source)
        parts = [
            x for x in (labels if isinstance(labels, tuple | list) else (labels,)) if isinstance(x, Tensor)
        ]
        picks = isinstance(labels, tuple | list) or op_name(tracker.program, source) in _PICKS
        if source in seen or not (picks or any(len(varying(x)) > 1 for x in parts)):
            continue
        seen.add(source)
        for part in parts:
            tracker.needs_rectangle(source, part)
        waiting += source.all_input_nodes[:1]


# ---------------------------------------------------------------------- tables of channels by channels

_ALIKE = ("pass", "couple", "mask")
_TURNS = ("transpose", "permute", "movedim")
"""Moves that no removal changes: they name axes and no sizes."""


def carry(tracker: Tracker, node: fx.Node, kind: str) -> None:
    """What becomes of the second axis of a table of channels by channels at a node that is no product.

    Args:
        tracker, node: as any rule has them, after its rule has run.
        kind: the name of the rule.
    """
    tables = [s for s in node.all_input_nodes if s in tracker.second]
    if not tables:
        return
    axis, labels = tracker.second[tables[0]]
    alike = all(tracker.second[s][0] == axis and tracker.shape(s) == tracker.shape(tables[0]) for s in tables)
    goes = len(tables) == 1 or alike and kind in _ALIKE
    found = _carried(tracker, node, kind, tables, axis, labels) if goes else None
    for source in tables[1:] if found is not None else ():
        tracker.couple(node, labels, tracker.second[source][1])
    if isinstance(found, tuple):
        tracker.second[node] = found
    elif found is None:
        why = f"{what(tracker, node)} of a table of channels by channels"
        for source in tables:
            tracker.pin(node, tracker.second[source][1], why)


def along_second(tracker: Tracker, node: fx.Node) -> list[fx.Node]:
    """Operands that hold one parameter or buffer element for every channel of a table's second axis."""
    tables = [s for s in node.all_input_nodes if s in tracker.second]
    if len(tables) != 1:
        return []
    axis, labels = tracker.second[tables[0]]
    beside = axis - len(tracker.shape(tables[0]))
    return [
        s
        for s in node.all_input_nodes
        if s in tracker.constant
        and _size(tracker, s, beside) == labels.numel() == math.prod(tracker.shape(s)) > 1
        and bool(tracker.labels(s).all())
    ]


def _size(tracker: Tracker, node: fx.Node, axis: int) -> int:
    shape = tracker.shape(node)
    return shape[axis] if len(shape) >= -axis else 1


_READ = "read"
"""What is left of a second axis that an operator has summed over."""


def _carried(
    tracker: Tracker, node: fx.Node, kind: str, tables: Sequence[fx.Node], axis: int, labels: Tensor
) -> tuple[int, Tensor] | str | None:
    source = tables[0]
    shape = tracker.shape(source)
    if kind in _ALIKE and tracker.shape(node) == shape:
        beside = along_second(tracker, node)
        others = [s for s in node.all_input_nodes if s not in tables and tracker.is_tensor(s)]
        if any(_size(tracker, s, axis - len(shape)) > 1 for s in others if s not in beside):
            return None
        for other in beside:
            tracker.couple(node, labels, tracker.labels(other).flatten())
        return axis, labels
    if kind == "softmax":
        dims = mixed_dims(tracker, node, len(shape))
        found = stand_in(tracker, node, len(shape), dims)
        if axis in dims and found is not None:
            tracker.mixings.append((node, source, axis, labels, *found))
        return None if found is None else (axis, labels)
    reduced = reduced_dims(tracker, node, len(shape)) if kind == "reduce" else None
    if reduced is not None:
        value = tracker.program.values[node]
        if axis not in reduced:
            if not isinstance(value, Tensor):  # with places of maxima: two tables
                return None
            return axis if value.ndim == len(shape) else axis - sum(d < axis for d in reduced), labels
        found = stand_in(tracker, node, len(shape), reduced)
        if found is None or found[0] in ("spread", "norm"):
            return None
        tracker.mixings.append((node, source, axis, labels, *found))
        return _READ
    name = op_name(tracker.program, node)
    if kind == "move" and (name in _TURNS or MOVES[name] is MOVES["contiguous"]):
        turned = move(
            tracker.program, node, lambda _: along(labels, axis, shape), tracker.program.values.__getitem__
        )
        (axis,) = varying(turned)
        return axis, labels
    return None
