"""jieba's words, faster: the same code except for the two methods where its time goes, and a memory of recent phrases.

jieba builds a graph of all dictionary words in a phrase and then walks it backwards, taking each word's logarithm as it
goes. Here both are one pass over logarithms taken once. The tests hold it equal to `jieba.cut` on real and odd text.
"""

from functools import lru_cache
from math import log

import jieba

PHRASES_REMEMBERED = 50_000  # phrases between punctuation marks: answers share many ("您好", "必要时就医")


class WordSegmenter(jieba.Tokenizer):
    """A jieba tokenizer over jieba's own dictionary; `cut(text)` gives what `jieba.cut(text)` gives."""

    def __init__(self) -> None:
        super().__init__()
        jieba.initialize()
        self.FREQ, self.total, self.initialized = jieba.dt.FREQ, jieba.dt.total, True
        log_total = log(self.total)
        # None: only the beginning of words, no word itself
        self.log_share = {word: log(count) - log_total if count else None for word, count in self.FREQ.items()}
        self.log_unknown = log(1) - log_total
        self.remembered = lru_cache(PHRASES_REMEMBERED)(
            lambda phrase: tuple(super(WordSegmenter, self)._Tokenizer__cut_DAG(phrase))
        )

    def get_DAG(self, sentence: str) -> None:
        """Nothing: `calc` finds the words itself."""

    def calc(self, sentence: str, DAG: None, route: dict[int, tuple[float, int]]) -> None:
        """Fill route[i] = (best log share from i on, last position of the first word), as jieba's `calc` does."""
        length, log_share, log_unknown = len(sentence), self.log_share, self.log_unknown
        best_from = [0.0] * (length + 1)
        for start in range(length - 1, -1, -1):
            end, best, best_end = start + 1, None, start
            word = sentence[start]
            while word in log_share:
                share = log_share[word]
                if share is not None:
                    score = share + best_from[end]
                    if best is None or score >= best:  # of equals jieba takes the longer word
                        best, best_end = score, end - 1
                if end == length:
                    break
                end += 1
                word = sentence[start:end]
            if best is None:
                best = log_unknown + best_from[start + 1]
            best_from[start] = best
            route[start] = (best, best_end)

    def _Tokenizer__cut_DAG(self, sentence: str) -> tuple[str, ...]:
        return self.remembered(sentence)
