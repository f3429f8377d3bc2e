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
from collections.abc import Callable, Sequence, Sized
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
    # method 3: the first order without a match counts as half a match, the next as a quarter
    counts = [matched or 0.5 ** matches[:n].count(0) for n, matched in enumerate(matches, 1)]
    log_precisions = (0.25 * math.log(matched / max(1, len(predict) - n)) for n, matched in enumerate(counts))
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
    return _f(LCSseq.similarity(predict, label), predict, label)  # by the words' 64-bit hashes


def _set_f(predict: set, label: set) -> float:
    return _f(len(predict & label), predict, label)


def _f(common: int, predict: Sized, label: Sized) -> float:
    if not common:
        return 0.0
    precision, recall = common / len(predict), common / len(label)
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
SPELLINGS = {  # of units, in lower case after NFKC
    "毫克": "mg", "微克": "μg", "ug": "μg", "mcg": "μg", "千克": "kg", "公斤": "kg", "克": "g", "毫升": "ml", "升": "l",
    "国际单位": "iu", "单位": "u", "°c": "度", "摄氏度": "度", "h": "小时", "min": "分钟", "星期": "周", "个月": "月", "日": "天",
}  # fmt: skip
_COUNTED = [*SPELLINGS, *"天周月年岁次片粒颗丸袋支瓶滴倍度", "小时", "分钟"]
_LATIN = ("mmol/l", "mmhg", "kpa", "mg", "kg", "g", "μg", "ml", "l", "iu", "u", "cm", "mm", "%")
_UNIT = "|".join(
    sorted((re.escape(unit) + "(?![a-z])" * unit.isascii() for unit in [*_COUNTED, *_LATIN]), key=len)[::-1]
)
_DIGITS = r"\d+(?:\.\d+)?"
QUANTITY = re.compile(rf"({_DIGITS})(?:[-~—至到]({_DIGITS}))?\s*({_UNIT})?|([一二两三四五六七八九十百半]+)({_UNIT})")
# a sentence that only takes leave begins like this, holds one of these, and none of those
_OPENS = re.compile(
    r"\s*(?:不[用必]?客?[气谢]|不用|不必|[很非]常?好|好的|当然|没关系|感谢|谢谢|祝|愿|也?希望|很高兴|我们?|如|若|要是|有?任何|再见|请?随时|欢迎|同时)"
)
_COURTESY = re.compile(r"客气|谢|祝|愿|希望|随时|高兴|再见|保重|尽力|(?:其他|任何|有).{0,20}(?:问题|疑问|疑惑|需要)")
_ADVICE = re.compile(r"建议[您你]|就医|就诊|复诊|注意|避免|保持|坚持|记住|重要|治疗是")


def quantities(text: str) -> set[tuple[float, str]]:
    """Return the numbers in a text with their units, in one spelling: 5毫克 and 5mg are (5.0, "mg"), 三次 is (3.0, "次").

    Chinese numerals count only with a unit; both ends of 3-5天 have it.
    """
    found = set()
    for low, high, unit, numeral, counted in QUANTITY.findall(unicodedata.normalize("NFKC", text).lower()):
        values = [float(digits) for digits in (low, high) if digits] or [_value(numeral)]
        found |= {(value, SPELLINGS.get(unit or counted, unit or counted)) for value in values}
    return found


def _value(numeral: str) -> float:
    total = last = 0.0
    for character in numeral:
        value = {"两": 2.0, "半": 0.5}.get(character) or unicodedata.numeric(character)
        total, last = (total + max(last, 1) * value, 0) if value >= 10 else (total, value)
    return total + last


def is_farewell(text: str) -> bool:
    """Say whether a text only takes leave: thanks, wishes and offers in each sentence, and advice in none."""
    sentences = [sentence for sentence in re.split(r"[。！!？?；;\n]", text) if sentence.strip()]
    return bool(sentences) and all(
        _OPENS.match(one) and _COURTESY.search(one) and not _ADVICE.search(one) for one in sentences
    )


def length_ratio(prompt: str, predict: str, label: str) -> float | None:
    """Return the answer's length over the reference's, in characters; None without a reference."""
    return len(predict) / len(label) if label else None


def repeated_4_grams(prompt: str, predict: str, label: str) -> float | None:
    """Return the share, in percent, of the answer's 4-grams of characters that stood in it before; None below 4 characters."""
    ngrams = [predict[at : at + 4] for at in range(len(predict) - 3)]
    return 100 * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else None


def new_numbers(prompt: str, predict: str, label: str) -> float:
    """Return how many different numbers and doses the answer has that neither question nor reference has.

    The unit is part of it (5 mg is not 5 g), but where one side gives none.
    """
    known = quantities(prompt) | quantities(label)
    return sum(
        all(value != other or (unit and other_unit and unit != other_unit) for other, other_unit in known)
        for value, unit in quantities(predict)
    )


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
