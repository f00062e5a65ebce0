"""What answers say: how often readers are right, how far they agree, and whether that is chance.

    accuracy      k of n right, with the exact (Clopper-Pearson) interval: the p for which neither tail is below 2.5 %
    d'            z(hit rate) - z(false alarm rate), each rate (count + 1/2) / (number + 1), so that 0 and 1 stay finite;
                  over sqrt(2) where both images are shown at once, because two looks tell more than one
    ROC area      P(a synthetic image is rated above a real one) + half of P(the same rating)
    kappa         (p_o - p_e) / (1 - p_e): agreement seen, beyond that of two who answer as often but at random
    equivalence   two one-sided tests (TOST): accuracy is at most 1/2 - margin? at least 1/2 + margin? Both refuted at 5 %
                  says: within the margin of chance. Not being able to tell from chance says only that n is small.

Sources: Clopper and Pearson 1934; Hautus 1995 and Macmillan and Creelman 2005 (d'); Cohen 1960; Fleiss
1971; Schuirmann 1987 (TOST).
Whatever cannot be worked out, such as kappa where nobody ever changes the answer, is NaN.
"""
import math

import numpy as np
from scipy import stats

ALPHA = 0.05  # of every test; intervals cover 1 - ALPHA


def exact_interval(right, n):
    """The Clopper-Pearson interval (low, high) of a proportion: covers at least 95 %, whatever the truth."""
    interval = stats.binomtest(right, n).proportion_ci(1 - ALPHA, method="exact")
    return interval.low, interval.high


def d_prime(signal, response, looks=1):
    """Sensitivity index from what was there and what was said, both (n,) bool; looks=2 if both images were shown."""
    hit = (response[signal].sum() + 0.5) / (signal.sum() + 1)
    false_alarm = (response[~signal].sum() + 0.5) / ((~signal).sum() + 1)
    return (stats.norm.ppf(hit) - stats.norm.ppf(false_alarm)) / math.sqrt(looks)


def roc_area(truth, rating):
    """Area under the ROC curve of ratings (n,) against truth (n,) bool, ties counting half; 1/2 is chance."""
    pairs = truth.sum() * (~truth).sum()
    return stats.mannwhitneyu(rating[truth], rating[~truth]).statistic / pairs if pairs else math.nan


def cohen_kappa(a, b):
    """Agreement of two lists of yes and no, (n,) bool each: kappa and its 95 % interval, (kappa, low, high).

    The interval is the exact one of p_o, at the p_e found. Simulated for 30 to 100 questions and kappa 0 to .9 it covers
    95 % or more; the large-sample formula of Fleiss, Cohen and Everitt falls to 88 %, far lower where one answer is rare.
    """
    seen, expected = np.mean(a == b), a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    if expected == 1:
        return math.nan, math.nan, math.nan
    low, high = exact_interval(int((a == b).sum()), len(a))
    kappa, low, high = ((agreed - expected) / (1 - expected) for agreed in (seen, low, high))
    return kappa, max(low, -1.0), high


def fleiss_kappa(answers):
    """Agreement of R readers on n questions, (R, n) bool: observed pairs that agree, beyond chance of one pooled rate."""
    readers, yes = len(answers), answers.sum(0)
    seen = (yes * (yes - 1) + (readers - yes) * (readers - yes - 1)).mean() / (readers * (readers - 1))
    rate = answers.mean()
    expected = rate ** 2 + (1 - rate) ** 2
    return (seen - expected) / (1 - expected) if expected < 1 else math.nan


def chance_test(right, n):
    """p of the exact two-sided test that accuracy is 1/2: small shows a difference, large shows nothing."""
    return np.minimum(1, 2 * stats.binom.cdf(np.minimum(right, n - right), n, 0.5))


def equivalence_test(right, n, margin):
    """p of the exact TOST that accuracy is no nearer to 1/2 than `margin`: small shows that it is nearer."""
    return np.maximum(stats.binom.sf(right - 1, n, 0.5 - margin), stats.binom.cdf(right, n, 0.5 + margin))


def together(scores, margin):
    """All readers as one, from each pair's mean score over readers and presentations, (n,) in [0, 1].

    The pairs are the sample: what readers share on a pair is inside its mean, so that answers about the same images do
    not count as independent. The readers are not: the result holds for these readers, not for others.
    Returns accuracy, low, high (95 %, by Student's t), p of the TOST against chance.
    """
    n, mean, error = len(scores), scores.mean(), scores.std(ddof=1) / math.sqrt(len(scores)) if len(scores) > 1 else 0
    if error == 0:                                                   # pairs all alike: nothing to judge their spread by
        return mean, math.nan, math.nan, math.nan
    half = stats.t.ppf(1 - ALPHA / 2, n - 1) * error
    p = max(stats.t.sf((mean - 0.5 + margin) / error, n - 1), stats.t.cdf((mean - 0.5 - margin) / error, n - 1))
    return mean, max(mean - half, 0.0), min(mean + half, 1.0), p


def power_alone(accuracy, n, margin):
    """Of one reader who is right with probability `accuracy` in n answers: the chances to be shown equivalent to chance,
    and to be shown different from it. Exact: summed over every count of right answers."""
    counts = np.arange(n + 1)
    chance = stats.binom.pmf(counts, n, accuracy)
    return chance @ (equivalence_test(counts, n, margin) <= ALPHA), chance @ (chance_test(counts, n) <= ALPHA)


def power_together(accuracy, n, margin, readers, kappa):
    """The chance that `together` shows readers of this accuracy and this agreement on a pair to be equivalent to chance.
    By the normal approximation to the mean of n pairs."""
    error = math.sqrt(accuracy * (1 - accuracy) * (1 + (readers - 1) * kappa) / readers / n)
    critical = stats.t.ppf(1 - ALPHA, n - 1) * error
    low, high = 0.5 - margin + critical, 0.5 + margin - critical     # means between these reject both one-sided tests
    return max(0.0, stats.norm.cdf((high - accuracy) / error) - stats.norm.cdf((low - accuracy) / error))
