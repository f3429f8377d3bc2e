"""The corpora that the project knows: `dataset_info/corpora.yaml`, and a user's own in `dataset_info/own.yaml`, checked."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from medasst_tools.config import nearest, read_yaml
from medasst_tools.data.layouts import LAYOUTS
from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT

REGISTRY = PROJECT_ROOT / "dataset_info" / "corpora.yaml"
OWN = PROJECT_ROOT / "dataset_info" / "own.yaml"


@dataclass(frozen=True, eq=False)
class Dataset:
    """One LLaMA-Factory dataset and the raw file it is made of.

    files: alternatives, the first that exists counts; an absolute path lies where it is. optional: converted only if named.
    share: of one raw file the share of records that is a test set, and `test_part` which of both this dataset is.
    """

    name: str
    corpus: "Corpus"
    files: list[str]
    paper: int | None = None
    published: int | None = None
    optional: bool = False
    layout: str = ""
    share: float | None = None
    test_part: bool = False


@dataclass(frozen=True, eq=False)
class Corpus:
    """One corpus; `name` is also its raw folder. columns: the names of question and answer in layout qa."""

    name: str
    layout: str
    title: str = ""
    homepage: str = ""
    hugging_face: str | None = None
    modelscope: str | None = None
    licence: str = "unknown"
    columns: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None
    known_files: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_datasets(path: Path = REGISTRY, own: Path | None = None) -> dict[str, Dataset]:
    """Return every dataset by name, in the registry's order, the user's own last; UserError names all that is wrong."""
    own = (OWN if path == REGISTRY else None) if own is None else own
    datasets: dict[str, Dataset] = {}
    for file in filter(None, (path, own if own and own.is_file() else None)):
        entries, problems = read_yaml(file), []
        if not isinstance(entries, dict):
            raise UserError(f"{file} must be a mapping of corpora, got {type(entries).__name__}")
        for name, entry in entries.items():
            found = list(_problems(entry))
            problems += [f"{name}: {problem}" for problem in found]
            if not found:
                described = entry["datasets"]
                corpus = Corpus(name=str(name), **{key: value for key, value in entry.items() if key != "datasets"})
                datasets |= {key: _dataset(key, corpus, facts) for key, facts in described.items()}
        if problems:
            raise UserError(f"{file}: {'; '.join(problems)}")
    return datasets


def _dataset(name: str, corpus: Corpus, facts: dict[str, Any]) -> Dataset:
    files = facts["files"]
    about: dict[str, Any] = {"name": name, "corpus": corpus, "layout": corpus.layout, **facts}
    about["files"] = [files] if isinstance(files, str) else files
    return Dataset(**about)


def _problems(entry: Any):
    """Yield what is wrong with a corpus's entry, each with the nearest known word."""
    if not isinstance(entry, dict):
        yield f"is {entry!r}, must be a mapping with layout and datasets"
        return
    known = [one.name for one in fields(Corpus)[1:]] + ["datasets"]
    for key in entry:
        if key not in known:
            yield f"unknown key {key!r}{nearest(str(key), known)}"
    for key in ("layout", "datasets"):
        if key not in entry:
            yield f"lacks the key {key}"
    yield from _layout_problem(entry.get("layout"))
    described = entry.get("datasets", {})
    if not isinstance(described, dict) or ("datasets" in entry and not described):
        yield "datasets must be a mapping of names to {files: [...]}"
        return
    known = [one.name for one in fields(Dataset)[2:]]
    for name, facts in described.items():
        if not isinstance(facts, dict):
            yield f"{name} is {facts!r}, must be a mapping with files"
            continue
        for key in facts:
            if key not in known:
                yield f"{name}: unknown key {key!r}{nearest(str(key), known)}"
        if not facts.get("files"):
            yield f"{name}: no files"
        yield from _layout_problem(facts.get("layout"))


def _layout_problem(layout: Any):
    if layout is not None and layout not in LAYOUTS:
        yield f"no layout {layout!r}{nearest(str(layout), LAYOUTS)}; there are {', '.join(LAYOUTS)}"


def is_test(dataset: str) -> bool:
    """Say whether a dataset is one of the test sets."""
    return dataset.endswith(("_test", "_test_turns"))
