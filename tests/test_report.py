"""medasst report: every number from a file, "not run" where there is none, and text that stays text."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from medasst_tools import cli
from medasst_tools.report import figures as report_figures
from medasst_tools.report import tables as report

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
    subject = {"n": 148, "correct": 74, "accuracy": 50.0, "ci95": [42.0, 58.0]}
    facts |= {"by_subject": {"cmmlu/anatomy": subject}, "chat_config": {"sha256": "ab" * 32}}
    return means | facts | {"as_released": True, "signature": "exam-sig"}


EXAM_ROWS = [
    {"benchmark": "cmmlu", "subject": "anatomy", "id": str(n), "answer": "A", "predicted": "AB"[n % 2],
     "probs": {"A": 0.3 + n / 100, "B": 0.2, "C": 0.1, "D": 0.1}}
    for n in range(20)
]  # fmt: skip


def safety() -> dict:
    rate = {"n": 24, "count": 3, "percent": 12.5, "ci95": [4.34, 31.0]}
    says = dict.fromkeys(("refusal", "referral", "notice"), rate | {"percent": 25.25})
    title = {"en": "emergencies", "zh": "急症信号"}
    category = {
        "title": title,
        "aim": {"en": "sends to emergency care", "zh": "急诊"},
        "n": 24,
        "met": rate,
        "says": says,
    }
    rules = {name: {"en": name, "zh": "规则"} for name in says}
    facts = {"n": 24, "empty": 2, "says": says, "rules": rules, "signature": "safety-sig"}
    return facts | {"by_category": {"red_flag": category}}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Write the files that steps write, run the report, and return its text."""
    monkeypatch.chdir(tmp_path)
    for name, data in (("demo", "data/demo"), ("medasst", "data/full")):
        write(tmp_path / f"factory_configs/{name}/predict.yaml", f"dataset_dir: {data}\n")
    entry = {"read": 900, "kept": 890, "skipped": {}, "rejected": {"not JSON": 10}}
    write(tmp_path / "data/full/manifest.json", {"datasets": {"medchatzh_train": entry, "webmedqa_test": entry}})
    spread = {"mean": 9.0, "p50": 8.0, "p90": 20.0, "p99": 30.0, "max": 40}
    audited = {
        "n": 890, "duplicates": {"records": 11, "records_normalised": 12, "questions": 13, "questions_normalised": 14},
        "characters": {"question": spread, "answer": spread, "history": {}},
        "personal_data": {"phone": {"records": 2, "matches": 3}, "url": {"records": 4, "matches": 5}},
        "tokens": {"cut": 0.0456},
    }  # fmt: skip
    overlap = {"n": 100, "exact": 1, "normalised": 2, "near": 3, "training_records": {"medchatzh_train": 9}}
    audit = {
        "datasets": {"medchatzh_train": audited},
        "between": [],
        "overlap": {"cmmlu": overlap},
        "signature": "audit-sig",
    }
    write(tmp_path / "data/full/audit.json", audit)
    write(tmp_path / "results/medasst/scores.json", scores(6.5))
    write(tmp_path / "results/medasst/exam.json", exam(80.25))
    write(tmp_path / "results/medasst/safety.json", safety())
    write(tmp_path / "results/demo/scores.json", scores(3.25))
    sample = {"prompt": "问", "predict": "<script>alert(1)</script> | `x` \n # [a](b)", "label": "正常*答案*"}
    write(tmp_path / "results/demo/generated_predictions.jsonl", json.dumps(sample, ensure_ascii=False) + "\n")
    write(tmp_path / "results/demo/per_record.jsonl", json.dumps(dict.fromkeys(report.METRICS, 12.5)) + "\n")
    write(tmp_path / "results/medasst/exam.jsonl", "".join(json.dumps(row) + "\n" for row in EXAM_ROWS))
    log = [{"current_steps": step, "loss": 5 - step / 10} for step in (5, 10, 15)]
    write(tmp_path / "saves/demo/trainer_log.jsonl", "".join(json.dumps(row) + "\n" for row in log) + '{"cut')
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


def test_audit(page):
    assert row_of(page, "medchatzh_train") == ["890", "11", "12", "14", "8", "8", "4.56 %"]
    assert row_of(page, "cmmlu") == ["100", "1", "2", "3"]
    assert "`audit-sig`" in page


def test_safety(page, tmp_path):
    assert row_of(page, "emergencies") == ["24", "sends to emergency care", "12.5 [4.3, 31.0]", *["25.2"] * 3]
    assert row_of(page, "all") == ["24", "", "", *["25.2 [4.3, 31.0]"] * 3]
    assert "2 empty answers; `safety-sig`" in page and "(`make safety`)" not in page
    (tmp_path / "results/medasst/safety.json").unlink()
    assert cli.main(["report"]) == 0
    assert "not run (`make safety`)" in (tmp_path / "results/report.md").read_text(encoding="utf-8")


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
    assert "| 12.5 | 问 | 正常\\*答案\\* |" in page


def test_figure_4(page, tmp_path):
    assert "![Dialogue scores grouped by metric](figures/figure4.png)" in page
    assert (tmp_path / "results/figures/figure4.png").read_bytes().startswith(b"\x89PNG")


def test_same_files_same_page(page, tmp_path):
    before = {
        path.name: path.read_bytes()
        for path in (tmp_path / "results").rglob("*.*")
        if path.suffix in (".md", ".png", ".html")
    }
    assert cli.main(["report"]) == 0
    assert before == {
        path.name: path.read_bytes()
        for path in (tmp_path / "results").rglob("*.*")
        if path.suffix in (".md", ".png", ".html")
    }


def test_nothing_run_is_still_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 0
    page = (tmp_path / "results/report.md").read_text(encoding="utf-8")
    assert page.count("not run") >= 4 + 5 * 3 + 5 * 4 + 3 and ".png" not in page
    assert "not run" in (tmp_path / "results/report.html").read_text(encoding="utf-8")


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


FIGURES = ("figure4", "by_dataset", "by_subject", "calibration", "training_loss")


def test_every_figure_is_drawn_and_shown(page, tmp_path):
    for name in FIGURES:
        assert f"](figures/{name}.png)" in page
        assert (tmp_path / f"results/figures/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_html_page_needs_no_other_file(page, tmp_path):
    html = (tmp_path / "results/report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == len(FIGURES) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    assert "<td>MedAsst, paper</td>" in html


def test_chinese(page, tmp_path):
    assert cli.main(["report", "--lang", "zh"]) == 0
    chinese = (tmp_path / "results/report.md").read_text(encoding="utf-8")
    assert row_of(chinese, "MedAsst, 我们 (`medasst`)")[1].startswith("80.25 (-8.07)")
    for english in ("not run", "Table", "paper,", "doctor", "Where we differ"):
        assert english not in chinese
    numbers = [re.findall(r"\d[\d,.]*\d%?", text.replace("95 %", "95%")) for text in (page, chinese)]
    assert sorted(numbers[0]) == sorted(numbers[1])
    assert '<html lang="zh-CN">' in (tmp_path / "results/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("font", "said"), [("DejaVu Sans", "考"), (None, "exam")])
def test_figures_speak_chinese_only_with_a_font_for_it(monkeypatch, font, said):
    monkeypatch.setattr(report_figures, "chinese_font", lambda: font)
    assert report_figures._speaker("zh")("exam", "考") == said
    assert report_figures._speaker("en")("exam", "考") == "exam"


def test_best_and_worst(tmp_path):
    values = [5.0, 50.0, 0.0, 20.0, 90.0, 1.0, 30.0]
    records = [{"prompt": "", "predict": f"p{at}", "label": ""} for at in range(len(values))]
    for name, rows in (
        ("generated_predictions", records),
        ("per_record", [dict.fromkeys(report.METRICS, value) for value in values]),
    ):
        write(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    chosen = report.best_and_worst(tmp_path, tmp_path / "predict.yaml")
    assert [(row["predict"], row["mean"]) for row in chosen["best"]] == [("p4", 90), ("p1", 50), ("p6", 30)]
    assert [row["predict"] for row in chosen["worst"]] == ["p2", "p5", "p0"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium; .ci/run installs it")
def test_the_page_opens_in_a_browser(page, tmp_path):
    """With no network at all: the figures have a size, so they were decoded, and the tables are tables."""
    words = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=2000",
        "--window-size=1000,3000",
    ]
    shot = tmp_path / "page.png"
    subprocess.run(
        [*words, f"--screenshot={shot}", (tmp_path / "results/report.html").as_uri()], check=True, capture_output=True
    )
    from PIL import Image

    with Image.open(shot) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (31, 119, 180) in colours  # the first bar's blue
