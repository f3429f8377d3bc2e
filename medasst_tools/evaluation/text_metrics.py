"""BLEU-4 and ROUGE-1/2/L of one answer, equal to LLaMA-Factory's ComputeSimilarity to its four decimals.

LLaMA-Factory (train/sft/metric.py) takes BLEU-4 over characters from NLTK (smoothing method 3) and the F of ROUGE over
jieba's words from rouge-chinese. Those libraries are the definition; here is the same arithmetic with faster parts:
n-grams only where shorter ones match, rapidfuzz for the longest common subsequence, jieba's Rust port for most of jieba.
"""

import functools
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from rapidfuzz.distance import LCSseq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its source warns when Python first compiles it
    from rouge_chinese import Rouge

from medasst_tools.evaluation.word_segmenter import spaced_words


class Pair:
    """One answer beside its reference; the words are found once for all metrics."""

    def __init__(self, predict: str, label: str):
        """Take both texts as they are."""
        self.predict, self.label = predict, label

    @cached_property
    def words(self) -> tuple[list[str], list[str]]:
        """The words of answer and reference as rouge-chinese counts them."""
        return _words(self.predict), _words(self.label)


def score_pair(predict: str, label: str) -> tuple[float, ...]:
    """Return the metrics of one answer in the order of METRICS: percent, to four decimals. Empty and blank texts score 0."""
    pair = Pair(predict, label)
    return tuple(round(100 * metric(pair), 4) for metric in METRICS.values())


def bleu_4(pair: Pair) -> float:
    """Return NLTK's sentence_bleu([list(label)], list(predict)) with SmoothingFunction().method3, from 0 to 1."""
    predict, label = pair.predict, pair.label
    matches = _clipped_matches(predict, label)
    if matches[0] == 0:
        return 0.0
    log_precisions, zeros = [], 0
    for n, matched in enumerate(matches, 1):
        total = max(1, len(predict) - n + 1)
        if matched == 0:
            zeros += 1
        log_precisions.append(0.25 * math.log(matched / total if matched else 1 / (2**zeros * total)))
    brevity = 1.0 if len(predict) > len(label) else math.exp(1 - len(label) / len(predict))
    return brevity * math.exp(math.fsum(log_precisions))


def _clipped_matches(predict: str, label: str) -> list[int]:
    """Count the 1- to 4-grams that the label has too, each at most as often as it stands there.

    An n-gram can only match where both (n-1)-grams in it do, so each order looks at few places of the one before.
    """
    matches = []
    places: list[Any] = [range(len(predict)), range(len(label))]
    ngrams: list[Any] = [predict, label]
    for n in range(1, 5):
        different = [set(side) for side in ngrams]
        common = different[0] & different[1]
        if any(len(different[side]) == len(ngrams[side]) for side in (0, 1)):
            matches.append(len(common))  # where none stands twice, each counts once
        else:
            matches.append(_clipped_count(ngrams, common))
        if not common:
            return matches + [0] * (4 - n)
        for side, text in enumerate((predict, label)):
            matched = [place for place, ngram in zip(places[side], ngrams[side], strict=True) if ngram in common]
            places[side] = [place for place, after in pairwise(matched) if after == place + 1]
            ngrams[side] = [text[place : place + n + 1] for place in places[side]]
    return matches


def _clipped_count(ngrams: list[Sequence[str]], common: set[str]) -> int:
    counts, available = (Counter(filter(common.__contains__, side)) for side in ngrams)
    return sum(map(min, counts.values(), map(available.__getitem__, counts)))


def _words(text: str) -> list[str]:
    """Return the words that rouge-chinese counts: sentences are split and joined again, which can leave empty words."""
    spaced = spaced_words(text)
    words = spaced.split()
    if not words or not ("\n" in text or "......" in text):  # what can leave an empty word, or split one
        return words
    sentences = (" ".join(sentence.split()) for sentence in _ROUGE.cut_sent(spaced) if sentence)
    # an empty word counts too; as a line feed, which is no other word, because rapidfuzz takes "" and "\\0" for the same
    return [word or "\n" for sentence in sentences for word in sentence.split(" ")]


_ROUGE = Rouge()


def rouge_1(pair: Pair) -> float:
    """Return the F of ROUGE-1 over sets of words, from 0 to 1, as rouge-chinese."""
    return _set_f(*map(set, pair.words))


def rouge_2(pair: Pair) -> float:
    """Return the F of ROUGE-2 over sets of pairs of words, from 0 to 1, as rouge-chinese."""
    return _set_f(*(set(zip(words, words[1:], strict=False)) for words in pair.words))


def rouge_l(pair: Pair) -> float:
    """Return the F of the longest common subsequence of words, from 0 to 1, as rouge-chinese."""
    predict, label = pair.words
    if not predict or not label:
        return 0.0
    common = LCSseq.similarity(predict, label)  # by the words' 64-bit hashes
    return _f(common / len(predict), common / len(label))


def _set_f(predict: set, label: set) -> float:
    common = len(predict & label)
    return _f(common / len(predict) if predict else 0.0, common / len(label) if label else 0.0)


def _f(precision: float, recall: float) -> float:
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


# What score, compare, report and model card walk: a metric is a function of a pair, from 0 to 1, and a line here.
METRICS: dict[str, Callable[[Pair], float]] = {
    "bleu-4": bleu_4,
    "rouge-1": rouge_1,
    "rouge-2": rouge_2,
    "rouge-l": rouge_l,
}
PRIMARY = "rouge-l"  # said before anything is run; the others are adjusted for their number


# ---- descriptions: what answers are like beyond n-grams in common; shown, never judged ------------------------------
NUMBER = re.compile(r"\d+(?:\.\d+)?|[一二两三四五六七八九十百半]+(?=[天周日月年岁次片粒颗丸袋支瓶滴毫克])")


def length_ratio(prompt: str, predict: str, label: str) -> float | None:
    """Return the answer's length over the reference's, in characters; None without a reference."""
    return len(predict) / len(label) if label else None


def repeated_4_grams(prompt: str, predict: str, label: str) -> float | None:
    """Return the share, in percent, of the answer's 4-grams of characters that stood in it before; None below 4 characters."""
    ngrams = [predict[at : at + 4] for at in range(len(predict) - 3)]
    return 100 * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else None


def new_numbers(prompt: str, predict: str, label: str) -> float:
    """Return how many different numbers and doses the answer has that neither question nor reference has."""
    said, *known = (set(NUMBER.findall(unicodedata.normalize("NFKC", text))) for text in (predict, prompt, label))
    return len(said.difference(*known))


def chrf(prompt: str, predict: str, label: str) -> float:
    """Return sacrebleu's sentence chrF, from 0 to 100."""
    return chrf_scorer().sentence_score(predict, [label]).score


@functools.cache
def chrf_scorer():
    """Return sacrebleu's chrF with its defaults; after a score it has a signature."""
    from sacrebleu.metrics import CHRF

    return CHRF()


# What describes answers: a function of prompt (history included), answer and reference, None where it says nothing, and a line here.
DESCRIPTIONS: dict[str, Callable[[str, str, str], float | None]] = {
    "length-ratio": length_ratio,
    "repeated-4-grams": repeated_4_grams,
    "new-numbers": new_numbers,
    "chrf": chrf,
}
