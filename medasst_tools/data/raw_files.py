"""Stream the records of a raw file, whatever it is packed in: JSON lines, a JSON array, tab-separated lines; plain, gzip or zip.

What a file is, its content says, not its name. Memory doesn't grow with the file: records come in small blocks. A plain
file of lines or an indented array can also be read in spans, each by another process.
"""

import gzip
import io
import json
import mmap
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import orjson

from medasst_tools.errors import UserError

BLOCK_BYTES = 1 << 17  # what fits in a core's own cache: with 4 MiB convert takes a third more processor time
SPAN_BYTES = 1 << 22
MAX_RECORD_BYTES = 1 << 24  # the longest answer of the corpora has 6,608 characters; a longer "line" is damage
MAX_EXPANSION = 200  # text packs 3 to 20 times; a zip bomb a thousand times and more
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BOM = b"\xef\xbb\xbf"
ARRAY_OPENING = re.compile(rb"\s*\[(\s*?\n([ \t]*))?(?=(\{)?)")


class Block(NamedTuple):
    """Some records of a file, in order, each with the number of the line (from 1) on which it starts.

    A record over MAX_RECORD_BYTES is cut there, one byte more than is allowed.
    """

    lines: list[int] | range
    records: list[bytes]


class Span(NamedTuple):
    """The lines of a plain file that begin in [start, end), or the elements of an indented array that stand there.

    marker: what stands before each element of the array and begins it; empty for lines.
    """

    path: Path
    start: int
    end: int
    first: bool
    marker: bytes = b""


@contextmanager
def open_raw(path: Path, tell: list | None = None) -> Iterator[BinaryIO]:
    """Open a raw file as its unpacked bytes, positioned after a UTF-8 BOM.

    tell: filled with the underlying file, whose position shows the progress. Raises UserError for an empty file, a Git LFS
    pointer, UTF-16, an archive without exactly one text file, a member whose path leaves the archive and a zip bomb.
    """
    with path.open("rb") as file:
        if tell is not None:
            tell.append(file)
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
                yield _after_bom(path, _Limited(unpacked, path, MAX_EXPANSION * path.stat().st_size + BLOCK_BYTES))
        else:
            yield _after_bom(path, file)


@contextmanager
def _zip_member(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole zip archive ({error}); get it again") from None
    with archive:
        members = [info for info in archive.infolist() if not info.is_dir() and "__MACOSX" not in info.filename]
        if unsafe := [info.filename for info in members if leaves_archive(info.filename)]:
            raise UserError(
                f"{path} holds {unsafe[0]!r}, a path that leaves the archive; it is not the published file"
            )
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
        except (
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
        ) as error:  # a password, an unknown method, damage
            raise UserError(f"{path}: {error}; unpack it and give the text file") from None
        with member:
            yield _Limited(member, path, info.file_size)


def leaves_archive(name: str) -> bool:
    """Say whether a zip member's name is absolute or climbs out of the folder that it would be unpacked in."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or not parts[0] or ":" in parts[0]


class _Limited(io.RawIOBase):
    """A stream that ends with an error after `limit` unpacked bytes or at damage in the packed ones."""

    def __init__(self, stream: BinaryIO, path: Path, limit: int):
        self.stream, self.path, self.left = stream, path, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self.stream.read(len(buffer))
        except (EOFError, OSError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(f"{self.path} is damaged ({error}); get it again") from None
        self.left -= len(data)
        if self.left < 0:
            raise UserError(f"{self.path} unpacks to far more than its size: a zip bomb?")
        buffer[: len(data)] = data
        return len(data)


def _after_bom(path: Path, stream: BinaryIO) -> BinaryIO:
    buffered = io.BufferedReader(stream, 1 << 20) if isinstance(stream, io.RawIOBase) else stream
    head = buffered.peek(4)[:4]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 {path.name}")
    if head.startswith(BOM):
        buffered.read(len(BOM))
    return buffered


def read_blocks(stream: BinaryIO, layout: str) -> Iterator[Block]:
    """Yield the records of an opened raw file; JSON layouts are an array if the first byte says so, else lines."""
    if is_array(stream, layout):
        yield from read_array(stream)
    else:
        yield from read_lines(stream)


def spans_of(path: Path, stream: BinaryIO, layout: str) -> list[Span] | None:
    """Return the spans of an opened raw file, in order; None if it is packed, or an array that isn't indented."""
    if not isinstance(stream, io.BufferedReader) or isinstance(stream.raw, _Limited):
        return None
    if is_array(stream, layout):
        return _array_spans(path, stream)
    size, start = path.stat().st_size, stream.tell()  # after a BOM
    places = range(start, size, SPAN_BYTES)
    return [Span(path, place, min(place + SPAN_BYTES, size), place == start) for place in places]


def _array_spans(path: Path, stream: BinaryIO) -> list[Span] | None:
    opening = ARRAY_OPENING.match(stream.peek(1 << 16))
    if opening[1] is None or not opening[3]:
        return None
    marker, place = b"\n" + opening[2] + b"{", stream.tell() + opening.end()
    spans: list[Span] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while place < len(data):
            found = data.find(marker, place + SPAN_BYTES)
            end = len(data) if found < 0 else found
            spans.append(Span(path, place, end, not spans, marker))
            place = end + len(marker) - 1  # at the element's brace
    return spans


def lines_before(span: Span, counted: Span | None, lines: int) -> int:
    """Return how many lines end before the span; `lines` end before `counted`, a span before it."""
    place = counted.start if counted else 0
    with span.path.open("rb") as file:
        file.seek(place)
        while data := file.read(min(BLOCK_BYTES, span.start - file.tell())):
            lines += data.count(b"\n")
    return lines


def read_span(span: Span) -> Iterator[Block]:
    """Yield a span's records. Nobody knows how many lines were before: an array's are numbered from 1, lines in each block."""
    with span.path.open("rb") as file:
        if span.marker:
            file.seek(span.start)
            at_end = span.end == span.path.stat().st_size
            read = lambda size: file.read(min(size, span.end - file.tell()))  # noqa: E731
            yield from _indented_elements(read, 1, span.marker, closes=at_end)
            return
        file.seek(span.start if span.first else span.start - 1)
        if not span.first:  # the end of a line that began before, or just its newline
            while not file.readline(min(BLOCK_BYTES, span.end - file.tell())).endswith(b"\n"):
                if file.tell() >= span.end:
                    return
        for block in read_lines(file, span.end):
            yield block._replace(lines=range(1, len(block.records) + 1))


def is_array(stream: BinaryIO, layout: str) -> bool:
    """Say whether the opened raw file is a JSON array, by its first byte that isn't white space."""
    return layout != "columns" and stream.peek(1 << 16).lstrip()[:1] == b"["


def read_lines(stream: BinaryIO, end: int | None = None) -> Iterator[Block]:
    """Yield lines without their newline: all that follow, or those that begin before `end`."""
    number = 1
    while data := stream.read(BLOCK_BYTES if end is None else max(0, min(BLOCK_BYTES, end - stream.tell()))):
        if not data.endswith(b"\n"):
            rest = stream.readline(MAX_RECORD_BYTES + 1)
            data += rest
            if len(rest) > MAX_RECORD_BYTES and not rest.endswith(b"\n"):
                while (more := stream.readline(BLOCK_BYTES)) and not more.endswith(b"\n"):
                    pass  # the rest of a line that is rejected for its length
        records = data.split(b"\n")
        if data.endswith(b"\n"):
            records.pop()
        records[-1] = records[-1][: MAX_RECORD_BYTES + 1]
        yield Block(range(number, number + len(records)), records)
        number += len(records)


def read_array(stream: BinaryIO) -> Iterator[Block]:
    """Yield the elements of a JSON array; one that is broken spoils only itself as far as its neighbours can be told.

    An indented array, as json.dump writes it, is split where its elements start; any other is decoded one by one.
    """
    opening = ARRAY_OPENING.match(stream.peek(1 << 16))
    stream.read(opening.end())
    line = 1 + opening[0].count(b"\n")
    if opening[1] is not None and opening[3]:
        yield from _indented_elements(stream.read, line, b"\n" + opening[2] + b"{")
    else:
        yield from _decoded_elements(stream, line)


def _indented_elements(read: Callable[[int], bytes], line: int, start: bytes, closes: bool = True) -> Iterator[Block]:
    rest, ended, overlong = b"", False, False
    opening = b""  # what `split` takes away from every element but the first
    while not ended:
        data = read(BLOCK_BYTES)
        ended = not data
        parts = (rest + data).split(start)
        rest = b"" if ended else parts.pop()
        if overlong and parts:  # what is left of an element that was cut already
            line += parts.pop(0).count(b"\n") + 1
            overlong = False
        lines, records = [], []
        if ended and parts and closes:
            parts[-1] = parts[-1].rstrip().removesuffix(b"]")
        for part in parts:
            for place, record in _elements_of_part((opening + part).rstrip().removesuffix(b","), line):
                lines.append(place)
                records.append(record[: MAX_RECORD_BYTES + 1])
            line, opening = line + part.count(b"\n") + 1, b"{"
        if len(rest) > MAX_RECORD_BYTES:
            if not overlong:
                lines.append(line)
                records.append((opening + rest)[: MAX_RECORD_BYTES + 1])
            line += rest[:-64].count(b"\n")
            rest, overlong, opening = rest[-64:], True, b"{"  # a start may lie across two blocks
        if records:
            yield Block(lines, records)


def _elements_of_part(part: bytes, line: int) -> Iterable[tuple[int, bytes]]:
    """Usually one; more where an element isn't an object or is indented otherwise, as two are in CMtMedQA's test file."""
    if (part.endswith(b"}") and part.count(b"}") == 1) or _is_json(part):
        return [(line, part)]
    return [pair for block in _decoded_elements(io.BytesIO(part), line) for pair in zip(*block, strict=True)]


def _is_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


def _decoded_elements(stream: BinaryIO, line: int) -> Iterator[Block]:
    decode = json.JSONDecoder().raw_decode
    separator, neighbour = re.compile(r"[\s,]*"), re.compile(r"\}\s*,(?=\s*\{)")
    lines, records, size = [], [], 0
    text, position, ended = "", 0, False
    while True:
        gap = separator.match(text, position)
        line, position = line + gap[0].count("\n"), gap.end()
        end = None
        if position < len(text):
            if text[position] == "]" and not text[position + 1 :].strip() and ended:
                break
            try:
                _, end = decode(text, position)
            except (json.JSONDecodeError, RecursionError):
                if ended or len(text) - position > MAX_RECORD_BYTES:
                    found = neighbour.search(text, position)
                    end = found.start() + 1 if found else len(text)
            if end == len(text) and not ended:
                end = None  # a number or a word may go on in the next block
        if end is None:
            if ended:
                break
            data = stream.read(BLOCK_BYTES)
            ended = not data
            text, position = text[position:] + data.decode("utf-8", "surrogateescape"), 0
            continue
        raw = text[position:end].encode("utf-8", "surrogateescape")
        lines.append(line)
        records.append(raw[: MAX_RECORD_BYTES + 1])
        line, position, size = line + raw.count(b"\n"), end, size + len(raw)
        if size > BLOCK_BYTES:
            yield Block(lines, records)
            lines, records, size = [], [], 0
    if records:
        yield Block(lines, records)
