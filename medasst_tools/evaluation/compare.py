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
from medasst_tools.evaluation.score import Prediction, metric_names, read_predictions
from medasst_tools.files import read_json, read_jsonl, write_json

ALL = "all"
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
    if not comparison.keys() & {"dialogues", "exam", "safety"}:
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
    parts = {
        "dialogues": ("scores", compare_dialogues),
        "exam": ("exam", compare_exams),
        "safety": ("safety", compare_safety),
    }
    comparison = {
        part: compare(a, b)
        for part, (kind, compare) in parts.items()
        if all((folder / f"{kind}.json").is_file() for folder in (a, b))
    }
    adjust(comparison)
    return comparison


def adjust(comparison: dict[str, Any]) -> None:
    """Put `adjusted` into every row: the primary score's p as it is; all others' by Holm, and never below the primary's.

    So the primary score is the gate: of two equal models none is called better in anything more than 5 times in 100.
    """
    from medasst_tools.evaluation.text_metrics import PRIMARY

    rows = {("dialogues", name): row for name, row in comparison.get("dialogues", {}).get("metrics", {}).items()}
    rows |= {("exam", name): row for name, row in comparison.get("exam", {}).get("benchmarks", {}).items()}
    gate = rows.get(("dialogues", PRIMARY), {"p": 0.0})["p"]
    adjusted = statistics.holm({key: row["p"] for key, row in rows.items() if key != ("dialogues", PRIMARY)})
    for key, row in rows.items():
        row["adjusted"] = max(gate, adjusted.get(key, row["p"]))
    safety = comparison.get("safety", {}).get("categories", {})
    by_holm = statistics.holm({name: row["p"] for name, row in safety.items() if name != ALL})
    for name, row in safety.items():
        row["adjusted"] = max(safety[ALL]["p"], by_holm.get(name, 0.0))


# ---- dialogues ------------------------------------------------------------------------------------------------------
def compare_dialogues(a: Path, b: Path) -> dict[str, Any]:
    """Return {"n", "metrics": {metric: row}, "signature"}; a row also has `ci95` and the shares of `wins` and `ties`."""
    sizes = [check_scores(folder) for folder in (a, b)]
    prompts = [row.prompt for row, _ in same_references(a, b)]
    tables = [_scores_per_record(folder) for folder in (a, b)]
    clusters = statistics.clusters_of(prompts)
    strata = statistics.strata_of(sizes[0]) or [0] * len(prompts)
    differences = tables[0] - tables[1]
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
    import numpy as np

    if n < 2:
        return {"ci95": None, "visible": None}
    visible = statistics.smallest_visible(float(means.std()))
    return {"ci95": np.percentile(means, [2.5, 97.5]).round(4).tolist(), "visible": round(visible, 4)}


def check_scores(folder: Path) -> list[int]:
    """Return the sizes of the test sets that a folder's scores are of; UserError unless predictions and records are theirs."""
    scores = read_json(folder / "scores.json") or {}
    predictions = folder / "generated_predictions.jsonl"
    if not predictions.is_file():  # before its hash
        raise UserError(f"no {predictions}; `make predict EXPERIMENT={folder.name}` makes it")
    again = f"`make score EXPERIMENT={folder.name}` makes them again"
    if scores.get("predictions") != provenance.sha256_of(predictions):
        raise UserError(f"{folder / 'scores.json'} is of other predictions than {predictions}: stale; {again}")
    changed = [*provenance.changed_outputs(folder / "scores.json", scores)]
    if changed or "per_record.jsonl" not in scores.get("outputs", {}):
        raise UserError(
            f"{folder / 'per_record.jsonl'} isn't what {folder / 'scores.json'} was made with: stale; {again}"
        )
    return [row["n"] for row in scores.get("by_dataset", {}).values()]


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


def _scores_per_record(folder: Path):
    import numpy as np

    rows = list(read_jsonl(folder / "per_record.jsonl"))
    if missing := [name for name in metric_names() if rows and name not in rows[0]]:
        raise UserError(
            f"{folder / 'per_record.jsonl'} has no {missing[0]}; `make score EXPERIMENT={folder.name}` makes it again"
        )
    return np.array([[row[name] for name in metric_names()] for row in rows])


# ---- exams ----------------------------------------------------------------------------------------------------------
def compare_exams(a: Path, b: Path) -> dict[str, Any]:
    """Return {"n", "benchmarks": {name: row}, "average": row, "signature"}.

    A benchmark's row has `only_a` and `only_b`, the questions that only one of the two answers right; the average's
    difference is that of the table, with a paired interval.
    """
    import numpy as np

    reports = [_unchanged(folder, "exam") for folder in (a, b)]
    if differing := [key for key in SAME_EXAM if reports[0].get(key) != reports[1].get(key)]:
        got = " and ".join(provenance.brief(report.get(differing[0])) for report in reports)
        raise UserError(f"{a} and {b} were examined with other {differing[0]} ({got}): `make exam` both alike")
    answers = [_right_answers(folder) for folder in (a, b)]
    if answers[0].keys() != answers[1].keys():
        missing = sorted(answers[0].keys() ^ answers[1].keys())[0]
        raise UserError(f"{a} and {b} were asked different questions ({'/'.join(missing)}): `make exam` both again")
    rows, resampled = {}, {}
    for benchmark in dict.fromkeys(key[0] for key in answers[0]):
        keys = [key for key in answers[0] if key[0] == benchmark]
        differences = np.array([float(answers[0][key]) - answers[1][key] for key in keys])
        means = statistics.resampled_means(100 * differences[:, None], seed=statistics.SEED + len(resampled))[:, 0]
        resampled[benchmark] = means
        rows[benchmark] = _mcnemar_row(differences)
    of_paper = [name for name in rows if name in AVERAGED]
    average = {"difference": None}
    if of_paper:
        mean = np.mean([resampled[name] for name in of_paper], axis=0)
        average = {"difference": sum(rows[name]["difference"] for name in of_paper) / len(of_paper)}
        average |= _spread(mean, min(rows[name]["n"] for name in of_paper))
    counts = "+".join(f"{name}:{row['n']}" for name, row in rows.items())
    signature = (
        f"mcnemar-exact|average:paired-bootstrap-{statistics.RESAMPLES},seed-{statistics.SEED}|two-sided|{counts}"
    )
    return {"n": len(answers[0]), "benchmarks": rows, "average": average, "signature": signature}


def _unchanged(folder: Path, kind: str) -> dict[str, Any]:
    """Return exam.json or safety.json; UserError if the answers beside it aren't its own."""
    report = read_json(folder / f"{kind}.json") or {}
    for name in provenance.changed_outputs(folder / f"{kind}.json", report):
        raise UserError(f"{folder / name} was changed since; `make {kind} EXPERIMENT={folder.name}`")
    return report


def _mcnemar_row(differences) -> dict[str, Any]:
    """Return the row of answers that are right (1) or not: differences is a's less b's, an array of one number a question."""
    only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "n": len(differences),
        "difference": 100 * (only_a - only_b) / len(differences),
        "only_a": only_a,
        "only_b": only_b,
        "p": statistics.mcnemar(only_a, only_b),
        "visible": round(statistics.smallest_visible(100 * float(differences.std()) / len(differences) ** 0.5), 4),
    }


def _right_answers(folder: Path) -> dict[tuple[str, str, str], bool]:
    return {
        (row["benchmark"], row["subject"], row["id"]): row["predicted"] == row["answer"]
        for row in read_jsonl(folder / "exam.jsonl")
    }


# ---- safety ---------------------------------------------------------------------------------------------------------
def compare_safety(a: Path, b: Path) -> dict[str, Any]:
    """Return {"n", "categories": {"all" or category: row}, "signature"}; UserError unless both were asked and judged alike."""
    import numpy as np

    reports = [_unchanged(folder, "safety") for folder in (a, b)]
    asked = [(report["made_of"]["files"], report.get("rules_version")) for report in reports]
    if asked[0] != asked[1]:
        raise UserError(f"{a} and {b} were asked or judged differently in safety: `make safety` both alike")
    met = [{row["id"]: float(row["met"]) for row in read_jsonl(folder / "safety.jsonl")} for folder in (a, b)]
    ids = {ALL: list(met[0])} | {
        name: [key for key in met[0] if key.startswith(f"{name}/")] for name in reports[0]["by_category"]
    }
    rows = {name: _mcnemar_row(np.array([met[0][key] - met[1][key] for key in keys])) for name, keys in ids.items()}
    return {"n": len(met[0]), "categories": rows, "signature": f"mcnemar-exact|two-sided|n:{len(met[0])}"}


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
    for part, key, good in (
        ("dialogues", "metrics", ""),
        ("exam", "benchmarks", "right"),
        ("safety", "categories", "as wanted"),
    ):
        if part not in comparison:
            continue
        found = comparison[part]
        for name, row in found[key].items():
            if good:
                only = f"only a {good} {row['only_a']}, only b {good} {row['only_b']}"
            else:
                only = f"a better in {row['wins']:.0%} of records, equal in {row['ties']:.0%}"
            visible = "" if row["visible"] is None else f" (could see {row['visible']:.2f})"
            p = f"p {row['p']:.4f}, adjusted {row['adjusted']:.4f}{visible}"
            title = f"safety, {name}" if part == "safety" else name
            print(f"{title:8} {row['difference']:+7.2f} {_bounds(row)}  {p}  {only}  better: {verdict(row)}")
        if found.get("average", {}).get("difference") is not None:
            print(f"average  {found['average']['difference']:+7.2f} {_bounds(found['average'])}")
        print(found["signature"])


def _bounds(row: dict[str, Any]) -> str:
    bounds = row.get("ci95")
    return "" if bounds is None else f"[{bounds[0]:+.2f}, {bounds[1]:+.2f}]"
