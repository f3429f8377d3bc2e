"""The corpora that the project knows: `dataset_info/corpora.yaml`, checked."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT

REGISTRY = PROJECT_ROOT / "dataset_info" / "corpora.yaml"

# What is done to text, by the names that the registry uses; the manifest repeats the sentences.
RULES = {
    "edge_whitespace": "white space at both ends of a text is removed, U+3000 included",
    "zero_width": "zero-width characters (U+200B, U+2060, U+FEFF) are removed",
    "first_wording": "of several wordings of a question the first is taken: one record in, one out",
    "markers": "问： and 答： at the start of a turn are removed",
    "odd_tail": "a last question without an answer is removed; the whole pairs before it stay",
    "positives": "answers with label 1 are taken; those with label 0 are other questions' answers, skipped",
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """One LLaMA-Factory dataset and the raw file it is made of; `files` are alternatives, the first that exists counts."""

    name: str
    corpus: "Corpus"
    files: list[str]
    paper: int | None
    published: int | None


@dataclass(frozen=True, eq=False)
class Corpus:
    """One corpus; `name` is also its raw folder."""

    name: str
    title: str
    homepage: str
    hugging_face: str | None
    modelscope: str | None
    licence: str
    layout: str
    multi_turn: bool
    rules: list[str]
    known_files: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_datasets(path: Path = REGISTRY) -> dict[str, Dataset]:
    """Return every dataset by name, in the registry's order; UserError if the file isn't what it should be."""
    datasets: dict[str, Dataset] = {}
    try:
        for corpus_name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            own = dict(entry)
            described = own.pop("datasets")
            corpus = Corpus(name=corpus_name, **own)
            if unknown := set(corpus.rules) - RULES.keys():
                raise UserError(f"{path}: {corpus_name} has unknown rules {sorted(unknown)}")
            datasets |= {name: Dataset(name=name, corpus=corpus, **facts) for name, facts in described.items()}
    except (TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        known = ", ".join(field.name for field in fields(Corpus)[1:])
        raise UserError(f"{path}: {' '.join(str(error).split())}; a corpus has {known} and datasets") from None
    return datasets


def is_test(dataset: str) -> bool:
    """Say whether a dataset is one of the test sets."""
    return dataset.endswith("_test")
