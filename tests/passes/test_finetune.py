"""finetune as a pass: what it plans, whom it asks, what it leaves, and that nothing stops it for good."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from graphcomp.bases.training import STATE
from graphcomp.compiler.compiler import build
from graphcomp.compiler.recipe import Recipe, parse_passes
from graphcomp.compiler.source import Job, load_source
from graphcomp.data.sources import load_data
from graphcomp.data.split import Data, Split
from graphcomp.errors import DataError, PassError, VerifyError
from graphcomp.ir import load
from graphcomp.ir.program import Program
from graphcomp.measure.evaluate import mean_error
from graphcomp.passes import L1, PASSES, Finetune, FoldBN
from graphcomp.pipeline import Context, Pipeline
from graphcomp.pipeline.contract import TrainingPass
from graphcomp.records import Plan, Report, Training
from graphcomp.runtime.targets import find_target
from graphcomp.train.options import Seen, cross_entropy
from tests.learnable import CLASSES, SHAPE, arrays, make_data, normalised_net, same, weights
from tests.running import run_pass
from tests.tiny import SPEC, context, random_data, tiny_program, traced

ROOT = Path(__file__).resolve().parents[2]


def tuned(**options: Any) -> Finetune:
    return Finetune(**{"epochs": 2, "batch": 24, "lr": 0.05, "precision": "float32", **options})


# ---------------------------------------------------------------------- what it does


@pytest.mark.slow
def test_accuracy_comes_back() -> None:
    """Half of the MACs go, and nearly all that the network knew; an epoch later it knows it again."""
    program = load_source("models:resnet20-digits").program
    data = load_data("digits?limit=240", input_shape=(3, 32, 32), seed=0)
    passes = [L1(target={"macs": 0.5}, multiple=1), Finetune(epochs=1, batch=48, lr=0.02, bn_reestimate=96)]
    _, (removed, recovered) = Pipeline(passes).run(program, context(data))
    assert removed.after.score is not None and recovered.after.score is not None
    assert removed.after.score.value < 0.5 and recovered.after.score.value > 0.9
    assert recovered.after.macs == removed.after.macs
    training = recovered.training
    assert training is not None and training.held_out is not None and training.held_out > 0.9
    assert removed.training is None and removed.verify_error > 0 and recovered.verify_error == 0
    assert recovered.summary == training.summary


def test_rates_are_searched_behind_refit_where_none_was_asked_for() -> None:
    def trained(passes: str) -> Training:
        _, steps = Pipeline(parse_passes(passes, PASSES)).run(normalised_net(), context(make_data()))
        training = steps[-1].training
        assert training is not None
        return training

    short, cut = "epochs=1, max_steps=2, batch=24, precision=float32", "l1{ratio=0.5, multiple=1}"
    searched = trained(f"{cut}, refit, finetune{{{short}}}, finetune{{{short}}}")
    assert searched.rates and searched.lr in {t.rate for t in searched.rates}
    asked = trained(f"{cut}, refit, finetune{{{short}, lr=0.05}}")
    usual = trained(f"{cut}, finetune{{{short}}}")
    assert (asked.rates, asked.lr) == ([], 0.05) and (usual.rates, usual.lr) == ([], 0.01)
    unchanged = trained(f"refit, finetune{{{short}}}")  # nothing was removed: there was nothing to fit
    assert (unchanged.rates, unchanged.lr) == ([], 0.01)


@pytest.mark.parametrize("fitted", [True, False])
def test_what_was_fitted_in_closed_form_is_said_by_its_plan_and_not_by_a_name(fitted: bool) -> None:
    plan = Plan(name="mine", fitted=fitted).model_dump(mode="json")
    program = replace(normalised_net(), history=(plan,))
    asked = Finetune(epochs=1, max_steps=2, batch=24, precision="float32")
    step, _, _ = run_pass(asked, program, context(make_data()))
    assert step.training is not None and bool(step.training.rates) is fitted


def test_statistics_alone_without_labels() -> None:
    program = normalised_net()
    step, _, result = run_pass(Finetune(epochs=0, bn_reestimate=50), program, context(random_data(*SHAPE)))
    before = weights(program)
    changed = {n.rpartition(".")[2] for n, t in result.tensors.items() if not torch.equal(t, before[n])}
    assert changed == {"running_mean", "running_var"}
    assert step.summary == "statistics from 50 samples" and step.training is not None


def test_statistics_of_a_network_that_is_no_classifier() -> None:
    """Labels that are there are not looked at, and no sample is held out for them."""
    program = traced(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)), 1, *SHAPE)
    step, _, _ = run_pass(Finetune(epochs=0, bn_reestimate=50), program, context(make_data()))
    assert step.training is not None and step.training.samples == 120
    assert step.training.held_out is None


def test_the_plan() -> None:
    _, plan, _ = run_pass(tuned(bn_reestimate=30), normalised_net(), context(make_data(), seed=7))
    assert plan.decisions == {
        "seed": 7, "samples": 108, "held_out": 12, "steps": 10, "augmentation": "Unchanged()",
    }  # fmt: skip
    assert plan.summary == "10 steps of up to 24 samples at lr 0.05; statistics from 30 samples"
    assert plan.options["lr"] == 0.05 and plan.options["momentum"] == 0.9
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_own_seed_before_that_of_the_run() -> None:
    results = [
        run_pass(tuned(seed=own), normalised_net(), context(make_data(), seed=run))[2]
        for own, run in ((None, 1), (1, 0), (None, 0))
    ]
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_plans_are_equal_where_times_are_not() -> None:
    """The history of a program holds no times: two runs yield the same saved program."""
    runs = [run_pass(tuned(), normalised_net(), context(make_data())) for _ in range(2)]
    assert runs[0][2].history == runs[1][2].history and same(runs[0][2], runs[1][2])


def test_t3_6_evaluation_data_is_not_touched() -> None:
    """T3.6: neither learned from nor used to choose the epoch."""
    data = make_data()
    asked: list[Split] = []

    def fetch(indices: Any) -> Tensor:
        asked.append(data.eval)
        return data.eval.fetch(indices)

    watched = context(replace(data, eval=replace(data.eval, fetch=fetch)))
    pass_, program = tuned(bn_reestimate=50), normalised_net()
    plan = pass_.plan(program, watched)
    _, training = pass_.train(program, plan, watched)
    assert not asked and training.held_out_samples == 12 and training.samples == 108
    run_pass(pass_, program, watched)
    assert asked  # by the pipeline, that reports the accuracy


def test_what_is_held_out_is_the_same_for_every_pass() -> None:
    """Whatever the seed: what one pass was judged by, the next one must not learn from."""
    train, held_out = make_data().train.hold_out(0.25)
    again = make_data().train.hold_out(0.25)
    assert np.array_equal(train.indices, again[0].indices) and np.array_equal(
        held_out.indices, again[1].indices
    )
    assert sorted([*train.indices, *held_out.indices]) == list(range(120))
    counts = torch.bincount(held_out.labels, minlength=CLASSES).tolist()
    assert sum(counts) == 30 and max(counts) - min(counts) <= 1


BEFORE = (
    "fold-bn",
    "l1{ratio=0.5}",
    "apoz{ratio=0.5}",
    "low-rank{ratio=0.5}",
    "pfa{energy=0.9}",
    "dct{rate=1, groups=4, min_weights=1}",
)


@pytest.mark.slow
@pytest.mark.parametrize("before", BEFORE)
def test_t0_8_one_step_after_every_pass(before: str) -> None:
    """T0.8: new shapes, one step, and another pass after it; no state of the old shapes anywhere."""
    passes = parse_passes(f"{before}, finetune{{max_steps=1, batch=24, lr=1e-3}}, l1{{ratio=0.25}}", PASSES)
    passes = [replace(p, multiple=1) if hasattr(p, "multiple") else p for p in passes]
    data = replace(make_data(), spec="npz:learnable")
    result, steps = Pipeline(passes).run(tiny_program(), context(data))
    assert [s.verify_error < 1e-9 for s in steps] == [True] * 3
    assert steps[1].training is not None and steps[1].training.epochs[-1].steps == 1
    assert result(torch.zeros(2, *SHAPE)).shape == (2, 4)


def test_t4_4_coefficients_are_trained_and_orders_are_not() -> None:
    """T4.4, T4.10: after steps with decay the same integers, and the same coefficients to train."""
    passes = parse_passes("dct{rate=1, groups=4, min_weights=1}", PASSES)
    stored, _ = Pipeline(passes).run(tiny_program(), context(make_data()))
    _, _, result = run_pass(tuned(weight_decay=0.1), stored, context(make_data()))
    orders = {n for n, t in stored.tensors.items() if n.endswith(".index")}
    trained = {n for n, t in result.tensors.items() if t.requires_grad}
    assert len(orders) == 3 and not orders & trained
    assert all(torch.equal(result.tensors[n], stored.tensors[n]) for n in orders)
    assert trained == {n for n, t in stored.tensors.items() if t.requires_grad}
    assert not torch.equal(result.tensors["inner.coefficients"], stored.tensors["inner.coefficients"])


def test_frozen_layers_stay() -> None:
    program = normalised_net()
    program.tensors["0.weight"].requires_grad_(False)
    _, _, result = run_pass(tuned(), program, context(make_data()))
    assert torch.equal(result.tensors["0.weight"], program.tensors["0.weight"])
    assert not torch.equal(result.tensors["4.weight"], program.tensors["4.weight"])


def test_in_a_recipe() -> None:
    (made,) = parse_passes(
        "finetune{epochs=20, lr=0.001, schedule=step, milestones=[0.75], augment=imagenet}",
        PASSES,
    )
    assert isinstance(made, Finetune) and isinstance(made, TrainingPass)
    assert (made.milestones, made.schedule, made.augment) == ((0.75,), "step", "imagenet")
    assert not isinstance(L1(ratio=0.5), TrainingPass)


# ---------------------------------------------------------------------- refusals


def test_nothing_to_do() -> None:
    with pytest.raises(ValidationError, match="found epochs=0 without bn_reestimate"):
        Finetune(epochs=0)


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (None, {}, "found no data, expected samples to learn from; give --data"),
        (random_data(*SHAPE), {}, "found data without labels"),
        (make_data(4), {}, "found 4 samples, expected enough to hold out 0.1"),
        (make_data(), {"accumulate": 25, "batch": 24}, "expected at least 25"),
        (make_data(), {"augment": "cifar", "crop_padding": -1}, "crop_padding"),
    ],
)
def test_data_that_does_not_do(data: Data | None, options: dict[str, Any], said: str) -> None:
    with pytest.raises((DataError, ValidationError), match=said):
        run_pass(tuned(**options), normalised_net(), context(data))


def test_labels_that_the_network_has_no_output_for() -> None:
    data = make_data()
    shifted = replace(data, train=replace(data.train, labels=data.train.labels + 1))
    with pytest.raises(DataError, match="found class 4, expected classes below 4"):
        run_pass(tuned(), normalised_net(), context(shifted))


def test_no_classifier() -> None:
    with pytest.raises(PassError, match=r"found no \(batch, classes\) output"):
        run_pass(tuned(), traced(torch.nn.Conv2d(3, 4, 3), 1, *SHAPE), context(make_data()))


def test_no_normalisation_left() -> None:
    folded = run_pass(FoldBN(), normalised_net(), context())[2]
    pass_ = tuned(bn_reestimate=10)
    with pytest.raises(PassError, match="fold-bn removes them: run it later"):
        pass_.plan(folded, context(make_data()))


def test_a_plan_alone_is_not_enough() -> None:
    program = normalised_net()
    plan = tuned().plan(program, context(make_data()))
    with pytest.raises(PassError, match="found a plan without data"):
        tuned().simulate(program, plan)
    assert tuned().rewrite(program, plan) is program


@dataclass(frozen=True)
class Reshapes:
    """A training pass that does what none may."""

    name: ClassVar[str] = "reshapes"

    def plan(self, program: Program, context: Context) -> Plan:
        return Plan(name=self.name)

    def simulate(self, program: Program, plan: Plan) -> Program:
        raise AssertionError("`train` takes its place")

    def rewrite(self, program: Program, plan: Plan) -> Program:
        return program

    def train(self, program: Program, plan: Plan, context: Context) -> tuple[Program, Training]:
        _, training = tuned().train(program, plan, context)
        return run_pass(L1(ratio=0.5, multiple=1), program, context)[2], training


def test_training_may_not_change_shapes() -> None:
    with pytest.raises(
        VerifyError, match=r"reshapes: found '%_0: 1x3x8x8 = conv 3->3 .* expected '%_0: 1x6x8x8"
    ):
        run_pass(Reshapes(), normalised_net(), context(make_data()))


# ---------------------------------------------------------------------- interruptions


def in_workdir(folder: Path) -> Context:
    return replace(context(make_data()), workdir=folder)


MANY = {"epochs": 6, "ema": 0.9, "schedule": "one-cycle"}


def run_until_killed(folder: str) -> None:
    """In a process of its own: says when it is in the middle of the fourth epoch, and waits there."""
    torch.set_num_threads(1)  # as in the other process: the order of sums depends on it
    left = 3 * 5 + 2

    def hangs(seen: Seen) -> Tensor:
        nonlocal left
        if left == 0:
            print("in the fourth epoch", flush=True)
            signal.pause()
        left -= 1
        return cross_entropy()(seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphcomp.passes.finetune.cross_entropy", lambda smoothing: hangs)
        run_pass(tuned(**MANY), normalised_net(), in_workdir(Path(folder)))


@pytest.mark.slow
def test_killed_without_a_word(tmp_path: Path) -> None:
    """kill -9 in the middle of an epoch: the epochs before it are there, and the result is the same."""
    call = f"from tests.passes.test_finetune import run_until_killed as f; f({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", call], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in the fourth epoch\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "01-finetune").iterdir()] == [STATE]
    told: list[str] = []
    going_on = replace(in_workdir(tmp_path), progress=lambda message, fraction: told.append(message))
    step, _, resumed = run_pass(tuned(**MANY), normalised_net(), going_on)
    assert next(m for m in told if "step 1/5" in m).startswith("finetune: epoch [4/6]")
    assert step.training is not None and step.training.resumed == 1
    assert same(resumed, run_pass(tuned(**MANY), normalised_net(), context(make_data()))[2])


@pytest.fixture
def learnable_file(tmp_path: Path) -> Iterator[str]:
    (x, y), (x_test, y_test) = arrays(96, 0), arrays(40, 1)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    yield f"npz:{tmp_path / 'data.npz'}"


@pytest.mark.slow
def test_a_whole_run_stopped_and_resumed(
    tmp_path: Path, learnable_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second pass; `--resume` goes on in the middle of it; the report tells of it."""
    passes = [L1(ratio=0.25, multiple=1), tuned()]
    recipe = Recipe(passes=["l1", "finetune"], data=learnable_file, bench=False)
    job, out = Job(SPEC, recipe, passes, input_shape=(1, *SHAPE)), tmp_path / "out"

    def stopping(smoothing: float) -> Any:
        calls: list[Seen] = []

        def loss(seen: Seen) -> Tensor:
            calls.append(seen)
            if len(calls) == 6:
                signal.raise_signal(signal.SIGINT)
            return cross_entropy(smoothing)(seen)

        return loss

    with monkeypatch.context() as patch:
        patch.setattr("graphcomp.passes.finetune.cross_entropy", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after step 6 of 8 \(epoch 2 of 2\)"):
            build(job, out)
    running = out / "checkpoints" / "running"
    assert [p.relative_to(running).as_posix() for p in running.rglob("*.safetensors")] == [
        f"02-finetune/{STATE}"
    ]
    report = build(job, out, resume=True)
    assert not running.exists()
    training = report.steps[1].training
    assert training is not None and training.resumed == 1 and training.epochs[-1].steps == 8
    source, data = (
        load_source(SPEC, None, (1, *SHAPE)).program,
        load_data(learnable_file, input_shape=SHAPE, seed=0),
    )
    whole, steps = Pipeline(passes).run(source, replace(context(data), target=find_target("auto")))
    assert same(load(out / "program"), whole) and report.final == steps[-1].after
    written = Report.model_validate(json.loads((out / "report.json").read_text()))
    assert written.steps[1].training == training


# ---------------------------------------------------------------------- labels that are values


def value_data(outputs: int = 1) -> Data:
    """What a fixed linear function of an image yields; float labels."""
    weight = torch.randn(outputs, 3 * 8 * 8, generator=torch.Generator().manual_seed(5)) / 14

    def with_values(split: Split) -> Split:
        (x,) = split.fetch(split.indices)
        y = x.flatten(1) @ weight.T
        return replace(split, labels=y[:, 0] if outputs == 1 else y)

    data = make_data(160)
    return replace(data, train=with_values(data.train), eval=with_values(data.eval), num_classes=None)


def value_net(outputs: int = 1) -> Program:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(216, outputs)
    )
    return traced(net, 1, *SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("loss", ["auto", "smooth-l1", "mse"])
def test_regression(outputs: int, loss: str) -> None:
    """The error falls, on held-out samples and in the report; accuracy is none."""
    data = value_data(outputs)
    step, _, result = run_pass(tuned(epochs=15, loss=loss, lr=0.02), value_net(outputs), context(data))
    before = mean_error(value_net(outputs), data.eval)
    after = mean_error(result, data.eval)
    assert step.after.score == after
    assert before is not None and after is not None and after.value < 0.7 * before.value
    training = step.training
    assert training is not None and training.held_out is not None
    first = training.epochs[0].held_out
    assert first is not None and first < training.held_out < 0


def test_losses_that_do_not_fit_the_labels() -> None:
    with pytest.raises(DataError, match="loss=cross-entropy: found values as labels, expected classes"):
        run_pass(tuned(loss="cross-entropy"), value_net(), context(value_data()))
    with pytest.raises(DataError, match="loss=l1: found classes as labels, expected values"):
        run_pass(tuned(loss="l1"), normalised_net(), context(make_data()))
    with pytest.raises(DataError, match=r"values of shape \(3,\) for outputs of shape \(1,\)"):
        run_pass(tuned(), value_net(), context(value_data(3)))
