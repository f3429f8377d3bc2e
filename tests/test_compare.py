"""medasst compare: the paired bootstrap and McNemar's test against known outcomes, and what can't be compared."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from medasst_tools import cli
from medasst_tools.evaluation.compare import bootstrap_p, compare_folders, verdict

METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_dialogues(folder: Path, values: list[float], labels: list[str] | None = None) -> Path:
    labels = labels or [f"答案{number}" for number in range(len(values))]
    write_lines(folder / "generated_predictions.jsonl", [{"prompt": "", "predict": "", "label": x} for x in labels])
    write_lines(folder / "per_record.jsonl", [dict.fromkeys(METRICS, value) for value in values])
    digest = hashlib.sha256((folder / "generated_predictions.jsonl").read_bytes()).hexdigest()
    (folder / "scores.json").write_text(json.dumps({"predictions": {"sha256": digest}}), encoding="utf-8")
    return folder


def write_exam(folder: Path, right: str) -> Path:
    """Write one question a character: 1 answered right, 0 wrong."""
    facts = {"benchmark": "cmmlu", "subject": "anatomy", "answer": "A"}
    write_lines(
        folder / "exam.jsonl",
        [facts | {"id": str(n), "predicted": "A" if x == "1" else "B"} for n, x in enumerate(right)],
    )
    return folder


@pytest.mark.parametrize(
    ("a", "b", "difference", "wins", "ties", "better"),
    [
        ([10.0] * 50, [10.0] * 50, 0, 0, 1, "no difference shown"),
        ([12.0] * 50, [10.0] * 50, 2, 1, 0, "a"),
        ([10.0] * 50, [12.5] * 50, -2.5, 0, 0, "b"),
        ([11.0, 9.0] * 25, [10.0] * 50, 0, 0.5, 0, "no difference shown"),
        ([14.0, 9.0] * 25, [10.0] * 50, 1.5, 0.5, 0, "a"),
    ],
)
def test_dialogues(tmp_path, a, b, difference, wins, ties, better):
    report = compare_folders(write_dialogues(tmp_path / "a", a), write_dialogues(tmp_path / "b", b))["dialogues"]
    for metric in METRICS:
        row = report[metric]
        assert (row["difference"], row["wins"], row["ties"]) == (difference, wins, ties)
        assert row["ci95"][0] <= difference <= row["ci95"][1]
        assert verdict(row["difference"], row["p"]) == better


def test_interval_is_that_of_the_mean_difference(tmp_path):
    values = np.random.default_rng(1).normal(1, 3, 2000)
    report = compare_folders(
        write_dialogues(tmp_path / "a", list(values)), write_dialogues(tmp_path / "b", [0.0] * 2000)
    )
    error = 1.96 * values.std() / np.sqrt(2000)
    expected = [values.mean() - error, values.mean() + error]
    assert report["dialogues"]["bleu-4"]["ci95"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("resampled", "p"), [([1, 1, 1], 0.5), ([-1, 1, 1], 1.0), ([0, 0, 0], 1.0), ([1] * 9999, 0.0002)]
)
def test_p_value(resampled, p):
    assert bootstrap_p(np.array(resampled)) == pytest.approx(p)


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
    report = compare_folders(write_exam(tmp_path / "a", a), write_exam(tmp_path / "b", b))["exam"]
    assert (report["only_a"], report["only_b"], report["n"]) == (only_a, only_b, len(a))
    assert report["p"] == pytest.approx(p)


def test_command(tmp_path, capsys):
    for name, value in (("a", 12.0), ("b", 10.0)):
        write_exam(write_dialogues(tmp_path / name, [value] * 30), "1" if name == "a" else "0")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "compare.json")]
    assert cli.main(words) == 0
    assert "bleu-4     +2.00 [+2.00, +2.00]  p 0.0002" in capsys.readouterr().out
    assert json.loads((tmp_path / "compare.json").read_text())["exam"]["only_a"] == 1


def other_labels(folder: Path) -> None:
    write_dialogues(folder, [1.0, 2.0], ["别的", "答案1"])


def shorter(folder: Path) -> None:
    write_dialogues(folder, [1.0])


def predicted_again(folder: Path) -> None:
    with (folder / "generated_predictions.jsonl").open("a") as file:
        file.write('{"predict": "", "label": ""}\n')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_labels, "different labels in line 1"),
        (shorter, "ends after 1 records"),
        (predicted_again, "isn't what"),
        (lambda folder: write_exam(folder, "111"), "different questions (cmmlu/anatomy/2)"),
        (lambda folder: folder.rename(folder.with_name("gone")), "no folder"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, spoil, message):
    for name in ("a", "b"):
        write_exam(write_dialogues(tmp_path / name, [1.0, 2.0]), "10")
    spoil(tmp_path / "b")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err
