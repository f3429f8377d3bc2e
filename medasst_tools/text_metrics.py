"""BLEU-4 and ROUGE-1/2/L of one answer, equal to LLaMA-Factory's ComputeSimilarity to its four decimals.

LLaMA-Factory (train/sft/metric.py) takes BLEU-4 over characters from NLTK (smoothing method 3) and the F of ROUGE over
jieba's words from rouge-chinese. Those libraries are the definition; here is the same arithmetic with faster parts:
sets and counters over slices for n-grams, rapidfuzz for the longest common subsequence, our segmenter for jieba's.
"""

import math
from collections import Counter
from operator import add
from typing import NamedTuple

from rapidfuzz.distance import LCSseq
from rouge_chinese import Rouge

from medasst_tools.word_segmenter import WordSegmenter


class Scores(NamedTuple):
    """Percent, rounded to four decimals."""

    bleu_4: float
    rouge_1: float
    rouge_2: float
    rouge_l: float


METRICS = tuple(name.replace("_", "-") for name in Scores._fields)


def score_pair(predict: str, label: str, segmenter: WordSegmenter) -> Scores:
    """Score one answer against its reference. Empty and blank texts score 0."""
    rouge = _rouge(_words(predict, segmenter), _words(label, segmenter))
    return Scores(*(round(100 * value, 4) for value in (bleu_4(predict, label), *rouge)))


def bleu_4(predict: str, label: str) -> float:
    """Return NLTK's sentence_bleu([list(label)], list(predict)) with SmoothingFunction().method3, from 0 to 1."""
    if not set(predict) & set(label):
        return 0.0
    log_precisions, zeros = [], 0
    ngrams, references = list(predict), list(label)
    for n in range(1, 5):
        if n > 1:  # each n-gram is the one before and the next character
            ngrams, references = (
                list(map(add, grams, text[n - 1 :])) for grams, text in ((ngrams, predict), (references, label))
            )
        matches = _clipped_matches(ngrams, references)
        total = max(1, len(ngrams))
        if matches == 0:
            zeros += 1
            precision = 1 / (2**zeros * total)
        else:
            precision = matches / total
        log_precisions.append(0.25 * math.log(precision))
    brevity = 1.0 if len(predict) > len(label) else math.exp(1 - len(label) / len(predict))
    return brevity * math.exp(math.fsum(log_precisions))


def _clipped_matches(ngrams: list[str], references: list[str]) -> int:
    """Count the n-grams that the reference has too, each at most as often as it stands there."""
    common = set(ngrams).intersection(references)
    if not common:
        return 0
    available = Counter(filter(common.__contains__, references))
    return sum(min(count, available[ngram]) for ngram, count in Counter(filter(common.__contains__, ngrams)).items())


def _words(text: str, segmenter: WordSegmenter) -> list[str]:
    """Return the words that rouge-chinese counts: sentences are split and joined again, which can leave empty words."""
    spaced = " ".join(segmenter.cut(text))
    if not spaced.split():
        return []
    sentences = (" ".join(sentence.split()) for sentence in _ROUGE.cut_sent(spaced) if sentence)
    return [word for sentence in sentences for word in sentence.split(" ")]


_ROUGE = Rouge()


def _rouge(predict: list[str], label: list[str]) -> tuple[float, float, float]:
    """Return the F of ROUGE-1, ROUGE-2 (over sets of n-grams, as rouge-chinese) and ROUGE-L, from 0 to 1."""
    if not predict or not label:
        return 0.0, 0.0, 0.0
    rouge_1 = _set_f(set(predict), set(label))
    rouge_2 = _set_f(set(zip(predict, predict[1:], strict=False)), set(zip(label, label[1:], strict=False)))
    # rapidfuzz compares strings by character: a character for each word makes it exact
    codes: dict[str, str] = {}
    coded = ["".join(codes.setdefault(word, chr(len(codes))) for word in words) for words in (predict, label)]
    common = LCSseq.similarity(*coded)
    return rouge_1, rouge_2, _f(common / len(predict), common / len(label))


def _set_f(predict: set, label: set) -> float:
    common = len(predict & label)
    return _f(common / len(predict) if predict else 0.0, common / len(label) if label else 0.0)


def _f(precision: float, recall: float) -> float:
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
