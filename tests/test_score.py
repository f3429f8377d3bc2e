"""medasst score: what it writes, the join with the test sets, and files that must be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from medasst_tools import cli
from medasst_tools.evaluation.statistics import ci95, resampled_means

ANSWERS = {"a_test": ["您好，建议休息。", "请及时就医。"], "b_test": ["多喝水，注意休息，清淡饮食。"]}


def line(predict: str, label: str) -> str:
    return json.dumps({"prompt": "问", "predict": predict, "label": label}, ensure_ascii=False) + "\n"


@pytest.fixture
def predict_config(tmp_path):
    for name, answers in ANSWERS.items():
        records = [{"instruction": "问", "input": "", "output": answer} for answer in answers]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    info = {name: {"file_name": f"{name}.jsonl"} for name in ANSWERS}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    path = tmp_path / "predict.yaml"
    path.write_text(yaml.safe_dump({"dataset_dir": str(tmp_path), "eval_dataset": "a_test,b_test"}), encoding="utf-8")
    return path


def score(tmp_path: Path, text: str | bytes, *words: str) -> int:
    path = tmp_path / "generated_predictions.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return cli.main(
        [
            "score",
            str(path),
            "--out",
            str(tmp_path / "scores.json"),
            "--per-record",
            str(tmp_path / "per_record.jsonl"),
            *words,
        ]
    )


GOOD = (
    line("您好，建议休息。", "您好，建议休息。\n") + line("", "请及时就医。\n") + line("多喝水。", "多喝水，注意休\n")
)


def test_scores_intervals_and_datasets(tmp_path, predict_config):
    assert score(tmp_path, GOOD, "--predict-config", str(predict_config)) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    rows = [json.loads(row) for row in (tmp_path / "per_record.jsonl").read_text(encoding="utf-8").splitlines()]
    assert scores["n"] == len(rows) == 3 and scores["empty"] == 1 and scores["cut_labels"] == 1
    for metric in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert scores[metric] == pytest.approx(np.mean([row[metric] for row in rows]))
        low, high = scores["ci95"][metric]
        assert low <= scores[metric] <= high
    assert {name: entry["n"] for name, entry in scores["by_dataset"].items()} == {"a_test": 2, "b_test": 1}
    assert scores["by_dataset"]["b_test"]["rouge-1"] == pytest.approx(rows[2]["rouge-1"])
    assert "n:3|" in scores["signature"] and "llamafactory-0.9.5" in scores["signature"]


def test_any_number_of_workers_gives_the_same_file(tmp_path):
    text = GOOD * 200
    assert score(tmp_path, text) == 0
    one = (tmp_path / "scores.json").read_bytes(), (tmp_path / "per_record.jsonl").read_bytes()
    assert score(tmp_path, text, "--workers", "2") == 0
    assert one == ((tmp_path / "scores.json").read_bytes(), (tmp_path / "per_record.jsonl").read_bytes())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (GOOD + '{"prompt": "问", "pre', "line 4 is not JSON"),
        (GOOD + "\n", "line 4 is not JSON"),
        (line("a", "b") + '{"prompt": "a"}\n', "line 2 has no predict and label"),
        ("[1]\n", "line 1 has no predict and label"),
        (json.dumps({"predict": None, "label": "a"}) + "\n", "line 1: predict and label must be text"),
        (b'{"predict": "\xff", "label": "a"}\n', "line 1 is not JSON"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, capsys, text, message):
    assert score(tmp_path, text) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0] and not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(GOOD.splitlines(keepends=True)[::-1]), "line 1: the label isn't the test set's answer"),
        ("".join(GOOD.splitlines(keepends=True)[:2]), "ends after 2 lines, 1 records of a_test, b_test are missing"),
        (GOOD + line("再来", "一个"), "has more than the 3 records of a_test, b_test"),
    ],
)
def test_predictions_of_another_test_set_are_refused(tmp_path, capsys, predict_config, text, message):
    assert score(tmp_path, text, "--predict-config", str(predict_config)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no "), ("a: [", "no dataset_dir"), ("stage: sft", "no dataset_dir")]
)
def test_a_wrong_predict_config_is_named(tmp_path, capsys, text, message):
    config = tmp_path / "other.yaml"
    if text:
        config.write_text(text, encoding="utf-8")
    assert score(tmp_path, GOOD, "--predict-config", str(config)) == 2
    assert message in capsys.readouterr().err


def test_missing_predictions_are_named(tmp_path, capsys):
    assert cli.main(["score", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "scores.json")]) == 2
    assert "`make predict` makes it" in capsys.readouterr().err


def test_bootstrap_is_seeded_and_right():
    values = np.random.default_rng(0).normal(50, 10, (500, 2))
    assert (resampled_means(values, 2000) == resampled_means(values, 2000)).all()
    half = 1.96 * values.std(axis=0) / np.sqrt(len(values))
    expected = np.stack([values.mean(axis=0) - half, values.mean(axis=0) + half], axis=1)
    assert np.allclose(ci95(values), expected, atol=0.08)
    assert ci95(np.full((7, 1), 3.0)) == [[3.0, 3.0]]
