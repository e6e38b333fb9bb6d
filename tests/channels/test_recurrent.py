"""Recurrent layers: inputs and hidden units go exactly, and torch's own are opened into ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcomp
from graphcomp.budget.cost import cost_of
from graphcomp.channels import Removal, analyse
from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.ir.recurrent import GruLayer, LstmLayer
from graphcomp.measure import macs, params_trainable
from graphcomp.measure.cost import layer_rows
from graphcomp.onnx import export_onnx
from graphcomp.pipeline.verify import check, verify_pass
from tests.nets import scramble
from tests.removing import ByRows, half, random_scores, some

WIDTH, UNITS = 12, 10


class Sequence(nn.Module):
    """A sequence of rows of an image, a recurrent layer, a head that reads some of what it yields."""

    def __init__(self, kind: Any, read: str = "last output", **settings: Any) -> None:
        super().__init__()
        self.read, self.first = read, settings.get("batch_first", False)
        self.has_cell = kind is nn.LSTM
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.rnn = kind(WIDTH, UNITS, **settings)
        self.head = nn.LazyLinear(3)
        self.start = nn.Parameter(torch.randn(2, 1, UNITS))
        self.begin = nn.Linear(WIDTH, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean(3)
        if self.read == "begun by a layer":
            h = self.begin(x.mean(2)).unsqueeze(0)
            states = (h, h.sin()) if self.has_cell else h
        elif self.read == "begun by a parameter":
            h = self.start[:1].expand(-1, x.shape[0], -1)
            states = (h, h) if self.has_cell else h
        elif self.read == "begun by zeros":
            h = torch.zeros(1, x.shape[0], UNITS, dtype=x.dtype)
            states = (h, h) if self.has_cell else h
        else:
            states = None
        y, last = self.rnn(x.transpose(1, 2) if self.first else x.permute(2, 0, 1), states)
        hidden = last[0] if isinstance(last, tuple) else last
        if self.read == "last state":
            return self.head(hidden[-1])
        if self.read == "all states":
            return self.head(
                torch.cat(
                    [hidden.transpose(0, 1).flatten(1), (last[-1] if isinstance(last, tuple) else hidden)[0]],
                    1,
                )
            )
        return self.head(y[:, -1] if self.first else y[-1])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without biases": {"bias": False},
    "both ways": {"bidirectional": True, "batch_first": True},
    "stacked": {"num_layers": 3, "dropout": 0.1},
    "stacked both ways": {"num_layers": 2, "bidirectional": True},
    "last state": {"read": "last state"},
    "last state of many": {"read": "last state", "num_layers": 2, "bidirectional": True},
    "all states": {"read": "all states", "num_layers": 2, "batch_first": True},
    "begun by a layer": {"read": "begun by a layer"},
    "begun by a parameter": {"read": "begun by a parameter", "batch_first": True},
    "begun by zeros": {"read": "begun by zeros"},
}


def built(kind: type[nn.Module], name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Program]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sequence(kind, **SETTINGS[name]).to(dtype).eval()
        x = torch.randn(1, 3, 6, 5, dtype=dtype)
        model(x)
    return scramble(model, 0), graphcomp.trace(model, x)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_inputs_and_units_go_exactly(kind: type[nn.Module], name: str) -> None:
    model, program = built(kind, name)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(program(x), model(x))
    layers = [p for p, m in program.called_modules().items() if isinstance(m, LstmLayer | GruLayer)]
    assert len(layers) == SETTINGS[name].get("num_layers", 1)
    channels = analyse(program)
    for choose, seeds in ((half, 1), (some, 4)):
        for seed in range(seeds):
            removal, kept = choose(channels, seed).feasible(random_scores(channels, seed))
            assert not kept
            verify_pass(ByRows(), program, removal.rows)
            smaller = removal.apply("test")
            check(smaller)
            torch.testing.assert_close(smaller(x), removal.mask()(x), rtol=0, atol=1e-12)
            assert params_trainable(smaller) == pytest.approx(cost_of("params", channels)(removal))
            assert macs(smaller) == pytest.approx(cost_of("macs", channels)(removal))
    removal, _ = half(channels).feasible(random_scores(channels))
    smaller = removal.apply("test")
    assert not torch.allclose(smaller(x), program(x), atol=1e-6)
    units = UNITS // 2
    for i, path in enumerate(layers):
        layer = smaller.layer(path)
        assert layer.hidden_size == units == layer.weight_hh.shape[1]
        assert layer.input_size == (units * (1 + layer.bidirectional) if i else WIDTH // 2)


def test_a_unit_without_effect_goes_without_loss() -> None:
    model, _ = built(nn.LSTM, "both ways")
    gone = [1, 4]
    with torch.no_grad():
        for end in ("", "_reverse"):
            getattr(model.rnn, f"weight_hh_l0{end}")[:, gone] = 0
        for unit in gone:
            model.head.weight[:, [unit, UNITS + unit]] = 0
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    program = graphcomp.trace(model, x)
    channels = analyse(program)
    (group,) = channels.group_of("rnn.layers.0")
    smaller = Removal.of(channels, group.channels[gone].tolist()).apply("test")
    assert smaller.layer("rnn.layers.0").hidden_size == UNITS - 2
    torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_narrowed_layers_are_saved_and_exported(kind: type[nn.Module], name: str, tmp_path: Path) -> None:
    _, program = built(kind, name, torch.float32)
    removal, _ = half(analyse(program)).feasible(random_scores(analyse(program)))
    smaller = removal.apply("test")
    save(smaller, tmp_path / "p")
    x = torch.randn(3, 3, 6, 5)
    assert torch.equal(load(tmp_path / "p")(x), smaller(x))
    assert max(export_onnx(smaller, tmp_path / "x.onnx", batches=(1, 3)).parity.values()) < 1e-5


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_one_sample_without_a_batch(kind: type[nn.Module]) -> None:
    """The first axis is time."""
    from graphcomp.ir.recurrent import OpenRecurrent

    module = kind(4, 5, num_layers=2, bidirectional=True).eval()
    x, h = torch.randn(7, 4), torch.randn(4, 5)
    opened = OpenRecurrent(module)
    opened.flatten_parameters()
    torch.testing.assert_close(opened(x), module(x))
    states = (h, h.sin()) if kind is nn.LSTM else h
    torch.testing.assert_close(opened(x, states), module(x, states))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_is_not_opened_is_left_alone() -> None:
    projected, hooked = nn.LSTM(4, 6, proj_size=3), nn.GRU(3, 6)
    hooked.register_forward_hook(lambda *_: None)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = projected, hooked
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.inner(x))[0])[0]

    program = graphcomp.trace(Both().eval(), torch.randn(1, 5, 4))
    assert {type(m) for m in program.called_modules().values()} >= {nn.LSTM, nn.GRU}
    assert not analyse(program).removable


@pytest.mark.parametrize("kind", [LstmLayer, GruLayer])
@pytest.mark.parametrize("both", [False, True])
def test_shapes_are_known_without_a_run(kind: type[nn.Module], both: bool) -> None:
    layer, x = kind(4, 5, bidirectional=both).eval(), torch.randn(7, 2, 4)
    shapes = [part.shape for part in layer(x)]
    layer.to("meta")
    assert [part.shape for part in layer(x.to("meta"))] == shapes
    state = torch.empty(1 + both, 2, 6, device="meta")
    for given in ((x[..., :3].to("meta"),), (x.to("meta"), state)):
        with pytest.raises(RuntimeError, match="found widths"):
            layer(*given)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_matrices_count_once_a_step_of_time(kind: type[nn.Module], gates: int) -> None:
    _, program = built(kind, "stacked both ways")
    rows = {row.name: row for row in layer_rows(program) if row.kind in ("LstmLayer", "GruLayer")}
    assert [(r.in_channels, r.out_channels) for r in rows.values()] == [(WIDTH, 2 * UNITS), (2 * UNITS,) * 2]
    steps = 6
    for row in rows.values():
        assert row.macs == steps * 2 * gates * UNITS * (row.in_channels + UNITS)
        assert row.params == 2 * gates * UNITS * (row.in_channels + UNITS + 2)
    others = sum(row.macs for row in layer_rows(program) if row.name not in rows)
    assert macs(program) == others + sum(row.macs for row in rows.values())
