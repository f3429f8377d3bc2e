"""The room of statistics against scipy, against formulas by hand, and against simulated worlds in which nothing is better."""

import numpy as np
import pytest
from scipy import stats

from medasst_tools.evaluation import statistics
from medasst_tools.evaluation.compare import adjust, verdict
from medasst_tools.evaluation.text_metrics import PRIMARY

LETTERS = "ABCD"


@pytest.mark.parametrize("counts", [(3, 7, 40, 90), (0, 5, 12, 30), (17, 17, 0, 9), (60, 90, 1000, 1325)])
def test_shares_are_statsmodels(counts):
    from statsmodels.stats import contingency_tables, multitest, proportion

    a, n_a, b, n_b = counts
    theirs = proportion.confint_proportions_2indep(a, n_a, b, n_b, compare="diff", method="newcomb")
    assert statistics.newcombe(a, n_a, b, n_b) == pytest.approx([100 * bound for bound in theirs], abs=1e-9)
    theirs = proportion.proportion_confint(a, n_a, method="wilson")
    assert statistics.wilson(a, n_a) == pytest.approx([100 * bound for bound in theirs], abs=1e-9)
    share = {"n": n_a, "count": a, "percent": pytest.approx(100 * a / n_a), "ci95": statistics.wilson(a, n_a)}
    assert statistics.rate([True] * a + [False] * (n_a - a)) == share
    theirs = contingency_tables.mcnemar([[n_a, a], [b, n_b]], exact=True).pvalue
    assert statistics.mcnemar(a, b) == pytest.approx(theirs, abs=1e-9)
    p_values = np.random.default_rng(counts).uniform(0, 0.2, 6)
    ours = statistics.holm(dict(enumerate(p_values)))
    assert list(ours.values()) == pytest.approx(list(multitest.multipletests(p_values, method="holm")[1]), abs=1e-9)


def test_nothing_has_no_interval():
    assert statistics.wilson(0, 0) is None
    assert statistics.ci95(np.ones((1, 2))) == [None, None]


def test_nothing_differs():
    assert statistics.mcnemar(0, 0) == 1.0 and statistics.holm({}) == {}


def test_the_smallest_visible_difference_is_found_with_80_percent_power():
    error, generator = 1.7, np.random.default_rng(0)
    seen = generator.normal(statistics.smallest_visible(error), error, 20_000) / error
    assert np.mean(np.abs(seen) > stats.norm.ppf(0.975)) == pytest.approx(0.80, abs=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say():
    generator, covered = np.random.default_rng(1), 0
    for seed in range(200):
        low, high = statistics.ci95(generator.normal(5, 3, (60, 1)), resamples=400, seed=seed)[0]
        covered += low <= 5 <= high
    assert 178 <= covered <= 198  # 95 % of 200, and the bootstrap is a little narrow at n = 60


def test_bootstrap_is_seeded_and_as_wide_as_the_normal_interval():
    values = np.random.default_rng(0).normal(50, 10, (500, 2))
    assert (statistics.resampled_means(values, 2000) == statistics.resampled_means(values, 2000)).all()
    half = 1.96 * values.std(axis=0) / np.sqrt(len(values))
    expected = np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half], axis=1)
    assert np.allclose(statistics.ci95(values), expected, atol=0.08)
    assert statistics.ci95(np.full((7, 1), 3.0)) == [[3.0, 3.0]]


def test_one_question_asked_again_and_again_is_no_certainty():
    values = np.arange(6.0).reshape(-1, 1)
    assert np.ptp(statistics.ci95(values, clusters=[0] * 6)[0]) > 1
    assert statistics.ci95(values[:1]) == [None]


@pytest.mark.parametrize(
    ("prompts", "clusters"),
    [
        (["a|", "b|", "a|"], [0, 1, 0]),
        (["q1|", "q1|a1 q2|", "q1|a1 q2|a2 q3|", "q9|"], [0, 0, 0, 1]),
        (["q1 and more|", "q1|"], [0, 1]),
        (
            ["user: 头痛", "user: 头痛怎么办", "user: 头痛\nassistant: 休息\nuser: 还痛"],
            [0, 1, 0],
        ),  # an endpoint's prompts
        (["", "", "a|"], [1, 2, 0]),  # nothing is known of the first two
    ],
)
def test_clusters_are_questions_and_dialogues(prompts, clusters):
    assert statistics.clusters_of(prompts) == clusters


def test_of_two_equal_models_none_wins_more_often_than_five_times_in_a_hundred():
    """Four scores with correlation 0.64 and two exams: the primary score alone, the rest by Holm."""
    generator, worlds, named = np.random.default_rng(3), 10_000, 0
    shared = generator.normal(size=(worlds, 1))
    scores = 0.8 * shared + 0.6 * generator.normal(size=(worlds, 4))  # correlation 0.64
    exams = generator.normal(size=(worlds, 2))
    p_values = 2 * stats.norm.sf(np.abs(np.hstack([scores, exams])))
    for row in p_values:
        names = dict(zip((PRIMARY, "bleu-4", "rouge-1", "rouge-2"), row, strict=False))
        comparison = {
            "dialogues": {"metrics": {name: {"p": p, "difference": 1.0} for name, p in names.items()}},
            "exam": {
                "benchmarks": {
                    name: {"p": p, "difference": 1.0} for name, p in zip(("cmmlu", "ceval"), row[4:], strict=True)
                }
            },
        }
        adjust(comparison)
        parts = [*comparison["dialogues"]["metrics"].values(), *comparison["exam"]["benchmarks"].values()]
        named += any(verdict(part) != "no difference shown" for part in parts)
    assert 0.04 <= named / worlds <= 0.055
    assert np.mean(p_values.min(axis=1) < statistics.ALPHA) > 0.15  # what judging each at 0.05 would do


@pytest.mark.parametrize(("more", "most"), [(3, 0), (5, 0), (6, 6), (17, 67)])
def test_what_a_published_difference_allows(more, most):
    assert statistics.most_discordant(more) == most
    if most:
        only_a = (most + more) // 2
        assert statistics.mcnemar(only_a, most - only_a) < 0.05 <= statistics.mcnemar(only_a + 1, most + 1 - only_a)


def test_calibration_is_numpys():
    """ECE over ten equal bins, and Brier's squares over the four letters, each in plain array arithmetic."""
    generator = np.random.default_rng(4)
    probabilities = generator.dirichlet([0.4] * 4, 1000)
    probabilities[:2] = [[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]  # the last bin's end, a tie
    truth, said = generator.integers(0, 4, 1000), probabilities.argmax(axis=1)
    rows = [
        {"predicted": LETTERS[guess], "answer": LETTERS[right], "probs": dict(zip(LETTERS, row, strict=True))}
        for guess, right, row in zip(said, truth, probabilities.tolist(), strict=True)
    ]
    confidence, right = probabilities.max(axis=1), said == truth
    bins = np.digitize(confidence, np.arange(0.1, 1.0, 0.1))
    gaps = [abs(confidence[bins == at].sum() - right[bins == at].sum()) for at in range(10)]
    assert statistics.expected_calibration_error(rows) == pytest.approx(100 * sum(gaps) / 1000, abs=1e-9)
    brier = np.square(probabilities - np.eye(4)[truth]).sum(axis=1).mean()
    assert statistics.brier(rows) == pytest.approx(brier, abs=1e-9)
    assert statistics.brier(rows[:1]) == (0 if right[0] else 2)


def test_the_average_of_two_shares():
    shares = {"cmmlu": 50.0, "ceval": 30.0}
    intervals = {"cmmlu": [47.0, 53.0], "ceval": [26.0, 34.0]}
    assert statistics.average_interval(shares, intervals) == pytest.approx([37.5, 42.5])
