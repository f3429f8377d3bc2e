"""Register a corpus of one's own: look at it, show what its records become, and write its entry into dataset_info/own.yaml.

Run: `medasst add-corpus FILE --name clinic [--layout qa] [--columns question=q,answer=a] [--test 0.05]`; then `make data`
converts it with the others into the datasets clinic_train and clinic_test, for an entry of experiments.yaml to name.
"""

import argparse
import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.config import nearest, read_yaml
from medasst_tools.data.layouts import LAYOUTS, likely_layout, reader, shape_of
from medasst_tools.data.raw_files import (
    CHINESE,
    LOOKED_AT,
    UTF8,
    NotKept,
    NotOneJson,
    first_values,
    is_chinese_encoding,
    read_records,
)
from medasst_tools.data.registry import OWN, REGISTRY, Corpus, load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import write_text

SHOWN = 3
HEADER = "# The corpora of one's own that `medasst add-corpus` was given; the form is corpora.yaml's. Not part of the project.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "file", type=Path, help="JSON lines, a JSON array, CSV, TSV or Parquet, packed or not; or a folder of them"
    )
    parser.add_argument("--name", required=True, help="of the corpus: its datasets are NAME_train and NAME_test")
    parser.add_argument("--layout", help=f"how a record is read, if not by its content: {', '.join(LAYOUTS)}")
    parser.add_argument("--columns", help="names of question and answer: question=q,answer=a")
    parser.add_argument("--test", help="a file with the test set, or the share of the records that shall be it (0.05)")
    parser.add_argument("--encoding", help="of the file, if it is neither UTF-8 nor GB18030")


def run(args: argparse.Namespace) -> None:
    """Look at the file, show it, and write the entry."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name):
        raise UserError(f"--name is {args.name!r}, must be lower-case letters, digits and _, a letter first")
    if not args.file.exists():
        raise UserError(f"no {args.file}; see that the name is right")
    if args.name in read_yaml(REGISTRY):
        raise UserError(f"--name is {args.name!r}, a corpus of {REGISTRY.name}; give another")
    taken = [one for one in load_datasets().values() if one.name in (f"{args.name}_train", f"{args.name}_test")]
    if taken and taken[0].corpus.name != args.name:
        raise UserError(f"{taken[0].name} is a dataset of {taken[0].corpus.name}; give another --name")
    columns, encoding = read_columns_option(args.columns), args.encoding or encoding_of(args.file)
    layout = args.layout or ("qa" if columns else guess_layout(args.file, encoding))
    if layout not in LAYOUTS:
        raise UserError(f"--layout is {layout!r}{nearest(layout, LAYOUTS)}; there are {', '.join(LAYOUTS)}")
    entry: dict[str, Any] = {"layout": layout} | ({"columns": columns} if columns else {})
    entry |= {"encoding": encoding} if encoding != UTF8 else {}
    entry["datasets"] = datasets_of(args)
    show(args.file, Corpus(args.name, **{key: value for key, value in entry.items() if key != "datasets"}), encoding)
    entries = (read_yaml(OWN) or {}) if OWN.is_file() else {}
    write_text(OWN, HEADER + yaml.safe_dump(entries | {args.name: entry}, allow_unicode=True, sort_keys=False))
    names = ", ".join(entry["datasets"])
    print(
        f"{OWN.relative_to(OWN.parent.parent)}: {args.name} ({names}). Next: `make data EXPERIMENT=...`, and name it in experiments.yaml"
    )


def read_columns_option(text: str | None) -> dict[str, str]:
    """Return {"question": ..., "answer": ...} of "question=q,answer=a"; {} without it."""
    if not text:
        return {}
    pairs = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    if set(pairs) != {"question", "answer"} or not all(pairs.values()):
        raise UserError(f"--columns is {text!r}, must be question=NAME,answer=NAME")
    return pairs


def datasets_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the entry's datasets; UserError if --test is neither a file nor a share."""
    train, test = f"{args.name}_train", f"{args.name}_test"
    file = str(args.file.resolve())
    if not args.test:
        return {train: {"files": [file]}}
    if Path(args.test).exists():
        return {train: {"files": [file]}, test: {"files": [str(Path(args.test).resolve())]}}
    try:
        share = float(args.test)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"--test is {args.test!r}, must be a file or a share between 0 and 1")
    return {train: {"files": [file], "share": share}, test: {"files": [file], "share": share, "test_part": True}}


def encoding_of(path: Path) -> str:
    """Return utf-8, or gb18030 if that is what a file is whose beginning isn't UTF-8."""
    try:
        values = first_values(path)
    except NotOneJson as error:
        if not error.not_utf8:
            raise
        values = [NotKept("not UTF-8")]
    strange = sum(isinstance(value, NotKept) and str(value) == "not UTF-8" for value in values)
    return CHINESE if strange * 2 >= len(values) > 0 and path.is_file() and is_chinese_encoding(path) else UTF8


def guess_layout(path: Path, encoding: str) -> str:
    """Return the layout that fits; UserError says what the records look like if none does."""
    found = first_values(path, encoding)
    values = [value for value in found if not isinstance(value, NotKept)]
    if layout := likely_layout(values):
        return layout
    if values:
        firsts = [reader(name)(value)[0] for name in LAYOUTS for value in values]
        reasons = Counter(str(first) for first in firsts if isinstance(first, NotKept))
        # "no answer", "not a list": of a layout that has other fields
        telling = [f": {reason}" for reason, _ in reasons.most_common() if not reason.startswith(("no ", "not "))]
        looks = shape_of(values[0]) + "".join(telling[:1])
        raise UserError(
            f"{path}: no layout fits its records ({looks}); give --layout, or --columns question=NAME,answer=NAME"
        )
    lost = [value for value in found if not value.by_design]
    why = (
        f"its lines are {lost[0]}; a table needs a header, and .csv or .tsv as its name's end"
        if lost
        else "it is blank"
    )
    raise UserError(f"{path} has no records: {why}")


def show(path: Path, corpus: Corpus, encoding: str) -> None:
    """Print the first records as they will be, and how many of the first thousand can't be used and why."""
    kept, reasons, read, records_of = 0, {}, 0, reader(corpus.layout, corpus.columns)
    for number, _, value in islice(read_records(path, corpus.layout, encoding), LOOKED_AT):
        for record in records_of(value):
            read += 1
            if isinstance(record, NotKept):
                if not record.by_design:
                    reasons.setdefault(str(record), number)
                continue
            kept += 1
            if kept <= SHOWN:
                print("\n".join(f"  {key}: {str(value)[:160]}" for key, value in record.items() if value), end="\n\n")
    lost = "; ".join(f"{reason} (first in line {line})" for reason, line in reasons.items())
    print(
        f"layout {corpus.layout}, {encoding}: {kept} of the first {read} records can be used"
        + (f"; not: {lost}" if lost else "")
    )
    if not kept:
        raise UserError(f"{path}: no record can be used as layout {corpus.layout}; give --layout or --columns")
