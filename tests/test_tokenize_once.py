"""Tokens made once: training from them is the same training, and tokens of something else are refused, not used."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_families import TINY_TRAIN, config_of, write_dataset
from tiny_families import FAMILIES, build

from medasst_tools import cli, render, tokenize_once
from medasst_tools.errors import CheckFailed

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
    from medasst_tools import train

    commands = []

    def refuse(*args, **kwargs):
        commands.append(args)
        raise CheckFailed("started")

    monkeypatch.setattr(train, "prepare_output_dir", refuse)
    return commands


def test_training_from_tokens_is_the_same_training(made):
    from llamafactory.train.tuner import run_exp
    from safetensors.numpy import load_file

    config = yaml.safe_load((made / "train.yaml").read_text(encoding="utf-8"))
    weights, losses = [], []
    for output, tokenized_path in (("with", config["tokenized_path"]), ("without", None)):
        run_exp(config | {"output_dir": str(made / output), "tokenized_path": tokenized_path})
        weights.append(load_file(made / output / "adapter_model.safetensors"))
        log = (made / output / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in log if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def test_a_second_run_makes_nothing_again(made, capsys, monkeypatch):
    monkeypatch.setattr(tokenize_once, "write_tokens", None)  # would be an error
    assert cli.main(["tokenize", str(made / "tokenize.yaml"), "preprocessing_num_workers=2"]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "overrides", "message"),
    [
        (None, ["cutoff_len=256"], "of other settings: cutoff_len 512, now 256; run `make tokenize EXPERIMENT="),
        (None, ["template=qwen3", "enable_thinking=false"], "enable_thinking None, now False, template qwen, now qwen3"),
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
    before = path("medasst_ddp")
    source["system_prompt"] = "另一句"
    assert path("medasst_ddp") != before
