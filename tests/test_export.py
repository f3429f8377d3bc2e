"""medasst export: the release with the adapter in, read by others too; a card that says what the files say; prompts as in training."""

import contextlib
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_environment, run_make
from huggingface_hub import ModelCard

from medasst_tools import cli
from medasst_tools.errors import CheckFailed
from medasst_tools.serving import export, exported_prompts

EXPORT_CONFIG = "factory_configs/demo/export.yaml"
SYSTEM = yaml.safe_load((ROOT / EXPORT_CONFIG).read_text(encoding="utf-8"))["default_system"]
QUESTIONS = ["头疼怎么办？", "孩子发烧要去医院吗？", "感冒吃什么？"]


@pytest.fixture
def llamafactory_templates(monkeypatch):
    """LLaMA-Factory's templates are global and remember the system prompt that was set last."""
    from llamafactory.data import template

    monkeypatch.setattr(template, "TEMPLATES", copy.deepcopy(template.TEMPLATES))


# ---- the demo -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def exported(project, evaluated):
    """What `make export` makes in the project; its folder."""
    said = run_make(project, "export").stdout
    assert "corrected: " not in said and said.splitlines()[-1].startswith("saves/demo_merged: ")
    return project / "saves/demo_merged"


def greedy_answers(config: dict, questions: list[str]) -> list[str]:
    from llamafactory.chat import ChatModel

    model = ChatModel(config)
    return [model.chat([{"role": "user", "content": question}])[0].response_text for question in questions]


@pytest.mark.end_to_end
def test_same_greedy_answers_as_base_and_adapter(project, exported, monkeypatch):
    monkeypatch.chdir(project)
    config = yaml.safe_load((project / "factory_configs/demo/chat.yaml").read_text(encoding="utf-8"))
    merged = {key: value for key, value in config.items() if key not in ("adapter_name_or_path", "finetuning_type")}
    records = [json.loads(line) for line in (project / "data/demo/webmedqa_test.jsonl").open(encoding="utf-8")]
    questions = [record["instruction"] for record in records][:8]
    apart = greedy_answers(config, questions)
    assert greedy_answers(merged | {"model_name_or_path": str(exported)}, questions) == apart
    assert len(set(apart)) > 4 and all(apart)


@pytest.mark.end_to_end
def test_the_card_says_what_the_files_say(project, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    scored = {name: json.loads((project / f"results/demo/{name}.json").read_text()) for name in ("scores", "exam")}
    read = {
        result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results
    }  # as the hubs read it
    wanted = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "cmmlu", "ceval", "average")
    assert read == {key: round((scored["scores"] | scored["exam"])[key], 4) for key in wanted}
    assert "这不是医生" in body and body.index("这不是医生") < body.index("This is no doctor")
    manifest = json.loads((project / "data/demo/manifest.json").read_text(encoding="utf-8"))["datasets"]
    made = json.loads((project / "saves/demo/run.json").read_text(encoding="utf-8"))["made_of"]
    for name in made["settings"]["dataset"].split(","):
        counts, corpus = manifest[name], export.load_datasets()[name].corpus
        line = next(line for line in body.splitlines() if line.startswith(f"| {name} |"))
        assert corpus.licence in line and f"| {counts['read']} | {counts['kept']} |" in line
    for name in ("scores", "exam"):
        result = json.loads((project / f"results/demo/{name}.json").read_text(encoding="utf-8"))
        assert f"`{result['signature']}`" in body
        assert f"{result['bleu-4' if name == 'scores' else 'cmmlu']:.2f} [" in body
    for key in ("learning_rate", "max_steps"):
        assert f"| {key} | {made['settings'][key]} |" in body
    assert all(sha in body for sha in made["files"].values())
    assert SYSTEM in body and "saves/demo_base" in body


@pytest.mark.end_to_end
def test_a_second_export_merges_nothing_and_new_scores_renew_the_card(project, exported, monkeypatch, capsys):
    monkeypatch.chdir(project)
    weights, scores = exported / "model.safetensors", project / "results/demo/scores.json"
    before, text = weights.stat().st_mtime_ns, scores.read_text(encoding="utf-8")
    try:
        scores.write_text(json.dumps(json.loads(text) | {"signature": "another signature"}), encoding="utf-8")
        assert cli.main(["export", EXPORT_CONFIG]) == 0
    finally:
        scores.write_text(text, encoding="utf-8")
    assert "`another signature`" in (exported / "README.md").read_text(encoding="utf-8")
    assert weights.stat().st_mtime_ns == before
    assert capsys.readouterr().out.splitlines()[-1] == "saves/demo_merged/export.json: up to date"


@pytest.mark.end_to_end
def test_a_failed_merge_leaves_the_old_model(project, exported, monkeypatch, capsys):
    """Whatever goes wrong on the way: the folder is the old one, whole, and nothing lies around."""
    monkeypatch.chdir(project)
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}

    def fails(folder, chat):
        raise CheckFailed("prompts differ")

    monkeypatch.setattr(export, "correct_prompts", fails)
    assert cli.main(["export", EXPORT_CONFIG, "export_size=1"]) == 1
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before
    assert [path.name for path in exported.parent.glob(".*merged*")] == []
    assert "prompts differ" in capsys.readouterr().err


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["factory_configs/demo_base/export.yaml"],
            "demo_base has no export.yaml: it has no adapter to merge",
        ),
        ([EXPORT_CONFIG, "export_dir=saves/demo"], "export_dir is saves/demo, which holds what is to be merged"),
        ([EXPORT_CONFIG, "export_dir=saves"], "export_dir is saves, which holds what is to be merged"),
        ([EXPORT_CONFIG, "export_dir=data"], "data holds something that `medasst export` didn't write"),
        ([EXPORT_CONFIG, "adapter_name_or_path=saves/none"], "`make train EXPERIMENT=none` makes it"),
        ([EXPORT_CONFIG, "adapter_name_or_path=null"], "says no adapter_name_or_path: there is nothing to merge"),
        ([EXPORT_CONFIG, "template=llama3"], "has the template llama3, but saves/demo was trained with qwen"),
        ([EXPORT_CONFIG, "export_size"], "override 'export_size' must be key=value"),
        (["factory_configs/demo/chat.yaml"], "says no export_dir; is it a export.yaml?"),
    ],
)
def test_mistakes_are_named(project, evaluated, monkeypatch, capsys, words, message):
    monkeypatch.chdir(project)
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.end_to_end
def test_make_names_an_experiment_without_an_adapter_and_trains_nothing(project, evaluated):
    run = subprocess.run(
        ["make", "export", "EXPERIMENT=demo_base"], cwd=project, env=make_environment(project),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "demo_base" in run.stderr and "step" not in run.stdout


# ---- a base as its makers released it -------------------------------------------------------------------------------
# what Qwen2's own tokenizer brings: another system prompt than ours
QWENS_OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
THETA = 1_000_000.0  # Qwen2's; transformers' default is 10,000


def write_base(folder: Path, version: int) -> None:
    """A tiny Qwen2 with Qwen2's theta, its files as transformers 4 or 5 writes them: a release of 2024 or one of today."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tokenizer_of("qwen")
    tokenizer.chat_template = QWENS_OWN
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 5, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if version == 5:
        return
    (folder / "chat_template.jinja").unlink()
    special = {
        "content": "",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    rewrite_json(folder / "config.json", {"rope_parameters": None, "dtype": None, "layer_types": None}, {
        "rope_theta": THETA, "torch_dtype": "float32", "transformers_version": "4.41.2",
    })  # fmt: skip
    rewrite_json(folder / "tokenizer_config.json", {"backend": None, "extra_special_tokens": None, "is_local": None}, {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(tokenizer.convert_tokens_to_ids(token)): special | {"content": token} for token in tokenizer.all_special_tokens
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "chat_template": QWENS_OWN,
    })  # fmt: skip


def rewrite_json(path: Path, without: dict, more: dict) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: inner for key, inner in value.items() if key not in without}
    path.write_text(json.dumps(kept | more, indent=4), encoding="utf-8")


@pytest.fixture(scope="module", params=[4, 5])
def release(request, tmp_path_factory):
    """A base and a random adapter on it, exported by the verb: the folder, with the base's and the export's configs in it."""
    from llamafactory.data import template
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(f"release{request.param}")
    write_base(folder / "base", request.param)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "adapter")
    config = {
        "model_name_or_path": "base", "adapter_name_or_path": "adapter", "finetuning_type": "lora",
        "template": "qwen", "default_system": SYSTEM, "infer_dtype": "float32",
    }  # fmt: skip
    (folder / "export.yaml").write_text(yaml.safe_dump(config | {"export_dir": "merged"}), encoding="utf-8")
    before, template.TEMPLATES = template.TEMPLATES, copy.deepcopy(template.TEMPLATES)
    with contextlib.chdir(folder):
        assert cli.main(["export", "export.yaml"]) == 0
        config |= {"do_sample": False, "max_new_tokens": 24}
        (folder / "answers.json").write_text(json.dumps(greedy_answers(config, QUESTIONS)), encoding="utf-8")
    template.TEMPLATES = before
    return folder


def test_config_and_tokenizer_are_the_released_files(release):
    base, merged = release / "base", release / "merged"
    theirs = {path.name for path in base.iterdir()}
    ours = {path.name for path in merged.iterdir()} - theirs
    assert ours <= {"README.md", "Modelfile", "export.json", "chat_template.jinja"}
    same = {name for name in theirs if (base / name).read_bytes() == (merged / name).read_bytes()}
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((merged / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == THETA and "TokenizersBackend" not in str(tokenizer)
    if release.name.startswith("release4"):  # but for the chat template, which had another system prompt
        assert theirs - same == {"model.safetensors", "tokenizer_config.json", "generation_config.json"}
        before = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert before.pop("chat_template") == QWENS_OWN and tokenizer == before
    else:
        assert "tokenizer.json" in same
        before = json.loads((base / "config.json").read_text(encoding="utf-8"))
        assert {key: value for key, value in config.items() if key in before} == before


def test_the_prompt_of_the_exported_folder_is_the_trainings(release):
    """What vLLM does: the folder's own chat template, no LLaMA-Factory."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(release / "merged").apply_chat_template(
        [{"role": "user", "content": "头疼"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n头疼<|im_end|>\n<|im_start|>assistant\n"
    )


READER = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__
tokenizer, model = (kind.from_pretrained("merged") for kind in (AutoTokenizer, AutoModelForCausalLM))
answers = []
for question in json.loads(sys.argv[1]):
    messages = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, do_sample=False, max_new_tokens=24)[0, asked["input_ids"].shape[1]:]
    answers.append(tokenizer.decode(said, skip_special_tokens=True))
theta = AutoConfig.from_pretrained("merged").rope_theta
print(json.dumps({"version": __version__, "theta": theta, "answers": answers}))
"""


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> Path:
    """The Python of an environment with transformers 4.57, and everything else from this one."""
    folder = tmp_path_factory.mktemp("transformers4") / "venv"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
    python = folder / "bin/python"
    subprocess.run([uv, "pip", "install", "-q", "--python", python, "transformers==4.57.*"], check=True)
    here = next(Path(place) for place in sys.path if (Path(place) / "torch").is_dir())
    (next(folder.glob("lib/python3*/site-packages")) / "rest.pth").write_text(f"{here}\n", encoding="utf-8")
    return python


@pytest.mark.slow
def test_transformers_4_reads_the_export_and_answers_the_same(release, transformers_4):
    run = subprocess.run(
        [transformers_4, "-c", READER, json.dumps(QUESTIONS)], cwd=release, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["version"].startswith("4.57.") and said["theta"] == THETA
    assert said["answers"] == json.loads((release / "answers.json").read_text(encoding="utf-8"))
    assert len(set(said["answers"])) == len(QUESTIONS)


def test_adapters_one_above_the_other_are_all_merged(release, tmp_path, monkeypatch):
    """As for preference training: the first adapter is the fine-tuning, the second was trained above it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    below = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(release / "base"), release / "adapter")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    both = get_peft_model(below.merge_and_unload(), lora)
    both.save_pretrained(tmp_path / "above")
    for part in ("base", "adapter"):
        shutil.copytree(release / part, tmp_path / part)
    config = yaml.safe_load((release / "export.yaml").read_text(encoding="utf-8"))
    config["adapter_name_or_path"] = "adapter,above"
    (tmp_path / "export.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "export.yaml"]) == 0
    expected, once = both.merge_and_unload().state_dict(), load_file(release / "merged/model.safetensors")
    merged = load_file("merged/model.safetensors")
    assert all((tensor - expected[name]).abs().max() < 1e-5 for name, tensor in merged.items())
    assert max((tensor - once[name]).abs().max() for name, tensor in merged.items()) > 1e-2


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_what_holds_nan_is_not_exported(release, tmp_path, monkeypatch, capsys, place):
    from safetensors.torch import load_file, save_file

    for part in ("base", "adapter", "export.yaml"):
        (shutil.copytree if (release / part).is_dir() else shutil.copy)(release / part, tmp_path / part)
    weights = next((tmp_path / place).glob("*.safetensors"))
    tensors = load_file(weights)
    tensors[max(tensors)].flatten()[0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "export.yaml"]) == 1
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ({"rope_theta": 5e5, "torch_dtype": "bfloat16"}, {}),
        ({"torch_dtype": "bfloat16"}, {}),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_theta": 1e6, "torch_dtype": "bfloat16"},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}, "torch_dtype": "bfloat16"},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        ({"dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    ],
)
def test_older_readers_find_what_they_look_for(config, more):
    assert export.with_older_names(dict(config), "bfloat16") == config | more


# ---- prompts, over tokenizers that have the templates' own tokens ---------------------------------------------------
TOKENS = {  # begin, end, other special tokens, plain ones
    "qwen": (None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], []),
    "qwen3": (None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "mistral": ("<s>", "</s>", [], []),
}
GEMMAS_OWN = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
# the part of Qwen3's own that matters: a thought unless the request says otherwise
QWEN3S_OWN = QWENS_OWN.replace(
    "assistant\\n' }}",
    "assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)


def tokenizer_of(name: str):
    """A small tokenizer of the family's kind: over bytes; Mistral's puts a ▁ before each text, as its tokenizer.json says."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos, special, plain = TOKENS[name]
    bpe = Tokenizer(models.BPE(byte_fallback=name == "mistral"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if name == "mistral":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = [
            "▁",
            *map(chr, range(33, 127)),
            *exported_prompts.OTHER_SYSTEM,
            *SYSTEM,
            *str(exported_prompts.DIALOGUE),
        ]
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(
        ["孩子 发烧 怎么办", "▁▁先▁能▁[INST]"],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(plain)
    return tokenizer


def exported_folder(folder: Path, name: str, chat_template: str | None = None) -> Path:
    """A folder with the released tokenizer."""
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def chat_of(name: str) -> dict:
    """Return what the shipped experiment with the template says of its prompts."""
    experiment = {"qwen": "medasst", "qwen3": "medasst_qwen3_8b", "llama3": "llama3_8b"}.get(name, f"{name}_7b")
    config = yaml.safe_load((ROOT / f"factory_configs/{experiment}/export.yaml").read_text(encoding="utf-8"))
    assert config["template"] == name
    return {key: config[key] for key in export.PROMPT_KEYS if key in config}


MISSING, OTHER = "there is none", "another prompt than in training, with its own system prompt"


@pytest.mark.parametrize(
    ("name", "chat_template", "difference", "stop"),
    [
        ("qwen", None, MISSING, ["<|im_end|>"]),
        ("qwen", QWENS_OWN, OTHER, ["<|im_end|>"]),
        ("qwen3", None, MISSING, ["<|im_end|>"]),
        ("qwen3", QWEN3S_OWN, OTHER, ["<|im_end|>"]),
        ("llama3", None, MISSING, ["<|eot_id|>"]),  # and no <|eom_id|>, which only Llama 3.1 has
        ("gemma", None, MISSING, ["<end_of_turn>"]),
        ("gemma", GEMMAS_OWN, OTHER, ["<end_of_turn>"]),
        ("mistral", None, MISSING, ["</s>"]),
    ],
)
def test_prompts_are_corrected_to_the_trainings(
    tmp_path, llamafactory_templates, name, chat_template, difference, stop
):
    from transformers import AutoTokenizer

    folder = exported_folder(tmp_path, name, chat_template)
    released = AutoTokenizer.from_pretrained(folder)
    stops = released.convert_tokens_to_ids(stop)
    assert exported_prompts.correct_prompts(folder, chat_of(name)) == [
        f"chat_template.jinja: {difference}",
        f"generation_config.json: eos_token_id None -> {stops}",
    ]
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert text.endswith(exported_prompts.GREEDY) and f'SYSTEM """{SYSTEM}"""' in text
    assert re.findall('PARAMETER stop "(.*)"', text) == stop
    server = AutoTokenizer.from_pretrained(folder)
    assert len(server) == len(released)
    for system in (None, exported_prompts.OTHER_SYSTEM):
        messages = [{"role": "system", "content": system}] * bool(system) + exported_prompts.DIALOGUE
        ids = server.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == training_prompt(folder, name, system)
    assert exported_prompts.correct_prompts(folder, chat_of(name)) == []


def training_prompt(folder: Path, name: str, system: str | None) -> list[int]:
    """Return the token ids of DIALOGUE's prompt as LLaMA-Factory's own loader, template and encoder give them."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(**chat_of(name)))
    messages = [*exported_prompts.DIALOGUE, {"role": "assistant", "content": "答"}]
    return template.encode_oneturn(tokenizer, messages, system)[0]


@pytest.mark.parametrize("name", ["qwen", "mistral"])
def test_a_prompt_that_no_chat_template_gives_is_refused(tmp_path, llamafactory_templates, monkeypatch, name):
    """What is written is compared, not believed: a mark that gets lost on the way ends the export."""
    from llamafactory.data.template import TEMPLATES

    theirs = type(TEMPLATES[name])._get_jinja_template
    monkeypatch.setattr(
        type(TEMPLATES[name]),
        "_get_jinja_template",
        lambda *args: theirs(*args).replace("INST] ", "INST]").replace("user\n", "user "),
    )
    with pytest.raises(CheckFailed, match="no chat template gives the prompt of the training"):
        exported_prompts.correct_prompts(exported_folder(tmp_path, name), chat_of(name))


GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

type Input struct {
	Template, System string
	Messages         []*Message
}

func main() {
	var input Input
	if err := json.NewDecoder(os.Stdin).Decode(&input); err != nil {
		panic(err)
	}
	if err := template.Must(template.New("").Parse(input.Template)).Execute(os.Stdout, input); err != nil {
		panic(err)
	}
}
"""


@pytest.fixture(scope="module")
def go_template(tmp_path_factory):
    """Return a function that renders a template as Ollama does: with Go's own text/template."""
    if not (go := shutil.which("go")):
        pytest.skip("no Go; Debian's golang-go has it")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(GO_PROGRAM, encoding="utf-8")
    environment = {"PATH": str(Path(go).parent), "HOME": str(folder), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    subprocess.run([go, "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True)

    def render(**values) -> str:
        return subprocess.run(
            [folder / "render"], input=json.dumps(values), capture_output=True, text=True, check=True
        ).stdout

    return render


@pytest.mark.parametrize("name", TOKENS)
def test_go_renders_the_modelfile_to_the_trainings_prompt(tmp_path, llamafactory_templates, go_template, name):
    from transformers import AutoTokenizer

    folder = exported_folder(tmp_path, name)
    exported_prompts.correct_prompts(folder, chat_of(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = re.search('TEMPLATE """(.*?)"""', (folder / "Modelfile").read_text(encoding="utf-8"), re.DOTALL)[1]
    for system in (SYSTEM, exported_prompts.OTHER_SYSTEM):
        text = go_template(Template=written, System=system, Messages=exported_prompts.DIALOGUE)
        ids = [
            *([tokenizer.bos_token_id] if TOKENS[name][0] else []),
            *tokenizer.encode(text, add_special_tokens=False),
        ]
        assert ids == training_prompt(folder, name, system), text
