"""Products of activations: heads are narrowed exactly, and only where every operand can follow."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import Removal, analyse
from graphcomp.ir.program import Program
from graphcomp.onnx import export_onnx
from graphcomp.pipeline.verify import check, verify_pass
from tests.nets import scramble
from tests.removing import ByRows, half, random_scores, some

WIDTH, HEADS = 24, 3
KINDS = ("sdpa", "matmul", "bmm", "masked", "cross", "table", "einsum")
PACKINGS = ("reshape", "chunk", "apart")


class Attention(nn.Module):
    """Self (or cross) attention in the ways that networks write it."""

    def __init__(self, kind: str, packing: str) -> None:
        super().__init__()
        self.kind, self.packing = kind, packing
        self.scale = (WIDTH // HEADS) ** -0.5
        if packing == "apart":
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.randn(16, 16))
        self.table = nn.Parameter(torch.randn(31, HEADS))
        self.register_buffer("places", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, width = x.shape
        if self.packing == "reshape":
            packed = self.qkv(x).reshape(batch, tokens, 3, HEADS, width // HEADS)
            return tuple(packed.permute(2, 0, 3, 1, 4).unbind(0))
        parts = self.qkv(x).chunk(3, -1) if self.packing == "chunk" else (self.q(x), self.k(x), self.v(x))
        return tuple(p.reshape(batch, tokens, HEADS, -1).transpose(1, 2) for p in parts)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.kind == "cross":
            k = self.split(other)[1]
        if self.kind in ("sdpa", "cross"):
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.kind == "masked":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=0.3)
        elif self.kind == "bmm":
            flat = [t.reshape(-1, t.shape[2], t.shape[3]) for t in (q, k, v)]
            scores = torch.bmm(flat[0] * self.scale, flat[1].transpose(1, 2)).softmax(-1)
            y = torch.bmm(scores, flat[2]).reshape(v.shape)
        elif self.kind == "einsum":
            scores = torch.einsum("bhid, bhjd -> bhij", q * self.scale, k).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", scores, v)
        elif self.kind == "table":
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            y = (scores + self.table[self.places].permute(2, 0, 1)).softmax(-1) @ v
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Patches, one attention, a head."""

    def __init__(self, kind: str, packing: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.attention = Attention(kind, packing)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Any:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens, tokens.flip(1))).mean(1))


HEADLESS = ("keys first, normalised",)
"""Its column of ones is every head's."""


def by_heads(program: Program) -> Removal:
    """One of three heads goes, and half of everything else."""
    channels = analyse(program, granularity="head")
    marks = half(channels).gone
    for group in channels.removable:
        if len(group.channels) == HEADS:
            marks[group.channels[1]] = True
    removal, kept = Removal(channels, marks).feasible(random_scores(channels))
    assert not kept
    return removal


def traced(kind: str, packing: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Program]:
    model = scramble(Net(kind, packing), 0).to(dtype).eval()
    return model, graphcomp.trace(model, torch.zeros(1, 3, 16, 16, dtype=dtype))


def narrowed(program: Program) -> Removal:
    channels = analyse(program)
    found, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    return found


@pytest.mark.parametrize(("kind", "packing"), list(product(KINDS, PACKINGS)))
def test_heads_are_narrowed_exactly(kind: str, packing: str) -> None:
    _, program = traced(kind, packing)
    removal = narrowed(program)
    packed = packing == "reshape" or packing == "chunk"
    assert len(removal.rows[f"attention.{'qkv' if packed else 'q'}.weight"]) == WIDTH // 2 * (
        3 if packed else 1
    )
    verify_pass(ByRows(), program, removal.rows)
    smaller = removal.apply("test")
    check(smaller)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), removal.mask()(x), rtol=0, atol=1e-12)
    assert not torch.allclose(smaller(x), program(x), atol=1e-6)


@pytest.mark.parametrize("pick", ["unbind", "items"])
def test_one_head_out_of_one_reshape_is_narrowed(pick: str) -> None:
    """q, k and v vary along one axis each, and keep equal widths all the same."""

    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            packed = self.qkv(tokens).reshape(len(x), 16, 3, 1, WIDTH).permute(2, 0, 3, 1, 4)
            q, k, v = packed.unbind(0) if pick == "unbind" else (packed[0], packed[1], packed[2])
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head((tokens + self.out(y)).mean(1))

    model = scramble(OneHead(), 0).double().eval()
    program = graphcomp.trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    removal = narrowed(program)
    assert len(removal.rows["qkv.weight"]) == 3 * WIDTH // 2
    verify_pass(ByRows(), program, removal.rows)


class Compared(nn.Module):
    """Scores of q with a table, at places that are computed of sizes."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.table = nn.Parameter(torch.randn(rows, WIDTH))

    def places(self, x: Tensor) -> Tensor:
        here = torch.arange(x.shape[1], device=x.device)
        return (here[:, None] * 1.0 - here[None, :] + x.shape[1] - 1).long()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        beside = torch.einsum("bqc,qkc->bqk", q, self.table[self.places(tokens)])
        return self.head((tokens + (q @ k.transpose(1, 2) + beside).softmax(-1) @ v).mean(1))


@pytest.mark.parametrize("rows", [31, 40], ids=["every row is read", "some rows are not"])
def test_places_of_a_table_that_follow_from_sizes(rows: int) -> None:
    class OneSize(Compared):
        def places(self, x: Tensor) -> Tensor:
            assert x.shape[1] == 16
            return super().places(x)

    model = scramble(OneSize(rows), 0).double().eval()
    program = graphcomp.trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    removal = narrowed(program)
    assert len(removal.rows["q.weight"]) == WIDTH // 2
    verify_pass(ByRows(), program, removal.rows)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)


def test_places_of_a_table_that_follow_the_image_keep_its_channels() -> None:
    program = graphcomp.trace(Compared(40).eval(), torch.zeros(1, 3, 16, 16))
    assert not program.interface.specialised
    pinned = {g.pinned[1] for g in analyse(program).groups if g.pinned}
    assert "einsum meets no channels along them" in pinned


@pytest.mark.parametrize("packing", PACKINGS)
def test_dead_widths_go_without_loss(packing: str) -> None:
    """Against the original module: what is zero on both sides of every product is not missed."""
    model, _ = traced("sdpa", packing)
    gone = [1, 4, 6]
    with torch.no_grad():
        for name, p in model.attention.named_parameters():
            if name.split(".")[0] in ("q", "k", "v", "qkv"):
                rows = p.reshape(-1, HEADS, WIDTH // HEADS, *p.shape[1:])
                rows[:, :, gone] = 0
    program = graphcomp.trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    channels = analyse(program)
    marks = channels.marks()
    for group in channels.removable:
        if "attention.out" in group.readers or any(".q" in layer for layer in group.producers):
            marks[group.channels[gone]] = True
    removal = Removal(channels, marks)
    assert len(removal) >= len(gone)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(removal.apply("test")(x), model(x), rtol=0, atol=1e-12)


def test_the_scale_stays_what_it_was() -> None:
    """The default scale follows the width; a narrowed head must go on with the old one."""
    _, program = traced("sdpa", "apart")
    (node,) = (n for n in program.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert node.kwargs["scale"] == (WIDTH // HEADS) ** -0.5
    smaller = narrowed(program).apply("test")
    (node,) = (n for n in smaller.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert node.kwargs["scale"] == (WIDTH // HEADS) ** -0.5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "packing"), [("sdpa", "reshape"), ("matmul", "apart"), ("bmm", "chunk")])
def test_a_narrowed_network_is_exported(kind: str, packing: str, tmp_path: Path) -> None:
    _, program = traced(kind, packing, torch.float32)
    smaller = narrowed(program).apply("test")
    assert max(export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-4


LEFT_ALONE = {
    "channels by channels": lambda m, x: m.a(x).flatten(2) @ m.b(x).flatten(2).transpose(1, 2),
    "one side only": lambda m, x: m.weight @ m.a(x).flatten(2).transpose(1, 2).transpose(1, 2),
    "heads that are mixed": lambda m, x: (
        m.a(x).mean((2, 3))[:, :, None, None] * m.mixed @ m.b(x)[:, :, None].flatten(3)
    ),
    "tokens of an input": lambda m, x: x.flatten(2) @ m.a(x).flatten(2).transpose(1, 2),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_does_not_follow_is_exact_or_left_alone(name: str) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("mixed", torch.randn(1, 1, 5, 1))

        def forward(self, x: Tensor) -> Any:
            return LEFT_ALONE[name](self, x).mean(-1)

    model = scramble(Other(), 0).double().eval()
    program = graphcomp.trace(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    channels = analyse(program)
    removal, _ = half(channels).feasible(random_scores(channels))
    if len(removal):
        verify_pass(ByRows(), program, removal.rows)


# ---------------------------------------------------------------------- channels by channels

TABLES = {
    "cross covariance": lambda m, q, k, v: (
        ((F.normalize(q, dim=-2).transpose(-2, -1) @ F.normalize(k, dim=-2)) * m.heat).softmax(-1)
        @ v.transpose(-2, -1)
    ).transpose(-2, -1),
    "cross covariance by einsum": lambda m, q, k, v: torch.einsum(
        "bhij,bhnj->bhni", torch.einsum("bhni,bhnj->bhij", q, k).mul(0.3).softmax(dim=3), v
    ),
    "mixed along the rows": lambda m, q, k, v: (
        v @ nn.functional.dropout((q.transpose(-2, -1) @ k).softmax(-2), 0.5, False).permute(0, 1, 3, 2)
    ),
    "keys first": lambda m, q, k, v: q @ (k.softmax(-2).transpose(-2, -1) @ v),
    "keys first, normalised": lambda m, q, k, v: m.normalised(q.relu(), k.relu(), v),
    "a table of two heads' widths": lambda m, q, k, v: torch.einsum("bhnd,bhde->bhne", q, k.mT @ v).sigmoid(),
}


class Tables(Attention):
    """Attention that never compares tokens."""

    def __init__(self, way: str, packing: str) -> None:
        super().__init__("table", packing)
        self.way = way
        self.heat = nn.Parameter(torch.rand(HEADS, 1, 1))

    @staticmethod
    def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The sum that softmax would divide by, as one more column."""
        y = q @ (k.transpose(-1, -2) @ F.pad(v, (0, 1), value=1.0))
        return y[..., :-1] / (y[..., -1:] + 1e-5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = TABLES[self.way](self, *self.split(x))
        return self.out(y.transpose(1, 2).flatten(2))


def with_tables(way: str, packing: str, dtype: torch.dtype = torch.float64) -> Program:
    model = Net("table", packing)
    model.attention = Tables(way, packing)
    return graphcomp.trace(scramble(model, 0).to(dtype).eval(), torch.zeros(1, 3, 16, 16, dtype=dtype))


@pytest.mark.parametrize(("way", "packing"), list(product(TABLES, PACKINGS)))
def test_channels_that_meet_channels_go_exactly(way: str, packing: str) -> None:
    program = with_tables(way, packing)
    channels = analyse(program)
    layers = ("q", "k", "v") if packing == "apart" else ("qkv",)
    made = {n: len(rows) for n, rows in narrowed(program).rows.items() if n.split(".")[1] in layers}
    assert made == {f"attention.{name}.weight": WIDTH * 3 // len(layers) // 2 for name in layers}
    for seed in range(3):
        removal, kept = some(channels, seed).feasible(random_scores(channels, seed))
        assert not kept
        verify_pass(ByRows(), program, removal.rows)
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("way", TABLES)
def test_networks_with_tables_are_exported(way: str, tmp_path: Path) -> None:
    smaller = narrowed(with_tables(way, "reshape", torch.float32)).apply("test")
    assert max(export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-4


def test_two_tables_are_contracted_along_both_axes() -> None:
    """Two masks in front of one operand."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 8, 1) for _ in range(4))
            self.head = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Any:
            a, b, c, d = (layer(x).flatten(2) for layer in self.layers)
            both = torch.einsum("bij,bij->b", torch.einsum("bin,bjn->bij", a, b), (c @ d.mT).sin())
            return self.head(both.unsqueeze(1).sin())

    program = graphcomp.trace(
        scramble(Two(), 0).double().eval(), torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    )
    removal = narrowed(program)
    assert {len(rows) for rows in removal.rows.values()} == {4} and len(removal.rows) == 4
    verify_pass(ByRows(), program, removal.rows)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)
    assert not torch.allclose(removal.mask()(x), program(x), atol=1e-6)


ENDS = {
    "a number of its columns": lambda m, s: s / s.shape[-1],
    "a variance": lambda m, s: s.var((-2, -1)),
    "flattened": lambda m, s: s.flatten(1),
    "as wide as it": lambda m, s: s * m.wide,
    "its columns": lambda m, s: s[:, :, 2:],
    "added to itself": lambda m, s: s + s.transpose(2, 1),
    "cumulated": lambda m, s: s.cumsum(-1),
    "returned": lambda m, s: s,
    "through a layer": lambda m, s: m.layer(s),
}


@pytest.mark.parametrize("end", ENDS)
def test_tables_that_end_otherwise_keep_their_second_axis(end: str) -> None:
    """Exact, and the first axis may go where the end lets it."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.layer = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.register_buffer("wide", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Any:
            return ENDS[end](self, self.a(x).flatten(2) @ self.b(x).flatten(2).transpose(1, 2))

    program = graphcomp.trace(
        scramble(Table(), 0).double().eval(), torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    )
    channels = analyse(program)
    assert not channels.may_go[channels.group_of("b")[0].channels].any()
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    if len(removal):
        verify_pass(ByRows(), program, removal.rows)


MET = {
    "summed over both": lambda m, a, b: (a @ b.mT).sin().sum((1, 2)).unsqueeze(1),
    "its columns' mean": lambda m, a, b: (a @ b.mT).sin().mean(-1),
    "its columns' largest": lambda m, a, b: (a @ b.mT).max(-1)[0],
    "less their largest": lambda m, a, b: ((t := a @ b.mT) - t.amax(-1, keepdim=True).expand_as(t)).exp() @ b,
    "two of them": lambda m, a, b: ((a @ b.mT).sin() + (a @ b.mT).cos()) @ b,
    "rows times columns": lambda m, a, b: (a.mean(2)[:, :, None] * b.mean(2)[:, None]).tanh() @ b,
    "rows and columns, summed": lambda m, a, b: (a.mean(2)[:, :, None] + b.mean(2)[:, None]).exp().sum(2),
}
"""What becomes of two layers' channels that meet each other in a table."""


@pytest.mark.parametrize("way", MET)
def test_tables_are_reduced_and_compared_exactly(way: str) -> None:
    class Met(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 6, 1)
            with torch.no_grad():
                width = self.met(torch.zeros(1, 3, 4, 4)).flatten(1).shape[1]
            self.head = nn.Linear(width, 3)

        def met(self, x: Tensor) -> Tensor:
            return MET[way](self, self.a(x).flatten(2), self.b(x).flatten(2))

        def forward(self, x: Tensor) -> Any:
            return self.head(self.met(x).flatten(1).sin())

    program = graphcomp.trace(
        scramble(Met(), 0).double().eval(), torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    )
    channels = analyse(program)
    removal = narrowed(program)
    assert {name: len(rows) for name, rows in removal.rows.items()} == {"a.weight": 4, "b.weight": 3}
    for seed in range(4):
        removal, kept = some(channels, seed).feasible(random_scores(channels, seed))
        assert not kept
        verify_pass(ByRows(), program, removal.rows)
        x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)


EQUATIONS = {
    "contracted with a weight": ("bchw,cd->bdhw", lambda m, x: m.weight, "a", True),
    "contracted twice": ("bchw,bchw->bhw", lambda m, x: m.b(x), "ab", True),
    "aligned": ("bchw,bchw->bchw", lambda m, x: m.b(x), "ab", True),
    "aligned with a weight": ("bchw,cd->bcdhw", lambda m, x: m.weight, "a", True),
    "summed": ("bchw,bdhw->bdhw", lambda m, x: m.b(x), "ab", True),
    "implicit": ("abcd, ce", lambda m, x: m.weight[:4, :2], "a", True),
    "three of them": ("bchw,dc,bchw->bdh", lambda m, x: (m.weight.mT[:, :8], m.b(x)), "ab", True),
    "three, two of them tables": (
        "...chw,...dhw,...dh->...ch",
        lambda m, x: (m.b(x), m.b(x)[..., 0]),
        "ab",
        True,
    ),
    "repeated": ("bcii,cd->bdi", lambda m, x: m.weight, "a", False),
    "open": ("b...h,bd...h->bd...", lambda m, x: m.b(x).unsqueeze(1), "ab", True),
    "with an input's": ("bchw,bdhw->bchd", lambda m, x: x, "a", True),
    "meeting an input's": ("bchw,bchw->bhw", lambda m, x: x[:, :1].expand(-1, 8, -1, -1) * 1, "a", False),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_go_exactly_or_are_left_alone(name: str) -> None:
    equation, other, layers, goes = EQUATIONS[name]

    class Equation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.weight = nn.Parameter(torch.randn(8, 4))
            with torch.no_grad():
                width = self.product(torch.zeros(1, 3, 4, 4)).flatten(1).shape[1]
            self.head = nn.Linear(width, 3)

        def product(self, x: Tensor) -> Tensor:
            others = other(self, x)
            return torch.einsum(equation, self.a(x), *others if isinstance(others, tuple) else (others,))

        def forward(self, x: Tensor) -> Any:
            return self.head(self.product(x).flatten(1).sin())

    model = scramble(Equation(), 0).double().eval()
    program = graphcomp.trace(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    channels = analyse(program)
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    assert {layer: f"{layer}.weight" in removal.rows for layer in layers} == dict.fromkeys(layers, goes)
    verify_pass(ByRows(), program, removal.rows)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(removal.apply("test")(x), removal.mask()(x), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- whole heads


def check_heads(program: Program, packing: str) -> None:
    """The middle one of three goes from every projection, and nothing of the others."""
    removal = by_heads(program)
    width = WIDTH // HEADS
    gone = list(range(width, 2 * width))
    layers = ("q", "k", "v") if packing == "apart" else ("qkv",)
    made = {n.split(".")[1]: rows for n, rows in removal.rows.items() if n.split(".")[1] in layers}
    wanted = gone if packing == "apart" else [WIDTH * i + row for i in range(3) for row in gone]
    assert made == dict.fromkeys(layers, wanted)
    verify_pass(ByRows(granularity="head"), program, removal.rows)
    smaller = removal.apply("test")
    check(smaller)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(smaller(x), removal.mask()(x), rtol=0, atol=1e-12)
    assert not torch.allclose(smaller(x), program(x), atol=1e-6)


@pytest.mark.parametrize(("kind", "packing"), list(product(KINDS, PACKINGS)))
def test_heads_go_whole(kind: str, packing: str) -> None:
    check_heads(traced(kind, packing)[1], packing)


@pytest.mark.parametrize(
    ("way", "packing"), list(product([w for w in TABLES if w not in HEADLESS], PACKINGS))
)
def test_heads_that_never_compare_tokens_go_whole(way: str, packing: str) -> None:
    check_heads(with_tables(way, packing), packing)


def test_a_head_that_nobody_reads_goes_without_loss() -> None:
    model, _ = traced("table", "reshape")
    width = WIDTH // HEADS
    with torch.no_grad():
        model.attention.out.weight[:, width : 2 * width] = 0
    program = graphcomp.trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    channels = analyse(program, granularity="head")
    (group,) = (g for g in channels.removable if len(g.channels) == HEADS)
    smaller = Removal.of(channels, [group.channels[1]]).apply("test")
    assert smaller.tensors["attention.table"].shape == (31, HEADS - 1)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_a_criterion_takes_whole_heads(packed: bool, tmp_path: Path) -> None:
    """The one whose rows are small; the plan is replayed, and the file has two heads."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.attention(x, x if packed else x.flip(1), x)[0]).mean(1))

    model = scramble(Torch(), 0).eval()
    width = WIDTH // HEADS
    with torch.no_grad():
        for i in range(3):
            model.attention.in_proj_weight[i * WIDTH + width : i * WIDTH + 2 * width] *= 0.1
    program = graphcomp.trace(model, torch.randn(2, 5, 6))
    recipe = "l1{ratio=0.34, multiple=1, granularity=head, exclude=stem}"
    result = graphcomp.compile(program, recipe)
    smaller = result.program
    (plan,) = smaller.history
    assert plan["decisions"]["granularity"] == "head"
    name = "in_proj" if packed else "q_proj"
    assert set(range(width, 2 * width)) <= set(plan["decisions"]["rows"][f"attention.{name}.weight"])
    assert max(export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-4
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(graphcomp.apply(smaller, model)(x), smaller(x))
