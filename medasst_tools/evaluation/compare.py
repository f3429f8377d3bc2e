"""Say whether one experiment is better than another on the same records, and how sure that is.

Run: `medasst compare results/medasst results/qwen2_7b`; it compares what `medasst score` and `medasst exam` left in both.

Dialogues: paired bootstrap over records (Koehn 2004). Exams: McNemar's exact test over the questions that one of the two
answers and the other doesn't.
"""

import argparse
from itertools import zip_longest
from pathlib import Path
from typing import Any

import orjson

from medasst_tools.errors import UserError
from medasst_tools.files import read_jsonl, sha256_of, write_json

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
SIGNIFICANT = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("a", type=Path, metavar="A", help="results folder of one experiment: results/medasst")
    parser.add_argument("b", type=Path, metavar="B", help="results folder of the other: results/qwen2_7b")
    parser.add_argument("--out", type=Path, help="also write the comparison as JSON")


def run(args: argparse.Namespace) -> None:
    """Compare what both folders have and print it."""
    comparison = {"a": args.a.as_posix(), "b": args.b.as_posix()} | compare_folders(args.a, args.b)
    if "dialogues" not in comparison and "exam" not in comparison:
        raise UserError(
            f"{args.a} and {args.b} have no results in common; `make eval EXPERIMENT={args.a.name}` makes them"
        )
    if args.out:
        write_json(args.out, comparison)
    print_comparison(comparison)


def compare_folders(a: Path, b: Path) -> dict[str, Any]:
    """Return {"dialogues": ..., "exam": ...} of what both folders have; UserError if they can't be compared."""
    for folder in (a, b):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; `make eval EXPERIMENT={folder.name}` makes it")
    comparison = {}
    if all((folder / "per_record.jsonl").is_file() for folder in (a, b)):
        comparison["dialogues"] = compare_dialogues(a, b)
    if all((folder / "exam.jsonl").is_file() for folder in (a, b)):
        comparison["exam"] = compare_exams(a, b)
    return comparison


def compare_dialogues(a: Path, b: Path) -> dict[str, Any]:
    """Return, for each metric, the difference of means (a - b, percent points), its interval, p-value and shares of wins."""
    import numpy as np

    from medasst_tools.evaluation.statistics import RESAMPLES, SEED, resampled_means

    check_same_references(a, b)
    tables = [_scores_per_record(folder) for folder in (a, b)]
    if len(tables[0]) != len(tables[1]):
        raise UserError(f"{a} has {len(tables[0])} scored records and {b} {len(tables[1])}: score both again")
    differences = tables[0] - tables[1]
    resampled = resampled_means(differences)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    report: dict[str, Any] = {"n": len(differences)}
    for column, metric in enumerate(METRICS):
        difference, means = differences[:, column], resampled[:, column]
        report[metric] = {
            "difference": round(float(difference.mean()), 4),
            "ci95": [round(float(low[column]), 4), round(float(high[column]), 4)],
            "p": bootstrap_p(means),
            "wins": float((difference > 0).mean()),
            "ties": float((difference == 0).mean()),
            "resamples_won": float((means > 0).mean()),
        }
    report["signature"] = f"paired-bootstrap-{RESAMPLES},seed-{SEED}|two-sided|n:{len(differences)}"
    return report


def bootstrap_p(resampled_differences) -> float:
    """Return the two-sided p-value that the mean difference isn't zero; never 0, which no resampling can show."""
    count = len(resampled_differences)
    tail = min((resampled_differences <= 0).sum(), (resampled_differences >= 0).sum())
    return min(1.0, 2 * (int(tail) + 1) / (count + 1))


def check_same_references(a: Path, b: Path) -> None:
    """Raise UserError unless both predicted the same records in the same order, and were scored since."""
    files = [folder / "generated_predictions.jsonl" for folder in (a, b)]
    for file in files:
        if not file.is_file():
            raise UserError(f"no {file}; `make predict EXPERIMENT={file.parent.name}` makes it")
        scores = file.with_name("scores.json")
        scored = orjson.loads(scores.read_bytes())["predictions"]["sha256"] if scores.is_file() else None
        if scored != sha256_of(file):
            raise UserError(f"{file} isn't what {scores} was made of; run `medasst score` again")
    for number, (record_a, record_b) in enumerate(zip_longest(*map(read_jsonl, files)), 1):
        if record_a is None or record_b is None:
            shorter = files[0] if record_a is None else files[1]
            raise UserError(f"{shorter} ends after {number - 1} records, the other goes on: of another test set?")
        if _reference(record_a) != _reference(record_b):
            raise UserError(f"{files[0]} and {files[1]} have different labels in line {number}: of another test set?")


def _reference(record: dict[str, str]) -> str:
    # tokenizers differ in white space, and cut at different places
    return "".join(record["label"].split())[:20]


def _scores_per_record(folder: Path):
    import numpy as np

    return np.array([[record[metric] for metric in METRICS] for record in read_jsonl(folder / "per_record.jsonl")])


def compare_exams(a: Path, b: Path) -> dict[str, Any]:
    """Return the questions that only one of the two answers right, and McNemar's exact two-sided p-value."""
    from scipy.stats import binomtest

    answers = [_right_answers(folder) for folder in (a, b)]
    if answers[0].keys() != answers[1].keys():
        missing = sorted(answers[0].keys() ^ answers[1].keys())[0]
        raise UserError(f"{a} and {b} were asked different questions ({'/'.join(missing)}): `make exam` both again")
    only_a = sum(right and not answers[1][key] for key, right in answers[0].items())
    only_b = sum(right and not answers[0][key] for key, right in answers[1].items())
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return {
        "n": len(answers[0]),
        "difference": round(100 * (only_a - only_b) / len(answers[0]), 4),
        "only_a": only_a,
        "only_b": only_b,
        "p": float(p),
        "signature": f"mcnemar-exact|two-sided|n:{len(answers[0])}",
    }


def _right_answers(folder: Path) -> dict[tuple[str, str, str], bool]:
    return {
        (row["benchmark"], row["subject"], row["id"]): row["predicted"] == row["answer"]
        for row in read_jsonl(folder / "exam.jsonl")
    }


def verdict(difference: float, p: float) -> str:
    """Return "a", "b" or "no difference shown"."""
    if p >= SIGNIFICANT:
        return "no difference shown"
    return "a" if difference > 0 else "b"


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print one line a metric: difference, interval, p-value, shares of records won, verdict."""
    print(f"a = {comparison['a']}, b = {comparison['b']}; difference = a - b, percent points")
    if dialogues := comparison.get("dialogues"):
        for metric in METRICS:
            row = dialogues[metric]
            low, high = row["ci95"]
            print(
                f"{metric:8} {row['difference']:+7.2f} [{low:+.2f}, {high:+.2f}]  p {row['p']:.4f}  a better in "
                f"{row['wins']:.0%} of records, equal in {row['ties']:.0%}  better: {verdict(row['difference'], row['p'])}"
            )
        print(dialogues["signature"])
    if exam := comparison.get("exam"):
        print(
            f"exam     {exam['difference']:+7.2f}  p {exam['p']:.4f}  only a right {exam['only_a']}, only b right "
            f"{exam['only_b']}  better: {verdict(exam['difference'], exam['p'])}\n{exam['signature']}"
        )
