"""Look a converted dataset_dir over: duplicates, test questions in training, lengths and what cutoff_len cuts, personal data.

Run: `medasst audit --data-dir data/full [--exams-dir data/exams] [--tokenizer saves/tiny_qwen2]`

Writes DIR/audit.json, DIR/overlap.jsonl (each training record whose question is a test question, with both places) and
prints a summary. It changes no data; `medasst convert --drop-overlap --drop-duplicates --mask-personal-data` does.
"""

import argparse
import contextlib
import itertools
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from medasst_tools import __version__, provenance
from medasst_tools.config import read_yaml
from medasst_tools.data.convert import COLUMNS, has_control_token
from medasst_tools.data.decontamination import (
    BANDS,
    KINDS,
    NEAR,
    PERMUTATIONS,
    ROWS,
    Match,
    QuestionIndex,
    read_questions,
)
from medasst_tools.data.deduplication import answer_of, key, normalise, question_of
from medasst_tools.data.download import cached_folder
from medasst_tools.data.layouts import read_instruction, read_sharegpt
from medasst_tools.data.pii import MASKS, mask
from medasst_tools.data.raw_files import NotKept, read_records
from medasst_tools.data.registry import is_test
from medasst_tools.errors import UserError
from medasst_tools.files import atomic_writer, read_json, write_json

CHUNK_BYTES = 1 << 23
PARTS = ("question", "answer", "history")
QUANTILES = (0.5, 0.9, 0.99)
IDENTITIES = ("records", "records_normalised", "questions", "questions_normalised")


class ChunkResult(NamedTuple):
    """What a piece of a dataset holds: a key of each identity and the parts' lengths (characters), counts, overlaps."""

    columns: dict[str, array]
    personal_matches: Counter
    personal_records: Counter
    overlaps: list[tuple[int, list[Match]]]  # (record in the chunk, matches)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder that `medasst convert` wrote")
    parser.add_argument("--exams-dir", type=Path, help="also look for the exams' questions in training")
    parser.add_argument("--tokenizer", help="folder or hub id: also count tokens, and what cutoff_len cuts (the config's model, if it is on this machine)")  # fmt: skip
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("factory_configs/medasst/train.yaml"),
        help="whose cutoff_len, template and default_system the tokens are counted with (factory_configs/medasst/train.yaml)",
    )
    parser.add_argument(
        "--token-sample", type=int, default=10_000, help="records of a dataset to count; 0: all (10000)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")


def run(args: argparse.Namespace) -> None:
    """Audit the folder and write the findings."""
    if args.token_sample < 0:
        raise UserError(f"--token-sample is {args.token_sample}, must be 0 or more")
    args.tokenizer = args.tokenizer or model_here(args.config)
    with tempfile.TemporaryDirectory() as work:
        files = read_folder(args.data_dir, Path(work))
        about = made_of(args, files)
        if not provenance.up_to_date(args.data_dir / "audit.json", about):
            audit(args, files, about)


def model_here(config: Path) -> str | None:
    """Return the folder of a config's model where it is on this machine; None where it isn't. No hub is asked."""
    model = read_yaml(config).get("model_name_or_path") if config.is_file() else None
    if model is None or Path(model).is_dir():
        return model
    with contextlib.suppress(Exception):  # what a client raises where nothing is cached
        return str(cached_folder(model, None))
    return None


def made_of(args: argparse.Namespace, files: dict[str, Path]) -> dict[str, Any]:
    """Return what the findings depend on: the data, the exams, and how tokens are counted."""
    hashes = {name: provenance.sha256_of(path) for name, path in files.items()}
    if args.exams_dir:
        hashes["exams"] = provenance.short(exam_questions(args.exams_dir))
    settings = {"tokenizer": args.tokenizer, "token_sample": args.token_sample} if args.tokenizer else {}
    if args.tokenizer and args.config.is_file():
        hashes["config"] = provenance.sha256_of(args.config)
    return provenance.made_of(settings, hashes, versions={"medasst data": provenance.code_sha256("data")})


def audit(args: argparse.Namespace, files: dict[str, Path], about: dict[str, Any]) -> None:
    """Examine every dataset, write and print the findings."""
    index = QuestionIndex(
        {name: read_questions(path) for name, path in files.items() if is_test(name)} | exam_questions(args.exams_dir)
    )
    datasets, unique, overlaps = {}, {}, []
    for name, path in files.items():
        datasets[name], unique[name], found = audit_dataset(path, None if is_test(name) else index, args.workers)
        overlaps += [(name, line, match) for line, match in found]
    if args.tokenizer:
        from medasst_tools.data.token_lengths import add_tokens

        add_tokens(datasets, files, args)
    findings = {
        "datasets": datasets,
        "between": shared_between(unique),
        "overlap": summarise_overlap(index.sizes, overlaps),
        "signature": signature(args),
    }
    with atomic_writer(args.data_dir / "overlap.jsonl") as file:
        for name, line, match in overlaps:
            row = {"dataset": name, "line": line, "test_set": match.test_set, "test_line": match.place + 1}
            row |= {"kind": match.kind, "similarity": match.similarity}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    record = provenance.record(args.data_dir / "audit.json", about, [args.data_dir / "overlap.jsonl"])
    write_json(args.data_dir / "audit.json", findings | record)
    print_findings(findings, args.data_dir)


def read_folder(data_dir: Path, work: Path) -> dict[str, Path]:
    """Return {dataset: JSON lines in Alpaca's form}; UserError if the folder is no dataset_dir, or not whole.

    A converted folder's files are that already; of a folder of the user's own the datasets are written so into `work`.
    """
    info = read_json(data_dir / "dataset_info.json") or {}
    manifest = read_json(data_dir / "manifest.json")
    files = provenance.dataset_files(data_dir, list(info))
    for name, path in files.items():
        if manifest and path.stat().st_size != manifest["datasets"].get(name, {}).get("bytes"):
            raise UserError(f"{path} isn't what the manifest says (missing or of another size); convert again")
    if manifest:
        return files
    return {name: as_alpaca(path, info[name], work / f"{name}.jsonl") for name, path in files.items()}


def as_alpaca(path: Path, described: dict[str, Any], target: Path) -> Path:
    """Write a dataset of the user's own, whatever columns or format its entry names, as Alpaca records; return `target`."""
    columns = described.get("columns", {})
    with target.open("wb") as file:
        for _, _, value in read_records(path):
            with contextlib.suppress(NotKept):  # LLaMA-Factory drops it too
                record = _alpaca(value, described.get("formatting"), columns)
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    return target


def _alpaca(record: Any, formatting: str | None, columns: dict[str, str]) -> Any:
    if not isinstance(record, dict):
        raise NotKept("not an object")
    if formatting == "sharegpt":
        return read_sharegpt({"conversations": record.get(columns.get("messages", "conversations"))})
    return read_instruction({ours: record.get(columns.get(theirs, ours)) for ours, theirs in COLUMNS.items()})


def exam_questions(exams_dir: Path | None) -> dict[str, list[str]]:
    """Return {"cmmlu": stems, "ceval": stems}; nothing without a folder."""
    if exams_dir is None:
        return {}
    from medasst_tools.data.exam_questions import load_protocol, load_subjects

    stems: dict[str, list[str]] = {}
    for subject in load_subjects(exams_dir, load_protocol()):
        stems.setdefault(subject.benchmark, []).extend(question.text for question in subject.questions)
    return stems


def audit_dataset(path: Path, index: QuestionIndex | None, workers: int) -> tuple[dict, dict, list[tuple[int, Match]]]:
    """Return (findings, unique keys by identity, (line, match) of each training record that is a test question)."""
    import numpy as np

    columns = {name: [np.empty(0, "Q")] for name in (*IDENTITIES, *PARTS)}
    matches, records, overlaps, count = Counter(), Counter(), [], 0
    for result in _chunk_results(path, index, workers):
        for name, values in result.columns.items():
            columns[name].append(np.frombuffer(values, "Q"))
        matches.update(result.personal_matches)
        records.update(result.personal_records)
        overlaps += [(count + place + 1, match) for place, found in result.overlaps for match in found]
        count += len(result.columns["records"])
    unique = {identity: np.unique(np.concatenate(columns[identity])) for identity in IDENTITIES}
    findings = {
        "n": count,
        "duplicates": {name: count - len(values) for name, values in unique.items()},
        "characters": {part: _spread(np.concatenate(columns[part])) for part in PARTS},
        "personal_data": {kind: {"records": records[kind], "matches": matches[kind]} for kind in MASKS},
        "personal_records": records["any"],
        "personal_pieces": matches.total(),
        "control_tokens": records["control tokens"],
    }
    return findings, unique, overlaps


def _spread(lengths) -> dict[str, float]:
    import numpy as np

    if not len(lengths):
        return {}
    quantiles = np.quantile(lengths, QUANTILES)
    named = {f"p{round(100 * share)}": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": round(float(lengths.mean()), 2)} | named | {"max": int(lengths.max())}


def _chunk_results(path: Path, index: QuestionIndex | None, workers: int) -> Iterator[ChunkResult]:
    """Yield each chunk's result in order."""
    from tqdm import tqdm

    size = path.stat().st_size
    chunks = [(path, start, min(start + CHUNK_BYTES, size)) for start in range(0, size, CHUNK_BYTES)]
    with (
        tqdm(total=size, unit="B", unit_scale=True, desc=path.stem, disable=None) as bar,
        contextlib.ExitStack() as stack,
    ):
        if workers == 1 or len(chunks) < 2:
            _set_index(index)
            results = map(examine_chunk, chunks)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=_set_index, initargs=(index,)))
            results = pool.map(examine_chunk, chunks)
        for result, (_, start, end) in zip(results, chunks, strict=True):
            yield result
            bar.update(end - start)


_INDEX: list[QuestionIndex | None] = [None]  # a worker's own, set once: too large to send with every chunk


def _set_index(index: QuestionIndex | None) -> None:
    _INDEX[0] = index


def examine_chunk(chunk: tuple[Path, int, int]) -> ChunkResult:
    """Examine the lines that begin in [start, end) of a dataset."""
    index = _INDEX[0]
    columns = {name: array("Q") for name in (*IDENTITIES, *PARTS)}
    matches, records, overlaps = Counter(), Counter(), []
    for place, line in enumerate(_lines(*chunk)):
        record = orjson.loads(line)
        question, answer, history = question_of(record), answer_of(record), record.get("history") or ()
        normalised = normalise(question)
        texts = (f"{question}\0{answer}", f"{normalised}\0{normalise(answer)}", question, normalised)
        asked = len(record["instruction"]) + len(record["input"])
        lengths = (asked, len(answer), sum(len(user) + len(doctor) for user, doctor in history))
        for column, value in zip(columns.values(), (*map(key, texts), *lengths), strict=True):
            column.append(value)
        _, found = mask("\n".join([question, answer, *(doctor for _, doctor in history)]))
        matches.update(found)
        records.update([*found, *["any"] * bool(found), *["control tokens"] * has_control_token(line)])
        if index and (matched := index.match(question, normalised)):
            overlaps.append((place, matched))
    return ChunkResult(columns, matches, records, overlaps)


def _lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the line that began before, or just the newline
        while file.tell() < end and (line := file.readline()):
            yield line


def summarise_overlap(sizes: dict[str, int], overlaps: list[tuple[str, int, Match]]) -> dict[str, dict[str, Any]]:
    """Return, for each test set, how many of its questions training has, by the closest kind, and from how many records."""
    closest: dict[str, dict[int, int]] = {name: {} for name in sizes}
    training: dict[str, Counter] = {name: Counter() for name in sizes}
    for dataset, _, match in overlaps:
        kind = KINDS.index(match.kind)
        places = closest[match.test_set]
        places[match.place] = min(places.get(match.place, kind), kind)
        training[match.test_set][dataset] += 1
    return {
        name: {"n": n}
        | {kind: sum(found == at for found in closest[name].values()) for at, kind in enumerate(KINDS)}
        | {"training_records": dict(training[name])}
        for name, n in sizes.items()
    }


def shared_between(unique: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each two datasets with something in common, how many different records and questions that is."""
    import numpy as np

    shared = []
    for a, b in itertools.combinations(unique, 2):
        common = {
            identity: len(np.intersect1d(unique[a][identity], unique[b][identity], assume_unique=True))
            for identity in IDENTITIES
        }
        if any(common.values()):
            shared.append({"a": a, "b": b} | common)
    return shared


def signature(args: argparse.Namespace) -> str:
    """Return what it takes to get the same findings again."""
    tokens = f"|tokens:{args.tokenizer},{args.config},sample-{args.token_sample}" if args.tokenizer else ""
    return (
        f"normalised:nfkc,casefold,letters-and-digits|near:trigrams,jaccard>={NEAR},minhash-{PERMUTATIONS},{BANDS}x{ROWS}"
        f"|datasketch:{version('datasketch')}{tokens}|medasst:{__version__}"
    )


def print_findings(findings: dict[str, Any], data_dir: Path) -> None:
    """Print a line a dataset and a line a test set."""
    for name, found in findings["datasets"].items():
        copies, marks = found["duplicates"], found["control_tokens"]
        marked = f"; a chat template's marks in {marks:,}" if marks else ""
        tokens = f"; cutoff_len cuts {found['tokens']['cut']:.2%}" if "tokens" in found else ""
        print(
            f"{name}: {found['n']:,} records, copies: {copies['records']:,} exact, {copies['records_normalised']:,} normalised, "
            f"questions asked before: {copies['questions_normalised']:,}; personal data in {found['personal_records']:,} "
            f"({found['personal_pieces']:,} pieces){marked}{tokens}"
        )
    for name, found in findings["overlap"].items():
        seen = ", ".join(f"{found[kind]:,} {kind}" for kind in KINDS)
        print(f"{name}: of {found['n']:,} questions training has {seen}")
    print(f"{data_dir / 'audit.json'}, overlap.jsonl\n{findings['signature']}")
