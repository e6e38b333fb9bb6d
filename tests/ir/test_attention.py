"""`nn.MultiheadAttention` opened: torch's own results in every form, and widths that can go."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.channels import analyse
from graphcomp.ir import load, op_name, save
from graphcomp.ir.attention import OpenAttention
from graphcomp.onnx import export_onnx
from graphcomp.pipeline.verify import check, verify_pass
from tests.removing import ByRows, half, random_scores

WIDTH, HEADS, LENGTH = 12, 3, 6

SETTINGS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "length first": {},
    "without bias": {"batch_first": True, "bias": False},
    "dropout": {"batch_first": True, "dropout": 0.3},
    "other widths": {"batch_first": True, "kdim": 5, "vdim": 7},
}


def masks(m: Any, kind: str, x: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What the module is told beside its operands."""
    scores = m.scores if dtype is torch.bool else m.added
    padding = m.padding if dtype is torch.bool else m.padded
    return {
        "none": {},
        "scores": {"attn_mask": scores},
        "padding": {"key_padding_mask": padding.expand(m.batch(x), -1)},
        "both": {"attn_mask": scores, "key_padding_mask": padding.expand(m.batch(x), -1)},
        "by head": {"attn_mask": scores.expand(m.batch(x) * HEADS, -1, -1)},
    }[kind]


class Net(nn.Module):
    """Attention in front of a layer that reads it, with masks of its own."""

    def __init__(self, settings: dict[str, Any], call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.call, self.first = call, bool(settings.get("batch_first"))
        self.embed = nn.Linear(3, WIDTH)
        self.k, self.v = (nn.Linear(3, settings.get(n, WIDTH)) for n in ("kdim", "vdim"))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.head = nn.Linear(WIDTH, 5)
        draw = torch.Generator().manual_seed(3)
        self.register_buffer("added", torch.randn(LENGTH, LENGTH, generator=draw))
        self.register_buffer("padded", torch.randn(1, LENGTH, generator=draw))
        self.register_buffer("scores", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))
        self.register_buffer("padding", torch.arange(LENGTH)[None] > 3)

    def batch(self, x: Tensor) -> Any:
        return x.size(0)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)

    def attend(self, x: Tensor, same: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Over the samples' rows, however the module wants its operands."""
        q = self.embed(x)
        k, v = (q, q) if same else (self.k(x), self.v(x))
        q, k, v = (
            (t if self.first else t.transpose(0, 1) for t in (q, k, v))
            if not same
            else [q if self.first else q.transpose(0, 1)] * 3
        )
        y, weights = self.attention(q, k, v, **options)
        return self.head(y if self.first else y.transpose(0, 1)), weights


def made(settings: dict[str, Any], call: Callable[[Any, Tensor], Any]) -> tuple[nn.Module, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(settings, call).double().eval()
        for p in model.parameters():
            nn.init.normal_(p, 0, 0.5)
    return model, graphcomp.trace(model, torch.zeros(1, LENGTH, 3, dtype=torch.float64))


def removed(program: Any) -> int:
    channels = analyse(program)
    removal, kept = half(channels).feasible(random_scores(channels))
    assert not kept
    verify_pass(ByRows(), program, removal.rows)
    check(removal.apply("test"))
    return len(removal)


@pytest.mark.parametrize(("settings", "weights"), list(product(SETTINGS, ["no", "mean", "each"])))
def test_every_setting_is_torchs_own(settings: str, weights: str) -> None:
    def call(m: Any, x: Tensor) -> Any:
        options = {"need_weights": weights != "no", "average_attn_weights": weights == "mean"}
        return m.attend(x, "kdim" not in SETTINGS[settings], **options)[: 1 + (weights != "no")]

    model, program = made(SETTINGS[settings], call)
    x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    for found, expected in zip(program(x), model(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert removed(program) >= WIDTH // 2 + 2 * (WIDTH // HEADS // 2)


@pytest.mark.parametrize(
    ("kind", "dtype", "weights"),
    list(product(["scores", "padding", "both", "by head"], [torch.bool, torch.float64], [True, False])),
)
def test_every_mask_is_torchs_own(kind: str, dtype: torch.dtype, weights: bool) -> None:
    def call(m: Any, x: Tensor) -> Any:
        return m.attend(x, need_weights=weights, **masks(m, kind, x, dtype))[0]

    model, program = made(SETTINGS["batch first"], call)
    x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(program(x), made({"batch_first": True}, lambda m, x: m.attend(x)[0])[1](x))
    assert removed(program) >= WIDTH // 2 + 2 * (WIDTH // HEADS // 2)


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "another's keys": lambda m, x: m.head(
        m.attention(e := m.embed(x), k := e.flip(1), k, need_weights=False)[0]
    ),
    "keys and values of two": lambda m, x: m.head(m.attention(e := m.embed(x), e.flip(1), e.sin())[0]),
    "one sample": lambda m, x: m.head(m.attention(e := m.embed(x).mean(0), e, e)[0]),
    "first itself, then another": lambda m, x: m.head(
        m.attention(y := m.attention(e := m.embed(x), e, e)[0], e, e)[0] + y
    ),
    "first another, then itself": lambda m, x: m.head(
        m.attention(y := m.attention(e := m.embed(x), k := e.flip(1), k)[0], y, y)[0]
    ),
    "causal": lambda m, x: m.attend(x, need_weights=False, attn_mask=m.scores, is_causal=True)[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_is_torchs_own(name: str) -> None:
    model, program = made(SETTINGS["batch first"], CALLS[name])
    x = torch.randn(1 if name == "one sample" else 4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    assert removed(program)
    projections = sum(t.numel() for n, t in program.tensors.items() if n.startswith("attention."))
    assert projections == sum(t.numel() for t in model.attention.parameters())  # nothing twice


def test_a_projection_for_all_three_is_one_layer() -> None:
    _, program = made(SETTINGS["batch first"], lambda m, x: m.attend(x, need_weights=False)[0])
    assert {t for t in program.called_modules() if t.startswith("attention")} == {
        "attention.in_proj",
        "attention.out_proj",
    }
    assert "scaled_dot_product_attention" in {op_name(program, n) for n in program.graph.nodes}


def test_the_model_stays_as_it_was() -> None:
    model, program = made(SETTINGS["batch first"], lambda m, x: m.attend(x)[0])
    assert type(model.attention) is nn.MultiheadAttention
    program.tensors["attention.in_proj.weight"].data.zero_()
    assert model.attention.in_proj_weight.abs().sum() > 0


def test_what_was_frozen_stays_frozen() -> None:
    with torch.random.fork_rng():
        model = Net(SETTINGS["batch first"], lambda m, x: m.attend(x, False)[0]).eval()
    model.attention.requires_grad_(False)
    program = graphcomp.trace(model, torch.zeros(1, LENGTH, 3))
    held = {n: p.requires_grad for n, p in program.module.named_parameters() if n.startswith("attention")}
    assert len(held) == 8 and not any(held.values())


LEFT = {
    "rows are added": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True),
    "zeros are added": lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_zero_attn=True),
    "hooks": lambda: _hooked(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)),
}


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, out: out)
    return module


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_opened_is_left_by_name(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(SETTINGS["batch first"], lambda m, x: m.attend(x)[0]).double().eval()
        model.attention = LEFT[name]().double().eval()
    program = graphcomp.trace(model, torch.zeros(1, LENGTH, 3, dtype=torch.float64))
    x = torch.randn(3, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    assert type(program.layer("attention")) is nn.MultiheadAttention
    (group,) = analyse(program).group_of("embed")
    assert group.pinned is not None and "MultiheadAttention" in group.pinned[1]


TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 20, batch_first=True),
    "encoder layer, norm first": lambda: nn.TransformerEncoderLayer(
        WIDTH, HEADS, 20, batch_first=True, norm_first=True, activation="gelu"
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 4, 20, batch_first=True), 2, nn.LayerNorm(WIDTH)
    ),
    "length first": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 20), 2, enable_nested_tensor=False
    ),
}


class Tokens(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(3, WIDTH), inner, nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(x)))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_torchs_transformers_are_traced_through(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens(TRANSFORMERS[name]()).double().eval()
    program = graphcomp.trace(model, torch.zeros(1, LENGTH, 3, dtype=torch.float64))
    if name == "length first":  # samples are mixed there, and one sample says nothing of two
        x = torch.randn(1, LENGTH, 3, dtype=torch.float64)
    else:
        x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    groups = {g.name for g in analyse(program).removable}
    assert "embed" in groups
    removed(program)
    save(program, tmp_path / "p")
    torch.testing.assert_close(load(tmp_path / "p")(x), program(x))


def test_a_decoder_layer_is_traced_through() -> None:
    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, WIDTH), nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5)
            self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 20, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.a(x), self.b(x.flip(1))))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Decoding().double().eval()
    program = graphcomp.trace(model, torch.zeros(1, LENGTH, 3, dtype=torch.float64))
    x = torch.randn(4, LENGTH, 3, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x), rtol=1e-12, atol=1e-12)
    removed(program)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [True, False])
def test_an_opened_network_is_exported(weights: bool, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(SETTINGS["batch first"], lambda m, x: m.attend(x, need_weights=weights)[0]).eval()
    program = graphcomp.trace(model, torch.zeros(1, LENGTH, 3))
    exported = export_onnx(program, tmp_path / "x.onnx", batches=(1, 3))
    assert not exported.fallback and max(exported.parity.values()) < 1e-4


def test_dropout_of_attention_trains() -> None:
    """As in torch's module: in training some weights are zero."""
    attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
    opened = OpenAttention(attention).train()
    x = torch.randn(2, LENGTH, WIDTH)
    assert not torch.allclose(opened(x, x, x)[0], opened(x, x, x)[0])
