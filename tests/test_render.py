"""experiments.yaml to configs: what is committed is what is rendered, LLaMA-Factory takes it, and mistakes are named."""

import re
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medasst_tools import cli, config, render
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
    like_medasst = {str(path.relative_to(ROOT / "factory_configs")) for path in RENDERED if path.stem == "train"}
    assert changed == like_medasst - {
        f"{name}/train.yaml" for name in ("demo", "demo_base", "demo_dpo", "smollm2")
    }  # which count steps


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
            named = not line or line.startswith("#") or key in structural or line.endswith(":")  # a mapping: inside it
            assert named or "  # " in line, f"{path}: {line}"


def parse(config: dict, kind: str) -> None:
    """Put a config through the parser that its command uses, which refuses unknown keys."""
    from llamafactory.hparams import get_infer_args, get_train_args

    (get_train_args if kind in ("train", "predict", "tokenize") else get_infer_args)(dict(config))


# what a machine must have installed for LLaMA-Factory to take these settings: the extras of pyproject.toml
NEEDS = {"enable_liger_kernel": "liger-kernel", "deepspeed": "deepspeed"}


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_llamafactory_parses(path, monkeypatch, tmp_path):
    """A setting that needs an extra is refused for the want of it and nothing else; without it the rest is taken."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if config.get("bf16") or config.get("bf16_full_eval"):
        config["use_cpu"] = True  # the parser asks the machine for bfloat16, which this one may not have
    for key, package in NEEDS.items():
        if key in config:
            if installed(package) and key != "deepspeed":
                continue
            refused = (
                "FORCE_TORCHRUN=1" if installed(package) else package.replace("-", ".")
            )  # one process is not many
            with pytest.raises((ImportError, ValueError), match=refused):
                parse(config, path.stem)
            del config[key]
    parse(config, path.stem)


def installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def test_every_experiment_was_walked():
    """What the tests above run over: each experiment's configs, none forgotten."""
    source = render.load_experiments(ROOT / "factory_configs/experiments.yaml")
    expected = set()
    for name in source["experiments"]:
        experiment = render.resolve(source, name)
        kinds = {"none": 2, "full": 3, "lora": 4}[experiment["finetuning"]]
        expected.add((name, kinds))
    walked = {path.parent.name: 0 for path in RENDERED}
    for path in RENDERED:
        walked[path.parent.name] += 1
    assert set(walked.items()) == expected and len(RENDERED) > 40


MODELS = {  # experiment: ModelScope's id, Hugging Face's id where it is another, template, tuned
    "medasst": ("Qwen/Qwen2-7B", None, "qwen", True),
    "qwen2_7b": ("Qwen/Qwen2-7B", None, "qwen", False),
    "llama3_8b": ("LLM-Research/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3", True),
    "gemma_7b": ("AI-ModelScope/gemma-7b-it", "google/gemma-7b-it", "gemma", True),
    "mistral_7b": ("AI-ModelScope/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", "mistral", True),
    "medasst_qwen2_5_7b": ("Qwen/Qwen2.5-7B", None, "qwen", True),
    "medasst_qwen3_8b": ("Qwen/Qwen3-8B-Base", None, "qwen3", True),
    "medasst_qwen3_4b": ("Qwen/Qwen3-4B-Base", None, "qwen3", True),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_ids_and_templates(name):
    modelscope, huggingface, template, tuned = MODELS[name]
    folder = ROOT / "factory_configs" / name
    assert (folder / "train.yaml").exists() is (folder / "export.yaml").exists() is tuned
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
        assert (config["model_name_or_path"], config["template"]) == (modelscope, template), path
        assert (f"the same model is {huggingface}\n" in text) is (huggingface is not None), path
        assert ("adapter_name_or_path" in config) is (tuned and path.stem != "train"), path


def test_llamafactory_knows_the_ids_under_these_names_and_templates():
    """Its own tables of models, but for Gemma-7B, where ModelScope's id is that of gemma-2b-it."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS

    known = {}
    for name, sources in SUPPORTED_MODELS.items():
        by_hub = {source.value: hub_id for source, hub_id in sources.items()}
        known[by_hub.get("ms")] = (by_hub["hf"], DEFAULT_TEMPLATE.get(name))
    for modelscope, huggingface, template, _ in MODELS.values():
        assert known[modelscope][0] == (huggingface or modelscope)
        assert known[modelscope][1] in (template, None), modelscope  # a base model has none of its own


def test_the_models_and_the_variants_differ_in_nothing_else():
    """The same data and settings: what a baseline or a variant says otherwise than medasst, by name."""
    with_medasst = lambda name: yaml.safe_load((ROOT / f"factory_configs/{name}/train.yaml").read_text("utf-8"))  # noqa: E731
    medasst = with_medasst("medasst")
    own = {"model_name_or_path", "template", "output_dir"}
    sharded = {"per_device_train_batch_size", "ddp_timeout", "output_dir"}
    allowed = {name: own | ({"enable_thinking"} if "qwen3" in name else set()) for name in MODELS if MODELS[name][3]}
    allowed["gemma_7b"] |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
    allowed |= {
        "medasst_fast": {
            "output_dir", "packing", "neat_packing", "per_device_train_batch_size", "enable_liger_kernel",
            "flash_attn", "disable_gradient_checkpointing", "optim",
        },
        "medasst_qlora": {
            "output_dir", "quantization_method", "quantization_bit", "quantization_type", "double_quantization",
            "upcast_layernorm", "per_device_train_batch_size", "gradient_accumulation_steps",
        },
        "medasst_ddp": sharded,
        "medasst_zero3": sharded | {"deepspeed"},
        "medasst_fsdp": sharded | {"fsdp", "fsdp_config", "use_reentrant_gc"},
    }  # fmt: skip
    for name, keys in allowed.items():
        config = with_medasst(name)
        assert {key for key in config.keys() | medasst.keys() if config.get(key) != medasst.get(key)} <= keys, name


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("medasst", 1), ("medasst_qlora", 1), ("medasst_ddp", 4), ("medasst_zero3", 4), ("medasst_fsdp", 4)],
)
def test_a_step_is_the_papers_four_records(name, gpus):
    text = (ROOT / f"factory_configs/{name}/train.yaml").read_text(encoding="utf-8")
    launch = dict(re.findall(r"\b(NNODES|NPROC_PER_NODE)=(\d+)", text.splitlines()[1]))
    assert int(launch.get("NNODES", 1)) * int(launch.get("NPROC_PER_NODE", 1)) == gpus
    config = yaml.safe_load(text)
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * gpus == 4


def test_what_is_merged_is_not_quantized():
    """LLaMA-Factory can't merge into a model in 4 bits; all else on a 12 GB card needs them."""
    configs = {
        path.stem: yaml.safe_load(path.read_text("utf-8")) for path in RENDERED if path.parent.name == "medasst_qlora"
    }
    assert {kind: config.get("quantization_bit") for kind, config in configs.items()} == {
        "train": 4, "predict": 4, "chat": 4, "export": None,
    }  # fmt: skip


REAL = {
    "finetuning": "none", "purpose": "p", "dataset_dir": "d", "model": {"model_name_or_path": ["a/b", "x"]},
    "dialogue": {"template": ["qwen", "x"]}, "predict": {"eval_dataset": ["a_test", "x"]}, "generate": {"do_sample": [False, "x"]},
    "chat": {"do_sample": [False, "x"]},
}  # fmt: skip


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
        (
            {"a": {"finetuning": "none", "train": {"deepspeed": {"stage": 3}}}},
            "a: train.deepspeed.stage is 3, must be [value, reason]",
        ),
        ({"a": {"finetuning": "none", "purpose": "p", "dataset_dir": "d"}}, "'model' is undefined"),
        ({"a": REAL | {"train": 5}}, "a: train is 5, must be a mapping of settings"),
        ({"a": REAL, "b": {"based_on": "a", "predict": ["x"]}}, "b: predict is ['x'], must be a mapping of settings"),
        ({"a": REAL, "b": {"based_on": "a", "dialogue": None}}, "b: dialogue is None, must be a mapping of settings"),
        ({"a": REAL, "b": {"based_on": ["a"]}}, "no experiment ['a']; there are a, b"),
        ({"a": REAL, "b": {"based_on": "a", "purpose": {"x": 1}}}, "b: purpose is {'x': 1}, must be a text"),
        ({"a": REAL | {"dataset_dir": 9}}, "a: dataset_dir is 9, must be a text"),
        ({"a": REAL | {"finetuning": ["lora"]}}, "a: finetuning is ['lora'], must be a text"),
        ({"a": None}, "a is None, must be a mapping"),
        (None, "experiments is None, must be a mapping"),
        (["a"], "experiments is ['a'], must be a mapping"),
        ({"a": {"finetuning": "x"}, "b": {"finetuning": "y"}}, "b: finetuning is 'y'"),  # all problems at once
        (
            {"a": REAL | {"dialogue": {"template": ["qwen2", "x"]}}},
            "a: LLaMA-Factory has no template 'qwen2'; did you mean 'qwen'?",
        ),
        (
            {"a": REAL | {"chat": {"max_new_token": [9, "x"]}}},
            "a: unknown key 'max_new_token'; did you mean 'max_new_tokens'?",
        ),
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


def test_what_a_config_cant_set_is_no_known_setting():
    known = config.known_settings()
    assert {"template", "learning_rate", "model_name_or_path"} <= known.keys()
    assert not {"compute_dtype", "device_map", "_VALID_DICT_FIELDS", "framework"} & known.keys()


def test_a_mapping_of_settings_is_nested():
    lines = render.settings_lines({"a": {"b": [1, "why"], "c": {"d": [True, "because"]}}, "e": ["f", "so"]})
    assert lines == "a:\n  b: 1  # why\n  c:\n    d: true  # because\ne: f  # so"
    assert yaml.safe_load(lines) == {"a": {"b": 1, "c": {"d": True}}, "e": "f"}


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
