"""The README's command for real: `make eval` from a checkout to a report, killed once, and what make does, or refuses, after it."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, run_make

pytestmark = pytest.mark.end_to_end
METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
RECORDS = {
    "data/demo",
    "saves/tiny_qwen2/tiny_model.json",
    "saves/demo_base",
    "saves/demo",
    *(f"results/{name}/{file}" for name in ("demo", "demo_base") for file in ("predictions.json", "exam.json", "scores.json")),
    "results/report.json",
}  # fmt: skip


def scores(project, experiment):
    return json.loads((project / f"results/{experiment}/scores.json").read_text(encoding="utf-8"))


def questions_and_answers(project, split) -> set[tuple[str, str]]:
    lines = [line for path in (project / "data/demo").glob(f"*_{split}.jsonl") for line in path.open(encoding="utf-8")]
    return {(record["instruction"], record["output"]) for record in map(json.loads, lines)}


@pytest.fixture
def another(project, evaluated, tmp_path):
    """A copy of the evaluated project, for a test that changes what is there."""
    return shutil.copytree(project, tmp_path / "project", symlinks=True)


def refused(project, *words: str) -> str:
    """Run make, which must end with status 2 and without a traceback; return what it said."""
    run = run_make(project, *words, check=False)
    assert run.returncode == 2, run.stdout
    assert "Traceback" not in run.stdout
    return run.stdout


def up_to_date(said: str) -> set[str]:
    return set(re.findall(r"^(\S+): up to date$", said, re.MULTILINE))


def written(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


# ---- the first time -------------------------------------------------------------------------------------------------
def test_a_killed_training_goes_on(evaluated):
    assert "trained 75 steps" not in evaluated["killed"]
    assert "saves/demo_base: going on from step" in evaluated["eval"]
    assert re.search(
        r"saves/demo_base: trained 75 steps in \d+ s, mean loss \d\.\d{3}; run [0-9a-f]{8}", evaluated["eval"]
    )


def test_the_output_is_a_plan_a_line_a_step_and_the_scores(evaluated):
    lines = evaluated["eval"].splitlines()
    assert len(lines) < 80
    assert lines[0].startswith("make eval: data, then training, predictions, exams and scores of demo_base demo")
    assert not [line for line in lines if re.search(r"it/s|\[INFO|\{'loss'|Warning", line)]
    assert [name for name in METRICS if name in "\n".join(lines[-12:]).lower()] == list(METRICS)
    assert "results/report.html" in "\n".join(lines[-12:])


def test_everything_is_there(project, evaluated):
    manifest = json.loads((project / "data/demo/manifest.json").read_text(encoding="utf-8"))["datasets"]
    for name, counts in manifest.items():
        assert counts["read"] == counts["kept"] + sum(counts["skipped"].values()) + sum(counts["rejected"].values()), (
            name
        )
    tests = sum(counts["kept"] for name, counts in manifest.items() if name.endswith("_test"))
    for experiment in ("demo", "demo_base"):
        predictions = (project / f"results/{experiment}/generated_predictions.jsonl").read_text(encoding="utf-8")
        assert scores(project, experiment)["n"] == len(predictions.splitlines()) == tests >= 40
        exam = json.loads((project / f"results/{experiment}/exam.json").read_text(encoding="utf-8"))
        assert exam["n"] >= 24
    report = (project / "results/report.md").read_text(encoding="utf-8")
    assert "demo_base" in report and f"{scores(project, 'demo')['bleu-4']:.2f}" in report


def test_tuning_helps_on_records_that_training_never_saw(project, evaluated):
    tuned, base = scores(project, "demo"), scores(project, "demo_base")
    assert {metric: tuned[metric] > base[metric] for metric in METRICS} == dict.fromkeys(METRICS, True), (tuned, base)
    trained_on, tested_on = (questions_and_answers(project, split) for split in ("train", "test"))
    assert trained_on and trained_on.isdisjoint(tested_on)


def test_the_checkout_stays_clean(project, evaluated):
    status = subprocess.run(
        ["git", "-C", str(project), "status", "--porcelain"], capture_output=True, text=True, check=True
    )
    assert status.stdout == ""


# ---- again ----------------------------------------------------------------------------------------------------------
def test_a_second_eval_finds_everything_up_to_date(project, evaluated):
    before = written(project / "results")
    said = run_make(project, "eval").stdout
    assert up_to_date(said) == RECORDS
    assert written(project / "results") == before


def test_what_changes_no_result_makes_nothing_anew(another):
    """A comment, and a setting of the log."""
    for name, old, new in (
        ("predict", "answers to the", "replies to the"),
        ("train", "plot_loss: true", "plot_loss: true\nlogging_first_step: true"),
    ):
        file = another / f"templates/{name}.yaml.j2"
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")
    assert up_to_date(run_make(another, "eval").stdout) >= RECORDS - {"results/report.json"}


def test_more_of_the_same_asks_only_what_is_new(another):
    """A smoke test of what comes after the training, then the whole: the answers that are there stay."""
    said = run_make(another, "predict", "score", "report", "ARGS=max_samples=2").stdout
    assert "max_samples unset -> 2" in said
    assert scores(another, "demo")["n"] == 8
    assert "demo (max_samples=2)" in (another / "results/report.md").read_text(encoding="utf-8")
    said = run_make(another, "predict", "score", "report").stdout
    assert "41 answers" in said and "max_samples 2 -> unset" in said
    assert scores(another, "demo")["n"] == 41
    assert "max_samples=2" not in (another / "results/report.md").read_text(encoding="utf-8")


def test_the_exams_are_split_by_what_the_audit_found_in_training(another):
    """Nothing is asked again. The data of demo_base, a text of its own, isn't in the audit, and that is said."""
    said = run_make(another, "audit", "exam").stdout
    split = json.loads((another / "results/demo/exam.json").read_text(encoding="utf-8"))["contamination"]["training"]
    assert {name: rows["clean"]["n"] for name, rows in split.items()} == {"cmmlu": 18, "ceval": 12}
    assert "file audit unset -> " in said and "cmmlu    by training, clean: " in said
    assert "trained on text, which" in run_make(another, "exam", "EXPERIMENT=demo_base").stdout


# ---- refused --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "ARGS=learning_rate=2e-3"], ["learning_rate 0.005 -> 0.002", "output_dir=saves/another", "RESTART=1"]),
        (["train", "ARGS=learning_rte=2e-3"], ["learning_rte", "did you mean 'learning_rate'?"]),
        (["train", "ARGS=max_steps=2"], ["max_steps", "RESTART=1"]),
        (["eval", "ARGS=learning_rate=2e-3"], ["learning_rate 0.005 -> 0.002"]),
        (["data", "RAW=nowhere"], ["nowhere"]),
        (["data", "RAW=nowhere at all"], ["nowhere at all"]),
        (["train", "EXPERIMENT=nope"], ["nope", "demo_base", "medasst"]),
        (["train", "EXPERIMENT=qwen2_7b"], ["qwen2_7b has no train.yaml"]),
        (["export", "EXPERIMENT=demo_base"], ["demo_base has no export.yaml: it has no adapter"]),
        (["exam", "EXAMS=nowhere"], ["nowhere"]),
        (["predict", "BACKEND=vllm"], ["BACKEND is 'vllm'"]),
        (["train", "EXPERIMNT=demo"], ["no make variable EXPERIMNT", "EXPERIMENT"]),
        (["setup", "PYTHON=nopython"], ["PYTHON is 'nopython'"]),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_touched(project, evaluated, words, said):
    before = written(project / "saves")
    output = refused(project, *words)
    assert [word for word in said if word not in output] == [], output
    assert written(project / "saves") == before


# ---- only what is asked for -----------------------------------------------------------------------------------------
def test_a_model_that_is_there_needs_neither_corpora_nor_training(another):
    for made in ("data", "results"):
        shutil.rmtree(another / made)
    said = run_make(another, "exam", "RAW=nowhere").stdout
    assert "results/demo/exam.json" in said and "demo average" in said
    assert not (another / "data").exists()


def test_exams_are_looked_at_before_anything_is_trained(another):
    (another / "exams").mkdir()
    (another / "exams/ceval-exam.zip").write_bytes(b"no archive")
    said = refused(another, "eval", "EXAMS=exams")
    assert "cmmlu_v1_0_1.zip" in said and "saves/demo: up to date" not in said
    said = run_make(another, "eval", "EXAMS=nowhere").stdout
    assert "no exams in nowhere: not run" in said and "exam.json" not in said


def test_clean_removes_only_what_the_demo_made(another):
    (another / "saves/medasst").mkdir()
    (another / "results/medasst").mkdir()
    run_make(another, "clean")
    assert sorted(path.name for path in (another / "saves").iterdir() if path.is_dir()) == ["medasst"]
    assert not {"demo", "demo_base"} & {path.name for path in (another / "results").iterdir()}
    assert (another / "results/medasst").is_dir()


def test_many_jobs_are_done_one_after_the_other(another):
    """`make -j4 train eval`: each begins when the one before has ended."""
    log, fake = another / "calls", another / "fake"
    fake.write_text(f'#!/bin/sh\necho "begin $*" >> {log}; sleep 0.2; echo "end $*" >> {log}\n')
    fake.chmod(0o755)
    run_make(another, "-j4", "train", "eval", "report", f"MEDASST={fake}")
    calls = [f"{when} {words}" for words in ("steps train", "steps eval", "report") for when in ("begin", "end")]
    assert log.read_text().splitlines() == calls


def test_make_alone_lists_the_targets():
    said = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"eval", "train", "report", "doctor"} <= set(re.findall(r"make (\S+) ", said))
