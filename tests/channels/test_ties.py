"""Weights that several layers share, in all the roles that a weight can have, and tables of embeddings."""

from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.channels import analyse
from graphcomp.channels.analysis import WEIGHT_AS_TENSOR
from graphcomp.ir.tracing import trace
from graphcomp.pipeline.verify import check, verify_pass
from tests.nets import Net
from tests.removing import ByRows, half, random_scores

WORDS = torch.randint(0, 20, (1, 7), generator=torch.Generator().manual_seed(0))
IMAGE = torch.zeros(1, 3, 8, 8)


def autoencoder() -> Net:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b, c = (cast(nn.Conv2d, m.get_submodule(name)) for name in "abc")
        y = F.conv_transpose2d(c(b(a(x).relu()).relu()).relu(), b.weight, padding=1)
        return F.conv_transpose2d(y.relu(), a.weight, padding=1)

    return Net(run, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 8, 3, padding=1), c=nn.Conv2d(8, 8, 1))


def mirrored() -> nn.Sequential:
    there, back = (
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.ConvTranspose2d(8, 8, 3, padding=1, bias=False),
    )
    back.weight = there.weight
    return nn.Sequential(nn.Conv2d(3, 8, 1), there, nn.ReLU(), back, nn.Conv2d(8, 2, 1))


def language() -> nn.Sequential:
    table, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, nn.Linear(8, 8), nn.ReLU(), head)


def hooked() -> nn.Sequential:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    second.register_forward_hook(lambda m, x, y: y)
    return nn.Sequential(nn.Embedding(20, 8), first, nn.ReLU(), second, nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("net", "x"), [(autoencoder, IMAGE), (mirrored, IMAGE), (language, WORDS), (hooked, WORDS)]
)
def test_one_weight_in_two_roles(net: Callable[[], nn.Module], x: Tensor) -> None:
    """Never half of a weight: the channels on both of its sides stay."""
    torch.manual_seed(0)
    program = trace(net().eval(), x)
    channels = analyse(program)
    assert not channels.removable
    pinned = {reason for g in channels.groups if g.pinned for _, reason in [g.pinned]}
    assert pinned & {"one weight makes these channels and reads them", WEIGHT_AS_TENSOR}


class Sentences(nn.Module):
    """Words as the rows of an image: convolutions over whole embeddings, as classifiers of texts have."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.layers = nn.ModuleList(nn.Conv2d(1, 6, (k, 8)) for k in (2, 3))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x).unsqueeze(1)
        parts = [layer(y).relu().squeeze(3).amax(2) for layer in self.layers]
        return cast(Tensor, self.head(torch.cat(parts, 1)))


def test_convolutions_over_embeddings_make_channels_of_their_own() -> None:
    channels = analyse(trace(Sentences().eval(), WORDS))
    assert [g.name for g in channels.removable] == ["layers.0", "layers.1"]


def test_embeddings_are_narrowed() -> None:
    program = trace(nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 2)).eval(), WORDS)
    drop = half(analyse(program))
    verify_pass(ByRows(), program, drop.rows)
    small = drop.apply("test")
    check(small)
    table = cast(nn.Embedding, small.layer("0", nn.Embedding))
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (20, 4, 0)
    assert tuple(table.weight.shape) == (20, 4)


def test_tables_that_renormalise_themselves_stay() -> None:
    program = trace(nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 2)).eval(), WORDS)
    assert not analyse(program).removable


class Shifted(nn.Module):
    """A table of zeros that only parts of are read, as files of shifts in time have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("table", torch.zeros(8, 1, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows = torch.cat([y, y], 2).permute(1, 0, 2, 3)
        table = cast(Tensor, self.table).expand(-1, x.shape[0], -1, -1)
        both = torch.cat([rows[:2], table[2:]])[:, :, 8:].permute(1, 0, 2, 3)
        return cast(Tensor, self.head(self.b(y + both)))


def test_what_nobody_reads_of_a_table_stays() -> None:
    """Half of the elements of its rows are nobody's, the others go with the channels."""
    program = trace(Shifted().eval(), IMAGE)
    channels = analyse(program)
    drop, _ = half(channels).feasible(random_scores(channels))
    verify_pass(ByRows(), program, drop.rows)
    check(drop.apply("test"))
    assert "b.weight" in drop.rows
