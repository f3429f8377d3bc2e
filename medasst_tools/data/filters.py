"""What `medasst convert` leaves out or masks on request: test questions, copies, personal data. The default is the paper's data."""

from collections import Counter
from typing import Any

from medasst_tools.data.decontamination import QuestionIndex
from medasst_tools.data.deduplication import answer_of, key, normalise, question_of
from medasst_tools.data.pii import mask
from medasst_tools.data.raw_files import NotKept

OVERLAPS = "question of a test set"


class Cleaner:
    """The filters of one dataset. index: the test questions whose records go; seen: keys of the records kept so far."""

    def __init__(self, index: QuestionIndex | None, seen: set[int] | None, masks: bool):
        """None leaves a filter out."""
        self.index, self.seen, self.masks = index, seen, masks
        self.idle = index is None and seen is None and not masks

    def clean(self, record: dict[str, Any]) -> tuple[dict[str, Any], Counter]:
        """Return (record, pieces masked by kind); raise NotKept if it goes. Questions are looked up as they were, and masked."""
        asked, masked = question_of(record), Counter()
        if self.index and self.index.match(asked):
            raise NotKept(OVERLAPS, by_design=True)
        if self.seen is not None:
            record_key = key(normalise(asked) + "\0" + normalise(answer_of(record)))
            if record_key in self.seen:
                raise NotKept("copy of an earlier record", by_design=True)
            self.seen.add(record_key)
        if self.masks:
            record, masked = mask_record(record)
            if self.index and masked and self.index.match(question_of(record)):
                raise NotKept(OVERLAPS, by_design=True)  # the test sets are masked too
        return record, masked


def mask_record(record: dict[str, Any]) -> tuple[dict[str, Any], Counter]:
    """Return the record with personal data masked in every text of it, and how much there was by kind."""
    counts: Counter = Counter()

    def masked(text: str) -> str:
        text, found = mask(text)
        counts.update(found)
        return text

    names = ("instruction", "input", "output", "chosen", "rejected", "system")
    texts: dict[str, Any] = {name: masked(record[name]) for name in names if name in record}
    if "history" in record:
        texts["history"] = [[masked(user), masked(doctor)] for user, doctor in record["history"]]
    return record | texts, counts
