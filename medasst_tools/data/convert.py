"""Turn the raw corpora into a LLaMA-Factory dataset_dir in which every record is accounted for.

Run: `medasst convert --raw-dir data/raw --out-dir data/full`; it reads `RAW/<corpus>/<file as its hub names it>`.

Records keep their order. What can't be used is in `rejected/`, and for each dataset read = kept + skipped + rejected. New
files are made in a folder of their own and moved to their places at the end, `manifest.json` last: a killed or failed run
leaves what was there, and one that was killed while it moved them is finished by the next.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import orjson

from medasst_tools import provenance
from medasst_tools.data.decontamination import QuestionIndex, read_questions
from medasst_tools.data.filters import Cleaner
from medasst_tools.data.layouts import ODD_TAIL, likely_layout, reader, shape_of
from medasst_tools.data.raw_files import (
    CHINESE,
    UTF8,
    NotKept,
    NotOneJson,
    first_values,
    is_chinese_encoding,
    read_records,
)
from medasst_tools.data.registry import Dataset, is_test, load_datasets
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import atomic_writer, locked, read_json, sha256_of, write_json
from medasst_tools.language import said

STAGING = ".converting"
# LLaMA-Factory's loader takes a column's type from the first 10 MiB: a dataset whose histories are all empty there fails
# to load when a later one isn't.
TYPED_BYTES = 8 << 20
COLUMNS = {"instruction": "prompt", "input": "query", "output": "response", "history": "history", "system": "system"}
COLUMNS |= {"chosen": "chosen", "rejected": "rejected"}
CONTROL = re.compile(rb"<\|[A-Za-z_]{2,30}\|>|</?(?:start_of_turn|end_of_turn|s)>|\[/?INST\]")
LESS, LETTER_I = b"<I"  # one of the two is in all that CONTROL finds, and in one line of fifty
BLOCK = 1 << 22  # bytes written at once: of smaller ones the two threads wait for each other
WORTH_A_POOL = 4 << 20  # bytes of raw files: less is converted before processes have started


class Options(NamedTuple):
    """What of the command line changes a conversion's outcome."""

    drop_overlap: bool = False
    drop_duplicates: bool = False
    mask_personal_data: bool = False
    strict: bool = False
    encoding: str | None = None

    def variant(self) -> list[str]:
        """Return the names of the options that differ from the paper's data."""
        named = self._asdict() | {"encoding": False}
        return [name.replace("_", "-") for name, asked in named.items() if asked]


class Counts:
    """What became of one dataset's records; `bytes` and `sha256` are the written file's."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.read = self.kept = self.odd_tails = self.control_tokens = self.bytes = 0
        self.sha256 = ""
        self.skipped, self.rejected, self.masked = Counter(), Counter(), Counter()
        self.columns: list[str] = []
        self.moved_to_top = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help="as in dataset_info/corpora.yaml and own.yaml; default: all whose raw file is there")  # fmt: skip
    parser.add_argument("--raw-dir", type=Path, required=True, help="holds <corpus>/<file as its hub names it>")
    parser.add_argument("--out-dir", type=Path, required=True, help="the LLaMA-Factory dataset_dir to write")
    parser.add_argument("--max-rejects", type=float, default=0.01, metavar="SHARE", help="exit 1 if more of a dataset was rejected, and leave all as it was (0.01)")  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=min(4, os.cpu_count() or 1), help="datasets converted side by side"
    )
    parser.add_argument("--encoding", help="of the raw files, if they are neither UTF-8 nor GB18030")
    parser.add_argument("--drop-overlap", action="store_true", help="decontamination: leave out training records whose question a test set has, or nearly")  # fmt: skip
    parser.add_argument("--drop-duplicates", action="store_true", help="deduplication: leave out training records that an earlier one says already")  # fmt: skip
    parser.add_argument("--mask-personal-data", action="store_true", help="PII: mask phone and ID numbers, e-mail, WeChat, QQ, web addresses")  # fmt: skip
    parser.add_argument(
        "--strict", action="store_true", help="reject records with a chat template's marks, like <|im_end|>"
    )


def run(args: argparse.Namespace) -> None:
    """Convert the datasets asked for and write the manifest."""
    check_options(args)
    manifest = read_json(args.out_dir / "manifest.json")  # damaged: said before the work
    if manifest is None and (args.out_dir / "dataset_info.json").is_file():
        print(
            f"{args.out_dir} is your own (a dataset_info.json and no manifest.json) and is used as it is; nothing converted"
        )
        return
    options = Options(args.drop_overlap, args.drop_duplicates, args.mask_personal_data, args.strict, args.encoding)
    sources = choose_sources(args.datasets, args.raw_dir)
    before = manifest["datasets"] if manifest else {}
    about = {dataset.name: made_of(dataset, sources, options) for dataset in sources}
    changed = {name: why for name in about if (why := what_differs(args.out_dir, before.get(name), about[name]))}
    if not changed:
        print(f"{args.out_dir}: up to date")
        return
    todo = sources if options.variant() else {one: path for one, path in sources.items() if one.name in changed}
    busy = f"another run is writing {args.out_dir}; wait for it or give another --out-dir"
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with locked(args.out_dir / ".lock", busy), staging_in(args.out_dir) as staging:
        entries = {}
        for name, entry in convert_all(todo, staging, args.out_dir, options, args.workers):
            entries[name] = entry | {"made_of": about[name]}
            print(summary(name, entry), flush=True)
        check_rejects(entries, todo, staging, args)
        publish(staging, args.out_dir, before | entries)
    for name in before.keys() - about.keys() if not args.datasets else ():
        print(f"{name}: no raw file in {args.raw_dir} any more; its converted file stays")


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for an option that can't be."""
    if not 0 <= args.max_rejects <= 1:
        raise UserError(f"--max-rejects is {args.max_rejects}, must be a share between 0 and 1")
    if args.encoding:
        try:
            "".encode(args.encoding)
        except LookupError:
            raise UserError(
                f"--encoding is {args.encoding!r}, which Python doesn't know; utf-8 or gb18030, say"
            ) from None


def choose_sources(names: list[str], raw_dir: Path) -> dict[Dataset, Path]:
    """Return {dataset: raw file} for the names, or for all whose raw file is there; UserError names what is missing."""
    known = load_datasets()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no dataset {unknown[0]!r}; there are {', '.join(known)}")
    if not raw_dir.is_dir() and not any(Path(file).is_absolute() for one in known.values() for file in one.files):
        first = next(iter(known.values()))
        raise UserError(
            f"no raw folder {raw_dir}: `medasst download` fetches it; it must hold <corpus>/<file>, "
            f"for example {raw_dir}/{first.corpus.name}/{first.files[0]}"
        )
    chosen, missing = {}, []
    for dataset in [known[name] for name in dict.fromkeys(names)] or (
        one for one in known.values() if not one.optional
    ):
        places = [raw_dir / dataset.corpus.name / file for file in dataset.files]
        path = next((place for place in places if place.exists()), None)
        if path is not None:
            chosen[dataset] = path
            continue
        source = f", from {dataset.corpus.homepage}" if dataset.corpus.homepage else ""
        missing.append(f"{dataset.name} needs {' or '.join(map(str, places))}{source}")
        if like := _misnamed(raw_dir / dataset.corpus.name, dataset.files, known):
            print(said(f"warning: {like} isn't read: {missing[-1]}; rename it?"))
    if names and missing:
        raise UserError(
            f"no raw file: {'; '.join(missing)}; `medasst download {' '.join(names)}` fetches what hubs have"
        )
    if not chosen:
        raise UserError(f"no raw file in {raw_dir}: `medasst download` fetches them; for example {missing[0]}")
    return chosen


def _misnamed(folder: Path, files: list[str], known: dict[str, Dataset]) -> Path | None:
    """Return a file in a corpus's folder that is named nearly as one of `files` and belongs to no dataset."""
    expected = {file for dataset in known.values() for file in dataset.files}
    there = [path.name for path in folder.glob("*") if path.name not in expected] if folder.is_dir() else []
    found = [name for file in files for name in difflib.get_close_matches(file, there, 1, cutoff=0.8)]
    return folder / found[0] if found else None


# ---- the ledger -----------------------------------------------------------------------------------------------------
def made_of(dataset: Dataset, sources: dict[Dataset, Path], options: Options) -> dict[str, Any]:
    """Return what a dataset depends on: its raw file, how that is read, the variant, and with it the others' raw files."""
    mine = {dataset: sources[dataset]}
    files = {_short(one, path): _source_sha256(path) for one, path in (sources if options.variant() else mine).items()}
    how = {
        "layout": dataset.layout,
        "columns": dataset.corpus.columns,
        "share": dataset.share,
        "variant": options.variant(),
        "encoding": options.encoding or dataset.corpus.encoding or "by content",
    }
    settings = {key: value for key, value in how.items() if value}
    return provenance.made_of(settings, files, versions={"medasst data": provenance.code_sha256("data")})


def _short(dataset: Dataset, path: Path) -> str:
    return f"{dataset.corpus.name}/{path.name}"


def _source_sha256(path: Path) -> str:
    if path.is_file():
        return sha256_of(path)
    return provenance.short([[file.name, sha256_of(file)] for file in sorted(path.iterdir()) if file.is_file()])


def what_differs(out_dir: Path, entry: dict[str, Any] | None, about: dict[str, Any]) -> list[str]:
    """Return why a dataset must be converted; empty if it is there, whole, and made of just this."""
    path = out_dir / (entry or {}).get("file", "nothing")
    if entry is None or not path.is_file():
        return ["it isn't there"]
    changed = [] if sha256_of(path) == entry["sha256"] else [f"{path} was changed since"]
    return provenance.differences(entry.get("made_of", {}), about) + changed


# ---- converting -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def staging_in(out_dir: Path) -> Iterator[Path]:
    """Yield an empty folder in out_dir for the new files; it goes at the end, however that comes."""
    staging = out_dir / STAGING
    finish(staging, out_dir)
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
    (staging / "rejected").mkdir(parents=True)
    try:
        yield staging
    finally:
        if not (staging / "manifest.json").exists():
            shutil.rmtree(staging, ignore_errors=True)


def convert_all(
    sources: dict[Dataset, Path], staging: Path, out_dir: Path, options: Options, workers: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dataset, its manifest entry), converted into the staging folder; test sets first, which decontamination needs."""
    ordered = sorted(sources, key=lambda dataset: not is_test(dataset.name))  # stable: else the registry's order
    size = sum(path.stat().st_size for path in sources.values())
    if workers == 1 or len(sources) == 1 or options.drop_overlap or options.drop_duplicates or size < WORTH_A_POOL:
        index, seen = None, set()
        for dataset in ordered:
            test = is_test(dataset.name)  # stays as it was published, but for masks
            if options.drop_overlap and not test and index is None:
                index = test_index(staging, out_dir)
            copies = seen if options.drop_duplicates and not test else None
            cleaner = Cleaner(index, copies, options.mask_personal_data)
            yield dataset.name, convert_dataset(dataset, sources[dataset], staging, options, cleaner)
        return
    cleaner = Cleaner(None, None, options.mask_personal_data)
    with ProcessPoolExecutor(workers) as pool:  # the largest first, so that none is waited for at the end
        jobs = {
            dataset.name: pool.submit(convert_dataset, dataset, sources[dataset], staging, options, cleaner)
            for dataset in sorted(ordered, key=lambda dataset: -sources[dataset].stat().st_size)
        }
        for dataset in ordered:
            try:
                yield dataset.name, jobs[dataset.name].result()
            except BrokenProcessPool:
                raise UserError("a worker process was killed (out of memory?); try --workers 1") from None


def test_index(staging: Path, out_dir: Path) -> QuestionIndex:
    """Return the index of the test sets in these folders, the first that has one counts; UserError if none has any."""
    files = {path.stem: path for folder in (out_dir, staging) for path in folder.glob("*_test.jsonl")}
    if not files:
        raise UserError(f"--drop-overlap needs test sets, and none is among the raw files or in {out_dir}")
    return QuestionIndex({name: read_questions(path) for name, path in files.items()})


def convert_dataset(dataset: Dataset, path: Path, folder: Path, options: Options, cleaner: Cleaner) -> dict[str, Any]:
    """Convert one raw file to `folder/<name>.jsonl` and `folder/rejected/<name>.jsonl`; return its manifest entry.

    A file of which most isn't UTF-8, but which is GB18030 throughout, is read as that.
    """
    encoding, seen = options.encoding or dataset.corpus.encoding, frozenset(cleaner.seen or ())
    try:
        counts = write_dataset(dataset, path, folder, encoding or UTF8, options, cleaner)
        doubtful = counts.rejected["not UTF-8"] * 2 > counts.kept + counts.rejected.total()
    except NotOneJson as error:
        counts, doubtful = None, error.not_utf8
        if encoding or not doubtful:
            raise
    if not encoding and doubtful and path.is_file() and is_chinese_encoding(path):
        encoding = CHINESE
        if cleaner.seen:
            cleaner.seen &= seen  # the records of the first try are no earlier ones
        counts = write_dataset(dataset, path, folder, CHINESE, options, cleaner)
    elif counts is None:
        raise UserError(f"{path} is neither UTF-8 nor GB18030; give its --encoding")
    return entry_of(dataset, path, counts, encoding or UTF8, options)


def write_dataset(
    dataset: Dataset, path: Path, folder: Path, encoding: str, options: Options, cleaner: Cleaner
) -> Counts:
    """Write the kept and the rejected records; return the counts."""
    from tqdm import tqdm

    counts, output, shapes, keys = Counts(), folder / f"{dataset.name}.jsonl", set(), None
    records_of = reader(dataset.layout, dataset.corpus.columns)
    raw = read_records(path, dataset.layout, encoding)
    bar = tqdm(raw, dataset.name, unit="record", unit_scale=True, disable=None, leave=False)
    hashed = HashedFile(output)
    with io.BufferedWriter(hashed, BLOCK) as out, (folder / "rejected" / output.name).open("wb") as bad:
        for number, data, value in bar:
            for record in records_of(value):
                counts.read += 1
                try:
                    line = line_of(record, dataset, cleaner, options.strict, counts)
                except NotKept as reason:
                    (counts.skipped if reason.by_design else counts.rejected)[str(reason)] += 1
                    if not reason.by_design:
                        bad.write(_rejected_line(number, data, str(reason)))
                    continue
                out.write(line)
                counts.kept += 1
                if record.keys() != keys:  # it seldom is
                    keys = record.keys()
                    shapes.add(tuple(keys))
    counts.sha256 = hashed.digest.hexdigest()
    counts.columns = [name for key, name in COLUMNS.items() if any(key in shape for shape in shapes)]
    empty = {key: [] if key == "history" else "" for key in COLUMNS if COLUMNS[key] in counts.columns}
    missing = empty if len(shapes) > 1 else {}
    late = _late_history(_filled(output, missing)) if "history" in counts.columns else None
    if missing or late:
        _rewrite(output, late, _filled(output, missing))
        counts.moved_to_top, counts.sha256 = late is not None, sha256_of(output)
    counts.bytes = output.stat().st_size
    return counts


def _filled(path: Path, missing: dict[str, Any]) -> Iterator[bytes]:
    """Yield a file's lines, in each what only some have, history or system, as an empty one: a loader takes the columns from the first."""
    with path.open("rb") as lines:
        for line in lines:
            yield orjson.dumps(missing | orjson.loads(line), option=orjson.OPT_APPEND_NEWLINE) if missing else line


def _late_history(lines: Iterator[bytes]) -> bytes | None:
    """Return the first line that has a history, if it comes after those from which a loader takes the columns' types."""
    place = 0
    for line in lines:
        if orjson.loads(line).get("history"):
            return line if place > TYPED_BYTES else None
        place += len(line)
    return None


def _rewrite(path: Path, first: bytes | None, lines: Iterator[bytes]) -> None:
    """Write the lines in their order, but for one of them that becomes the first."""
    with atomic_writer(path) as file:
        file.write(first or b"")
        file.writelines(itertools.takewhile(lambda line: line != first, lines))
        file.writelines(lines)


def line_of(
    record: dict[str, Any] | NotKept, dataset: Dataset, cleaner: Cleaner, strict: bool, counts: Counts
) -> bytes:
    """Return the line of a record that is kept, and count what was done to it; raise NotKept for one that isn't."""
    if not isinstance(record, dict):
        raise record
    if dataset.share is not None and in_test_part(record, dataset.share) != dataset.test_part:
        raise NotKept("in the other part", by_design=True)
    odd_tail, masked = ODD_TAIL in record and record.pop(ODD_TAIL), None
    if not cleaner.idle:
        record, masked = cleaner.clean(record)
    try:
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # half of a surrogate pair
        raise NotKept("text that isn't Unicode") from None
    if has_control_token(line):
        if strict:
            raise NotKept("a chat template's mark in the text")
        counts.control_tokens += 1
    if odd_tail:
        counts.odd_tails += 1
    if masked:
        counts.masked.update(masked)
    return line


def has_control_token(line: bytes) -> bool:
    """Say whether a record's text holds a mark of a chat template, which a tokenizer takes for the mark itself."""
    return (LESS in line or LETTER_I in line) and CONTROL.search(line) is not None


def in_test_part(record: dict[str, Any], share: float) -> bool:
    """Say whether a record of a corpus without a test set of its own belongs to the share that is one: by its first question."""
    first = record["history"][0][0] if record.get("history") else record["instruction"]
    return crc32(first.encode("utf-8", "surrogatepass")) < share * (1 << 32)


class HashedFile(io.RawIOBase):
    """A file to be written from its beginning to its end; `digest` is the sha256 of what was written, once it is closed.

    A thread writes and hashes one block while the next one's records are read: neither needs Python's lock.
    """

    def __init__(self, path: Path):
        """The file is made, or emptied."""
        self.file, self.digest = path.open("wb"), hashlib.sha256()
        self.thread = ThreadPoolExecutor(1)
        self.behind = self.thread.submit(self._write, b"")

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any, /) -> int:
        """Take a block. What its writing meets, a full disk, is raised at the next block or when the file is closed."""
        self.behind.result()
        self.behind = self.thread.submit(self._write, bytes(data))
        return len(data)

    def _write(self, block: bytes) -> None:
        self.file.write(block)
        self.digest.update(block)

    def close(self) -> None:
        """Return when all is written."""
        try:
            self.behind.result()
        finally:
            self.thread.shutdown()
            self.file.close()
            super().close()


def _rejected_line(number: int, data: bytes, reason: str) -> bytes:
    """One line of rejected/. `raw` gives the exact bytes back: json.loads(line)["raw"].encode("utf-8", "surrogateescape")."""
    entry = {"line": number, "reason": reason, "raw": data.removesuffix(b"\n").decode("utf-8", "surrogateescape")}
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(entry).encode() + b"\n"


def entry_of(dataset: Dataset, path: Path, counts: Counts, encoding: str, options: Options) -> dict[str, Any]:
    """Return a dataset's manifest entry."""
    entry: dict[str, Any] = {
        "read": counts.read,
        "kept": counts.kept,
        "skipped": dict(counts.skipped),
        "rejected": dict(counts.rejected),
    }
    entry |= {"sha256": counts.sha256, "bytes": counts.bytes, "file": f"{dataset.name}.jsonl"}
    entry |= {"paper": dataset.paper, "published": dataset.published, "encoding": encoding}
    entry |= {"odd_tails": counts.odd_tails, "control_tokens": counts.control_tokens, "columns": counts.columns}
    entry |= {"variant": options.variant(), "first_history_moved_to_top": counts.moved_to_top}
    if options.mask_personal_data:
        entry["masked"] = dict(counts.masked)
    entry["source"] = {"file": _short(dataset, path), "sha256": _source_sha256(path)}
    return entry


# ---- the outcome ----------------------------------------------------------------------------------------------------
def check_rejects(
    entries: dict[str, dict[str, Any]], sources: dict[Dataset, Path], staging: Path, args: argparse.Namespace
) -> None:
    """Raise CheckFailed, with the rejected lines in their place and all else as it was, if too much was rejected."""
    failed = [name for name, entry in entries.items() if _rejected_share(entry) > args.max_rejects]
    if not failed:
        return
    (args.out_dir / "rejected").mkdir(exist_ok=True)
    for name in failed:
        (staging / "rejected" / f"{name}.jsonl").replace(args.out_dir / "rejected" / f"{name}.jsonl")
    paths = {dataset.name: (dataset, path) for dataset, path in sources.items()}
    shares = ", ".join(
        f"{name} {_rejected_share(entries[name]):.2%}{_true_shape(*paths[name], entries[name])}" for name in failed
    )
    raise CheckFailed(
        f"more than {args.max_rejects:.2%} rejected: {shares}; {args.out_dir} stays as it was, and {args.out_dir}/rejected/ "
        "says why; --max-rejects allows more"
    )


def _true_shape(dataset: Dataset, path: Path, entry: dict[str, Any]) -> str:
    """Say what a file of which nearly all is rejected looks like instead; empty if nothing fits better."""
    if _rejected_share(entry) < 0.9:
        return ""
    if entry["rejected"].get("not UTF-8", 0) * 2 > entry["read"]:
        return " (neither UTF-8 nor GB18030; give its --encoding: big5?)"
    values = [value for value in first_values(path, entry["encoding"]) if not isinstance(value, NotKept)]
    layout, reason = likely_layout(values), max(entry["rejected"], key=entry["rejected"].get)
    says = f" ({reason}; its records are {shape_of(values[0])}" if values else f" ({reason}"
    return says + (f": layout {layout}, not {dataset.layout})" if layout not in (None, dataset.layout) else ")")


def publish(staging: Path, out_dir: Path, entries: dict[str, Any]) -> None:
    """Complete the staging folder with dataset_info.json and, last, manifest.json, and move all to its place."""
    order = {name: number for number, name in enumerate(load_datasets())}
    there = {
        name: entry
        for name, entry in entries.items()
        if any((folder / f"{name}.jsonl").is_file() for folder in (staging, out_dir))
    }
    manifest = dict(sorted(there.items(), key=lambda item: order.get(item[0], len(order))))
    write_json(staging / "dataset_info.json", {name: dataset_info(name, entry) for name, entry in manifest.items()})
    write_json(staging / "manifest.json", {"datasets": manifest})
    finish(staging, out_dir)


def finish(staging: Path, out_dir: Path) -> None:
    """Move a complete staging folder's files to their places, manifest.json last; an incomplete one has none to move."""
    manifest = staging / "manifest.json"
    if not manifest.is_file():
        return
    (out_dir / "manifest.json").unlink(missing_ok=True)  # while files are moved, none vouches for them
    (out_dir / "rejected").mkdir(exist_ok=True)
    for file in sorted(staging.rglob("*.json*")):
        if file != manifest:
            file.replace(out_dir / file.relative_to(staging))
    manifest.replace(out_dir / "manifest.json")
    shutil.rmtree(staging)


def dataset_info(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return LLaMA-Factory's description of one converted dataset; a column that isn't named is not read."""
    names = {theirs: ours for ours, theirs in COLUMNS.items()}
    columns = entry.get("columns") or ["prompt", "query", "response"]
    described = {"file_name": f"{name}.jsonl", "columns": {column: names[column] for column in columns}}
    return described | ({"ranking": True} if "chosen" in columns else {})


def _rejected_share(entry: dict[str, Any]) -> float:
    """Return the share of rejected among the records that should have been kept."""
    rejected = sum(entry["rejected"].values())
    return rejected / max(1, entry["kept"] + rejected)


def summary(name: str, entry: dict[str, Any]) -> str:
    """Return one line of counts for the terminal."""
    paper = "" if entry["paper"] is None else f", paper {entry['paper']:,}"
    reasons = "".join(f"; {count:,} {reason}" for reason, count in sorted(entry["rejected"].items()))
    marks = f"; {entry['control_tokens']:,} with a chat template's marks" if entry["control_tokens"] else ""
    encoding = "" if entry["encoding"] == UTF8 else f"; read as {entry['encoding']}"
    skipped, rejected = sum(entry["skipped"].values()), sum(entry["rejected"].values())
    return f"{name}: {entry['read']:,} read = {entry['kept']:,} kept + {skipped:,} skipped + {rejected:,} rejected{paper}{reasons}{marks}{encoding}"
