"""Learning rates that are found: networks that no usual rate trains, and what trials leave behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.ir.program import Program
from graphcomp.records import RateTrial
from graphcomp.train.options import Loss, Seen, cross_entropy
from graphcomp.train.rates import choose
from graphcomp.train.training import Fitted, fit
from tests.learnable import make_split, normalised_net, plain_net, same, weights
from tests.training import Stops, options


def changed(program: Program, change: dict[str, Tensor]) -> Program:
    for name, value in change.items():
        program.tensors[name].data.copy_(value)
    return program


def sharp_net(by: float = 1000.0) -> Program:
    """Computes what `plain_net` does; along its first weights the loss is `by` squared times as sharp."""
    program = plain_net()
    old = weights(program)
    first = {name: old[name] / by for name in ("0.weight", "0.bias")}
    return changed(program, {**first, "2.weight": old["2.weight"] * by})


def shifted_net() -> Program:
    """A trained network whose running statistics are not its batches'; scales and shifts make up for it."""
    program = fit(normalised_net(), make_split(), options(epochs=10)).program
    change = {}
    for name, norm in program.modules.items():
        if isinstance(norm, nn.BatchNorm2d):
            mean, variance = (program.tensors[f"{name}.running_{what}"] for what in ("mean", "var"))
            spread = (variance + norm.eps).sqrt()
            scale = norm.weight.detach() / spread
            change[f"{name}.running_mean"] = mean + 3 * spread
            change[f"{name}.running_var"] = 16 * variance
            change[f"{name}.weight"] = scale * (16 * variance + norm.eps).sqrt()
            change[f"{name}.bias"] = norm.bias.detach() + scale * 3 * spread
    return changed(program, change)


def distance(seen: Seen) -> Tensor:
    return F.mse_loss(seen.outputs, seen.teacher_outputs)


def found(
    program: Program, teacher: Program | None = None, loss: Loss | None = None, **changes: Any
) -> Fitted:
    asked = options(**{"lr": "auto", "epochs": 10, **changes})
    return fit(program, make_split(), asked, held_out=make_split(40, 2), teacher=teacher, loss=loss)


@pytest.mark.slow
def test_a_sharp_loss_is_trained() -> None:
    """So is that of a network whose normalisations are folded: usual rates leave it with the first step."""
    usual = fit(sharp_net(), make_split(), options(epochs=10), held_out=make_split(40, 2)).record
    assert usual.held_out == usual.epochs[0].held_out == 0.35 and usual.rates == []
    record = found(sharp_net()).record
    assert record.held_out == 1.0
    losses = {trial.rate: trial.loss for trial in record.rates}
    assert record.lr is not None and record.clip is not None and (losses[record.lr] or 0) < 0.1
    assert f"lr {record.lr:.2g} of {len(losses)} trials" in record.summary


@pytest.mark.slow
def test_a_smooth_loss_has_a_large_rate() -> None:
    assert (found(plain_net()).record.lr or 0) > 10 * (found(sharp_net()).record.lr or 1)


@pytest.mark.slow
def test_statistics_stay_where_batches_say_another_thing() -> None:
    """What is to be learned is small beside the noise of a batch."""
    teacher = shifted_net()
    program = changed(shifted_net(), {"8.weight": 0.9 * teacher.tensors["8.weight"].detach()})
    start = {name: t.clone() for name, t in program.tensors.items() if "running" in name}

    def learn(**changes: Any) -> Fitted:
        return found(program, teacher=teacher, loss=distance, **changes)

    fitted = learn()
    assert fitted.record.statistics == "frozen" and "statistics frozen" in fitted.record.summary
    assert all(torch.equal(fitted.program.tensors[name], t) for name, t in start.items())
    losses = [record.epochs[-1].loss or 0 for record in (fitted.record, learn(statistics="batch").record)]
    assert losses[1] > 10 * losses[0]


@pytest.mark.slow
def test_statistics_of_batches_where_they_serve() -> None:
    fitted = found(normalised_net())
    assert fitted.record.statistics == "batch" and {t.statistics for t in fitted.record.rates} == {"batch"}
    assert not torch.equal(
        fitted.program.tensors["1.running_mean"], normalised_net().tensors["1.running_mean"]
    )


def test_frozen_statistics_are_asked_for() -> None:
    program = normalised_net()
    frozen = fit(program, make_split(), options(statistics="frozen"), held_out=make_split(40, 2)).program
    still = {name for name, t in frozen.tensors.items() if torch.equal(t, program.tensors[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert still == {name for name in program.tensors if name.endswith(kinds)}


@pytest.mark.slow
def test_what_was_asked_for_stays() -> None:
    record = found(normalised_net(), clip=0.3, statistics="frozen").record
    assert (record.clip, record.statistics) == (0.3, "frozen")
    assert {t.statistics for t in record.rates} == {"frozen"}
    reestimated = found(shifted_net(), bn_reestimate=48).record
    assert {t.statistics for t in reestimated.rates} == {"batch"}


def test_the_largest_of_rates_that_are_as_good() -> None:
    def trial(rate: float, loss: float | None, statistics: str = "batch") -> RateTrial:
        return RateTrial(rate=rate, statistics=statistics, loss=loss)

    worse, near, best, far = trial(0.1, None), trial(0.03, 0.29), trial(0.01, 0.2), trial(0.003, 0.4)
    assert choose([worse, near, best, far], start=1.2) is near  # gains 0.91 of 1.0
    assert choose([worse, near, best, far], start=1.0) is best
    assert choose([worse, best, trial(1.0, 0.21, "frozen")], start=1.2) is best
    assert choose([trial(0.1, 3.0), trial(0.03, 2.0)], start=1.0).loss == 2.0


@pytest.mark.slow
def test_trials_leave_no_trace() -> None:
    """The training is the one that has the rate that was found from the beginning."""
    auto = found(normalised_net())
    again = found(normalised_net(), lr=auto.record.lr, clip=auto.record.clip)
    assert same(auto.program, again.program)
    program = normalised_net()
    before, random = weights(program), torch.random.get_rng_state()
    found(program)
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.slow
def test_goes_on_with_what_was_found(tmp_path: Path) -> None:
    def run(state: Path | None, loss: Any = None) -> Fitted:
        asked = options(lr="auto", epochs=10)
        return fit(sharp_net(), make_split(), asked, held_out=make_split(40, 2), loss=loss, state=state)

    whole, calls = run(None), 0

    def stop_late(seen: Seen) -> Tensor:
        nonlocal calls
        calls += 1
        return stops(seen) if calls > len(whole.record.rates) * 12 + 20 else cross_entropy()(seen)

    stops, state = Stops(0), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt, match="stopped after step"):
        run(state, stop_late)
    rest = run(state)
    assert rest.record.resumed == 1 and rest.record.rates == whole.record.rates
    assert same(rest.program, whole.program)


def test_stopped_while_rates_are_tried() -> None:
    with pytest.raises(KeyboardInterrupt, match="while rates were tried"):
        fit(sharp_net(), make_split(), options(lr="auto"), loss=Stops(3))
