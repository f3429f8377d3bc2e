"""Score LLaMA-Factory's generated_predictions.jsonl: BLEU-4 and ROUGE with intervals and a signature.

Run: `medasst score results/demo/generated_predictions.jsonl --out results/demo/scores.json --per-record
results/demo/per_record.jsonl --predict-config factory_configs/demo/predict.yaml`

With the predict.yaml that made the file, each prediction is joined to its test record by order, and each reference is
checked against the test set, so that scores per dataset are of the right records.
"""

import argparse
import json
import logging
import unicodedata
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import yaml

from medasst_tools import __version__
from medasst_tools.errors import UserError
from medasst_tools.files import atomic_writer, sha256_of, write_json
from medasst_tools.run_manifest import check_and_print

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
CHUNK = 64  # records that a worker takes at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("predictions", type=Path, help="generated_predictions.jsonl: prompt, predict, label")
    parser.add_argument("--out", type=Path, required=True, help="scores.json to write")
    parser.add_argument("--per-record", type=Path, help="also write the four metrics of each record, one a line")
    parser.add_argument(
        "--predict-config", type=Path, help="the predict.yaml that made the file, for scores per dataset"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")


def run(args: argparse.Namespace) -> None:
    """Score the file and write what was asked for."""
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, must be 1 or more")
    test_sets = load_test_sets(args.predict_config) if args.predict_config else {}
    trained = check_predict_config(args.predict_config) if args.predict_config else None
    records = join_test_sets(read_predictions(args.predictions), test_sets, args.predictions)
    values, empty, cut = array("d"), array("b"), array("b")
    with atomic_writer(args.per_record) if args.per_record else nullcontext() as per_record:
        for predict_is_empty, label_is_cut, scores in score_all(records, args.workers, count_lines(args.predictions)):
            values.extend(scores)
            empty.append(predict_is_empty)
            cut.append(label_is_cut)
            if per_record:
                per_record.write(
                    orjson.dumps(dict(zip(METRICS, scores, strict=True)), option=orjson.OPT_APPEND_NEWLINE)
                )
    report = summarise(values, empty, cut, test_sets)
    report["signature"] = signature(report["n"])
    if trained:
        report["run"] = trained
    report["predictions"] = {"file": args.predictions.name, "sha256": sha256_of(args.predictions)}
    write_json(args.out, report)
    print_summary(args.out, report)


def read_predictions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (predict, label) of each line; UserError names the line that isn't one, or an empty file."""
    number = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = orjson.loads(line)
                    predict, label = record["predict"], record["label"]
                except orjson.JSONDecodeError:
                    raise UserError(
                        f"{path}, line {number} is not JSON: truncated or damaged? Predict again"
                    ) from None
                except (KeyError, TypeError):
                    raise UserError(
                        f"{path}, line {number} has no predict and label; is it generated_predictions.jsonl?"
                    ) from None
                if not (isinstance(predict, str) and isinstance(label, str)):
                    raise UserError(f"{path}, line {number}: predict and label must be text")
                yield predict, label
    except FileNotFoundError:
        raise UserError(f"no {path}; `make predict` makes it") from None
    if number == 0:
        raise UserError(f"{path} is empty; predict again")


def count_lines(path: Path) -> int | None:
    """Return the number of lines for the progress bar; None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def load_test_sets(predict_config: Path) -> dict[str, Path]:
    """Return {dataset: file} of a predict.yaml, in the order in which LLaMA-Factory predicts them."""
    try:
        config = yaml.safe_load(predict_config.read_text(encoding="utf-8"))
        folder, names = Path(config["dataset_dir"]), config["eval_dataset"]
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        return {
            name: folder / info[name]["file_name"] for name in (names.split(",") if isinstance(names, str) else names)
        }
    except FileNotFoundError as error:
        raise UserError(
            f"no {error.filename}; --predict-config must name the predict.yaml that made the predictions"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{predict_config}: no dataset_dir and eval_dataset that can be read ({error!r})") from None


def check_predict_config(path: Path) -> dict[str, Any] | None:
    """Check that the config fits the model that it names, print what that is, and return what the scores keep of it."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return check_and_print(config, path, hash_base=False) if config.get("model_name_or_path") else None


def join_test_sets(
    predictions: Iterable[tuple[str, str]], test_sets: dict[str, Path], path: Path
) -> Iterator[tuple[str, str, bool]]:
    """Yield (predict, label, label is cut); with test sets, check each label and the count against their references."""
    if not test_sets:
        yield from ((predict, label, False) for predict, label in predictions)
        return
    answers = _references(test_sets)
    number = 0
    for number, (predict, label) in enumerate(predictions, 1):
        answer = next(answers, None)
        if answer is None:
            raise UserError(
                f"{path} has more than the {number - 1} records of {', '.join(test_sets)}: of another test set?"
            )
        found, expected = _comparable(label), _comparable(answer)
        if not expected.startswith(found):
            raise UserError(
                f"{path}, line {number}: the label isn't the test set's answer: of another test set or order? Predict again"
            )
        yield predict, label, found != expected
    if missing := sum(1 for _ in answers):
        raise UserError(
            f"{path} ends after {number} lines, {missing} records of {', '.join(test_sets)} are missing; predict again"
        )


def _references(test_sets: dict[str, Path]) -> Iterator[str]:
    for path in test_sets.values():
        with path.open("rb") as lines:
            yield from (orjson.loads(line)["output"] for line in lines)


def _comparable(text: str) -> str:
    # a tokenizer may normalise characters and white space, and cutoff_len may cut inside a character (U+FFFD)
    return "".join(unicodedata.normalize("NFC", text).rstrip("\ufffd\n ").split())


def score_all(
    records: Iterable[tuple[str, str, bool]], workers: int, total: int | None
) -> Iterator[tuple[bool, bool, tuple]]:
    """Yield (prediction is empty, label is cut, the four scores) of each record, in order."""
    from tqdm import tqdm

    with tqdm(total=total, desc="score", unit="record", disable=None) as bar:
        records = iter(records)
        chunks = iter(lambda: tuple(islice(records, CHUNK)), ())
        for done in _scored_chunks(chunks, workers):
            yield from done
            bar.update(len(done))


def _scored_chunks(chunks: Iterable[tuple], workers: int) -> Iterator[list]:
    if workers == 1:
        yield from map(score_chunk, chunks)
        return
    prepare()  # before the fork, so that the dictionary is loaded once
    with ProcessPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(score_chunk, chunk) for chunk in islice(chunks, 2 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(score_chunk, chunk) for chunk in islice(chunks, 1))


def score_chunk(chunk: tuple) -> list[tuple[bool, bool, tuple]]:
    """Score some records; runs in a worker."""
    score_pair = prepare()
    return [(not predict.strip(), cut, score_pair(predict, label)) for predict, label, cut in chunk]


def prepare() -> Callable[[str, str], tuple]:
    """Load the dictionaries, once a process, and return the function that scores a pair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's and rouge-chinese's sources warn when Python first compiles them
        import jieba

        from medasst_tools.evaluation.text_metrics import score_pair
        from medasst_tools.evaluation.word_segmenter import spaced_words
    jieba.setLogLevel(logging.WARNING)
    jieba.initialize()
    spaced_words("好")  # the port loads its dictionary with the first text
    return score_pair


def summarise(values: array, empty: array, cut: array, test_sets: dict[str, Path]) -> dict[str, Any]:
    """Return scores.json's numbers: over all records, and per dataset where the test sets are known."""
    import numpy as np

    table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(METRICS))
    empties, cuts = np.frombuffer(empty, dtype=np.int8), np.frombuffer(cut, dtype=np.int8)
    report = _means(table, empties, cuts if test_sets else None)
    if test_sets:
        sizes = [count_lines(path) for path in test_sets.values()]
        ends = np.cumsum(sizes)
        spans = {name: slice(end - size, end) for name, size, end in zip(test_sets, sizes, ends, strict=True)}
        report["by_dataset"] = {
            name: _means(table[span], empties[span], cuts[span]) for name, span in spans.items() if len(table[span])
        }
    return report


def _means(table, empties, cuts) -> dict[str, Any]:
    from medasst_tools.evaluation.statistics import ci95

    means = {metric: float(mean) for metric, mean in zip(METRICS, table.mean(axis=0), strict=True)}
    report = (
        {"n": len(table)} | means | {"ci95": dict(zip(METRICS, ci95(table), strict=True)), "empty": int(empties.sum())}
    )
    return report if cuts is None else report | {"cut_labels": int(cuts.sum())}


def signature(n: int) -> str:
    """Return what it takes to get the same numbers again."""
    from medasst_tools.evaluation.statistics import RESAMPLES, SEED

    versions = "|".join(f"{name}:{metadata.version(name)}" for name in ("nltk", "rouge-chinese", "jieba", "rjieba"))
    return (
        f"bleu-4:char,nltk-method3|rouge-1,2,l:f,jieba-words|mean-over-records,percent|n:{n}|{versions}"
        f"|as:llamafactory-{metadata.version('llamafactory')}|ci95:bootstrap-{RESAMPLES},seed-{SEED}|medasst:{__version__}"
    )


def print_summary(out: Path, report: dict[str, Any]) -> None:
    """Print the scores as a small table."""
    for name, row in [("all", report), *report.get("by_dataset", {}).items()]:
        cells = "  ".join(
            f"{metric} {row[metric]:6.2f} [{row['ci95'][metric][0]:.2f}, {row['ci95'][metric][1]:.2f}]"
            for metric in METRICS
        )
        print(f"{name:26} n {row['n']:5}  {cells}")
    cut = f", {report['cut_labels']} labels cut by cutoff_len" if "cut_labels" in report else ""
    print(f"{out}: {report['empty']} empty predictions{cut}\n{report['signature']}")
