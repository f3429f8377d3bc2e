"""Score LLaMA-Factory's generated_predictions.jsonl: every metric of the table with its interval, and a signature.

Run: `medasst score results/demo/generated_predictions.jsonl --out results/demo/scores.json --per-record
results/demo/per_record.jsonl`

Beside predictions of `medasst predict` lies what they were made of, so each record's test set is known. For others give
the predict.yaml that made them: each is then joined to its test record by order, and its reference checked.
"""

import argparse
import codecs
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from medasst_tools import __version__, provenance
from medasst_tools.config import read_yaml
from medasst_tools.errors import UserError
from medasst_tools.files import atomic_writer, sha256_of, write_json

CHUNK = 64  # records that a worker takes at once
PACKAGES = ("nltk", "rouge-chinese", "jieba", "rjieba")
RECORD = "predictions.json"
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")


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
    parser.add_argument(
        "--predict-config", type=Path, help="the predict.yaml that made them, if medasst predict didn't"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")


def run(args: argparse.Namespace) -> None:
    """Score the file and write what was asked for."""
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, must be 1 or more")
    if not args.predictions.is_file():
        raise UserError(f"no {args.predictions}; `make predict` makes it")
    origin = origin_of(args.predictions)
    about = made_of(args, origin)
    there = args.per_record is None or args.per_record.is_file()
    if there and provenance.up_to_date(args.out, about):
        return
    predictions = list(read_predictions(args.predictions))
    sizes = origin["datasets"] if origin else {}
    cut = None
    if not origin and args.predict_config:
        sizes, cut = join_test_sets(predictions, load_test_sets(args.predict_config), args.predictions)
    rows = list(score_all(predictions, args.workers))
    outputs = [args.per_record] if args.per_record else []
    for path in outputs:
        write_per_record(path, rows)
    report = summarise(predictions, rows, sizes, cut)
    report |= descriptions(predictions, sizes)
    report |= {"signature": signature(report["n"]), "predictions": about["files"]["predictions"]}
    write_json(args.out, report | provenance.record(args.out, about, outputs))
    name = provenance.shown_name(args.predictions.parent.name, predict=origin and origin["made_of"])
    print_summary(name, args.out, report)


def origin_of(predictions: Path) -> dict[str, Any] | None:
    """Return the record of `medasst predict` beside the predictions; None, and a line, if they aren't what it says."""
    path = predictions.with_name(RECORD)
    found = provenance.read_json(path)
    if found is None:
        return None
    if predictions.name in provenance.changed_outputs(path, found):
        print(f"{predictions} isn't what {path} says: predicted otherwise since; its model is unknown")
        return None
    return found


def made_of(args: argparse.Namespace, origin: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the scores depend on: the predictions, what those were made of, and the code of the metrics."""
    files = {"predictions": sha256_of(args.predictions)}
    if args.predict_config and args.predict_config.is_file():
        files["predict_config"] = sha256_of(args.predict_config)
    code = {"medasst evaluation": provenance.code_sha256("evaluation")}
    made = origin["made_of"] if origin else {}
    versions = provenance.package_versions(*PACKAGES) | code
    return provenance.made_of(made.get("settings"), files | made.get("files", {}), made.get("model"), versions)


# ---- reading --------------------------------------------------------------------------------------------------------
def read_predictions(path: Path) -> Iterator[Prediction]:
    """Yield each line; a byte order mark and blank lines don't count. UserError names a line that isn't one, or an empty file."""
    found = False
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
            predict, label = record["predict"], record["label"]
        except orjson.JSONDecodeError:
            raise UserError(
                f"{path}, line {number} is not JSON: cut short or damaged? `make predict` goes on"
            ) from None
        except (KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} has no predict and label; is it generated_predictions.jsonl?"
            ) from None
        if not (isinstance(predict, str) and isinstance(label, str)):
            raise UserError(f"{path}, line {number}: predict and label must be text")
        found = True
        yield Prediction(str(record.get("prompt", "")), predict, label)
    if not found:
        raise UserError(f"{path} is empty; predict again")


def load_test_sets(predict_config: Path) -> dict[str, Path]:
    """Return {dataset: file} of a predict.yaml, in the order in which LLaMA-Factory predicts them."""
    config = read_yaml(predict_config)
    try:
        return provenance.dataset_files(Path(config["dataset_dir"]), config["eval_dataset"])
    except (TypeError, KeyError):
        raise UserError(f"{predict_config} says no dataset_dir and eval_dataset; is it a predict.yaml?") from None


def join_test_sets(
    predictions: list[Prediction], test_sets: dict[str, Path], path: Path
) -> tuple[dict[str, int], list[bool]]:
    """Return each test set's size, and whether each label is cut; UserError unless labels and count are the test sets'."""
    references = {name: [orjson.loads(line)["output"] for line in file.open("rb")] for name, file in test_sets.items()}
    answers = [answer for rows in references.values() for answer in rows]
    names, cut = ", ".join(test_sets), []
    for number, (prediction, answer) in enumerate(zip(predictions, answers, strict=False), 1):
        found, expected = _comparable(prediction.label), _comparable(answer)
        if not expected.startswith(found):
            raise UserError(
                f"{path}, line {number}: the label isn't the answer in {names}: of another test set or order, or with "
                "max_samples? `medasst predict` keeps what it was made of beside its predictions"
            )
        cut.append(found != expected)
    if len(predictions) != len(answers):
        raise UserError(f"{path} has {len(predictions)} predictions, and {names} have {len(answers)} records")
    return {name: len(rows) for name, rows in references.items()}, cut


def _comparable(text: str) -> str:
    # A tokenizer may normalise characters and white space, cutoff_len may cut inside a character (U+FFFD), and a reasoning
    # model's template (qwen3) opens every label with an empty thought.
    text = EMPTY_THOUGHT.sub("", text, count=1) if EMPTY_THOUGHT.match(text) else text
    return "".join(unicodedata.normalize("NFC", text).rstrip("\ufffd\n ").split())


# ---- scoring --------------------------------------------------------------------------------------------------------
def score_all(predictions: list[Prediction], workers: int) -> Iterator[tuple[float, ...]]:
    """Yield the metrics of each record, in order."""
    from tqdm import tqdm

    pairs = [(row.predict, row.label) for row in predictions]
    chunks = [pairs[start : start + CHUNK] for start in range(0, len(pairs), CHUNK)]
    prepare()  # before a fork, so that the dictionary is loaded once
    with tqdm(total=len(predictions), desc="score", unit="record", disable=None) as bar:
        if workers == 1:
            scored: Iterable[list] = map(score_chunk, chunks)
            yield from _counted(scored, bar)
        else:
            with ProcessPoolExecutor(workers) as pool:
                yield from _counted(pool.map(score_chunk, chunks), bar)


def _counted(scored: Iterable[list], bar) -> Iterator[tuple[float, ...]]:
    for rows in scored:
        yield from rows
        bar.update(len(rows))


def score_chunk(chunk: Iterable[tuple[str, str]]) -> list[tuple[float, ...]]:
    """Score some (answer, reference); runs in a worker."""
    score_pair = prepare()
    return [score_pair(predict, label) for predict, label in chunk]


def prepare() -> Callable[[str, str], tuple[float, ...]]:
    """Load the dictionaries, once a process, and return the function that scores a pair."""
    from medasst_tools.evaluation.text_metrics import score_pair
    from medasst_tools.evaluation.word_segmenter import jieba, spaced_words

    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    spaced_words("好")  # the port loads its dictionary with the first text
    return score_pair


def metric_names() -> tuple[str, ...]:
    """Return the names of the metrics, in the table's order."""
    from medasst_tools.evaluation.text_metrics import METRICS

    return tuple(METRICS)


# ---- the outcome ----------------------------------------------------------------------------------------------------
def write_per_record(path: Path, rows: list[tuple[float, ...]]) -> None:
    """Write the metrics of each record, one a line."""
    with atomic_writer(path) as file:
        for row in rows:
            file.write(orjson.dumps(dict(zip(metric_names(), row, strict=True)), option=orjson.OPT_APPEND_NEWLINE))


def summarise(
    predictions: list[Prediction], rows: list[tuple[float, ...]], sizes: dict[str, int], cut: list[bool] | None
) -> dict[str, Any]:
    """Return scores.json's numbers: over all records, and by dataset where their sizes are known."""
    from medasst_tools.evaluation.statistics import clusters_of, strata_of

    clusters = clusters_of([row.prompt or "" for row in predictions])
    strata = strata_of(sizes.values()) if sizes else [0] * len(rows)
    report = _means(predictions, rows, clusters, strata, cut)
    if sizes:
        places = {
            name: [at for at, _ in group] for name, group in groupby(enumerate(_names(sizes)), key=lambda one: one[1])
        }
        report["by_dataset"] = {name: _of(places[name], predictions, rows, clusters, cut) for name in places}
    return report


def descriptions(predictions: list[Prediction], sizes: dict[str, int]) -> dict[str, Any]:
    """Return {"descriptions": {"all" or test set: means over the answers of which there's something to say, None if of none}, "descriptions_signature"}."""
    from medasst_tools.evaluation.text_metrics import DESCRIPTIONS, chrf_scorer

    columns = {
        name: [function(row.prompt or "", row.predict, row.label) for row in predictions]
        for name, function in DESCRIPTIONS.items()
    }
    places, start = {"all": slice(None)}, 0
    for name, size in sizes.items():
        places[name] = slice(start, start := start + size)
    means = {
        part: {
            name: _mean([value for value in column[place] if value is not None]) for name, column in columns.items()
        }
        for part, place in places.items()
    }
    said = f"chrf:{chrf_scorer().get_signature()}|means-over-records|n:{len(predictions)}"
    return {"descriptions": means, "descriptions_signature": said}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _names(sizes: dict[str, int]) -> Iterator[str]:
    for name, size in sizes.items():
        yield from [name] * size


def _of(places: list[int], predictions, rows, clusters, cut) -> dict[str, Any]:
    chosen = [[values[at] for at in places] for values in (predictions, rows, clusters)]
    return _means(*chosen, [0] * len(places), cut and [cut[at] for at in places])


def _means(predictions, rows, clusters, strata, cut) -> dict[str, Any]:
    import numpy as np

    from medasst_tools.evaluation.statistics import ci95

    names, table = metric_names(), np.array(rows, dtype=float).reshape(-1, len(metric_names()))
    report: dict[str, Any] = {"n": len(rows)} | {
        name: float(mean) for name, mean in zip(names, table.mean(axis=0), strict=True)
    }
    report["ci95"] = dict(zip(names, ci95(table, clusters=clusters, strata=strata), strict=True))
    report["clusters"] = len(set(clusters))
    report["empty"] = sum(not row.predict.strip() for row in predictions)
    report["empty_thoughts"] = sum(bool(EMPTY_THOUGHT.match(row.label)) for row in predictions)
    return report if cut is None else report | {"cut_labels": sum(cut)}


def signature(n: int) -> str:
    """Return what it takes to get the same numbers again."""
    from medasst_tools.evaluation.statistics import RESAMPLES, SEED

    versions = "|".join(f"{name}:{version}" for name, version in provenance.package_versions(*PACKAGES).items())
    factory = provenance.package_versions("llamafactory")["llamafactory"]
    return (
        f"bleu-4:char,nltk-method3|rouge-1,2,l:f,jieba-words|mean-over-records,percent|n:{n}|{versions}|as:llamafactory-{factory}"
        f"|ci95:bootstrap-{RESAMPLES},seed-{SEED},clusters-of-one-question,strata-of-test-sets|medasst:{__version__}"
    )


def print_summary(experiment: str, out: Path, report: dict[str, Any]) -> None:
    """Print the scores as a small table."""
    for name, row in [(experiment, report), *report.get("by_dataset", {}).items()]:
        cells = "  ".join(f"{metric} {row[metric]:6.2f} {interval(row['ci95'][metric])}" for metric in metric_names())
        print(f"{name:26} n {row['n']:5}  {cells}")
    cut = f", {report['cut_labels']} labels cut by cutoff_len" if "cut_labels" in report else ""
    thoughts = (
        f", {report['empty_thoughts']} labels that open with an empty <think>" if report["empty_thoughts"] else ""
    )
    print(f"{out}: {report['empty']} empty predictions{cut}{thoughts}\n{report['signature']}")


def interval(bounds: list[float] | None) -> str:
    """Return an interval as tables show it."""
    return "[none: n < 2]" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"
