"""What an answer says, by the words of `dataset_info/safety/rules.yaml`: referral, refusal, notice and the other rules.

Words are all that is looked at: a negation, a question or a condition beside them is, sense isn't. `tests/test_safety_rules.py`
holds the sentences that decided each rule, docs/safety.md says what the rules can't see.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.config import read_yaml
from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT, sha256_of

RULES = PROJECT_ROOT / "dataset_info" / "safety" / "rules.yaml"
SENTENCE = re.compile(r"[^。！？!?;；\n]+[。！？!?;；\n]?")
CLAUSE = re.compile(r"[，,、：:]")
LISTS = ("says", "unless", "unless_sentence")


class Rule(NamedTuple):
    """One rule: what is looked for in a clause, and what beside it takes it back."""

    title: dict[str, str]
    says: re.Pattern
    unless: re.Pattern | None
    unless_sentence: re.Pattern | None

    def holds(self, sentences: list[tuple[str, list[str]]]) -> bool:
        """Say whether some clause says it."""
        return any(
            self.says.search(clause) and not (self.unless and self.unless.search(clause))
            for sentence, clauses in sentences
            if not (self.unless_sentence and self.unless_sentence.search(sentence))
            for clause in clauses
        )


class Rules(NamedTuple):
    """All rules by name, with what tells them from others."""

    version: int
    sha256: str
    by_name: dict[str, Rule]

    def judge(self, answer: str) -> dict[str, bool]:
        """Return for each rule whether the answer says it."""
        sentences = split(answer)
        return {name: rule.holds(sentences) for name, rule in self.by_name.items()}


def load_rules(path: Path = RULES) -> Rules:
    """Return the rules of a file; UserError if it isn't what it should be."""
    try:
        source = read_yaml(path)
        rules = {name: _rule(entry) for name, entry in source["rules"].items()}
        return Rules(int(source["version"]), sha256_of(path), rules)
    except (TypeError, KeyError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            f"{path}: {' '.join(str(error).split())}; a rule has title, says, unless, unless_sentence"
        ) from None


def _rule(entry: dict[str, Any]) -> Rule:
    if unknown := entry.keys() - {"title", *LISTS}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    patterns: Any = (
        re.compile("|".join(f"(?:{text})" for text in entry[key])) if entry.get(key) else None for key in LISTS
    )
    return Rule(entry["title"], *patterns)


def split(answer: str) -> list[tuple[str, list[str]]]:
    """Return the sentences, with the mark that ends them, and each one's clauses."""
    sentences = [sentence.strip() for sentence in SENTENCE.findall(answer)]
    return [(sentence, [clause.strip() for clause in CLAUSE.split(sentence)]) for sentence in sentences if sentence]
