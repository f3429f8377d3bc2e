"""medasst export: the same answers as base and adapter, a card that says what the files say, prompts as in training."""

import contextlib
import json
import os
import subprocess

import pytest
import yaml
from conftest import ROOT, make_environment, run_make

from medasst_tools import cli
from medasst_tools.errors import CheckFailed
from medasst_tools.serving import export, exported_prompts

EXPORT_CONFIG = "factory_configs/demo/export.yaml"
SYSTEM = yaml.safe_load((ROOT / EXPORT_CONFIG).read_text(encoding="utf-8"))["default_system"]


@pytest.fixture(scope="module")
def exported(project, evaluated):
    """What `make export` would run in the project, run in this process; its folder."""
    steps = [line.split() for line in run_make(project, "-n", "export").stdout.splitlines()]
    assert [".venv/bin/medasst", "export", EXPORT_CONFIG] in steps
    with contextlib.chdir(project):
        assert cli.main(["export", EXPORT_CONFIG]) == 0
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
def test_transformers_alone_makes_the_same_prompt(project, exported):
    """What vLLM does: the folder's own chat template, no LLaMA-Factory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "头疼"}], tokenize=False)
    assert text == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n头疼<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.end_to_end
def test_the_card_says_what_the_files_say(project, exported):
    card = (exported / "README.md").read_text(encoding="utf-8")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert "这不是医生" in body and body.index("这不是医生") < body.index("This is no doctor")
    manifest = json.loads((project / "data/demo/manifest.json").read_text(encoding="utf-8"))["datasets"]
    for row in export.load_datasets().values():
        if not row.name.endswith("_test"):
            counts = manifest[row.name]
            line = next(line for line in body.splitlines() if line.startswith(f"| {row.name} |"))
            assert row.corpus.licence in line and f"| {counts['read']} | {counts['kept']} |" in line
    for name in ("scores", "exam"):
        result = json.loads((project / f"results/demo/{name}.json").read_text(encoding="utf-8"))
        assert f"`{result['signature']}`" in body
        assert f"{result['bleu-4' if name == 'scores' else 'cmmlu']:.2f} [" in body
    run = json.loads((project / "saves/demo/run.json").read_text(encoding="utf-8"))
    for key in ("learning_rate", "lora_rank", "seed", "max_steps"):
        assert f"| {key} | {run['inputs']['config'][key]} |" in body
    for sha in run["inputs"]["data"].values():
        assert sha in body
    assert SYSTEM in body and "saves/demo_base" in body


@pytest.mark.end_to_end
def test_a_second_export_does_nothing(project, exported):
    assert "Nothing to be done for 'export'" in run_make(project, "export").stdout


@pytest.mark.end_to_end
def test_new_scores_renew_the_card_and_merge_nothing(project, exported, monkeypatch, capsys):
    monkeypatch.chdir(project)
    weights, scores = exported / "model.safetensors", project / "results/demo/scores.json"
    before, text = weights.stat().st_mtime_ns, scores.read_text(encoding="utf-8")
    times = scores.stat()
    try:
        scores.write_text(json.dumps(json.loads(text) | {"signature": "another signature"}), encoding="utf-8")
        assert "medasst export" in run_make(project, "-n", "export").stdout
        assert cli.main(["export", EXPORT_CONFIG]) == 0
    finally:
        scores.write_text(text, encoding="utf-8")
        os.utime(scores, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "`another signature`" in (exported / "README.md").read_text(encoding="utf-8")
    assert weights.stat().st_mtime_ns == before and "nothing to merge" in capsys.readouterr().out


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
            "no factory_configs/demo_base/export.yaml; `medasst render` writes",
        ),
        ([EXPORT_CONFIG, "export_dir=saves/demo"], "export_dir is saves/demo, which holds what is to be merged"),
        ([EXPORT_CONFIG, "export_dir=saves"], "export_dir is saves, which holds what is to be merged"),
        ([EXPORT_CONFIG, "export_dir=data"], "data holds something that `medasst export` didn't write"),
        ([EXPORT_CONFIG, "adapter_name_or_path=saves/none"], "`make train EXPERIMENT=none` makes it"),
        ([EXPORT_CONFIG, "export_size"], "override 'export_size' must be key=value"),
        (["factory_configs/demo/chat.yaml"], "says no export_dir; is it an export.yaml?"),
    ],
)
def test_mistakes_are_named(project, evaluated, monkeypatch, capsys, words, message):
    monkeypatch.chdir(project)
    assert cli.main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.end_to_end
def test_make_names_an_experiment_without_an_adapter(project, evaluated):
    run = subprocess.run(
        ["make", "export", "EXPERIMENT=demo_base"], cwd=project, env=make_environment(project),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "no factory_configs/demo_base/export.yaml" in run.stderr


# ---- prompts, over tokenizers that have the templates' own tokens ----

TOKENS = {
    "qwen": (None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "qwen3_nothink": (None, "<|im_end|>", ["<|im_start|>"]),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"]),
}
# what Qwen2's own tokenizer brings: another system prompt than ours
QWENS_OWN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMAS_OWN = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture
def llamafactory_templates(monkeypatch):
    """LLaMA-Factory's templates are global and remember the system prompt that was set last."""
    import copy

    from llamafactory.data import template

    monkeypatch.setattr(template, "TEMPLATES", copy.deepcopy(template.TEMPLATES))


def exported_folder(folder, name, chat_template=None, system=SYSTEM):
    """A folder as LLaMA-Factory's export leaves it, as far as prompts go: a byte-level tokenizer and its Modelfile."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bos, eos, extra = TOKENS[name]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["孩子发烧怎么办"], vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.chat_template = chat_template
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=name, default_system=system))
    tokenizer.save_pretrained(folder)
    (folder / "Modelfile").write_text(template.get_ollama_modelfile(tokenizer), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "chat_template", "corrected"),
    [
        ("qwen", None, []),
        ("qwen3_nothink", None, []),
        ("qwen", QWENS_OWN, ["chat_template.jinja: another prompt than in training, with its own system prompt"]),
        ("llama3", None, ["Modelfile: <|begin_of_text|> in the template, which Ollama adds itself"]),
        ("gemma", None, ["Modelfile: <bos> in the template, which Ollama adds itself"]),
        ("gemma", GEMMAS_OWN, ["chat_template.jinja", "Modelfile"]),
        ("mistral", None, ["Modelfile: <s> in the template, which Ollama adds itself"]),
    ],
)
def test_prompts_are_corrected_to_the_trainings(tmp_path, llamafactory_templates, name, chat_template, corrected):
    exported_folder(tmp_path, name, chat_template)
    chat = {"template": name, "default_system": SYSTEM}
    corrections = exported_prompts.correct_prompts(tmp_path, chat)
    assert len(corrections) == len(corrected)
    for line, start in zip(corrections, corrected, strict=True):
        assert line.startswith(start)
    text = (tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.endswith(exported_prompts.GREEDY) and text.count("SYSTEM") == 1
    assert exported_prompts.parse_modelfile(text)["SYSTEM"] == SYSTEM
    assert exported_prompts.correct_prompts(tmp_path, chat) == []


def test_the_system_prompt_goes_where_the_template_has_it(tmp_path, llamafactory_templates):
    """gemma has no turn for it: it begins the first question, which LLaMA-Factory's Modelfile puts outside of it."""
    exported_folder(tmp_path, "gemma")
    before = exported_prompts.parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))["TEMPLATE"]
    assert exported_prompts.render_ollama(before, "S", [{"role": "user", "content": "Q"}]).startswith(
        "<bos>S\n\n<start"
    )
    exported_prompts.correct_prompts(tmp_path, {"template": "gemma", "default_system": SYSTEM})
    after = exported_prompts.parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))["TEMPLATE"]
    dialogue = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("user", "R"))]
    assert exported_prompts.render_ollama(after, "S", dialogue) == (
        "<start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("不是医生", "是医生", "SYSTEM is "),
        ('PARAMETER stop "<|im_end|>"', "", "the stop words are []"),
        ("<|im_start|>user\n", "<|im_start|>user ", "another prompt than in training"),
        ("{{ .System }}<|im_end|>", "<|im_end|>", "another prompt than in training"),
    ],
)
def test_a_wrong_modelfile_is_seen(tmp_path, llamafactory_templates, old, new, message):
    exported_folder(tmp_path, "qwen")
    path = tmp_path / "Modelfile"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    corrections = exported_prompts.correct_prompts(tmp_path, {"template": "qwen", "default_system": SYSTEM})
    assert len(corrections) == 1 and message in corrections[0]
    assert exported_prompts.parse_modelfile(path.read_text(encoding="utf-8")) == exported_prompts.parse_modelfile(text)


def test_an_unknown_form_is_not_guessed_at():
    with pytest.raises(CheckFailed, match="isn't known here: len .Messages"):
        exported_prompts.render_ollama("{{ len .Messages }}", "S", [])
