"""The exam's score split by what training has of its questions: a planted leak is found, and what isn't known is said."""

import json

import pytest
import yaml
from conftest import SAMPLES

from medasst_tools import cli, provenance
from medasst_tools.config import load
from medasst_tools.data.deduplication import normalise
from medasst_tools.data.exam_questions import LETTERS, load_protocol, load_subjects
from medasst_tools.errors import UserError
from medasst_tools.evaluation import contamination, exam
from medasst_tools.files import write_jsonl

SUBJECTS = load_subjects(SAMPLES / "exams", load_protocol())
QUESTIONS = [question for subject in SUBJECTS for question in subject.questions]
COPIES = {"exact": lambda text: text.replace("，", ",") + " ！", "near": lambda text: text + "啊"}
PLANTED = {
    normalise(question.text): label for label, members in (("near", QUESTIONS[1::5]), ("exact", QUESTIONS[::5]))
    for question in members
}  # fmt: skip
TRUTH = {contamination.key_of(question): PLANTED.get(normalise(question.text), "clean") for question in QUESTIONS}


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """An audited folder with exam questions in training, and the chat.yaml of a model whose run.json names its files."""
    folder = tmp_path_factory.mktemp("leaky")
    texts = [
        COPIES[PLANTED[normalise(question.text)]](question.text)
        for question in QUESTIONS
        if normalise(question.text) in PLANTED
    ]
    texts += [f"第{at}位患者，{age}岁，反复头晕乏力，应做什么检查？" for at, age in enumerate(range(20, 60))]
    records = [{"instruction": text, "input": "", "output": "建议及时就医。"} for text in texts]
    (folder / "raw/medchatzh").mkdir(parents=True)
    write_jsonl(folder / "raw/medchatzh/MedChatZH_train.json", records)
    write_jsonl(folder / "raw/medchatzh/MedChatZH_valid.json", [records[-1]])
    words = ["convert", "--raw-dir", str(folder / "raw"), "--out-dir", str(folder / "data")]
    assert cli.main(words) == 0
    assert cli.main(["audit", "--data-dir", str(folder / "data"), "--exams-dir", str(SAMPLES / "exams")]) == 0
    sha = provenance.sha256_of(folder / "data/medchatzh_train.jsonl")
    made_of = {"settings": {"template": "qwen"}, "files": {"medchatzh_train": sha}, "model": {"base": "x"}}
    (folder / "model").mkdir()
    (folder / "model/run.json").write_text(json.dumps({"made_of": made_of}), encoding="utf-8")
    config = {"model_name_or_path": str(folder / "model"), "template": "qwen"}
    (folder / "chat.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "predict.yaml").write_text(yaml.safe_dump({"dataset_dir": str(folder / "data")}), encoding="utf-8")
    return folder


def test_a_planted_leak_is_found(leaky):
    config = load(leaky / "chat.yaml", kind="chat")
    labels = contamination.of_training(config, leaky / "data/audit.json", SUBJECTS)
    leaked, found = ({key for key, label in of.items() if label != "clean"} for of in (TRUTH, labels))
    hits = len(leaked & found)
    assert len(leaked) > 10 and {"exact", "near"} <= set(labels.values())
    assert hits / len(found) == 1.0  # precision
    assert hits / len(leaked) == 1.0  # recall
    assert labels == TRUTH


def test_a_model_that_knows_only_what_leaked(leaky, tmp_path, monkeypatch, capsys):
    def answers(config, subjects, missing, shots, wording):
        for question, order in missing:
            knows = TRUTH[contamination.key_of(question)] != "clean"
            letter = question.answer if knows else LETTERS[(LETTERS.index(question.answer) + 1) % 4]
            yield exam.Prompt(question, [], 0, order), [0.7 if one == letter else 0.1 for one in LETTERS]

    monkeypatch.setattr(exam, "_answers", answers)
    monkeypatch.setattr(exam.preflight, "require", lambda *_: None)
    label = [dict(zip(contamination.LABEL_KEYS, (*key, label), strict=True)) for key, label in TRUTH.items()]
    write_jsonl(tmp_path / "labels.jsonl", label)
    words = ["exam", str(leaky / "chat.yaml"), "--exams-dir", str(SAMPLES / "exams"), "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--labels", str(tmp_path / "labels.jsonl")]) == 0
    split = json.loads((tmp_path / "out/exam.json").read_text(encoding="utf-8"))["contamination"]
    assert split["training"] == split["labels"] and set(split) == {"training", "labels"}
    for benchmark in ("cmmlu", "ceval"):
        assert split["training"][benchmark]["clean"]["percent"] == 0
        for name in ("exact", "near"):
            row = split["training"][benchmark][name]
            assert row["percent"] == row["difference"] == 100 and 0 < row["difference_ci95"][0] < 100
    assert "by training, exact: 100.00" in capsys.readouterr().out
    assert cli.main(words) == 0  # the labels are gone: made anew without them
    assert "labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda run, audit: run["made_of"].update(files={}), "no run.json says what the model was trained on"),
        (
            lambda run, audit: run["made_of"]["files"].update(medchatzh_train="ab"),
            "is of another medchatzh_train than",
        ),
        (lambda run, audit: run["made_of"]["files"].update(text="ab"), "trained on text, which .* doesn't cover"),
        (lambda run, audit: audit["made_of"]["files"].pop("exams"), "looked for no or other exam questions"),
        (lambda run, audit: audit["outputs"].update({"overlap.jsonl": "ab"}), "overlap.jsonl isn't what"),
        (lambda run, audit: audit.clear(), "no audit of the training data"),
    ],
)
def test_what_is_not_known_is_said(leaky, tmp_path, change, reason):
    run = json.loads((leaky / "model/run.json").read_text(encoding="utf-8"))
    audit = json.loads((leaky / "data/audit.json").read_text(encoding="utf-8"))
    change(run, audit)
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (tmp_path / "overlap.jsonl").write_bytes((leaky / "data/overlap.jsonl").read_bytes())
    if audit:
        (tmp_path / "audit.json").write_text(json.dumps(audit), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        contamination.of_training({"model_name_or_path": str(tmp_path)}, tmp_path / "audit.json", SUBJECTS)


def test_the_adapters_training_counts_not_its_bases(leaky, tmp_path):
    run = json.loads((leaky / "model/run.json").read_text(encoding="utf-8"))
    run["made_of"]["files"] = {"text": "ab"}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    config = {"model_name_or_path": str(tmp_path), "adapter_name_or_path": str(leaky / "model")}
    assert contamination.of_training(config, leaky / "data/audit.json", SUBJECTS) == TRUTH


GOOD = dict(zip(contamination.LABEL_KEYS, (*contamination.key_of(QUESTIONS[0]), "clean"), strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"benchmark": "cev', "line 1: must be a JSON object with benchmark, subject, id, label"),
        ('\n{"benchmark": "ceval"}', "line 2: must be a JSON object"),
        ("[1]", "line 1: must be a JSON object"),
        (json.dumps(GOOD | {"id": "no"}), "is no question of the exams here"),
        (f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}", "stands twice"),
        (None, "no labels file"),
    ],
)
def test_bad_labels_are_named(tmp_path, text, message):
    path = tmp_path / "labels.jsonl"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        contamination.read_labels(path, SUBJECTS)


def test_without_clean_the_files_first_label_is_what_the_others_are_compared_with():
    rows = [
        {"benchmark": "x", "subject": "s", "id": str(at), "predicted": "A", "answer": "AB"[at % 2]} for at in range(5)
    ]
    labels = {("x", "s", str(at)): "zb"[at % 2] for at in range(4)}  # the fifth has none
    split = contamination.split(rows, labels)["x"]
    assert list(split) == ["z", "b"] and [row["n"] for row in split.values()] == [2, 2]
    assert "difference" not in split["z"] and split["b"]["difference"] == -100
