"""medasst audit and the cleaner variants of convert: known duplicates, leaks and personal data, found and left out."""

import json
from pathlib import Path

import pytest
from conftest import SAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from medasst_tools import cli
from medasst_tools.data.decontamination import NEAR, QuestionIndex
from medasst_tools.data.deduplication import jaccard, key, normalise, question_of, shingles
from medasst_tools.data.pii import MASKS, is_id_number, mask

LONG = "孩子三岁，昨天晚上开始发烧到三十八度五，还有点咳嗽和流鼻涕，请问需要马上去医院吗？"
NEARLY = LONG.replace("昨天晚上", "昨日晚上")
OTHER = "老人高血压多年，最近早上起床头晕，血压一百六，应该怎样调整生活习惯？"


def write_raw(folder: Path, train: list[dict], test: list[dict]) -> Path:
    corpus = folder / "medchatzh"
    corpus.mkdir(parents=True)
    for name, records in (("MedChatZH_train.json", train), ("MedChatZH_valid.json", test)):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (corpus / name).write_text("".join(lines), encoding="utf-8")
    return folder


def qa(question: str, answer: str = "建议及时就医。") -> dict:
    return {"instruction": question, "input": "", "output": answer}


TRAIN = [
    qa(LONG, "A"), qa(LONG + " ", "A"), qa(LONG.replace("，", ","), "A"), qa(NEARLY, "B"), qa(OTHER, "C"), qa(OTHER, "D"),
    qa("怎么挂号？", "打13812345678，或加微信：yisheng_01。"), qa("邮箱？", "a.b@c.com 和 www.x.cn/a"),
]  # fmt: skip
TEST = [qa(LONG, "T"), qa("从来没有人问过的问题，关于罕见的病。", "T")]


def audit(folder: Path, *words: str) -> dict:
    assert cli.main(["audit", "--data-dir", str(folder), *words]) == 0
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


@pytest.fixture
def converted(tmp_path) -> Path:
    raw = write_raw(tmp_path / "raw", TRAIN, TEST)
    assert cli.main(["convert", "--raw-dir", str(raw), "--out-dir", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def test_duplicates(converted):
    # the second differs in white space that convert takes away, the third in punctuation
    train = audit(converted)["datasets"]["medchatzh_train"]
    assert train["duplicates"] == {"records": 1, "records_normalised": 2, "questions": 2, "questions_normalised": 3}
    assert train["n"] == 8
    assert train["characters"]["answer"] == {"mean": pytest.approx(6.62, abs=3), "p50": 1.0, "p90": pytest.approx(20, abs=8),
                                             "p99": pytest.approx(26, abs=8), "max": max(len(r["output"]) for r in TRAIN)}  # fmt: skip


def test_overlap(converted):
    findings = audit(converted)
    assert findings["overlap"]["medchatzh_test"] == {
        "n": 2, "exact": 1, "normalised": 0, "near": 0, "training_records": {"medchatzh_train": 4}
    }  # fmt: skip
    rows = [json.loads(line) for line in (converted / "overlap.jsonl").read_text().splitlines()]
    assert [(row["line"], row["kind"]) for row in rows] == [(1, "exact"), (2, "exact"), (3, "normalised"), (4, "near")]
    assert all((row["test_set"], row["test_line"]) == ("medchatzh_test", 1) for row in rows)
    shared = [
        entry for entry in findings["between"] if {entry["a"], entry["b"]} == {"medchatzh_train", "medchatzh_test"}
    ]
    assert shared[0]["questions"] == 1 and shared[0]["records"] == 0


def test_personal_data_is_counted(converted):
    found = audit(converted)["datasets"]["medchatzh_train"]["personal_data"]
    assert {kind: entry["records"] for kind, entry in found.items()} == {
        "phone": 1, "wechat": 1, "email": 1, "url": 1, "id_number": 0, "qq": 0
    }  # fmt: skip


def test_exam_questions_are_looked_for(tmp_path, converted):
    from medasst_tools.data.exam_questions import load_protocol, load_subjects

    stem = load_subjects(SAMPLES / "exams", load_protocol())[0].questions[0].text
    raw = write_raw(tmp_path / "raw2", [qa(stem + "？")], TEST)
    assert cli.main(["convert", "--raw-dir", str(raw), "--out-dir", str(tmp_path / "data2")]) == 0
    overlap = audit(tmp_path / "data2", "--exams-dir", str(SAMPLES / "exams"))["overlap"]
    assert overlap["cmmlu"]["normalised"] + overlap["cmmlu"]["exact"] == 1 and overlap["ceval"]["n"] == 12


def test_tokens(converted, tmp_path):
    """Against LLaMA-Factory's own preprocessing of the same records."""
    assert cli.main(["tiny-model", "--data-dir", str(converted), "--out", str(tmp_path / "model")]) == 0
    config = tmp_path / "train.yaml"
    config.write_text("cutoff_len: 40\ntemplate: qwen\ndefault_system: 你是助手。\n", encoding="utf-8")
    words = ["--tokenizer", str(tmp_path / "model"), "--config", str(config)]
    tokens = audit(converted, *words)["datasets"]["medchatzh_train"]["tokens"]
    assert "tokens" not in audit(converted, *words[2:])["datasets"]["medchatzh_train"]
    with config.open("a", encoding="utf-8") as file:
        print(f"model_name_or_path: {tmp_path / 'model'}", file=file)
    assert audit(converted, *words[2:])["datasets"]["medchatzh_train"]["tokens"] == tokens
    made_of = audit(converted, *words)["made_of"]["files"]
    config.write_text(config.read_text(encoding="utf-8").replace("助手", "很好的助手"), encoding="utf-8")
    again = audit(converted, *words)
    assert again["made_of"]["files"]["config"] != made_of["config"]
    assert again["datasets"]["medchatzh_train"]["tokens"]["max"] > tokens["max"]
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    records = [
        json.loads(line) for line in (converted / "medchatzh_train.jsonl").read_text(encoding="utf-8").splitlines()
    ]

    def lengths(cutoff_len: int) -> list[int]:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        arguments = DataArguments(template="qwen", cutoff_len=cutoff_len, default_system="你是助手。")
        template = get_template_and_fix_tokenizer(tokenizer, arguments)
        processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
        turns = [
            ([{"role": "user", "content": r["instruction"]}], [{"role": "assistant", "content": r["output"]}])
            for r in records
        ]
        return [len(processor._encode_data_example(*turn, "", "", [], [], [])[0]) for turn in turns]

    whole, cut = lengths(10**6), lengths(40)
    assert (tokens["n"], tokens["max"]) == (8, max(whole))
    assert tokens["mean"] == pytest.approx(sum(whole) / 8, abs=0.01)
    assert tokens["cut"] == sum(a < b for a, b in zip(cut, whole, strict=True)) / 8 > 0
    parts = tokens["cut_by_part"]
    assert parts["history"] == 0 < max(parts.values()) <= tokens["cut"] <= sum(parts.values())


VARIANTS = [
    (["--drop-overlap"], ["C", "D", "打13812345678，或加微信：yisheng_01。", "a.b@c.com 和 www.x.cn/a"]),
    (["--drop-duplicates"], ["A", "B", "C", "D", "打13812345678，或加微信：yisheng_01。", "a.b@c.com 和 www.x.cn/a"]),
    (["--mask-personal-data"], ["A", "A", "A", "B", "C", "D", "打[电话]，或加微信：[微信号]。", "[邮箱] 和 [网址]"]),
    (["--drop-overlap", "--drop-duplicates", "--mask-personal-data"], ["C", "D", "打[电话]，或加微信：[微信号]。", "[邮箱] 和 [网址]"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "answers"), VARIANTS)
def test_variants(tmp_path, words, answers):
    raw, out = write_raw(tmp_path / "raw", TRAIN, TEST), tmp_path / "data"
    assert cli.main(["convert", "--raw-dir", str(raw), "--out-dir", str(out), *words]) == 0
    kept = [json.loads(line) for line in (out / "medchatzh_train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["output"] for record in kept] == answers
    entry = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["datasets"]["medchatzh_train"]
    assert entry["read"] == entry["kept"] + sum(entry["skipped"].values()) + sum(entry["rejected"].values())
    assert entry["variant"] == [word.removeprefix("--") for word in words]
    tests = (out / "medchatzh_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(tests) == len(TEST)
    after = audit(out)
    if "--drop-overlap" in words:
        assert after["overlap"]["medchatzh_test"]["training_records"] == {}
    if "--drop-duplicates" in words:
        assert after["datasets"]["medchatzh_train"]["duplicates"]["records_normalised"] == 0
    if "--mask-personal-data" in words:
        assert not any(kind["matches"] for kind in after["datasets"]["medchatzh_train"]["personal_data"].values())


def test_drop_overlap_keeps_histories_loadable(tmp_path):
    """The first record with history may be dropped: its place must not be taken for another's."""
    folder = tmp_path / "raw/cmtmedqa"
    folder.mkdir(parents=True)
    talk = {
        "instruction": LONG,
        "output": "A",
        "history": [["以前从来没有这样过，全家人都很担心，该怎么办才好？", "不痛。"]],
        "id": 1,
        "cate1": "",
        "cate2": "",
    }
    records = [talk | {"history": []}, talk, talk | {"instruction": OTHER}]
    (folder / "CMtMedQA.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (folder / "CMtMedQA_test.json").write_text(json.dumps([talk], ensure_ascii=False), encoding="utf-8")
    words = [
        "--raw-dir",
        str(tmp_path / "raw"),
        "--out-dir",
        str(tmp_path / "data"),
        "--drop-overlap",
        "--drop-duplicates",
    ]
    assert cli.main(["convert", *words]) == 0
    lines = (tmp_path / "data/cmtmedqa_train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == [LONG, OTHER]


@pytest.mark.parametrize(
    ("text", "masked", "kinds"),
    [
        ("电话13812345678，", "电话[电话]，", {"phone": 1}),
        ("138-1234-5678 或 +86 139 1234 5678", "[电话] 或 [电话]", {"phone": 2}),
        ("身份证11010519491231002X。", "身份证[身份证号]。", {"id_number": 1}),
        ("编号110105194912310021", "编号110105194912310021", {}),  # its check digit is wrong
        ("加我微信号：abc_12345", "加我微信号：[微信号]", {"wechat": 1}),
        ("vx13812345678", "vx[微信号]", {"wechat": 1}),
        ("加我qq 123456789", "加我qq [QQ号]", {"qq": 1}),
        ("QQ群:88888", "QQ群:[QQ号]", {"qq": 1}),
        ("zhang.san@mail.example.cn", "[邮箱]", {"email": 1}),
        ("见http://a.cn/b?c=1。", "见[网址]。", {"url": 1}),
        ("我的座机010-62345678", "我的座机[电话]", {"phone": 1}),
        ("打(0571)87654321转8", "打[电话]转8", {"phone": 1}),
        ("客服400-820-8820，800 810 1234", "客服[电话]，[电话]", {"phone": 2}),
        ("手机１３８００００００００", "手机[电话]", {"phone": 1}),
        ("请服用wxanadu12号方", "请服用wxanadu12号方", {}),
        ("我vx: abc_12345", "我vx: [微信号]", {"wechat": 1}),
        ("手机13800000000，另13900000000，微信abcdef1，qq 123456", "手机[电话]，另[电话]，微信[微信号]，qq [QQ号]", {"wechat": 1, "qq": 1, "phone": 2}),
        ("2024-01-15复查，剂量0.5-1g，编号05718765", "2024-01-15复查，剂量0.5-1g，编号05718765", {}),
        ("血压120/80，体温38.5，2010.4.26，体重60kg，0.25g*12片", "血压120/80，体温38.5，2010.4.26，体重60kg，0.25g*12片", {}),
        ("加V：dr_wang66 咨询", "加V：[微信号] 咨询", {"wechat": 1}),
        ("多加vc片", "多加vc片", {}),
        ("微信公众号有科普", "微信公众号有科普", {}),
        ("血小板100000000000", "血小板100000000000", {}),
    ],
)  # fmt: skip
def test_mask(text, masked, kinds):
    assert mask(text) == (masked, kinds)
    assert mask(masked)[0] == masked


def test_masks_name_every_kind():
    assert len(set(MASKS.values())) == len(MASKS)
    assert is_id_number("11010519491231002X") and not is_id_number("110105194912310020")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("头痛，怎么办？", "头痛怎么办", True),
        ("ＣＴ检查", "ct 检查", True),
        ("头痛", "头疼", False),
        ("38.5℃", "385℃", False),
        ("HBsAg（+）是什么意思", "HBsAg(-)是什么意思", False),
        ("HBsAg（＋）是什么意思？", "HBsAg(+)是什么意思", True),
        ("HBsAg+", "HBsAg-", False),
        ("血糖<7怎么办", "血糖>7怎么办", False),
        ("血糖 ＜ 7 怎么办", "血糖<7怎么办", True),
        ("吃5.5mg", "吃55mg", False),
        ("疗程3-5天", "疗程35天", False),
        ("疗程3~5天", "疗程３～５天", True),
        ("血压120/80", "血压12080", False),
        ("按1:2稀释", "按12稀释", False),
        ("含量5%", "含量5", False),
        ("COVID-19", "covid19", True),
        ("手术3+2次", "手术32次", False),
        ("疗程3 - 5天", "疗程35天", False),
        ("右眼-3.5度", "右眼+3.5度", False),
        ("-5度保存", "5度保存", False),
        ("乙肝阳性+", "乙肝阳性-", False),
        ("ALT↑", "ALT↓", False),
        ("尿糖(++)", "尿糖(+)", False),
        ("10^9", "109", False),
        ("吃½片", "吃12片", False),
        ("甲状腺结节≠7", "甲状腺结节=7", False),
        ("体温≥38", "体温≤38", False),
        ("（头痛）。怎么-办", "头痛怎么办", True),
    ],
)
def test_normalise(a, b, same):
    assert (key(normalise(a)) == key(normalise(b))) is same


def test_question_of_a_conversation_is_all_its_questions():
    record = {
        "instruction": "那吃什么？",
        "input": "",
        "output": "粥",
        "history": [["胃痛", "多久了"], ["三天", "好"]],
    }
    assert question_of(record) == "胃痛\n三天\n那吃什么？"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", set()), ("头", {"头"}), ("头痛吗", {"头痛吗"}), ("头痛三天", {"头痛三", "痛三天"}), ("aaaa", {"aaa"})],
)
def test_shingles_are_neighbouring_characters(text, expected):
    assert shingles(text) == expected


WORDS = st.lists(st.sampled_from("头痛发热咳嗽三天孩子老人吃药血压高怎么办"), min_size=4, max_size=30).map("".join)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(WORDS, min_size=1, max_size=8), WORDS)
def test_index_finds_what_comparing_with_every_question_finds(questions, asked):
    index = QuestionIndex({"t": questions})
    found = {match.place for match in index.match(asked)}
    expected = {
        place
        for place, question in enumerate(questions)
        if jaccard(shingles(normalise(question)), shingles(normalise(asked))) >= NEAR
    }
    assert found == expected


@pytest.mark.parametrize(
    ("spoil", "words", "message"),
    [
        (lambda folder: (folder / "dataset_info.json").unlink(), [], "dataset_info.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), [], "damaged"),
        (lambda folder: (folder / "medchatzh_train.jsonl").write_text(""), [], "isn't what the manifest says"),
        (lambda folder: None, ["--workers", "0"], "--workers is 0"),
        (lambda folder: None, ["--exams-dir", "nowhere"], "nowhere"),
        (lambda folder: None, ["--tokenizer", "nowhere", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(converted, capsys, spoil, words, message):
    spoil(converted)
    assert cli.main(["audit", "--data-dir", str(converted), *words]) == 2
    assert message in capsys.readouterr().err


def test_again_is_up_to_date_and_a_tokenizer_is_something_else(converted, capsys):
    words = ["audit", "--data-dir", str(converted)]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{converted}/audit.json: up to date\n"
    assert cli.main([*words, "--tokenizer", "nowhere"]) == 2  # looked for, not left out
    assert cli.main([*words, "--exams-dir", str(SAMPLES / "exams")]) == 0
    assert "audit.json: made anew: file exams unset -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "records"),
    [
        (
            {"columns": {"prompt": "q", "response": "a"}},
            [{"q": "我的手机13800000000和13900000000", "a": "微信号abcdef1<|im_end|>"}, {"q": "", "a": "x"}],
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "turns"}},
            [
                {
                    "turns": [
                        {"from": "human", "value": "手机13800000000"},
                        {"from": "gpt", "value": "13900000000，微信号abcdef1<|im_end|>"},
                    ]
                }
            ],
        ),
    ],
)
def test_a_folder_of_ones_own_is_audited_as_it_is(tmp_path, capsys, entry, records):
    """One record with three pieces counts as one everywhere."""
    (tmp_path / "a_train.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a_train": {"file_name": "a_train.json"} | entry}))
    assert cli.main(["audit", "--data-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "audit.json").read_text())["datasets"]["a_train"]
    assert (found["n"], found["personal_records"], found["personal_pieces"], found["control_tokens"]) == (1, 1, 3, 1)
    assert "personal data in 1 (3 pieces); a chat template's marks in 1\n" in capsys.readouterr().out


def test_drop_overlap_without_test_sets_is_refused(tmp_path, capsys):
    raw = write_raw(tmp_path / "raw", TRAIN, TEST)
    (raw / "medchatzh/MedChatZH_valid.json").unlink()
    assert cli.main(["convert", "--raw-dir", str(raw), "--out-dir", str(tmp_path / "data"), "--drop-overlap"]) == 2
    assert "needs test sets" in capsys.readouterr().err
