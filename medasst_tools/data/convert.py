"""Turn the raw corpora into a LLaMA-Factory dataset_dir in which every record is accounted for.

Run: `medasst convert --raw-dir data/raw --out-dir data/full [--workers 2]`; it reads `RAW/<corpus>/<file as its hub names it>`.

One raw record gives one Alpaca record, in order. What can't be used is in `rejected/`, and for each dataset
read = kept + skipped + rejected. New files are made in a folder of their own and moved to their places at the end,
`manifest.json` last: a killed or failed run leaves what was there, and one that was killed while it moved them is finished
by the next.
"""

import argparse
import contextlib
import hashlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from medasst_tools.data.decontamination import QuestionIndex, read_questions
from medasst_tools.data.filters import DUPLICATE, Cleaning, Dropper, prepare
from medasst_tools.data.layouts import LAYOUTS, Skipped, Trimmed
from medasst_tools.data.raw_files import (
    MAX_RECORD_BYTES,
    SPAN_BYTES,
    Block,
    Span,
    lines_before,
    open_raw,
    read_blocks,
    read_span,
    spans_of,
)
from medasst_tools.data.registry import RULES, Dataset, is_test, load_datasets
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import only_one_run, sha256_of, write_json

STAGING = ".converting"
OVERLONG_KEPT_BYTES = 4096  # of a record over MAX_RECORD_BYTES, for rejected/
# LLaMA-Factory's loader takes a column's type from the first 10 MiB: a dataset whose histories are all empty there fails
# to load when a later one isn't.
TYPED_BYTES = 8 << 20
NO_CLEANING = Cleaning()
PIECES_AHEAD = 8  # of a raw file given to the workers, so that they don't wait for each other
Piece = Span | list[Block]
COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}


class BlockResult(NamedTuple):
    """What a block of raw records gave; first_history is the place of the first record with history in `output`.

    keys: with --drop-duplicates of each kept record, else empty. masked: pieces of personal data by kind.
    """

    output: bytes
    read: int
    kept: int
    trimmed: int
    skipped: Counter
    rejected: list[tuple[int, str, bytes]]
    first_history: slice | None
    keys: list[int]
    masked: Counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "datasets",
        nargs="*",
        metavar="DATASET",
        help="as in dataset_info/corpora.yaml; default: all whose raw file is there",
    )
    parser.add_argument("--raw-dir", type=Path, required=True, help="holds <corpus>/<file as its hub names it>")
    parser.add_argument("--out-dir", type=Path, required=True, help="the LLaMA-Factory dataset_dir to write")
    parser.add_argument(
        "--max-rejects",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="exit 1 if more of a dataset was rejected (0.01)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the output is the same with any number (1)")
    parser.add_argument(
        "--drop-overlap",
        action="store_true",
        help="leave out training records whose question a test set has, or nearly",
    )
    parser.add_argument(
        "--drop-duplicates", action="store_true", help="leave out training records that an earlier one says already"
    )
    parser.add_argument(
        "--mask-personal-data",
        action="store_true",
        help="mask phone and ID numbers, e-mail, WeChat, QQ, web addresses",
    )


def run(args: argparse.Namespace) -> None:
    """Convert the datasets asked for and write the manifest."""
    if not 0 <= args.max_rejects <= 1:
        raise UserError(f"--max-rejects is {args.max_rejects}, must be a share between 0 and 1")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}, must be 1 or more")
    sources = choose_sources(args.datasets, args.raw_dir)
    for path in sources.values():
        with open_raw(path):
            pass  # an unusable file is named before any work is done
    with _locked(args.out_dir) as staging:
        entries = convert_all(sources, staging, args)
        publish(staging, args.out_dir, entries, keep_others=bool(args.datasets))
    if failed := [name for name, entry in entries.items() if _rejected_share(entry) > args.max_rejects]:
        shares = ", ".join(f"{name} {_rejected_share(entries[name]):.2%}" for name in failed)
        raise CheckFailed(
            f"more than {args.max_rejects:.2%} rejected: {shares}; see {args.out_dir}/rejected/, or allow it with --max-rejects"
        )


def convert_all(sources: dict[Dataset, Path], staging: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Convert every source into the staging folder; test sets first, because --drop-overlap needs them."""
    cleaning = Cleaning(args.drop_duplicates, args.mask_personal_data)
    dropper, entries = Dropper(), {}
    for dataset in sorted(sources, key=lambda dataset: not is_test(dataset.name)):  # stable: else the registry's order
        if args.drop_overlap and not is_test(dataset.name) and cleaning.index is None:
            cleaning = cleaning._replace(index=test_index(staging, args.out_dir))
        # a test set stays as it was published, but for masks
        asked = cleaning if not is_test(dataset.name) else Cleaning(mask_personal_data=args.mask_personal_data)
        entries[dataset.name] = convert_dataset(dataset, sources[dataset], staging, args.workers, asked, dropper)
        print(summary(dataset.name, entries[dataset.name]), flush=True)
    return entries


def test_index(*folders: Path) -> QuestionIndex:
    """Return the index of the test sets in these folders, the first that has one counts; UserError if none has any."""
    files = {path.stem: path for folder in reversed(folders) for path in folder.glob("*_test.jsonl")}
    if not files:
        raise UserError(f"--drop-overlap needs test sets, and none is among the raw files or in {folders[-1]}")
    return QuestionIndex({name: read_questions(path) for name, path in files.items()})


def choose_sources(names: list[str], raw_dir: Path) -> dict[Dataset, Path]:
    """Return {dataset: raw file} for the names, or for all whose raw file is there; UserError names what is missing."""
    known = load_datasets()
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no dataset {unknown[0]!r}; there are {', '.join(known)}")
    if not raw_dir.is_dir():
        raise UserError(
            f"no raw folder {raw_dir}: `medasst download` fetches it; it must hold <corpus>/<file>, "
            f"for example {raw_dir}/{_first_place(known)}"
        )
    chosen, missing = {}, []
    for dataset in [known[name] for name in dict.fromkeys(names)] or known.values():
        places = [raw_dir / dataset.corpus.name / file for file in dataset.files]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            missing.append(f"{dataset.name} needs {' or '.join(map(str, places))}, from {dataset.corpus.homepage}")
        else:
            chosen[dataset] = path
    if names and missing:
        raise UserError(
            f"no raw file: {'; '.join(missing)}; `medasst download {' '.join(names)}` fetches what hubs have"
        )
    if not chosen:
        raise UserError(f"no raw file in {raw_dir}: `medasst download` fetches them; for example {missing[0]}")
    return chosen


def _first_place(known: dict[str, Dataset]) -> str:
    dataset = next(iter(known.values()))
    return f"{dataset.corpus.name}/{dataset.files[0]}"


@contextlib.contextmanager
def _locked(out_dir: Path) -> Iterator[Path]:
    """Yield an empty folder in out_dir for the new files; it goes at the end, however that comes. One run at a time."""
    out_dir.mkdir(parents=True, exist_ok=True)
    staging = out_dir / STAGING
    busy = f"another run is writing {out_dir}; wait for it or give another --out-dir"
    with only_one_run(out_dir / ".lock", busy):
        finish(staging, out_dir)
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
        (staging / "rejected").mkdir(parents=True)
        try:
            yield staging
        finally:
            if not (staging / "manifest.json").exists():
                shutil.rmtree(staging, ignore_errors=True)


def convert_dataset(
    dataset: Dataset,
    path: Path,
    folder: Path,
    workers: int,
    cleaning: Cleaning = NO_CLEANING,
    dropper: Dropper | None = None,
) -> dict[str, Any]:
    """Convert one raw file to `folder/<name>.jsonl` and `folder/rejected/<name>.jsonl`; return its manifest entry."""
    output = folder / f"{dataset.name}.jsonl"
    read = kept = trimmed = 0
    skipped, rejected, masked = Counter(), Counter(), Counter()
    first_history, digest = None, hashlib.sha256()
    with (
        _pool(workers, cleaning) as pool,
        output.open("wb") as out,
        (folder / "rejected" / output.name).open("wb") as bad,
    ):
        source_sha256 = pool.submit(sha256_of, path)
        for result in _results(dataset, path, folder, pool):
            if result.keys:
                result = without_copies(result, dropper)
            if result.first_history and first_history is None:
                place = out.tell()
                first_history = slice(place + result.first_history.start, place + result.first_history.stop)
            out.write(result.output)
            digest.update(result.output)
            for line, reason, raw in result.rejected:
                bad.write(_rejected_line(line, reason, raw))
            read, kept, trimmed = read + result.read, kept + result.kept, trimmed + result.trimmed
            skipped.update(result.skipped)
            masked.update(result.masked)
            rejected.update(reason for _, reason, _ in result.rejected)
    moved = first_history is not None and first_history.start > TYPED_BYTES
    if moved:
        _move_to_top(output, first_history)
    entry = {"read": read, "kept": kept, "skipped": dict(skipped), "rejected": dict(rejected)}
    entry |= {"sha256": sha256_of(output) if moved else digest.hexdigest(), "bytes": output.stat().st_size}
    entry |= {"paper": dataset.paper, "published": dataset.published}
    entry["difference_from_paper"] = None if dataset.paper is None else kept - dataset.paper
    entry |= {
        "rules": {rule: RULES[rule] for rule in dataset.corpus.rules},
        "odd_tails": trimmed,
        "first_history_moved_to_top": moved,
    }
    entry["variant"] = cleaning.names()
    if cleaning.mask_personal_data:
        entry["masked"] = dict(masked)
    entry["source"] = {"file": f"{dataset.corpus.name}/{path.name}", "sha256": source_sha256.result()}
    return entry


def without_copies(result: BlockResult, dropper: Dropper) -> BlockResult:
    """Return the block without the records that were kept before, which are skipped."""
    output, first_history, copies = [], None, 0
    for line, record_key in zip(result.output.splitlines(keepends=True), result.keys, strict=True):
        if dropper.is_copy(record_key):
            copies += 1
            continue
        if first_history is None and result.first_history and orjson.loads(line)["history"]:
            start = sum(map(len, output))
            first_history = slice(start, start + len(line))
        output.append(line)
    skipped = result.skipped + Counter({DUPLICATE: copies})
    return result._replace(output=b"".join(output), kept=len(output), skipped=skipped, first_history=first_history)


def _pool(workers: int, cleaning: Cleaning) -> Executor:
    """Return what else works beside this process: a thread that hashes the raw file, or processes that also convert."""
    if workers == 1:
        _set_cleaning(cleaning)
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(workers, initializer=_set_cleaning, initargs=(cleaning,))


def _results(dataset: Dataset, path: Path, folder: Path, pool: Executor) -> Iterator[BlockResult]:
    """Yield what each piece of the raw file gave, in order, with a progress bar in bytes of the raw file."""
    from tqdm import tqdm

    tell: list = []
    with (
        open_raw(path, tell) as stream,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=dataset.name, disable=None) as bar,
    ):
        spans = spans_of(path, stream, dataset.corpus.layout)
        read, lines, counted = 0, 0, None
        pieces = spans or _grouped(read_blocks(stream, dataset.corpus.layout))
        for piece, result in _convert_pieces(pieces, dataset, folder, pool):
            if spans and result.rejected:
                before = read  # lines are numbered from 1 in each block, and each is a record read
                if piece.marker:  # an array's from 1 in each span
                    lines, counted = lines_before(piece, counted, lines), piece
                    before = lines
                result = result._replace(rejected=[(before + line, *rest) for line, *rest in result.rejected])
            read += result.read
            yield result
            bar.update((piece.end if spans else tell[0].tell()) - bar.n)


def _grouped(blocks: Iterator[Block]) -> Iterator[list[Block]]:
    """Yield several blocks at a time, about as much as a span has: another process is worth its while then."""
    group, size = [], 0
    for block in blocks:
        group.append(block)
        size += sum(map(len, block.records))
        if size >= SPAN_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _convert_pieces(
    pieces: Iterable[Piece], dataset: Dataset, folder: Path, pool: Executor
) -> Iterator[tuple[Piece, BlockResult]]:
    """Yield each piece with its result; other processes leave their output in files, which costs less than sending it."""
    layout = dataset.corpus.layout
    if isinstance(pool, ThreadPoolExecutor):
        for piece in pieces:
            for block in _blocks_of(piece):
                yield piece, convert_block(block, layout)
        return
    waiting: deque = deque()
    for number, piece in enumerate(pieces):
        part = folder / f"{dataset.name}.{number % (PIECES_AHEAD + 2)}.part"  # used again: new pages cost more
        waiting.append((piece, part, pool.submit(convert_piece, piece, layout, part)))
        if len(waiting) > PIECES_AHEAD:
            yield from _finished(*waiting.popleft())
    while waiting:
        yield from _finished(*waiting.popleft())


def _finished(piece: Piece, part: Path, future: Future) -> Iterator[tuple[Piece, BlockResult]]:
    try:
        results = future.result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
    with part.open("rb") as outputs:
        for size, result in results:
            yield piece, result._replace(output=outputs.read(size))


def convert_piece(piece: Piece, layout: str, part: Path) -> list[tuple[int, BlockResult]]:
    """Convert a piece of a raw file in a worker: the outputs go to `part`, their sizes and all else is returned."""
    results = []
    with part.open("r+b" if part.exists() else "wb") as outputs:
        for block in _blocks_of(piece):
            result = convert_block(block, layout)
            results.append((outputs.write(result.output), result._replace(output=b"")))
    return results


def _blocks_of(piece: Piece) -> Iterable[Block]:
    return read_span(piece) if isinstance(piece, Span) else piece


_CLEANING = [NO_CLEANING]  # a worker's own, set once: an index of test questions is too large to send with every block


def _set_cleaning(cleaning: Cleaning) -> None:
    _CLEANING[0] = cleaning


def convert_block(block: Block, layout: str) -> BlockResult:
    """Convert a block of raw records; a pure function, so that any number of processes gives the same bytes."""
    read, dumps, cleaning = LAYOUTS[layout], orjson.dumps, _CLEANING[0]
    output, skipped, rejected, keys, masked = [], Counter(), [], [], Counter()
    trimmed, first_history = 0, None
    cleans = bool(cleaning)
    for line, raw in zip(block.lines, block.records, strict=True):
        if len(raw) > MAX_RECORD_BYTES:
            reason = f"longer than {MAX_RECORD_BYTES} bytes, its first {OVERLONG_KEPT_BYTES} are kept here"
            rejected.append((line, reason, raw[:OVERLONG_KEPT_BYTES]))
            continue
        record = read(raw)
        if isinstance(record, dict):
            if cleans:
                prepared = prepare(record, cleaning)
                masked.update(prepared.masked)
                if prepared.reason:
                    skipped[prepared.reason] += 1
                    continue
                record = prepared.record
                if cleaning.drop_duplicates:
                    keys.append(prepared.key)
            if first_history is None and record.get("history"):
                start = sum(map(len, output))
                first_history = slice(start, start + len(dumps(record)) + 1)
            output.append(dumps(record, option=orjson.OPT_APPEND_NEWLINE))
            if type(record) is Trimmed:
                trimmed += 1
        elif isinstance(record, Skipped):
            skipped[str(record)] += 1
        elif not raw or raw.isspace():
            skipped["blank line"] += 1
        else:
            rejected.append((line, str(record), raw))
    return BlockResult(
        b"".join(output), len(block.records), len(output), trimmed, skipped, rejected, first_history, keys, masked
    )


def _rejected_line(line: int, reason: str, raw: bytes) -> bytes:
    """One line of rejected/. `raw` gives the exact bytes back: json.loads(line)["raw"].encode("utf-8", "surrogateescape")."""
    entry = {"line": line, "reason": reason, "raw": raw.decode("utf-8", "surrogateescape")}
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(entry).encode() + b"\n"


def _move_to_top(path: Path, place: slice) -> None:
    """Move one record of a JSON lines file to its first line; the others keep their order."""
    moved = path.with_suffix(".moved")
    with path.open("rb") as source, moved.open("wb") as target:
        source.seek(place.start)
        target.write(source.read(place.stop - place.start))
        source.seek(0)
        left = place.start
        while left:
            left -= target.write(source.read(min(left, 1 << 20)))
        source.seek(place.stop)
        shutil.copyfileobj(source, target, 1 << 20)
    moved.replace(path)


def publish(staging: Path, out_dir: Path, entries: dict[str, Any], keep_others: bool) -> None:
    """Complete the staging folder with dataset_info.json and, last, manifest.json, and move all to its place.

    keep_others: entries of datasets that were not asked for stay, as long as their file is there.
    """
    known, manifest_path = load_datasets(), out_dir / "manifest.json"
    others = {}
    if keep_others and manifest_path.is_file():
        earlier = json.loads(manifest_path.read_text(encoding="utf-8"))["datasets"]
        others = {name: entry for name, entry in earlier.items() if (out_dir / f"{name}.jsonl").is_file()}
    manifest = {name: (others | entries)[name] for name in known if name in others or name in entries}
    write_json(staging / "dataset_info.json", {name: dataset_info(known[name]) for name in manifest})
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


def dataset_info(dataset: Dataset) -> dict[str, Any]:
    """Return LLaMA-Factory's description of one converted dataset; a column that isn't named is not read."""
    history = {"history": "history"} if dataset.corpus.multi_turn else {}
    return {"file_name": f"{dataset.name}.jsonl", "columns": COLUMNS | history}


def _rejected_share(entry: dict[str, Any]) -> float:
    """Return the share of rejected among the records that should have been kept."""
    rejected = sum(entry["rejected"].values())
    return rejected / max(1, entry["kept"] + rejected)


def summary(name: str, entry: dict[str, Any]) -> str:
    """Return one line of counts for the terminal."""
    paper = "" if entry["paper"] is None else f", paper {entry['paper']:,} ({entry['difference_from_paper']:+,})"
    reasons = "".join(f"; {count:,} {reason}" for reason, count in sorted(entry["rejected"].items()))
    skipped, rejected = sum(entry["skipped"].values()), sum(entry["rejected"].values())
    return f"{name}: {entry['read']:,} read = {entry['kept']:,} kept + {skipped:,} skipped + {rejected:,} rejected{paper}{reasons}"
