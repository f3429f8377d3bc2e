"""medasst convert: layouts, containers, dirt, accounting, whole files or none, and what people's own corpora look like."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from medasst_tools import cli
from medasst_tools.data import add_corpus, convert, registry
from medasst_tools.data.layouts import LAYOUTS, ODD_TAIL, likely_layout, reader
from medasst_tools.data.raw_files import BOM, MAX_RECORD_BYTES, NotKept, read_records
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import sha256_of

QA = {"instruction": "头痛怎么办？", "input": "", "output": "您好，建议休息。"}
LINES = b"\n".join(json.dumps(QA | {"output": f"答{number}。"}, ensure_ascii=False).encode() for number in range(3))


def dump(record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


def write_raw(folder: Path, dataset: str, data: bytes) -> Path:
    facts = load_datasets()[dataset]
    path = folder / facts.corpus.name / facts.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def words_for(tmp_path: Path, *more: str) -> list[str]:
    return ["convert", "--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out"), *more]


def run_convert(tmp_path: Path, *words: str) -> int:
    return cli.main(words_for(tmp_path, "--max-rejects", "1", *words))


def manifest_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["datasets"]


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def converted(tmp_path: Path, dataset: str, data: bytes, *words: str):
    """Convert one dataset's raw bytes; (records, rejected lines, manifest entry)."""
    write_raw(tmp_path / "raw", dataset, data)
    assert run_convert(tmp_path, dataset, *words) == 0
    records = json_lines(tmp_path / "out" / f"{dataset}.jsonl")
    rejected = json_lines(tmp_path / "out/rejected" / f"{dataset}.jsonl")
    entry = manifest_of(tmp_path)[dataset]
    assert entry["read"] == entry["kept"] + sum(entry["skipped"].values()) + sum(entry["rejected"].values())
    assert entry["kept"] == len(records) and sum(entry["rejected"].values()) == len(rejected)
    return records, rejected, entry


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# ---- one raw record -------------------------------------------------------------------------------------------------
def alpaca(question: str, answer: str, history=None, more: str = "") -> dict:
    record = {"instruction": question, "input": more, "output": answer}
    return record if history is None else record | {"history": history}


def rejected(reason: str) -> tuple[str, bool]:
    return reason, False


def skipped(reason: str) -> tuple[str, bool]:
    return reason, True


@pytest.mark.parametrize(
    ("layout", "raw", "expected"),
    [
        ("instruction", dump(QA), alpaca("头痛怎么办？", "您好，建议休息。")),
        ("instruction", dump(QA | {"input": "三天了"}), alpaca("头痛怎么办？", "您好，建议休息。", more="三天了")),
        ("instruction", dump(QA | {"input": None}), alpaca("头痛怎么办？", "您好，建议休息。")),
        ("instruction", dump({"instruction": " 　问\u200b\n", "output": "\ufeff答 "}), alpaca("问", "答")),
        ("instruction", dump(QA | {"output": "  \u200b　"}), rejected("empty output")),
        ("instruction", dump(QA | {"output": ["您好"]}), rejected("output is not text")),
        ("instruction", dump(QA | {"output": 5}), rejected("output is not text")),
        ("instruction", dump(QA | {"output": None}), rejected("no output")),
        ("instruction", dump({"output": "答"}), rejected("no instruction")),
        ("instruction", dump(QA | {"input": []}), rejected("input is not text")),
        ("instruction", b"[1]", rejected("not an object")),
        ("encyclopedia", dump({"questions": [["问一", "问二"]], "answers": ["答"]}), alpaca("问一", "答")),
        ("encyclopedia", dump({"questions": ["问"], "answers": "答"}), alpaca("问", "答")),
        ("encyclopedia", dump({"questions": "问", "answers": [["答"]]}), alpaca("问", "答")),
        ("encyclopedia", dump({"questions": [[]], "answers": ["答"]}), rejected("empty questions")),
        ("encyclopedia", dump({"questions": ["问"], "answers": []}), rejected("empty answers")),
        ("encyclopedia", dump({"questions": ["问"], "answers": [None]}), rejected("no answers")),
        (
            "encyclopedia",
            dump({"questions": ["问"], "answers": ["https://a.cn/1.htm "]}),
            rejected("answers is only a URL"),
        ),
        (
            "encyclopedia",
            dump({"questions": ["问"], "answers": ["见 https://a.cn/1.htm"]}),
            alpaca("问", "见 https://a.cn/1.htm"),
        ),
        ("qa", dump({"instruction": "问", "input": "三天", "response": "答"}), alpaca("问", "答", more="三天")),
        ("qa", dump({"question": "问", "answer": "答", "system": "助手"}), alpaca("问", "答") | {"system": "助手"}),
        (
            "history",
            dump({"prompt": "问", "response": "答", "history": [turn("user", "一"), turn("assistant", "二")]}),
            alpaca("问", "答", [["一", "二"]]),
        ),
        (
            "history",
            dump({"q": "问", "a": "答", "history": [turn("user", "一")]}),
            rejected("history ends with a question"),
        ),
        ("turns", dump({"data": ["问：一\n", "答：二"]}), alpaca("一", "二", [])),
        ("turns", dump({"data": ["问:一", "答: 二", "问：三", "答：四"]}), alpaca("三", "四", [["一", "二"]])),
        ("turns", dump({"data": ["问 ：一", "\ufeff答： 二"]}), alpaca("一", "二", [])),
        ("turns", dump({"data": ["一", "二"]}), alpaca("一", "二", [])),
        ("turns", dump({"data": ["问：一", "答：二", "问：三"]}), alpaca("一", "二", [])),  # an odd tail
        ("turns", dump({"data": ["问：一", "答：二", "问："]}), alpaca("一", "二", [])),  # an empty one
        ("turns", dump({"data": ["问：一", "答：二", "答：三"]}), rejected("turns do not alternate")),
        ("turns", dump({"data": ["答：一", "问：二"]}), rejected("turns do not alternate")),
        ("turns", dump({"data": ["问：一"]}), rejected("no answer")),
        ("turns", dump({"data": []}), rejected("no answer")),
        ("turns", dump({"data": ["问：一", "答："]}), rejected("an empty turn")),
        ("turns", dump({"data": ["问：一", ["答"]]}), rejected("a turn is not text")),
        ("turns", dump({"data": "问：一"}), rejected("data is not a list")),
        ("turns", dump({}), rejected("no data")),
        (
            "dialogue",
            dump(QA | {"history": [["一", " 二 "]]}),
            alpaca(QA["instruction"], QA["output"], [["一", "二"]]),
        ),
        ("dialogue", dump({"instruct": "问", "output": "答"}), alpaca("问", "答", [])),
        ("dialogue", dump(QA | {"instruct": "问"}), alpaca(QA["instruction"], QA["output"], [])),
        ("dialogue", dump(QA | {"history": None}), alpaca(QA["instruction"], QA["output"], [])),
        ("dialogue", dump(QA | {"history": [["一"]]}), rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [["一", None]]}), rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [[["一"], "二"]]}), rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [["", "二"]]}), rejected("an empty turn in history")),
        ("dialogue", dump(QA | {"history": "一"}), rejected("history is not a list")),
        ("columns", "内科\t1\t7\t问\t答\r".encode(), alpaca("问", "答")),
        ("columns", '内科\t1\t7\t"问\t答"他说"'.encode(), alpaca('"问', '答"他说"')),
        ("columns", "内科\t0\t7\t问\t答".encode(), skipped("label 0")),
        ("columns", "内科\t2\t7\t问\t答".encode(), rejected("label is neither 0 nor 1")),
        ("columns", "内科\t1\t7\t问".encode(), rejected("not 5 columns")),
        ("columns", "内科\t1\t7\t问\t答\t再".encode(), rejected("not 5 columns")),
        ("columns", "内科\t1\t7\t问\t 　".encode(), rejected("empty answer")),
        ("columns", "内科\t1\t7\t\t答".encode(), rejected("empty question")),
        (
            "instruction",
            dump(QA | {"history": [["一", "二"]]}),
            alpaca(QA["instruction"], QA["output"], [["一", "二"]]),
        ),
        (
            "encyclopedia",
            dump({"questions": ["问"], "answers": ["https://a.cn/1.htm，您好，建议您多喝水"]}),
            alpaca("问", "https://a.cn/1.htm，您好，建议您多喝水"),
        ),
        ("turns", dump({"data": ["\ufeff问：头痛", "\ufeff答：休息"]}), alpaca("头痛", "休息", [])),
        ("qa", dump({"q": "问", "a": "答"}), alpaca("问", "答")),
        ("qa", dump({"问题": "问", "回答": "答"}), alpaca("问", "答")),
        ("qa", dump({"foo": "问", "bar": "答"}), rejected("no question among foo, bar")),
        (
            "history",
            dump({"prompt": "三", "response": "四", "history": [["一", "二"]]}),
            alpaca("三", "四", [["一", "二"]]),
        ),
        ("pairs", dump(["问", " 答 "]), alpaca("问", "答")),
        ("pairs", dump(["问"]), rejected("not a list of two texts")),
        ("pairs", dump(QA), rejected("not a list")),
        (
            "messages",
            dump({"messages": [turn("user", "问"), turn("assistant", "答")]}),
            alpaca("问", "答", []) | {"system": ""},
        ),
        (
            "messages",
            dump(
                {
                    "messages": [
                        turn("developer", "你是药师"),
                        turn("user", "一"),
                        turn("assistant", "二"),
                        turn("user", "三"),
                        turn("assistant", "四"),
                        turn("user", "五"),
                    ]
                }
            ),
            alpaca("三", "四", [["一", "二"]]) | {"system": "你是药师"},
        ),
        (
            "messages",
            dump({"messages": [turn("user", [{"type": "text", "text": "问"}]), turn("assistant", "答")]}),
            alpaca("问", "答", []) | {"system": ""},
        ),
        (
            "messages",
            dump(
                {
                    "messages": [
                        turn("user", [{"type": "text", "text": "图"}, {"type": "image_url"}]),
                        turn("assistant", "答"),
                    ]
                }
            ),
            rejected("a part of a turn is not text"),
        ),
        ("messages", dump({"messages": [turn("assistant", "答")]}), rejected("turns do not alternate")),
        ("messages", dump({"messages": [turn("user", "问"), turn("tool", "1")]}), rejected("a turn of 'tool'")),
        ("messages", dump({"messages": [turn("user", "问"), "答"]}), rejected("a turn is not an object")),
        ("messages", dump({"messages": {"role": "user"}}), rejected("messages is not a list")),
        (
            "sharegpt",
            dump({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]}),
            alpaca("问", "答", []) | {"system": ""},
        ),
        (
            "sharegpt",
            dump({"conversation": [turn("user", "问"), turn("assistant", "答")]}),
            alpaca("问", "答", []) | {"system": ""},
        ),
        (
            "sharegpt",
            dump({"conversation": 1, "conversations": [turn("user", "问"), turn("assistant", "答")]}),
            alpaca("问", "答", []) | {"system": ""},
        ),
        (
            "sharegpt",
            dump(
                {
                    "system": "助手",
                    "conversations": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}],
                }
            ),
            alpaca("问", "答", []) | {"system": "助手"},
        ),
    ],
)
def test_one_raw_record(layout, raw, expected):
    value = raw.decode().rstrip("\r").split("\t") if layout == "columns" else json.loads(raw)
    (record,) = reader(layout)(value)
    if isinstance(record, NotKept):
        record = (str(record), record.by_design)
    else:
        record.pop(ODD_TAIL, None)
    assert record == expected


def test_every_turn_is_asked_with_its_history():
    record = QA | {"id": "j7", "history": [["一", "二"], ["三", "四"]]}
    turns = reader("dialogue_turns")(record)
    assert [(turn["instruction"], turn["output"], len(turn["history"])) for turn in turns] == [
        ("一", "二", 0), ("三", "四", 1), (QA["instruction"], QA["output"], 2),
    ]  # fmt: skip
    assert {turn["dialogue"] for turn in turns} == {"j7"}


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ([QA], "instruction"), ([QA | {"history": [["a", "b"]]}], "instruction"), ([{"q": "a", "a": "b"}], "qa"),
        ([{"prompt": "a", "response": "b", "history": [["c", "d"]]}], "history"), ([{"q": "a", "a": "b", "history": ["c"]}], None), ([["a", "b"]], "pairs"),
        ([{"messages": [turn("user", "a"), turn("assistant", "b")]}], "messages"),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], "sharegpt"),
        ([{"data": ["问：a", "答：b"]}], "turns"), ([{"questions": [["a"]], "answers": ["b"]}], "encyclopedia"),
        ([["x", "1", "7", "a", "b"], ["x", "0", "7", "a", "c"]], "columns"), ([{"x": 1}], None), ([], None), ([5], None),
    ],
)  # fmt: skip
def test_layouts_by_content(values, layout):
    assert likely_layout(values) == layout


# ---- whole files ----------------------------------------------------------------------------------------------------
def test_samples_convert_and_account(tmp_path):
    out = tmp_path / "out"
    assert cli.main(["convert", "--raw-dir", str(SAMPLES / "raw"), "--out-dir", str(out), "--max-rejects", "0.1"]) == 0
    manifest = manifest_of(tmp_path)
    with_samples = [n for n, one in load_datasets().items() if (SAMPLES / "raw" / one.corpus.name).is_dir()]
    assert list(manifest) == [name for name in with_samples if not load_datasets()[name].optional]
    assert list(manifest) == list(json.loads((out / "dataset_info.json").read_text(encoding="utf-8")))
    for name, entry in manifest.items():
        assert entry["kept"] >= (40 if name.endswith("_train") else 10), name
        assert (sum(entry["rejected"].values()) >= 3) == name.endswith("_train"), name
        assert entry["made_of"]["files"] == {entry["source"]["file"]: entry["source"]["sha256"]}
    assert manifest["huatuogpt_sft_train"]["odd_tails"] == 1


@pytest.mark.real_data
def test_real_text_converts_whole(real_data, tmp_path):
    assert cli.main(["convert", "--raw-dir", str(real_data / "raw"), "--out-dir", str(tmp_path / "out")]) == 0
    kept = {name: entry["kept"] for name, entry in manifest_of(tmp_path).items()}
    assert sum(count for name, count in kept.items() if name.endswith("_train")) == 4400
    assert sum(count for name, count in kept.items() if name.endswith("_test")) == 1444
    assert kept["cmtmedqa_test"] == 1144  # the genuine file: two record shapes
    words = ["convert", "cmtmedqa_test_turns", "--raw-dir", str(real_data / "raw"), "--out-dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert manifest_of(tmp_path)["cmtmedqa_test_turns"]["kept"] == 4552 + 144 and len(manifest_of(tmp_path)) == 10


RECORDS = [QA | {"output": f"答{number}。", "extra": {"nested": [{"a": 1}, {"b": "}, {"}]}} for number in range(5)]
ROWS = "question,answer\n" + "".join(f'"问{n}, 好","答{n}。"\n' for n in range(5))


def zipped(data: bytes, name: str = "folder/raw.txt") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("raw.jsonl")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"\n".join(map(dump, RECORDS)),
        BOM + b"\r\n".join(map(dump, RECORDS)) + b"\r\n",
        json.dumps(RECORDS, ensure_ascii=False, indent=4).encode(),
        json.dumps(RECORDS).encode(),
        json.dumps(RECORDS).encode() + b"\n\n",
        b" \n[" + b",\n".join(map(dump, RECORDS)) + b"]\n",
        dump({"data": RECORDS}),
        json.dumps({"version": 1, "train": RECORDS}, indent=2).encode(),
        dump({str(number): record for number, record in enumerate(RECORDS)}),
        json.dumps({str(number): record for number, record in enumerate(RECORDS)}, indent=2).encode(),
        gzip.compress(b"\n".join(map(dump, RECORDS))),
        zipped(dump(RECORDS)),
        BOM + dump(RECORDS),
        BOM + BOM + b"\n".join(map(dump, RECORDS)),
    ],
    ids=["lines", "bom-crlf", "array-4", "array-compact", "array-and-newline", "array-per-line", "wrapped", "wrapped-indented", "by-id", "by-id-indented", "gzip", "zip", "array-bom", "two-boms"],
)  # fmt: skip
def test_containers_by_content(tmp_path, data):
    records, rejected, _ = converted(tmp_path, "medchatzh_train", data)
    assert [record["output"] for record in records] == [f"答{number}。" for number in range(5)] and not rejected


@pytest.mark.parametrize(
    ("dataset", "data", "outputs", "skipped", "rejected"),
    [
        ("medchatzh_train", LINES[:-4], ["答0。", "答1。"], {}, {"not UTF-8": 1}),  # a truncated last line
        ("medchatzh_train", LINES[:-1], ["答0。", "答1。"], {}, {"not JSON": 1}),
        ("medchatzh_train", b"\n\n", [], {"blank line": 2}, {}),
        ("medchatzh_train", b" ", [], {"blank line": 1}, {}),
        ("medchatzh_train", b"[]", [], {}, {}),
        ("medchatzh_train", b"[5, null]", [], {}, {"not an object": 2}),
        ("medchatzh_train", b"\x00" * 5000, [], {}, {"not JSON": 1}),
        ("medchatzh_train", LINES + b"\n\x00\x00\n" + LINES, ["答0。", "答1。", "答2。"] * 2, {}, {"not JSON": 1}),
        ("medchatzh_train", b'{"instruction": "a\\u0000b", "output": "c"}', ["c"], {}, {}),  # an escaped NUL is text
        ("medchatzh_train", b'{"instruction": "\\udc00", "output": "c"}', [], {}, {"not JSON": 1}),
        ("medchatzh_train", b'{"instruction": ' + b"1" * 5000 + b', "output": "c"}', [], {}, {"not JSON": 1}),
        # Python's json writes NaN where pandas had nothing
        ("medchatzh_train", '{"instruction": "问", "input": NaN, "output": "NaN"}\n{"output": NaN, "instruction": "问"}\nNaN'.encode(), ["NaN"], {}, {"no output": 1, "not JSON": 1}),
        ("medchatzh_train", '[{"instruction": "问", "output": "答"}, {"instruction": "问", "output": NaN}]'.encode(), ["答"], {}, {"no output": 1}),
        # a question with no positive answer gives no record; one with two gives both
        ("webmedqa_train", "科\t0\t1\t问\t甲\n科\t1\t2\t问\t丙\n科\t1\t2\t问\t丁".encode(), ["丙", "丁"], {"label 0": 1}, {}),
        ("webmedqa_train", "科\t１\t1\t问\t甲\n科\t\t1\t问\t乙\n科\t-1\t1\t问\t丙".encode(), [], {}, {"label is neither 0 nor 1": 3}),
        ("webmedqa_train", b"a\t1\t1\tq\x00\ta\x00", ["a\x00"], {}, {}),
        ("webmedqa_train", '科\t1\t1\t"问\t甲"\n科\t1\t2\t"\t"乙'.encode(), ['甲"', '"乙'], {}, {}),
        ("webmedqa_train", b"a\t1\t7\tq\t\xff\n" + "科\t1\t1\t问\t甲".encode() * 1, ["甲"], {}, {"not UTF-8": 1}),
        ("cmtmedqa_test", dump([{"instruct": "问", "output": "答"}, QA]), ["答", QA["output"]], {}, {}),
    ],
)  # fmt: skip
def test_a_whole_file(tmp_path, dataset, data, outputs, skipped, rejected):
    records, lines, entry = converted(tmp_path, dataset, data)
    assert [record["output"] for record in records] == outputs
    assert (entry["skipped"], entry["rejected"]) == (skipped, rejected)
    if not data.startswith(b"["):
        assert all(line["raw"].encode("utf-8", "surrogateescape") in data for line in lines)


def test_a_huge_line_is_rejected_at_no_cost_and_the_next_is_read(tmp_path):
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
    (line,) = json_lines(tmp_path / "out/rejected/medchatzh_train.jsonl")
    assert line["line"] == 2 and line["reason"].startswith(f"longer than {MAX_RECORD_BYTES} bytes")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (dump(QA).decode().encode("utf-16"), "UTF-16"),
        (dump(QA).decode().encode("utf-16-be"), "UTF-16"),
        (dump(QA).decode().encode("utf-32"), "UTF-32"),
        (dump(QA).decode().encode("utf-32-be"), "UTF-32"),
        (lzma.compress(dump(QA)), "packed with xz"),
        (gzip.compress(bz2.compress(dump(QA))), "packed with bzip2"),
        (gzip.compress(gzip.compress(dump(QA))), "gzip more than once"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (zipped(zipped(dump(QA))), "a zip archive in another"),
        (zipped(b"<x/>", "[Content_Types].xml"), "save it as CSV"),
        (zipped(gzip.compress(dump(QA))), "gzip more than once"),
        (gzip.compress(tarred(dump(QA))), "a tar archive"),
        (gzip.compress(dump(QA) * 1000)[:-20], "damaged"),
        (gzip.compress(dump(QA) * 1000)[:20] + b"\x00" * 40 + gzip.compress(dump(QA) * 1000)[60:], "damaged"),
        (gzip.compress(b" " * 100_000_000), "a zip bomb?"),
        (b'[{"instruction": "a"},\n {"instruction": }]', "is broken JSON, line 2, column 18"),
        (dump([QA])[:-3], "is broken JSON, line 1"),
        (b"[" * 100_000, "is broken JSON"),
        (dump({"train": [QA, QA], "test": [QA]}), "holds several lists of records: train, test"),
        (b"[" + "\u5934".encode("gbk") * 1 + b"\xff\xff]", "neither UTF-8 nor GB18030"),
    ],
)
def test_unusable_files_are_one_line_and_status_2(tmp_path, capsys, data, message):
    path = write_raw(tmp_path / "raw", "medchatzh_train", data)
    assert run_convert(tmp_path) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error and str(path) in error


@pytest.mark.parametrize(
    ("members", "message"),
    [
        *(({name: b"x"}, "leaves the archive") for name in ("../a", "/a", "a/../../b", "C:\\b", "..\\b")),
        ({"a.txt": b"x", "b.txt": b"y"}, "must hold one text file"),
        ({"a.txt": b"0" * 50_000_000}, "a zip bomb?"),
    ],
)
def test_archives_that_are_not_the_published_file(tmp_path, capsys, members, message):
    path = tmp_path / "raw/webmedqa/train.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert run_convert(tmp_path, "webmedqa_train") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out/manifest.json").exists()


def test_webmedqa_in_its_released_zip(tmp_path):
    path = tmp_path / "raw/webmedqa/train.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(zipped("内科\t1\t7\t问\t答\n内科\t0\t7\t问\t错\n".encode(), "medQA.train.txt"))
    assert run_convert(tmp_path, "webmedqa_train") == 0
    entry = manifest_of(tmp_path)["webmedqa_train"]
    assert (entry["read"], entry["kept"], entry["skipped"]) == (2, 1, {"label 0": 1})


# ---- encodings, shapes, marks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ("medchatzh_train", b"\n".join(map(dump, RECORDS))),
        ("medchatzh_train", dump(RECORDS)),
        ("huatuogpt_sft_train", b"\n".join(dump({"data": ["问：头痛", f"答：答{number}。"]}) for number in range(5))),
        ("webmedqa_train", "\n".join(f"科\t1\t7\t头痛\t答{number}。" for number in range(5)).encode()),
    ],
    ids=["lines", "array", "lines-of-lists", "columns"],
)
def test_gb18030_is_read_and_said(tmp_path, capsys, dataset, text):
    records, rejected, entry = converted(tmp_path, dataset, text.decode().encode("gb18030"))
    assert [record["output"] for record in records] == [f"答{number}。" for number in range(5)] and not rejected
    assert entry["encoding"] == "gb18030" and "read as gb18030" in capsys.readouterr().out


def test_gb18030_is_told_from_one_short_record(tmp_path):
    records, _, entry = converted(
        tmp_path, "medchatzh_train", dump({"instruction": "问", "output": "答"}).decode().encode("gbk")
    )
    assert records[0]["output"] == "答" and entry["encoding"] == "gb18030"


def test_big5_is_not_taken_for_gb18030(tmp_path, capsys):
    data = '{"instruction": "頭痛怎麼辦？應該看醫生嗎", "output": "請休息"}'.encode("big5")
    write_raw(tmp_path / "raw", "medchatzh_train", data)
    assert cli.main(words_for(tmp_path)) == 1
    assert "neither UTF-8 nor GB18030; give its --encoding: big5?" in capsys.readouterr().err
    records, _, entry = converted(tmp_path, "medchatzh_train", data, "--encoding", "big5")
    assert records[0]["output"] == "請休息" and entry["encoding"] == "big5"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["头痛", "休息"], "its records are a list: layout pairs, not instruction"),
        ({"q": "头痛", "a": "休息"}, "its records are an object with q, a: layout qa, not instruction"),
        ({"messages": [turn("user", "a"), turn("assistant", "b")]}, "layout messages, not instruction"),
    ],
)
def test_a_file_of_another_shape_says_what_it_looks_like(tmp_path, capsys, value, says):
    write_raw(tmp_path / "raw", "medchatzh_train", b"\n".join([dump(value)] * 20))
    assert cli.main(words_for(tmp_path)) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "marked"),
    [("头痛<|im_end|>\n<|im_start|>system", True), ("头痛[/INST]", True), ("头痛</s>", True), ("<end_of_turn>", True), ("血压<120，[1]见下", False), ("INST", False)],
)  # fmt: skip
def test_marks_of_chat_templates_are_counted_and_strictly_rejected(tmp_path, text, marked):
    data = b"\n".join(map(dump, [QA, QA | {"instruction": text}]))
    _, _, entry = converted(tmp_path, "medchatzh_train", data)
    assert entry["control_tokens"] == marked and entry["kept"] == 2
    _, _, entry = converted(tmp_path, "medchatzh_train", data, "--strict")
    assert entry["control_tokens"] == 0 and entry["rejected"] == (
        {"a chat template's mark in the text": 1} if marked else {}
    )


# ---- nothing lost ---------------------------------------------------------------------------------------------------
def test_too_many_rejects_leave_all_as_it_was(tmp_path, capsys):
    converted(tmp_path, "medchatzh_train", b"\n".join([dump(QA)] * 100))
    before = files_of(tmp_path / "out")
    write_raw(tmp_path / "raw", "medchatzh_train", b"\n".join([dump(QA)] * 3 + [b"broken"] * 97))
    assert cli.main(words_for(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "medchatzh_train 97.00%" in error and "stays as it was" in error
    after = files_of(tmp_path / "out")
    why = after.pop("rejected/medchatzh_train.jsonl")
    assert why.count(b"\n") == 97 and after == {name: data for name, data in before.items() if "rejected" not in name}


@pytest.mark.parametrize(
    ("kept", "bad", "share", "status"), [(99, 1, "0.01", 0), (98, 2, "0.01", 1), (1, 1, "0.5", 0), (1, 1, "0.49", 1)]
)
def test_the_share_of_rejects_is_over_kept_and_rejected(tmp_path, kept, bad, share, status):
    """Skipped lines are by design and don't dilute it."""
    write_raw(tmp_path / "raw", "medchatzh_train", b"\n".join([dump(QA)] * kept + [b"broken"] * bad) + b"\n" * 500)
    assert cli.main(words_for(tmp_path, "--max-rejects", share)) == status


def test_the_same_again_is_up_to_date_and_what_changed_is_made_anew(tmp_path, capsys):
    for name in ("medchatzh_train", "medchatzh_test"):
        write_raw(tmp_path / "raw", name, dump(QA))
    assert run_convert(tmp_path) == 0
    before = (tmp_path / "out/medchatzh_test.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run_convert(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out: up to date\n"
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA) + b"\n" + dump(QA))
    assert run_convert(tmp_path) == 0
    assert "medchatzh_train: 2 read" in capsys.readouterr().out
    assert (tmp_path / "out/medchatzh_test.jsonl").stat().st_mtime_ns == before
    output = tmp_path / "out/medchatzh_test.jsonl"
    for spoil in (lambda: output.write_text("{}\n"), output.unlink):
        spoil()
        assert run_convert(tmp_path) == 0
        assert json_lines(output)[0]["output"] == QA["output"]


def test_a_dataset_that_was_taken_away_stays_and_is_said(tmp_path, capsys):
    path = write_raw(tmp_path / "raw", "medchatzh_test", dump(QA))
    converted(tmp_path, "medchatzh_train", dump(QA))
    assert run_convert(tmp_path) == 0
    path.unlink()
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA | {"output": "新"}))
    assert run_convert(tmp_path) == 0
    assert "medchatzh_test: no raw file" in capsys.readouterr().out
    assert list(manifest_of(tmp_path)) == ["medchatzh_train", "medchatzh_test"]


def test_a_folder_of_ones_own_is_left_alone(tmp_path, capsys):
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dataset_info.json").write_text("{}")
    assert run_convert(tmp_path) == 0
    assert "is your own" in capsys.readouterr().out and files_of(tmp_path / "out") == {"dataset_info.json": b"{}"}


def test_a_damaged_manifest_is_said_before_the_work(tmp_path, capsys):
    converted(tmp_path, "medchatzh_train", dump(QA))
    (tmp_path / "out/manifest.json").write_text("{")
    capsys.readouterr()
    assert run_convert(tmp_path) == 2
    captured = capsys.readouterr()
    assert "manifest.json is damaged" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope_train"], "no dataset 'nope_train'; there are medchatzh_train"),
        (["webmedqa_train"], "medQA.train.txt or"),
        ([], "no raw folder"),
        (["--max-rejects", "2"], "--max-rejects is 2.0, must be a share"),
        (["--workers", "0"], "--workers is 0, must be 1 or more"),
        (["--encoding", "klingon"], "--encoding is 'klingon'"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, words, message):
    if words:
        (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_nearly_the_right_name_is_named(tmp_path, capsys):
    path = write_raw(tmp_path / "raw", "medchatzh_train", dump(QA))
    path.rename(path.with_name("MedChatZH_train.jsonl"))
    write_raw(tmp_path / "raw", "medchatzh_test", dump(QA))
    assert run_convert(tmp_path) == 0
    said = capsys.readouterr().out
    assert "MedChatZH_train.jsonl isn't read: medchatzh_train needs" in said and "MedChatZH_train.json," in said


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA))
    (tmp_path / "out").write_text("a file where the folder should be", encoding="utf-8")
    assert run_convert(tmp_path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_side_by_side_gives_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "WORTH_A_POOL", 1)
    outputs = []
    for workers in ("1", "3"):
        out = tmp_path / workers
        words = ["convert", "--raw-dir", str(SAMPLES / "raw"), "--out-dir", str(out), "--max-rejects", "0.1"]
        assert cli.main([*words, "--workers", workers]) == 0
        outputs.append(files_of(out))
    assert outputs[0] == outputs[1] and len(outputs[0]) > 15


def test_a_killed_worker_is_one_line(tmp_path, capsys, monkeypatch):
    for name in ("medchatzh_train", "medchatzh_test"):
        converted(tmp_path, name, dump(QA))
        write_raw(tmp_path / "raw", name, dump(QA) * 2)
    before = files_of(tmp_path / "out")
    monkeypatch.setattr(convert, "WORTH_A_POOL", 1)
    monkeypatch.setattr(convert, "line_of", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert run_convert(tmp_path, "--workers", "2") == 2
    assert "a worker process was killed" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("records", [50_000, 12_000])  # the second's file is full with its last bytes
def test_a_disk_that_fills_leaves_the_old_output(tmp_path, records):
    """No file may grow over 1 MB: what a full disk is to the one who writes."""
    converted(tmp_path, "medchatzh_train", dump(QA))
    before = files_of(tmp_path / "out")
    write_raw(tmp_path / "raw", "medchatzh_train", (dump(QA) + b"\n") * records)
    run = subprocess.run(
        [sys.executable, "-m", "medasst_tools.cli", *words_for(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert files_of(tmp_path / "out") == before


def test_a_kill_leaves_the_old_output_and_two_at_once_are_refused(tmp_path):
    converted(tmp_path, "medchatzh_train", dump(QA))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    write_raw(tmp_path / "raw", "medchatzh_train", (dump(QA) + b"\n") * 2_000_000)
    command = [sys.executable, "-m", "medasst_tools.cli", *words_for(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / convert.STAGING / "medchatzh_train.jsonl").exists() and run.poll() is None:
        time.sleep(0.01)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "another run is writing" in second.stderr
    run.kill()
    assert run.wait() == -signal.SIGKILL
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert after == before and "manifest.json" in after
    converted(tmp_path, "medchatzh_train", dump(QA | {"output": "新"}))
    assert not (tmp_path / "out" / convert.STAGING).exists()


@pytest.mark.parametrize("moves", range(6))
def test_a_kill_between_any_two_moves(tmp_path, moves):
    """The process ends hard before its n-th move: no manifest vouches for the mixture, and the next run finishes it first."""
    for name in ("medchatzh_train", "medchatzh_test"):
        write_raw(tmp_path / "raw", name, dump(QA))
    assert run_convert(tmp_path) == 0
    old = files_of(tmp_path / "out")
    for name in ("medchatzh_train", "medchatzh_test"):
        write_raw(tmp_path / "raw", name, dump(QA | {"output": "新的回答"}))
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
    with convert.staging_in(tmp_path / "out"):
        pass
    new = files_of(tmp_path / "out")
    assert new.keys() == old.keys() and json.loads(new["medchatzh_train.jsonl"])["output"] == "新的回答"
    assert {name: entry["bytes"] for name, entry in manifest_of(tmp_path).items()} == {
        name: len(new[f"{name}.jsonl"]) for name in manifest_of(tmp_path)
    }


# ---- variants -------------------------------------------------------------------------------------------------------
def test_masks_and_odd_tails_are_counted_in_kept_records(tmp_path):
    tail = {"data": ["问：我的手机13800000000", "答：好的", "问：再见"]}
    data = b"\n".join(map(dump, [tail, {"data": ["问：只有问题13800000000"]}]))
    _, _, entry = converted(tmp_path, "huatuogpt_sft_train", data, "--mask-personal-data")
    assert entry["odd_tails"] == 1 and entry["masked"] == {"phone": 1} and entry["kept"] == 1


def test_decontamination_sees_through_masks(tmp_path):
    question = QA | {"instruction": "孩子发烧怎么办，我的手机13800000000请回复"}
    write_raw(tmp_path / "raw", "medchatzh_test", dump(question))
    records, _, entry = converted(tmp_path, "medchatzh_test", dump(question), "--mask-personal-data")
    assert "13800000000" not in records[0]["instruction"]
    write_raw(tmp_path / "raw", "medchatzh_train", dump(question) + b"\n" + dump(QA))
    assert run_convert(tmp_path, "--drop-overlap", "--mask-personal-data") == 0
    entry = manifest_of(tmp_path)["medchatzh_train"]
    assert entry["skipped"] == {"question of a test set": 1} and entry["masked"] == {}


def test_deduplication_over_datasets(tmp_path):
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA) + b"\n" + dump(QA | {"output": "您好！建议，休息"}))
    write_raw(tmp_path / "raw", "cmtmedqa_train", dump([QA, QA | {"output": "别的回答"}]))
    assert run_convert(tmp_path, "--drop-duplicates") == 0
    skipped = {name: entry["skipped"] for name, entry in manifest_of(tmp_path).items()}
    assert skipped == {
        "medchatzh_train": {"copy of an earlier record": 1},
        "cmtmedqa_train": {"copy of an earlier record": 1},
    }


def test_deduplication_of_a_file_that_is_read_again_as_gb18030(tmp_path):
    """The first try, as UTF-8, has kept the record of ASCII alone."""
    data = b"\n".join([dump({"instruction": "PSA?", "output": "OK"}), *[dump(QA).decode().encode("gbk")] * 3])
    _, _, entry = converted(tmp_path, "medchatzh_train", data, "--drop-duplicates")
    assert entry["kept"] == 2 and entry["skipped"] == {"copy of an earlier record": 2}


# ---- corpora of one's own -------------------------------------------------------------------------------------------
@pytest.fixture
def own(tmp_path, monkeypatch):
    path = tmp_path / "dataset_info/own.yaml"
    monkeypatch.setattr(registry, "OWN", path)
    monkeypatch.setattr(add_corpus, "OWN", path)
    return path


PARQUET = "parquet"
OWN_FILES = {
    "qa.jsonl": b"\n".join(dump({"q": f"问{n}", "a": f"答{n}。"}) for n in range(40)),
    "messages.json": dump([{"messages": [turn("user", f"问{n}"), turn("assistant", f"答{n}。")]} for n in range(40)]),
    "sharegpt.jsonl.gz": gzip.compress(b"\n".join(dump({"conversations": [{"from": "human", "value": f"问{n}"}, {"from": "gpt", "value": f"答{n}。"}]}) for n in range(40))),
    "table.csv": ("question,answer\n" + "".join(f'"问{n}, 好","答{n}。"\n' for n in range(40))).encode(),
    "table.tsv": ("question\tanswer\n" + "".join(f"问{n}\t答{n}。\n" for n in range(40))).encode(),
    "wrapped.json": dump({"data": [QA | {"instruction": f"问{n}", "output": f"答{n}。"} for n in range(40)]}),
    "pairs.jsonl": b"\n".join(dump([f"问{n}", f"答{n}。"]) for n in range(40)),
    "gbk.jsonl": "\n".join(json.dumps({"question": f"问{n}", "answer": f"答{n}。"}, ensure_ascii=False) for n in range(40)).encode("gbk"),
    "gbk.csv": ("问题,回答\n" + "".join(f"问{n},答{n}。\n" for n in range(40))).encode("gbk"),
    "semicolons.csv": ("question;answer\n" + "".join(f"问{n};答{n}。\n" for n in range(40))).encode(),
    "by_id.json": dump({f"id{n}": {"question": f"问{n}", "answer": f"答{n}。"} for n in range(40)}),
    "rows.parquet": PARQUET,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_corpus_of_ones_own(tmp_path, own, capsys, name):
    file = tmp_path / name
    if OWN_FILES[name] == PARQUET:
        from datasets import Dataset

        Dataset.from_list([{"question": f"问{n}", "answer": f"答{n}。"} for n in range(40)]).to_parquet(str(file))
    else:
        file.write_bytes(OWN_FILES[name])
    assert cli.main(["add-corpus", str(file), "--name", "clinic", "--test", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "40 of the first 40 records can be used" in said and "instruction: 问0" in said
    (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path) == 0
    train, test = (json_lines(tmp_path / f"out/clinic_{part}.jsonl") for part in ("train", "test"))
    assert sorted(record["output"] for record in train + test) == sorted(f"答{n}。" for n in range(40))
    assert 4 <= len(test) <= 20 and not {r["instruction"] for r in train} & {r["instruction"] for r in test}
    assert manifest_of(tmp_path)["clinic_train"]["encoding"] == ("gb18030" if name.startswith("gbk") else "utf-8")


def test_names_of_columns_and_a_folder_of_files(tmp_path, own, capsys):
    (tmp_path / "mine").mkdir()
    for n in range(3):
        (tmp_path / f"mine/{n}.jsonl").write_bytes(dump({"foo": f"问{n}", "bar": f"答{n}", "title": "x"}))
    assert cli.main(["add-corpus", str(tmp_path / "mine"), "--name", "mine"]) == 2
    assert "no layout fits its records (an object with foo, bar, title)" in capsys.readouterr().err
    words = ["add-corpus", str(tmp_path / "mine"), "--name", "mine", "--columns", "question=foo,answer=bar"]
    assert cli.main(words) == 0
    (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path) == 0
    assert [record["instruction"] for record in json_lines(tmp_path / "out/mine_train.jsonl")] == ["问0", "问1", "问2"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]}, "messages: turns do not alternate"),
        ({"messages": [turn("tool", "a"), turn("assistant", "c")]}, "messages: a turn of 'tool'"),
        ({"q": "a", "a": 5}, "an object with q, a: a is not text"),
        (QA | {"history": "[]"}, "history: history is not a list"),
        ({"x": "a", "y": "b"}, "(an object with x, y)"),
    ],
)  # fmt: skip
def test_why_no_layout_fits(tmp_path, own, capsys, value, says):
    (tmp_path / "mine.jsonl").write_bytes(b"\n".join([dump(value)] * 3))
    assert cli.main(["add-corpus", str(tmp_path / "mine.jsonl"), "--name", "mine"]) == 2
    assert says in capsys.readouterr().err


def test_a_dialogue_is_of_the_part_that_its_first_question_is_of():
    alone = [{"instruction": f"问{n}", "output": "答"} for n in range(60)]
    later = [QA | {"history": [[record["instruction"], "答"], ["再问", "再答"]]} for record in alone]
    parts = [[convert.in_test_part(record, 0.3) for record in records] for records in (alone, later)]
    assert parts[0] == parts[1] and 8 < sum(parts[0]) < 28


def test_rows_of_a_table_that_arent_whole(tmp_path, own, capsys):
    rows = ["question,answer", "问一,答一", "只有问", "", " ", "问,答,多余", '"问二，""引""",答二', "问三,", "问四,ÿ"]
    (tmp_path / "clinic.csv").write_bytes("\n".join(rows).encode().replace("ÿ".encode(), b"\xff"))
    assert cli.main(["add-corpus", str(tmp_path / "clinic.csv"), "--name", "clinic"]) == 0
    (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path, "clinic_train", "--max-rejects", "1") == 0
    assert [record["instruction"] for record in json_lines(tmp_path / "out/clinic_train.jsonl")] == [
        "问一",
        '问二，"引"',
    ]
    entry = manifest_of(tmp_path)["clinic_train"]
    assert entry["rejected"] == {"not 2 columns": 2, "empty answer": 1, "not UTF-8": 1}
    assert entry["skipped"] == {"blank line": 1}


def test_what_only_some_records_have_reaches_all(tmp_path, own):
    plain, more = QA | {"output": "plain"}, QA | {"history": [["一", "二"]], "system": "你是医生"}
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(map(dump, [plain, QA | {"system": "你是药师"}, more])))
    assert cli.main(["add-corpus", str(tmp_path / "mixed.jsonl"), "--name", "mixed"]) == 0
    (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path) == 0
    rows = json_lines(tmp_path / "out/mixed_train.jsonl")
    assert [row["system"] for row in rows] == ["", "你是药师", "你是医生"]
    assert [row["history"] for row in rows] == [[], [], [["一", "二"]]]
    assert rows[0]["output"] == "plain" and len({tuple(row) for row in rows}) == 1
    described = json.loads((tmp_path / "out/dataset_info.json").read_text(encoding="utf-8"))["mixed_train"]
    assert described["columns"].keys() == {"prompt", "query", "response", "history", "system"}
    entry, path = manifest_of(tmp_path)["mixed_train"], tmp_path / "out/mixed_train.jsonl"
    assert (entry["bytes"], entry["sha256"]) == (path.stat().st_size, sha256_of(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.jsonl", "--name", "x"], "no none.jsonl"),
        (["FILE", "--name", "A b"], "--name is 'A b'"),
        (["FILE", "--name", "medchatzh"], "a corpus of corpora.yaml"),
        (["FILE", "--name", "huatuo_encyclopedia"], "is a dataset of huatuo_encyclopedia_qa; give another --name"),
        (["FILE", "--name", "x", "--layout", "message"], "did you mean 'messages'?"),
        (["FILE", "--name", "x", "--columns", "q,a"], "--columns is 'q,a', must be question=NAME,answer=NAME"),
        (["FILE", "--name", "x", "--test", "2"], "--test is '2', must be a file or a share"),
        (["FILE", "--name", "x", "--columns", "question=q,answer=b"], "no record can be used as layout qa"),
    ],
)
def test_mistakes_with_ones_own_are_named(tmp_path, own, capsys, words, message):
    file = tmp_path / "qa.jsonl"
    file.write_bytes(OWN_FILES["qa.jsonl"])
    assert cli.main(["add-corpus", *(str(file) if word == "FILE" else word for word in words)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("a: {layout: sharegtp, datasets: {a_train: {files: [x]}}}", ["a: no layout 'sharegtp'; did you mean 'sharegpt'?"]),
        ("a: {layout: qa, license: MIT, datasets: {a_train: {file: x}}}", ["unknown key 'license'; did you mean 'licence'?", "a_train: unknown key 'file'; did you mean 'files'?", "a_train: no files"]),
        ("a: {rules: [x]}\nb: 5", ["a: unknown key 'rules'", "a: lacks the key layout", "a: lacks the key datasets", "b: is 5"]),
        ("[1]", ["must be a mapping of corpora"]),
    ],
)  # fmt: skip
def test_a_registrys_mistakes_are_named_all_at_once(tmp_path, text, messages):
    path = tmp_path / "corpora.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_datasets(path)
    for message in messages:
        assert message in str(error.value)


def test_an_entry_needs_only_layout_and_datasets(tmp_path):
    path = tmp_path / "corpora.yaml"
    path.write_text(yaml.safe_dump({"a": {"layout": "sharegpt", "datasets": {"a_train": {"files": "x.json"}}}}))
    dataset = load_datasets(path)["a_train"]
    assert (dataset.files, dataset.layout, dataset.corpus.licence) == (["x.json"], "sharegpt", "unknown")


# ---- no crash, no lost record ---------------------------------------------------------------------------------------
# pieces that a raw file is made of, and pieces that it is broken with
PIECES = st.sampled_from(
    [dump(QA), dump({"data": ["问：一", "答：二", "问：三"]}), dump({"messages": [turn("user", "a"), turn("assistant", "b")]}), dump(["a", "b"]),
     b'{"a":', b"[", b"]", b",", b"\n", b"\r\n", b"{", b"}", b'"', b"\\", b"\t1\t"]
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(PIECES, st.binary(max_size=12)), min_size=1, max_size=20),
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(["plain", "gzip", "zip", "csv", "tsv"]),
)
def test_no_bytes_crash_it_and_no_record_is_lost(tmp_path_factory, pieces, layout, container):
    data = b"".join(pieces) or b"\n"
    data = b"x" + data if data[:2] in (b"PK", b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff") else data
    folder = tmp_path_factory.mktemp("raw")
    path = folder / {"csv": "a.csv", "tsv": "a.tsv"}.get(container, "a.jsonl")
    path.write_bytes({"gzip": gzip.compress, "zip": zipped}.get(container, bytes)(data))
    (folder / "rejected").mkdir()
    corpus = registry.Corpus("x", layout)
    dataset = registry.Dataset("x_train", corpus, [path.name], layout=layout)
    try:
        entry = convert.convert_dataset(dataset, path, folder, convert.Options(), convert.Cleaner(None, None, False))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert entry["read"] == entry["kept"] + sum(entry["skipped"].values()) + sum(entry["rejected"].values())
    assert len(json_lines(folder / "x_train.jsonl")) == entry["kept"]
    lines = json_lines(folder / "rejected/x_train.jsonl")
    assert len(lines) == sum(entry["rejected"].values())
    one_value = data.removeprefix(BOM).lstrip()[:1] in (b"[", b"{")
    if container in ("plain", "gzip", "zip") and layout == "columns" or not one_value and container == "plain":
        text = data.removeprefix(BOM)
        records = len(list(read_records(path, layout, entry["encoding"])))
        assert records == text.count(b"\n") + (not text.endswith(b"\n") and text != b"")
        for line in lines:
            assert line["raw"].encode("utf-8", "surrogateescape") in text
