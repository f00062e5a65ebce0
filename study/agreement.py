"""The statistics of a reader study: how often readers are right, how far they agree, and whether that is chance.

    accuracy      k of n right, with the exact (Clopper-Pearson) interval
    d'            z(hit rate) - z(false alarm rate), each rate (count + 1/2) / (number + 1) so that 0 and 1 stay finite;
                  divided by sqrt(2) where both images are shown at once, because two looks tell more than one
    ROC area      P(a synthetic image is rated above a real one) + half of P(both are rated alike)
    kappa         (p_o - p_e) / (1 - p_e): observed agreement p_o beyond the agreement p_e expected by chance
    equivalence   two one-sided tests (TOST) of "accuracy <= 1/2 - margin" and "accuracy >= 1/2 + margin". If both are
                  rejected at 5 %, accuracy is within the margin of chance. A result that is merely not different from
                  chance shows nothing: it is what a small study always finds.
    Holm          one test for each reading gives many chances of a false alarm; Holm's adjusted p values bound the
                  chance of any false alarm among them by 5 %, however the readings depend on each other

Sources: Clopper and Pearson 1934; Hautus 1995 and Macmillan and Creelman 2005 (d'); Cohen 1960; Fleiss 1971; Schuirmann
1987 (TOST); Holm 1979.
What cannot be computed, such as kappa where no answer ever changes, is NaN.
"""
import math

import numpy as np
from scipy import stats

ALPHA = 0.05  # level of every test; intervals cover 1 - ALPHA


def exact_interval(right, n):
    """The Clopper-Pearson interval (low, high) of a proportion: it covers at least 95 %, whatever the true proportion.

    Its ends are quantiles of beta distributions, at which `right` or more, or `right` or fewer, have probability 2.5 %.
    """
    low = stats.beta.ppf(ALPHA / 2, right, n - right + 1) if right > 0 else 0.0
    high = stats.beta.ppf(1 - ALPHA / 2, right + 1, n - right) if right < n else 1.0
    return float(low), float(high)


def d_prime(signal, response, looks=1):
    """Sensitivity index of answers: signal (n,) bool, what was there; response (n,) bool, what was said. looks=2
    where both images of a pair were shown at once."""
    hit = (response[signal].sum() + 0.5) / (signal.sum() + 1)
    false_alarm = (response[~signal].sum() + 0.5) / ((~signal).sum() + 1)
    return (stats.norm.ppf(hit) - stats.norm.ppf(false_alarm)) / math.sqrt(looks)


def roc_area(truth, rating):
    """Area under the ROC curve of ratings (n,) against truth (n,) bool, ties counting half; 1/2 is chance."""
    pairs = truth.sum() * (~truth).sum()
    return stats.mannwhitneyu(rating[truth], rating[~truth]).statistic / pairs if pairs else math.nan


def cohen_kappa(a, b):
    """Agreement of two lists of yes and no, (n,) bool each: kappa and its 95 % interval, (kappa, low, high).

    The interval is the exact one of p_o, with p_e taken as known. In simulations of 30 to 100 questions and kappa 0
    to 0.9 it covers 95 % or more; the large-sample formula of Fleiss, Cohen and Everitt falls to 88 %, and lower
    where one answer is rare.
    """
    observed, expected = np.mean(a == b), a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    if expected == 1:
        return math.nan, math.nan, math.nan
    low, high = exact_interval(int((a == b).sum()), len(a))
    kappa, low, high = ((agreed - expected) / (1 - expected) for agreed in (observed, low, high))
    return kappa, max(low, -1.0), high


def fleiss_kappa(answers):
    """Agreement of R readers on n questions, (R, n) bool: the share of agreeing pairs of readers, beyond what one
    common rate of yes would give by chance."""
    readers, yes = len(answers), answers.sum(0)
    observed = (yes * (yes - 1) + (readers - yes) * (readers - yes - 1)).mean() / (readers * (readers - 1))
    rate = answers.mean()
    expected = rate ** 2 + (1 - rate) ** 2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def chance_test(right, n):
    """p of the exact two-sided test that accuracy is 1/2: a small p shows a difference, a large one shows nothing."""
    return np.minimum(1, 2 * stats.binom.cdf(np.minimum(right, n - right), n, 0.5))


def equivalence_test(right, n, margin):
    """p of the exact TOST: a small p shows that accuracy is nearer to 1/2 than `margin`."""
    return np.maximum(stats.binom.sf(right - 1, n, 0.5 - margin), stats.binom.cdf(right, n, 0.5 + margin))


def holm(p_values):
    """Holm's adjusted p values of m tests, (m,): the smallest times m, the next times m - 1, ..., never decreasing."""
    p_values = np.asarray(p_values, float)
    order = p_values.argsort()
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted


def together(scores, margin):
    """All readers as one, from each pair's mean score over readers and presentations, (n,) in [0, 1].

    The pairs are the sample: what readers have in common on a pair is inside its mean, so that answers about the same
    images do not count as independent. The readers are not a sample: the result holds for these readers, not for
    others. It is a mean, so readers who are right and readers who are wrong can cancel; score.py withholds it where
    one of them differs from chance.
    Returns accuracy, low, high (95 %, by Student's t), p of the TOST against chance.
    """
    n, mean = len(scores), scores.mean()
    error = scores.std(ddof=1) / math.sqrt(n) if n > 1 else 0
    if error == 0:                                                   # all pairs alike: their spread is not known
        return mean, math.nan, math.nan, math.nan
    half = stats.t.ppf(1 - ALPHA / 2, n - 1) * error
    p = max(stats.t.sf((mean - 0.5 + margin) / error, n - 1), stats.t.cdf((mean - 0.5 - margin) / error, n - 1))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0), p


def power_alone(accuracy, n, margin):
    """For one reader who is right with probability `accuracy` in each of n answers: the chance of being shown
    equivalent to chance, and of being shown different from it. Exact: summed over every count of right answers."""
    counts = np.arange(n + 1)
    probability = stats.binom.pmf(counts, n, accuracy)
    equivalent = probability @ (equivalence_test(counts, n, margin) <= ALPHA)
    return equivalent, probability @ (chance_test(counts, n) <= ALPHA)


def power_together(accuracy, n, margin, readers, kappa):
    """The chance that `together` shows readers of this accuracy, and of this agreement on being right, equivalent to
    chance. By the normal approximation to the mean of n pairs."""
    error = math.sqrt(accuracy * (1 - accuracy) * (1 + (readers - 1) * kappa) / readers / n)
    critical = stats.t.ppf(1 - ALPHA, n - 1) * error
    low, high = 0.5 - margin + critical, 0.5 + margin - critical     # means between these reject both one-sided tests
    return max(0.0, stats.norm.cdf((high - accuracy) / error) - stats.norm.cdf((low - accuracy) / error))
