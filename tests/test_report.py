"""medasst report: every number from a file, "not run" where there is none, and text that stays text."""

import json
from pathlib import Path

import pytest
import yaml

from medasst_tools import cli, report

PAPER = yaml.safe_load(report.PAPER.read_text(encoding="utf-8"))


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")


def scores(bleu: float) -> dict:
    means = {"bleu-4": bleu, "rouge-1": 21.234, "rouge-2": 5.5, "rouge-l": 17.0}
    row = (
        {"n": 1444}
        | means
        | {"ci95": {metric: [mean - 1, mean + 1] for metric, mean in means.items()}, "empty": 3, "cut_labels": 2}
    )
    return row | {"signature": f"sig-{bleu}", "by_dataset": {"webmedqa_test": row}}


def exam(cmmlu: float) -> dict:
    means = {"cmmlu": cmmlu, "ceval": 30.0, "average": (cmmlu + 30) / 2}
    intervals = {name: [mean - 2, mean + 2] for name, mean in means.items()}
    facts = {"n": 1415, "n_by_benchmark": {"cmmlu": 1325, "ceval": 90}, "ci95": intervals, "ece": 12.345, "shots": 0}
    return means | facts | {"as_released": True, "signature": "exam-sig"}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Write the files that steps write, run the report, and return its text."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("demo", "data/demo"), ("medasst", "data/full")):
        write(tmp_path / f"factory_configs/{name}/predict.yaml", f"dataset_dir: {data}\n")
    entry = {"read": 900, "kept": 890, "skipped": {}, "rejected": {"not JSON": 10}}
    write(tmp_path / "data/full/manifest.json", {"datasets": {"medchatzh_train": entry, "webmedqa_test": entry}})
    write(tmp_path / "results/medasst/scores.json", scores(6.5))
    write(tmp_path / "results/medasst/exam.json", exam(80.25))
    write(tmp_path / "results/demo/scores.json", scores(3.25))
    sample = {"prompt": "问", "predict": "<script>alert(1)</script> | `x` \n # [a](b)", "label": "正常*答案*"}
    write(tmp_path / "results/demo/generated_predictions.jsonl", json.dumps(sample, ensure_ascii=False) + "\n")
    assert cli.main(["report"]) == 0
    return (tmp_path / "results/report.md").read_text(encoding="utf-8")


def row_of(page: str, start: str, table: int = 0) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_table_1(page):
    assert row_of(page, "MedChatZH", 1) == ["763,629", "890", "-762,739", "10"]
    assert row_of(page, "Huatuo-26M", 1) == ["588,462", "not run", "", ""]
    assert row_of(page, "total", 1) == ["1,470,684", "890", "-1,469,794", "10"]


def test_table_2(page):
    assert row_of(page, "MedAsst, paper") == ["", "88.32", "91.11", "89.72"]
    assert row_of(page, "MedAsst, ours (`medasst`)") == [
        "1,415", "80.25 (-8.07) [78.25, 82.25]", "30.00 (-61.11) [28.00, 32.00]", "55.12 (-34.59) [53.12, 57.12]",
    ]  # fmt: skip
    assert row_of(page, "`demo`") == ["", "not run", "not run", "not run"]
    assert "1,325 + 90 questions, 0 shots, ECE 12.35; `exam-sig`" in page or "ECE 12.34; `exam-sig`" in page


def test_table_3(page):
    assert row_of(page, "Gemma-7B, paper", 1) == ["", "6.01", "22.20", "5.86", "17.56"]
    assert row_of(page, "Gemma-7B, ours (`gemma_7b`)", 1) == ["", *["not run"] * 4]
    assert row_of(page, "MedAsst, ours (`medasst`)", 1)[:2] == ["1,444", "6.50 (-0.20) [5.50, 7.50]"]
    assert row_of(page, "`demo`", 1)[:3] == ["1,444", "3.25 [2.25, 4.25]", "21.23 [20.23, 22.23]"]
    assert "3 empty predictions, 2 references cut by cutoff_len; `sig-3.25`" in page
    assert row_of(page, "webmedqa_test") == ["1,444", "3.25", "21.23", "5.50", "17.00"]


@pytest.mark.parametrize("name", PAPER["models"])
def test_the_papers_average_is_the_plain_mean(name):
    model = PAPER["models"][name]
    assert model["average"] == pytest.approx((model["cmmlu"] + model["ceval"]) / 2, abs=0.0051)


def test_the_papers_counts_add_up():
    assert sum(entry["paper"] for entry in PAPER["table_1"].values()) == 1_470_684
    assert sum(PAPER["exam_questions"].values()) == 1415


def test_model_text_stays_text(page):
    assert (
        "<script>" not in page and "&lt;script&gt;alert\\(1\\)&lt;/script&gt; \\| \\`x\\` \\# \\[a\\]\\(b\\)" in page
    )
    assert "正常\\*答案\\*" in page and "Some answers" in page


def test_figure_4(page, tmp_path):
    assert "![Dialogue scores grouped by metric](figures/figure4.png)" in page
    assert (tmp_path / "results/figures/figure4.png").read_bytes().startswith(b"\x89PNG")


def test_same_files_same_page(page, tmp_path):
    before = {
        path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.*") if path.suffix in (".md", ".png")
    }
    assert cli.main(["report"]) == 0
    assert before == {
        path.name: path.read_bytes() for path in (tmp_path / "results").rglob("*.*") if path.suffix in (".md", ".png")
    }


def test_nothing_run_is_still_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 0
    page = (tmp_path / "results/report.md").read_text(encoding="utf-8")
    assert page.count("not run") >= 4 + 5 * 3 + 5 * 4 + 3 and "figure4.png" not in page


@pytest.mark.parametrize(
    ("path", "text", "words", "message"),
    [
        ("results/demo/scores.json", "{", [], "scores.json is damaged"),
        ("results/demo/scores.json", "{}", ["nope"], "no experiment 'nope'"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, path, text, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / path, text)
    assert cli.main(["report", *words]) == 2
    assert message in capsys.readouterr().err
