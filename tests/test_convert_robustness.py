"""medasst convert in bad conditions: containers and block borders anywhere, a full disk, a kill at any moment, killed workers."""

import gzip
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_convert import PIECES, QA, converted, dump, run_convert, write_raw

from medasst_tools import cli
from medasst_tools.data import convert, raw_files
from medasst_tools.data.layouts import LAYOUTS
from medasst_tools.data.raw_files import Block, Span, lines_before, open_raw, read_blocks, read_span, spans_of

LINES = b"\n".join(dump(QA | {"output": f"答{number}。"}) for number in range(3))


# ---- the rest of the table of bad input: what a whole file gives; test_convert.py has the single records --------------


@pytest.mark.parametrize(
    ("dataset", "data", "outputs", "skipped", "rejected"),
    [
        ("medchatzh_train", LINES[:-4], ["答0。", "答1。"], {}, {"not UTF-8": 1}),  # a truncated last line
        ("medchatzh_train", LINES[:-1], ["答0。", "答1。"], {}, {"not JSON": 1}),
        ("medchatzh_train", b"\n\n", [], {"blank line": 2}, {}),
        ("medchatzh_train", b" ", [], {"blank line": 1}, {}),
        ("medchatzh_train", b"[]", [], {}, {}),
        ("medchatzh_train", b"[", [], {}, {}),
        ("medchatzh_train", b"\xef\xbb\xbf" + LINES, ["答0。", "答1。", "答2。"], {}, {}),
        ("medchatzh_train", b"\xef\xbb\xbf[" + LINES.replace(b"\n", b",") + b"]", ["答0。", "答1。", "答2。"], {}, {}),
        ("medchatzh_train", dump(QA).decode().encode("utf-16-le"), [], {}, {"not UTF-8": 1}),  # without its BOM
        ("medchatzh_train", b"\x00" * 5000, [], {}, {"not JSON": 1}),
        ("medchatzh_train", LINES + b"\n\x00\x00\n" + LINES, ["答0。", "答1。", "答2。"] * 2, {}, {"not JSON": 1}),
        ("medchatzh_train", b'{"instruction": "a\\u0000b", "output": "c"}', ["c"], {}, {}),  # an escaped NUL is text
        ("medchatzh_train", b'{"instruction": "\\udc00", "output": "c"}', [], {}, {"not JSON": 1}),
        ("medchatzh_train", b"\xed\xa0\x80", [], {}, {"not UTF-8": 1}),  # a surrogate in UTF-8's manner
        # a question with no positive answer gives no record; one with two gives both
        ("webmedqa_train", "科\t0\t1\t问\t甲\n科\t0\t1\t问\t乙\n科\t1\t2\t问\t丙\n科\t1\t2\t问\t丁".encode(), ["丙", "丁"], {"label 0": 2}, {}),
        ("webmedqa_train", "科\t１\t1\t问\t甲\n科\t\t1\t问\t乙\n科\t-1\t1\t问\t丙".encode(), [], {}, {"label is neither 0 nor 1": 3}),
        ("webmedqa_train", b"a\t1\t1\tq\x00\ta\x00", ["a\x00"], {}, {}),
        ("webmedqa_train", '科\t1\t1\t"问\t甲"\n科\t1\t2\t"\t"乙'.encode(), ['甲"', '"乙'], {}, {}),
        ("cmtmedqa_test", json.dumps([{"instruct": "问", "output": "答"}, QA]).encode(), ["答", QA["output"]], {}, {}),
    ],
)  # fmt: skip
def test_a_whole_file(tmp_path, dataset, data, outputs, skipped, rejected):
    records, lines, entry = converted(tmp_path, dataset, data)
    assert [record["output"] for record in records] == outputs
    assert (entry["skipped"], entry["rejected"]) == (skipped, rejected)
    for line in lines:
        assert line["raw"].encode("utf-8", "surrogateescape") in data


def test_utf_16_without_a_bom_is_not_quietly_nothing(tmp_path, capsys):
    write_raw(tmp_path / "raw", "medchatzh_train", LINES.decode().encode("utf-16-be"))
    words = ["convert", "--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out")]
    assert cli.main(words) == 1 and "100.00%" in capsys.readouterr().err


def test_a_huge_line_costs_no_memory(tmp_path):
    """A line of 300 MB; the peak is the process's own, which ru_maxrss of a child of a large process isn't."""
    path = write_raw(tmp_path / "raw", "medchatzh_train", b"")
    with path.open("wb") as file:
        file.write(dump(QA) + b'\n{"instruction": "')
        for _ in range(300):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + dump(QA))
    code = (
        "import sys; from pathlib import Path; from medasst_tools import cli; status = cli.main(sys.argv[1:]);"
        "print(Path('/proc/self/status').read_text()); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *words_for(tmp_path, "--max-rejects", "1")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 read = 2 kept + 0 skipped + 1 rejected" in run.stdout
    assert int(re.search(r"VmHWM:\s*(\d+) kB", run.stdout)[1]) < 200_000


# ---- bytes, containers, borders -----------------------------------------------------------------------------------------


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, 1)


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/raw.txt", data)
    return buffer.getvalue()


class Total:
    """What all blocks of a file gave together."""

    def __init__(self, blocks, layout: str, relative_lines: bool = False):
        self.read, self.output, self.skipped, self.rejected = 0, b"", Counter(), []
        for block in blocks:
            result = convert.convert_block(block, layout)
            before = self.read if relative_lines else 0
            self.rejected += [(line + before, reason, raw) for line, reason, raw in result.rejected]
            self.read, self.output, self.skipped = (
                self.read + result.read,
                self.output + result.output,
                self.skipped + result.skipped,
            )
            if result.first_history:
                assert json.loads(result.output[result.first_history])["history"]

    def accounts(self) -> bool:
        return self.read == self.output.count(b"\n") + self.skipped.total() + len(self.rejected)


def blocks_of(spans: list[Span]) -> Iterator[Block]:
    """Yield the blocks of all spans; an array's with the lines that they have in the file."""
    for span in spans:
        before = lines_before(span, None, 0) if span.marker else 0
        for block in read_span(span):
            yield block._replace(lines=[line + before for line in block.lines])


def in_every_way(folder: Path, data: bytes, layout: str) -> list[Total]:
    """Read the same bytes plain, packed, in spans, and with block borders everywhere."""
    totals, path = [], folder / "raw"
    for pack in (bytes, gzipped, zipped):
        path.write_bytes(pack(data))
        for block_bytes in (1 << 18, 50, 7):
            with mock.patch.object(raw_files, "BLOCK_BYTES", block_bytes):
                with open_raw(path) as stream:
                    totals.append(Total(read_blocks(stream, layout), layout))
                for span_bytes in (40, 3):
                    with mock.patch.object(raw_files, "SPAN_BYTES", span_bytes), open_raw(path) as stream:
                        if spans := spans_of(path, stream, layout):
                            assert pack is bytes
                            totals.append(Total(blocks_of(spans), layout, relative_lines=not spans[0].marker))
    return totals


RECORDS = st.sampled_from(
    [
        QA, QA | {"history": [["一", "二"]]}, QA | {"output": "", "extra": [{"a": "}, {"}]}, {"instruct": "问", "output": "答"},
        {"questions": [["问一", "问二"]], "answers": ["答"]}, {"data": ["问：一", "答：二", "问：三", "答：四"]}, {"data": ["问：一"]}, {}, 5, None, "x", [],
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(PIECES, RECORDS.map(dump), st.binary(max_size=12)), min_size=1, max_size=12),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from([b"", b"\n", b"\r\n", b",\n    "]),
)
def test_any_bytes_in_any_container_with_borders_anywhere(tmp_path_factory, pieces, layout, joint):
    data = joint.join(pieces)
    if not data or data[:2] in (b"PK", b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"):
        data = b"x" + data
    totals = in_every_way(tmp_path_factory.mktemp("raw"), data, layout)
    assert all(total.accounts() for total in totals)
    if not data.removeprefix(raw_files.BOM).lstrip().startswith(b"[") or layout == "columns":
        text = data.removeprefix(raw_files.BOM)
        assert all(total.read == text.count(b"\n") + (not text.endswith(b"\n") and text != b"") for total in totals)
        assert len({(total.output, tuple(total.rejected)) for total in totals}) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(RECORDS, min_size=1, max_size=8),
    st.sampled_from([layout for layout in LAYOUTS if layout != "columns"]),
    st.sampled_from(["lines", "compact", 1, 4, "\t"]),
    st.booleans(),
)
def test_every_json_container_gives_what_its_records_give_one_by_one(
    tmp_path_factory, records, layout, form, ascii_only
):
    if form == "lines":
        assume(records[0] != [])  # a file that begins with [ is an array
        data = "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    else:
        data = json.dumps(records, ensure_ascii=ascii_only, indent=None if form == "compact" else form)
    one_by_one = [LAYOUTS[layout](dump(record)) for record in records]
    expected = [record for record in one_by_one if isinstance(record, dict)]
    for total in in_every_way(tmp_path_factory.mktemp("raw"), data.encode(), layout):
        assert total.read == len(records) and total.accounts()
        assert [json.loads(line) for line in total.output.splitlines()] == expected
        assert [json.loads(raw) for _, _, raw in total.rejected] == [
            record for record, read in zip(records, one_by_one, strict=True) if not isinstance(read, dict)
        ]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("pack", [bytes, gzipped, zipped])
def test_workers_and_containers_give_the_same_files(tmp_path, monkeypatch, pack, workers):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 300)
    monkeypatch.setattr(raw_files, "SPAN_BYTES", 1000)
    monkeypatch.setattr(convert, "SPAN_BYTES", 1000)
    data = b"\n".join(dump(QA | {"output": f"答{n}"}) if n % 7 else b"broken \xff" for n in range(200)) + b"\n \n"
    records, rejected, entry = converted(tmp_path, "medchatzh_train", pack(data), "--workers", workers)
    assert [record["output"] for record in records] == [f"答{n}" for n in range(200) if n % 7]
    assert [line["line"] for line in rejected] == [n + 1 for n in range(0, 200, 7)] and entry["skipped"] == {
        "blank line": 1
    }


# ---- a disk that fills, kills, two runs ---------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def words_for(tmp_path: Path, *more: str) -> list[str]:
    return ["convert", "--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out"), *more]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_disk_that_fills_leaves_the_old_output(tmp_path, workers):
    """No file may grow over 1 MB: what a full disk is to the one who writes."""
    converted(tmp_path, "medchatzh_train", dump(QA))
    before = files_of(tmp_path / "out")
    write_raw(tmp_path / "raw", "medchatzh_train", (dump(QA) + b"\n") * 50_000)
    run = subprocess.run(
        [sys.executable, "-m", "medasst_tools.cli", *words_for(tmp_path, "--workers", workers)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert files_of(tmp_path / "out") == before


def test_a_killed_worker_is_one_line(tmp_path, capsys, monkeypatch):
    converted(tmp_path, "medchatzh_train", dump(QA))
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(convert, "convert_block", lambda block, layout: os.kill(os.getpid(), signal.SIGKILL))
    assert run_convert(tmp_path, "--workers", "2") == 2
    assert "a worker process was killed" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("moves", range(6))
def test_a_kill_between_any_two_moves(tmp_path, moves):
    """The process ends hard before its n-th move: no manifest vouches for the mixture, and the next run finishes it first."""
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA))
    write_raw(tmp_path / "raw", "medchatzh_test", dump(QA))
    assert run_convert(tmp_path) == 0
    old = files_of(tmp_path / "out")
    new_answer = dump(QA | {"output": "新的回答"})
    write_raw(tmp_path / "raw", "medchatzh_train", new_answer)
    write_raw(tmp_path / "raw", "medchatzh_test", new_answer)
    child = os.fork()
    if not child:
        left, replace = [moves], Path.replace

        def replace_or_die(path: Path, target: Path) -> Path:
            if target.is_relative_to(tmp_path / "out") and convert.STAGING not in target.parts:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
            return replace(path, target)

        Path.replace = replace_or_die
        run_convert(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out/manifest.json").exists()
    # the next run converts something else; what was being moved is whole all the same
    (tmp_path / "raw/medchatzh/MedChatZH_train.json").write_bytes(b"")
    with convert._locked(tmp_path / "out"):
        pass
    new = files_of(tmp_path / "out")
    assert new.keys() == old.keys() and json.loads(new["medchatzh_train.jsonl"])["output"] == "新的回答"
    manifest = json.loads(new["manifest.json"])["datasets"]
    assert {name: entry["bytes"] for name, entry in manifest.items()} == {
        name: len(new[f"{name}.jsonl"]) for name in manifest
    }


def test_two_processes_at_once(tmp_path):
    """One of them converts, the other says so; the output is the one's."""
    write_raw(tmp_path / "raw", "medchatzh_train", (dump(QA) + b"\n") * 300_000)
    command = [sys.executable, "-m", "medasst_tools.cli", *words_for(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / convert.STAGING).exists() and first.poll() is None:
        time.sleep(0.005)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.wait() == 0 and second.returncode == 2 and "another run is writing" in second.stderr
    assert json.loads((tmp_path / "out/manifest.json").read_text())["datasets"]["medchatzh_train"]["kept"] == 300_000


@pytest.mark.parametrize("span_bytes", [1, 200, 5000])
@pytest.mark.parametrize("bom", [b"", raw_files.BOM])
def test_an_indented_array_in_spans_is_the_same_array(tmp_path, span_bytes, bom):
    """The spans are read apart from each other: records, rejected lines and their numbers are those of the whole."""
    records = [QA | {"input": "长" * number} for number in range(60)] + [QA | {"output": ""}, {"a": [{"b": 1}]}]
    text = json.dumps(records, ensure_ascii=False, indent=4).replace("长" * 30, "长\\", 1)  # breaks an element
    path = tmp_path / "raw.json"
    path.write_bytes(bom + text.encode() + b"\n")
    with open_raw(path) as stream:
        whole = Total(read_blocks(stream, "instruction"), "instruction")
    with mock.patch.object(raw_files, "SPAN_BYTES", span_bytes), open_raw(path) as stream:
        spans = spans_of(path, stream, "instruction")
    parts = Total(blocks_of(spans), "instruction")
    assert len(spans) >= 2 and len(whole.rejected) == 3
    assert (parts.output, parts.rejected, parts.read) == (whole.output, whole.rejected, whole.read)
