"""Training: equal to a loop by hand, to itself a second time, and to itself in several processes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphcomp.data.augment import CropAndFlip
from graphcomp.errors import DataError, PassError
from graphcomp.ir.program import Program
from graphcomp.train.batches import Batches, noise_seed
from graphcomp.train.loop import Average
from graphcomp.train.options import Seen, TrainOptions, cross_entropy
from graphcomp.train.training import fit
from tests.learnable import gap, make_split, normalised_net, plain_net, same, weights
from tests.processes import in_processes
from tests.training import Stops, options, trained

# ---------------------------------------------------------------------- against a loop by hand


def by_hand(program: Program, made: TrainOptions, optimiser: Callable[..., Any], **more: Any) -> Program:
    """The same batches through plain PyTorch."""
    net = program.clone().module.train()
    steps, split = made.steps(96), make_split()
    batches = Batches(split, made.batch, 1, CropAndFlip(1), 0)
    optimizer = optimiser(net.parameters(), made.lr, **more)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = made.rate(step, steps)
        (piece,) = batches(step)
        torch.manual_seed(noise_seed(0, step))
        optimizer.zero_grad()
        F.cross_entropy(net(*piece.inputs), piece.labels, label_smoothing=0.1).backward()
        if made.clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), made.clip)
        optimizer.step()
    return Program(net.eval(), program.example_inputs)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_sgd_is_torchs(schedule: str) -> None:
    made = options(schedule=schedule, momentum=0.8, weight_decay=1e-2, label_smoothing=0.1, clip=0.5)
    program = normalised_net(dropout=0.3)
    found = fit(program, make_split(), made, augmentation=CropAndFlip(1)).program
    expected = by_hand(program, made, torch.optim.SGD, momentum=0.8, weight_decay=1e-2)
    assert same(found, expected)


def test_adamw_is_torchs() -> None:
    made = options(optimizer="adamw", lr=1e-3, weight_decay=0.1, label_smoothing=0.1)
    found = fit(normalised_net(), make_split(), made, augmentation=CropAndFlip(1)).program
    assert same(found, by_hand(normalised_net(), made, torch.optim.AdamW, weight_decay=0.1))


def test_learns() -> None:
    fitted = fit(normalised_net(), make_split(), options(epochs=4), held_out=make_split(40, 2))
    rows = fitted.record.epochs
    assert [r.epoch for r in rows] == [0, 1, 2, 3, 4] and [r.steps for r in rows] == [0, 4, 8, 12, 16]
    assert rows[0].loss is None and rows[0].rate is None
    losses = [r.loss for r in rows[1:] if r.loss is not None]
    assert losses[-1] < 0.5 * losses[0]
    assert rows[-1].held_out is not None and rows[0].held_out is not None
    assert rows[-1].held_out > 0.8 > rows[0].held_out
    assert fitted.record.held_out == rows[fitted.record.kept_epoch].held_out
    assert fitted.record.samples_per_second and "held-out score" in fitted.record.summary


def test_reported_loss_is_the_mean_over_the_epochs_samples() -> None:
    """At a rate of almost nothing the network stays, and so does the loss of every sample."""
    program, split = plain_net(torch.float64), make_split(50)
    record = fit(program, split, options(lr=1e-12, epochs=1)).record
    (x,), y = next(iter(split.batches(50)))
    expected = F.cross_entropy(program(x.double()), y)
    assert record.epochs[1].loss == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------- values, not references


def test_the_program_stays_as_it_was() -> None:
    program = normalised_net()
    program.tensors["4.weight"].requires_grad_(False)
    before, state = weights(program), torch.random.get_rng_state()
    result = trained(program)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) and t.grad is None for n, t in program.tensors.items())
    assert not program.module.training and not result.module.training
    assert [t.requires_grad for t in result.tensors.values()] == [
        t.requires_grad for t in program.tensors.values()
    ]
    unchanged = {n for n, t in result.tensors.items() if torch.equal(t, before[n])}
    assert unchanged == {"4.weight"}
    assert int(result.tensors["1.num_batches_tracked"]) == 8


def test_two_runs_are_equal_to_the_last_bit() -> None:
    program = normalised_net(dropout=0.2)
    assert same(trained(program, seed=3), trained(program, seed=3))
    assert not same(trained(program, seed=3), trained(program, seed=4))


def test_callers_random_numbers_do_not_matter() -> None:
    program = normalised_net(dropout=0.2)
    torch.manual_seed(1)
    first = trained(program)
    torch.manual_seed(2)
    assert same(first, trained(program))


@pytest.mark.parametrize(
    "mode", [("float32", "channels_last"), ("bf16", "contiguous"), ("bf16", "channels_last")]
)
def test_other_arithmetic(mode: tuple[str, str]) -> None:
    """Close to the plain one, and as repeatable; the weights stay float32."""
    precision, layout = mode
    found = trained(precision=precision, layout=layout)
    assert same(found, trained(precision=precision, layout=layout))
    assert gap(found, trained()) < (1e-3 if precision == "float32" else 0.5)
    assert {t.dtype for t in found.tensors.values()} == {torch.float32, torch.int64}
    assert all(t.is_contiguous() for t in found.tensors.values())


# ---------------------------------------------------------------------- pieces, averages, short runs


@pytest.mark.parametrize("pieces", [2, 3, 5])
def test_accumulation_equals_the_whole_batch(pieces: int) -> None:
    """Without normalisations; 96 samples in steps of 19 or 20 and uneven pieces."""
    program = plain_net(torch.float64)
    assert gap(trained(program, batch=20, accumulate=pieces), trained(program, batch=20)) < 1e-12


def test_the_result_is_the_average() -> None:
    """Also of the statistics, and it is what the held-out score is of."""
    program, made = normalised_net(), options(ema=0.9, keep="last", schedule="constant")
    seen: list[dict[str, Tensor]] = []

    def watching(seen_now: Seen) -> Tensor:
        seen.append({n: t.detach().clone() for n, t in seen_now.tensors.items()})
        return cross_entropy()(seen_now)

    held_out = make_split(40, 2)
    averaged = fit(program, make_split(), made, loss=watching, held_out=held_out)
    plain = trained(schedule="constant")
    shadow = Average(0.9, weights(program))
    for step, tensors in enumerate([*seen[1:], weights(plain)], 1):
        if step < len(seen):  # the statistics were already updated when the loss saw them
            tensors = {n: t for n, t in tensors.items() if t.requires_grad or "running" not in n}
            tensors = {**shadow.tensors, **tensors}
        shadow.update(tensors, step)
    for name in ("0.weight", "8.bias"):
        assert torch.allclose(averaged.program.tensors[name], shadow.tensors[name], atol=1e-6), name
    assert not same(averaged.program, plain)
    (x,), y = next(iter(held_out.batches(40)))
    score = float((averaged.program(x).argmax(1) == y).double().mean())
    assert averaged.record.epochs[-1].held_out == pytest.approx(score)


def test_the_best_epoch_is_kept() -> None:
    """A rate that destroys what was there: the program as it came is the best, and is the result."""
    good = fit(normalised_net(), make_split(), options(epochs=4)).program
    held_out = make_split(40, 2)
    kept = fit(good, make_split(), options(lr=30.0, schedule="constant"), held_out=held_out)
    assert kept.record.kept_epoch == 0 and same(kept.program, good)
    last = fit(good, make_split(), options(lr=30.0, schedule="constant", keep="last"), held_out=held_out)
    assert last.record.kept_epoch == 2 and not same(last.program, good)
    scores = [r.held_out for r in last.record.epochs if r.held_out is not None]
    assert kept.record.held_out == scores[0] > scores[2]


def test_of_equal_epochs_the_latest_is_kept() -> None:
    held_out = make_split(4, 2)  # so few that scores are often equal
    record = fit(normalised_net(), make_split(), options(epochs=6), held_out=held_out).record
    scores = [r.held_out for r in record.epochs]
    best = max(s for s in scores if s is not None)
    assert scores.count(best) > 1
    assert record.kept_epoch == len(scores) - 1 - scores[::-1].index(best)


def squares(seen: Seen) -> Tensor:
    return (seen.outputs - seen.teacher_outputs).square().mean()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_behind_a_teacher_the_nearest_epoch_is_kept(ema: float | None) -> None:
    """Whatever labels say: here they are met by all alike, and every step leads away from the teacher."""
    teacher, split, held_out = plain_net(), make_split(), make_split(41, seed=1)
    made = options(epochs=3, lr=0.3, weight_decay=0.5, ema=ema)
    alike = {"held_out": held_out, "metric": lambda outputs, labels: torch.ones(len(labels))}
    fitted = fit(plain_net(), split, made, loss=squares, teacher=teacher, **alike)
    losses = [row.held_out_loss for row in fitted.record.epochs]
    assert losses[0] == 0 and all(loss is not None and loss > 0 for loss in losses[1:])
    assert fitted.record.kept_epoch == 0 and same(fitted.program, teacher)


def test_how_near_an_epoch_is_to_the_teacher_is_the_loss_on_all_held_out_samples() -> None:
    student, teacher, held_out = normalised_net(dropout=0.5), plain_net(), make_split(41, seed=1)
    made = options(epochs=2, batch=7)
    fitted = fit(student, make_split(), made, loss=squares, teacher=teacher, held_out=held_out)
    (x,) = held_out.fetch(held_out.indices)
    expected = float((fitted.program(x) - teacher(x)).square().mean().detach())
    row = fitted.record.epochs[fitted.record.kept_epoch]
    assert row.held_out_loss == pytest.approx(expected, rel=1e-5)
    assert row.held_out_loss == min(r.held_out_loss or 0 for r in fitted.record.epochs)


def test_max_steps_ends_in_the_middle_of_an_epoch() -> None:
    fitted = fit(normalised_net(), make_split(), options(max_steps=6, schedule="constant"))
    assert [(r.steps, r.samples) for r in fitted.record.epochs] == [(0, 0), (4, 96), (6, 48)]
    assert same(fitted.program, trained(epochs=9, max_steps=6, schedule="constant"))


def test_statistics_alone() -> None:
    """No labels, no step: the weights stay, the statistics are those of the data."""
    program = normalised_net()
    before = weights(program)
    split = replace(make_split(), labelled=False)
    fitted = fit(program, split, options(epochs=0, bn_reestimate=96))
    changed = {n for n, t in fitted.program.tensors.items() if not torch.equal(t, before[n])}
    assert changed == {f"{n}.running_{s}" for n in (1, 5) for s in ("mean", "var")}
    rows = program.layer("0")(*split.fetch(split.indices)).movedim(1, 0).flatten(1)
    assert torch.allclose(fitted.program.tensors["1.running_mean"], rows.mean(1), atol=1e-6)
    assert fitted.record.summary == "statistics from 96 samples"


def test_statistics_after_a_training() -> None:
    held_out = make_split(40, 2)
    short = options(epochs=1, bn_reestimate=96)
    record = fit(normalised_net(), make_split(), short, held_out=held_out).record
    assert record.bn_samples == 96 and record.epochs[-1].held_out is not None
    assert record.held_out is not None and record.held_out > record.epochs[-1].held_out


# ---------------------------------------------------------------------- losses


def test_teacher_and_watched_nodes() -> None:
    """T2.8: the teacher is in eval mode, without gradients, and comes out bitwise as it went in."""
    student, teacher = normalised_net(dropout=0.5), normalised_net(dropout=0.5)
    teacher.tensors["8.bias"].data += 1
    before, looked = weights(teacher), []

    def loss(seen: Seen) -> Tensor:
        assert not seen.teacher_outputs.requires_grad and not seen.teacher_watched["_2"].requires_grad
        assert torch.equal(seen.teacher_outputs, teacher(*seen.inputs))
        looked.append(seen.watched["_2"].shape == seen.teacher_watched["_2"].shape)
        hint = (seen.watched["_2"] - seen.teacher_watched["_2"]).square().mean()
        return hint + (seen.outputs - seen.teacher_outputs).square().mean()

    fitted = fit(student, make_split(), options(), loss=loss, watch=["_2"], teacher=teacher)
    assert looked == [True] * 8
    assert all(torch.equal(t, before[n]) and t.grad is None for n, t in teacher.tensors.items())
    assert not same(fitted.program, student)
    assert fitted.program.graph.python_code("self").src == student.graph.python_code("self").src


@pytest.mark.parametrize("pieces", [1, 4])
def test_penalty_on_parameters(pieces: int) -> None:
    """A loss may also be of the tensors; however a step is cut, the penalty counts once a step."""

    def decayed(seen: Seen) -> Tensor:
        return cross_entropy()(seen) + 0.05 * sum(t.square().sum() for t in seen.tensors.values())

    program = plain_net(torch.float64)
    found = fit(program, make_split(), options(weight_decay=0, accumulate=pieces), loss=decayed).program
    assert gap(found, trained(program, weight_decay=0.1)) < 1e-12  # its gradient is 0.1 w
    assert gap(found, trained(program, weight_decay=0)) > 1e-2


def test_own_metric() -> None:
    """The one that comes closest to logits of zero: larger is better."""
    record = fit(
        normalised_net(), make_split(), options(lr=0.5), held_out=make_split(40, 2),
        metric=lambda outputs, labels: -outputs.square().mean(1),
    ).record  # fmt: skip
    assert record.kept_epoch == 0 and all((r.held_out or 1) < 0 for r in record.epochs)


# ---------------------------------------------------------------------- refusals


def test_loss_that_is_not_finite() -> None:
    with pytest.raises(
        PassError, match=r"found a loss of nan at step 1 of 8, expected a finite one; give lr=auto, or a"
    ):
        fit(normalised_net(), make_split(), options(), loss=lambda seen: seen.outputs.sum() * float("nan"))


def test_nothing_to_train() -> None:
    program = plain_net()
    for tensor in program.tensors.values():
        tensor.requires_grad_(False)
    with pytest.raises(PassError, match="found no parameter that wants a gradient"):
        trained(program)


def test_fewer_samples_than_pieces() -> None:
    with pytest.raises(DataError, match=r"found 3 samples .* expected at least 4"):
        fit(plain_net(), make_split(3), options(accumulate=4))


def test_a_sample_on_both_sides() -> None:
    """T3.6: what chooses the epoch must not be learned from."""
    split = make_split()
    with pytest.raises(DataError, match="found a held-out sample among the others"):
        fit(plain_net(), split, options(), held_out=split.subset(split.indices[:1]))


# ---------------------------------------------------------------------- several processes


def shared_cases() -> list[Program]:
    """What two processes and one must agree on; float64, so that only the order of sums differs."""
    held_out = make_split(41, 2)
    plain, normalised = plain_net(torch.float64), normalised_net(torch.float64)
    uneven = options(batch=19, clip=1.0, ema=0.9, accumulate=2)  # 96 samples: steps of 16, pieces of 4
    return [
        fit(plain, make_split(), options(batch=19), held_out=held_out, augmentation=CropAndFlip(1)).program,
        fit(normalised, make_split(95), options(batch=19), held_out=held_out).program,
        fit(plain, make_split(95), uneven, held_out=held_out).program,
        fit(normalised, make_split(), options(epochs=0, bn_reestimate=50)).program,
    ]


def saved_in_two(state: str) -> list[dict[str, Tensor]]:
    found = []
    for program in shared_cases():
        found.append(weights(program))
    with pytest.raises(KeyboardInterrupt):
        fit(normalised_net(torch.float64), make_split(), options(), loss=Stops(2), state=Path(state))
    return found


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Gradients, clipping, averages and statistics: to 1e-10, where one batch is split unevenly too.

    The state that two were stopped with is one that a single process goes on from.
    """
    alone = shared_cases()
    first, second = in_processes(2, saved_in_two, str(tmp_path / "state"))
    for expected, one, two in zip(alone, first, second, strict=True):
        for name, value in expected.tensors.items():
            assert torch.allclose(one[name], value, rtol=1e-9, atol=1e-11), name
            assert torch.equal(one[name], two[name]), name
    program = normalised_net(torch.float64)
    resumed = fit(program, make_split(), options(), state=tmp_path / "state")
    assert resumed.record.resumed == 1
    assert gap(resumed.program, trained(program)) < 1e-9
