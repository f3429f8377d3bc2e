"""`medasst train` and the ledger: what is refused, what goes on, what is never touched. No training runs here; test_resume has those."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.numpy import save_file

from medasst_tools import cli, provenance
from medasst_tools.config import load
from medasst_tools.training import checkpoints, train
from medasst_tools.training.launch import Launch


def save_weights(path: Path, value: float = 0.0) -> None:
    save_file({"weight": numpy.full(1000, value, dtype=numpy.float32)}, path)


def make_checkpoint(output_dir: Path, step: int, last: int = 100) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_weights(folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data/0", b"0" * 1000)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": last}), encoding="utf-8")
    return folder


@pytest.fixture
def config_path(tmp_path, monkeypatch):
    """A train.yaml over one dataset and a base; nothing is trained."""
    monkeypatch.chdir(tmp_path)
    provenance.folder_sha256.cache_clear()  # of another test's folder of the same relative name
    data = tmp_path / "data"
    data.mkdir()
    (data / "a_train.jsonl").write_text('{"instruction": "问", "input": "", "output": "答"}\n', encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"a_train": {"file_name": "a_train.jsonl"}}), encoding="utf-8")
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"model_type": "qwen2"}')
    save_weights(tmp_path / "base/model.safetensors")
    config = {
        "model_name_or_path": "base", "do_train": True, "template": "qwen", "dataset": "a_train", "dataset_dir": "data",
        "output_dir": "saves/x", "learning_rate": 1e-4, "save_steps": 10, "use_cpu": True, "finetuning_type": "lora",
    }  # fmt: skip
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def about(path: Path, *overrides: str) -> dict:
    return train.made_of(load(path, list(overrides)))


def finish(path: Path) -> Path:
    """Leave what a finished training leaves."""
    output_dir = path.parent / "saves/x"
    output_dir.mkdir(parents=True, exist_ok=True)
    save_weights(output_dir / "adapter_model.safetensors", 1.0)
    run = provenance.record(output_dir / "run.json", about(path), [output_dir / "adapter_model.safetensors"])
    (output_dir / "run.json").write_text(json.dumps(run | {"steps": 100, "seed": 42}), encoding="utf-8")
    return output_dir


def begin(path: Path, *steps: int, processes: int = 1) -> Path:
    """Leave what a killed training leaves."""
    output_dir = path.parent / "saves/x"
    for step in steps:
        make_checkpoint(output_dir, step)
    output_dir.mkdir(parents=True, exist_ok=True)
    note = {"resumed_from": [], "made_of": about(path), "processes": processes}
    (output_dir / "run.started.json").write_text(json.dumps(note), encoding="utf-8")
    return output_dir


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("save_steps=99", True), ("preprocessing_num_workers=3", True), ("flash_attn=sdpa", True), ("flash_attn=auto", True),
        ("disable_tqdm=true", True), ("run_name=x", True), ("logging_first_step=true", True), ("dataset_dir=./data", True),
        ("model_name_or_path=./base", True), ("output_dir=saves/y", True), ("seed=42", True), ("save_only_model=true", True),
        ("max_new_tokens=5", True), ("dataset='a_train '", True), ("learning_rate=0.0001", True),
        ("flash_attn=fa2", False), ("learning_rate=0.5", False), ("seed=7", False), ("max_samples=50", False),
        ("packing=true", False), ("template=llama3", False), ("cutoff_len=100", False),
    ],
)  # fmt: skip
def test_what_makes_a_run_another_run(config_path, override, same):
    key = override.split("=")[0]
    differences = provenance.differences(about(config_path), about(config_path, override))
    assert (not differences) is same and all(line.startswith(f"{key} ") for line in differences), differences


@pytest.mark.parametrize("changed", ["data/a_train.jsonl", "base/config.json"])
def test_a_changed_file_makes_another_run_and_is_named(config_path, changed):
    before = about(config_path)
    with (config_path.parent / changed).open("a") as file:
        file.write("\n")
    provenance.folder_sha256.cache_clear()
    (line,) = provenance.differences(before, about(config_path))
    assert line.startswith("file a_train " if "data" in changed else "model base ") and " -> " in line


REFUSED = [
    ([], "learning_rate=2e-3", "learning_rate 0.0001 -> 0.002"),
    ([], "max_steps=2", "max_steps unset -> 2"),
    ([], "learning_rte=2e-3", "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    ([], "template=qwen2", "no template 'qwen2'; did you mean 'qwen'?"),
    ([], "max_steps=abc", "max_steps is 'abc', must be a number"),
    (["--restart"], "template=qwen2", "no template 'qwen2'"),
    (["--more-samples-will-do"], "learning_rate=2e-3", "learning_rate 0.0001 -> 0.002"),
]


@pytest.mark.parametrize("state", ["finished", "begun"])
@pytest.mark.parametrize(("options", "override", "message"), REFUSED)
def test_a_training_is_never_touched_unasked(config_path, capsys, state, options, override, message):
    output_dir = finish(config_path) if state == "finished" else begin(config_path, 10)
    before = tree(output_dir.parent)
    assert cli.main(["train", str(config_path), override, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and tree(output_dir.parent) == before
    if " -> " in message:
        assert "--restart" in line and "RESTART=1" in line and "output_dir=" in line


def test_the_same_again_is_up_to_date(config_path, capsys):
    finish(config_path)
    assert cli.main(["train", str(config_path), "run_name=x"]) == 0
    assert capsys.readouterr().out == "saves/x: up to date\n"


def test_a_smoke_test_uses_the_finished_model(config_path, capsys):
    finish(config_path)
    assert cli.main(["train", str(config_path), "max_samples=5"]) == 2
    assert cli.main(["train", str(config_path), "max_samples=5", "--more-samples-will-do"]) == 0
    assert "trained on all samples, not 5 a dataset; used as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: save_weights(folder / "adapter_model.safetensors", 2.0), "adapter_model.safetensors was changed or removed"),
        (lambda folder: (folder / "run.json").unlink(), "no run.started.json: not trained by medasst"),
        (lambda folder: (folder / "run.json").write_text("{"), "run.json is damaged"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_what_it_says_is_refused(config_path, capsys, spoil, message):
    output_dir = finish(config_path)
    spoil(output_dir)
    before = tree(output_dir)
    assert cli.main(["train", str(config_path)]) == 2
    assert message in capsys.readouterr().err and tree(output_dir) == before


def test_another_number_of_processes_is_refused(config_path, capsys, monkeypatch):
    output_dir = begin(config_path, 10)
    monkeypatch.setattr(train, "read_launch", lambda *_: Launch(processes=4))
    assert cli.main(["train", str(config_path)]) == 2
    assert "number of processes 1 -> 4" in capsys.readouterr().err and (output_dir / "checkpoint-10").is_dir()


def test_restart_moves_the_old_one_aside(config_path, capsys, monkeypatch):
    before = tree(finish(config_path))
    monkeypatch.setattr(train, "check_with_llamafactory", lambda config: None)
    monkeypatch.setattr(train, "launch_training", lambda *_: 1)  # fails at once
    assert cli.main(["train", str(config_path), "learning_rate=2e-3", "--restart"]) == 1
    assert tree(config_path.parent / "saves/previous/x") == before
    assert "saves/x: moved to saves/previous/x" in capsys.readouterr().out


def test_what_a_run_goes_on_from(config_path, capsys):
    output_dir = begin(config_path, 10, 20)
    truncated, stateless, weights_only = (make_checkpoint(output_dir, step) for step in (30, 40, 50))
    weights = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (stateless / "trainer_state.json").unlink()
    (weights_only / "optimizer.pt").unlink()
    nan = make_checkpoint(output_dir, 60)
    save_weights(nan / "adapter_model.safetensors", float("nan"))
    steps = checkpoints.whole_steps(output_dir)
    assert steps == [10, 20]
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    kept = sorted(path.name for path in (output_dir.parent / "previous").iterdir())
    assert kept == ["x-checkpoint-40", "x-checkpoint-50"]  # whole weights are never deleted
    said = capsys.readouterr().out
    assert "checkpoint-30 is damaged and skipped" in said and "NaN or infinity" in said
    assert "no optimizer state (save_only_model?); its weights are whole and kept in" in said
    note = train.begin(output_dir, about(config_path), max(steps), processes=1)
    assert note["resumed_from"] == [20] and "going on from step 20" in capsys.readouterr().out
    assert [path.name for path in output_dir.glob("checkpoint-*") if path.name != "checkpoint-10"] == ["checkpoint-20"]
    note = train.begin(output_dir, about(config_path), 10, processes=1)  # another machine has no more
    assert note["resumed_from"] == [20, 10]
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-10"]
    assert (output_dir.parent / "previous/x-checkpoint-20").is_dir()


@pytest.mark.parametrize(
    ("state", "weight", "message"),
    [
        ({"global_step": 84, "max_steps": 120}, 1.0, "ended after 84 of 120 steps"),
        ({"global_step": 120, "max_steps": 120}, float("nan"), "holds NaN or infinity in weight"),
    ],
)
def test_complete_means_all_steps_and_numbers(config_path, state, weight, message):
    output_dir = begin(config_path)
    (output_dir / "trainer_state.json").write_text(json.dumps(state))
    save_weights(output_dir / "adapter_model.safetensors", weight)
    with pytest.raises(Exception, match=message):
        train.complete(output_dir, load(config_path), {"made_of": {}, "processes": 1, "resumed_from": []})


def test_a_training_whose_loss_is_no_number_is_ended(config_path, tmp_path, monkeypatch, capsys):
    """llamafactory-cli is a script here that logs a NaN and would go on for a minute."""
    script = tmp_path / "llamafactory-cli"
    rows = [
        {"current_steps": step, "loss": loss, "elapsed_time": "0:00:01"}
        for step, loss in ((5, 2.0), (10, float("nan")))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    script.write_text(f"#!/bin/sh\nmkdir -p saves/x\ncat > saves/x/trainer_log.jsonl <<'END'\n{text}END\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(train.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(train, "LOOK_EVERY", 0.05)
    assert cli.main(["train", str(config_path)]) == 1
    assert "the loss at step 10 is NaN or infinite, and the training was stopped" in capsys.readouterr().err
    assert not (tmp_path / "saves/x/run.json").exists()


def test_without_git_the_commit_is_unknown(monkeypatch, tmp_path):
    from medasst_tools.machine import hardware

    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert hardware.commit() == "unknown" and hardware.made_with()["commit"] == "unknown"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "`medasst render` writes the configs"),
        ("a: [", [], "is not YAML"),
        ("stage: sft\n", [], "says no do_train, output_dir, dataset, dataset_dir, model_name_or_path, template; is it a train.yaml?"),
        ("stage: sft\n", ["lr"], "override 'lr' must be key=value"),
        ("[1]\n", [], "holds list, must be settings"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config_are_named(tmp_path, capsys, text, overrides, message):
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert cli.main(["train", str(path), *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_is_not_fine_tuned_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(provenance.PROJECT_ROOT)
    assert cli.main(["train", "factory_configs/qwen2_7b/train.yaml"]) == 2
    assert cli.main(["export", "factory_configs/demo_base/export.yaml"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "qwen2_7b has no train.yaml: it isn't fine-tuned" in first
    assert "demo_base has no export.yaml: it has no adapter to merge into a base" in second


def test_a_missing_dataset_is_one_line_and_status_2(config_path, capsys):
    assert cli.main(["train", str(config_path), "dataset=b_train"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "medasst train: error: no dataset 'b_train' in data/dataset_info.json; there are a_train"
    ]


def test_the_log_of_a_resumed_run():
    rows = [
        {"current_steps": step, "elapsed_time": f"0:00:{clock:02}"}
        for step, clock in ((5, 3), (10, 6), (8, 2), (10, 4), (10, 4))
    ]
    assert sum(checkpoints.seconds_of_legs(rows)) == 10
    assert [checkpoints.clock_seconds(text) for text in ("0:00:07", "1:02:03", "1 day, 0:00:01")] == [7, 3723, 86401]


def test_a_copied_folder_keeps_its_hash_and_a_changed_one_does_not(tmp_path):
    """The hash that is remembered is of the file's version, not of its name."""
    from medasst_tools.files import sha256_of

    first = tmp_path / "a"
    first.write_bytes(b"x" * (2 << 20))
    digest = sha256_of(first)
    shutil.copy2(first, tmp_path / "b")
    assert sha256_of(tmp_path / "b") == digest
    times = first.stat()
    first.write_bytes(b"y" * (2 << 20))
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256_of(first) != digest
