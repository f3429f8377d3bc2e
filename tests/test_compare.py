"""medasst compare: known outcomes, the table's own difference, and what doesn't belong together."""

import json
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest
from conftest import ROOT

from medasst_tools import cli, provenance
from medasst_tools.config import load
from medasst_tools.evaluation.compare import compare_folders, results_of, verdict
from medasst_tools.evaluation.score import metric_names
from medasst_tools.files import write_jsonl

FACTS = {"shots": 0, "orders": 1, "prompt": "llamafactory-zh", "exam_version": 1, "questions_sha256": "ab" * 32}


def write_lines(path: Path, records: list[dict]) -> str:
    write_jsonl(path, records)
    return provenance.sha256_of(path)


def write_dialogues(
    folder: Path, values: list[float], labels: list[str] | None = None, questions: int = 10_000
) -> Path:
    """Write a record a value, and as many different questions, asked again and again."""
    labels = labels or [f"答案{number}" for number in range(len(values))]
    rows = [{"prompt": f"问{at % questions}|", "predict": "", "label": label} for at, label in enumerate(labels)]
    predictions = write_lines(folder / "generated_predictions.jsonl", rows)
    per_record = write_lines(folder / "per_record.jsonl", [dict.fromkeys(metric_names(), value) for value in values])
    scores = {"predictions": predictions, "outputs": {"per_record.jsonl": per_record}, "made_of": {}}
    (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    return folder


def write_exam(folder: Path, **right: str) -> Path:
    """Write one question a character for each benchmark: 1 answered right, 0 wrong."""
    rows = [
        {"benchmark": name, "subject": "anatomy", "answer": "A", "id": str(n), "predicted": "A" if x == "1" else "B"}
        for name, marks in right.items()
        for n, x in enumerate(marks)
    ]
    digest = write_lines(folder / "exam.jsonl", rows)
    (folder / "exam.json").write_text(json.dumps(FACTS | {"outputs": {"exam.jsonl": digest}}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("a", "b", "difference", "wins", "ties", "better"),
    [
        ([10.0] * 50, [10.0] * 50, 0, 0, 1, "no difference shown"),
        ([12.0] * 50, [10.0] * 50, 2, 1, 0, "a"),
        ([10.0] * 50, [12.5] * 50, -2.5, 0, 0, "b"),
        ([11.0, 9.0] * 25, [10.0] * 50, 0, 0.5, 0, "no difference shown"),
        ([14.0, 9.0] * 25, [10.0] * 50, 1.5, 0.5, 0, "a"),
        ([50.0], [0.0], 50, 1, 0, "no difference shown"),  # of one record nothing is known
    ],
)
def test_dialogues(tmp_path, a, b, difference, wins, ties, better):
    report = compare_folders(write_dialogues(tmp_path / "a", a), write_dialogues(tmp_path / "b", b))["dialogues"]
    for row in report["metrics"].values():
        assert (row["difference"], row["wins"], row["ties"]) == (difference, wins, ties)
        assert row["ci95"] is None if len(a) == 1 else row["ci95"][0] <= difference <= row["ci95"][1]
        assert verdict(row) == better


def test_interval_and_power_are_those_of_the_mean_difference(tmp_path):
    values = np.random.default_rng(1).normal(1, 3, 2000)
    report = compare_folders(
        write_dialogues(tmp_path / "a", values.tolist()), write_dialogues(tmp_path / "b", [0.0] * 2000)
    )["dialogues"]["metrics"]["bleu-4"]
    error = values.std() / np.sqrt(2000)
    assert report["ci95"] == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error], abs=0.02)
    assert report["visible"] == pytest.approx(2.8016 * error, rel=0.05)


def test_one_question_asked_again_and_again_shows_nothing_new(tmp_path):
    """Thirty answers to each of four questions: p is that of four records; as if all were news it would be tiny."""
    values = [4.0, -1.0, 3.0, 2.0]
    found = {}
    for name, times, questions in (("four", 1, 4), ("copies", 30, 4), ("news", 30, 120)):
        a = write_dialogues(tmp_path / name / "a", values * times, questions=questions)
        b = write_dialogues(tmp_path / name / "b", [0.0] * len(values) * times, questions=questions)
        found[name] = compare_folders(a, b)["dialogues"]["metrics"]["rouge-l"]
    assert found["copies"]["ci95"] == found["four"]["ci95"] and found["copies"]["p"] == found["four"]["p"] > 0.01
    assert found["news"]["p"] < 0.001


@pytest.mark.parametrize(
    ("a", "b", "only_a", "only_b", "p"),
    [
        ("1111", "1111", 0, 0, 1.0),
        ("1111", "0000", 4, 0, 0.125),  # 2 * 0.5**4
        ("11110", "00001", 4, 1, 0.375),  # 2 * (5 + 1) / 32
        ("1" * 10 + "0", "0" * 10 + "1", 10, 1, 0.01171875),  # 2 * (11 + 1) / 2048
    ],
)
def test_exams(tmp_path, a, b, only_a, only_b, p):
    report = compare_folders(write_exam(tmp_path / "a", cmmlu=a), write_exam(tmp_path / "b", cmmlu=b))["exam"]
    row = report["benchmarks"]["cmmlu"]
    assert (row["only_a"], row["only_b"], row["n"]) == (only_a, only_b, len(a))
    assert row["p"] == pytest.approx(p)
    differences = [int(one) - int(other) for one, other in zip(a, b, strict=True)]
    assert row["difference"] == pytest.approx(100 * fmean(differences))
    # of a standard error: what a test at 5 % finds with 80 % power
    assert row["visible"] == pytest.approx(2.80159 * 100 * pstdev(differences) / len(a) ** 0.5, abs=1e-3)


def test_the_exams_difference_is_the_tables(tmp_path):
    """1000/1325 and 60/90 against 1040/1325 and 33/90: pooled it would be -0.92."""
    a = write_exam(tmp_path / "a", cmmlu="1" * 1000 + "0" * 325, ceval="1" * 60 + "0" * 30)
    b = write_exam(tmp_path / "b", cmmlu="1" * 1040 + "0" * 285, ceval="1" * 33 + "0" * 57)
    report = compare_folders(a, b)["exam"]
    assert report["average"]["difference"] == pytest.approx(13.49, abs=0.005)
    low, high = report["average"]["ci95"]
    assert 8 < low < 13.49 < high < 19
    assert (verdict(report["benchmarks"]["cmmlu"]), verdict(report["benchmarks"]["ceval"])) == ("b", "a")


def test_secondary_scores_are_judged_only_where_the_primary_differs(tmp_path):
    a, b = write_dialogues(tmp_path / "a", [10.0] * 50), write_dialogues(tmp_path / "b", [10.0] * 50)
    report = compare_folders(write_exam(a, cmmlu="1" * 40), write_exam(b, cmmlu="0" * 40))
    assert report["exam"]["benchmarks"]["cmmlu"]["p"] < 1e-9
    assert verdict(report["exam"]["benchmarks"]["cmmlu"]) == "no difference shown"


def test_command(tmp_path, capsys):
    for name, value in (("a", 12.0), ("b", 10.0)):
        write_exam(write_dialogues(tmp_path / name, [value] * 30), cmmlu="1" if name == "a" else "0")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "compare.json")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "bleu-4     +2.00 [+2.00, +2.00]  p 0.0002" in said and "only a right 1, only b right 0" in said
    assert json.loads((tmp_path / "compare.json").read_text())["exam"]["benchmarks"]["cmmlu"]["only_a"] == 1


def change(file: Path, **facts) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | facts))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: write_dialogues(folder, [1.0, 2.0], ["别的", "答案1"]), "different labels in line 1"),
        (lambda folder: write_dialogues(folder, [1.0]), "b/generated_predictions.jsonl ends after 1 records"),
        (lambda folder: write_dialogues(folder, [1.0] * 3), "a/generated_predictions.jsonl ends after 2 records"),
        (lambda folder: (folder / "generated_predictions.jsonl").write_text('{"predict": "", "label": ""}\n'), "of other predictions than"),
        (lambda folder: (folder / "per_record.jsonl").write_text('{"bleu-4": 100.0}\n' * 2), "per_record.jsonl isn't what"),
        (lambda folder: change(folder / "scores.json", outputs={}), "per_record.jsonl isn't what"),
        (lambda folder: write_exam(folder, cmmlu="111"), "different questions (cmmlu/anatomy/2)"),
        (lambda folder: change(folder / "exam.json", shots=5), "examined with other shots (0 and 5)"),
        (lambda folder: change(folder / "exam.json", orders=4), "examined with other orders (1 and 4)"),
        (lambda folder: change(folder / "exam.json", questions_sha256="cd" * 32), "examined with other questions_sha256"),
        (lambda folder: (folder / "exam.jsonl").write_text("{}\n"), "was changed since"),
        (lambda folder: folder.rename(folder.with_name("gone")), "no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared(tmp_path, capsys, spoil, message):
    for name in ("a", "b"):
        write_exam(write_dialogues(tmp_path / name, [1.0, 2.0]), cmmlu="10")
    spoil(tmp_path / "b")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err


def test_an_experiment_is_named_by_itself_or_by_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "demo_base"):
        write_dialogues(tmp_path / "results" / name, [12.0, 14.0, 9.0])
    for words in (["demo", "demo_base"], ["results/demo", "results/demo_base"]):
        assert cli.main(["compare", *words]) == 0
        assert capsys.readouterr().out.startswith("a = results/demo, b = results/demo_base; ")
    path = tmp_path / "results/demo/scores.json"
    config = provenance.settings_that_matter(load(ROOT / "factory_configs/demo/predict.yaml", kind="predict"))
    scores = json.loads(path.read_text()) | {"made_of": {"settings": config | {"max_samples": 3}}}
    path.write_text(json.dumps(scores), encoding="utf-8")
    assert cli.main(["compare", "demo", "demo_base"]) == 0
    assert "a = results/demo (max_samples=3), b = results/demo_base" in capsys.readouterr().out
    assert cli.main(["compare", "demo", "none"]) == 2
    assert "no folder results/none; `make eval EXPERIMENT=none` makes it" in capsys.readouterr().err


def test_an_experiment_is_meant_by_its_name_or_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    words = {
        "demo": "results/demo",
        "here": "here",
        "other/demo": "other/demo",
        str(tmp_path / "here"): str(tmp_path / "here"),
    }
    assert {word: results_of(word).as_posix() for word in words} == words
