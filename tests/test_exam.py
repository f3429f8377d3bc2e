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
WORDING = next(iter(PROTOCOL["prompts"].values()))


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


def encoder(loaded):
    _, tokenizer, template = loaded
    return lambda turns: template.encode_oneturn(tokenizer, turns)[0]


def prompts_of(subject, loaded, shots):
    return [exam.make_prompt(one, subject, shots, WORDING, encoder(loaded), 4096) for one in subject.questions]


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
        ours = {
            prompt.question.id: exam._row(prompt.question, 0, row, 0)["predicted"]
            for batch, rows in exam.answer_prompts(model, prompts, evaluator.choice_inputs, tokenizer.pad_token_id)
            for prompt, row in zip(batch, rows, strict=True)
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
    subject, encode = SUBJECTS[0], encoder(loaded)
    question = subject.questions[0]
    lengths = [
        len(encode(messages(question, subject.examples[:shots], subject.chinese_name, WORDING))) for shots in range(6)
    ]
    prompt = exam.make_prompt(question, subject, 5, WORDING, encode, lengths[3])
    assert (len(prompt.ids), prompt.dropped) == (lengths[3], 2)
    with pytest.raises(UserError, match="don't fit the model's"):
        exam.make_prompt(question, subject, 5, WORDING, encode, lengths[0] - 1)


def run_exam(chat_config, out, *words) -> int:
    return cli.main(["exam", str(chat_config), "--exams-dir", str(SAMPLES / "exams"), "--out", str(out), *words])


def test_a_killed_exam_goes_on(chat_config, tmp_path, monkeypatch, capfd):
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
    with (tmp_path / "resumed/answers/exam.jsonl").open("ab") as kept:
        kept.write(b'{"key": "cut in the mid')
    assert run_exam(chat_config, tmp_path / "resumed") == 0
    assert "going on" in capfd.readouterr().err
    assert len(calls) == 5 + 9 - 4  # nothing answered twice: nine subjects, one batch each
    for file in ("exam.jsonl", "exam.json"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_only_what_differs_is_asked_again(chat_config, tmp_path, monkeypatch, capsys):
    """A comment, generation settings, a limit: nothing. Another system prompt: everything."""
    calls = []
    real = exam._probabilities
    monkeypatch.setattr(exam, "_probabilities", lambda *args: calls.append(1) or real(*args))
    assert run_exam(chat_config, tmp_path / "out") == 0 and len(calls) == 9
    assert run_exam(chat_config, tmp_path / "out") == 0
    assert "up to date" in capsys.readouterr().out.splitlines()[-1]
    text = chat_config.read_text(encoding="utf-8")
    other = tmp_path / "chat.yaml"
    other.write_text(text + "max_new_tokens: 7  # another number\n# a comment\n", encoding="utf-8")
    assert run_exam(other, tmp_path / "out") == 0 and len(calls) == 9
    assert run_exam(other, tmp_path / "out", "--limit", "1") == 0 and len(calls) == 9
    other.write_text(text.replace("你是医疗助手。", "请回答。"), encoding="utf-8")
    assert run_exam(other, tmp_path / "out", "--limit", "1") == 0 and len(calls) == 18


def test_nan_is_no_answer(chat_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exam, "_probabilities", lambda model, suffixes, *_: [[float("nan")] * 4 for _ in suffixes])
    assert run_exam(chat_config, tmp_path) == 1
    assert "answers with NaN" in capsys.readouterr().err and not (tmp_path / "exam.json").exists()


def rigged(answer):
    """A model whose probabilities come from the question as it was asked: answer(prompt) -> letter."""

    def answers(config, subjects, missing, shots, wording):
        for question, order in sorted(missing):
            asked = exam.rotated(question, order)
            letter = answer(asked)
            yield exam.Prompt(question, [], 0, order), [0.7 if one == letter else 0.1 for one in LETTERS]

    return answers


@pytest.mark.parametrize(
    ("answer", "all_orders", "debiased", "wrong_a"),
    [(lambda asked: "A", 0, None, 1.0), (lambda asked: asked.answer, 100, 100, 0)],
    ids=["always A", "knows everything"],
)
def test_orders_of_rigged_models(chat_config, tmp_path, monkeypatch, answer, all_orders, debiased, wrong_a):
    monkeypatch.setattr(exam, "_answers", rigged(answer))
    assert run_exam(chat_config, tmp_path, "--orders", "4") == 0
    report = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    orders = report["by_order"]
    assert orders["all_orders"]["percent"] == all_orders and orders["wrong_letters"]["A"] == wrong_a
    assert debiased is None or orders["debiased"]["percent"] == debiased
    assert len(orders["accuracy"]) == 4 and sum(orders["accuracy"]) == pytest.approx(
        400 if all_orders else 100, abs=1e-6
    )
    lines = (tmp_path / "exam_orders.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 * report["n"] == 4 * len((tmp_path / "exam.jsonl").read_text(encoding="utf-8").splitlines())


def test_ties_are_counted(chat_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exam, "_answers", lambda config, subjects, missing, *_: (
        (exam.Prompt(question, [], 0, order), [0.3, 0.3, 0.2, 0.2] if question.id == "0" else [0.4, 0.3, 0.2, 0.1])
        for question, order in missing
    ))  # fmt: skip
    assert run_exam(chat_config, tmp_path) == 0
    tied = sum(question.id == "0" for subject in SUBJECTS for question in subject.questions)
    assert tied and f"ties {tied}\n" in capsys.readouterr().out


def test_four_orders_of_the_real_model(chat_config, tmp_path, monkeypatch):
    """The first order's rows are those of one order, and the shared beginning is computed once a subject."""
    assert run_exam(chat_config, tmp_path / "one") == 0
    begun = []
    real = exam._common_prefix
    monkeypatch.setattr(exam, "_common_prefix", lambda sequences: begun.append(len(sequences)) or real(sequences))
    assert run_exam(chat_config, tmp_path / "four", "--orders", "4") == 0
    assert len(begun) == 1 + 9  # the four letters, then the subjects
    rows = [
        json.loads((tmp_path / name / "exam.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("one", "four")
    ]
    assert rows[0]["predicted"] == rows[1]["predicted"]
    assert rows[0]["probs"] == pytest.approx(rows[1]["probs"], abs=1e-5)


def test_prompts(chat_config, tmp_path, capsys):
    assert len(PROTOCOL["prompts"]) >= 3
    alone = {}
    for name in PROTOCOL["prompts"]:
        assert run_exam(chat_config, tmp_path, "--limit", "1", "--prompt", name) == 0
        report = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
        assert report["prompt"] == name and f"|prompt:{name}|" in report["signature"]
        alone[name] = {score: report[score] for score in ("cmmlu", "ceval", "average")}
        assert report["by_prompt"] == alone  # those that were asked so far
    assert run_exam(chat_config, tmp_path, "--limit", "2") == 0  # of the others only some questions are answered
    report = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    assert list(report["by_prompt"]) == [next(iter(PROTOCOL["prompts"]))]
    assert run_exam(chat_config, tmp_path, "--prompt", "plain-hz") == 2
    assert "did you mean 'plain-zh'?" in capsys.readouterr().err


def test_what_is_written(chat_config, tmp_path, capsys):
    assert run_exam(chat_config, tmp_path, "--shots", "5", "--limit", "2") == 0
    said = capsys.readouterr().out
    assert "not the released 1,415 questions but 18: not to be compared" in said
    rows = [json.loads(line) for line in (tmp_path / "exam.jsonl").read_text(encoding="utf-8").splitlines()]
    report = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))
    assert len(rows) == report["n"] == 18 and report["as_released"] is False and report["shots"] == 5
    for row in rows:
        assert set(row) == {"benchmark", "subject", "id", "answer", "predicted", "probs"}
        assert sum(row["probs"].values()) == pytest.approx(1)
        assert row["probs"][row["predicted"]] == max(row["probs"].values())

    def right(**of) -> list[bool]:
        return [row["predicted"] == row["answer"] for row in rows if of.items() <= row.items()]

    for name, entry in report["by_subject"].items():
        mine = right(**dict(zip(("benchmark", "subject"), name.split("/"), strict=True)))
        accuracy = pytest.approx(100 * sum(mine) / len(mine))
        assert (entry["n"], entry["correct"], entry["accuracy"]) == (len(mine), sum(mine), accuracy)
    for name in ("cmmlu", "ceval"):
        assert report[name] == pytest.approx(100 * sum(right(benchmark=name)) / len(right(benchmark=name)))
    assert report["average"] == pytest.approx((report["cmmlu"] + report["ceval"]) / 2)
    assert "shots:5" in report["signature"] and "limit:2" in report["signature"]
    exam.print_summary(tmp_path / "exam.json", report | {"as_released": True, "dropped_examples": 0}, "x")
    said = capsys.readouterr().out
    assert "not the released" not in said and "left out" not in said
    exam.print_summary(tmp_path / "exam.json", report | {"dropped_examples": 3}, "x")
    assert "3 examples were left out to fit the model's length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name_or_path: x\ntemplate: qwen\nstage: sft\n", "give the experiment's chat.yaml"),
        ("model_name_or_path: saves/none\ntemplate: qwen\n", "`make train EXPERIMENT=none` makes it"),
    ],
)
def test_a_wrong_config_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "chat.yaml"
    path.write_text(text, encoding="utf-8")
    assert run_exam(path, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
