"""Which verbs a target of the Makefile runs, with which words, in which order."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medasst_tools import cli, render, steps
from medasst_tools.errors import UserError

CONVERT = "convert --raw-dir dataset_info/samples/raw --out-dir data/demo --max-rejects 0.1"
FULL = "convert --raw-dir data/raw --out-dir data/full --max-rejects 0.01"
TINY = "tiny-model --data-dir data/demo --out saves/tiny_qwen2"
RELEASED = "released-model --out saves/smollm2_135m"
EXAMS = "--exams-dir dataset_info/samples/exams --out results"


def trained(*names: str) -> list[str]:
    return [f"train factory_configs/{name}/train.yaml" for name in names]


def predicted(name: str) -> str:
    return f"predict factory_configs/{name}/predict.yaml"


def examined(name: str) -> str:
    return f"exam factory_configs/{name}/chat.yaml {EXAMS}/{name} --shots 0"


@pytest.fixture(autouse=True)
def nothing_is_there(tmp_path, monkeypatch):
    """A folder without models, data and results, and no variable of an outer make."""
    monkeypatch.chdir(tmp_path)
    for name in ["ARGS", "EXPERIMENT", "EXPERIMENTS", "RAW", "EXAMS", "SHOTS", "BACKEND", "API_BASE", "RESTART", "V"]:
        monkeypatch.delenv(name, raising=False)


def verbs(target: str, monkeypatch, **variables: str) -> list[str]:
    """Return the verbs of a target, each once, in their order."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return list(
        dict.fromkeys(" ".join(words) for words in steps.TARGETS[target](steps.variable("EXPERIMENT", "demo")))
    )


@pytest.mark.parametrize(
    ("target", "variables", "expected"),
    [
        ("data", {}, [CONVERT]),
        ("data", {"RAW": "data/raw"}, ["convert --raw-dir data/raw --out-dir data/demo --max-rejects 0.01"]),
        ("data", {"EXPERIMENT": "medasst"}, [FULL]),
        ("data", {"EXPERIMENT": "medasst", "DATA_ARGS": "--strict"}, [f"{FULL} --strict"]),
        ("data", {"MAX_REJECTS": "0.5"}, [CONVERT.replace("0.1", "0.5")]),
        ("audit", {"EXPERIMENT": "qwen2_7b"}, [FULL, "audit --data-dir data/full"]),  # no exams are there
        (
            "audit",
            {"EXPERIMENT": "qwen2_7b", "EXAMS": "nowhere"},
            [FULL, "audit --data-dir data/full --exams-dir nowhere"],
        ),
        ("train", {}, [CONVERT, TINY, *trained("demo_base", "demo")]),
        ("train", {"EXPERIMENT": "demo_dpo"}, [CONVERT, TINY, *trained("demo_base", "demo", "demo_dpo")]),
        ("train", {"EXPERIMENT": "medasst_dpo"}, [FULL, *trained("medasst", "medasst_dpo")]),
        ("train", {"EXPERIMENT": "qwen2_7b"}, trained("qwen2_7b")),  # which says that it isn't fine-tuned
        ("train", {"EXPERIMENT": "smollm2"}, [CONVERT, RELEASED, *trained("smollm2")]),
        ("predict", {"EXPERIMENT": "qwen2_7b"}, [FULL, predicted("qwen2_7b")]),
        ("predict", {"EXPERIMENT": "smollm2_base"}, [CONVERT, RELEASED, predicted("smollm2_base")]),
        (
            "predict",
            {"BACKEND": "api", "API_ARGS": "--parallel 4"},
            [CONVERT, f"{predicted('demo')} --api-base http://127.0.0.1:8000/v1 --parallel 4"],
        ),
        (
            "exam",
            {"SHOTS": "5", "EXAM_ARGS": "--orders 4", "EXPERIMENT": "qwen2_7b"},
            [
                "exam factory_configs/qwen2_7b/chat.yaml --exams-dir data/exams --out results/qwen2_7b --shots 5 --orders 4"
            ],
        ),
        (
            "train",
            {"ARGS": "max_steps=2 run_name='a b'"},
            [CONVERT, TINY, *trained("demo_base"), f"{trained('demo')[0]} max_steps=2 run_name=a b"],
        ),
        (
            "train",
            {"RESTART": "1"},
            [CONVERT, TINY, f"{trained('demo_base')[0]} --restart-if-other", f"{trained('demo')[0]} --restart"],
        ),
    ],
)
def test_the_verbs_of_a_target(monkeypatch, target, variables, expected):
    assert verbs(target, monkeypatch, **variables) == expected


@pytest.mark.parametrize(
    ("experiment", "names", "last"),
    [
        ("demo", ["demo_base", "demo"], ["report"]),
        ("demo_base", ["demo_base"], ["report"]),
        ("smollm2", ["smollm2_base", "smollm2"], ["export factory_configs/smollm2/export.yaml", "report"]),
        ("demo_dpo", ["demo", "demo_dpo"], ["report", "compare results/demo results/demo_dpo"]),
        ("qwen2_7b", ["qwen2_7b"], ["report"]),
    ],
)
def test_eval_is_everything_in_its_order(monkeypatch, experiment, names, last, capsys):
    Path("dataset_info/samples/exams/cmmlu_v1_0_1").mkdir(parents=True)
    Path("data/exams/.download-ceval-exam.zip").mkdir(parents=True)  # as an interrupted download leaves it
    found = verbs("eval", monkeypatch, EXPERIMENT=experiment)
    data = steps.data_dir(experiment)
    assert found[0].startswith("convert ") and f"--out-dir {data} " in found[0]
    asked = data == "data/demo"
    assert found[1] == f"{examined(experiment)} --check" or not asked  # before anything is trained
    places = []
    for name in names:
        wanted = [words + " --more-samples-will-do" for words in trained(name) if steps.is_trained(name)]
        wanted += [
            predicted(name),
            *([examined(name)] if asked else []),
            f"score results/{name}/generated_predictions.jsonl",
        ]
        wanted += [f"safety factory_configs/{name}/chat.yaml"] * experiment.endswith("_dpo")
        places += [next(i for i, words in enumerate(found) if words.startswith(one) and i > asked) for one in wanted]
    assert places == sorted(places)
    assert found[-len(last) :] == last
    assert sum(words.startswith("predict") for words in found) == len(names)
    plan = capsys.readouterr().out
    assert ("no exams in data/exams: not run" in plan) == (not asked)
    assert ("minutes on two cores" in plan) == experiment.startswith("demo")
    assert (f"How long: make doctor EXPERIMENT={experiment}" in plan) == (not experiment.startswith("demo"))


def test_experiments_on_other_data_are_converted_too(monkeypatch):
    found = verbs("eval", monkeypatch, EXPERIMENTS="demo medasst")
    assert [words for words in found if words.startswith("convert")] == [CONVERT, FULL]


@pytest.mark.parametrize("target", ["predict", "exam", "safety", "export", "model"])
def test_a_model_that_is_there_is_used_as_it_is(monkeypatch, target):
    """Finished here, or an adapter that was brought; one that was begun goes on."""

    def trains(*files: str, **variables: str) -> bool:
        for name in ("run.json", "run.started.json", "adapter_config.json"):
            (folder / name).unlink(missing_ok=True)
        for name in files:
            (folder / name).touch()
        return any(words.startswith("train ") for words in verbs(target, monkeypatch, **variables))

    folder = Path("saves/demo")
    folder.mkdir(parents=True)
    assert trains() and trains("run.started.json") and trains("run.started.json", "adapter_config.json")
    assert not trains("run.json") and not trains("adapter_config.json")
    folder = Path("saves/smollm2")
    folder.mkdir(parents=True)
    assert RELEASED in verbs(target, monkeypatch, EXPERIMENT="smollm2")
    assert not trains("run.json", EXPERIMENT="smollm2") and RELEASED in verbs(target, monkeypatch)
    Path("saves/smollm2_135m").mkdir()
    assert RELEASED not in verbs(target, monkeypatch)


def test_prediction_without_corpora_takes_the_data_that_is_there(monkeypatch):
    assert FULL in verbs("predict", monkeypatch, EXPERIMENT="qwen2_7b")
    Path("data/full").mkdir(parents=True)
    Path("data/full/dataset_info.json").touch()
    assert verbs("predict", monkeypatch) == [predicted("qwen2_7b")]
    Path("data/raw").mkdir()
    assert verbs("predict", monkeypatch) == [FULL, predicted("qwen2_7b")]


def test_the_data_is_where_the_experiment_says(monkeypatch, tmp_path):
    source = yaml.safe_load((ROOT / "factory_configs/experiments.yaml").read_text(encoding="utf-8"))
    source["experiments"]["mine"] = {"based_on": "demo", "dataset_dir": "data/mine"}
    (tmp_path / "experiments.yaml").write_text(yaml.safe_dump(source), encoding="utf-8")
    monkeypatch.setattr(render, "CONFIGS_DIR", tmp_path)
    for cached in (steps.experiments, steps.experiment):
        cached.cache_clear()
        monkeypatch.setattr(steps, cached.__name__, cached.__wrapped__)
    found = verbs("train", monkeypatch, EXPERIMENT="mine")
    assert found[-2:] == ["convert --raw-dir data/raw --out-dir data/mine --max-rejects 0.01", *trained("mine")]
    assert f"{TINY}" in found and CONVERT in found  # its base is the demo's


def test_the_audit_looks_for_the_exams_that_are_there(monkeypatch, capsys):
    Path("data/exams/ceval-exam").mkdir(parents=True)
    words = verbs("audit", monkeypatch, EXPERIMENT="qwen2_7b")[-1]
    assert words == "audit --data-dir data/full --exams-dir data/exams" and capsys.readouterr().out == ""


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match="no experiment 'nope'; there are medasst, "):
        verbs("train", monkeypatch, EXPERIMENT="nope")
    with pytest.raises(UserError, match=re.escape("no experiment 'demmo'; did you mean 'demo'?; there are medasst, ")):
        verbs("train", monkeypatch, EXPERIMENT="demmo")
    with pytest.raises(UserError, match="ARGS is .*: No closing quotation"):
        verbs("train", monkeypatch, EXPERIMENT="demo", ARGS="run_name='a")
    monkeypatch.setenv("ARGS", "")
    with pytest.raises(UserError, match="BACKEND is 'vllm', must be llamafactory or api"):
        verbs("predict", monkeypatch, EXPERIMENT="demo", BACKEND="vllm")


def test_the_first_that_fails_ends_it(monkeypatch, capfd):
    """Through the command, in a process each."""
    monkeypatch.setenv("EXPERIMENT", "demo")
    monkeypatch.setenv("RAW", "nowhere")
    assert cli.main(["steps", "train"]) == 2
    captured = capfd.readouterr()
    assert "configs, " in captured.out and "nowhere" in captured.err and "tiny-model" not in captured.err
