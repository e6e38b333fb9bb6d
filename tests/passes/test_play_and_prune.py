"""play-and-prune: first thresholds, the game on a network that learns in a second, and what it returns."""

import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from torch import Tensor

from graphcomp.compiler.recipe import parse_passes
from graphcomp.errors import DataError, PassError
from graphcomp.ir.program import Program
from graphcomp.measure.evaluate import accuracy
from graphcomp.passes import PASSES, PlayAndPrune
from graphcomp.passes.play_and_prune.afp import EpochOptions
from graphcomp.passes.play_and_prune.prc import points
from graphcomp.pipeline import Context, Course
from graphcomp.pipeline.rounds import held_out_samples
from graphcomp.records import Plan, Step
from graphcomp.train.options import Seen, TrainOptions, cross_entropy
from graphcomp.train.training import fit
from tests.learnable import make_data, make_split, normalised_net, same
from tests.running import run_pass
from tests.tiny import context, random_data, tiny_program


@pytest.fixture(scope="module")
def taught() -> Program:
    """A network that knows the four patterns."""
    options = TrainOptions(epochs=6, batch=24, lr=0.1, precision="float32")
    return fit(normalised_net(), make_split(), options).program


def game(**options: Any) -> PlayAndPrune:
    training = EpochOptions(**{"batch": 24, "lr": 0.02, "precision": "float32", "held_out": 0.25})
    return PlayAndPrune(
        **{
            "eps": 5.0,
            "alpha": 0.3,
            "lambda0": 1e-3,
            "max_epochs": 4,
            "delta0": 5.0,
            "training": training,
            **options,
        }
    )


def test_the_plan(taught: Program) -> None:
    told: list[str] = []
    where = replace(context(make_data()), progress=lambda m, f: told.append(m))
    plan = game(samples=20).plan(taught, where)
    assert plan.decisions["thresholds"].keys() == {"0", "4"}
    assert plan.summary == "thresholds for 2 layers from 20 held-out samples"
    assert [m for m in told if m.startswith("threshold")] == ["threshold 1 of 2", "threshold 2 of 2"]
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    shared = game().plan(tiny_program(), context(make_data()))
    assert ("stem", "its channels are shared with 1 other layer(s)") in {
        (k.where, k.reason) for k in shared.kept
    }
    assert shared.decisions["thresholds"].keys() == {"inner"}


# ---------------------------------------------------------------------- the game


@pytest.fixture(scope="module")
def played(taught: Program) -> tuple[Step, Plan, Program]:
    return run_pass(game(), taught, context(make_data()))


@pytest.mark.slow
def test_invariants(taught: Program, played: tuple[Step, Plan, Program]) -> None:
    """The returned network has C >= E - eps, and the number of filters never rises."""
    step, _, result = played
    scores = [points(s.score) for s in step.snapshots]
    kept = step.rounds[: step.kept_rounds]
    assert scores[step.kept_rounds] >= scores[0] - 5.0
    judges = held_out_samples("x", make_data(), 0.25)
    assert points(accuracy(result, judges)) == scores[step.kept_rounds]
    params = [s.params_trainable for s in step.snapshots]
    assert params == sorted(params, reverse=True) and params[-1] < params[0]
    assert sum(sum(row.removed.values()) for row in kept) > 0
    assert [row.name for row in step.rounds][:2] == ["afp-epoch", "afp-cut"]
    assert len([row for row in step.rounds if row.name == "afp-epoch"]) == 4
    assert step.summary.endswith("; 4 epochs were played")
    assert step.verify_error < 1e-12


def test_t3_3_removed_filters_are_candidates_chosen_anew(played: tuple[Step, Plan, Program]) -> None:
    """T3.3: each cut takes some of the candidates of its own epoch, floor(alpha n) of those left."""
    _, plan, _ = played
    widths = {"0": 6, "4": 8}
    epochs = 0
    for first, then in pairwise(plan.decisions["rounds"]):
        if (first["name"], then["name"]) != ("afp-epoch", "afp-cut"):
            continue
        epochs += 1
        chosen = first["decisions"]["candidates"]
        assert {n: len(rows) for n, rows in chosen.items()} == {
            n: int(0.3 * w + 1e-9) for n, w in widths.items() if int(0.3 * w + 1e-9)
        }
        for name, rows in then["decisions"]["rows"].items():
            layer = name.removesuffix(".weight")
            assert set(rows) <= set(chosen[layer])
            widths[layer] -= len(rows)
    assert epochs > 1 and widths != {"0": 6, "4": 8}


def test_t3_1_rates_follow_the_accuracy(played: tuple[Step, Plan, Program]) -> None:
    """T3.1: T_r, lambda_A and W_A of every round are what the rules make of the accuracy before its epoch."""
    step, plan, _ = played
    first = plan.decisions["thresholds"]
    scores = [points(s.score) for s in step.snapshots]
    for row in step.rounds:
        begun = row.index if row.name == "afp-epoch" else row.index - 1
        rate = min(max(0.0, scores[begun] - (scores[0] - 5.0)), 10.0)
        if row.name == "afp-epoch":
            assert row.plan.evidence == pytest.approx({"rate": rate, "weight": rate * 1e-3})
        else:
            assert row.plan.evidence["thresholds"] == pytest.approx(
                {n: rate * first[n] for n in row.plan.evidence["thresholds"]}
            )


@pytest.mark.slow
@pytest.mark.parametrize("good", [1, 2])
def test_t3_4_a_collapse_is_rolled_back(taught: Program, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    """T3.4: an oracle lets the accuracy collapse after some epochs; the result is the snapshot before."""
    real = Course.snapshots.fget  # type: ignore[attr-defined]

    def collapsing(course: Course) -> Any:
        found = real(course)
        bad = found[0].score.model_copy(update={"value": 0.3})
        return [s if i <= 2 * good else s.model_copy(update={"score": bad}) for i, s in enumerate(found)]

    lenient = {"eps": 50.0, "delta0": 5.0, "delta_w": 0.1}
    expected = run_pass(game(max_epochs=good, **lenient), taught, context(make_data()))
    monkeypatch.setattr(Course, "snapshots", property(collapsing))
    step, _, result = run_pass(game(patience=2, max_epochs=20, **lenient), taught, context(make_data()))
    monkeypatch.undo()
    assert step.kept_rounds == 2 * good and len(step.rounds) == 2 * good + 2 + 2
    assert step.summary.endswith("; 2 epochs did not bring the accuracy back")
    assert len(result.history) == 2 * good and same(result, expected[2])


@pytest.mark.slow
def test_two_games_are_equal_and_the_seed_decides(
    taught: Program, played: tuple[Step, Plan, Program]
) -> None:
    again = run_pass(game(), taught, context(make_data()))
    assert same(again[2], played[2]) and again[1] == played[1]
    one, other = (
        run_pass(game(max_epochs=1, eps=50.0), taught, context(make_data(), seed=seed)) for seed in (0, 5)
    )
    assert len(one[2].history) == len(other[2].history) == 2 and not same(other[2], one[2])


@pytest.mark.slow
def test_every_epoch_sees_its_samples_in_another_order(taught: Program) -> None:
    """Also with a seed of its own."""
    own = game(training=EpochOptions(batch=24, lr=0.02, held_out=0.25, precision="float32", seed=3))
    _, plan, _ = run_pass(own, taught, context(make_data()))
    seeds = [p["decisions"]["seed"] for p in plan.decisions["rounds"] if p["name"] == "afp-epoch"]
    assert seeds == list(range(3, 3 + len(seeds))) and len(seeds) > 1


@pytest.mark.slow
def test_a_game_stopped_and_resumed(taught: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second epoch: with the momenta that were cut, the result is the same to the last bit."""

    def where(**more: Any) -> Context:
        return replace(context(make_data()), workdir=tmp_path, **more)

    calls: list[int] = []

    def stopping(smoothing: float) -> Any:
        def loss(seen: Seen) -> Tensor:
            calls.append(1)
            if len(calls) == 6:
                signal.raise_signal(signal.SIGINT)
            return cross_entropy(smoothing)(seen)

        return loss

    with monkeypatch.context() as patch:
        patch.setattr("graphcomp.passes.play_and_prune.afp.cross_entropy", stopping)
        with pytest.raises(KeyboardInterrupt, match=r"stopped after step 2 of 4"):
            run_pass(game(), taught, where())
    assert sorted(p.name for p in (tmp_path / "01-play-and-prune" / "rounds").iterdir()) == [
        "001.json", "002", "002.json", "002.momenta.safetensors",
    ]  # fmt: skip
    told: list[str] = []
    resumed = run_pass(game(), taught, where(progress=lambda m, f: told.append(m)))
    expected = run_pass(game(), taught, context(make_data()))
    assert same(resumed[2], expected[2]) and resumed[1] == expected[1]
    assert not any("threshold" in m or "[2/8]" in m for m in told)


# ---------------------------------------------------------------------- options and refusals


def test_in_a_recipe() -> None:
    (made,) = parse_passes(
        "play-and-prune{eps=0.5, alpha=0.2, exclude=conv1, training={lr=0.005, batch=64}}", PASSES
    )
    assert isinstance(made, PlayAndPrune)
    assert (made.eps, made.alpha, made.exclude) == (0.5, 0.2, ("conv1",))
    assert (made.training.lr, made.training.batch, made.training.schedule) == (0.005, 64, "constant")
    assert made.training.keep == "last" and made.held_out == 0.1


@pytest.mark.parametrize("options", [{"eps": 0}, {"alpha": 1}, {"alpha": 0}, {"patience": 0}, {"delta0": -1}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PlayAndPrune(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "said"), [(None, "found no data"), (random_data(3, 8, 8), "found data without labels")]
)
def test_without_labelled_data(taught: Program, data: Any, said: str) -> None:
    with pytest.raises(DataError, match=f"play-and-prune: {said}"):
        run_pass(game(), taught, context(data))


def test_without_a_layer_to_play_on(taught: Program) -> None:
    with pytest.raises(PassError, match="found no layer whose filters can go one by one"):
        run_pass(game(include="nothing"), taught, context(make_data()))


def test_a_plan_alone_is_not_enough(taught: Program) -> None:
    with pytest.raises(PassError, match="found a plan without data, expected data to learn from"):
        game().simulate(taught, Plan(name="play-and-prune"))
