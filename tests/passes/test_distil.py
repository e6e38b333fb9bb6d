"""distil: the distance by hand, whose shapes must agree, who the teacher is, and that it stays as it is."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphcomp.compiler.compiler import build, compile_program
from graphcomp.compiler.recipe import Recipe, parse_passes
from graphcomp.compiler.source import Job
from graphcomp.data.split import Data
from graphcomp.errors import DataError, PassError
from graphcomp.ir import load, save
from graphcomp.ir.program import Program
from graphcomp.models.resnet_cifar import ResNet
from graphcomp.passes import L1, PASSES, Distil, Finetune, Student
from graphcomp.passes.distil.losses import cosine_distance, cosine_loss, hinton
from graphcomp.pipeline import Pipeline, held
from graphcomp.pipeline.contract import TrainingPass
from graphcomp.records import Step
from graphcomp.train.options import Seen
from tests.learnable import SHAPE, exact_data, make_data, plain_net, weights
from tests.processes import in_processes
from tests.running import run_pass
from tests.tiny import SPEC, context, random_data, tiny_program, traced


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (row(1, 2, 3), row(1, 2, 3), 0),
        (row(1, 0), row(0, 1), 1),
        (row(1, 2, 3), row(2, 4, 6), 0),
        (row(1, 2, 3), row(3, 2, 1), 2 / 7),
        (row(1, 2, 3), row(-1, -2, -3), 2),
        (row(0, 0, 0), row(1, 2, 3), 1),
    ],
)
def test_g2_2_distance(a: Tensor, b: Tensor, expected: float) -> None:
    assert cosine_distance(a, b).tolist() == pytest.approx([expected], abs=1e-12)
    assert cosine_distance(b, a).tolist() == pytest.approx([expected], abs=1e-12)
    assert round(2 / 7, 6) == 0.285714


def test_distance_is_over_the_whole_sample() -> None:
    """Not over channels, nor positions, each by itself."""
    a, b = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    expected = 1 - torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1))
    assert torch.allclose(cosine_distance(a, b), expected, atol=1e-6)
    assert torch.allclose(cosine_distance(a[:, 0, 0, 0], b[:, 0, 0, 0]) % 2, torch.zeros(4), atol=1e-6)


def test_t2_5_nothing_is_broadcast() -> None:
    with pytest.raises(PassError, match=r"found shapes \(2, 4\) and \(2, 1\), expected one shape"):
        cosine_distance(torch.ones(2, 4), torch.ones(2, 1))


def seen(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **hints: tuple[Tensor, Tensor]
) -> Seen:
    none = torch.zeros(len(student), dtype=torch.int64)
    return Seen(
        inputs=student,
        labels=none if labels is None else labels,
        outputs=student,
        watched={n: own for n, (own, _) in hints.items()},
        teacher_outputs=teacher,
        teacher_watched={n: theirs for n, (_, theirs) in hints.items()},
    )


def test_loss_by_hand() -> None:
    """Two hint layers with distances 1 and 2, predictions with 2/7."""
    orthogonal, opposite = (row(1, 0), row(0, 1)), (row(1, 1), row(-1, -1))
    example = seen(row(1, 2, 3), row(3, 2, 1), a=orthogonal, b=opposite)
    mean, whole = (cosine_loss(["a", "b"], 0.25, r) for r in ("mean", "sum"))
    assert float(mean(example)) == pytest.approx(0.75 * 1.5 + 0.25 * 2 / 7)
    assert float(whole(example)) == pytest.approx(3 + 0.25 * 2 / 7)
    assert float(cosine_loss([], 1.0)(example)) == pytest.approx(2 / 7)
    assert float(cosine_loss(["a"], 1.0)(example)) == pytest.approx(2 / 7)


def test_t2_6_angles_of_samples_not_of_the_batch() -> None:
    """Scaling one sample's teacher changes nothing; swapping two of the student's samples does."""
    own, theirs = torch.randn(6, 4, 3, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)
    loss = cosine_loss(["h"], 0.5)
    before = float(loss(seen(own[:, 0], theirs[:, 0], h=(own, theirs))))
    scaled = theirs.clone()
    scaled[2] *= 10
    assert float(loss(seen(own[:, 0], scaled[:, 0], h=(own, scaled)))) == pytest.approx(before, abs=1e-12)
    swapped = own[[0, 3, 2, 1, 4, 5]]
    assert abs(float(loss(seen(swapped[:, 0], theirs[:, 0], h=(swapped, theirs)))) - before) > 0.01


def test_t2_7_values_need_more_than_angles() -> None:
    teacher = torch.randn(5, 3)
    twice = seen(2 * teacher, teacher)
    assert float(cosine_loss([], 1.0)(twice)) == pytest.approx(0, abs=1e-6)
    expected = float(teacher.square().mean())
    assert float(cosine_loss([], 1.0, mse=1.0)(twice)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1])
def test_t2_9_zero_vectors(zero: int) -> None:
    pair = [torch.randn(2, 3), torch.randn(2, 3)]
    pair[zero][0] = 0
    for tensor in pair:
        tensor.requires_grad_(True)
    found = cosine_distance(*pair)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert found[0].item() == 1 and found[1].item() != 1
    for tensor in pair:
        assert tensor.grad is not None and bool(torch.isfinite(tensor.grad).all())
        assert not tensor.grad[0].any() and bool(tensor.grad[1].any())


def test_gradient_is_that_of_the_formula() -> None:
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(cosine_distance, (a, b))  # type: ignore[no-untyped-call]


def test_hinton_by_hand() -> None:
    own, theirs, labels = row(1, 3), row(2, 0), torch.tensor([1])
    p = 1 / (1 + math.exp(-1.0))  # of the teacher's first class at temperature 2
    q = 1 / (1 + math.exp(1.0))
    soft = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    hard = math.log(1 + math.exp(-2))
    example = seen(own, theirs, labels)
    assert float(hinton(2.0, 0.75)(example)) == pytest.approx(0.75 * soft + 0.25 * hard)
    assert float(hinton(2.0, 1.0)(example)) == pytest.approx(soft)
    assert float(hinton(1.0, 0.0)(example)) == pytest.approx(hard)


# ---------------------------------------------------------------------- in a pipeline


def distil(**options: Any) -> Distil:
    return Distil(**{"epochs": 2, "batch": 24, "lr": 0.05, "precision": "float32", **options})


def run(passes: list[Any], data: Data | None = None, program: Program | None = None) -> list[Step]:
    return Pipeline(passes).run(program or tiny_program(), context(data or make_data()))[1]


@pytest.mark.slow
def test_a_student_learns() -> None:
    """A network that knows the patterns is taught to one with random weights and half of the trunk."""
    taught = Finetune(epochs=8, batch=24, lr=0.05, precision="float32")
    _, known, student, learned = run(
        [Student(init="slice", fraction=0.9), taught, Student(), distil(epochs=25, held_out=0.25)]
    )
    top1 = [s.after.score.value for s in (known, student, learned) if s.after.score is not None]
    assert top1[0] > 0.9 and top1[1] < 0.6 and top1[2] > 0.8
    assert learned.training is not None and learned.training.teacher == "step 2 (finetune)"
    assert "learned from step 2 (finetune)" in learned.summary
    assert learned.after.params_trainable == student.after.params_trainable < known.after.params_trainable


def test_t2_5_the_teacher_is_named_in_the_plan() -> None:
    """By default what the student was made from: the partially pruned network and not the baseline."""
    program, data = tiny_program(), make_data()
    results: list[Program] = []
    pipeline = Pipeline(
        [L1(include=("inner",), ratio=0.5, multiple=1), Student(), distil(epochs=1)],
        [lambda _, result: results.append(result)],
    )
    _, steps = pipeline.run(program, context(data))
    decisions = steps[2].plan.decisions
    assert decisions["teacher"] == "step 1 (l1)"
    assert decisions["teacher_fingerprint"] == results[0].fingerprint() != program.fingerprint()
    assert decisions["hints"] == {"inner": "relu_1"}
    assert "teacher: step 1 (l1); 1 hint layers" in steps[2].plan.summary


def test_the_plan_says_what_is_watched() -> None:
    program = tiny_program()
    here = replace(context(make_data()), earlier=(held("input", program),))
    pass_ = distil(teacher="input")
    plan = pass_.plan(program, here)
    assert pass_.lesson(program, plan, here).watch == ["relu_1"]
    other = plan.model_copy(update={"decisions": {**plan.decisions, "hints": {"stem": "relu"}}})
    assert pass_.lesson(program, other, here).watch == ["relu"]


@pytest.mark.slow
def test_t2_5_the_baseline_has_other_shapes() -> None:
    passes = [L1(include=("inner",), ratio=0.5, multiple=1), Student(), distil(teacher="input")]
    with pytest.raises(
        PassError,
        match=r"inner: found the shape \(1, 16, 8, 8\) in the teacher, expected \(1, 8, 8, 8\) as here",
    ):
        run(passes)
    step = run([*passes[:2], distil(teacher="input", prediction=1)])[-1]
    assert step.training is not None and step.training.teacher == "the run's input"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        ("input", "the run's input"),
        (0, "the run's input"),
        (1, "step 1 (student)"),
        ("student", "step 1 (student)"),
        ("finetune", "step 2 (finetune)"),
        (None, "the run's input"),
    ],
)
def test_names_of_teachers(teacher: str | int | None, named: str) -> None:
    passes = [Student(), Finetune(max_steps=1, batch=24), distil(max_steps=1, teacher=teacher)]
    step = run(passes)[-1]
    assert step.training is not None and step.training.teacher == named


def test_a_saved_teacher(tmp_path: Path) -> None:
    place = str(tmp_path / "teacher")
    save(tiny_program(), place)
    step = run([distil(max_steps=1, teacher=place)])[0]
    assert step.training is not None and step.training.teacher == place


@pytest.mark.parametrize("teacher", [None, "l1", 7, "nowhere/at/all"])
def test_no_such_teacher(teacher: str | int | None) -> None:
    with pytest.raises(PassError, match=r"teacher: did not find .* \(known: 0 input, 1 fold-bn\)"):
        run([*parse_passes("fold-bn", PASSES), distil(teacher=teacher)])
    with pytest.raises(PassError, match=r"\(known: none\)"):
        run_pass(distil(teacher=teacher), tiny_program(), context(make_data()))


def test_teacher_with_other_outputs(tmp_path: Path) -> None:
    save(traced(ResNet(8), 1, *SHAPE), tmp_path)
    with pytest.raises(PassError, match=r"found outputs of shape \[\(1, 10\)\], expected \[\(1, 4\)\]"):
        run([distil(teacher=str(tmp_path))])


@pytest.mark.parametrize("loss", ["cosine", "kl"])
def test_t2_8_the_teacher_stays_as_it_is(loss: str) -> None:
    """Bitwise: no gradient reaches it, and its normalisations track nothing."""
    program = tiny_program()
    before = weights(program)
    step = run([distil(teacher="input", loss=loss, epochs=1)], program=program)[0]
    assert step.training is not None and step.training.epochs[-1].steps == 5
    assert all(torch.equal(t, before[n]) for n, t in program.tensors.items())
    assert all(t.grad is None for t in program.module.parameters())


@pytest.mark.slow
def test_without_labels() -> None:
    """Angles need none: then the last epoch is the result; labels in the loss are asked for."""
    data = random_data(*SHAPE)
    step = run([Student(), distil(epochs=1)], data)[-1]
    assert step.training is not None and step.training.held_out is None and step.training.samples == 64
    run([Student(), distil(epochs=1, loss="kl", alpha=1)], data)
    with pytest.raises(PassError, match="distil: found data without labels"):
        run([Student(), distil(loss="kl")], data)


def test_no_hint_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 4))
    program = traced(net, 1, *SHAPE)
    with pytest.raises(PassError, match="hints: found no prunable layer with a ReLU that they match"):
        run([distil(teacher="input")], program=program)
    with pytest.raises(PassError, match="hints: found no prunable layer"):
        run([distil(teacher="input", hints="conv*")])
    run([distil(teacher="input", prediction=1, max_steps=1)], program=program)
    run([distil(teacher="input", hints="0", max_steps=1)], program=plain_net())


def test_no_classifier() -> None:
    """Feature maps can be compared; softened classes cannot. mse is on where there are no classes."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    program, data = traced(net, 1, *SHAPE), make_data()
    step = run([distil(teacher="input", max_steps=2)], data, program)[0]
    assert step.training is not None and step.training.held_out is None
    with pytest.raises(PassError, match=r"loss=kl: found no \(batch, classes\) output"):
        run([distil(teacher="input", loss="kl", alpha=1)], data, program)


@pytest.mark.slow
def test_resumed_run_has_the_same_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `--resume` the teacher is read back from its checkpoint, in `student`'s default too."""
    passes = [L1(include=("inner",), ratio=0.5, multiple=1), Student(), distil(epochs=1)]
    names = [p.name for p in passes]
    job = Job(
        SPEC, Recipe(passes=names, data="random?limit=24", bench=False), passes, input_shape=(1, *SHAPE)
    )
    with monkeypatch.context() as patch:
        patch.setattr("graphcomp.passes.distil.Distil.train", _fails)
        with pytest.raises(PassError, match="stopped here"):
            build(job, tmp_path / "a")
    training = build(job, tmp_path / "a", resume=True).steps[-1].training
    assert training is not None and training.teacher == "step 1 (l1)"
    plan = json.loads((tmp_path / "a" / "plans" / "03-distil.json").read_text())["decisions"]
    first = load(tmp_path / "a" / "checkpoints" / "01-l1")
    assert plan["teacher_fingerprint"] == first.fingerprint()


def _fails(*_: object) -> None:
    raise DataError("stopped here")


def test_in_memory() -> None:
    """The Python API knows the steps as well."""
    passes = [Student(), distil(max_steps=1)]
    step = compile_program(tiny_program(), passes, data=make_data()).steps[-1]
    assert step.training is not None and step.training.teacher == "the run's input"


def test_in_a_recipe() -> None:
    (made,) = parse_passes("distil{teacher=2, prediction=0.3, reduction=sum, epochs=4}", PASSES)
    assert isinstance(made, Distil) and isinstance(made, TrainingPass)
    assert (made.teacher, made.prediction, made.reduction) == (2, 0.3, "sum")
    (other,) = parse_passes('distil{teacher="out/program", loss=kl, temperature=2, alpha=1}', PASSES)
    assert isinstance(other, Distil) and other.teacher == "out/program" and not other.needs_labels
    assert replace(other, alpha=0.5).needs_labels and not made.needs_labels


def test_regression_adds_the_squared_error() -> None:
    """T2.7: with float labels mse has weight 1 unless said otherwise, and epochs are scored by the error."""
    data = make_data()
    labels = {"train": torch.randn(120, 4), "eval": torch.randn(60, 4)}
    split = {name: replace(getattr(data, name), labels=y) for name, y in labels.items()}
    values = replace(data, **split, num_classes=None)
    program, twice = tiny_program(), seen(row(2.0, 4.0), row(1.0, 2.0))
    for expected, options, given in ((2.5, {}, values), (0, {}, data), (0, {"mse": 0.0}, values)):
        here = replace(context(given), earlier=(held("input", program),))
        pass_ = distil(teacher="input", prediction=1, **options)
        loss = pass_.lesson(program, pass_.plan(program, here), here).loss
        assert float(loss(twice)) == pytest.approx(expected, abs=1e-6)
    step = run([distil(teacher="input", epochs=1)], values)[0]
    assert step.after.score is not None and step.after.score.measure == "error"
    assert step.training is not None
    assert step.training.held_out is not None and step.training.held_out < 0


# ---------------------------------------------------------------------- several processes


def taught(saved: str) -> list[dict[str, Tensor]]:
    """Students of a step of the run, of its input and of a saved program, in float64."""
    program, smaller = tiny_program().to(torch.float64), L1(include=("inner",), ratio=0.5, multiple=1)
    found = []
    for passes in (
        [smaller, Student(), distil(epochs=1, batch=23, held_out=0.2)],
        [Student(), distil(epochs=1, loss="kl", teacher=0, accumulate=2, bn_reestimate=40)],
        [Student(), distil(epochs=1, teacher=saved, mse=0.5, reduction="sum")],
    ):
        found.append(weights(Pipeline(passes).run(program, context(exact_data()))[0]))
    return found


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """One teacher in both, the same draws of the student's weights, and the loss of the whole batch."""
    saved = str(tmp_path / "teacher")
    save(tiny_program().to(torch.float64), saved)
    first, second = in_processes(2, taught, saved)
    for expected, one, two in zip(taught(saved), first, second, strict=True):
        assert expected.keys() == one.keys()
        for name, value in expected.items():
            assert torch.allclose(one[name], value, rtol=1e-8, atol=1e-10), name
            assert torch.equal(one[name], two[name]), name
