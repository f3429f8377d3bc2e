"""medasst exam: LLaMA-Factory's own answers, whatever the batch, a killed run that goes on, and the statistics."""

import json

import pytest
import yaml
from conftest import SAMPLES

from medasst_tools import cli
from medasst_tools.data.exam_questions import LETTERS, load_protocol, load_subjects, messages
from medasst_tools.errors import UserError
from medasst_tools.evaluation import exam
from medasst_tools.training.tiny_model import build_tiny_model

PROTOCOL = load_protocol()
SUBJECTS = load_subjects(SAMPLES / "exams", PROTOCOL)


@pytest.fixture(scope="module")
def chat_config(tmp_path_factory):
    """A chat.yaml over a tiny random model whose tokenizer knows the questions."""
    folder = tmp_path_factory.mktemp("exam")
    texts = [
        question.text + "".join(question.choices)
        for subject in SUBJECTS
        for question in [*subject.questions, *subject.examples]
    ]
    build_tiny_model(texts * 5, folder / "model", vocab_size=1000, hidden_size=64)
    config = {"model_name_or_path": str(folder / "model"), "template": "qwen", "default_system": "你是医疗助手。"}
    (folder / "chat.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder / "chat.yaml"


@pytest.fixture(scope="module")
def loaded(chat_config):
    return exam.load_model(yaml.safe_load(chat_config.read_text(encoding="utf-8")))


def prompts_of(subject, loaded, shots):
    model, tokenizer, template = loaded
    encode = lambda turns: template.encode_oneturn(tokenizer, turns)[0]  # noqa: E731
    return [
        exam.make_prompt(question, subject, shots, PROTOCOL["prompt"], encode, 4096) for question in subject.questions
    ]


@pytest.mark.parametrize("shots", [0, 5])
def test_same_answers_as_llamafactorys_evaluator(loaded, shots):
    """Its batch_inference, on the same prompts, padded as it pads them."""
    from llamafactory.eval.evaluator import Evaluator

    model, tokenizer, template = loaded
    evaluator = Evaluator.__new__(Evaluator)  # its loading is what `load_model` does; its constructor would load again
    evaluator.model, evaluator.tokenizer = model, tokenizer
    evaluator.choice_inputs = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    tokenizer.padding_side = "right"
    for subject in SUBJECTS:
        prompts = prompts_of(subject, loaded, shots)
        theirs = [
            evaluator.batch_inference(
                tokenizer.pad({"input_ids": [prompt.ids]}, return_attention_mask=True, return_tensors="pt")
            )[0]
            for prompt in prompts
        ]
        ours = {}
        for batch, probabilities in exam.answer_prompts(
            model, prompts, evaluator.choice_inputs, tokenizer.pad_token_id
        ):
            ours |= {
                p.question.id: exam._row(p, probs)["predicted"] for p, probs in zip(batch, probabilities, strict=True)
            }
        assert [ours[prompt.question.id] for prompt in prompts] == theirs


def test_batches_and_shared_prefixes_change_no_probability(loaded, monkeypatch):
    import torch

    model, tokenizer, _ = loaded
    letter_ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    prompts = prompts_of(SUBJECTS[0], loaded, 5)

    def answer():
        batches = exam.answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id)
        return {p.question.id: probs for batch, values in batches for p, probs in zip(batch, values, strict=True)}

    together = answer()
    monkeypatch.setattr(exam, "BATCH_TOKENS", 1)
    monkeypatch.setattr(exam, "_common_prefix", lambda sequences: [])
    alone = answer()
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1, letter_ids].float()
        plain = torch.softmax(logits, dim=-1).tolist()
        assert together[prompt.question.id] == pytest.approx(plain, abs=1e-5)
        assert alone[prompt.question.id] == pytest.approx(plain, abs=1e-5)


def test_examples_go_before_the_question_does(loaded):
    model, tokenizer, template = loaded
    subject = SUBJECTS[0]
    encode = lambda turns: template.encode_oneturn(tokenizer, turns)[0]  # noqa: E731
    lengths = [
        len(encode(messages(subject.questions[0], subject.examples[:shots], subject.chinese_name, PROTOCOL["prompt"])))
        for shots in range(6)
    ]
    prompt = exam.make_prompt(subject.questions[0], subject, 5, PROTOCOL["prompt"], encode, lengths[3])
    assert (len(prompt.ids), prompt.dropped) == (lengths[3], 2)
    with pytest.raises(UserError, match="don't fit the model's"):
        exam.make_prompt(subject.questions[0], subject, 5, PROTOCOL["prompt"], encode, lengths[0] - 1)


def run_exam(chat_config, out, *words) -> int:
    return cli.main(["exam", str(chat_config), "--exams-dir", str(SAMPLES / "exams"), "--out", str(out), *words])


def test_a_killed_exam_goes_on(chat_config, tmp_path, monkeypatch, capsys):
    assert run_exam(chat_config, tmp_path / "whole") == 0
    real = exam._probabilities
    calls = []

    def killed_on_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(exam, "_probabilities", killed_on_the_fifth)
    assert run_exam(chat_config, tmp_path / "resumed") == 130
    assert not (tmp_path / "resumed/exam.json").exists()
    with (tmp_path / "resumed" / exam.PARTIAL).open("ab") as partial:
        partial.write(b'{"benchmark": "cmm')  # cut in the middle of a line
    assert run_exam(chat_config, tmp_path / "resumed") == 0
    assert "going on after" in capsys.readouterr().out
    assert len(calls) == 5 + 9 - 4  # nothing answered twice: nine subjects, one batch each
    for file in ("exam.jsonl", "exam.json"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not (tmp_path / "resumed" / exam.PARTIAL).exists()


def test_what_is_written(chat_config, tmp_path):
    assert run_exam(chat_config, tmp_path, "--shots", "5", "--limit", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "exam.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    assert len(rows) == report["n"] == 18 and report["as_released"] is False and report["shots"] == 5
    for row in rows:
        assert set(row) == {"benchmark", "subject", "id", "answer", "predicted", "probs"}
        assert sum(row["probs"].values()) == pytest.approx(1) and row["probs"][row["predicted"]] == max(
            row["probs"].values()
        )
    for name in ("cmmlu", "ceval"):
        of_benchmark = [row for row in rows if row["benchmark"] == name]
        assert report[name] == pytest.approx(
            100 * sum(row["predicted"] == row["answer"] for row in of_benchmark) / len(of_benchmark)
        )
    assert report["average"] == pytest.approx((report["cmmlu"] + report["ceval"]) / 2)
    assert "shots:5" in report["signature"] and "limit:2" in report["signature"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "`medasst render` writes the configs"),
        ("a: [", "is not YAML"),
        ("template: qwen", "says no model_name_or_path"),
        ("model_name_or_path: x\ntemplate: qwen\nstage: sft\n", "give the experiment's chat.yaml"),
        ("model_name_or_path: saves/none\ntemplate: qwen\n", "`make train EXPERIMENT=none` makes it"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "chat.yaml"
    if text:
        path.write_text(text, encoding="utf-8")
    assert run_exam(path, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (5, 10), (10, 10), (82, 90), (1170, 1325)])
def test_wilson_intervals_are_scipys(correct, n):
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(method="wilson")
    assert exam.wilson(correct, n) == pytest.approx([100 * interval.low, 100 * interval.high], abs=1e-4)


def row(predicted, answer, confidence):
    rest = (1 - confidence) / 3
    return {
        "predicted": predicted,
        "answer": answer,
        "probs": {letter: confidence if letter == predicted else rest for letter in LETTERS},
    }


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([row("A", "A", 1.0)], 0),
        ([row("A", "B", 1.0)], 100),
        ([row("A", "A", 0.75), row("B", "A", 0.75)], 25),
        ([row("A", "A", 0.95), row("B", "A", 0.45)], (5 + 45) / 2),
    ],
)
def test_expected_calibration_error(rows, error):
    assert exam.expected_calibration_error(rows) == pytest.approx(error)
