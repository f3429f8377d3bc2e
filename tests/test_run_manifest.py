"""A config that doesn't fit the model it names is refused in one line, by every verb that would use it."""

import json
from pathlib import Path

import numpy
import pytest
import yaml
from safetensors.numpy import save_file

from medasst_tools import cli
from medasst_tools.errors import UserError
from medasst_tools.files import model_sha256
from medasst_tools.run_manifest import check_and_print, check_model, describe, read_run, trained_model


@pytest.fixture
def trained(tmp_path):
    """A folder with a base, an adapter, its run.json and a config that fits; {"config": ..., "path": ...}."""
    base, adapter = tmp_path / "base", tmp_path / "saves/a"
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir(parents=True)
        save_file({"weight": numpy.zeros(8, dtype=numpy.float32)}, folder / name)
    shape = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"} | shape), encoding="utf-8")
    settings = {"template": "qwen", "default_system": "你是医疗助手。" * 20, "model_name_or_path": str(base)}
    run = {
        "inputs": {
            "config": settings | {"output_dir": str(adapter), "finetuning_type": "lora", "seed": 7},
            "data": {"a_train": "00"},
            "base": model_sha256(base),
        },
        "seconds": 61.0,
        "steps": 1200,
        "tokens": 34567,
        "commit": "abc1234",
    }
    (adapter / "run.json").write_text(json.dumps(run), encoding="utf-8")
    config = settings | {"adapter_name_or_path": str(adapter)}
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return {"config": config, "path": path, "base": base, "adapter": adapter}


def test_what_fits_is_printed(trained, capsys):
    kept = check_and_print(trained["config"], trained["path"])
    (line,) = capsys.readouterr().out.splitlines()
    for fact in (kept["id"], "template qwen", "a_train", "seed 7", "1,200 steps", "34,567 tokens", "61 s", "abc1234"):
        assert fact in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "llama3"}, "has the template llama3, but"),
        ({"template": None}, "has the template None, but"),
        ({"default_system": "另一个"}, "has the system prompt 另一个, but"),
        ({"model_name_or_path": "other/base"}, "on the base other/base, but it was trained on"),
    ],
)
def test_a_mismatch_is_one_line(trained, change, message):
    with pytest.raises(UserError) as error:
        check_model(trained["config"] | change, trained["path"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_base_of_the_same_name_is_refused_unless_it_is_not_looked_at(trained):
    save_file({"weight": numpy.ones(8, dtype=numpy.float32)}, trained["base"] / "model.safetensors")
    with pytest.raises(UserError, match="is not the one that .* was trained on"):
        check_model(trained["config"], trained["path"])
    assert check_model(trained["config"], trained["path"], hash_base=False) is not None


def test_models_without_a_run(trained, tmp_path):
    base_only = {"model_name_or_path": str(trained["base"]), "template": "qwen"}
    assert trained_model(base_only) is None and check_model(base_only, tmp_path) is None
    assert "not tuned" in describe(base_only, None)
    (trained["adapter"] / "run.json").unlink()
    assert check_model(trained["config"], tmp_path) is None
    assert "what it was trained on is unknown" in describe(trained["config"], None)


def test_a_model_whose_weights_were_all_trained(trained):
    config = trained["config"] | {"model_name_or_path": str(trained["adapter"]), "adapter_name_or_path": None}
    assert check_model(config, trained["path"])["steps"] == 1200
    with pytest.raises(UserError, match="has the template llama3"):
        check_model(config | {"template": "llama3"}, trained["path"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"inputs": 3}'])
def test_a_damaged_run_json_is_named(trained, text):
    (trained["adapter"] / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json is damaged; `make train`"):
        read_run(trained["adapter"])


def test_every_verb_refuses(trained, tmp_path, monkeypatch, capsys):
    """generate, exam, score, report with a template that the model wasn't trained with."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "a_test.jsonl").write_text('{"instruction": "问", "input": "", "output": "答"}\n', encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"a_test": {"file_name": "a_test.jsonl"}}), encoding="utf-8")
    predictions = tmp_path / "results/a/generated_predictions.jsonl"
    predictions.parent.mkdir(parents=True)
    predictions.write_text('{"prompt": "问", "predict": "答", "label": "答\\n"}\n', encoding="utf-8")
    chat = trained["config"] | {"template": "llama3"}
    predict = chat | {
        "dataset_dir": str(data), "eval_dataset": "a_test", "do_predict": True, "output_dir": "results/a"
    }  # fmt: skip
    configs = tmp_path / "factory_configs/a"
    configs.mkdir(parents=True)
    for name, config in (("chat", chat), ("predict", predict)):
        (configs / f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    exams = Path(__file__).resolve().parent.parent / "dataset_info/samples/exams"
    for words in (
        ["generate", "factory_configs/a/predict.yaml"],
        ["exam", "factory_configs/a/chat.yaml", "--exams-dir", str(exams), "--out", "results/a"],
        [
            "score",
            str(predictions),
            "--out",
            "results/a/scores.json",
            "--predict-config",
            "factory_configs/a/predict.yaml",
        ],
        ["report"],
    ):
        assert cli.main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "has the template llama3, but" in line, words
