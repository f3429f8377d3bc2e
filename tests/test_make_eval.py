"""The README's command for real: `make eval` from a checkout to a report, killed once, and what a change makes it redo."""

import json
import subprocess

import pytest
from conftest import run_make

pytestmark = pytest.mark.end_to_end
METRICS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def scores(project, experiment):
    return json.loads((project / f"results/{experiment}/scores.json").read_text(encoding="utf-8"))


def questions_and_answers(project, split) -> set[tuple[str, str]]:
    lines = [line for path in (project / "data/demo").glob(f"*_{split}.jsonl") for line in path.open(encoding="utf-8")]
    return {(record["instruction"], record["output"]) for record in map(json.loads, lines)}


def steps_of(dry_run: str) -> set[str]:
    """Return the steps that `make -n` would run, as "verb experiment" or just "verb"."""
    steps = set()
    for line in dry_run.splitlines():
        experiment = next((name for name in ("demo_base", "demo") if f"/{name}/" in line), "")
        if ".venv/bin/medasst " in line:
            steps.add(f"{line.split()[1]} {experiment}".strip())
    return steps


def test_a_killed_training_goes_on(evaluated):
    assert "finished" not in evaluated["killed"]
    assert "saves/demo_base: going on from step" in evaluated["eval"]


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


def test_scores_equal_llamafactorys_own(project, evaluated):
    ours = scores(project, "demo")
    theirs = json.loads((project / "results/demo/predict_results.json").read_text(encoding="utf-8"))
    assert {m: ours[m] for m in METRICS} == pytest.approx({m: theirs[f"predict_{m}"] for m in METRICS}, abs=1e-9)


def test_a_second_eval_has_nothing_to_do(project, evaluated):
    again = run_make(project, "eval")
    assert "Nothing to be done for 'eval'" in again.stdout
    assert steps_of(again.stdout) == set()


def test_the_checkout_stays_clean(project, evaluated):
    status = subprocess.run(
        ["git", "-C", str(project), "status", "--porcelain"], capture_output=True, text=True, check=True
    )
    assert status.stdout == ""


BOTH = ("demo", "demo_base")
EVALUATION = {f"{verb} {name}" for verb in ("generate", "score", "exam") for name in BOTH}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["EXAMS=other"], {f"exam {name}" for name in BOTH} | {"report"}),
        (["SHOTS=5"], {f"exam {name}" for name in BOTH} | {"report"}),
        (["RAW=other"], {"convert", "tiny-model", "train demo", "train demo_base", "report"} | EVALUATION),
    ],
)
def test_other_inputs_redo_what_depends_on_them(project, evaluated, words, expected):
    assert steps_of(run_make(project, "-n", "eval", *words).stdout) == expected


@pytest.mark.parametrize(
    ("path", "old", "new", "expected"),
    [
        ("templates/predict.yaml.j2", "num_beams", "num_beams", set()),
        ("templates/predict.yaml.j2", "answers to the", "replies to the", {"generate", "score"}),
        ("templates/chat.yaml.j2", "the model in use", "the model at work", {"exam"}),
    ],
)
def test_a_changed_template_redoes_what_depends_on_it(project, evaluated, path, old, new, expected):
    file = project / path
    text = file.read_text(encoding="utf-8")
    try:
        file.write_text(text.replace(old, new), encoding="utf-8")
        run_make(project, "configs")
        steps = steps_of(run_make(project, "-n", "eval").stdout)
    finally:
        file.write_text(text, encoding="utf-8")
        run_make(project, "configs")
        for stale in project.glob("factory_configs/*/*.yaml"):  # as they were, so that the next test starts from done
            subprocess.run(["touch", "-d", "2020-01-01", str(stale)], check=True)
    assert steps == {f"{verb} {name}" for verb in expected for name in BOTH} | ({"report"} if expected else set())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "RAW=nowhere"], "nowhere"),
        (["train", "EXPERIMENT=nope"], "nope"),
        (["exam", "EXAMS=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_named_and_ends_with_status_2(project, evaluated, words, message):
    run = run_make(project, *words, check=False)
    assert run.returncode == 2
    assert message in run.stdout and "Traceback" not in run.stdout
