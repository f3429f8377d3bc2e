"""`medasst train`: a finished run stays, a killed one goes on, another config's run is moved aside, mistakes are named."""

import json
import zipfile
from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.numpy import save_file

from medasst_tools import cli
from medasst_tools.errors import UserError
from medasst_tools.training import train
from medasst_tools.training.checkpoints import whole_steps


def make_checkpoint(output_dir: Path, step: int) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": numpy.zeros(1000, dtype=numpy.float32)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data/0", b"0" * 1000)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}), encoding="utf-8")
    return folder


def begin(output_dir: Path, inputs: dict) -> dict:
    """What `medasst train` does before it launches; the note that it leaves."""
    note = train.claim_output_dir(output_dir, inputs)
    return train.start_leg(output_dir, inputs, note, max(whole_steps(output_dir), default=None), processes=1)


@pytest.fixture
def config_path(tmp_path):
    """A train.yaml over one dataset; nothing is trained."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a_train.jsonl").write_text('{"instruction": "问", "input": "", "output": "答"}\n', encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"a_train": {"file_name": "a_train.jsonl"}}), encoding="utf-8")
    config = {
        "model_name_or_path": "some/model",
        "dataset": "a_train",
        "dataset_dir": str(data),
        "output_dir": str(tmp_path / "saves/x"),
        "learning_rate": 1e-4,
        "save_steps": 10,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def inputs_of(path: Path, *overrides: str) -> dict:
    return train.run_inputs(train.load_config(path, list(overrides)))


@pytest.mark.parametrize(
    ("override", "same"),
    [("save_steps=99", True), ("preprocessing_num_workers=3", True), ("learning_rate=0.5", False), ("seed=7", False)],
)
def test_what_makes_a_run_another_run(config_path, override, same):
    assert (inputs_of(config_path) == inputs_of(config_path, override)) is same


def test_changed_data_makes_another_run(config_path):
    before = inputs_of(config_path)
    data = config_path.parent / "data/a_train.jsonl"
    data.write_text(data.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert inputs_of(config_path) != before


def test_a_run_goes_on_from_its_last_whole_checkpoint(config_path, tmp_path, capsys):
    output_dir, inputs = tmp_path / "saves/x", inputs_of(config_path)
    begin(output_dir, inputs)  # the first start
    make_checkpoint(output_dir, 10)
    make_checkpoint(output_dir, 20)
    truncated, stateless = make_checkpoint(output_dir, 30), make_checkpoint(output_dir, 40)
    weights = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    (stateless / "trainer_state.json").unlink()
    note = begin(output_dir, inputs)
    assert (note["inputs"], note["legs"], note["resumed_from"]) == (inputs, 1, [20])
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]
    said = capsys.readouterr().out
    assert "going on from step 20" in said and "checkpoint-30 is damaged and skipped" in said


def test_final_weights_without_a_checkpoint_start_again(config_path, tmp_path):
    output_dir, inputs = tmp_path / "saves/x", inputs_of(config_path)
    begin(output_dir, inputs)
    (output_dir / "adapter_model.safetensors").write_bytes(b"killed while saving")
    assert begin(output_dir, inputs)["legs"] == 0
    assert [path.name for path in output_dir.iterdir()] == [train.STARTED]


def test_a_run_of_something_else_is_moved_aside_not_lost(config_path, tmp_path):
    output_dir = tmp_path / "saves/x"
    begin(output_dir, inputs_of(config_path))
    make_checkpoint(output_dir, 10)
    begin(output_dir, inputs_of(config_path, "learning_rate=0.5"))
    assert not list(output_dir.glob("checkpoint-*"))
    assert [path.name for path in (tmp_path / "saves/previous").glob("x-*/checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "`medasst render` writes the configs"),
        ("a: [", [], "is not YAML"),
        ("stage: sft\n", [], "says no output_dir, dataset, dataset_dir, model_name_or_path"),
        ("stage: sft\n", ["--lr=1"], "override '--lr=1' must be key=value"),
        ("stage: sft\n", ["lr"], "override 'lr' must be key=value"),
    ],
)
def test_mistakes_in_the_config_are_named(tmp_path, text, overrides, message):
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=".*") as error:
        train.load_config(path, overrides)
    assert message in str(error.value)


def test_a_missing_dataset_is_one_line_and_status_2(config_path, capsys):
    assert cli.main(["train", str(config_path), "dataset=b_train"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"medasst train: error: no dataset 'b_train' in {config_path.parent}/data/dataset_info.json; "
        "`medasst convert` makes it from its raw file"
    ]
