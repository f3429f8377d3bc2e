"""The tiny Qwen2: what it is trained on, that its tokenizer loses no byte, and that LLaMA-Factory loads it."""

import json

import pytest

from medasst_tools import cli
from medasst_tools.training.tiny_model import build_tiny_model, training_documents

DOCUMENTS = ["头痛两天怎么办？\n您好，建议休息，必要时就医。", "发烧要吃药吗？\n体温超过38.5℃可以用退热药。"] * 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(DOCUMENTS, folder, vocab_size=400, hidden_size=32)
    return folder


def test_documents_are_the_training_turns_in_order(tmp_path):
    records = [
        {"instruction": "问二", "input": "", "output": "答二", "history": [["问一", "答一"]]},
        {"instruction": "问三", "input": "补充", "output": "答三"},
    ]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "a_train.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a_test.jsonl").write_text(
        '{"instruction": "秘密", "input": "", "output": "秘密"}\n', encoding="utf-8"
    )
    assert list(training_documents(tmp_path)) == ["问一\n答一\n问二\n答二", "问三\n补充\n答三"]


@pytest.mark.parametrize("text", ["头痛怎么办", "𠮷野家😀", "a\tb\r\n\x00", "血压120/80mmHg", "　全角　"])
def test_no_byte_is_lost(tiny, text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_same_seed_same_weights(tiny, tmp_path):
    build_tiny_model(DOCUMENTS, tmp_path / "again", vocab_size=400, hidden_size=32)
    build_tiny_model(DOCUMENTS, tmp_path / "other", vocab_size=400, hidden_size=32, seed=1)
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (tiny, tmp_path / "again", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_llamafactory_loads_it_with_the_qwen_template(tiny):
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args({"model_name_or_path": str(tiny), "template": "qwen"})
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    messages = [{"role": "user", "content": "头痛"}, {"role": "assistant", "content": "休息"}]
    prompt, answer = template.encode_oneturn(tokenizer, messages, system="助手")
    chat = tokenizer.decode(prompt + answer)
    assert (
        chat
        == "<|im_start|>system\n助手<|im_end|>\n<|im_start|>user\n头痛<|im_end|>\n<|im_start|>assistant\n休息<|im_end|>\n"
    )
    assert prompt.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert load_model(tokenizer, model_args, finetuning_args).get_input_embeddings().num_embeddings >= len(tokenizer)


def test_what_is_there_stays_until_its_data_changes(tmp_path, capsys):
    data, model = tmp_path / "data", tmp_path / "model"
    data.mkdir()
    words = ["tiny-model", "--data-dir", str(data), "--out", str(model)]
    said = []
    for text in ("头痛两天", "头痛两天", "发烧三天"):
        record = {"instruction": text, "input": "", "output": "休息"}
        (data / "a_train.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        assert cli.main(words) == 0
        said.append(capsys.readouterr().out)
    assert "a random Qwen2" in said[0]
    assert said[1] == f"{model}/tiny_model.json: up to date\n"
    assert "made anew: file a_train " in said[2] and "a random Qwen2" in said[2]
    assert cli.main([*words, "--seed", "1"]) == 0
    assert "made anew: seed 42 -> 1" in capsys.readouterr().out


def test_no_training_set_is_one_line_and_status_2(tmp_path, capsys):
    assert cli.main(["tiny-model", "--data-dir", str(tmp_path), "--out", str(tmp_path / "model")]) == 2
    assert "run `medasst convert" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
