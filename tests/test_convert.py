"""medasst convert: layouts, dirt, accounting, whole files or none, and what LLaMA-Factory makes of the result."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from medasst_tools import cli
from medasst_tools.data import convert
from medasst_tools.data.layouts import LAYOUTS, Rejected, Skipped
from medasst_tools.data.raw_files import MAX_RECORD_BYTES, leaves_archive, open_raw, read_blocks
from medasst_tools.data.registry import load_datasets

QA = {"instruction": "头痛怎么办？", "input": "", "output": "您好，建议休息。"}


def dump(record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def write_raw(folder: Path, dataset: str, data: bytes) -> Path:
    facts = load_datasets()[dataset]
    path = folder / facts.corpus.name / facts.files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def run_convert(tmp_path: Path, *words: str) -> int:
    return cli.main(
        [
            "convert",
            *words,
            "--raw-dir",
            str(tmp_path / "raw"),
            "--out-dir",
            str(tmp_path / "out"),
            "--max-rejects",
            "1",
        ]
    )


def converted(tmp_path: Path, dataset: str, data: bytes, *words: str):
    """Convert one dataset's raw bytes; (records, rejected lines, manifest entry)."""
    write_raw(tmp_path / "raw", dataset, data)
    assert run_convert(tmp_path, dataset, *words) == 0
    out = tmp_path / "out"
    records, rejected = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (out / f"{dataset}.jsonl", out / "rejected" / f"{dataset}.jsonl")
    )
    entry = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["datasets"][dataset]
    assert entry["read"] == entry["kept"] + sum(entry["skipped"].values()) + sum(entry["rejected"].values())
    assert entry["kept"] == len(records) and sum(entry["rejected"].values()) == len(rejected)
    return records, rejected, entry


def alpaca(question: str, answer: str, history=None, more: str = "") -> dict:
    record = {"instruction": question, "input": more, "output": answer}
    return record if history is None else record | {"history": history}


@pytest.mark.parametrize(
    ("layout", "raw", "expected"),
    [
        ("instruction", dump(QA), alpaca("头痛怎么办？", "您好，建议休息。")),
        ("instruction", dump(QA | {"input": "三天了"}), alpaca("头痛怎么办？", "您好，建议休息。", more="三天了")),
        ("instruction", dump(QA | {"input": None}), alpaca("头痛怎么办？", "您好，建议休息。")),
        ("instruction", dump({"instruction": " 　问\u200b\n", "output": "\ufeff答 "}), alpaca("问", "答")),
        ("instruction", dump(QA | {"output": "  \u200b　"}), Rejected("empty output")),
        ("instruction", dump(QA | {"output": ["您好"]}), Rejected("output is not text")),
        ("instruction", dump(QA | {"output": 5}), Rejected("output is not text")),
        ("instruction", dump(QA | {"output": None}), Rejected("no output")),
        ("instruction", dump({"output": "答"}), Rejected("no instruction")),
        ("instruction", dump(QA | {"input": []}), Rejected("input is not text")),
        ("instruction", dump(QA)[:30], Rejected("not UTF-8")),  # cut inside a character
        ("instruction", dump(QA)[:-5], Rejected("not JSON")),
        ("instruction", b"[1]", Rejected("not an object")),
        ("instruction", b"null", Rejected("not an object")),
        ("instruction", b'{"instruction": "\\ud800", "output": "x"}', Rejected("not JSON")),  # a lone surrogate
        ("instruction", b'{"instruction": "a\x00b", "output": "x"}', Rejected("not JSON")),
        ("instruction", b'{"instruction": "\xff", "output": "x"}', Rejected("not UTF-8")),
        ("instruction", b"[" * 100_000, Rejected("not JSON")),
        ("encyclopedia", dump({"questions": [["问一", "问二"]], "answers": ["答"]}), alpaca("问一", "答")),
        ("encyclopedia", dump({"questions": ["问"], "answers": "答"}), alpaca("问", "答")),
        ("encyclopedia", dump({"questions": "问", "answers": [["答"]]}), alpaca("问", "答")),
        ("encyclopedia", dump({"questions": [[]], "answers": ["答"]}), Rejected("empty questions")),
        ("encyclopedia", dump({"questions": ["问"], "answers": []}), Rejected("empty answers")),
        ("encyclopedia", dump({"questions": ["问"], "answers": [None]}), Rejected("no answers")),
        (
            "encyclopedia",
            dump({"questions": ["问"], "answers": ["https://a.cn/1.htm "]}),
            Rejected("answers is only a URL"),
        ),
        (
            "encyclopedia",
            dump({"questions": ["问"], "answers": ["见 https://a.cn/1.htm"]}),
            alpaca("问", "见 https://a.cn/1.htm"),
        ),
        ("turns", dump({"data": ["问：一\n", "答：二"]}), alpaca("一", "二", [])),
        ("turns", dump({"data": ["问:一", "答: 二", "问：三", "答：四"]}), alpaca("三", "四", [["一", "二"]])),
        ("turns", dump({"data": ["一", "二"]}), alpaca("一", "二", [])),
        ("turns", dump({"data": ["问：一", "答：二", "问：三"]}), alpaca("一", "二", [])),  # an odd tail
        ("turns", dump({"data": ["问：一", "答：二", "答：三"]}), Rejected("turns do not alternate")),
        ("turns", dump({"data": ["答：一", "问：二"]}), Rejected("turns do not alternate")),
        ("turns", dump({"data": ["问：一"]}), Rejected("no answer")),
        ("turns", dump({"data": []}), Rejected("no answer")),
        ("turns", dump({"data": ["问：一", "答："]}), Rejected("an empty turn")),
        ("turns", dump({"data": ["问：一", ["答"]]}), Rejected("a turn is not text")),
        ("turns", dump({"data": "问：一"}), Rejected("data is not a list")),
        ("turns", dump({}), Rejected("no data")),
        (
            "dialogue",
            dump(QA | {"history": [["一", " 二 "]]}),
            alpaca(QA["instruction"], QA["output"], [["一", "二"]]),
        ),
        ("dialogue", dump({"instruct": "问", "output": "答"}), alpaca("问", "答", [])),
        ("dialogue", dump(QA | {"history": None}), alpaca(QA["instruction"], QA["output"], [])),
        ("dialogue", dump(QA | {"history": [["一"]]}), Rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [["一", None]]}), Rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [[["一"], "二"]]}), Rejected("a history item is not a pair of texts")),
        ("dialogue", dump(QA | {"history": [["", "二"]]}), Rejected("an empty turn in history")),
        ("dialogue", dump(QA | {"history": "一"}), Rejected("history is not a list")),
        ("columns", "内科\t1\t7\t问\t答\r".encode(), alpaca("问", "答")),
        ("columns", '内科\t1\t7\t"问\t答"他说"'.encode(), alpaca('"问', '答"他说"')),
        ("columns", "内科\t0\t7\t问\t答".encode(), Skipped("label 0")),
        ("columns", "内科\t2\t7\t问\t答".encode(), Rejected("label is neither 0 nor 1")),
        ("columns", "内科\t1\t7\t问".encode(), Rejected("not 5 columns")),
        ("columns", "内科\t1\t7\t问\t答\t再".encode(), Rejected("not 5 columns")),
        ("columns", "内科\t1\t7\t问\t 　".encode(), Rejected("empty answer")),
        ("columns", "内科\t1\t7\t\t答".encode(), Rejected("empty question")),
        ("columns", b"a\t1\t7\tq\t\xff", Rejected("not UTF-8")),
    ],
)
def test_one_raw_record(layout, raw, expected):
    record = LAYOUTS[layout](raw)
    assert record == expected and isinstance(record, dict) == isinstance(expected, dict)
    if not isinstance(expected, dict):
        assert type(record) is type(expected)


def test_samples_convert_and_account(tmp_path):
    out = tmp_path / "out"
    assert cli.main(["convert", "--raw-dir", str(SAMPLES / "raw"), "--out-dir", str(out), "--max-rejects", "0.1"]) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["datasets"]
    assert (
        list(manifest)
        == list(load_datasets())
        == list(json.loads((out / "dataset_info.json").read_text(encoding="utf-8")))
    )
    for name, entry in manifest.items():
        assert entry["kept"] >= (40 if name.endswith("_train") else 10), name
        assert (sum(entry["rejected"].values()) >= 3) == name.endswith("_train"), name
    assert manifest["huatuogpt_sft_train"]["odd_tails"] == 1


@pytest.mark.real_data
def test_real_text_converts_whole(real_data, tmp_path):
    assert cli.main(["convert", "--raw-dir", str(real_data / "raw"), "--out-dir", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["datasets"]
    kept = {name: entry["kept"] for name, entry in manifest.items()}
    assert sum(count for name, count in kept.items() if name.endswith("_train")) == 4400
    assert sum(count for name, count in kept.items() if name.endswith("_test")) == 1444
    assert kept["cmtmedqa_test"] == 1144  # the genuine file: two record shapes, two records indented otherwise


@pytest.mark.real_data
def test_array_elements_have_their_own_lines_and_bytes(real_data):
    path = real_data / "raw/cmtmedqa/CMtMedQA_test.json"
    lines = path.read_bytes().split(b"\n")
    with open_raw(path) as stream:
        pairs = [
            pair for block in read_blocks(stream, "dialogue") for pair in zip(block.lines, block.records, strict=True)
        ]
    assert all(lines[line - 1].strip() == b"{" for line, _ in pairs)
    assert [json.loads(record) for _, record in pairs] == json.loads(path.read_bytes())


RECORDS = [QA | {"output": f"答{number}。", "extra": {"nested": [{"a": 1}, {"b": "}, {"}]}} for number in range(5)]


@pytest.mark.parametrize(
    "data",
    [
        b"\n".join(map(dump, RECORDS)),
        b"\xef\xbb\xbf" + b"\r\n".join(map(dump, RECORDS)) + b"\r\n",
        json.dumps(RECORDS, ensure_ascii=False, indent=4).encode(),
        json.dumps(RECORDS, indent="\t").encode(),
        json.dumps(RECORDS, ensure_ascii=False).encode(),
        b" \n[" + b",\n".join(map(dump, RECORDS)) + b"]\n",
        b"[\n" + b",\n".join(map(dump, RECORDS)) + b"\n]",
        gzip.compress(b"\n".join(map(dump, RECORDS))),
    ],
    ids=["lines", "bom-crlf", "array-4", "array-tab", "array-compact", "array-per-line", "array-no-indent", "gzip"],
)
def test_containers_by_content(tmp_path, data):
    records, rejected, _ = converted(tmp_path, "medchatzh_train", data)
    assert [record["output"] for record in records] == [f"答{number}。" for number in range(5)] and not rejected


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("broken", [b'{"instruction": "a', b'{"instruction": }', b"{{", b"5"])
def test_a_broken_element_spoils_only_itself(tmp_path, indent, broken):
    text = json.dumps(RECORDS, ensure_ascii=False, indent=indent).encode()
    whole = json.dumps(RECORDS[2], ensure_ascii=False, indent=indent).encode()
    if indent:
        whole = whole.replace(b"\n", b"\n  ")
    assert text.count(whole) == 1
    data = text.replace(whole, broken + b"}" if broken.startswith(b"{") else broken)
    records, rejected, _ = converted(tmp_path, "medchatzh_train", data)
    assert [record["output"] for record in records][:2] == ["答0。", "答1。"] and len(rejected) >= 1
    assert records[-1]["output"] == "答4。" and len(records) >= 3


def test_truncated_array_and_blank_lines(tmp_path):
    text = json.dumps(RECORDS, ensure_ascii=False, indent=4).encode()
    records, rejected, _ = converted(tmp_path, "medchatzh_train", text[: text.rindex("答4".encode())])
    assert len(records) == 4 and len(rejected) == 1
    records, rejected, entry = converted(
        tmp_path, "medchatzh_train", dump(QA) + b"\n\n  \n" + dump(QA) + b"\n" + dump(QA)[:-9]
    )
    assert len(records) == 2 and entry["skipped"] == {"blank line": 2} and rejected[0]["line"] == 5


def test_one_huge_line_is_rejected_and_the_next_is_read(tmp_path):
    huge = dump(QA | {"output": "长" * (MAX_RECORD_BYTES // 2)})
    records, rejected, entry = converted(tmp_path, "medchatzh_train", dump(QA) + b"\n" + huge + b"\n" + dump(QA))
    assert (
        len(records) == 2
        and entry["read"] == 3
        and rejected[0]["line"] == 2
        and "longer than" in rejected[0]["reason"]
    )
    array = json.dumps(
        [QA, QA | {"output": "长" * (MAX_RECORD_BYTES // 2)}, QA], ensure_ascii=False, indent=1
    ).encode()
    records, rejected, entry = converted(tmp_path, "medchatzh_train", array)
    assert len(records) == 2 and entry["read"] == 3 and "longer than" in rejected[0]["reason"]


def test_rejected_raw_gives_the_bytes_back(tmp_path):
    raw = b'{"instruction": "\xe5\xa4\xb4", "output": "\xff\xfe"'
    _, rejected, _ = converted(tmp_path, "medchatzh_train", dump(QA) + b"\n" + raw)
    assert rejected[0]["raw"].encode("utf-8", "surrogateescape") == raw


def make_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_webmedqa_in_its_released_zip(tmp_path):
    make_zip(
        tmp_path / "raw/webmedqa/train.zip", {"medQA.train.txt": "内科\t1\t7\t问\t答\n内科\t0\t7\t问\t错\n".encode()}
    )
    assert run_convert(tmp_path, "webmedqa_train") == 0
    entry = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["datasets"]["webmedqa_train"]
    assert (entry["read"], entry["kept"], entry["skipped"]) == (2, 1, {"label 0": 1})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../a.txt": b"x"}, "leaves the archive"),
        ({"/a.txt": b"x"}, "leaves the archive"),
        ({"a.txt": b"x", "b.txt": b"y"}, "must hold one text file"),
        ({}, "must hold one text file"),
        ({"a.txt": b"0" * 50_000_000}, "a zip bomb?"),
    ],
)
def test_archives_that_are_not_the_published_file(tmp_path, capsys, members, message):
    make_zip(tmp_path / "raw/webmedqa/train.zip", members)
    if not members:  # an empty zip has another first signature
        (tmp_path / "raw/webmedqa/train.zip").write_bytes(b"PK\x03\x04" + b"\x00" * 30)
        message = "not a whole zip"
    assert run_convert(tmp_path, "webmedqa_train") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "leaves"), [("a/b.txt", False), ("a/../../b", True), ("C:\\b", True), ("..\\b", True), ("/b", True)]
)
def test_paths_that_leave_an_archive(name, leaves):
    assert leaves_archive(name) is leaves


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (json.dumps(QA).encode("utf-16"), "UTF-16"),
        (gzip.compress(dump(QA) * 1000)[:-20], "damaged"),
        (gzip.compress(b" " * 100_000_000), "a zip bomb?"),
    ],
)
def test_unusable_files_are_one_line_and_status_2(tmp_path, capsys, data, message):
    path = write_raw(tmp_path / "raw", "medchatzh_train", data)
    assert run_convert(tmp_path) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and str(path) in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope_train"], "no dataset 'nope_train'; there are medchatzh_train"),
        (["webmedqa_train"], "medQA.train.txt or"),
        ([], "no raw folder"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, words, message):
    if words:
        (tmp_path / "raw").mkdir()
    assert run_convert(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA))
    (tmp_path / "out").write_text("a file where the folder should be", encoding="utf-8")
    assert run_convert(tmp_path) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_too_many_rejects_is_status_1(tmp_path, capsys):
    write_raw(tmp_path / "raw", "medchatzh_train", dump(QA) + b"\nbroken\n")
    words = ["convert", "--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out")]
    assert cli.main(words) == 1 and "medchatzh_train 50.00%" in capsys.readouterr().err
    assert cli.main([*words, "--max-rejects", "0.5"]) == 0


def test_a_second_dataset_keeps_the_first(tmp_path):
    converted(tmp_path, "medchatzh_train", dump(QA))
    converted(tmp_path, "medchatzh_test", dump(QA))
    assert list(json.loads((tmp_path / "out/dataset_info.json").read_text(encoding="utf-8"))) == [
        "medchatzh_train",
        "medchatzh_test",
    ]


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("medasst_tools.data.raw_files.BLOCK_BYTES", 2000)
    data = b"\n".join(dump(QA | {"output": f"答{number}"}) if number % 7 else b"broken" for number in range(400))
    outputs = []
    for workers in ("1", "2", "3"):
        converted(tmp_path, "medchatzh_train", data, "--workers", workers)
        files = sorted(path for path in (tmp_path / "out").rglob("*.json*"))
        outputs.append([(path.name, path.read_bytes()) for path in files])
    assert outputs[0] == outputs[1] == outputs[2]


def test_a_kill_leaves_the_old_output(tmp_path):
    converted(tmp_path, "medchatzh_train", dump(QA))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    write_raw(tmp_path / "raw", "medchatzh_train", (dump(QA) + b"\n") * 2_000_000)
    words = ["convert", "--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out")]
    run = subprocess.Popen([sys.executable, "-m", "medasst_tools.cli", *words], stderr=subprocess.DEVNULL)
    while not (tmp_path / "out" / convert.STAGING / "medchatzh_train.jsonl").exists() and run.poll() is None:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert after == before and "manifest.json" in after
    converted(tmp_path, "medchatzh_train", dump(QA))
    assert not (tmp_path / "out" / convert.STAGING).exists()


def test_two_runs_at_once(tmp_path, capsys):
    converted(tmp_path, "medchatzh_train", dump(QA))
    with convert._locked(tmp_path / "out"):
        assert run_convert(tmp_path) == 2
    assert "another run is writing" in capsys.readouterr().err


# pieces that a raw file is made of, and pieces that it is broken with
PIECES = st.sampled_from(
    [
        dump(QA),
        dump({"data": ["问：一", "答：二", "问：三"]}),
        b'{"a":',
        b"[",
        b"]",
        b",",
        b"\n",
        b"\r\n",
        b"{",
        b"}",
        b'"',
        b"\\",
        b"\t1\t",
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.one_of(PIECES, st.binary(max_size=12)), min_size=1, max_size=25), st.sampled_from(sorted(LAYOUTS)))
def test_no_bytes_crash_it_and_no_record_is_lost(tmp_path_factory, pieces, layout):
    data = b"".join(pieces) or b"\n"  # an empty file is refused before it is read
    path = tmp_path_factory.mktemp("raw") / "file"
    path.write_bytes(b"x" + data if data[:2] in (b"PK", b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff") else data)
    read = kept = skipped = rejected = 0
    with open_raw(path) as stream:
        for block in read_blocks(stream, layout):
            result = convert.convert_block(block, layout)
            read, kept, skipped = read + result.read, kept + result.kept, skipped + sum(result.skipped.values())
            rejected += len(result.rejected)
            for _, _, raw in result.rejected:
                line = json.loads(convert._rejected_line(1, "why", raw))
                assert line["raw"].encode("utf-8", "surrogateescape") == raw
            assert result.output.count(b"\n") == result.kept
    assert read == kept + skipped + rejected
    if layout == "columns" or not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        assert read == text.count(b"\n") + (not text.endswith(b"\n") and text != b"")
