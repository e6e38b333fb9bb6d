"""Orders of a weight's columns: found once, packed and unpacked without loss."""

import base64
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graphcomp.base import cache
from graphcomp.errors import PassError
from graphcomp.passes.dct import orders
from graphcomp.passes.dct.layout import Layout
from graphcomp.passes.dct.ordering import chain
from graphcomp.passes.dct.orders import by_chain, by_norm, packed, unpacked


def layout(columns: int, rows: int = 4) -> Layout:
    return Layout(layer="conv", weights=rows * columns, rows=rows, terms=1)


def weight(columns: int, rows: int = 4) -> Tensor:
    return torch.randn(columns, rows, 1, 1, generator=torch.Generator().manual_seed(columns))


def test_the_chain_is_that_of_the_reshaped_weight() -> None:
    w = weight(60)
    expected = chain(w.double().reshape(4, 60).numpy(), "manhattan", "l1")
    assert by_chain(w, layout(60), "manhattan", "l1").tolist() == expected.tolist()


def test_by_norm() -> None:
    """Largest first, ties to the smallest column."""
    w = torch.tensor([[1.0, 3.0, 0.0, 4.0, 0.0], [-1.0, 4.0, 0.0, -3.0, 9.0]])
    assert by_norm(w, layout(5, 2)).tolist() == [4, 1, 3, 0, 2]


def test_a_chain_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk by weight, rows, distance and start; not by the number of terms."""
    calls: list[tuple[int, int]] = []

    def counted(x: Any, *options: Any) -> Any:
        calls.append(x.shape)
        return chain(x, *options)

    monkeypatch.setattr(orders, "chain", counted)
    monkeypatch.setattr(orders, "CACHED", 100)
    w = weight(120)
    first = by_chain(w, layout(120), "euclidean", "l2")
    assert torch.equal(by_chain(w, layout(120).model_copy(update={"terms": 60}), "euclidean", "l2"), first)
    assert len(calls) == 1
    assert torch.equal(first, torch.from_numpy(chain(w.double().reshape(4, 120).numpy())))
    by_chain(w, layout(240, 2), "euclidean", "l2")
    by_chain(w, layout(120), "manhattan", "l2")
    by_chain(w, layout(120), "euclidean", "l1")
    by_chain(w + 1, layout(120), "euclidean", "l2")
    assert len(calls) == 5
    folder = cache.folder()
    assert folder is not None and len(list((folder / "order").iterdir())) == 5


def test_short_chains_are_not_kept() -> None:
    by_chain(weight(50), layout(50), "euclidean", "l2")
    folder = cache.folder()
    assert folder is not None and not folder.exists()


def test_the_layer_with_a_bad_weight_is_named() -> None:
    w = weight(20)
    w[3] = float("nan")
    with pytest.raises(PassError, match="conv: order: found NaN or infinite weights"):
        by_chain(w, layout(20), "euclidean", "l2")


@pytest.mark.parametrize("columns", [1, 256, 257, 40_000, 70_000])
def test_packed_orders_come_back(columns: int) -> None:
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
    text = packed(order)
    assert torch.equal(unpacked({"conv": text}, layout(columns)), order)
    assert len(text) < 4 / 3 * columns * (1 if columns <= 256 else 2 if columns <= 65_536 else 4) + 50


def test_packed_orders_are_little_endian_whatever_the_machine() -> None:
    raw = zlib.decompress(base64.b64decode(packed(torch.arange(300))))
    assert np.array_equal(np.frombuffer(raw, "<i2"), np.arange(300))


@pytest.mark.parametrize(
    ("bulk", "message"),
    [
        ({}, "conv: found no order, expected one under bulk; use the plan as it was saved"),
        ({"conv": "!"}, "conv: found a damaged order"),
        ({"conv": base64.b64encode(b"no zlib").decode()}, "conv: found a damaged order"),
        ({"conv": packed(torch.arange(5))}, "conv: found an order of 5 columns, expected each of 6 once"),
        (
            {"conv": packed(torch.tensor([0, 1, 2, 3, 4, 4]))},
            "found an order of 6 columns, expected each of 6",
        ),
    ],
)
def test_other_texts_are_refused(bulk: dict[str, str], message: str) -> None:
    with pytest.raises(PassError, match=message):
        unpacked(bulk, layout(6))
