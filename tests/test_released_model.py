"""SmolLM2 out of its package: the tokens and answers are llama.cpp's, the prompt the release's own, and it trains like any base."""

import importlib.util
import json
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, sample_lines
from test_resume import finish, read, start

from medasst_tools import cli
from medasst_tools.files import sha256_of, write_text
from medasst_tools.training import released_model

missing = [name for name in (released_model.PACKAGE, "gguf", "xllamacpp") if importlib.util.find_spec(name) is None]
needs_it = pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}; `make setup EXTRAS=real` installs them")
DIALOGUE = [
    {"role": "system", "content": "请简短回答。"},
    {"role": "user", "content": "孩子发烧 38.5 度怎么办？"},
    {"role": "assistant", "content": "先量体温、多喝水；\n精神差请就医。"},
    {"role": "user", "content": "能吃 “退烧药” 吗？"},
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def gguf() -> Path:
    folders = importlib.util.find_spec(released_model.PACKAGE).submodule_search_locations
    return next(Path(folders[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer():
    return released_model.load_tokenizer(gguf())


class LlamaCpp:
    """llama.cpp's own server over a GGUF."""

    def __init__(self, path: Path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(path), 1024, 1, 1
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def unquantized(source: Path, path: Path) -> Path:
    """Write a GGUF's weights as float32: in 4 bits llama.cpp rounds the activations too, and says something else."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader, writer = GGUFReader(source), GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "smollm2"
    assert cli.main(["released-model", "--out", str(folder)]) == 0
    return folder


@needs_it
def test_the_tokens_are_llama_cpps(tokenizer):
    llama_cpp = LlamaCpp(gguf())
    assert len(sample_lines()) > 500
    for text in sample_lines():
        ids = tokenizer(text)["input_ids"]
        assert ids == llama_cpp.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"], text
        assert tokenizer.decode(ids) == text


@needs_it
def test_the_special_tokens_are_the_releases(tokenizer):
    assert len(tokenizer) == 49152
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 8192


@needs_it
def test_the_experiments_template_is_the_releases_own(tokenizer):
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    configs = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in ROOT.glob("factory_configs/smollm2*/*.yaml")
    ]
    assert len(configs) == 6 and {config["template"] for config in configs} == {"smollm2"}
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm2"))
    answer = [{"role": "assistant", "content": ""}]
    ours = template.encode_oneturn(tokenizer, DIALOGUE[1:] + answer, system=DIALOGUE[0]["content"])[0]
    theirs = tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_dict=False)
    assert ours == theirs


def test_without_the_package_it_says_what_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(released_model, "PACKAGE", "no_such_package")
    assert cli.main(["released-model", "--out", str(tmp_path / "model")]) == 2
    assert "`make setup EXTRAS=real`" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


# ---- the weights ----------------------------------------------------------------------------------------------------
@needs_it
@pytest.mark.slow
def test_the_weights_answer_as_llama_cpp_does(model, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama_cpp = LlamaCpp(unquantized(gguf(), tmp_path / "float32.gguf"))
    tokenizer, weights = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    assert weights.num_parameters() == 134_515_008
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = weights.generate(**prompt, max_new_tokens=20, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    said = llama_cpp.ask("/v1/chat/completions", messages=QUESTION, temperature=0, max_tokens=20)
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    assert answer == said["choices"][0]["message"]["content"] == "The capital of France is Paris."
    for text in ("The capital of France is", "孩子发烧怎么办？", "Hello, my name is"):
        ids = tokenizer(text)["input_ids"]
        expected = torch.log_softmax(weights(torch.tensor([ids])).logits[0, -1], -1)
        next_token = llama_cpp.ask("/completion", prompt=ids, temperature=0, n_predict=1, n_probs=10)
        for likely in next_token["completion_probabilities"][0]["top_logprobs"]:
            assert likely["logprob"] == pytest.approx(expected[likely["id"]].item(), abs=0.02), (text, likely)
    capsys.readouterr()
    assert cli.main(["released-model", "--out", str(model)]) == 0
    assert capsys.readouterr().out == f"{model}/released_model.json: up to date\n"


@needs_it
@pytest.mark.slow
def test_a_killed_training_ends_as_if_nobody_had_killed_it_and_is_exported(model, forkserver, tiny_run, monkeypatch):
    settings = [f"model_name_or_path={model}", "template=smollm2", "max_steps=6", "save_steps=2"]
    finish(forkserver, tiny_run, "smollm2_whole", *settings)
    saves = tiny_run.parent / "saves/smollm2_killed"
    process, log = start(forkserver, tiny_run, "smollm2_killed", *settings)
    while process.is_alive() and not list(saves.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (saves / "run.json").exists(), log.read_text()[-2000:]
    assert "going on from step" in finish(forkserver, tiny_run, "smollm2_killed", *settings)
    whole, killed = (
        sha256_of(folder / "adapter_model.safetensors") for folder in (saves, saves.with_name("smollm2_whole"))
    )
    assert whole == killed and read(saves, "run.json")["resumed_from"]

    export = yaml.safe_load((ROOT / "factory_configs/smollm2/export.yaml").read_text(encoding="utf-8"))
    trained = yaml.safe_load(tiny_run.read_text(encoding="utf-8"))
    merged = saves.with_name("smollm2_merged")
    paths = {"model_name_or_path": str(model), "adapter_name_or_path": str(saves), "export_dir": str(merged)}
    export |= paths | {"default_system": trained["default_system"]}
    config = tiny_run.with_name("export.yaml")
    write_text(config, yaml.safe_dump(export, allow_unicode=True))
    assert cli.main(["export", str(config)]) == 0
    assert logits(merged) == pytest.approx(logits(model, adapter=saves), abs=1e-3)


QUESTIONS = [
    *(
        "What is the capital of France?",
        "How many legs has a spider?",
        "What should I drink with a fever?",
        "Name three fruits.",
    ),
    *("What does aspirin do?", "Is a cold dangerous?", "孩子发烧怎么办？", "头痛两天了。", "感冒要吃药吗？", "你好！"),
]
NEAR = 0.05  # nats between the two words where answers part: llama.cpp adds up in another order


@needs_it
@pytest.mark.slow
def test_predictions_through_llama_cpps_server_are_the_local_ones(model, tmp_path):
    """The same but for near ties, which are counted: where two answers part, the model must hold both words for as likely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = [{"instruction": question, "input": "", "output": "x"} for question in QUESTIONS]
    write_text(tmp_path / "asked.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    write_text(tmp_path / "dataset_info.json", json.dumps({"asked": {"file_name": "asked.jsonl", "columns": columns}}))
    config = yaml.safe_load((ROOT / "factory_configs/smollm2_base/predict.yaml").read_text(encoding="utf-8"))
    config |= {
        "model_name_or_path": str(model),
        "dataset_dir": str(tmp_path),
        "eval_dataset": "asked",
        "max_new_tokens": 32,
    }
    llama_cpp = LlamaCpp(unquantized(gguf(), tmp_path / "float32.gguf"))
    said = {}
    for way, words in {
        "local": [],
        "api": ["--api-base", f"{llama_cpp.server.listening_address}/v1", "--concurrency", "1"],
    }.items():
        path = tmp_path / way / "predict.yaml"
        path.parent.mkdir()
        write_text(path, yaml.safe_dump(config | {"output_dir": str(tmp_path / way / "out")}, allow_unicode=True))
        assert cli.main(["predict", str(path), *words]) == 0
        lines = (tmp_path / way / "out/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        # cut in the middle of a character: the server leaves its bytes out, here they are a \ufffd
        said[way] = [json.loads(line)["predict"].strip().rstrip("\ufffd") for line in lines]
    tokenizer, weights = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    system, ties = [{"role": "system", "content": config["default_system"]}], 0
    for question, ours, theirs in zip(QUESTIONS, said["local"], said["api"], strict=True):
        if ours == theirs:
            continue
        prompt = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        a, b = (tokenizer(text)["input_ids"] for text in (ours, theirs))
        at = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        expected = torch.log_softmax(weights(torch.tensor([prompt + a[:at]])).logits[0, -1], -1).topk(2).values
        assert expected[0] - expected[1] < NEAR, (question, ours, theirs)
        ties += 1
    print(f"{len(QUESTIONS)} answers, {ties} part at a near tie")
    assert ties <= 2


def logits(folder: Path, adapter: Path | None = None):
    """Return what a model expects next after DIALOGUE, one number a word of the vocabulary."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        weights = PeftModel.from_pretrained(weights, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(DIALOGUE, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return weights(**prompt).logits[0, -1].detach().numpy()
