"""The mathematics of pfa: golden numbers, brute force, and what is degenerate."""

import math
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphcomp.budget.allocation import fewest
from graphcomp.passes.pfa.principal import (
    MAPS,
    Bools,
    ChannelNorm,
    Map,
    Matrix,
    Vector,
    count_kl,
    dead_channels,
    divergence,
    energies,
    gamma_kl,
    pearson,
    removal_order,
    spectrum,
)

TAUS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99)
SPECTRA: dict[str, list[float]] = {
    "flat": [1, 1, 1, 1],
    "one": [1, 0, 0, 0],
    "half": [0.5, 0.5, 0, 0],
    "halves": [0.5, 0.25, 0.125, 0.125],
    "tenths": [0.7, 0.2, 0.1, 0],
    "five": [8, 4, 2, 1, 1],
    "eight": [10, 5, 2, 1, 1, 0.5, 0.3, 0.2],
    "powers": [0.7**i for i in range(16)],
    "harmonic": [1 / i for i in range(1, 65)],
    "squares": [1 / i**2 for i in range(1, 65)],
    "ten equal": [1] * 10,
}


def normalised(name: str) -> Vector:
    values = np.array(SPECTRA[name], float)
    return cast(Vector, values / values.sum())


def rotated(eigenvalues: list[float], seed: int = 0) -> Matrix:
    """A symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return cast(Matrix, (basis * np.array(eigenvalues)) @ basis.T)


def covariance_of(samples: Matrix) -> Matrix:
    return np.atleast_2d(np.cov(samples, rowvar=False))


# ---------------------------------------------------------------------- spectrum


@pytest.mark.parametrize("name", SPECTRA)
def test_spectrum_is_that_of_the_matrix(name: str) -> None:
    found = spectrum(37.0 * rotated(SPECTRA[name]))
    assert found == pytest.approx(normalised(name), abs=1e-12)
    assert found.sum() == pytest.approx(1) and (found >= 0).all() and (np.diff(found) <= 0).all()


def test_nothing_varies() -> None:
    """Total energy 0: no direction, and one channel stays; never NaN."""
    nothing = np.zeros((5, 5))
    assert spectrum(nothing).tolist() == [0] * 5
    assert dead_channels(nothing).all()
    assert not pearson(nothing).any()
    assert fewest(energies(spectrum(nothing), 5), 0.99) == 1
    assert count_kl(spectrum(nothing), 5) == 1
    assert sorted(removal_order(pearson(nothing), dead_channels(nothing))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [3.0, 0.0])
def test_t5_7_one_channel(value: float) -> None:
    """T5.7: n = 1, where the divergence's bound is log 1 = 0: one channel stays, varying or not."""
    matrix = np.array([[value]])
    eigenvalues, dead = spectrum(matrix), dead_channels(matrix)
    assert gamma_kl(eigenvalues) == 1
    assert count_kl(eigenvalues, int(dead.sum())) == fewest(energies(eigenvalues, int(dead.sum())), 0.5) == 1
    assert removal_order(pearson(matrix), dead).tolist() == [0]


def test_t5_7_dead_layer_keeps_one() -> None:
    """T5.7: all responses constant: the divergence of nothing is no reason to keep everything."""
    assert [count_kl(np.zeros(n), n) for n in (1, 2, 64)] == [1, 1, 1]


# ---------------------------------------------------------------------- energy


G52: dict[str, tuple[int, ...]] = {
    "halves": (3, 3, 4, 4, 4, 4, 4, 4, 4),
    "tenths": (2, 2, 2, 3, 3, 3, 3, 3, 3),
    "eight": (3, 3, 4, 5, 5, 6, 6, 7, 7),
    "powers": (5, 6, 7, 8, 9, 9, 10, 11, 13),
    "harmonic": (25, 32, 40, 46, 51, 53, 56, 59, 62),
    "squares": (3, 4, 6, 8, 10, 12, 16, 21, 31),
}


@pytest.mark.parametrize("name", G52)
def test_g5_2_energy_counts(name: str) -> None:
    assert tuple(fewest(energies(normalised(name)), tau) for tau in TAUS) == G52[name]


@pytest.mark.parametrize("name", G52)
def test_g5_2_energy_counts_of_matrices(name: str) -> None:
    """The same from eigenvalues that were computed, where no share is met exactly."""
    found = energies(spectrum(rotated(SPECTRA[name])))
    exact = energies(normalised(name))
    for tau, count in zip(TAUS, G52[name], strict=True):
        if abs(exact - tau).min() > 1e-9:
            assert fewest(found, tau) == count


def test_t5_6_rounding_of_sums() -> None:
    """T5.6, G5.2: eight of ten equal ones hold .8 of the energy; .7 + .2 hold .9."""
    held = energies(normalised("ten equal"))
    assert held[7] < 0.8 and fewest(held, 0.8) == 8
    held = energies(np.array(SPECTRA["tenths"]))
    assert held[1] < 0.9 and fewest(held, 0.9) == 2


def test_all_the_energy_is_not_all_channels() -> None:
    """tau = 1 keeps the directions with energy, not necessarily n."""
    assert fewest(energies(normalised("half")), 1.0) == 2
    assert fewest(energies(normalised("one")), 1.0) == 1
    assert fewest(energies(normalised("flat")), 1.0) == 4


def test_dead_channels_are_not_kept_for_their_energy() -> None:
    """What is left without them is all there is: the count shrinks (METHODS 5.5)."""
    eigenvalues = normalised("harmonic")
    assert fewest(energies(eigenvalues), 1.0) == 64
    assert fewest(energies(eigenvalues, 10), 1.0) == 54
    assert fewest(energies(eigenvalues, 10), 0.8) == 25
    assert fewest(energies(eigenvalues, 50), 0.8) == 14
    assert fewest(energies(eigenvalues, 64), 0.8) == 1


# ---------------------------------------------------------------------- divergence


G51: dict[str, tuple[float, float, int]] = {
    "flat": (0, 1, 4),
    "one": (1.386294, 0, 1),
    "half": (0.693147, 0.5, 2),
    "halves": (0.173287, 0.875, 4),
    "tenths": (0.584476, 0.578390, 3),
    "five": (0.309787, 0.807519, 5),
    "eight": (0.655193, 0.684919, 6),
    "powers": (0.758732, 0.726345, 12),
    "harmonic": (0.787531, 0.810639, 52),
    "squares": (2.618204, 0.370455, 24),
}


@pytest.mark.parametrize("name", G51)
def test_g5_1_divergence(name: str) -> None:
    value, gamma, count = G51[name]
    eigenvalues = normalised(name)
    assert divergence(eigenvalues) == pytest.approx(value, abs=5e-7)
    assert gamma_kl(eigenvalues) == pytest.approx(gamma, abs=5e-7)
    assert count_kl(eigenvalues) == count


@pytest.mark.parametrize("name", SPECTRA)
def test_t5_5_divergence_is_of_the_spectrum_from_uniform(name: str) -> None:
    """T5.5: not of uniform from the spectrum, which is infinite with a zero; the base does not matter."""
    eigenvalues = normalised(name)
    n = len(eigenvalues)
    by_hand = sum(x * math.log(n * x) for x in eigenvalues.tolist() if x)
    assert divergence(eigenvalues) == pytest.approx(by_hand, abs=1e-12)
    entropy = -sum(x * math.log2(x) for x in eigenvalues.tolist() if x)
    assert gamma_kl(eigenvalues) == pytest.approx(entropy / math.log2(n), abs=1e-12)


def test_t5_6_rounding_of_counts() -> None:
    """T5.6: [.5, .5, 0, 0] gives 4 * .5 = 2.0000000000005 or so, which is 2 and not 3."""
    assert count_kl(normalised("half")) == 2
    assert count_kl(np.array([0.5, 0.5, 1e-16, 1e-16])) == 2


def test_dead_channels_are_not_kept_for_the_divergence() -> None:
    assert count_kl(normalised("flat"), dead=1) == 3
    assert count_kl(normalised("one"), dead=3) == 1


@pytest.mark.parametrize("psi", MAPS)
@pytest.mark.parametrize("n", [2, 5, 64])
def test_maps_keep_all_of_flat_and_one_of_pointed(psi: Map, n: int) -> None:
    flat, pointed = np.full(n, 1 / n), np.eye(n)[0]
    assert count_kl(flat, psi=psi) == n
    assert count_kl(pointed, psi=psi) == 1


@pytest.mark.parametrize("name", SPECTRA)
def test_maps_are_ordered(name: str) -> None:
    """By how much they keep; the effective rank is exp(H)."""
    eigenvalues = normalised(name)
    rank = math.exp(-sum(x * math.log(x) for x in eigenvalues.tolist() if x))
    assert gamma_kl(eigenvalues, "effective-rank") * len(eigenvalues) == pytest.approx(rank)
    counts = [count_kl(eigenvalues, psi=psi) for psi in ("effective-rank", "linear", "quadratic")]
    assert counts == sorted(counts)
    if name in ("squares", "powers"):
        assert len(set(counts)) == 3


# ---------------------------------------------------------------------- correlation and selection


def none_dead(n: int) -> Bools:
    return np.zeros(n, bool)


def brute_force(correlation: Matrix, dead: Bools, norm: ChannelNorm) -> list[int]:
    """METHODS 5.5 word for word: the norms are computed anew after every removal."""
    magnitude = np.abs(correlation)
    np.fill_diagonal(magnitude, 0)
    power = 1 if norm == "l1" else 2
    order, alive = np.flatnonzero(dead).tolist(), np.flatnonzero(~dead).tolist()
    while alive:
        total = {i: sum(magnitude[i, j] ** power for j in alive if j != i) for i in alive}
        tied = [i for i in alive if total[i] > max(total.values()) - 1e-12]
        single = {i: max([magnitude[i, j] for j in alive if j != i], default=0.0) for i in tied}
        chosen = next(i for i in tied if single[i] > max(single.values()) - 1e-12)
        order.append(chosen)
        alive.remove(chosen)
    return order


G53_UNSIGNED = [
    [1, 0.7, 0.2, 0.3, 0.9],
    [0.7, 1, 0.1, 0.2, 0.6],
    [0.2, 0.1, 1, 0.8, 0.3],
    [0.3, 0.2, 0.8, 1, 0.3],
    [0.9, 0.6, 0.3, 0.3, 1],
]
G53_SIGNED = [
    [1, -0.8, 0.1, 0.4, 0],
    [-0.8, 1, 0.3, -0.2, 0.5],
    [0.1, 0.3, 1, -0.6, 0.2],
    [0.4, -0.2, -0.6, 1, -0.7],
    [0, 0.5, 0.2, -0.7, 1],
]


def test_g5_3_selection() -> None:
    assert removal_order(np.array(G53_UNSIGNED), none_dead(5)).tolist() == [0, 3, 4, 1, 2]


def test_t5_8_greedy_and_unsigned() -> None:
    """T5.8, G5.3: one sort would give 3, 1, 4, 0, 2; signed sums would start with 2 or 4."""
    found = removal_order(np.array(G53_SIGNED), none_dead(5)).tolist()
    assert found == [3, 1, 2, 0, 4]
    sums = np.abs(G53_SIGNED).sum(1)
    assert np.argsort(-sums, kind="stable").tolist() == [3, 1, 4, 0, 2]
    assert int(np.argmax(np.array(G53_SIGNED).sum(1))) in (2, 4)


def test_t5_8_dead_channels_go_first() -> None:
    """T5.8: a column of zeros correlates with nothing, and is the first to go."""
    samples = np.random.default_rng(0).normal(size=(50, 6))
    samples[:, 4] = 0
    samples[:, 2] = 7.0
    samples[:, 1] += 2 * samples[:, 0]
    covariance = covariance_of(samples)
    dead = dead_channels(covariance)
    assert np.flatnonzero(dead).tolist() == [2, 4]
    order = removal_order(pearson(covariance), dead).tolist()
    assert order[:2] == [2, 4] and order[2] in (0, 1)


@pytest.mark.parametrize(("part", "dead"), [(0.99e-8, True), (1.01e-8, False)])
def test_dead_is_relative_to_the_largest(part: float, dead: bool) -> None:
    for size in (1e-12, 1.0, 1e12):
        assert dead_channels(np.diag([size, part * size])).tolist() == [False, dead]


def test_t5_4_scaling_changes_the_spectrum_and_not_the_selection() -> None:
    """T5.4: the spectrum is that of the covariance, the selection goes by correlations."""
    rng = np.random.default_rng(3)
    samples = rng.normal(size=(200, 8)) @ rng.normal(size=(8, 8))
    before = covariance_of(samples)
    samples[:, 5] *= 10
    after = covariance_of(samples)
    assert abs(gamma_kl(spectrum(before)) - gamma_kl(spectrum(after))) > 0.05
    assert pearson(before) == pytest.approx(pearson(after), abs=1e-12)
    orders = [removal_order(pearson(c), dead_channels(c)).tolist() for c in (before, after)]
    assert orders[0] == orders[1]


def test_pearson_is_numpys() -> None:
    samples = np.random.default_rng(1).normal(size=(40, 7)) ** 3
    expected = np.atleast_2d(np.corrcoef(samples, rowvar=False))
    np.fill_diagonal(expected, 0)
    assert pearson(covariance_of(samples)) == pytest.approx(expected, abs=1e-12)


DYADIC = st.integers(-8, 8).map(lambda i: i / 8)  # sums of them are exact, so that ties are


@st.composite
def correlations(draw: st.DrawFn) -> tuple[Matrix, Bools]:
    n = draw(st.integers(1, 9))
    lower = np.tril(draw(arrays(float, (n, n), elements=DYADIC)), -1)
    return lower + lower.T, draw(arrays(bool, n))


@pytest.mark.slow
@given(correlations(), st.sampled_from(["l1", "l2"]))
def test_updated_sums_equal_recomputed_ones(drawn: tuple[Matrix, Bools], norm: ChannelNorm) -> None:
    correlation, dead = drawn
    correlation[dead] = 0
    correlation[:, dead] = 0
    assert removal_order(correlation, dead, norm).tolist() == brute_force(correlation, dead, norm)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_updated_sums_equal_recomputed_ones_at_length(norm: ChannelNorm) -> None:
    rng = np.random.default_rng(2)
    rho = pearson(covariance_of(rng.normal(size=(300, 120)) @ rng.normal(size=(120, 120))))
    assert removal_order(rho, none_dead(120), norm).tolist() == brute_force(rho, none_dead(120), norm)


def test_norms_differ() -> None:
    """One strong correlation against several weak ones."""
    rho = np.zeros((6, 6))
    rho[0, 1] = rho[1, 0] = 0.9
    for other in (3, 4, 5):
        rho[2, other] = rho[other, 2] = 0.4
    assert removal_order(rho, none_dead(6), "l1")[0] == 2
    assert removal_order(rho, none_dead(6), "l2")[0] == 0


def test_ties_go_to_the_largest_single_correlation_then_to_the_first() -> None:
    """0 and 3 have the sum 1; 3's largest is larger. 1 and 2 are alike."""
    rho = np.zeros((6, 6))
    for i, j, value in ((0, 1, 0.5), (0, 2, 0.5), (3, 4, 0.75), (3, 5, 0.25)):
        rho[i, j] = rho[j, i] = value
    assert removal_order(rho, none_dead(6)).tolist() == [3, 0, 1, 2, 4, 5]


@pytest.mark.parametrize("value", [1.0, 0.0, 0.3])
def test_all_alike(value: float) -> None:
    """Perfectly correlated, or not at all: in order, and not quadratic in the ties at every removal."""
    n = 700
    assert removal_order(np.full((n, n), value), none_dead(n)).tolist() == list(range(n))


def test_perfect_correlation_leaves_one_direction() -> None:
    samples = np.outer(np.random.default_rng(0).normal(size=100), [1.0, -2.0, 3.0, 0.5])
    covariance = covariance_of(samples)
    eigenvalues = spectrum(covariance)
    assert fewest(energies(eigenvalues), 1.0) == count_kl(eigenvalues) == 1
    assert removal_order(pearson(covariance), dead_channels(covariance)).tolist() == [0, 1, 2, 3]


def test_arguments_are_left_alone() -> None:
    covariance = covariance_of(np.random.default_rng(0).normal(size=(30, 5)))
    before, rho = covariance.copy(), pearson(covariance)
    kept = rho.copy()
    spectrum(covariance)
    removal_order(rho, none_dead(5), "l2")
    assert np.array_equal(covariance, before) and np.array_equal(rho, kept)
    eigenvalues = spectrum(covariance)
    copied = eigenvalues.copy()
    energies(eigenvalues, 2)
    count_kl(eigenvalues, 2)
    assert np.array_equal(eigenvalues, copied)
