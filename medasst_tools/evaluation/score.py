"""Score LLaMA-Factory's generated_predictions.jsonl: every metric of the table with its interval, and a signature.

Run: `medasst score results/demo/generated_predictions.jsonl --out results/demo/scores.json --per-record
results/demo/per_record.jsonl`

Beside predictions of `medasst predict` lies what they were made of, so each record's test set is known.
"""

import argparse
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools import __version__, provenance
from medasst_tools.errors import UserError
from medasst_tools.evaluation import statistics
from medasst_tools.files import read_jsonl, sha256_of, write_json, write_jsonl

CHUNK = 64  # records that a worker takes at once
PACKAGES = ("nltk", "rouge-chinese", "jieba", "rjieba")
RECORD = "predictions.json"
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")  # a reasoning model's template (qwen3) opens labels with it
LAST_TURN = 4  # described together with all later ones


class Prediction(NamedTuple):
    """One line of the predictions."""

    prompt: str
    predict: str
    label: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("predictions", type=Path, help="generated_predictions.jsonl: prompt, predict, label")
    parser.add_argument("--out", type=Path, required=True, help="scores.json to write")
    parser.add_argument("--per-record", type=Path, help="also write the metrics of each record, one a line")
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")


def run(args: argparse.Namespace) -> None:
    """Score the file and write what was asked for."""
    predictions = list(read_predictions(args.predictions))
    origin = origin_of(args.predictions)
    about = made_of(args.predictions, origin)
    there = args.per_record is None or args.per_record.is_file()
    if there and provenance.up_to_date(args.out, about):
        return
    sizes = origin["datasets"] if origin else {}
    rows = list(score_all(predictions, args.workers))
    outputs = [args.per_record] if args.per_record else []
    for path in outputs:
        write_jsonl(path, (dict(zip(metric_names(), row, strict=True)) for row in rows))
    report = summarise(predictions, rows, sizes) | descriptions(predictions, sizes)
    report |= {"signature": signature(report["n"]), "predictions": about["files"]["predictions"]}
    write_json(args.out, report | provenance.record(args.out, about, outputs))
    name = provenance.shown_name(args.predictions.parent.name, predict=origin and origin["made_of"])
    print_summary(name, args.out, report)


def origin_of(predictions: Path) -> dict[str, Any] | None:
    """Return the record of `medasst predict` beside the predictions; None, and a line, if they aren't what it says."""
    path = predictions.with_name(RECORD)
    found = provenance.read_json(path)
    if found and predictions.name in provenance.changed_outputs(path, found):
        print(f"{predictions} isn't what {path} says: predicted otherwise since; its model is unknown")
        return None
    return found


def made_of(predictions: Path, origin: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the scores depend on: the predictions, what those were made of, and the code of the metrics."""
    code = {"medasst evaluation": provenance.code_sha256("evaluation")}
    made = origin["made_of"] if origin else {}
    versions = provenance.package_versions(*PACKAGES) | code
    files = {"predictions": sha256_of(predictions)} | made.get("files", {})
    return provenance.made_of(made.get("settings"), files, made.get("model"), versions)


def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield each line; UserError names a line that isn't one, or a file that is empty or isn't there."""
    if not path.is_file():
        raise UserError(f"no {path}; `make predict EXPERIMENT={path.parent.name}` makes it")
    found = False
    for found in read_jsonl(path, {"predict": str, "label": str}, "`make predict` goes on if it was cut short"):
        yield Prediction(str(found.get("prompt", "")), found["predict"], found["label"])
    if not found:
        raise UserError(f"{path} is empty; predict again")


# ---- scoring --------------------------------------------------------------------------------------------------------
def score_all(predictions: list[Prediction], workers: int) -> Iterator[tuple[float, ...]]:
    """Yield the metrics of each record, in order."""
    from tqdm import tqdm

    from medasst_tools.evaluation.text_metrics import score_pair

    prepare()  # before a fork, so that the dictionary is loaded once
    texts = [row.predict for row in predictions], [row.label for row in predictions]
    with ProcessPoolExecutor(workers, initializer=prepare) as pool:
        scored = map(score_pair, *texts) if workers == 1 else pool.map(score_pair, *texts, chunksize=CHUNK)
        yield from tqdm(scored, total=len(predictions), desc="score", unit="record", disable=None)


def prepare() -> None:
    """Load the dictionaries, once a process."""
    from medasst_tools.evaluation.word_segmenter import jieba, spaced_words

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    spaced_words("好")  # the port loads its dictionary with the first text


def metric_names() -> tuple[str, ...]:
    """Return the names of the metrics, in the table's order."""
    from medasst_tools.evaluation.text_metrics import METRICS

    return tuple(METRICS)


# ---- the outcome ----------------------------------------------------------------------------------------------------
def summarise(predictions: list[Prediction], rows: list[tuple[float, ...]], sizes: dict[str, int]) -> dict[str, Any]:
    """Return scores.json's numbers: over all records, and by dataset where their sizes are known."""
    columns = predictions, rows, statistics.clusters_of([row.prompt for row in predictions])
    report = _means(*columns, strata=statistics.strata_of(sizes.values()) or None)
    if sizes:
        parts = {name: [column[part] for column in columns] for name, part in test_sets(sizes).items()}
        report["by_dataset"] = {name: _means(*part) for name, part in parts.items()}
    return report


def test_sets(sizes: dict[str, int]) -> dict[str, slice]:
    """Return {test set: its part of the records}."""
    ends = list(itertools.accumulate(sizes.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _means(predictions, rows, clusters, strata=None) -> dict[str, Any]:
    import numpy as np

    names, table = metric_names(), np.array(rows, dtype=float).reshape(-1, len(metric_names()))
    report: dict[str, Any] = {"n": len(rows)} | dict(zip(names, table.mean(axis=0).tolist(), strict=True))
    report["ci95"] = dict(zip(names, statistics.ci95(table, clusters=clusters, strata=strata), strict=True))
    report["clusters"] = len(set(clusters))
    report["empty"] = sum(not row.predict.strip() for row in predictions)
    report["empty_thoughts"] = sum(bool(EMPTY_THOUGHT.match(row.label)) for row in predictions)
    return report


def descriptions(predictions: list[Prediction], sizes: dict[str, int]) -> dict[str, Any]:
    """Return {"descriptions": {part: {"n", description: its mean, None of nothing}}, "descriptions_signature"}."""
    from medasst_tools.evaluation.text_metrics import DESCRIPTIONS, chrf_scorer

    columns = {name: [function(*row) for row in predictions] for name, function in DESCRIPTIONS.items()}
    means = {
        part: {"n": len(places)} | {name: _mean(column[at] for at in places) for name, column in columns.items()}
        for part, places in parts(predictions, sizes).items()
    }
    said = f"chrf:{chrf_scorer().get_signature()}|means-over-records|n:{len(predictions)}"
    return {"descriptions": means, "descriptions_signature": said}


def parts(predictions: list[Prediction], sizes: dict[str, int]) -> dict[str, list[int]]:
    """Return what is described: {part: its records' places}.

    Parts are "all", each test set and, where a set asks dialogues turn by turn (cmtmedqa_test_turns), each turn. Where some
    references only take leave, their records are a part, and the set's other parts are without them.
    """
    from medasst_tools.evaluation.text_metrics import is_farewell

    found: dict[str, list[int]] = {"all": list(range(len(predictions)))}
    for name, part in test_sets(sizes).items():
        found[name], turn, before, kinds = found["all"][part], 0, "", {}
        for at in found[name]:
            prompt = predictions[at].prompt
            # a prompt that cutoff_len cuts is the one before
            turn = turn + 1 if statistics.goes_on(prompt, before) else turn if prompt == before else 1
            numbered = f"turn {turn}" if turn < LAST_TURN else f"turn {LAST_TURN}+"
            kinds.setdefault("farewells" if is_farewell(predictions[at].label) else numbered, []).append(at)
            before = prompt
        if "turn 2" not in kinds and "turn 1" in kinds:
            kinds["others"] = kinds.pop("turn 1")
        if len(kinds) > 1:
            found |= {f"{name}, {kind}": kinds[kind] for kind in sorted(kinds, reverse=True)}
    return found


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def signature(n: int) -> str:
    """Return what it takes to get the same numbers again."""
    versions = "|".join(f"{name}:{version}" for name, version in provenance.package_versions(*PACKAGES).items())
    factory = provenance.package_versions("llamafactory")["llamafactory"]
    return (
        f"bleu-4:char,nltk-method3|rouge-1,2,l:f,jieba-words|mean-over-records,percent|n:{n}|{versions}|as:llamafactory-{factory}"
        f"|ci95:bootstrap-{statistics.RESAMPLES},seed-{statistics.SEED},clusters-of-one-question,strata-of-test-sets|medasst:{__version__}"
    )


def print_summary(experiment: str, out: Path, report: dict[str, Any]) -> None:
    """Print the scores as a small table."""
    for name, row in [(experiment, report), *report.get("by_dataset", {}).items()]:
        cells = "  ".join(f"{metric} {row[metric]:6.2f} {interval(row['ci95'][metric])}" for metric in metric_names())
        print(f"{name:26} n {row['n']:5}  {cells}")
    thoughts = (
        f", {report['empty_thoughts']} labels that open with an empty <think>" if report["empty_thoughts"] else ""
    )
    print(f"{out}: {report['empty']} empty predictions{thoughts}\n{report['signature']}")


def interval(bounds: list[float] | None, sign: str = "") -> str:
    """Return an interval as tables show it; sign "+": one of differences."""
    return "[none: n < 2]" if bounds is None else f"[{bounds[0]:{sign}.2f}, {bounds[1]:{sign}.2f}]"
