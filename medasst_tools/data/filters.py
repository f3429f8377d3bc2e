"""What `medasst convert` leaves out or masks on request: test questions, copies, personal data. The default is the paper's data.

A Cleaning says what is asked for; `prepare` does its share of the work on one record, in any process; `Dropper` keeps what
must be known of all records before, in the one process that writes.
"""

from collections import Counter
from typing import Any, NamedTuple

from medasst_tools.data.decontamination import QuestionIndex
from medasst_tools.data.deduplication import key, normalise, question_of
from medasst_tools.data.pii import mask

OVERLAPS = "question of a test set"
DUPLICATE = "copy of an earlier record"


class Cleaning(NamedTuple):
    """What is asked for. `index`: the test questions whose records go; None keeps them."""

    drop_duplicates: bool = False
    mask_personal_data: bool = False
    index: QuestionIndex | None = None

    def names(self) -> list[str]:
        """Return the options that are asked for; none is the paper's data."""
        asked = {
            "drop-overlap": self.index is not None,
            "drop-duplicates": self.drop_duplicates,
            "mask-personal-data": self.mask_personal_data,
        }
        return [name for name, wanted in asked.items() if wanted]

    def __bool__(self) -> bool:
        return bool(self.names())


class Prepared(NamedTuple):
    """A record after masking, why it goes (None if it stays), its key for copies, and what was masked."""

    record: dict[str, Any]
    reason: str | None
    key: int | None
    masked: Counter


def prepare(record: dict[str, Any], cleaning: Cleaning) -> Prepared:
    """Look the record's question up among the test questions, key it, and mask it. Keys are of the text before masking."""
    question = question_of(record)
    if cleaning.index and cleaning.index.match(question):
        return Prepared(record, OVERLAPS, None, Counter())
    record_key = key(normalise(question) + "\0" + normalise(record["output"])) if cleaning.drop_duplicates else None
    masked: Counter = Counter()
    if cleaning.mask_personal_data:
        record, masked = mask_record(record)
    return Prepared(record, None, record_key, masked)


def mask_record(record: dict[str, Any]) -> tuple[dict[str, Any], Counter]:
    """Return the record with personal data masked in every text of it, and how much there was by kind."""
    counts: Counter = Counter()

    def masked(text: str) -> str:
        text, found = mask(text)
        counts.update(found)
        return text

    texts = {name: masked(record[name]) for name in ("instruction", "input", "output")}
    if "history" in record:
        texts["history"] = [[masked(user), masked(doctor)] for user, doctor in record["history"]]
    return texts, counts


class Dropper:
    """Remembers the keys of the records that were kept, over all datasets of a run."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def is_copy(self, record_key: int | None) -> bool:
        """Say whether a record with this key was kept before, and remember it."""
        if record_key is None:
            return False
        if record_key in self._seen:
            return True
        self._seen.add(record_key)
        return False
