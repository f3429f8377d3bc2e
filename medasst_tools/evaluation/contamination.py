"""Split an exam's scores by what is known of its questions: whether training has them, or labels of one's own.

What training has is `medasst audit`'s list, and counts only if that audit saw the very files that the model was trained on.
"""

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.config import read_yaml
from medasst_tools.data.exam_questions import Question, Subject
from medasst_tools.errors import UserError
from medasst_tools.evaluation.statistics import newcombe, rate
from medasst_tools.files import read_json, read_jsonl

Key = tuple[str, str, str]  # benchmark, subject, id
CLEAN = "clean"
LABELS = {"exact": "exact", "normalised": "exact", "near": "near"}  # the audit's kinds of copies
row_key = itemgetter("benchmark", "subject", "id")  # of a row of exam.jsonl, the same as key_of of its question
LABEL_KEYS = {"benchmark": str, "subject": str, "id": (str, int), "label": (str, int)}


def key_of(question: Question) -> Key:
    """Return what names a question."""
    return question.benchmark, question.subject, question.id


def audit_file(chat_config: Path) -> Path | None:
    """Return the file that `make audit` made of an experiment's data; None if there is none, or no experiment."""
    predict = chat_config.with_name("predict.yaml")
    audit = Path(read_yaml(predict)["dataset_dir"]) / "audit.json" if predict.is_file() else None
    return audit if audit and audit.is_file() else None


def trained_on(config: dict[str, Any]) -> set[tuple[str, str]]:
    """Return (dataset, sha256) of what the config's adapters, without any its model, were trained on, as the ledger knows it.

    The base's own training isn't looked at: of a released one it isn't known.
    """
    folders = str(config.get("adapter_name_or_path") or config["model_name_or_path"]).split(",")
    runs = (provenance.read_run(Path(folder)) for folder in folders)
    return {pair for run in runs if run for pair in run["made_of"]["files"].items()}


def of_training(config: dict[str, Any], audit: Path | None, subjects: list[Subject]) -> dict[Key, str]:
    """Return the label of every question: "exact" or "near" copy in training, or "clean". UserError says why nothing is known."""
    trained = trained_on(config)
    if not trained:
        raise UserError("no run.json says what the model was trained on")
    again = "`make audit`, then `make exam`"
    if audit is None or (found := read_json(audit)) is None:
        raise UserError(f"no audit of the training data; {again}")
    if list(provenance.changed_outputs(audit, found)):
        raise UserError(f"overlap.jsonl isn't what {audit} says; {again}")
    looked_at = found["made_of"]["files"]
    if outside := sorted(name for name, _ in trained if name not in looked_at):
        raise UserError(f"the model was trained on {outside[0]}, which {audit} doesn't cover")
    if others := sorted(name for name, sha in trained if looked_at[name] != sha):
        raise UserError(f"{audit} is of another {others[0]} than the model was trained on; {again}")
    by_benchmark = groupby(subjects, key=attrgetter("benchmark"))
    questions = {name: [one for subject in group for one in subject.questions] for name, group in by_benchmark}
    stems = {name: [question.text for question in members] for name, members in questions.items()}
    if looked_at.get("exams") != provenance.short(stems):
        raise UserError(f"{audit} looked for no or other exam questions; {again}")
    labels = {key_of(question): CLEAN for members in questions.values() for question in members}
    datasets = {name for name, _ in trained}
    for row in read_jsonl(audit.with_name("overlap.jsonl")):
        if row["dataset"] in datasets and row["test_set"] in questions:
            key, label = key_of(questions[row["test_set"]][row["test_line"] - 1]), LABELS[row["kind"]]
            labels[key] = min(label, labels[key], key=["exact", "near", CLEAN].index)
    return labels


def read_labels(path: Path, subjects: list[Subject]) -> dict[Key, str]:
    """Return the labels of a file with a JSON object a line (LABEL_KEYS); UserError names what can't be one."""
    known = {key_of(question) for subject in subjects for question in subject.questions}
    labels: dict[Key, str] = {}
    if not path.is_file():
        raise UserError(f"no labels file {path}")
    for row in read_jsonl(path, LABEL_KEYS, "mend it"):
        benchmark, subject, name, label = (str(row[key]) for key in LABEL_KEYS)
        key = benchmark, subject, name
        if key not in known or key in labels:
            raise UserError(
                f"{path}: {'/'.join(key)} {'stands twice' if key in labels else 'is no question of the exams here'}"
            )
        labels[key] = label
    if not labels:
        raise UserError(f"{path} is empty; a line is a JSON object with {', '.join(LABEL_KEYS)}")
    return labels


def split(rows: Iterable[dict[str, Any]], labels: dict[Key, str]) -> dict[str, dict[str, Any]]:
    """Return {benchmark: {label: its share of right answers}}; questions without a label are left out.

    Each label but "clean" (where there's none, the file's first) has its `difference` from that in percent points, with
    Newcombe's interval.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        if label := labels.get(row_key(row)):
            groups = right.setdefault(row["benchmark"], {})
            groups.setdefault(label, []).append(row["predicted"] == row["answer"])
    base = CLEAN if CLEAN in labels.values() else next(iter(labels.values()))
    return {benchmark: _compared(groups, base) for benchmark, groups in right.items()}


def _compared(groups: dict[str, list[bool]], base: str) -> dict[str, Any]:
    rates = {label: rate(groups[label]) for label in sorted(groups, key=lambda label: (label != base, label))}
    for label, row in rates.items():
        if label != base and base in rates:
            row["difference"] = row["percent"] - rates[base]["percent"]
            row["difference_ci95"] = newcombe(row["count"], row["n"], rates[base]["count"], rates[base]["n"])
    return rates
