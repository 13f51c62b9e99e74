"""Checks that samples have the distribution that they should.

Statistics have to be within 5 standard deviations. A count of N independent draws of probability p
has the mean N * p and the standard deviation sqrt(N * p * (1 - p)). So a correct program fails such
a check for one seed in 1.7 million. Since the seeds of the tests are fixed, it fails always or
never.
"""

import math
from collections import Counter

import numpy as np


def assert_normal(statistic: float, mean: float, variance: float):
    assert abs(statistic - mean) < 5 * math.sqrt(variance), (statistic, mean, math.sqrt(variance))


def assert_binomial(count, trials, probability: float):
    count = int(count)
    trials = int(trials)
    mean = trials * probability
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(count - mean) < 5 * deviation, (count, mean, deviation)


def assert_uniform(counts: np.ndarray):
    """Pearson's chi-squared test. Counts that are too even fail, too.

    The statistic is made normal by the cube root of Wilson and Hilferty: (X / k) ** (1/3) has the
    mean 1 - 2 / (9 k) and the variance 2 / (9 k), for k = categories - 1 degrees of freedom.
    """
    expected = counts.sum() / len(counts)
    k = len(counts) - 1
    assert expected > 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    assert abs(z) < 5, (statistic, k)
    assert counts.min() > 0


def assert_chi_squared(statistic: float, k: int):
    assert_normal((statistic / k) ** (1 / 3), 1 - 2 / (9 * k), 2 / (9 * k))


def assert_distribution(counts, chances):
    """Pearson's chi-squared test of `counts`.

    Outcomes with fewer than 20 expected occurrences are counted as one.
    """
    counts = np.array(counts)
    expected = np.array(chances) * sum(counts)
    rare = expected < 20
    pairs = [
        *zip(counts[~rare], expected[~rare], strict=True),
        (counts[rare].sum(), expected[rare].sum()),
    ]
    pairs = [(count, mean) for count, mean in pairs if mean > 5]
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    assert_chi_squared(statistic, len(pairs) - 1)


def assert_same_distribution(first: Counter, second: Counter):
    """The chi-squared test of homogeneity. Rare outcomes are counted as one."""
    if len(first | second) == 1:
        return
    outcomes = first.keys() | second.keys()
    common = [outcome for outcome in outcomes if first[outcome] + second[outcome] >= 40]
    table = np.array([[counts[outcome] for outcome in common] for counts in (first, second)], float)
    rest = [first.total() - table[0].sum(), second.total() - table[1].sum()]
    if sum(rest) >= 40:
        table = np.column_stack([table, rest])
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    assert table.shape[1] > 2
    statistic = ((table - expected) ** 2 / expected).sum()
    assert_chi_squared(statistic, table.shape[1] - 1)
