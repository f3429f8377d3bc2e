"""medasst score: what it writes, the join with the test sets, and files that must be refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from medasst_tools import cli, provenance

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
        assert low - 1e-3 <= scores[metric] <= high + 1e-3
    assert {name: entry["n"] for name, entry in scores["by_dataset"].items()} == {"a_test": 2, "b_test": 1}
    assert scores["by_dataset"]["b_test"]["rouge-1"] == pytest.approx(rows[2]["rouge-1"])
    described = scores["descriptions"]
    assert set(described) == {"all", "a_test", "b_test"} and described["b_test"]["length-ratio"] == 0.5
    assert scores["descriptions_signature"].startswith("chrf:nrefs:1|case:mixed|") and described["all"]["chrf"] > 0
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
        ("\n\n", "is empty"),
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
        ("".join(GOOD.splitlines(keepends=True)[::-1]), "line 1: the label isn't the answer in a_test, b_test"),
        ("".join(GOOD.splitlines(keepends=True)[:2]), "has 2 predictions, and a_test, b_test have 3 records"),
        (GOOD + line("再来", "一个"), "has 4 predictions, and a_test, b_test have 3 records"),
    ],
)
def test_predictions_of_another_test_set_are_refused(tmp_path, capsys, predict_config, text, message):
    assert score(tmp_path, text, "--predict-config", str(predict_config)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [(None, "no "), ("a: [", "is not YAML"), ("stage: sft", "no dataset_dir")]
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


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text + "\n", lambda text: text.replace("\n", "\n\n", 1)]
)
def test_a_bom_and_blank_lines_change_nothing(tmp_path, predict_config, change):
    assert score(tmp_path, GOOD, "--predict-config", str(predict_config)) == 0
    before = (tmp_path / "per_record.jsonl").read_bytes()
    assert score(tmp_path, change(GOOD), "--predict-config", str(predict_config)) == 0
    assert (tmp_path / "per_record.jsonl").read_bytes() == before


def test_labels_that_open_with_an_empty_thought_are_the_test_sets_and_said(tmp_path, capsys, predict_config):
    thought = GOOD.replace('"label": "', '"label": "<think>\\n\\n</think>\\n\\n')
    assert score(tmp_path, thought, "--predict-config", str(predict_config)) == 0
    assert "3 labels that open with an empty <think>" in capsys.readouterr().out


def write_record(tmp_path: Path, text: str, **settings) -> None:
    """Leave what `medasst predict` leaves beside its predictions."""
    (tmp_path / "generated_predictions.jsonl").write_text(text, encoding="utf-8")
    about = provenance.made_of(settings, {"a_test": "00"}, {"base": "owner/name"})
    record = provenance.record(tmp_path / "predictions.json", about, [tmp_path / "generated_predictions.jsonl"])
    (tmp_path / "predictions.json").write_text(json.dumps(record | {"datasets": {"a_test": 2, "b_test": 1}}))


def test_predictions_of_medasst_predict_know_their_test_sets(tmp_path, capsys):
    write_record(tmp_path, GOOD, max_samples=2)
    assert score(tmp_path, GOOD) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert {name: entry["n"] for name, entry in scores["by_dataset"].items()} == {"a_test": 2, "b_test": 1}
    assert scores["made_of"]["model"] == {"base": "owner/name"} and scores["made_of"]["settings"] == {"max_samples": 2}
    assert score(tmp_path, GOOD) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("scores.json: up to date")
    with (tmp_path / "generated_predictions.jsonl").open("a") as file:  # predicted otherwise since
        file.write(line("再来", "一个"))
    assert score(tmp_path, GOOD + line("再来", "一个")) == 0
    assert "its model is unknown" in capsys.readouterr().out
    assert "model" not in json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["made_of"]


def test_a_metric_is_a_function_and_a_line(tmp_path, monkeypatch):
    from medasst_tools.evaluation import text_metrics

    monkeypatch.setitem(text_metrics.METRICS, "length", lambda pair: len(pair.predict) / 100)
    assert score(tmp_path, GOOD) == 0
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["length"] == pytest.approx(np.mean([8, 0, 4])) and scores["ci95"]["length"][0] <= scores["length"]
    assert json.loads((tmp_path / "per_record.jsonl").read_text().splitlines()[0])["length"] == 8
