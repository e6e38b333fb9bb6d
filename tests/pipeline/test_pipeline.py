"""The pipeline: three verbs, verification after every pass, observers, and failures that name their place."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import graphcomp
from graphcomp import Context, Pipeline, Plan, Program
from graphcomp.base.cache import VARIABLE
from graphcomp.data import Data, Split
from graphcomp.errors import DataError, PassError, RecipeError, VerifyError
from graphcomp.ir.program import editable
from graphcomp.measure import calibrate
from graphcomp.measure.cost import macs, params_trainable
from graphcomp.measure.evaluate import drift, first_inputs
from graphcomp.measure.statistics import Request
from graphcomp.passes import L1, APoZ, FoldBN
from graphcomp.pipeline.verify import TOLERANCE, difference
from graphcomp.records import Step
from tests.running import run_pass
from tests.tiny import SHAPE, context, random_data, tiny, tiny_program


@dataclass(frozen=True)
class Scripted:
    """A pass that does what a test asks for; without more, nothing."""

    name: ClassVar[str] = "scripted"
    scale_in_simulate: float = 1.0
    scale_in_rewrite: float = 1.0
    value: float | None = None
    unused: bool = False
    attribute: bool = False
    error: BaseException | None = None

    def plan(self, program: Program, context: Context) -> Plan:
        if self.error is not None:
            raise self.error
        return Plan(name=self.name, summary="as told")

    def simulate(self, program: Program, plan: Plan) -> Program:
        return self._scaled(program, self.scale_in_simulate) if self.scale_in_simulate != 1 else program

    def rewrite(self, program: Program, plan: Plan) -> Program:
        result = self._scaled(program, self.scale_in_rewrite)
        if self.value is not None:
            result.tensors["fc.weight"].data[1, 2] = self.value
        if self.unused:
            result.module.register_buffer("spare", torch.zeros(3))
        if self.attribute:
            result.layer("inner", nn.Conv2d).out_channels = 15
        return result

    @staticmethod
    def _scaled(program: Program, factor: float) -> Program:
        changed = {k: program.tensors[k].detach() * factor for k in ("fc.weight", "fc.bias")}
        return replace(program, module=editable(program, changed))


def test_runs_passes_in_order() -> None:
    program = tiny_program()
    result, steps = Pipeline([FoldBN(), L1(ratio=0.5)]).run(program, context())
    assert [(s.index, s.name) for s in steps] == [(0, "fold-bn"), (1, "l1")]
    assert [s.plan_file for s in steps] == ["plans/01-fold-bn.json", "plans/02-l1.json"]
    assert [h["name"] for h in result.history] == ["fold-bn", "l1"]
    assert program.history == ()
    final = steps[-1].after
    assert (final.macs, final.params_trainable) == (macs(result), params_trainable(result))
    assert all(s.verify_error <= TOLERANCE and s.seconds > 0 for s in steps)
    assert steps[1].plan.options["ratio"] == 0.5 and steps[1].summary.startswith("removed ")
    assert [k.where for k in steps[1].plan.kept] == ["fc"]


def test_a_step_is_the_three_verbs() -> None:
    program, pass_ = tiny_program(), L1(ratio=0.5)
    _, plan, result = run_pass(pass_, program, context())
    by_hand = pass_.rewrite(pass_.simulate(program, plan), plan)
    assert str(by_hand) == str(result) and difference(by_hand, result) == 0


def test_drift_is_measured_where_values_change() -> None:
    data = random_data(3, 8, 8)
    _, steps = Pipeline([FoldBN(), L1(ratio=0.5)]).run(tiny_program(), context(data))
    assert steps[0].drift is None
    found = steps[1].drift
    assert found is not None and 0 < found.relative_l2 < 10 and found.top1_agreement is not None
    twice = run_pass(Scripted(scale_in_simulate=2.0), tiny_program(), context(data))[0]
    assert twice.drift is not None
    assert (twice.drift.relative_l2, twice.drift.top1_agreement) == (pytest.approx(1.0), 1.0)
    assert run_pass(L1(ratio=0.5), tiny_program(), context())[0].drift is None  # no data


def test_drift_is_that_of_the_first_250_samples() -> None:
    """As said in the report; ten times fewer scatter, ten times more take as long as an evaluation."""
    x = torch.randn(2500, *SHAPE[1:])
    split = Split(
        torch.zeros(len(x), dtype=torch.int64), np.arange(len(x)), lambda positions: (x[positions],)
    )
    before, after = tiny_program(), run_pass(L1(ratio=0.5), tiny_program(), context())[2]
    found = context(Data(split, split, None, "by hand", "normal")).drift(before, after)
    assert found == drift(before, after, first_inputs(split, 250))
    assert found not in [drift(before, after, first_inputs(split, n)) for n in (25, 2500)]


def test_drift_of_noise_is_that_of_16_samples() -> None:
    data = random_data(*SHAPE[1:])
    before, after = tiny_program(), run_pass(L1(ratio=0.5), tiny_program(), context())[2]
    found = context(data).drift(before, after)
    assert found == drift(before, after, first_inputs(data.train, 16))
    assert found not in [drift(before, after, first_inputs(data.train, n)) for n in (4, 64)]


def test_accuracy_after_every_step() -> None:
    """Labels are what the program says: right everywhere, until a pass turns the outputs round."""
    program = tiny_program()
    unlabelled = random_data(3, 8, 8)
    with torch.no_grad():
        labels = torch.cat([program(x).argmax(1) for (x,), _ in unlabelled.eval.batches(64)])
    data = replace(unlabelled, eval=replace(unlabelled.eval, labels=labels, labelled=True))
    _, steps = Pipeline([FoldBN(), Scripted(scale_in_simulate=-1.0)]).run(program, context(data))
    first, second = (s.after.score for s in steps)
    assert first is not None and (first.value, first.samples) == (1.0, 64)
    assert second is not None and (second.value, second.samples) == (0.0, 64)
    assert context().evaluate(program) is None


def test_observers_see_every_result() -> None:
    seen: list[tuple[Step, Program]] = []
    pipeline = Pipeline([FoldBN(), L1(ratio=0.5)], [lambda *what: seen.append(what)])
    result, steps = pipeline.run(tiny_program(), context())
    assert [s for s, _ in seen] == steps and [s.index for s in steps] == [0, 1]
    assert [s.plan.name for s in steps] == ["fold-bn", "l1"]
    assert seen[-1][1] is result
    assert [len(p.history) for *_, p in seen] == [1, 2]


def test_goes_on_after_finished_steps() -> None:
    passes = [FoldBN(), L1(ratio=0.5)]
    whole, _ = Pipeline(passes).run(tiny_program(), context())
    middle, first = Pipeline(passes[:1]).run(tiny_program(), context())
    seen: list[int] = []
    rest, again = Pipeline(passes, [lambda step, _: seen.append(step.index)]).run(middle, context(), first)
    assert seen == [1]
    assert again[0] is first[0] and len(again) == 2
    assert str(rest) == str(whole) and difference(rest, whole) == 0
    assert rest.history == whole.history


def test_progress_is_told() -> None:
    told: list[tuple[str, float]] = []
    run_pass(FoldBN(), tiny_program(), replace(context(), progress=lambda m, f: told.append((m, f))))
    assert [m for m, _ in told] == [
        f"fold-bn: {m}" for m in ("plan", "simulate", "rewrite", "verify", "evaluate", "done")
    ]
    assert [f for _, f in told] == sorted(f for _, f in told)
    assert told[0][1] == 0 and told[-1][1] == 1


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [Scripted(error=DataError("here: found a, expected b"))],
            "failed after trace: here: found a, expected b",
        ),
        (
            [FoldBN(), L1(ratio=0.5), Scripted(error=RecipeError("there"))],
            "failed after trace > fold-bn > l1: there",
        ),
    ],
)
def test_failure_names_the_passes_before(passes: list[Any], message: str) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline(passes).run(tiny_program(), context())
    assert str(caught.value) == f"pass 'scripted' {message}"
    assert caught.value.__cause__ is passes[-1].error


def test_failure_keeps_the_last_good_program() -> None:
    good: list[Program] = []
    program = tiny_program()
    passes = [FoldBN(), Scripted(error=DataError("x")), L1(ratio=0.5)]
    with pytest.raises(PassError):
        Pipeline(passes, [lambda _, result: good.append(result)]).run(program, context())
    assert len(good) == 1
    assert [h["name"] for h in good[0].history] == ["fold-bn"]
    assert difference(program, good[0]) < 1e-5


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (
            Scripted(scale_in_rewrite=1 + 1e-9),
            "found outputs that differ by 1e-09 .* between simulate and rewrite",
        ),
        (Scripted(scale_in_rewrite=2.0), "found outputs that differ by 1 "),
        (Scripted(value=float("nan")), "fc.weight: found 1 NaN or infinite values, expected finite weights"),
        (Scripted(value=float("inf")), "fc.weight: found 1 NaN or infinite values, expected finite weights"),
        (Scripted(unused=True), "spare: found a tensor that no node uses"),
        (Scripted(attribute=True), "inner.out_channels: found 15, expected 16 as its weights have"),
    ],
)
def test_wrong_rewrites_are_caught(pass_: Scripted, message: str) -> None:
    with pytest.raises(
        PassError, match=f"pass 'scripted' failed after trace > fold-bn: .*{message}"
    ) as caught:
        Pipeline([FoldBN(), pass_]).run(tiny_program(), context())
    assert isinstance(caught.value.__cause__, VerifyError)


def test_scaling_in_simulate_is_the_passes_right() -> None:
    """Simulate may change values as it likes; only rewrite is held to equality."""
    _, steps = Pipeline([Scripted(scale_in_simulate=2.0)]).run(tiny_program(), context())
    assert steps[0].verify_error <= TOLERANCE


def test_other_exceptions_and_interrupts_pass_through() -> None:
    for error in (KeyboardInterrupt(), MemoryError(), ZeroDivisionError()):
        with pytest.raises(type(error)):
            Pipeline([Scripted(error=error)]).run(tiny_program(), context())


def test_plan_file_names_sort_by_order() -> None:
    step, _, _ = run_pass(L1(ratio=0.5), tiny_program(), context())
    assert [step.model_copy(update={"index": i}).plan_file for i in (0, 9, 10)] == [
        "plans/01-l1.json",
        "plans/10-l1.json",
        "plans/11-l1.json",
    ]


# ---------------------------------------------------------------------- the public functions


def test_compile_a_module_or_a_program() -> None:
    net = tiny()
    x = torch.randn(1, 3, 8, 8)
    made = graphcomp.compile(net, "fold-bn, l1{ratio=0.5}", example_inputs=x, target="cpu-avx2")
    again = graphcomp.compile(tiny_program(), [FoldBN(), L1(ratio=0.5)], target="cpu-avx2")
    assert [s.name for s in made.steps] == [s.name for s in again.steps] == ["fold-bn", "l1"]
    assert str(made.program) == str(again.program) and difference(made.program, again.program) == 0
    assert torch.equal(net(x), tiny()(x))  # left as it was
    other = graphcomp.compile(tiny_program(), "l1{ratio=0.5}", target="cpu-avx2", data="random?limit=8")
    assert other.steps[0].after.macs < macs(tiny_program())
    assert other.steps[0].drift is not None


def test_compile_says_what_is_wrong() -> None:
    program = tiny_program()
    with pytest.raises(RecipeError, match="example_inputs: found none, expected one tensor an input"):
        graphcomp.compile(tiny(), "fold-bn")
    with pytest.raises(RecipeError, match="found no pass 'foldbn'"):
        graphcomp.compile(program, "foldbn")
    with pytest.raises(RecipeError, match="passes: found none, expected at least one"):
        graphcomp.compile(program, [])
    with pytest.raises(RecipeError, match="target: found 'gpu'"):
        graphcomp.compile(program, "fold-bn", target="gpu")
    with pytest.raises(DataError, match="nothing"):
        graphcomp.compile(program, "fold-bn", data="nothing")
    with pytest.raises(
        PassError, match="pass 'apoz' cannot work after trace > fold-bn: calibration: found no data"
    ):
        graphcomp.compile(program, [FoldBN(), APoZ()])


@pytest.mark.slow
def test_the_seed_decides() -> None:
    line = "random{ratio=0.5, multiple=1}"
    runs = [graphcomp.compile(tiny_program(), line, seed=s).program.history for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_collects_from_the_calibration_data_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass for all that ask the same of the same program, even without a cache on disk."""
    monkeypatch.setenv(VARIABLE, "")
    measured: list[int] = []
    measure = calibrate._measure
    monkeypatch.setattr(
        calibrate, "_measure", lambda p, split, *rest: measured.append(len(split)) or measure(p, split, *rest)
    )
    data = random_data(3, 8, 8)
    requests = [Request("stem", "covariance"), Request("relu", "zeros")]
    where, program = context(data), tiny_program()
    whole = where.collect(program, requests)
    later = replace(where, progress=lambda message, fraction: None).collect(program.clone(), requests[:1])
    assert measured == [64] and later[requests[0]] is whole[requests[0]]
    assert calibrate.collect(program, data.train, requests)[requests[1]].fraction.equal(  # type: ignore[union-attr]
        whole[requests[1]].fraction  # type: ignore[union-attr]
    )
    where.collect(program, requests, samples=20)
    assert measured == [64, 64, 20]
    with pytest.raises(DataError, match="calibration: found no data, expected samples; give --data"):
        context().collect(program, requests)


def test_progress_of_a_plan_is_a_part_of_its_pass() -> None:
    told: list[tuple[str, float]] = []
    where = replace(context(random_data(3, 8, 8)), progress=lambda m, f: told.append((m, f)))
    run_pass(APoZ(ratio=0.5), tiny_program(), where)
    assert ("apoz: calibrate: 64 of 64 samples", pytest.approx(0.4)) in told
    assert [f for _, f in told] == sorted(f for _, f in told)
    assert [m for m, f in told if f == 1.0] == ["apoz: done"]
