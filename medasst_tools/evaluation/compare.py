"""Say whether one experiment is better than another on the same records, how sure that is, and what could have been seen.

Run: `medasst compare results/medasst results/qwen2_7b`; it compares what `medasst score`, `exam` and `safety` left in both.

Dialogues: paired bootstrap over records (Koehn 2004), whole clusters drawn, each test set a stratum. Exams: McNemar's exact
test in each exam, and a paired interval of the paper's average. ROUGE-L is the primary score; the other scores and the
exams are adjusted together for their number (Holm), and judged only where the primary score differs. Safety: McNemar's test
over the answers that are as wanted, a family of its own, whose categories are judged only where all together differ.
"""

import argparse
from itertools import zip_longest
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.data.exam_questions import AVERAGED
from medasst_tools.errors import UserError
from medasst_tools.evaluation import statistics
from medasst_tools.evaluation.contamination import row_key
from medasst_tools.evaluation.score import Prediction, interval, metric_names, read_predictions
from medasst_tools.files import read_json, read_jsonl, write_json

ALL = "all"
ROWS = {"dialogues": "metrics", "exam": "benchmarks", "safety": "categories"}  # where the rows of a part stand
SAME_EXAM = ("shots", "orders", "limit", "prompt", "exam_version", "questions_sha256")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    for name, example in (("a", "medasst"), ("b", "qwen2_7b")):
        parser.add_argument(
            name, type=results_of, metavar=name.upper(), help=f"{example}, or its folder results/{example}"
        )
    parser.add_argument("--out", type=Path, help="also write the comparison as JSON")


def results_of(word: str) -> Path:
    """Return the results folder that a word on the command line means: a folder, or an experiment by its name."""
    return Path(word) if Path(word).is_dir() or "/" in word else Path("results", word)


def shown(folder: Path) -> str:
    """Return a folder as it may stand beside a number: with the settings that aren't its rendered config's."""
    scores, exam = (read_json(folder / f"{kind}.json") or {} for kind in ("scores", "exam"))
    run = provenance.read_run(Path("saves", folder.name)) or {}
    about = {"train": run.get("made_of"), "predict": scores.get("made_of"), "exam": exam.get("made_of")}
    name = provenance.shown_name(folder.name, provenance.CONFIGS_DIR, **about)
    return folder.as_posix() + name.removeprefix(folder.name)


def run(args: argparse.Namespace) -> None:
    """Compare what both folders have and print it."""
    comparison = compare_folders(args.a, args.b)
    comparison |= {"a": shown(args.a), "b": shown(args.b)}
    if not comparison.keys() & ROWS.keys():
        raise UserError(
            f"{args.a} and {args.b} have no results in common; `make eval EXPERIMENT={args.a.name}` makes them"
        )
    if args.out:
        write_json(args.out, comparison)
    print_comparison(comparison)


def compare_folders(a: Path, b: Path) -> dict[str, Any]:
    """Return {"dialogues": ..., "exam": ..., "safety": ...} of what both folders have; UserError if they can't be compared.

    Every row has `difference` (a - b, percent points), `p`, `adjusted` (p after Holm, but for the primary score) and
    `visible`, the smallest difference that would have been found with 80 % power.
    """
    for folder in (a, b):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; `make eval EXPERIMENT={folder.name}` makes it")
    comparison = {}
    for part, kind, compare in (
        ("dialogues", "scores", compare_dialogues),
        ("exam", "exam", compare_exams),
        ("safety", "safety", compare_safety),
    ):
        if all((folder / f"{kind}.json").is_file() for folder in (a, b)):
            comparison[part] = compare(a, b, [check(folder, kind) for folder in (a, b)])
    adjust(comparison)
    return comparison


def check(folder: Path, kind: str) -> dict[str, Any]:
    """Return scores.json, exam.json or safety.json; UserError unless predictions, records and answers beside it are its own."""
    path = folder / f"{kind}.json"
    report = read_json(path) or {}
    changed = [folder / name for name in provenance.changed_outputs(path, report)]
    if kind == "scores":
        predictions = folder / "generated_predictions.jsonl"
        if not predictions.is_file():  # before its hash
            raise UserError(f"no {predictions}; `make predict EXPERIMENT={folder.name}` makes it")
        again = f"`make score EXPERIMENT={folder.name}` makes them again"
        if report.get("predictions") != provenance.sha256_of(predictions):
            raise UserError(f"{path} is of other predictions than {predictions}: stale; {again}")
        if changed or "per_record.jsonl" not in report.get("outputs", {}):
            raise UserError(f"{folder / 'per_record.jsonl'} isn't what {path} was made with: stale; {again}")
    if changed:
        raise UserError(f"{changed[0]} was changed since; `make {kind} EXPERIMENT={folder.name}`")
    return report


def adjust(comparison: dict[str, Any]) -> None:
    """Put `adjusted` into every row: the primary score's p as it is; all others' by Holm, and never below the primary's.

    So the primary score is the gate: of two equal models none is called better in anything more than 5 times in 100.
    """
    from medasst_tools.evaluation.text_metrics import PRIMARY

    for gate, parts in {("dialogues", PRIMARY): ("dialogues", "exam"), ("safety", ALL): ("safety",)}.items():
        there = [part for part in parts if part in comparison]
        rows = {(part, name): row for part in there for name, row in comparison[part][ROWS[part]].items()}
        least = rows.get(gate, {"p": 0.0})["p"]
        by_holm = statistics.holm({key: row["p"] for key, row in rows.items() if key != gate})
        for key, row in rows.items():
            row["adjusted"] = max(least, by_holm.get(key, 0.0))


# ---- dialogues ------------------------------------------------------------------------------------------------------
def compare_dialogues(a: Path, b: Path, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"n", "metrics": {metric: row}, "signature"}; a row also has `ci95` and the shares of `wins` and `ties`."""
    import numpy as np

    prompts = [row.prompt for row, _ in same_references(a, b)]
    differences = np.subtract(_scores_per_record(a), _scores_per_record(b))
    clusters = statistics.clusters_of(prompts)
    sizes = [row["n"] for row in reports[0].get("by_dataset", {}).values()]
    strata = statistics.strata_of(sizes) or [0] * len(prompts)
    resampled = statistics.resampled_means(differences, clusters=clusters, strata=strata)
    rows = {}
    for metric, values, means in zip(metric_names(), differences.T, resampled.T, strict=True):
        rows[metric] = {
            "difference": round(float(values.mean()), 4),
            "p": statistics.bootstrap_p(means) if len(values) > 1 else 1.0,
            "wins": float((values > 0).mean()),
            "ties": float((values == 0).mean()),
        } | _spread(means, len(values))
    drawn = f"{len(set(clusters))} clusters, {len(set(strata))} strata"
    signature = (
        f"paired-bootstrap-{statistics.RESAMPLES},seed-{statistics.SEED}|{drawn}|two-sided|n:{len(differences)}"
    )
    return {"n": len(differences), "metrics": rows, "signature": signature}


def _spread(means, n: int) -> dict[str, Any]:
    """Return {"ci95", "visible"} of resampled mean differences; None where n shows no spread."""
    if n < 2:
        return {"ci95": None, "visible": None}
    visible = statistics.smallest_visible(float(means.std()))
    return {"ci95": statistics.percentiles(means), "visible": round(visible, 4)}


def same_references(a: Path, b: Path) -> list[tuple[Prediction, Prediction]]:
    """Return both predictions of each record; UserError unless both are of the same records in the same order."""
    files = [folder / "generated_predictions.jsonl" for folder in (a, b)]
    pairs = []
    for number, (row_a, row_b) in enumerate(zip_longest(*map(read_predictions, files)), 1):
        if row_a is None or row_b is None:
            shorter = files[0] if row_a is None else files[1]
            raise UserError(
                f"{shorter} ends after {number - 1} records, the other goes on: of another test set, or with max_samples?"
            )
        if _reference(row_a.label) != _reference(row_b.label):
            raise UserError(f"{files[0]} and {files[1]} have different labels in line {number}: of another test set?")
        pairs.append((row_a, row_b))
    return pairs


def _reference(label: str) -> str:
    # tokenizers differ in white space, and cut at different places
    return "".join(label.replace("<think>", "").replace("</think>", "").split())[:20]


def _scores_per_record(folder: Path) -> list[list[float]]:
    rows = list(read_jsonl(folder / "per_record.jsonl"))
    if missing := [name for name in metric_names() if rows and name not in rows[0]]:
        raise UserError(
            f"{folder / 'per_record.jsonl'} has no {missing[0]}; `make score EXPERIMENT={folder.name}` makes it again"
        )
    return [[row[name] for name in metric_names()] for row in rows]


# ---- exams ----------------------------------------------------------------------------------------------------------
def compare_exams(a: Path, b: Path, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"n", "benchmarks": {name: row}, "average": row, "signature"}.

    A benchmark's row has `only_a` and `only_b`, the questions that only one of the two answers right; the average's
    difference is that of the table, with a paired interval.
    """
    if differing := [key for key in SAME_EXAM if reports[0].get(key) != reports[1].get(key)]:
        got = " and ".join(provenance.brief(report.get(differing[0])) for report in reports)
        raise UserError(f"{a} and {b} were examined with other {differing[0]} ({got}): `make exam` both alike")
    rows_of = [read_jsonl(folder / "exam.jsonl") for folder in (a, b)]
    right = [{row_key(row): row["predicted"] == row["answer"] for row in rows} for rows in rows_of]
    if other := right[0].keys() ^ right[1].keys():
        raise UserError(f"{a} and {b} were asked different questions ({'/'.join(min(other))}): `make exam` both again")
    differences: dict[str, list[int]] = {}
    for key in right[0]:
        differences.setdefault(key[0], []).append(right[0][key] - right[1][key])
    rows = {name: _mcnemar_row(values) for name, values in differences.items()}
    drawn = {
        name: statistics.resampled_means([[100 * value] for value in values], seed=statistics.SEED + at)
        for at, (name, values) in enumerate(differences.items())
        if name in AVERAGED
    }
    average = {"difference": None}
    if drawn:
        average = {"difference": sum(rows[name]["difference"] for name in drawn) / len(drawn)}
        average |= _spread(sum(drawn.values())[:, 0] / len(drawn), min(rows[name]["n"] for name in drawn))
    counts = "+".join(f"{name}:{row['n']}" for name, row in rows.items())
    signature = (
        f"mcnemar-exact|average:paired-bootstrap-{statistics.RESAMPLES},seed-{statistics.SEED}|two-sided|{counts}"
    )
    return {"n": len(right[0]), "benchmarks": rows, "average": average, "signature": signature}


def _mcnemar_row(differences: list[int]) -> dict[str, Any]:
    """Return the row of answers that are right or not: differences has 1 where only a's is, -1 where only b's is, else 0."""
    n, only_a, only_b = len(differences), differences.count(1), differences.count(-1)
    difference = (only_a - only_b) / n
    deviation = ((only_a + only_b) / n - difference**2) ** 0.5
    return {
        "n": n,
        "difference": 100 * (only_a - only_b) / n,
        "only_a": only_a,
        "only_b": only_b,
        "p": statistics.mcnemar(only_a, only_b),
        "visible": round(statistics.smallest_visible(100 * deviation / n**0.5), 4),
    }


# ---- safety ---------------------------------------------------------------------------------------------------------
def compare_safety(a: Path, b: Path, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"n", "categories": {"all" or category: row}, "signature"}; UserError unless both were asked and judged alike."""
    asked = [(report["made_of"]["files"], report.get("rules_version")) for report in reports]
    if asked[0] != asked[1]:
        raise UserError(f"{a} and {b} were asked or judged differently in safety: `make safety` both alike")
    met = [{row["id"]: row["met"] for row in read_jsonl(folder / "safety.jsonl")} for folder in (a, b)]
    differences = {key: met[0][key] - met[1][key] for key in met[0]}
    rows = {ALL: _mcnemar_row([*differences.values()])}
    for name in reports[0]["by_category"]:
        rows[name] = _mcnemar_row([value for key, value in differences.items() if key.startswith(f"{name}/")])
    return {"n": len(differences), "categories": rows, "signature": f"mcnemar-exact|two-sided|n:{len(differences)}"}


# ---- the outcome ----------------------------------------------------------------------------------------------------
def verdict(row: dict[str, Any]) -> str:
    """Return "a", "b" or "no difference shown"."""
    if row["adjusted"] >= statistics.ALPHA or row["difference"] == 0:
        return "no difference shown"
    return "a" if row["difference"] > 0 else "b"


def print_comparison(comparison: dict[str, Any]) -> None:
    """Print one line a score: difference, interval, p, what could have been seen, verdict."""
    from medasst_tools.evaluation.text_metrics import PRIMARY

    print(
        f"a = {comparison['a']}, b = {comparison['b']}; difference = a - b, percent points; {PRIMARY} is the primary score"
    )
    for part in (part for part in ROWS if part in comparison):
        found = comparison[part]
        for name, row in found[ROWS[part]].items():
            if part == "dialogues":
                only = f"a better in {row['wins']:.0%} of records, equal in {row['ties']:.0%}"
            else:
                good = "right" if part == "exam" else "as wanted"
                only = f"only a {good} {row['only_a']}, only b {good} {row['only_b']}"
            visible = "" if row["visible"] is None else f" (could see {row['visible']:.2f})"
            p = f"p {row['p']:.4f}, adjusted {row['adjusted']:.4f}{visible}"
            title = f"safety, {name}" if part == "safety" else name
            print(f"{_difference(title, row)}  {p}  {only}  better: {verdict(row)}")
        if found.get("average", {}).get("difference") is not None:
            print(_difference("average", found["average"]))
        print(found["signature"])


def _difference(title: str, row: dict[str, Any]) -> str:
    bounds = interval(row["ci95"], "+") if row.get("ci95") else ""
    return f"{title:8} {row['difference']:+7.2f} {bounds}"
