"""Intervals, tests and what a comparison could have seen: the one place where a number becomes a statement.

Everything is seeded. References: Wilson 1927; Koehn 2004 (paired bootstrap over records); Miller, arXiv 2411.00640 (clusters,
paired differences, power); McNemar 1947, exact; Holm 1979; Newcombe 1998 (intervals of sums of shares); Naeini et al. 2015
(ECE); Brier 1950.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, count, groupby, takewhile
from typing import Any

RESAMPLES, SEED = 10_000, 42
ALPHA, POWER = 0.05, 0.80
ECE_BINS = 10
_INDEXES_AT_ONCE = 2_000_000  # 16 MB of indexes, whatever the number of records


# ---- shares ---------------------------------------------------------------------------------------------------------
def wilson(correct: int, n: int) -> list[float] | None:
    """Return Wilson's 95 % interval of a share, in percent; None of nothing."""
    from scipy.stats import binomtest

    return [100 * bound for bound in binomtest(correct, n).proportion_ci(method="wilson")] if n else None


def rate(held: Sequence[bool]) -> dict[str, Any]:
    """Return a share in percent with its count and Wilson's interval; n > 0."""
    n, correct = len(held), sum(held)
    return {"n": n, "count": correct, "percent": 100 * correct / n, "ci95": wilson(correct, n)}


def average_interval(shares: dict[str, float], intervals: dict[str, Any]) -> list[float]:
    """Return the interval of the plain mean of independent shares: Wilson's distances, squared and added (Newcombe 1998)."""
    mean = sum(shares.values()) / len(shares)
    below, above = (
        math.sqrt(sum((shares[name] - intervals[name][side]) ** 2 for name in shares)) / len(shares) for side in (0, 1)
    )
    return [mean - below, mean + above]


def newcombe(correct_a: int, n_a: int, correct_b: int, n_b: int) -> list[float]:
    """Return the 95 % interval of the difference of two independent shares, percent points (Newcombe 1998, method 10); n > 0."""
    (a, (low_a, high_a)), (b, (low_b, high_b)) = (
        (100 * correct / n, wilson(correct, n) or []) for correct, n in ((correct_a, n_a), (correct_b, n_b))
    )
    return [a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)]


# ---- means over records ---------------------------------------------------------------------------------------------
def clusters_of(prompts: Sequence[str]) -> list[int]:
    """Return a cluster number for each prompt: the same question, or a later turn of the same dialogue, is one cluster.

    A record without a prompt is a cluster of its own.
    """
    numbers, root, number = {}, "", -1
    for prompt in sorted(set(filter(None, prompts))):
        if not goes_on(prompt, root):
            root, number = prompt, number + 1
        numbers[prompt] = number
    return [numbers[prompt] if prompt else number + 1 + at for at, prompt in enumerate(prompts)]


def goes_on(prompt: str, earlier: str) -> bool:
    """Say whether a prompt is a later turn of the dialogue that the earlier one asks in.

    A prompt ends with the mark that opens an answer, so a later one begins with the whole of it, and not in a word's middle.
    """
    if not earlier or len(prompt) <= len(earlier) or not prompt.startswith(earlier):
        return False
    return prompt[len(earlier)] == "\n" or not earlier[-1].isalnum()


def strata_of(sizes: Iterable[int]) -> list[int]:
    """Return a stratum number for each record of data sets of these sizes, one after the other."""
    return [number for number, size in enumerate(sizes) for _ in range(size)]


def resampled_means(values, resamples: int = RESAMPLES, seed: int = SEED, clusters=None, strata=None):
    """Return the means of samples with replacement: (n, columns) -> (resamples, columns), numpy arrays.

    clusters: a number for each record; whole clusters are drawn. strata: the same; each is drawn from on its own.
    """
    import numpy as np

    values = np.asarray(values, dtype=float)
    strata = np.zeros(len(values), int) if strata is None else np.asarray(strata)
    # one question, asked again and again: its answers are all there is to draw from
    if clusters is None or len(set(zip(strata.tolist(), clusters, strict=True))) == len(set(strata.tolist())):
        clusters = np.arange(len(values))
    clusters = np.asarray(clusters)
    units, unit_of = np.unique(np.stack([strata, clusters]), axis=1, return_inverse=True)
    unit_of = unit_of.reshape(-1)
    # each unit's sums, and last its count of records
    totals = np.zeros((units.shape[1], values.shape[1] + 1))
    np.add.at(totals, unit_of, np.column_stack([values, np.ones(len(values))]))
    generator, drawn = np.random.default_rng(seed), np.zeros((resamples, totals.shape[1]))
    for stratum in np.unique(units[0]):
        members = totals[units[0] == stratum]
        rows = max(1, _INDEXES_AT_ONCE // len(members))
        for start in range(0, resamples, rows):
            indexes = generator.integers(0, len(members), (min(rows, resamples - start), len(members)))
            for column in range(totals.shape[1]):
                drawn[start : start + rows, column] += members[:, column][indexes].sum(axis=1)
    return drawn[:, :-1] / drawn[:, -1:]


def ci95(values, **sampling: Any) -> list[list[float] | None]:
    """Return [low, high] of the 95 % interval of each column's mean, to four decimals; None where nothing shows a spread."""
    import numpy as np

    if len(values) < 2:
        return [None] * np.shape(values)[1]
    return percentiles(resampled_means(values, **sampling))


def percentiles(means) -> list:
    """Return [low, high] between which 95 % of resampled means lie, to four decimals; of several columns, of each."""
    import numpy as np

    return np.percentile(means, [2.5, 97.5], axis=0).T.round(4).tolist()


def bootstrap_p(resampled_differences) -> float:
    """Return the two-sided p-value that the mean difference isn't zero; never 0, which no resampling can show."""
    count = len(resampled_differences)
    tail = min((resampled_differences <= 0).sum(), (resampled_differences >= 0).sum())
    return min(1.0, 2 * (int(tail) + 1) / (count + 1))


# ---- tests ----------------------------------------------------------------------------------------------------------
def mcnemar(only_a: int, only_b: int) -> float:
    """Return McNemar's exact two-sided p-value for the questions that only one of two models answers right."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: dict[Any, float]) -> dict[Any, float]:
    """Return p-values adjusted for their number (Holm 1979), so that all together err at most 5 % of the time."""
    ranked = sorted(p_values, key=p_values.__getitem__)
    multiplied = (min(1.0, (len(ranked) - rank) * p_values[name]) for rank, name in enumerate(ranked))
    adjusted = dict(zip(ranked, accumulate(multiplied, max), strict=True))
    return {name: adjusted[name] for name in p_values}


def smallest_visible(standard_error: float) -> float:
    """Return the smallest true difference that a two-sided test at 5 % finds with 80 % power (Miller 2024, section 5)."""
    from scipy.stats import norm

    return float((norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * standard_error)


def most_discordant(difference: int) -> int:
    """Return how many answers may differ between two models for `difference` more right ones to be significant; 0 if none may.

    So what a published pair of fractions can show is known without the answers.
    """
    # p grows with the answers that cancel each other out
    pairs = (((n + difference) // 2, (n - difference) // 2) for n in count(difference, 2))
    return max(map(sum, takewhile(lambda pair: mcnemar(*pair) < ALPHA, pairs)), default=0)


# ---- probabilities --------------------------------------------------------------------------------------------------
def calibration_bins(rows: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Return (size, mean confidence, accuracy), from 0 to 1, of each of ten equal bins of the answer's probability."""

    def bin_of(answer: tuple[float, bool]) -> int:
        return min(int(answer[0] * ECE_BINS), ECE_BINS - 1)

    answers = [(row["probs"][row["predicted"]], row["predicted"] == row["answer"]) for row in rows]
    bins = [list(members) for _, members in groupby(sorted(answers, key=bin_of), key=bin_of)]
    return [(len(members), *(sum(column) / len(members) for column in zip(*members, strict=True))) for members in bins]


def expected_calibration_error(rows: list[dict[str, Any]]) -> float:
    """Return the ECE in percent: the bins' |confidence - accuracy|, weighted by their size."""
    gaps = (size * abs(confidence - accuracy) for size, confidence, accuracy in calibration_bins(rows))
    return 100 * sum(gaps) / len(rows)


def brier(rows: list[dict[str, Any]]) -> float:
    """Return the mean squared distance of the letters' probabilities from the truth, summed over letters, 0 to 2."""
    squares = (
        (probability - (letter == row["answer"])) ** 2 for row in rows for letter, probability in row["probs"].items()
    )
    return sum(squares) / len(rows)


# ---- judges ---------------------------------------------------------------------------------------------------------
def judged(rows: Sequence[dict[str, Any]], aspects: Sequence[str]) -> dict[str, Any]:
    """Return {"n", "incomplete", "aspects": {aspect: row}, "signature"} of a judge's verdicts on pairs of answers, a and b.

    rows: `original` (a stands first) and `swapped`, two verdicts each, {aspect: "first", "second" or "tie"}. Those with fewer
    are counted as incomplete and left out. A row's numbers are percent (points): `difference` (a preferred less b preferred,
    over both orders) and `position` (first preferred less second), with the `ci95` of both over clusters of prompts; and how
    often a verdict is the same when asked `again` and in the `other_order`.
    """
    import numpy as np

    whole = [row for row in rows if len(row["original"]) == len(row["swapped"]) == 2]
    clusters, found = clusters_of([row["prompt"] for row in whole]), {}
    sign = {"first": 1, "tie": 0, "second": -1}
    for aspect in aspects if whole else ():
        # (records, orders, times): 1 where the first answer is preferred
        first = np.array(
            [[[sign[one[aspect]] for one in row[key]] for key in ("original", "swapped")] for row in whole]
        )
        a = first * np.array([1, -1])[:, None]
        columns = 100 * np.stack([a, first], axis=-1).mean(axis=(1, 2))
        difference, position = columns.mean(axis=0).tolist()
        found[aspect] = {
            "difference": difference,
            "position": position,
            "ci95": dict(zip(("difference", "position"), ci95(columns, clusters=clusters), strict=True)),
            "again": 100 * float((first[:, :, 0] == first[:, :, 1]).mean()),
            "other_order": 100 * float((a[:, 0] == a[:, 1]).mean()),
        }
    drawn = f"ci95:bootstrap-{RESAMPLES},seed-{SEED},{len(set(clusters))}-clusters"
    counts = {"n": len(whole), "incomplete": len(rows) - len(whole)}
    said = ",".join(f"{name}:{count}" for name, count in counts.items())
    return counts | {"aspects": found, "signature": f"both-orders-twice,greedy|{said}|{drawn}"}
