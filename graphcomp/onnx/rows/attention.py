"""Rows of attention; what is written is what it consists of, which every operator set has."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.onnx.rows.node import Node
from graphcomp.onnx.rows.reading import Reading
from graphcomp.onnx.rows.registry import reads, writes
from graphcomp.onnx.rows.shapes import expanded, reshaped
from graphcomp.onnx.rows.values import Made
from graphcomp.onnx.rows.wires import NoRow, Wire
from graphcomp.onnx.rows.writing import Writing

# ---- reading


@reads("Attention")
def read_attention(node: Node, reading: Reading) -> Made:
    """softmax(scale q k' + mask) v, of (samples, heads, length, width), or heads side by side at the end."""
    q, k, v = (reading.tensor(node.input(i)) for i in range(3))
    mask = node.optional(3)
    node.ignore("qk_matmul_output_mode", "softmax_precision")  # of an output that nobody reads; of rounding
    if node.number("softcap", 0.0):
        raise node.refusal("softcap", "none", "no layer of torch computes this")
    heads = node.integer("q_num_heads", 0), node.integer("kv_num_heads", 0)
    packed = q.rank == 3
    if packed:
        if min(heads) < 1 or any(x.shape[-1] % n for x, n in ((q, heads[0]), (k, heads[1]), (v, heads[1]))):
            raise node.refusal(f"{heads} heads of {q.shape}", "as many as fit", "the file is not valid ONNX")
        q, k, v = (_split(reading, x, n) for x, n in ((q, heads[0]), (k, heads[1]), (v, heads[1])))
    k, v = (_for_heads(node, reading, x, q.shape[1]) for x in (k, v))
    is_causal = bool(node.integer("is_causal", 0))
    if is_causal and (mask is not None or any(a[2] != b[2] for a, b in zip(q.shapes, k.shapes, strict=True))):
        raise node.refusal("is_causal beside a mask or other lengths", "one of them", "give one mask")
    given: dict[str, Any] = {"is_causal": True} if is_causal else {}
    if mask is not None:
        given["attn_mask"] = reading.tensor(mask, "mask")
    scale = node.number("scale", q.shape[-1] ** -0.5)
    made = reading.call(F.scaled_dot_product_attention, q, k, v, scale=scale, **given)
    return reading.call(torch.flatten, reading.call(torch.transpose, made, 1, 2), 2) if packed else made


def _split(reading: Reading, x: Made, heads: int) -> Made:
    parts = reading.call(torch.unflatten, x, 2, (heads, x.shape[2] // heads))
    return reading.call(torch.transpose, parts, 1, 2)


def _for_heads(node: Node, reading: Reading, x: Made, heads: int) -> Made:
    """Keys or values of which several heads share one, a copy each."""
    if x.shape[1] == heads:
        return x
    if heads % x.shape[1]:
        raise node.refusal(f"{x.shape[1]} of {heads} heads", "as many for each", "the file is not valid ONNX")
    times = heads // x.shape[1]
    one = reading.call(torch.unsqueeze, x, 2)
    copies = expanded(reading, one, [(*s[:2], times, *s[2:]) for s in x.shapes])
    return reshaped(node, reading, copies, [(s[0], heads, *s[2:]) for s in x.shapes])


# ---- writing


@writes("scaled_dot_product_attention")
def write_attention(
    writing: Writing,
    query: Wire,
    key: Wire,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """softmax(scale q k' + mask) v."""
    if enable_gqa or dropout_p or not isinstance(query, Wire) or not isinstance(key, Wire):
        raise NoRow("dropout, heads that share keys, or constant operands")
    (length, width), keys = query.shape[-2:], key.shape[-2]
    if not isinstance(width, int):
        raise NoRow("vectors of an open size")
    if is_causal:
        if not (isinstance(length, int) and isinstance(keys, int)):
            raise NoRow("a causal mask of an open size")
        attn_mask = torch.ones(length, keys, dtype=torch.bool).tril()
    axes = list(range(key.rank))
    turned = writing.op("Transpose", key, perm=[*axes[:-2], axes[-1], axes[-2]])
    factor = 1 / math.sqrt(width) if scale is None else scale
    scores = _scores(writing, query.name, turned, factor, attn_mask, query.dtype)
    return writing.op("MatMul", writing.op("Softmax", scores, axis=-1), value)


def _scores(writing: Writing, query: str, key: str, factor: float, mask: Any, dtype: torch.dtype) -> str:
    """The factor stands where runtimes take it into the product."""
    scores = writing.op("MatMul", query, key)
    scores = writing.op("Mul", scores, writing.number(factor, dtype))
    if mask is None:
        return scores
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    elif isinstance(mask, Wire) and mask.dtype is torch.bool:
        zero, out = (writing.number(v, dtype) for v in (0.0, -math.inf))
        mask = writing.op("Where", mask, zero, out)
    return writing.op("Add", scores, mask)


@writes("MultiheadAttention")
def write_multihead_attention(
    writing: Writing,
    query: Wire,
    key: Wire,
    value: Wire,
    module: nn.MultiheadAttention,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """Projections into heads, attention in each, and the projection of all of them."""
    if key_padding_mask is not None or module.bias_k is not None or module.add_zero_attn:
        raise NoRow("a mask of padding, or keys of its own")
    if query.rank != 3 or is_causal and attn_mask is None:
        raise NoRow("an input without a batch, or a causal mask that is not given")
    first, heads = module.batch_first, module.num_heads
    split = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    if not first:
        split = {"q": [1, 2, 0, 3], "k": [1, 2, 3, 0], "v": [1, 2, 0, 3]}
    parts = {}
    for place, (name, source) in enumerate(zip("qkv", (query, key, value), strict=True)):
        weight, bias = _projection(module, name, place)
        made = _linear(writing, source, weight, bias, f"{name}_proj")
        made = writing.op("Reshape", made, writing.ints(0, 0, heads, module.head_dim))
        parts[name] = writing.op("Transpose", made, perm=split[name])
    mask = _inverted(attn_mask)
    scores = _scores(writing, parts["q"], parts["k"], 1 / math.sqrt(module.head_dim), mask, query.dtype)
    weights = writing.op("Softmax", scores, axis=-1)
    mixed = writing.op("MatMul", weights, parts["v"])
    mixed = writing.op("Transpose", mixed, perm=[0, 2, 1, 3] if first else [2, 0, 1, 3])
    mixed = writing.op("Reshape", mixed, writing.ints(0, 0, module.embed_dim))
    projection = module.out_proj
    out = _linear(writing, mixed, projection.weight, projection.bias, "out_proj")
    if not need_weights:
        return out, None
    if average_attn_weights:
        weights = writing.op("ReduceMean", weights, writing.ints(1), keepdims=0)
    return out, weights


def _inverted(mask: Any) -> Any:
    """A mask of truth values of this module says where not to look."""
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        if mask.ndim != 2:
            raise NoRow("a mask a head")
        return ~mask
    if mask is not None and (len(mask.shape) != 2 or isinstance(mask, Wire)):
        raise NoRow("a mask that is computed, or one a head")
    return mask


def _projection(module: nn.MultiheadAttention, name: str, place: int) -> tuple[Tensor, Tensor | None]:
    size = module.embed_dim
    rows = slice(place * size, (place + 1) * size)
    whole = module.in_proj_weight
    weight = getattr(module, f"{name}_proj_weight") if whole is None else whole[rows]
    bias = module.in_proj_bias
    return weight.detach(), None if bias is None else bias[rows].detach()


def _linear(writing: Writing, x: Any, weight: Tensor, bias: Tensor | None, stem: str) -> str:
    made = writing.op("MatMul", x, writing.turned(weight, f"{stem}.weight"))
    return made if bias is None else writing.op("Add", made, writing.store(bias.detach(), f"{stem}.bias"))
