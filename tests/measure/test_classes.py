"""What a confusion matrix says, by hand and by the definition."""

import numpy as np
import pytest

from graphcomp.measure.classes import class_statistics, largest_confusions

MATRIX = [[8, 1, 1, 0], [0, 5, 2, 3], [0, 0, 4, 0], [5, 0, 5, 0]]


def test_by_hand() -> None:
    """The variance is the population's (METHODS 1.6): of .8, .5, 1, 0 it is .141875, not .18916…"""
    found = class_statistics(MATRIX)
    assert found.accuracies == (0.8, 0.5, 1.0, 0.0)
    assert found.variance == pytest.approx(0.141875, abs=1e-15)
    assert found.hardest == 3
    assert found.mislabels == (1, 3, None, 0)  # of equals the first


def test_a_class_without_samples() -> None:
    """It has no accuracy, counts for nothing and is not the hardest."""
    found = class_statistics([[3, 1, 0], [0, 0, 0], [1, 1, 2]])
    assert found.accuracies == (0.75, None, 0.5)
    assert (found.variance, found.hardest, found.mislabels) == (0.015625, 2, (1, None, 0))


def test_by_the_definition() -> None:
    counts = np.random.RandomState(0).randint(0, 50, (7, 7))
    found = class_statistics(counts.tolist())
    shares = [counts[i, i] / sum(counts[i]) for i in range(7)]
    mean = sum(shares) / 7
    assert found.accuracies == pytest.approx(shares)
    assert found.variance == pytest.approx(sum((s - mean) ** 2 for s in shares) / 7)
    assert shares[found.hardest] == min(shares)
    for i, wrong in enumerate(found.mislabels):
        assert wrong is not None and wrong != i
        assert counts[i, wrong] == max(counts[i, j] for j in range(7) if j != i)


def test_largest_confusions() -> None:
    assert largest_confusions(MATRIX, 3) == [(3, 0, 5), (3, 2, 5), (1, 3, 3)]
    assert largest_confusions([[2, 0], [0, 1]], 5) == []
