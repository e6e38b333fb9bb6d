"""Accuracy with its interval, and drift."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcomp.data.split import Split
from graphcomp.errors import DataError
from graphcomp.ir.program import Program
from graphcomp.measure.evaluate import (
    accuracy,
    confusion,
    drift,
    first_inputs,
    is_classifier,
    mean_error,
    score,
    values_like,
    wilson,
)
from tests.nets import Net
from tests.tiny import traced


def split(x: Tensor, y: list[int], labelled: bool = True) -> Split:
    return Split(torch.tensor(y), np.arange(len(x)), lambda i: (x[torch.from_numpy(i)],), labelled)


def identity(width: int = 3) -> Program:
    """Logits are the inputs."""
    return traced(nn.Flatten(), 1, width)


LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 5], [9, 0, 0], [0, 9, 0]])


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, the score method
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    low, high = wilson(0, 20)
    assert low == 0.0 and high == pytest.approx(0.16113, abs=1e-5)
    low, high = wilson(20, 20)
    assert low == pytest.approx(0.83887, abs=1e-5) and high == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_share_of_one_process_is_everything() -> None:
    data = split(LOGITS, [0, 1, 0, 0, 2])
    assert accuracy(identity(), data, shared=True) == accuracy(identity(), data)


def test_accuracy() -> None:
    found = accuracy(identity(), split(LOGITS, [0, 1, 0, 0, 2]))
    assert found is not None
    assert (found.value, found.samples) == (3 / 5, 5)
    assert (found.low, found.high) == wilson(3, 5)


def test_top5() -> None:
    """By hand: places 1, 5, 6 and, of seven equal outputs, the fifth and the sixth; of five, nothing."""
    falling, equal = torch.arange(7.0, 0, -1), torch.zeros(7)
    data = split(torch.stack([falling, falling, falling, equal, equal]), [0, 4, 5, 4, 5])
    found = accuracy(identity(7), data)
    assert found is not None and (found.value, found.top5) == (1 / 5, 3 / 5)
    few = accuracy(identity(5), split(torch.eye(5), [1, 1, 2, 3, 4]))
    assert few is not None and (few.value, few.top5) == (4 / 5, None)


@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_accuracy_does_not_depend_on_the_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphcomp.measure.evaluate.BATCH", size)
    found = accuracy(identity(), split(LOGITS, [0, 1, 0, 0, 2]))
    assert found is not None and found.value == 3 / 5


def test_no_accuracy_without_labels() -> None:
    assert accuracy(identity(), split(LOGITS, [0] * 5, labelled=False)) is None


@pytest.mark.parametrize(
    ("net", "classifies"),
    [
        (nn.Flatten(), True),
        (Net(lambda m, x: x.sum((2, 3))[:, :1]), False),  # one output
        (nn.Identity(), False),  # a map
        (Net(lambda m, x: (x.flatten(1), x)), False),
        (Net(lambda m, x: {"out": x.flatten(1)}), False),
    ],
)
def test_is_classifier(net: nn.Module, classifies: bool) -> None:
    program = traced(net, 1, 2, 2, 2)
    assert is_classifier(program) is classifies
    data = split(torch.ones(2, 2, 2, 2), [0, 0])
    assert (accuracy(program, data) is not None) is classifies


def test_labels_beyond_the_outputs() -> None:
    with pytest.raises(
        DataError, match="labels: found class 3, expected classes below 3, the number of the network"
    ):
        accuracy(identity(), split(LOGITS, [0, 1, 3, 0, 2]))


def test_no_samples() -> None:
    with pytest.raises(DataError, match="evaluation data: found no samples"):
        accuracy(identity(), split(LOGITS[:0], []))


def scaled(factor: float) -> Program:
    return traced(Net(lambda m, x: x * factor), 1, 3)


def test_drift_of_the_same_program() -> None:
    found = drift(identity(), identity(), [(LOGITS,)])
    assert (found.relative_l2, found.top1_agreement) == (0.0, 1.0)


def test_drift_by_hand() -> None:
    """||2x - x|| / ||x|| = 1 and the order stays; ||-x - x|| / ||x|| = 2 and it turns round."""
    double = drift(identity(), scaled(2.0), [(LOGITS[:2],), (LOGITS[2:],)])
    assert (double.relative_l2, double.top1_agreement) == (1.0, 1.0)
    negative = drift(identity(), scaled(-1.0), [(LOGITS,)])
    assert (negative.relative_l2, negative.top1_agreement) == (2.0, 0.0)


def test_drift_adds_up_over_outputs_and_batches() -> None:
    def two(a: float, b: float) -> Program:
        return traced(Net(lambda m, x: (x * a, {"b": x * b})), 1, 3)

    found = drift(two(1, 1), two(1, 3), [(LOGITS[:1],), (LOGITS[1:],)])
    assert found.relative_l2 == pytest.approx(math.sqrt(4 / 2))
    assert found.top1_agreement is None  # not a classifier


def test_drift_from_zero() -> None:
    found = drift(scaled(0.0), identity(), [(torch.ones(1, 3),)])
    assert found.relative_l2 == pytest.approx(math.sqrt(3))


@pytest.mark.parametrize(
    ("samples", "sizes"), [(1, [1]), (10, [10]), (250, [250]), (251, [250, 1]), (9999, None)]
)
def test_first_inputs(samples: int, sizes: Any) -> None:
    x = torch.arange(600.0).view(600, 1)
    found = [b for (b,) in first_inputs(split(x, [0] * 600), samples)]
    assert [len(b) for b in found] == (sizes or [250, 250, 100])
    assert torch.equal(torch.cat(found), x[: sum(map(len, found))])


# ---------------------------------------------------------------------- confusion


def test_confusion() -> None:
    """A row for each true class; its trace's share is the accuracy."""
    data = split(LOGITS, [0, 1, 0, 0, 2])
    found, top1 = confusion(identity(), data), accuracy(identity(), data)
    assert found is not None and top1 is not None and found.dtype == torch.int64
    assert found.tolist() == [[2, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert int(found.trace()) / int(found.sum()) == top1.value


def test_confusion_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several batches, the last one smaller."""
    monkeypatch.setattr("graphcomp.measure.evaluate.batch_size", lambda program: 7)
    x, y = torch.randn(40, 5), torch.randint(0, 5, (40,))
    counted = torch.zeros(5, 5, dtype=torch.int64)
    for row, label in zip(x, y, strict=True):
        counted[label, row.argmax()] += 1
    found = confusion(identity(5), split(x, y.tolist()))
    assert found is not None and torch.equal(found, counted)


def test_no_confusion() -> None:
    assert confusion(identity(), split(LOGITS, [0] * 5, labelled=False)) is None
    with pytest.raises(DataError, match="found class 7, expected classes below 3"):
        confusion(identity(), split(LOGITS, [0, 1, 0, 7, 2]))
    with pytest.raises(DataError, match="found no samples"):
        confusion(identity(), split(LOGITS[:0], []))


def values(x: Tensor, y: Tensor) -> Split:
    return Split(y, np.arange(len(x)), lambda i: (x[torch.from_numpy(i)],))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_mean_error(shape: tuple[int, ...]) -> None:
    """|1 - 0|, |2 - 4|, |3 - 3|, |4 - 9|: labels [n] for outputs [n, 1] are not broadcast."""
    x, y = torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([0.0, 4, 3, 9]).reshape(shape)
    found = mean_error(identity(1), values(x, y))
    assert found is not None and (found.value, found.samples) == (2.0, 4)
    half = 1.959964 * math.sqrt(30 / 4 - 4) / 2
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert accuracy(identity(1), values(x, y)) is None and confusion(identity(1), values(x, y)) is None


def test_mean_error_over_several_values() -> None:
    """The mean over a sample's values; and no accuracy, though the outputs look like a classifier's."""
    x, y = torch.zeros(2, 3), torch.tensor([[1.0, 2, 3], [0, 0, -9]])
    split = values(x, y)
    found = mean_error(identity(), split)
    assert found is not None and found.value == 2.5
    assert score(identity(), split) == found and accuracy(identity(), split) is None


def test_mean_error_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(17, 3), torch.randn(17, 3)
    found = []
    for size in (1, 5, 17):
        monkeypatch.setattr("graphcomp.measure.evaluate.batch_size", lambda program, size=size: size)
        error = mean_error(identity(), values(x, y))
        assert error is not None
        found.append(error.value)
    assert found == pytest.approx([float((x - y).abs().mean())] * 3, rel=1e-6)


def test_score_of_classes_is_accuracy() -> None:
    split_ = split(LOGITS, [0, 1, 2, 1, 1])
    assert score(identity(), split_) == accuracy(identity(), split_)
    assert mean_error(identity(), split_) is None
    assert score(identity(), split(LOGITS, [0, 1, 2, 1, 1], labelled=False)) is None


def test_values_that_the_network_has_no_outputs_for() -> None:
    with pytest.raises(DataError, match=r"values of shape \(2,\) for outputs of shape \(3,\)"):
        mean_error(identity(), values(torch.zeros(4, 3), torch.zeros(4, 2)))
    with pytest.raises(DataError, match=r"values of shape .* for outputs of shape tuple"):
        values_like((torch.zeros(2),), torch.zeros(2))
