"""Find the training questions that are a test set's questions: the same, the same but for punctuation, or nearly.

Nearly: at least 0.8 of the character trigrams of both are shared (Jaccard), looked up by MinHash (datasketch) and then
counted exactly, so that none is reported that isn't. What has too few trigrams of any test question is passed over first,
which loses nothing.
"""

import functools
from binascii import crc32
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from medasst_tools.data.deduplication import jaccard, normalise, question_of, shingles

NEAR = 0.8
PERMUTATIONS = 128
BANDS, ROWS = 32, 4  # finds a pair at 0.8 with a probability over 1 - 1e-7
SEED = 42
KINDS = ("exact", "normalised", "near")


class Match(NamedTuple):
    """A test question that a training question is, and how: one of KINDS, with the share of trigrams in common."""

    test_set: str
    place: int
    kind: str
    similarity: float


class QuestionIndex:
    """The questions of some test sets, to look training questions up in."""

    def __init__(self, test_sets: dict[str, Iterable[str]]):
        """`test_sets`: {name: questions}; a question's place is its number in its set, from 0."""
        from datasketch import MinHashLSH

        self._entries: list[tuple[str, int, str, str, set[str]]] = []
        self._by_normalised: dict[str, list[int]] = {}
        self._trigrams: set[str] = set()
        self.sizes: dict[str, int] = {}
        self._lsh = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
        for name, questions in test_sets.items():
            place = -1
            for place, question in enumerate(questions):
                normalised = normalise(question)
                if not normalised:
                    continue
                trigrams, entry = shingles(normalised), len(self._entries)
                self._entries.append((name, place, question, normalised, trigrams))
                self._by_normalised.setdefault(normalised, []).append(entry)
                self._trigrams |= trigrams
                self._lsh.insert(entry, _minhash(trigrams))
            self.sizes[name] = place + 1

    def match(self, question: str, normalised: str | None = None) -> list[Match]:
        """Return the test questions that this question is, best first."""
        normalised = normalise(question) if normalised is None else normalised
        found: set[Any] = set(self._by_normalised.get(normalised, ()))
        trigrams = shingles(normalised)
        # |A and B| / |A or B| >= 0.8 needs 0.8 |A| of A's trigrams in B
        if trigrams and len(trigrams & self._trigrams) >= NEAR * len(trigrams):
            found.update(self._lsh.query(_minhash(trigrams)))
        matches = [self._compare(question, normalised, trigrams, entry) for entry in found]
        return sorted(filter(None, matches), key=lambda match: (-match.similarity, match.kind))

    def _compare(self, question: str, normalised: str, trigrams: set[str], entry: int) -> Match | None:
        name, place, test_question, test_normalised, test_trigrams = self._entries[entry]
        if question == test_question:
            return Match(name, place, "exact", 1.0)
        if normalised == test_normalised:
            return Match(name, place, "normalised", 1.0)
        similarity = jaccard(trigrams, test_trigrams)
        return Match(name, place, "near", round(similarity, 4)) if similarity >= NEAR else None


def read_questions(path: Path) -> Iterator[str]:
    """Yield the question of each record of a converted dataset."""
    with path.open("rb") as lines:
        yield from (question_of(orjson.loads(line)) for line in lines)


def _minhash(trigrams: set[str]):
    minhash = _empty_minhash().copy()
    minhash.update_batch([trigram.encode("utf-8", "surrogatepass") for trigram in trigrams])
    return minhash


@functools.cache  # to draw the permutations takes longer than all else here
def _empty_minhash():
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS, seed=SEED, hashfunc=crc32)
