"""The statistics of the reader study: beside statsmodels, by hand, and on simulated readers of known ability."""
import math
import warnings

import numpy as np
import pytest
from scipy import stats

from study import agreement


def test_intervals_and_tests_beside_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is not installed")
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater", reason="statsmodels is not installed")
    for right, n in ((0, 7), (7, 7), (29, 50), (3, 40)):
        theirs = proportion.proportion_confint(right, n, method="beta")
        assert agreement.exact_interval(right, n) == pytest.approx(theirs)
        assert agreement.chance_test(right, n) == pytest.approx(proportion.binom_test(right, n, 0.5))
        assert agreement.equivalence_test(right, n, 0.1) == pytest.approx(proportion.binom_tost(right, n, 0.4, 0.6)[0])
    rng = np.random.default_rng(0)
    for share, n in ((0.5, 50), (0.8, 30), (0.3, 200)):
        a = rng.random(n) < share
        b = np.where(rng.random(n) < 0.4, a, rng.random(n) < 0.6)
        table = [[np.sum((a == i) & (b == j)) for j in (0, 1)] for i in (0, 1)]
        theirs = inter_rater.cohens_kappa(table)
        kappa, low, high = agreement.cohen_kappa(a, b)
        assert kappa == pytest.approx(theirs.kappa)
        width = theirs.kappa_upp - theirs.kappa_low  # of the large-sample interval, which is a little short
        assert low < theirs.kappa_low + 0.1 * width and high > theirs.kappa_upp - 0.1 * width
        assert width < high - low < 1.6 * width


def test_holm_by_hand_and_beside_statsmodels():
    """.01 x 4, .02 x 3 = .06, .03 x 2 = .06, .5 x 1; and a smaller product after a larger one is raised to it."""
    assert agreement.holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert agreement.holm([0.02, 0.021]) == pytest.approx([0.04, 0.04])
    assert agreement.holm([0.9, 0.8]) == pytest.approx([1, 1])
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 20):
        p_values = rng.random(m) ** 3
        assert agreement.holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])


def test_kappa_and_its_interval_by_hand():
    """16 of 20 agree, both say yes to half: kappa (.8 - .5) / .5; the exact interval of 16 of 20 is .5634 to .9427."""
    a, b = np.arange(20) < 10, (np.arange(20) < 8) | (np.arange(20) >= 18)
    assert agreement.cohen_kappa(a, b) == pytest.approx((0.6, 2 * 0.563386 - 1, 2 * 0.942666 - 1), abs=1e-5)


def test_what_cannot_be_worked_out_is_nan_and_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        always, once = np.ones(5, bool), np.arange(5) == 0
        assert all(map(math.isnan, agreement.cohen_kappa(always, always)))
        assert math.isnan(agreement.fleiss_kappa(np.stack([always, always])))
        kappa, low, high = agreement.cohen_kappa(once, once)
        assert (kappa, high) == (1, 1) and low < 0.5                 # five answers do not show that two always agree
        assert math.isnan(agreement.roc_area(always, np.arange(5)))
        assert math.isnan(agreement.together(np.ones(5), 0.1)[3]) and math.isnan(agreement.together(np.ones(1), 0.1)[3])
        assert math.isfinite(agreement.d_prime(always, always)) and math.isfinite(agreement.d_prime(once, ~once))


# --- simulated readers of known ability ------------------------------------------------------------------

@pytest.mark.parametrize("n", [20, 50, 100])
def test_exact_intervals_cover_and_exact_tests_keep_their_size(n):
    """Summed over every outcome, not simulated."""
    counts = np.arange(n + 1)
    intervals = np.array([agreement.exact_interval(int(k), n) for k in counts])
    for p in np.linspace(0.02, 0.98, 49):
        inside = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        assert stats.binom.pmf(counts, n, p) @ inside >= 0.95
    equivalent, _ = agreement.power_alone(0.6, n, 0.1)               # a reader just outside the margin
    _, different = agreement.power_alone(0.5, n, 0.1)                # a reader who guesses
    assert equivalent <= 0.05 and 0.01 < different <= 0.05
    assert agreement.power_alone(0.5, 500, 0.1)[0] > 0.99            # and the test can show what it is for


def readers_of(rng, accuracy, kappa, shape):
    """Who was right, shape (studies, readers, questions): two readers agree on being right with this kappa."""
    studies, readers, n = shape
    copied = rng.random((studies, readers,
                         n)) < math.sqrt(kappa)    # each copies what the question suggests, or guesses
    return np.where(copied, rng.random((studies, 1, n)) < accuracy, rng.random(shape) < accuracy)


@pytest.mark.parametrize("kappa, share", [(0.0, 0.5), (0.2, 0.5), (0.5, 0.7), (0.8, 0.5)])
def test_kappa_intervals_cover(kappa, share):
    rng = np.random.default_rng(0)
    intervals = [agreement.cohen_kappa(a, b)[1:] for a, b in readers_of(rng, share, kappa, (2000, 2, 50))]
    coverage = np.mean([low <= kappa <= high for low, high in intervals])
    assert 0.94 < coverage < 0.99                                    # as claimed, and not by being far too wide


@pytest.mark.parametrize("accuracy, kappa", [(0.5, 0.0), (0.6, 0.3)])
def test_all_readers_together_cover_and_keep_their_size_though_they_agree(accuracy, kappa):
    rng = np.random.default_rng(1)
    scores = readers_of(rng, accuracy, kappa, (2000, 3, 60)).mean(1)
    results = [agreement.together(row, 0.1) for row in scores]
    coverage = np.mean([low <= accuracy <= high for _, low, high, _ in results])
    assert 0.935 < coverage < 0.965                                  # 2000 studies: 0.95 with a deviation of 0.005
    shown = np.mean([p <= 0.05 for *_, p in results])
    assert abs(shown - agreement.power_together(accuracy, 60, 0.1, 3, kappa)) < 0.03
    if accuracy == 0.6:
        assert shown < 0.065                                         # the size, at the margin's edge
    else:
        assert shown > 0.5
