"""medasst score: what it writes, what it knows of the test sets, and files that must be refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from medasst_tools import cli, provenance
from medasst_tools.evaluation import score as scoring
from medasst_tools.evaluation import text_metrics

SIZES = {"a_test": 2, "b_test": 1}


def line(predict: str, label: str, prompt: str = "问") -> str:
    return json.dumps({"prompt": prompt, "predict": predict, "label": label}, ensure_ascii=False) + "\n"


GOOD = (
    line("您好，建议休息。", "您好，建议休息。\n")
    + line("", "请及时就医。\n")
    + line("多喝水。", "多喝水，注意休息。\n")
)


def score(tmp_path: Path, text: str | bytes, *words: str) -> int:
    path = tmp_path / "generated_predictions.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return cli.main(["score", str(path), *(f"--{name}={tmp_path / file}" for name, file in OUTPUTS.items()), *words])


OUTPUTS = {"out": "scores.json", "per-record": "per_record.jsonl"}


def read_scores(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))


def write_record(tmp_path: Path, text: str, sizes: dict[str, int], **settings) -> None:
    """Leave what `medasst predict` leaves beside its predictions."""
    (tmp_path / "generated_predictions.jsonl").write_text(text, encoding="utf-8")
    about = provenance.made_of(settings, {"a_test": "00"}, {"base": "owner/name"})
    record = provenance.record(tmp_path / "predictions.json", about, [tmp_path / "generated_predictions.jsonl"])
    (tmp_path / "predictions.json").write_text(json.dumps(record | {"datasets": sizes}))


def test_scores_intervals_and_datasets(tmp_path, capsys):
    write_record(tmp_path, GOOD, SIZES, max_samples=2)
    assert score(tmp_path, GOOD) == 0
    scores = read_scores(tmp_path)
    rows = [json.loads(row) for row in (tmp_path / "per_record.jsonl").read_text(encoding="utf-8").splitlines()]
    assert scores["n"] == len(rows) == 3 and scores["empty"] == 1
    for metric in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"):
        assert scores[metric] == pytest.approx(np.mean([row[metric] for row in rows]))
        low, high = scores["ci95"][metric]
        assert low - 1e-3 <= scores[metric] <= high + 1e-3
    assert {name: entry["n"] for name, entry in scores["by_dataset"].items()} == SIZES
    assert scores["by_dataset"]["b_test"]["rouge-1"] == pytest.approx(rows[2]["rouge-1"])
    assert "n:3|" in scores["signature"] and "llamafactory-0.9.5" in scores["signature"]
    assert scores["made_of"]["model"] == {"base": "owner/name"} and scores["made_of"]["settings"] == {"max_samples": 2}
    assert score(tmp_path, GOOD) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("scores.json: up to date")
    assert score(tmp_path, GOOD + line("再来", "一个")) == 0  # predicted otherwise since
    assert "its model is unknown" in capsys.readouterr().out
    assert "model" not in read_scores(tmp_path)["made_of"] and "by_dataset" not in read_scores(tmp_path)


def test_copies_of_a_question_are_no_news_and_test_sets_are_strata(tmp_path):
    """Fifty copies of each answer: the interval is that of the few questions; two test sets of one score each: none is left."""
    good, bad = line("多喝水。", "多喝水。", "a|"), line("无", "多喝水。", "b|")
    texts = {"alone": good + bad, "copied": good * 50 + bad * 50, "strata": good * 50 + bad * 50}
    widths = {}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        if name == "strata":
            write_record(tmp_path / name, text, {"a_test": 50, "b_test": 50})
        assert score(tmp_path / name, text) == 0
        scores = read_scores(tmp_path / name)
        widths[name] = scores["ci95"]["rouge-l"][1] - scores["ci95"]["rouge-l"][0]
        assert scores["clusters"] == 2
    assert widths == {"alone": widths["copied"], "copied": pytest.approx(100, abs=0.01), "strata": 0}


TURNS = ["<q1>", "<q1>a<q2>", "<q1>a<q2>b<q3>", "<q1>a<q2>b<q3>c<q4>", "<q1>a<q2>b<q3>c<q4>d<q5>", "<r1>", "<r1>a<r2>"]
LABELS = [
    "休息。",
    "喝水。",
    "吃药。",
    "复查。",
    "不客气，祝您早日康复！",
    "运动。",
    "不客气。如果还有其他问题，请随时咨询。",
]


def test_descriptions_by_turn_and_farewells_apart(tmp_path):
    turns = "".join(
        line(label[: at + 1], label, prompt) for at, (prompt, label) in enumerate(zip(TURNS, LABELS, strict=True))
    )
    last = line("祝", LABELS[4], "x") + line("休", LABELS[0], "x") + line("休息", LABELS[0], "y")
    write_record(tmp_path, turns + last, {"turns": 7, "last": 3})
    assert score(tmp_path, turns + last) == 0
    described = read_scores(tmp_path)["descriptions"]
    assert {part: row["n"] for part, row in described.items()} == {
        "all": 10, "turns": 7, "turns, turn 4+": 1, "turns, turn 3": 1, "turns, turn 2": 1, "turns, turn 1": 2,
        "turns, farewells": 2, "last": 3, "last, others": 2, "last, farewells": 1,
    }  # fmt: skip
    assert described["turns, turn 1"]["length-ratio"] == pytest.approx((1 / 3 + 1) / 2)
    assert described["last, others"]["length-ratio"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert read_scores(tmp_path)["descriptions_signature"].startswith("chrf:nrefs:1|case:mixed|")


def test_any_number_of_workers_gives_the_same_file(tmp_path):
    text = GOOD * (2 * scoring.CHUNK // 3 + 1)  # a chunk, and more, for each
    assert score(tmp_path, text) == 0
    one = [(tmp_path / file).read_bytes() for file in OUTPUTS.values()]
    (tmp_path / "scores.json").unlink()
    assert score(tmp_path, text, "--workers", "2") == 0
    assert one == [(tmp_path / file).read_bytes() for file in OUTPUTS.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (GOOD + '{"prompt": "问", "pre', "line 4: must be a JSON object with predict, label; `make predict` goes on"),
        (line("a", "b") + '{"prompt": "a"}\n', "line 2: must be"),
        ("[1]\n", "line 1: must be"),
        (json.dumps({"predict": None, "label": "a"}) + "\n", "line 1: must be"),
        (b'{"predict": "\xff", "label": "a"}\n', "line 1: must be"),
    ],
)
def test_damaged_predictions_are_refused(tmp_path, capsys, text, message):
    assert score(tmp_path, text) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0] and not (tmp_path / "scores.json").exists()


def test_missing_predictions_are_named(tmp_path, capsys):
    assert cli.main(["score", str(tmp_path / "demo/none.jsonl"), "--out", str(tmp_path / "scores.json")]) == 2
    assert "`make predict EXPERIMENT=demo` makes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text + "\n", lambda text: text.replace("\n", "\n\n", 1)]
)
def test_a_bom_and_blank_lines_change_nothing(tmp_path, change):
    path = tmp_path / "generated_predictions.jsonl"
    path.write_text(change(GOOD), encoding="utf-8")
    assert [row.predict for row in scoring.read_predictions(path)] == ["您好，建议休息。", "", "多喝水。"]


def test_labels_that_open_with_an_empty_thought_are_said(tmp_path, capsys):
    assert score(tmp_path, GOOD.replace('"label": "', '"label": "<think>\\n\\n</think>\\n\\n')) == 0
    assert "3 labels that open with an empty <think>" in capsys.readouterr().out


def test_a_metric_is_a_function_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(text_metrics.METRICS, "length", lambda pair: len(pair.predict) / 100)
    assert score(tmp_path, GOOD) == 0
    scores = read_scores(tmp_path)
    assert scores["length"] == pytest.approx(np.mean([8, 0, 4])) and scores["ci95"]["length"][0] <= scores["length"]
    assert json.loads((tmp_path / "per_record.jsonl").read_text().splitlines()[0])["length"] == 8
