"""experiments.yaml to configs: what is committed is what is rendered, LLaMA-Factory takes it, and mistakes are named."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medasst_tools import cli, render
from medasst_tools.errors import UserError

RENDERED = sorted((ROOT / "factory_configs").glob("*/*.yaml"))

# the paper's settings, as ../shared facts give them
PAPER = {
    "model_name_or_path": "Qwen/Qwen2-7B",
    "finetuning_type": "lora",
    "cutoff_len": 512,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 3.0,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
}


def write_experiments(folder: Path, experiments: dict, **top) -> Path:
    path = folder / "experiments.yaml"
    text = yaml.safe_dump(
        {"system_prompt": {"version": 1, "text": "提示"}, "experiments": experiments} | top, allow_unicode=True
    )
    path.write_text(text, encoding="utf-8")
    return path


def test_committed_configs_are_what_the_templates_give():
    assert cli.main(["render", "--check"]) == 0


def test_check_names_a_stale_and_an_orphaned_file(tmp_path, capsys):
    shutil.copytree(ROOT / "factory_configs", tmp_path / "configs")
    stale, orphan = tmp_path / "configs/demo/train.yaml", tmp_path / "configs/gone/train.yaml"
    stale.write_text(stale.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    orphan.parent.mkdir()
    orphan.write_text("stage: sft\n", encoding="utf-8")
    assert cli.main(["render", "--check", "--configs-dir", str(tmp_path / "configs")]) == 1
    message = capsys.readouterr().err
    assert "demo/train.yaml" in message and "gone/train.yaml" in message
    assert cli.main(["render", "--configs-dir", str(tmp_path / "configs")]) == 0
    assert not orphan.exists()
    assert cli.main(["render", "--check", "--configs-dir", str(tmp_path / "configs")]) == 0


def test_an_unchanged_file_keeps_its_time(tmp_path):
    shutil.copytree(ROOT / "factory_configs", tmp_path / "configs")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "configs").glob("*/*.yaml")}
    experiments = tmp_path / "configs/experiments.yaml"
    text = experiments.read_text(encoding="utf-8")
    assert text.count("num_train_epochs: [3.0,") == 1
    experiments.write_text(text.replace("num_train_epochs: [3.0,", "num_train_epochs: [2.0,"), encoding="utf-8")
    assert cli.main(["render", "--configs-dir", str(tmp_path / "configs")]) == 0
    changed = {str(p.relative_to(tmp_path / "configs")) for p, time in before.items() if p.stat().st_mtime_ns != time}
    assert changed == {"medasst/train.yaml"}


@pytest.mark.parametrize("key", PAPER)
def test_medasst_has_the_papers_settings(key):
    config = yaml.safe_load((ROOT / "factory_configs/medasst/train.yaml").read_text(encoding="utf-8"))
    assert config[key] == PAPER[key]


def test_one_template_and_system_prompt_per_experiment():
    for folder in {path.parent for path in RENDERED}:
        configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")]
        assert len({(config["template"], config["default_system"]) for config in configs}) == 1, folder


def test_every_setting_says_why():
    for path in RENDERED:
        for line in path.read_text(encoding="utf-8").splitlines():
            key = line.partition(":")[0]
            structural = {"do_train", "do_predict", "predict_with_generate", "output_dir", "plot_loss", "stage"}
            structural |= {"finetuning_type", "dataset_dir", "adapter_name_or_path", "export_dir"}
            assert not line or line.startswith("#") or key in structural or "  # " in line, f"{path}: {line}"


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_llamafactory_parses(path, monkeypatch, tmp_path):
    """Through the parser that each command uses, which refuses unknown keys; a 7B config needs a GPU only for bf16."""
    from llamafactory.hparams import get_infer_args, get_train_args

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config.get("bf16") or config.get("bf16_full_eval"):
        config["use_cpu"] = True  # the parser asks the machine for bfloat16, which this one may not have
    (get_train_args if path.stem in ("train", "predict") else get_infer_args)(config)


def test_configs_were_walked():
    assert {path.parent.name for path in RENDERED} >= {"demo", "demo_base", "medasst"}


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ({"a": {"finetuning": "qlora"}}, "a: finetuning is 'qlora'"),
        ({"a": {"based_on": "nothere"}}, "no experiment 'nothere'"),
        ({"a": {"based_on": "b"}, "b": {"based_on": "a"}}, "in a circle: a -> b -> a"),
        ({"a": {"finetuning": "none", "purpose": "p", "modle": {}}}, "unknown key modle"),
        (
            {"a": {"finetuning": "none", "model": {"template": "qwen"}}},
            "model.template is 'qwen', must be [value, reason]",
        ),
        ({"a": {"finetuning": "none", "purpose": "p", "dataset_dir": "d"}}, "'model' is undefined"),
        ({"a": {"finetuning": "x"}, "b": {"finetuning": "y"}}, "b: finetuning is 'y'"),  # all problems at once
    ],
)
def test_mistakes_are_named(tmp_path, experiments, message):
    with pytest.raises(UserError) as error:
        render.render_all(write_experiments(tmp_path, experiments))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text", ["experiments: [", "- a\n", "experiments: {}\n", "\xff", "experiments: {}\nsystem_prompt: text\n"]
)
def test_a_broken_yaml_is_one_line_and_status_2(tmp_path, capsys, text):
    (tmp_path / "experiments.yaml").write_bytes(text.encode("latin-1"))
    assert cli.main(["render", "--configs-dir", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-4, "0.0001"), (1e-5, "1.0e-05"), (2.5e-6, "2.5e-06"), (3.0, "3.0"), (True, "true"), (512, "512")]
    + [
        ("Qwen/Qwen2-7B", "Qwen/Qwen2-7B"),
        ('是：否 # "x"', '"是：否 # \\"x\\""'),
        ("true", '"true"'),
        ("123", '"123"'),
    ],
)
def test_values_survive_yaml(value, text):
    line = render.settings_lines({"key": [value, "why"]})
    assert line == f"key: {text}  # why"
    assert yaml.safe_load(line)["key"] == value and type(yaml.safe_load(line)["key"]) is type(value)
