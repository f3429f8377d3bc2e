"""Read the records of a raw file, whatever it is packed in: JSON lines, a JSON array, an object around it, CSV, TSV, Parquet,
plain text columns; plain, gzip or zip; a folder of such files.

What a file is, its content says, not its name (but for .csv, .tsv and .parquet).
"""

import codecs
import csv
import gzip
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import orjson

from medasst_tools.errors import UserError
from medasst_tools.files import LFS_POINTER

MAX_RECORD_BYTES = 1 << 24  # the longest answer of the corpora has 6,608 characters; a longer "line" is damage
PEEKED = 1 << 20  # bytes that are looked at to tell a container
LOOKED_AT = 1000  # records by which a file's layout and encoding are told
MAX_EXPANSION = 200  # text packs 3 to 20 times; a zip bomb a thousand times and more
BOM = b"\xef\xbb\xbf"
UTF8, CHINESE = "utf-8", "gb18030"
PRIVATE_USE = re.compile("[\ue000-\uf8ff]")
WIDE = (  # the longer marks first: a UTF-32 one begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
PACKED = {  # how files begin that aren't text, also when they lie in a gzip or zip that was unpacked here
    b"\xfd7zXZ\0": "packed with xz",
    b"BZh": "packed with bzip2",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x1f\x8b": "packed with gzip more than once",
    b"PK\x03\x04": "a zip archive in another",
    b"PAR1": "Parquet under another name",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"%PDF": "a PDF",
}
# keys whose list of objects is one record's dialogue, not a wrapped array of records
DIALOGUE_KEYS = ("messages", "conversations", "conversation", "history")
OPENS_OBJECTS = re.compile(rb'\{\s*"([^"]*)"\s*:\s*\[\s*(?:\{|$)')


class NotKept(Exception):
    """Why a raw record gives no record: by design (skipped), or because it is bad input (rejected)."""

    def __init__(self, reason: str, by_design: bool = False):
        super().__init__(reason)
        self.by_design = by_design


# The line a raw record starts on (of an array or a table, its number), its bytes (a line's with its end), its parsed value or
# why there is none. A plain tuple: making a million named ones takes as long as parsing half of them.
Raw = tuple[int, bytes, Any]


def read_records(path: Path, layout: str = "", encoding: str = UTF8) -> Iterator[Raw]:
    """Yield the records of a file or a folder of files. UserError if it can't be read at all; blank lines are records too."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise UserError(f"{path} is an empty folder; it must hold the corpus's files")
        for file in files:
            yield from read_records(file, layout, encoding)
        return
    kind = path.name.removesuffix(".gz").removesuffix(".zip").rpartition(".")[2].lower()
    if kind == "parquet":
        yield from _parquet(path)
        return
    with open_raw(path) as stream:
        if kind in ("csv", "tsv") and layout != "columns":
            yield from _table(path, stream, encoding)
        elif layout == "columns":
            yield from _lines(stream, partial(_columns, encoding=encoding), encoding)
        elif is_one_value(stream):
            yield from _array(path, stream, encoding)
        else:
            yield from _lines(stream, _json_parser(encoding), encoding)


def first_values(path: Path, encoding: str = UTF8) -> list[Any]:
    """Return what the first records of a file or folder hold, or why they hold nothing."""
    return [value for _, _, value in islice(read_records(path, "", encoding), LOOKED_AT)]


# ---- opening --------------------------------------------------------------------------------------------------------
@contextmanager
def open_raw(path: Path) -> Iterator[io.BufferedReader]:
    """Open a raw file as its unpacked bytes, positioned after a UTF-8 BOM.

    Raises UserError for an empty file, a Git LFS pointer, UTF-16, an archive without exactly one text file, a member whose
    path leaves the archive, damage and a zip bomb.
    """
    with path.open("rb", buffering=PEEKED) as file:
        head = file.read(256)
        file.seek(0)
        if not head:
            raise UserError(f"{path} is empty; get it again")
        if head.startswith(LFS_POINTER):
            raise UserError(
                f"{path} is a Git LFS pointer, not the file; run `git lfs pull` or download the file itself"
            )
        if head.startswith(b"PK\x03\x04"):
            with _zip_member(path, file) as member:
                yield _after_bom(path, member)
        elif head.startswith(b"\x1f\x8b"):
            with gzip.open(file) as unpacked:
                yield _after_bom(path, _Limited(unpacked, path, MAX_EXPANSION * path.stat().st_size + (1 << 17)))
        else:
            yield _after_bom(path, file)


@contextmanager
def _zip_member(path: Path, file: BinaryIO) -> Iterator[io.RawIOBase]:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole zip archive ({error}); get it again") from None
    with archive:
        members = [info for info in archive.infolist() if not info.is_dir() and "__MACOSX" not in info.filename]
        if unsafe := [info.filename for info in members if leaves_archive(info.filename)]:
            raise UserError(
                f"{path} holds {unsafe[0]!r}, a path that leaves the archive; it is not the published file"
            )
        if any(info.filename == "[Content_Types].xml" for info in members):
            raise UserError(f"{path} is an Excel or Word file; save it as CSV in UTF-8")
        if len(members) != 1:
            names = ", ".join(info.filename for info in members[:5]) or "nothing"
            raise UserError(f"{path} must hold one text file, holds {names}; unpack it and give the text file")
        info = members[0]
        if info.file_size > MAX_EXPANSION * max(info.compress_size, 1 << 14):
            raise UserError(
                f"{path}: {info.filename} unpacks to {info.file_size} bytes, {MAX_EXPANSION} times its size: a zip bomb?"
            )
        try:
            member = archive.open(info)
        except (RuntimeError, NotImplementedError, zipfile.BadZipFile, OSError) as error:  # a password, damage...
            raise UserError(f"{path}: {error}; unpack it and give the text file") from None
        with member:
            yield _Limited(member, path, info.file_size)


def leaves_archive(name: str) -> bool:
    """Say whether a zip member's name is absolute or climbs out of the folder that it would be unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or ":" in parts[0]


class _Limited(io.RawIOBase):
    """A stream that ends with an error after `limit` unpacked bytes or at damage in the packed ones."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, path: Path, limit: int):
        self.stream, self.path, self.left = stream, path, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (EOFError, OSError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            raise UserError(f"{self.path} is damaged ({error}); get it again") from None
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.path} unpacks to far more than its size: a zip bomb?")
        buffer[: len(data)] = data
        return len(data)


def _after_bom(path: Path, stream: Any) -> io.BufferedReader:
    buffered = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, PEEKED)
    head = buffered.peek(512)[:512]
    if not head:
        raise UserError(f"{path} is empty; get it again")
    if wide := next((name for mark, name in WIDE if head.startswith(mark)), _wide_ascii(head[:4])):
        raise UserError(f"{path} is {wide}; convert it first: iconv -f {wide} -t UTF-8 {path.name}")
    packed = next((name for magic, name in PACKED.items() if head.startswith(magic)), "")
    if packed or head[257:262] == b"ustar":
        raise UserError(f"{path} is {packed or 'a tar archive'}; unpack it and give the text file in it")
    while buffered.peek(len(BOM)).startswith(BOM):  # two programs may have written one each
        buffered.read(len(BOM))
    return buffered


def _wide_ascii(head: bytes) -> str:
    """Name the encoding without a mark in which a file begins with ASCII, {" or [{ say; empty if it is none of these."""
    width = {2: "UTF-16", 3: "UTF-32"}.get(head.count(b"\0"))
    return f"{width}{'BE' if head[0] == 0 else 'LE'}" if width else ""


def is_chinese_encoding(path: Path) -> bool:
    """Say whether a file that isn't UTF-8 is GB18030 (GBK, GB2312) from its first byte to its last.

    Big5's bytes can mostly be read as GB18030 too; then a tenth of the signs and more are of the private use area.
    """
    decoder, signs, private = codecs.getincrementaldecoder(CHINESE)(), 0, 0
    with open_raw(path) as stream:
        try:
            while data := stream.read(PEEKED):
                text = decoder.decode(data)
                signs, private = signs + len(text), private + len(PRIVATE_USE.findall(text))
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return private * 50 <= signs


# ---- containers -----------------------------------------------------------------------------------------------------
def is_one_value(stream: io.BufferedReader) -> bool:
    """Say whether an opened JSON file is one value, an array or an object around one, and not a value a line."""
    head = stream.peek(PEEKED).lstrip()
    first, _, rest = head.partition(b"\n")
    try:
        value = orjson.loads(first)
    except orjson.JSONDecodeError:  # broken across lines, longer than what is looked at, or of another encoding
        opened = OPENS_OBJECTS.match(first)
        wrapped = opened is not None and opened[1].decode(UTF8, "replace") not in DIALOGUE_KEYS
        return wrapped or head[:1] == b"[" or first.strip() == b"{"
    if rest.strip():
        return False
    if isinstance(value, list):  # not one pair of texts, though
        return not value or not all(isinstance(element, str) for element in value)
    return isinstance(value, dict) and (bool(_lists_of_records(value)) or _is_by_id(value))


def _lists_of_records(value: dict[str, Any]) -> dict[str, list]:
    """Return the lists of objects in an object, but for one record's dialogue."""
    return {
        key: inner
        for key, inner in value.items()
        if key not in DIALOGUE_KEYS and isinstance(inner, list) and inner and isinstance(inner[0], dict)
    }


def _is_by_id(value: dict[str, Any]) -> bool:
    """Say whether an object holds records under their ids."""
    return len(value) > 1 and all(isinstance(inner, dict) for inner in value.values())


def _lines(stream: BinaryIO, parse: Callable[[bytes], Any], encoding: str) -> Iterator[Raw]:
    """Yield the lines with their ends, each as `parse` reads it, or why that fails: with a ValueError."""
    for number, line in enumerate(iter(partial(stream.readline, MAX_RECORD_BYTES + 1), b""), 1):
        if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
            while (more := stream.readline(1 << 17)) and not more.endswith(b"\n"):
                pass  # the rest of a line that is rejected for its length
            reason = f"longer than {MAX_RECORD_BYTES} bytes, its first 4096 are kept here"
            yield number, line[:4096], NotKept(reason)
            continue
        try:
            value = parse(line)
        except ValueError:
            value = _with_nan(line, encoding) or _fault(line, encoding)
        yield number, line, value


def _fault(line: bytes, encoding: str) -> NotKept:
    """Say why a line has no record."""
    if not line.strip():
        return NotKept("blank line", by_design=True)
    return NotKept("not JSON" if _decodes(line, encoding) else f"not {'UTF-8' if encoding == UTF8 else encoding}")


def _with_nan(data: bytes, encoding: str) -> Any:
    """Return JSON with the NaN that Python's json writes where pandas had nothing: as None. None if it isn't that either."""
    if b"NaN" not in data:
        return None
    try:
        return json.loads(data.decode(encoding), parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def _json_parser(encoding: str) -> Callable[[bytes], Any]:
    return orjson.loads if encoding == UTF8 else lambda data: orjson.loads(data.decode(encoding))


def _decodes(data: bytes, encoding: str = UTF8) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _columns(line: bytes, encoding: str) -> list[str]:
    """Split on the tab itself: csv's quoting swallows lines."""
    if not line.strip():
        raise ValueError
    return line.rstrip(b"\r\n").decode(encoding).split("\t")


def _array(path: Path, stream: BinaryIO, encoding: str) -> Iterator[Raw]:
    """Yield the elements of one JSON value; UserError says where it is broken. Each record's line is its number in the array."""
    text = stream.read()
    try:
        value = _json_parser(encoding)(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not {encoding} at byte {error.start}; give the right --encoding") from None
    except (orjson.JSONDecodeError, RecursionError) as error:
        if (value := _with_nan(text, encoding)) is None:
            raise NotOneJson(path, text, error) from None
    if isinstance(value, dict):
        value = _records_in(path, value)
    for number, element in enumerate(value, 1):
        data = orjson.dumps(element)
        long = len(data) > MAX_RECORD_BYTES
        yield number, data, NotKept(f"longer than {MAX_RECORD_BYTES} bytes") if long else element


def _records_in(path: Path, value: dict[str, Any]) -> list[Any]:
    """Return the records in an object around them; UserError if it has several lists, of which one alone would be read."""
    lists = _lists_of_records(value)
    if len(lists) > 1:
        raise UserError(
            f"{path} holds several lists of records: {', '.join(lists)}; write each into a file of its own"
        )
    if lists:
        return next(iter(lists.values()))
    if _is_by_id(value):
        return list(value.values())
    return next((inner for inner in value.values() if isinstance(inner, list)), [value])


class NotOneJson(UserError):
    """A JSON array that can't be read; `not_utf8` says that its bytes are no UTF-8."""

    def __init__(self, path: Path, text: bytes, error: Exception):
        """Say where it is broken."""
        self.not_utf8 = not _decodes(text)
        place = ""
        if isinstance(error, orjson.JSONDecodeError) and not self.not_utf8:
            place = f", line {error.lineno}, column {error.colno}"
        what = "is not UTF-8" if self.not_utf8 else f"is broken JSON{place}: {' '.join(str(error).split())[:120]}"
        super().__init__(f"{path} {what}; mend that place, get the file again, or write one record a line")


def _table(path: Path, stream: io.BufferedReader, encoding: str) -> Iterator[Raw]:
    """Yield the rows of a table with a header as objects; its columns are parted by what the header has most of."""
    header = stream.peek(PEEKED).partition(b"\n")[0].decode("latin-1")
    delimiter = max(",\t;", key=header.count)
    csv.field_size_limit(MAX_RECORD_BYTES)
    text = io.TextIOWrapper(stream, encoding, errors="surrogateescape" if encoding == UTF8 else "strict", newline="")
    rows = csv.DictReader(text, delimiter=delimiter)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, after row {number}: {error}; mend that place") from None
        if row is None:
            return
        number += 1
        more = row.pop(None, None)
        data = delimiter.join(str(value) for value in [*row.values(), *(more or [])] if value is not None)
        data = data.encode(UTF8, "surrogateescape")
        whole = more is None and None not in row.values()
        value = (
            row
            if whole
            else NotKept(f"not {len(row)} columns")
            if data.strip()
            else NotKept("blank line", by_design=True)
        )
        yield number, data, value if _decodes(data) else NotKept("not UTF-8")


def _parquet(path: Path) -> Iterator[Raw]:
    """Yield the rows of a Parquet file, read by `datasets`."""
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset("parquet", data_files=str(path), split="train", streaming=True), 1):
            yield number, orjson.dumps(row, default=str), row
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} can't be read as Parquet: {' '.join(str(error).split())[:200]}") from None
