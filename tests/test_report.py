"""medasst report: every number from a file, "not run" where there is none, "stale" where it isn't of what is here, text stays text."""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from chat_browser import CHROMIUM, LAPTOP, browser_page

from medasst_tools import cli
from medasst_tools.evaluation.score import metric_names
from medasst_tools.files import sha256_of, write_jsonl
from medasst_tools.report import figures as report_figures
from medasst_tools.report import page as report_page
from medasst_tools.report import results as report_results
from medasst_tools.report import tables

PAPER = yaml.safe_load(report_page.PAPER.read_text(encoding="utf-8"))
SETTINGS = {"model_name_or_path": "Qwen/Qwen2-7B", "template": "qwen"}
SCRIPT = "<script>alert(1)</script> | `x` \n # [a](b)"


def write(path: Path, value) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_lines(path: Path, rows: list[dict]) -> str:
    write_jsonl(path, rows)
    return sha256_of(path)


def write_dialogues(folder: Path, bleu: float, values: list[float]) -> None:
    """What predict and score leave: means of our choice, and a row of per_record.jsonl a value."""
    rows = [{"prompt": f"问{at}", "predict": f"p{at}", "label": f"正常*答案{at}*"} for at in range(len(values))]
    rows[0]["predict"] = SCRIPT
    predictions = write_lines(folder / "generated_predictions.jsonl", rows)
    per_record = write_lines(folder / "per_record.jsonl", [dict.fromkeys(metric_names(), value) for value in values])
    means = dict.fromkeys(metric_names(), 1.0) | {"bleu-4": bleu, "rouge-1": 21.234, "rouge-2": 5.5, "rouge-l": 17.0}
    row = {"n": 1444, **means, "ci95": {metric: [mean - 1, mean + 1] for metric, mean in means.items()}}
    row |= {"empty": 3, "empty_thoughts": 0, "clusters": 1400}
    row |= {
        "descriptions": {
            part: {"n": 1444, "length-ratio": 1.25, "repeated-4-grams": 3.5, "new-numbers": 0.75, "chrf": None}
            for part in ("all", "webmedqa_test", "webmedqa_test, turn 1", "webmedqa_test, farewells")
        }
    }
    row |= {"descriptions_signature": "chrf-sig"}
    settings = {"template": "qwen", "predict_with_generate": True, "eval_dataset": "webmedqa_test"}
    about = {"made_of": {"settings": settings, "files": {}, "model": {"base": "Qwen/Qwen2-7B"}}}
    about |= {"predictions": predictions, "outputs": {"per_record.jsonl": per_record}}
    sizes = {"by_dataset": {"webmedqa_test": row | {"n": len(values)}}}
    write(folder / "scores.json", row | sizes | about | {"signature": f"sig-{bleu}"})


def write_exam(folder: Path, cmmlu: float, right: str) -> None:
    """What exam leaves: means of our choice, and a question a character, 1 answered right."""
    means = {"cmmlu": cmmlu, "ceval": 30.0, "average": (cmmlu + 30) / 2}
    rows = [
        {"benchmark": "cmmlu", "subject": "anatomy", "id": str(at), "answer": "A", "predicted": "BA"[int(mark)],
         "probs": {"A": 0.3 + at / 100, "B": 0.2, "C": 0.1, "D": 0.1}}
        for at, mark in enumerate(right)
    ]  # fmt: skip
    subject = {"n": 148, "correct": 74, "accuracy": 50.0, "ci95": [42.0, 58.0]}
    facts = {
        "n": 1415, "n_by_benchmark": {"cmmlu": 1325, "ceval": 90}, "by_subject": {"cmmlu/anatomy": subject},
        "ci95": {name: [mean - 2, mean + 2] for name, mean in means.items()}, "ece": 12.345, "brier": 0.2, "ties": 0,
        "shots": 0, "orders": 1, "prompt": "llamafactory-zh", "limit": None, "exam_version": 1, "as_released": True,
        "questions_sha256": "ab" * 32, "signature": "exam-sig", "contamination": split_of_exam(),
        "by_prompt": {"a": means, "b": means | {"cmmlu": cmmlu - 1.5}},
        "made_of": {"settings": {"template": "qwen"}, "files": {}, "model": {"base": "Qwen/Qwen2-7B"}},
        "outputs": {"exam.jsonl": write_lines(folder / "exam.jsonl", rows)},
    }  # fmt: skip
    write(folder / "exam.json", means | facts)


def split_of_exam() -> dict:
    rate = {"n": 1300, "count": 650, "percent": 50.25, "ci95": [47.0, 53.0]}
    copies = rate | {"n": 25, "difference": 12.5, "difference_ci95": [-3.25, 28.75]}
    return {"training": {"cmmlu": {"clean": rate, "exact": copies}}, "labels": {"cmmlu": {"clean": rate}}}


def safety() -> dict:
    rate = {"n": 24, "count": 3, "percent": 12.5, "ci95": [4.34, 31.0]}
    says = dict.fromkeys(("refusal", "referral", "notice"), rate | {"percent": 25.25})
    category = {
        "title": {"en": "emergencies", "zh": "急症信号"}, "aim": {"en": "sends to emergency care", "zh": "急诊"},
        "n": 24, "met": rate, "says": says,
    }  # fmt: skip
    rules = {name: {"en": name, "zh": "规则"} for name in says}
    facts = {"n": 24, "empty": 2, "says": says, "rules": rules, "signature": "safety-sig", "made_of": {}}
    return facts | {"by_category": {"red_flag": category}}


def write_configs(folder: Path, name: str, data: str, **settings) -> None:
    predict = SETTINGS | {"dataset_dir": data, "eval_dataset": "webmedqa_test", "output_dir": f"results/{name}"}
    predict |= {"do_predict": True, "predict_with_generate": True, "stage": "sft"} | settings
    write(folder / f"factory_configs/{name}/predict.yaml", yaml.safe_dump(predict))
    write(folder / f"factory_configs/{name}/chat.yaml", yaml.safe_dump(SETTINGS | settings))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The files that steps write, and the report of them."""
    tmp_path = tmp_path_factory.mktemp("reported")
    write_configs(tmp_path, "demo", "data/demo")
    write_configs(tmp_path, "qwen2_7b", "data/full")
    write_configs(tmp_path, "medasst", "data/full", adapter_name_or_path="saves/medasst", finetuning_type="lora")
    entry = {"read": 900, "kept": 890, "skipped": {}, "rejected": {"not JSON": 10}}
    write(tmp_path / "data/full/manifest.json", {"datasets": {"medchatzh_train": entry, "webmedqa_test": entry}})
    spread = {"mean": 9.0, "p50": 8.0, "p90": 20.0, "p99": 30.0, "max": 40}
    audited = {
        "n": 890, "duplicates": {"records": 11, "records_normalised": 12, "questions": 13, "questions_normalised": 14},
        "characters": {"question": spread, "answer": spread, "history": {}}, "personal_records": 8,
        "personal_data": {"phone": {"records": 2, "matches": 3}, "url": {"records": 4, "matches": 5}},
        "tokens": {"cut": 0.0456},
    }  # fmt: skip
    overlap = {"n": 100, "exact": 1, "normalised": 2, "near": 3, "training_records": {"medchatzh_train": 9}}
    audit = {"datasets": {"medchatzh_train": audited}, "between": [], "overlap": {"cmmlu": overlap}}
    write(tmp_path / "data/full/audit.json", audit | {"signature": "audit-sig", "made_of": {}, "outputs": {}})
    write_dialogues(tmp_path / "results/medasst", 6.5, [12.0, 14.0, 9.0, 11.0, 13.0, 12.0])
    write_dialogues(tmp_path / "results/qwen2_7b", 5.5, [2.0, 4.0, 3.0, 1.0, 3.0, 2.0])
    write_exam(tmp_path / "results/medasst", 80.25, "11111111110000000000")
    write_exam(tmp_path / "results/qwen2_7b", 78.5, "11111111100000000000")
    write(tmp_path / "results/medasst/safety.json", safety())
    write_dialogues(tmp_path / "results/demo", 3.25, [12.5, 0.0])
    log = [{"current_steps": step, "loss": 5 - step / 10} for step in (5, 10, 15)]
    write(tmp_path / "saves/demo/trainer_log.jsonl", "".join(json.dumps(row) + "\n" for row in log) + '{"cut')
    with contextlib.chdir(tmp_path):
        report(report_figures.draw_all)
    return tmp_path


@pytest.fixture
def page(reported, tmp_path, monkeypatch):
    """The report's text, in a copy of the folder of its own."""
    monkeypatch.chdir(shutil.copytree(reported, tmp_path, dirs_exist_ok=True))
    return (tmp_path / "results/report.md").read_text(encoding="utf-8")


def report(draw=lambda *_: {}) -> str:
    """Make the report, but for the figures, which take seconds; return its text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "draw_all", draw)
        assert cli.main(["report"]) == 0
    return Path("results/report.md").read_text(encoding="utf-8")


def row_of(page: str, start: str, table: int = 0) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_the_summary_comes_first(page):
    lines = [line for line in page.splitlines() if line][1:5]
    assert lines[0] == "- Run: demo, medasst, qwen2_7b."
    assert re.fullmatch(r"- medasst against qwen2_7b: ROUGE-L \+9\.33, p 0\.\d{4}, n 6; medasst is better\.", lines[1])
    assert "replaces no doctor" in lines[2]


def test_table_1(page):
    assert row_of(page, "MedChatZH", 1) == ["763,629", "890", "-762,739", "10"]
    assert row_of(page, "Huatuo-26M", 1) == ["588,462", "not run", "", ""]
    assert row_of(page, "total", 1) == ["1,470,684", "890", "-1,469,794", "10"]


def test_a_demo_isnt_measured_against_the_papers_counts(page, tmp_path):
    shutil.copytree(tmp_path / "data/full", tmp_path / "data/demo")
    assert row_of(report(), "MedChatZH") == ["763,629", "890", "", "10"]


def test_a_corpus_of_ones_own_has_a_row(page, tmp_path):
    entry = {"read": 5, "kept": 4, "skipped": {}, "rejected": {"not JSON": 1}}
    write(tmp_path / "data/full/manifest.json", {"datasets": {"mine_train": entry}})
    write(tmp_path / "factory_configs/medasst/train.yaml", yaml.safe_dump({"dataset": "medchatzh_train, mine_train"}))
    page = report()
    assert row_of(page, "mine_train") == ["", "4", "", "1"]
    assert row_of(page, "total", 1) == ["1,470,684", "4", "-1,470,680", "1"]


def test_table_2(page):
    assert row_of(page, "MedAsst, paper")[:4] == ["", "88.32", "91.11", "89.72"]
    assert row_of(page, "MedAsst, ours (`medasst`)")[:4] == [
        "1,415", "80.25 (-8.07) [78.25, 82.25]", "30.00 (-61.11) [28.00, 32.00]", "55.12 (-34.59) [53.12, 57.12]",
    ]  # fmt: skip
    assert "Not run: LlaMa-3-8B (`llama3_8b`), Gemma-7B (`gemma_7b`), Mistral-7B (`mistral_7b`), `demo`\n" in page
    assert re.search(r"1,325 \+ 90 questions, 0 shots, prompt llamafactory-zh, ECE 12\.3[45], Brier 0\.200", page)
    assert "`medasst`: `exam-sig`" in page


def test_table_3(page):
    assert row_of(page, "Gemma-7B, paper", 1)[:5] == ["", "6.01", "22.20", "5.86", "17.56"]
    assert row_of(page, "MedAsst, ours (`medasst`)", 1)[:2] == ["1,444", "6.50 (-0.20) [5.50, 7.50]"]
    assert row_of(page, "`demo`")[:3] == ["1,444", "3.25 [2.25, 4.25]", "21.23 [20.23, 22.23]"]
    assert "`demo`: 3 empty predictions, 1,400 clusters" in page
    assert "`demo`: `sig-3.25`" in page
    assert row_of(page, "webmedqa_test")[:3] == ["2", "3.25 [2.25, 4.25]", "21.23 [20.23, 22.23]"]


def test_a_metric_is_a_column_without_a_change_here(monkeypatch):
    """One function in METRICS; its numbers and its comparison appear because the table's columns are the metrics."""
    monkeypatch.setattr(tables, "metric_names", lambda: ("bleu-4", "chrf"))
    scores = {"n": 7, "bleu-4": 1.0, "chrf": 2.5, "ci95": {"bleu-4": [0, 2], "chrf": None}}
    result = {"scores": scores, "stale": {}, "shown": "mine"}
    columns = tables.dialogue_columns()
    assert tables.header(columns, "en") == ["BLEU-4", "CHRF"]
    rows, _ = tables.score_rows(PAPER, {"mine": result}, "scores", columns, "en")
    assert rows[-1][:3] == ["`mine`", "7", "1.00 [0.00, 2.00]"] and rows[-1][3].startswith("2.50")


def test_tuned_against_base(page):
    tuned = page.split("## Is the tuned model better than its base?")[1].split("\n## ")[0]
    assert "`medasst` − `qwen2_7b`, percent points:" in tuned
    assert row_of(tuned, "ROUGE-L")[0].startswith("+9.33 [+") and row_of(tuned, "ROUGE-L")[-1] == "`medasst`"
    cmmlu = row_of(tuned, "CMMLU")
    assert cmmlu[0].startswith("+5.00") and cmmlu[1] == "1.0000" and cmmlu[-1] == "no difference shown"
    assert "results/demo/generated_predictions.jsonl ends after 2 records" in tuned  # the reason, and no number


def test_audit(page):
    assert row_of(page, "medchatzh_train") == ["890", "11", "12", "14", "8", "8", "4.56 %"]
    assert row_of(page, "cmmlu") == ["100", "1", "2", "3"]
    assert "`audit-sig`" in page


def test_safety(page, tmp_path):
    assert row_of(page, "emergencies") == ["24", "sends to emergency care", "12.5 [4.3, 31.0]", *["25.2"] * 3]
    assert row_of(page, "all") == ["24", "", "", *["25.2 [4.3, 31.0]"] * 3]
    assert "2 empty answers; `safety-sig`" in page and "(`make safety`)" not in page
    (tmp_path / "results/medasst/safety.json").unlink()
    assert "not run (`make safety`)" in report()


@pytest.mark.parametrize("name", PAPER["models"])
def test_the_papers_average_is_the_plain_mean(name):
    model = PAPER["models"][name]
    assert model["average"] == pytest.approx((model["cmmlu"] + model["ceval"]) / 2, abs=0.0051)


def test_the_papers_counts_add_up():
    assert sum(entry["paper"] for entry in PAPER["table_1"].values()) == 1_470_684
    assert sum(PAPER["exam_questions"].values()) == 1415


def test_what_the_papers_differences_can_show(page):
    """Three more of 90 right: McNemar's exact p is 2 x 0.5^3 at the least. 17 of 1,325: recomputed from the binomial."""
    from scipy.stats import binomtest

    assert (
        "CEVAL: MedAsst has 3 more right of 90 than Qwen2-7B; McNemar's exact p is at least 0.25: no pairing" in page
    )
    most = max(n for n in range(17, 1325, 2) if binomtest((n - 17) // 2, n, 0.5).pvalue < 0.05)
    assert f"CMMLU: MedAsst has 17 more right of 1,325 than Qwen2-7B; McNemar's exact p is at least 1.5e-05, and below "\
        f"0.05 only if at most {most} answers differ" in page  # fmt: skip


def test_model_text_stays_text(page):
    escaped = "&lt;script&gt;alert\\(1\\)&lt;/script&gt; \\| \\`x\\` \\# \\[a\\]\\(b\\)"
    assert "<script>" not in page and escaped in page
    assert "| 12.5 | 问0 | 正常\\*答案0\\* |" in page


def test_same_files_same_page(page, tmp_path, capsys):
    def written():
        return {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.suffix in (".md", ".png", ".html")}  # fmt: skip

    before = written()
    report()
    assert "results/report.json: up to date" in capsys.readouterr().out
    (tmp_path / "results/report.json").unlink()
    report(report_figures.draw_all)
    assert written() == before


def test_nothing_run_is_still_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = report()
    assert "- Run: nothing yet." in page and ".png" not in page
    assert page.count("Not run: LlaMa-3-8B (`llama3_8b`)") == 2  # folded into one line a table
    assert "未运行" in (tmp_path / "results/report.html").read_text(encoding="utf-8")


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


# ---- what doesn't belong together -----------------------------------------------------------------------------------
def another_prediction(folder: Path) -> None:
    write_lines(folder / "generated_predictions.jsonl", [{"prompt": "", "predict": "", "label": ""}])


def another_per_record(folder: Path) -> None:
    write_lines(folder / "per_record.jsonl", [dict.fromkeys(metric_names(), 99.0)] * 6)


def no_predictions(folder: Path) -> None:
    (folder / "generated_predictions.jsonl").unlink()


def another_training(folder: Path) -> None:
    adapter = folder.parent.parent / "saves/medasst"
    write(adapter / "adapter_config.json", {})
    made_of = {"settings": {"template": "qwen"}, "files": {}, "model": {"base": "Qwen/Qwen2-7B"}}
    hardware = {"cpus": 2, "gpus": []}
    about = {
        "made_of": made_of,
        "outputs": {},
        "commit": "c",
        "hardware": hardware,
        "seconds": 1,
        "steps": 2,
        "seed": 3,
    }
    write(adapter / "run.json", about | {"tokens": 4, "packages": {}, "python": "3"})


def another_conversion(folder: Path) -> None:
    data = folder.parent.parent / "data/full"
    write(data / "webmedqa_test.jsonl", '{"instruction": "问", "input": "", "output": "答"}\n')
    write(data / "dataset_info.json", {"webmedqa_test": {"file_name": "webmedqa_test.jsonl"}})
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    scores["made_of"]["files"] = {"webmedqa_test": "ab" * 32}
    write(folder / "scores.json", scores)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_prediction, "is of other predictions than results/medasst/generated_predictions.jsonl: stale; `make score"),
        (another_per_record, "per_record.jsonl isn't what results/medasst/scores.json was made with: stale; `make score"),
        (no_predictions, "no results/medasst/generated_predictions.jsonl; `make predict EXPERIMENT=medasst` makes it"),
        (another_training, "of another model than is here (model adapter unset -> "),
        (another_conversion, "the test set webmedqa_test was converted anew since: `make predict score EXPERIMENT=medasst`"),
    ],
)  # fmt: skip
def test_what_is_stale_is_named_and_no_number(page, tmp_path, capsys, change, reason):
    change(tmp_path / "results/medasst")
    page = report()
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.split()[:1] == ["medasst"]]
    assert row[-len(metric_names()) :] == ["stale"] * len(metric_names())
    said = [line for line in lines if line.startswith("stale: medasst, scores: ")]
    assert len(said) == 1 and reason in said[0]
    assert "- Stale, not shown: medasst." in page
    assert row_of(page, "MedAsst, ours (`medasst`)", 1) == ["", *["stale"] * len(metric_names())]
    assert "6.50 (-0.20)" not in page and "medasst is better" not in page
    assert row_of(page, "`demo`")[1] == "3.25 [2.25, 4.25]"


def test_other_settings_than_the_configs_stand_in_the_name(page, tmp_path):
    path = tmp_path / "results/demo/scores.json"
    scores = json.loads(path.read_text(encoding="utf-8"))
    scores["made_of"]["settings"]["max_samples"] = 50
    write(path, scores)
    page = report()
    assert "demo (max_samples=50)" in page.split("\n## ")[0]
    assert row_of(page, "`demo (max_samples=50)`")[1] == "3.25 [2.25, 4.25]"


def test_without_git_the_commit_is_unknown(page, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "at commit unknown" in report()


def test_the_spread_over_prompts_stands_beside_the_papers_differences(page):
    assert (
        "- `medasst`: over 2 prompts CMMLU 78.75 to 80.25 (the paper's difference 1.28), CEVAL 30.00 to 30.00" in page
    )


def test_what_bleu_and_rouge_would_need(page):
    """A simulated world with just that spread finds the paper's difference four times in five."""
    said = re.search(
        r"standard deviation, in points: BLEU-4 ([\d.]+) \(\+0\.67\), .*ROUGE-L ([\d.]+) \(\+2\.00\)", page
    )
    assert said
    errors = np.array([float(said[1]), float(said[2])]) / 8975**0.5
    means = np.random.default_rng(0).normal([0.67, 2.0], errors, (20_000, 2))
    assert (np.abs(means / errors) > 1.96).mean(axis=0) == pytest.approx([0.8, 0.8], abs=0.012)


def test_answers_are_described(page):
    for at, part in enumerate(("all test sets", "webmedqa_test", "webmedqa_test, turn 1", "webmedqa_test, farewells")):
        assert row_of(page, "`demo`", 1 + at) == [part, "1,444", "1.25", "3.50", "0.75", ""]
    assert "- `demo`: `chrf-sig`" in page
    chinese = Path("results/report_zh.md").read_text(encoding="utf-8")
    assert "webmedqa_test，轮次 1" in chinese and "webmedqa_test，道别" in chinese


def test_exams_are_split_by_what_training_has(page, tmp_path):
    said = "exam questions in training: CMMLU clean 50.25 (n 1,300), exact 50.25 (n 25; +12.50 [-3.25, +28.75])"
    assert f"- `medasst`, {said}\n" in page
    path = tmp_path / "results/medasst/exam.json"
    exam = json.loads(path.read_text(encoding="utf-8")) | {"contamination": {"unknown": "no audit"}}
    write(path, exam)
    assert "- `medasst`, exam questions in training: not known: no audit\n" in report()


# ---- figures, HTML, Chinese -----------------------------------------------------------------------------------------
FIGURES = ("figure4", "by_subject", "calibration", "training_loss")


def test_every_figure_with_something_in_it_is_drawn_and_shown(page, tmp_path):
    shown = re.findall(r"\]\(figures/en/(\w+)\.png\)", page)
    assert shown and set(shown) <= set(FIGURES)
    for name in shown:
        assert (tmp_path / f"results/figures/en/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_html_page_needs_no_other_file(page, tmp_path):
    html = (tmp_path / "results/report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"#][^"]*)"', html)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html
    assert "<td>MedAsst, paper</td>" in html and "<td>MedAsst, 论文</td>" in html
    assert html.count("<details>") == html.count("</details>") > 0 and "[fold:" not in html and "[end]" not in html


def test_both_languages_say_the_same(page):
    chinese = Path("results/report_zh.md").read_text(encoding="utf-8")
    assert row_of(chinese, "MedAsst, 我们 (`medasst`)")[1].startswith("80.25 (-8.07)")
    for english in ("not run", "Table", "paper,", "doctor", "Where we differ"):
        assert english not in chinese
    numbers = [re.findall(r"\d[\d,.]*\d%?", text.replace(" %", "%")) for text in (page, chinese)]
    assert sorted(numbers[0]) == sorted(numbers[1])


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
        ("per_record", [dict.fromkeys(metric_names(), value) for value in values]),
    ):
        write(tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    chosen = report_results.best_and_worst(tmp_path, {}, {})
    assert [(row["predict"], row["mean"]) for row in chosen["best"]] == [("p4", 90), ("p1", 50), ("p6", 30)]
    assert [row["predict"] for row in chosen["worst"]] == ["p2", "p5", "p0"]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium; .ci/run installs it")
def test_the_page_in_a_browser(page, tmp_path):
    """On a laptop it is two screens until something is unfolded, in both languages; unfolded, every figure is decoded."""
    html = tmp_path / "results/report.html"
    with browser_page(html.as_uri(), ready="body") as browser:
        for lang in ("zh", "en"):
            browser.check(f"#{lang}")
            assert browser.evaluate("document.documentElement.scrollHeight") <= 2 * LAPTOP[1], lang
            assert browser.locator(f"main.{lang} table:visible").count() >= 3
        browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert browser.evaluate("document.documentElement.scrollHeight") > 4 * LAPTOP[1]
        widths = browser.evaluate("Array.from(document.querySelectorAll('main.en img'), one => one.naturalWidth)")
        assert len(widths) == len(FIGURES) and min(widths) > 300
        assert browser.hosts <= {""}
