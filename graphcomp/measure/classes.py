"""What a confusion matrix says about the classes; one row for each true class, one column for each predicted.

accuracy_c = M[c, c] / sum_j M[c, j],   variance = 1/C sum_c (accuracy_c - mean)^2      (METHODS 1.6)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ClassStatistics:
    """How the classes fare.

    Attributes:
        accuracies: of every class; None for a class without samples.
        variance: population variance (ddof 0) of those of classes with samples.
        hardest: the class of the lowest accuracy, the first of equals.
        mislabels: for every class the wrong one that it is most often taken for, the first of equals; None
            for a class without mistakes.
    """

    accuracies: tuple[float | None, ...]
    variance: float
    hardest: int
    mislabels: tuple[int | None, ...]


def class_statistics(matrix: Sequence[Sequence[int]]) -> ClassStatistics:
    """Statistics of a square matrix of counts with at least one sample."""
    counts = np.asarray(matrix, dtype=np.int64)
    samples = counts.sum(1)
    accuracies = counts.diagonal() / np.where(samples, samples, 1)
    seen = samples > 0
    return ClassStatistics(
        accuracies=tuple(float(a) if s else None for a, s in zip(accuracies, seen, strict=True)),
        variance=float(accuracies[seen].var()),
        hardest=int(np.where(seen, accuracies, np.inf).argmin()),
        mislabels=_mislabels(counts),
    )


def _mislabels(counts: NDArray[np.int64]) -> tuple[int | None, ...]:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    return tuple(int(row.argmax()) if row.any() else None for row in wrong)


def largest_confusions(matrix: Sequence[Sequence[int]], count: int) -> list[tuple[int, int, int]]:
    """The most frequent mistakes as (true class, predicted class, how often), at most `count`."""
    wrong = np.asarray(matrix, dtype=np.int64).copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in places if wrong[i, j]]
