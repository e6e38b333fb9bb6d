"""The choice of arithmetic: by measurement, once, and never for a doubtful gain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.data.augment import Unchanged
from graphcomp.ir.program import Program
from graphcomp.records import ModeTrial
from graphcomp.train import mode
from graphcomp.train.mode import choose_mode, fastest, measure
from graphcomp.train.network import Mode
from graphcomp.train.options import Task, TrainOptions, cross_entropy, is_correct
from graphcomp.train.training import fit
from tests.learnable import make_split, normalised_net, same, weights
from tests.tiny import traced

PLAIN, WIDE, HALF = Mode(), Mode("float32", "channels_last"), Mode("bf16", "channels_last")


def trials(*times: float | None) -> list[ModeTrial]:
    modes = (PLAIN, WIDE, HALF)
    return [
        ModeTrial(precision=m.precision, layout=m.layout, ms=t) for m, t in zip(modes, times, strict=True)
    ]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((10, 5, 2), HALF),
        ((10, 5, 6), WIDE),
        ((10, 9.8, 9.9), PLAIN),  # not worth it
        ((10, None, None), PLAIN),
        ((None, 5, 4.9), WIDE),
        ((None, None, None), PLAIN),
    ],
)
def test_fastest(times: tuple[float | None, ...], expected: Mode) -> None:
    assert fastest([PLAIN, WIDE, HALF], trials(*times)) == expected


def task(program: Program, **options: Any) -> Task:
    made = TrainOptions(**{"batch": 16, "epochs": 50, **options})
    return Task(program, make_split(), made, None, cross_entropy(), is_correct, (), None, Unchanged(), seed=0)


def test_measured_without_a_trace() -> None:
    program = normalised_net()
    before, state = weights(program), torch.random.get_rng_state()
    with torch.random.fork_rng():
        found = measure(task(program), [PLAIN, HALF])
    assert [(t.precision, t.layout) for t in found] == [("float32", "contiguous"), ("bf16", "channels_last")]
    assert all(t.ms is not None and t.ms > 0 for t in found)
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    assert torch.equal(torch.random.get_rng_state(), state)


class Views(nn.Module):
    """`view` refuses what channels_last makes of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(x.size(0), -1))  # type: ignore[no-any-return]


def test_what_does_not_run_is_no_choice() -> None:
    found = measure(task(traced(Views(), 1, 3, 8, 8)), [PLAIN, WIDE])
    assert found[0].ms is not None and found[1].ms is None
    assert fastest([PLAIN, WIDE], found) == PLAIN


def counted(monkeypatch: pytest.MonkeyPatch, *times: float | None) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(mode, "measure", lambda task, modes: calls.append(1) or trials(*times))
    return calls


def test_measured_once_for_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times of a second run could decide otherwise, and its numbers would be others."""
    monkeypatch.setenv("GRAPHCOMP_CACHE", str(tmp_path))
    calls = counted(monkeypatch, 9, None, 3)
    first = choose_mode(task(normalised_net()), lambda message, fraction: None)
    again = choose_mode(task(normalised_net()), lambda message, fraction: None)
    assert first == again == (HALF, trials(9, None, 3)) and calls == [1]
    choose_mode(task(normalised_net(), batch=8), lambda message, fraction: None)
    assert calls == [1, 1]


def test_short_trainings_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch, 9, 5, 3)
    assert choose_mode(task(normalised_net(), max_steps=199), lambda m, f: None) == (PLAIN, [])
    assert choose_mode(task(normalised_net(), precision="bf16", layout="contiguous"), lambda m, f: None) == (
        Mode("bf16"),
        [],
    )
    assert not calls


@pytest.mark.slow
def test_a_training_says_what_it_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And goes on with it after an interruption, whatever would be measured then."""
    calls = counted(monkeypatch, 9, 3, 5)
    options = TrainOptions(batch=16, epochs=34)
    fitted = fit(normalised_net(), make_split(), options, state=tmp_path / "state")
    assert (fitted.record.precision, fitted.record.layout) == ("float32", "channels_last")
    assert fitted.record.trials == trials(9, 3, 5) and calls == [1]
    monkeypatch.setenv("GRAPHCOMP_CACHE", "")
    counted(monkeypatch, 1, 3, 5)
    again = fit(normalised_net(), make_split(), options, state=tmp_path / "state")
    assert same(again.program, fitted.program) and again.record.trials == trials(9, 3, 5)
