"""Passes over several rounds: what is run, recorded, taken back, and what an interruption leaves."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from graphcomp.base.cache import VARIABLE
from graphcomp.bases.removal import RowRemoval
from graphcomp.channels import Removal, analyse
from graphcomp.compiler.compiler import build
from graphcomp.compiler.recipe import Recipe
from graphcomp.compiler.source import Job
from graphcomp.data.split import Data, Indices
from graphcomp.errors import DataError, LoadError, PassError
from graphcomp.ir import load
from graphcomp.ir.program import Program
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes import APoZ, Finetune, PlayAndPrune
from graphcomp.pipeline import Context, Course, Pass, Pipeline
from graphcomp.pipeline.rounds import held_out_samples, lost_points, removed_channels, run_rounds
from graphcomp.pipeline.verify import TOLERANCE, difference
from graphcomp.records import Plan, Report, Score, Snapshot, Step
from graphcomp.train.options import Seen, cross_entropy
from tests.learnable import SHAPE, arrays, exact_data, make_data, normalised_net, same, weights
from tests.processes import in_processes
from tests.running import run_pass
from tests.tiny import SPEC, context, random_data

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class First(RowRemoval):
    """Removes the first channel of a layer."""

    name: ClassVar[str] = "first"
    layer: str = "0"

    def plan(self, program: Program, context: Context) -> Plan:
        channels = analyse(program)
        (group,) = channels.group_of(self.layer)
        drop = channels.marks()
        drop[group.channels[0]] = True
        rows = Removal(channels, drop).rows
        return Plan(name=self.name, decisions={"join": "couple", "rows": rows}, summary=f"of {self.layer}")


def tuned(**options: Any) -> Finetune:
    return Finetune(**{"epochs": 1, "batch": 24, "lr": 0.05, "precision": "float32", **options})


@dataclass(frozen=True)
class Scripted:
    """Emits what it is told, one after the other, and takes the result of the round that it is told."""

    passes: tuple[Pass, ...]
    kept: int | None = None
    keeps_momenta: bool = False
    name: ClassVar[str] = "scripted"
    held_out: float = 0.2
    seen: list[Course] = field(default_factory=list, repr=False, compare=False)

    @property
    def iteration(self) -> "Scripted":
        return self

    @property
    def most_rounds(self) -> int:
        return len(self.passes)

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan(name=self.name, options={"held_out": self.held_out}, evidence={"because": "told"})

    def simulate(self, program: Program, plan: Plan) -> Program:
        raise AssertionError("its rounds are simulated")

    rewrite = simulate

    def next_pass(self, course: Course) -> Pass | None:
        self.seen.append(course)
        done = len(course.rounds)
        return self.passes[done] if done < len(self.passes) else None

    def result(self, course: Course) -> int:
        return min(len(course.rounds), len(self.passes) if self.kept is None else self.kept)

    def ending(self, course: Course) -> str:
        return "the script is at its end"


FOUR = (First("0"), tuned(), First("4"), tuned())


def run(passes: Sequence[Pass], where: Context | None = None, **options: Any) -> tuple[Step, Plan, Program]:
    return run_pass(Scripted(tuple(passes), **options), normalised_net(), where or context(make_data()))


# ---------------------------------------------------------------------- what is run and recorded


@pytest.mark.slow
def test_rounds_are_ordinary_passes() -> None:
    """The result is that of the same passes one after the other, each with random numbers of its own."""
    step, plan, result = run(FOUR)
    by_hand = normalised_net()
    for number, pass_ in enumerate(FOUR, 1):
        by_hand = run_pass(pass_, by_hand, context(make_data(), seed=number))[2]
    assert str(result) == str(by_hand)
    assert [h["name"] for h in result.history] == ["first", "finetune", "first", "finetune"]
    assert [p["name"] for p in plan.decisions["rounds"]] == ["first", "finetune", "first", "finetune"]
    assert (step.name, plan.name, step.index, step.plan_file) == (
        "scripted", "scripted", 0, "plans/01-scripted.json",
    )  # fmt: skip
    assert plan.evidence == {"because": "told"} and step.training is None and step.drift is not None
    assert 0 < step.verify_error <= TOLERANCE
    assert step.verify_error == max(row.verify_error for row in step.rounds)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_row_a_round() -> None:
    step, _, result = run(FOUR)
    assert [(r.index, r.name) for r in step.rounds] == [
        (0, "first"), (1, "finetune"), (2, "first"), (3, "finetune"),
    ]  # fmt: skip
    assert [r.removed for r in step.rounds] == [{"0": 1}, {}, {"4": 1}, {}]
    assert step.kept_rounds == 4
    macs = [s.macs for s in step.snapshots]
    assert macs[0] > macs[1] == macs[2] > macs[3] == macs[4] == step.after.macs
    assert [r.training is not None for r in step.rounds] == [False, True, False, True]
    assert step.summary.startswith("kept 4 of 4 rounds: 2 channels removed, held-out accuracy ")
    assert step.summary.endswith("; the script is at its end")
    assert Step.model_validate_json(step.model_dump_json()) == step
    last = step.rounds[-1].after.score
    judges = held_out_samples("x", make_data(), 0.2)
    assert last == accuracy(result, judges) and last is not None and last.samples == 24


def test_an_earlier_round_is_the_result() -> None:
    step, plan, result = run(FOUR, kept=2)
    shorter, _, expected = run(FOUR[:2])
    assert same(result, expected) and result.history == expected.history
    assert (step.kept_rounds, len(step.rounds)) == (2, 4)
    assert [p["name"] for p in plan.decisions["rounds"]] == ["first", "finetune"]
    assert step.after == shorter.after
    assert step.summary.startswith("kept 2 of 4 rounds: 1 channels removed")


def test_all_rounds_are_taken_back() -> None:
    step, plan, result = run(FOUR, kept=0)
    assert same(result, normalised_net()) and result.history == () and step.drift is None
    assert plan.decisions["rounds"] == []
    assert step.summary.startswith("kept 0 of 4 rounds: 0 channels removed")


def test_no_round() -> None:
    step, _, result = run(())
    assert same(result, normalised_net()) and step.rounds == [] and len(step.snapshots) == 1
    assert step.verify_error == 0


def test_only_what_is_needed_is_remembered(tmp_path: Path) -> None:
    run(FOUR, replace(context(make_data()), workdir=tmp_path), kept=2)
    rounds = tmp_path / "01-scripted" / "rounds"
    assert sorted(p.name for p in rounds.iterdir()) == [
        "001.json", "002", "002.json", "003.json", "004", "004.json",
    ]  # fmt: skip
    assert not (tmp_path / "01-scripted" / "running").exists()


def test_decisions_see_accuracies_in_order() -> None:
    method = Scripted(FOUR)
    step, _, _ = run_pass(method, normalised_net(), context(make_data()))
    assert [len(c.rounds) for c in method.seen] == [0, 1, 2, 3, 4]
    last = method.seen[-1]
    assert [s.score for s in last.snapshots] == [s.score for s in step.snapshots]


def test_t3_6_rounds_have_no_way_to_the_evaluation_data() -> None:
    """T3.6: it is only read when all rounds are over, and what judges them is not learned from."""
    data = make_data()
    method = Scripted(FOUR)
    read: list[int] = []

    def watched(indices: Indices) -> Tensor:
        read.append(len(method.seen))
        return data.eval.fetch(indices)

    evaluation = replace(data.eval, fetch=watched)
    step, _, _ = run_pass(method, normalised_net(), context(replace(data, eval=evaluation)))
    assert read and set(read) == {len(FOUR) + 1}
    assert step.after.score is not None and step.after.score.samples == len(data.eval)
    learned, judges = data.train.hold_out(0.2)
    assert np.array_equal(held_out_samples("x", data, 0.2).indices, judges.indices)
    assert not set(learned.indices) & set(judges.indices)
    equal = Scripted((tuned(held_out=0.2),))
    training = run_pass(equal, normalised_net(), context(data))[0].rounds[0].training
    assert training is not None
    assert (training.samples, training.held_out_samples) == (len(learned), len(judges))


def test_momenta_go_through_a_removal() -> None:
    """T0.8: a training after a removal goes on from what the last one left, cut to size; or begins anew."""
    passes = (tuned(schedule="constant", keep="last"), First("0"), tuned(schedule="constant", keep="last"))
    step, _, on = run(passes, keeps_momenta=True)
    _, _, anew = run(passes)
    assert not same(on, anew) and str(on) == str(anew)
    assert step.rounds[1].removed == {"0": 1}


def test_progress_never_falls_and_ends_once() -> None:
    told: list[tuple[str, float]] = []
    run(FOUR, replace(context(make_data()), progress=lambda m, f: told.append((m, f))))
    parts = [f for _, f in told]
    assert parts == sorted(parts) and parts.count(1.0) == 1 and parts[-1] == 1.0
    assert any(m.startswith("scripted [2/4]: finetune: epoch [1/1]") for m, _ in told)


def test_lost_points_and_removed_channels() -> None:
    def at(top1: float) -> Snapshot:
        score = Score(measure="accuracy", value=top1, samples=1000, low=0, high=1)
        return Snapshot(params_trainable=1, params_state=1, macs=1, score=score)

    course = Course(Plan(name="x"), at(0.93))
    assert lost_points(course, 0) == 0
    without = replace(course, start=at(0.93).model_copy(update={"score": None}))
    with pytest.raises(PassError, match="found no accuracy"):
        lost_points(without, 0)
    step, _, _ = run(FOUR[:1])
    assert step.rounds[0].removed == {"0": 1}
    assert removed_channels(step.after.layers, step.after.layers) == {}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "scripted: found no data, expected samples with labels to judge every round by"),
        (random_data(*SHAPE), "scripted: found data without labels"),
        (make_data(2), "scripted: found 2 samples, expected enough to hold out 0.2"),
    ],
)
def test_data_that_does_not_do(data: Data | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        run_rounds(Scripted(FOUR), normalised_net(), context(data))


def test_a_failing_round_is_named() -> None:
    passes = (First("0"), tuned(accumulate=25))
    with pytest.raises(
        PassError, match=r"^round 2 \(finetune\): training: found 108 samples in batches of 24"
    ):
        run(passes)
    with pytest.raises(PassError, match=r"pass 'scripted' failed after trace: round 2 \(finetune\)"):
        Pipeline([Scripted(passes)]).run(normalised_net(), context(make_data()))


# ---------------------------------------------------------------------- interruptions

GAME = (tuned(epochs=2), First("0"), tuned(epochs=2), First("4"), tuned(epochs=2))
STEPS = 10
"""Of each training: two epochs of five batches."""


class Interrupts:
    """`finetune`'s loss, that does something in the middle of some step."""

    def __init__(self, at: int, do: Any) -> None:
        self.left, self.do = at, do

    def __call__(self, smoothing: float) -> Any:
        def loss(seen: Seen) -> Tensor:
            if self.left == 0:
                self.do()
            self.left -= 1
            return cross_entropy(smoothing)(seen)

        return loss


def in_workdir(folder: Path) -> Context:
    return replace(context(make_data()), workdir=folder)


def game(where: Context, **options: Any) -> tuple[Step, Plan, Program]:
    return run(GAME, where, keeps_momenta=True, held_out=0.1, kept=3, **options)


def comparable(step: Step) -> Any:
    """Everything but times."""
    left = {"seconds": True, "samples_per_second": True, "resumed": True, "epochs": True}
    rows = [
        row.model_dump(exclude={"seconds": True, "training": left})
        if row.training
        else row.model_dump(exclude={"seconds"})
        for row in step.rounds
    ]
    return rows, step.model_dump(exclude={"seconds", "rounds"})


@pytest.mark.slow
def test_stopped_in_a_training_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in round 3: rounds 1 and 2 are not run again, round 3 goes on after its step."""
    whole, plan, expected = game(context(make_data()))
    stop = Interrupts(STEPS + 6, lambda: signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setattr("graphcomp.passes.finetune.cross_entropy", stop)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after step 7 of 10 \(epoch 2 of 2\)"):
            game(in_workdir(tmp_path))
    place = tmp_path / "01-scripted"
    assert sorted(p.name for p in place.iterdir()) == ["rounds", "running", "start.json"]
    assert sorted(p.name for p in (place / "rounds").glob("*.json")) == ["001.json", "002.json"]
    assert [p.parent.name for p in place.rglob("training.safetensors")] == ["03-finetune"]
    told: list[str] = []
    going_on = replace(in_workdir(tmp_path), progress=lambda m, f: told.append(m))
    step, resumed_plan, resumed = game(going_on)
    assert "scripted: goes on after round 2" in told and not any("[1/5]" in m for m in told)
    assert same(resumed, expected) and resumed.history == expected.history and resumed_plan == plan
    assert comparable(step) == comparable(whole)
    assert step.rounds[2].training is not None and step.rounds[2].training.resumed == 1


@pytest.mark.slow
@pytest.mark.parametrize("finished", [0, 1, 2, 3, 4, 5])
def test_resumed_after_every_round(tmp_path: Path, finished: int) -> None:
    """As if killed after the record of a round was written, or (5) before the pass's own was."""

    next_message = f"scripted [{finished + 1}/5]" if finished < len(GAME) else "scripted: evaluate"

    def die(message: str, fraction: float) -> None:
        if message.startswith(next_message):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        game(replace(in_workdir(tmp_path), progress=die))
    expected = game(context(make_data()))
    step, plan, result = game(in_workdir(tmp_path))
    assert same(result, expected[2]) and plan == expected[1]
    assert comparable(step) == comparable(expected[0])


def run_until_killed(folder: str) -> None:
    """In a process of its own: says when it is in the second epoch of round 3, and waits there."""
    torch.set_num_threads(1)

    def wait() -> None:
        print("in round 3", flush=True)
        signal.pause()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphcomp.passes.finetune.cross_entropy", Interrupts(STEPS + 7, wait))
        game(in_workdir(Path(folder)))


@pytest.mark.slow
def test_killed_without_a_word(tmp_path: Path) -> None:
    """kill -9 in the middle of an epoch of a round: what is lost is that epoch."""
    call = f"from tests.pipeline.test_rounds import run_until_killed as f; f({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in round 3\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    told: list[str] = []
    going_on = replace(in_workdir(tmp_path), progress=lambda m, f: told.append(m))
    step, _, resumed = game(going_on)
    assert next(m for m in told if "step 1/5" in m).startswith("scripted [3/5]: finetune: epoch [2/2]")
    expected = game(context(make_data()))
    assert same(resumed, expected[2]) and comparable(step) == comparable(expected[0])


@pytest.mark.slow
def test_another_run_is_refused(tmp_path: Path) -> None:
    game(in_workdir(tmp_path))
    with pytest.raises(LoadError, match="found the rounds of another run, expected those of this program"):
        run(GAME, in_workdir(tmp_path), keeps_momenta=True, held_out=0.1, kept=1)
    with pytest.raises(LoadError, match="found the rounds of another run"):
        game(replace(in_workdir(tmp_path), seed=1))


@pytest.mark.slow
def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    game(in_workdir(tmp_path))
    record = tmp_path / "01-scripted" / "rounds" / "002.json"
    record.write_text(record.read_text()[:-40])
    with pytest.raises(LoadError, match=r"(?s)002.json: .* expected the record of a round; delete .*rounds"):
        game(in_workdir(tmp_path))
    shutil.rmtree(record.parent)
    assert same(game(in_workdir(tmp_path))[2], game(context(make_data()))[2])


@pytest.mark.slow
def test_a_whole_run_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's `--resume` goes on inside the pass; afterwards its state is gone."""
    (x, y), (x_test, y_test) = arrays(96, 0), arrays(40, 1)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    passes = [APoZ(steps=2, tolerance=100, finetune=tuned(epochs=2))]
    recipe = Recipe(passes=["apoz"], data=f"npz:{tmp_path / 'data.npz'}", bench=False)
    job, out = Job(SPEC, recipe, passes, input_shape=(1, *SHAPE)), tmp_path / "out"
    with monkeypatch.context() as patch:
        stop = Interrupts(5, lambda: signal.raise_signal(signal.SIGINT))
        patch.setattr("graphcomp.passes.finetune.cross_entropy", stop)
        with pytest.raises(KeyboardInterrupt, match="with --resume goes on from there"):
            build(job, out)
    assert (out / "checkpoints" / "running" / "01-apoz" / "rounds" / "001.json").exists()
    report = build(job, out, resume=True)
    assert not (out / "checkpoints" / "running").exists()
    written = Report.model_validate(json.loads((out / "report.json").read_text()))
    assert written.steps[0].rounds == report.steps[0].rounds and len(report.steps[0].rounds) == 4
    assert "Channels removed per layer" in (out / "report.html").read_text()
    saved = load(out / "program")
    assert [h["name"] for h in saved.history] == ["apoz", "finetune"] * 2
    assert difference(saved, load(out / "checkpoints" / "01-apoz")) == 0


# ---------------------------------------------------------------------- several processes

MORE_STEPS = APoZ(steps=2, tolerance=100, finetune=tuned(batch=23))
PLAY: dict[str, Any] = {"batch": 23, "lr": 0.02, "precision": "float32", "held_out": 0.25}
PLAYED = PlayAndPrune(eps=50, alpha=0.3, lambda0=1e-3, delta0=20, max_epochs=2, training=PLAY)  # type: ignore[arg-type]

Found = dict[str, Any]


def found_by(pass_: Pass, where: Context) -> Found:
    """What must not depend on the number of processes; numbers to rounding."""
    step, plan, result = run_pass(pass_, normalised_net(torch.float64), where)
    rounds = plan.decisions["rounds"]
    return {
        "tensors": weights(result),
        "rows": [[r["name"], r["decisions"].get("candidates"), r["decisions"].get("rows")] for r in rounds],
        "accuracies": [s.score and s.score.value for s in step.snapshots],
        "removed": [dict(row.removed) for row in step.rounds],
        "summary": step.summary,
        "processes": [row.training.processes for row in step.rounds if row.training],
    }


class StopsAt:
    """Progress that ends the work where a message begins so."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, message: str, fraction: float) -> None:
        if message.startswith(self.message):
            raise ZeroDivisionError


def shared_rounds(folder: str) -> list[Found]:
    """With a cache of its own, so that everything is computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, f"{folder}/cache")
        return _shared_rounds(folder)


def _shared_rounds(folder: str) -> list[Found]:
    """Each method in one go; then one that all processes leave in its third round, and go on with."""
    where = context(exact_data())
    found = [found_by(MORE_STEPS, where), found_by(PLAYED, where)]
    begun = replace(where, workdir=Path(folder))
    with pytest.raises(ZeroDivisionError):
        found_by(PLAYED, replace(begun, progress=StopsAt("play-and-prune [3/4]: afp-epoch: verify")))
    told: list[str] = []
    found.append(found_by(PLAYED, replace(begun, progress=lambda m, f: told.append(m))))
    assert "play-and-prune: goes on after round 2" in told and not any("[2/4]" in m for m in told)
    return found


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Every round: what is measured, decided and learned; also where both stopped and went on."""
    alone = shared_rounds(str(tmp_path / "one"))
    assert all(sum(1 for round in found["removed"] if round) > 1 for found in alone)
    assert alone[1]["rows"] == alone[2]["rows"] and alone[1]["summary"] == alone[2]["summary"]
    first, second = in_processes(2, shared_rounds, str(tmp_path / "two"))
    for expected, one, two in zip(alone, first, second, strict=True):
        assert expected.pop("processes") == [1] * 2 and one.pop("processes") == [2] * 2
        assert {**expected, "tensors": None} == {**one, "tensors": None}
        for name, value in expected["tensors"].items():
            assert torch.allclose(one["tensors"][name], value, rtol=1e-8, atol=1e-10), name
            assert torch.equal(one["tensors"][name], two["tensors"][name]), name
