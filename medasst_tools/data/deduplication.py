"""When two questions or two records count as the same: exactly, normalised, and nearly (by shared character n-grams)."""

import re
import unicodedata
from hashlib import blake2b
from typing import Any

NOT_A_LETTER = re.compile(r"[\W_]+")
# Signs without which a question asks something else: 5.5 mg and 55 mg, 3-5 days, 1:2, 120/80, 3+2; <7 and >7; -3.5 and +3.5;
# HBsAg(+) and HBsAg(-), 阳性+ and 阳性-; ALT↑ and ALT↓.
_SIGN = "|".join(
    [
        r"(?<=[0-9])\s*[.:/\u2044~\-+*×^]\s*(?=[0-9])",
        r"[<>≤≥≦≧=≠]+(?=\s*[0-9])",
        r"(?<=[0-9])\s*[%‰]",
        r"(?<![0-9a-z])[+\-±]+(?=\s*[0-9])",
        r"(?<=\()\s*[+\-±]+\s*(?=\))",
        r"(?<=\w)[+\-±]+(?!\w)",
        r"[↑↓√×♂♀]",
    ]
)
SIGNS = re.compile(_SIGN)
WORDS_AND_SIGNS = re.compile(rf"{_SIGN}|[^\W_]+")
SHINGLE = 3  # characters


def question_of(record: dict[str, Any]) -> str:
    """Return all that the user says in an Alpaca record, the earlier turns first."""
    parts = [user for user, _ in record.get("history") or ()]
    parts.append(record["instruction"])
    if record.get("input"):
        parts.append(record["input"])
    return "\n".join(parts)


def answer_of(record: dict[str, Any]) -> str:
    """Return the answer of an Alpaca record, both answers of a preference record."""
    return record["output"] if "output" in record else f"{record['chosen']}\n{record['rejected']}"


def normalise(text: str) -> str:
    """Return the text's letters and digits alone, in one width and case, with the signs that make it another question."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    if SIGNS.search(text):
        return "".join("".join(WORDS_AND_SIGNS.findall(text)).split())
    return NOT_A_LETTER.sub("", text)


def key(text: str) -> int:
    """Return 64 bits of a hash; among 1.5 million texts two different ones meet with a probability of 6e-8."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(normalised: str) -> set[str]:
    """Return the character trigrams of a normalised text; a shorter text is its own."""
    if len(normalised) <= SHINGLE:
        return {normalised} if normalised else set()
    return set(map("".join, zip(normalised, normalised[1:], normalised[2:], strict=False)))


def jaccard(a: set[str], b: set[str]) -> float:
    """Return the share of two sets' elements that both have."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0
