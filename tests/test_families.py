"""Every family of models, really trained, asked, examined and exported: a tiny random one with the family's own rendered configs.

Each learns one answer to everything, so that what it says shows whether the prompt of training, prediction, chat and exam
is the same one, and whether an answer ends where it should.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT, SAMPLES
from families import FAMILIES, Family, build

from medasst_tools.data.exam_questions import load_protocol, load_subjects
from medasst_tools.evaluation import exam

ANSWER = "B，多休息。"
QUESTIONS = [f"第{number}个问题：头痛怎么办？" for number in range(40)]
SYSTEM = yaml.safe_load((ROOT / "factory_configs/medasst/chat.yaml").read_text(encoding="utf-8"))["default_system"]
# what a tiny model on a CPU can't have as the experiment has it; everything else is the rendered config's
TINY = {"preprocessing_num_workers": 1}
TINY_TRAIN = TINY | {
    "dataset": "medchatzh_train",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 30,
    "warmup_steps": 2,
    "learning_rate": 2e-2,
    "dataloader_num_workers": 0,
    "plot_loss": False,
}
TINY_PREDICT = TINY | {
    "eval_dataset": "medchatzh_test",
    "use_cpu": True,
    "bf16_full_eval": False,
    "cutoff_len": 3000,
    "max_new_tokens": 24,
}


class Ran(NamedTuple):
    """A family that was trained; its configs are the rendered ones with the tiny model's paths."""

    family: Family
    folder: Path
    configs: dict[str, dict]


def config_of(experiment: str, kind: str) -> dict:
    return yaml.safe_load((ROOT / f"factory_configs/{experiment}/{kind}.yaml").read_text(encoding="utf-8"))


def write_dataset(folder: Path, name: str, records: list[dict]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    if "history" in records[0]:
        columns["history"] = "history"
    info = folder / "dataset_info.json"
    known = json.loads(info.read_text(encoding="utf-8")) if info.exists() else {}
    known[name] = {"file_name": f"{name}.jsonl", "columns": columns}
    info.write_text(json.dumps(known), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    records = [{"instruction": question, "input": "", "output": ANSWER} for question in QUESTIONS]
    write_dataset(folder, "medchatzh_train", records)
    write_dataset(folder, "medchatzh_test", records[:4])
    turns = [{"instruction": "还疼吗？", "input": "", "output": "不疼。", "history": [["头痛", "休息。"]]}]
    write_dataset(folder, "cmtmedqa_train", turns)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def ran(request, data, tmp_path_factory) -> Ran:
    """Train, predict and export, each through the function that llamafactory-cli calls."""
    from llamafactory.train.tuner import export_model, run_exp

    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    build(family, folder / "base")
    paths = {"model_name_or_path": str(folder / "base")}
    adapter = paths | {"adapter_name_or_path": str(folder / "adapter")}
    experiment = family.experiment
    configs = {
        "train": config_of(experiment, "train")
        | paths
        | TINY_TRAIN
        | {"dataset_dir": str(data), "output_dir": str(folder / "adapter")},
        "predict": config_of(experiment, "predict")
        | adapter
        | TINY_PREDICT
        | {"dataset_dir": str(data), "output_dir": str(folder / "predicted")},
        "chat": config_of(experiment, "chat") | adapter | {"max_new_tokens": 24},
        "export": config_of(experiment, "export") | adapter | {"export_dir": str(folder / "merged")},
    }
    for kind, run in (("train", run_exp), ("predict", run_exp), ("export", export_model)):
        run(dict(configs[kind]))
    return Ran(family, folder, configs)


def template_of(config: dict):
    """Return (tokenizer, template) as training and chat load them."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, _, _ = get_infer_args(config)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    return tokenizer, get_template_and_fix_tokenizer(tokenizer, data_args)


def tokens_of(config: dict):
    """Return (tokenizer, training set in tokens), as LLaMA-Factory makes them for this train.yaml."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(
        config | {"output_dir": config["output_dir"] + "-unused"}
    )
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage=finetuning_args.stage, **module)
    return module["tokenizer"], rows["train_dataset"]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_only_the_answer_and_its_end_are_learnt(ran):
    tokenizer, rows = tokens_of(ran.configs["train"])
    assert len(rows) == len(QUESTIONS)
    row = rows[0]
    learnt = [token for token in row["labels"] if token != -100]
    start = len(row["labels"]) - len(learnt)
    assert row["labels"][start:] == learnt  # one piece, at the end
    assert decode(tokenizer, learnt) == ran.family.space + ANSWER + ran.family.end
    assert decode(tokenizer, row["input_ids"][:start]) == ran.family.prompt.format(system=SYSTEM, user=QUESTIONS[0])


def test_every_turn_of_a_dialogue_is_learnt(ran):
    tokenizer, rows = tokens_of(ran.configs["train"] | {"dataset": "cmtmedqa_train"})
    labels = rows[0]["labels"]
    pieces, piece = [], []
    for token in [*labels, -100]:
        if token == -100 and piece:
            pieces.append(decode(tokenizer, piece))
            piece = []
        elif token != -100:
            piece.append(token)
    assert pieces == [f"{ran.family.space}{answer}{ran.family.end}" for answer in ("休息。", "不疼。")]
    first = ran.family.prompt.format(system=SYSTEM, user="头痛")
    assert decode(tokenizer, rows[0]["input_ids"]).startswith(first)
    assert decode(tokenizer, rows[0]["input_ids"]).count(SYSTEM) == 1


def test_predictions_say_what_was_learnt_and_stop(ran):
    lines = (ran.folder / "predicted/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "prompt": ran.family.prompt.format(system=SYSTEM, user=question),
            "predict": ran.family.space + ANSWER,
            "label": ran.family.space + ANSWER + ("\n" if ran.family.end.endswith("\n") else ""),
        }
        for question in QUESTIONS[:4]
    ]


def test_chat_says_the_same_and_stops(ran):
    from llamafactory.chat import ChatModel

    chat = ChatModel(dict(ran.configs["chat"]))
    response = chat.chat([{"role": "user", "content": QUESTIONS[1]}])[0]
    assert (response.response_text, response.finish_reason) == (ran.family.space + ANSWER, "stop")
    tokenizer, template = template_of(ran.configs["chat"])
    assert set(tokenizer.convert_ids_to_tokens(template.get_stop_token_ids(tokenizer))) == ran.family.stop


def test_an_exam_reads_the_letters_where_the_answer_has_them(ran):
    model, tokenizer, template = exam.load_model(ran.configs["chat"])
    opening, letter_ids = exam.letters_of(tokenizer, template)
    assert tuple(tokenizer.convert_ids_to_tokens(opening)) == ran.family.before_letter
    messages = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": "B"}]
    prompt, answer = template.encode_oneturn(tokenizer, messages)
    assert decode(tokenizer, prompt) == ran.family.prompt.format(system=SYSTEM, user=QUESTIONS[0])
    assert answer[: len(opening) + 1] == [*opening, letter_ids[1]]  # what training teaches

    protocol = load_protocol()
    subject = load_subjects(SAMPLES / "exams", protocol)[0]
    encode = exam.encoder(tokenizer, template, opening)
    prompts = [
        exam.make_prompt(q, subject, 0, protocol["prompts"]["llamafactory-zh"], encode, 4096)
        for q in subject.questions[:3]
    ]
    ending = ran.family.prompt.split("{user}")[1]
    assert all(decode(tokenizer, p.ids[: len(p.ids) - len(opening)]).endswith(ending) for p in prompts)
    answers = exam.answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id)
    rows = [row for _, batch in answers for row in batch]
    assert len(rows) == 3 and all(row[1] > 0.9 for row in rows)  # "B", as it learnt


def test_the_exported_model_is_the_tuned_one_with_its_template(ran):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, tokenizer = (kind.from_pretrained(ran.folder / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tuned, _, template = exam.load_model(ran.configs["chat"])
    messages = [{"role": "user", "content": QUESTIONS[2]}, {"role": "assistant", "content": ANSWER}]
    ids = torch.tensor([sum(template.encode_oneturn(tokenizer, messages), [])])
    with torch.inference_mode():
        assert torch.allclose(merged(ids).logits.float(), tuned(ids).logits.float(), atol=1e-3)
    written = tokenizer.apply_chat_template(messages[:1], tokenize=False)
    # LLaMA-Factory's jinja template has no thought: Qwen3's own one, asked with enable_thinking=false, does
    expected = ran.family.prompt.replace("<think>\n\n</think>\n\n", "").replace("<s> [INST]", "<s>[INST]")
    assert written == expected.format(system=SYSTEM, user=QUESTIONS[2])


def test_llama_3_gets_a_stop_token_that_has_no_embedding(data, tmp_path):
    """LLaMA-Factory's template adds Llama 3.1's <|eom_id|> to Llama 3's tokenizer: harmless as long as nothing says it."""
    family = FAMILIES["llama"]
    build(family, tmp_path / "base")
    config = config_of(family.experiment, "chat") | {"model_name_or_path": str(tmp_path / "base")}
    config.pop("adapter_name_or_path")
    model, tokenizer, _ = exam.load_model(config)
    rows = model.get_input_embeddings().num_embeddings
    assert [token for token, number in tokenizer.get_vocab().items() if number >= rows] == ["<|eom_id|>"]


def test_thinking_is_off_everywhere_or_nowhere():
    """With LLaMA-Factory's default a Qwen3 learns to write an empty thought, which would stand in every prediction."""
    for path in (ROOT / "factory_configs").glob("*/*.yaml"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert config.get("enable_thinking") is (False if config["template"] == "qwen3" else None), path


# ---- medasst_fast: packed, and no record sees another ------------------------------------------------------------------


def losses_by_record(config: dict) -> dict[tuple, float]:
    """Return {token ids of a record: mean loss of its answer} over the training set of a train.yaml, batched as it is trained."""
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    config = config | {"output_dir": config["output_dir"] + "-unused"}
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    model = load_model(module["tokenizer"], model_args, finetuning_args).eval()
    _, rows = tokens_of(config)
    collator = SFTDataCollatorWith4DAttentionMask(
        template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=-100,
        block_diag_attn=model_args.block_diag_attn, neat_packing=data_args.neat_packing,
        attn_implementation=model.config._attn_implementation, compute_dtype=torch.float32, **module,
    )  # fmt: skip
    found = {}
    for row in rows:
        marks = row["attention_mask"]  # 1, 2... by record with neat_packing
        if config.get("packing") and not data_args.neat_packing:  # no marks: a record starts where positions do
            marks, record = [], 0
            for position in row["position_ids"]:
                record += position == 0
                marks.append(record)
        batch = collator([dict(row)])
        with torch.inference_mode():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0].float()
        labels = batch["labels"][0, : len(marks)]
        losses = torch.nn.functional.cross_entropy(logits[: len(marks) - 1], labels[1:], reduction="none")
        for record in sorted(set(marks) - {0}):
            places = [place for place, mark in enumerate(marks) if mark == record]
            learnt = [place for place in places[1:] if labels[place] != -100]
            if learnt:
                ids = tuple(row["input_ids"][place] for place in places)
                found[ids] = losses[[place - 1 for place in learnt]].mean().item()
    return found


@pytest.fixture(scope="module")
def fast(data, tmp_path_factory) -> dict:
    """medasst_fast's train.yaml on a tiny Qwen2; liger's kernels are for GPUs."""
    folder = tmp_path_factory.mktemp("fast")
    build(FAMILIES["qwen2"], folder / "base")
    records = [
        {"instruction": question, "input": "", "output": f"{ANSWER}{question[:number]}"}
        for number, question in enumerate(QUESTIONS[:8])
    ]
    write_dataset(folder, "varied", records)
    config = config_of("medasst_fast", "train") | TINY_TRAIN
    config |= {"model_name_or_path": str(folder / "base"), "dataset_dir": str(folder), "dataset": "varied"}
    config |= {"output_dir": str(folder / "adapter"), "max_steps": 3, "save_steps": 3}
    del config["enable_liger_kernel"]
    return config


def test_a_packed_record_sees_no_other(fast):
    unpacked = losses_by_record(fast | {"packing": False, "neat_packing": False})
    packed = losses_by_record(fast)
    assert len(unpacked) == 8 and packed.keys() == unpacked.keys()
    assert packed == pytest.approx(unpacked, abs=1e-5)
    mixed = losses_by_record(fast | {"neat_packing": False})  # plain packing does mix, or this test would show nothing
    assert max(abs(mixed[ids] - unpacked[ids]) for ids in unpacked if ids in mixed) > 1e-3


def test_medasst_fast_trains(fast):
    from llamafactory.train.tuner import run_exp

    run_exp(dict(fast))
    log = (Path(fast["output_dir"]) / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(log[-1])["current_steps"] == 3
    assert (Path(fast["output_dir"]) / "adapter_model.safetensors").is_file()


# ---- medasst_qlora: the base in 4 bits -----------------------------------------------------------------------------------


def test_medasst_qlora_learns_answers_and_merges(data, tmp_path):
    """In 4 bits all the way, and merged into the base as it was; bitsandbytes has kernels for CPUs too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: make setup EXTRAS=qlora")
    from llamafactory.train.tuner import export_model, run_exp

    build(FAMILIES["qwen2"], tmp_path / "base")
    base = {"model_name_or_path": str(tmp_path / "base")}
    adapter = base | {"adapter_name_or_path": str(tmp_path / "adapter")}
    training = {"dataset_dir": str(data), "output_dir": str(tmp_path / "adapter"), "max_steps": 40}
    run_exp(config_of("medasst_qlora", "train") | base | TINY_TRAIN | training)
    predicting = {"dataset_dir": str(data), "output_dir": str(tmp_path / "predicted")}
    run_exp(config_of("medasst_qlora", "predict") | adapter | TINY_PREDICT | predicting)
    lines = (tmp_path / "predicted/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["predict"] for line in lines] == [ANSWER] * 4
    model, *_ = exam.load_model(config_of("medasst_qlora", "chat") | adapter)
    assert model.is_loaded_in_4bit
    export_model(config_of("medasst_qlora", "export") | adapter | {"export_dir": str(tmp_path / "merged")})
    assert (tmp_path / "merged/model.safetensors").is_file()
