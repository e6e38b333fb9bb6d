"""`nn.MultiheadAttention` as the layers and functions that it is made of.

torch keeps one weight for three projections and calls a kernel; no analysis sees channels in that. Written as
linear layers, heads and products, its widths are those of any other attention. It computes the same, up to
rounding.
"""

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.ir.hooks import is_hooked

TRANSFORMERS = (
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.Transformer,
)
"""Modules of torch that are no layers but networks around attention: they are traced through."""


class OpenAttention(nn.Module):
    """Takes and yields what `nn.MultiheadAttention` does.

    Args:
        attention: one that `opens_attention` takes. Its weights become those of linear layers: `in_proj`
            where query, key and value are one tensor, else `q_proj`, `k_proj` and `v_proj`; and `out_proj`.
    """

    in_proj_bias = None
    """What torch's transformers ask for before they take a kernel that cannot be traced."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.batch_first = attention.head_dim, attention.batch_first
        self.scale = self.head_dim**-0.5  # also when heads have become narrower
        self._qkv_same_embed_dim = attention._qkv_same_embed_dim
        packed: Tensor | None = attention.in_proj_weight
        bias: Tensor | None = attention.in_proj_bias
        if packed is not None:
            self.in_proj = _linear(packed, bias)
            weights = packed.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(_own(w, packed), None if b is None else _own(b, bias))
            for w, b in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.dropout = nn.Dropout(attention.dropout)
        self._is_packed: bool | None = None if packed is not None else False
        self.train(attention.training)

    def settle(self, called: Container[str], whole_heads: bool) -> None:
        """Keep the projections of one way of calling it.

        Args:
            called: names of its layers that are called.
            whole_heads: whether heads are as wide as they were, and as many as there is room for; else they
                are as many as they were.
        """
        for name in ("in_proj", "q_proj", "k_proj", "v_proj"):
            if name not in called:
                self._modules.pop(name, None)
        self._is_packed = "in_proj" in called
        if whole_heads:
            self.num_heads = self.out_proj.in_features // self.head_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention`."""
        batched = query.dim() == 3
        is_self = query is key and key is value
        axes = (0, 1) if self.batch_first else (1, 0)

        def whole(x: Tensor) -> Tensor:
            """(batch, length, features)."""
            return x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(*axes)

        first = whole(query)
        second = first if key is query else whole(key)
        third = first if value is query else second if value is key else whole(value)
        q, k, v = (self._heads(x) for x in self._project(first, second, third, is_self))
        mask = self._mask(q, key_padding_mask, attn_mask, batched)
        weights = None
        if need_weights or self.dropout.p > 0:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = self.dropout(weights) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not need_weights:
            weights = None
        elif average_attn_weights and weights is not None:
            weights = weights.mean(1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(*axes), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_self: bool) -> tuple[Tensor, ...]:
        """One layer for all three where the first call can do with one; later calls read the same weights."""
        if self._is_packed is None:
            self._is_packed = is_self
        if not self._is_packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if is_self:
            return tuple(self.in_proj(query).chunk(3, -1))
        return tuple(self.in_proj(x).chunk(3, -1)[i] for i, x in enumerate((query, key, value)))

    def _heads(self, x: Tensor) -> Tensor:
        """(batch, heads, length, features of one)."""
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, q: Tensor, padding: Tensor | None, scores: Tensor | None, batched: bool) -> Tensor | None:
        """What is added to (batch, heads, length, length of the keys)."""
        mask = None
        if scores is not None:
            mask = _added(scores, q)
            if mask.dim() == 3:  # (batch x heads, ...)
                mask = torch.unflatten(mask, 0, (-1, self.num_heads))
        if padding is not None:
            more = _added(padding, q)
            more = more[:, None, None] if batched else more[None, None, None]
            mask = more if mask is None else mask + more
        return mask


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Minus infinity where a mask of truth values says that nothing is to be seen."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, tensor.requires_grad)
            layer._parameters[name] = kept
    return layer


def _own(part: Tensor, whole: Tensor | None) -> Tensor:
    """Memory of its own for a part of a tensor, trained if that is."""
    if isinstance(part, nn.Parameter):
        return part
    return nn.Parameter(part.detach().clone(), whole is not None and whole.requires_grad)


def opens_attention(module: Any) -> bool:
    """Whether a module is multi-head attention that torch.fx can trace through once it is opened.

    What adds rows to keys and values (`add_bias_kv`, `add_zero_attn`), has hooks, or another forward is not.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return False
    if type(module).forward is not nn.MultiheadAttention.forward or module.add_zero_attn:
        return False
    return module.bias_k is None and not any(map(is_hooked, module.modules()))
