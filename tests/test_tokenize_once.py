"""Tokens made once: training from them is the same training, and tokens of something else are refused, not used."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_families import TINY_TRAIN, config_of, write_dataset
from tiny_families import FAMILIES, build

from medasst_tools import cli, render
from medasst_tools.errors import CheckFailed
from medasst_tools.training import tokenize_once

EXPERIMENT = "medasst_ddp"


def write_configs(folder: Path) -> None:
    """Write medasst_ddp's tokenize.yaml and train.yaml for a tiny model and data in `folder`."""
    own = {
        "model_name_or_path": str(folder / "base"),
        "dataset_dir": str(folder / "data"),
        "dataset": "a_train,b_train",
        "tokenized_path": str(folder / "tokens"),
        "output_dir": str(folder / "saves/medasst_ddp"),
        "preprocessing_num_workers": 1,
    }
    training = TINY_TRAIN | {"max_steps": 4, "save_steps": 4, "logging_steps": 1}
    for kind, more in (("tokenize", {}), ("train", training)):
        config = config_of(EXPERIMENT, kind) | more | own
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny model, two datasets, the configs, and tokens made of them."""
    folder = tmp_path_factory.mktemp("tokens")
    build(FAMILIES["qwen2"], folder / "base")
    (folder / "data").mkdir()
    for name in ("a_train", "b_train"):
        records = [{"instruction": f"{name} 第{n}问", "input": "", "output": "答" * (n + 1)} for n in range(12)]
        write_dataset(folder / "data", name, records)
    write_configs(folder)
    assert cli.main(["tokenize", str(folder / "tokenize.yaml")]) == 0
    return folder


@pytest.fixture
def project(made, tmp_path) -> Path:
    """A copy of `made` to spoil; the weights are shared, nothing writes to them."""
    import shutil

    for name in ("base", "data", "tokens"):
        shutil.copytree(made / name, tmp_path / name)
    write_configs(tmp_path)
    return tmp_path


@pytest.fixture
def launched(monkeypatch) -> list:
    """What `medasst train` would have started; it fails there."""
    from medasst_tools.training import train

    commands = []

    def refuse(*args, **kwargs):
        commands.append(args)
        raise CheckFailed("started")

    monkeypatch.setattr(train, "claim_output_dir", refuse)
    return commands


def outcome(folder: Path):
    """Return (losses, adapter weights) of a finished training."""
    from safetensors.numpy import load_file

    log = (folder / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in log if '"loss"' in line], load_file(
        folder / "adapter_model.safetensors"
    )


@pytest.fixture(scope="module")
def trained(made):
    """Losses and weights of a training from the tokens, in one process, four records a step."""
    from llamafactory.train.tuner import run_exp

    config = yaml.safe_load((made / "train.yaml").read_text(encoding="utf-8"))
    run_exp(config | {"output_dir": str(made / "with"), "per_device_train_batch_size": 4})
    return outcome(made / "with")


def test_training_from_tokens_is_the_same_training(made, trained):
    from llamafactory.train.tuner import run_exp

    config = yaml.safe_load((made / "train.yaml").read_text(encoding="utf-8")) | {"tokenized_path": None}
    run_exp(config | {"output_dir": str(made / "without"), "per_device_train_batch_size": 4})
    losses, weights = outcome(made / "without")
    assert losses == trained[0] and len(losses) == 4
    assert weights.keys() == trained[1].keys()
    assert all((weights[name] == trained[1][name]).all() for name in weights)


@pytest.mark.parametrize("experiment", ["medasst_fsdp", "medasst_zero3"])
def test_two_processes_that_share_the_model_train_the_same(made, trained, experiment):
    """FSDP and ZeRO-3 really run, on CPUs with gloo, from the tokens: the single process's losses and adapter."""
    import torch

    if experiment == "medasst_zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is an extra: make setup EXTRAS=distributed")
        if torch.cuda.is_available():
            pytest.skip("DeepSpeed takes the GPU where there is one; this test is about CPUs")
    config = config_of(experiment, "train") | yaml.safe_load((made / "train.yaml").read_text(encoding="utf-8"))
    config |= {"output_dir": str(made / experiment), "per_device_train_batch_size": 2}
    if experiment == "medasst_zero3":
        del config["use_cpu"]  # with it transformers doesn't start DeepSpeed's own process group
    path = made / f"{experiment}.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    cpus = {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = {
        "FORCE_TORCHRUN": "1",
        "NPROC_PER_NODE": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    run = subprocess.run(
        ["llamafactory-cli", "train", str(path)], env=os.environ | cpus | processes, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    losses, weights = outcome(made / experiment)
    assert losses == pytest.approx(trained[0], abs=1e-5)
    assert weights.keys() == trained[1].keys()
    for name, weight in weights.items():
        assert weight == pytest.approx(trained[1][name], abs=1e-5)


def test_a_second_run_makes_nothing_again(made, capsys, monkeypatch):
    monkeypatch.setattr(tokenize_once, "write_tokens", None)  # would be an error
    assert cli.main(["tokenize", str(made / "tokenize.yaml"), "preprocessing_num_workers=2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "overrides", "message"),
    [
        (None, ["cutoff_len=256"], "of other settings: cutoff_len 512, now 256; run `make tokenize EXPERIMENT="),
        (
            None,
            ["template=qwen3", "enable_thinking=false"],
            "enable_thinking None, now False, template qwen, now qwen3",
        ),
        (None, ["default_system=你好"], "now 你好"),
        (None, ["dataset=a_train"], "of other settings: dataset a_train,b_train, now a_train"),
        ("data/a_train.jsonl", [], "of other data: a_train "),
        ("base/tokenizer.json", [], "of other tokenizer: "),
        ("tokens/made_of.json", [], "no tokens in "),  # half a JSON file: whatever it was, it wasn't finished
        (None, ["tokenized_path=nowhere"], "no tokens in nowhere; run `make tokenize EXPERIMENT=medasst_ddp` first"),
    ],
)
def test_tokens_of_something_else_are_refused_in_one_line(project, launched, capsys, spoil, overrides, message):
    if spoil:
        text = (project / spoil).read_bytes()
        (project / spoil).write_bytes(text[: len(text) // 2] if spoil.startswith("tokens") else text + b"\n")
    assert cli.main(["train", str(project / "train.yaml"), *overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not launched


@pytest.mark.parametrize("overrides", [[], ["learning_rate=0.5"], ["preprocessing_num_workers=3", "max_steps=9"]])
def test_what_changes_no_token_needs_no_new_tokens(made, launched, overrides):
    assert cli.main(["train", str(made / "train.yaml"), *overrides]) == 1
    assert len(launched) == 1


def test_a_machine_with_four_gpus_and_no_extras_makes_them_too(project, monkeypatch):
    """LLaMA-Factory refuses a single process that sees several GPUs, and DeepSpeed's settings without DeepSpeed."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    config = config_of("medasst_zero3", "train") | {
        "model_name_or_path": str(project / "base"),
        "dataset_dir": str(project / "data"),
        "dataset": "a_train",
        "tokenized_path": str(project / "other"),
        "preprocessing_num_workers": 1,
    }
    path = project / "zero3.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    assert cli.main(["tokenize", str(path)]) == 0
    assert json.loads((project / "other/made_of.json").read_text(encoding="utf-8"))["settings"]["dataset"] == "a_train"


def test_other_data_makes_other_tokens_and_a_failure_keeps_the_old_ones(project, monkeypatch, capsys):
    from datasets import load_from_disk

    data = project / "data/a_train.jsonl"
    data.write_text(data.read_text(encoding="utf-8") * 2, encoding="utf-8")

    def full_disk(config, folder):
        (folder / "half").write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_once, "write_tokens", full_disk)
        assert cli.main(["tokenize", str(project / "tokenize.yaml")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert len(load_from_disk(str(project / "tokens"))["train"]) == 24
    assert [path.name for path in project.glob(".tokens*")] == []
    assert cli.main(["tokenize", str(project / "tokenize.yaml")]) == 0
    assert len(load_from_disk(str(project / "tokens"))["train"]) == 36
    assert "tokens in 36 training examples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["tokenized_path="], "says no tokenized_path; is it a tokenize.yaml?"), (["dataset=c"], "no dataset 'c'")],
)
def test_mistakes_are_one_line_and_status_2(made, capsys, words, message):
    assert cli.main(["tokenize", str(made / "tokenize.yaml"), *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_every_data_setting_of_llamafactory_is_known():
    """A new one would have to be said to change tokens, or not to."""
    from llamafactory.hparams import DataArguments

    fields = {field.name for field in dataclasses.fields(DataArguments)} | {"stage"}
    assert fields == {*tokenize_once.TOKEN_SETTINGS, *tokenize_once.NO_TOKEN_SETTINGS}
    assert not set(tokenize_once.TOKEN_SETTINGS) & set(tokenize_once.NO_TOKEN_SETTINGS)


def test_the_folders_name_depends_on_what_the_tokens_depend_on():
    source = render.load_experiments(ROOT / "factory_configs/experiments.yaml")
    path = lambda name: render.tokenized_path(render.resolve(source, name))  # noqa: E731
    assert path("medasst_ddp") == path("medasst_zero3") == path("medasst_fsdp")  # one folder serves them all
    assert len({path(name) for name in ("medasst_ddp", "llama3_8b", "gemma_7b", "medasst_fast")}) == 4
    changed = render.resolve(source, "medasst_ddp")
    changed["dialogue"]["default_system"] = ["另一句", "why"]
    assert render.tokenized_path(changed) != path("medasst_ddp")
