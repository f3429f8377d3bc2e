"""Ask a model the medical questions of CMMLU and C-Eval and mark its answers by the probabilities of A, B, C, D.

Run: `medasst exam factory_configs/demo/chat.yaml --exams-dir data/exams --out results/demo [--shots 5] [--orders 4]`

The model is loaded through LLaMA-Factory, with the experiment's own template and system prompt; `dataset_info/exams.yaml`
says how is asked. Answers are kept as they come, and asked again only where model, prompt or question differ.
"""

import argparse
import copy
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools import __version__, provenance
from medasst_tools.config import load, nearest
from medasst_tools.data.exam_questions import (
    AVERAGED,
    LETTERS,
    Question,
    Subject,
    load_protocol,
    load_subjects,
    messages,
    questions_sha256,
)
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.evaluation import contamination
from medasst_tools.evaluation.score import interval
from medasst_tools.evaluation.statistics import average_interval, brier, expected_calibration_error, rate
from medasst_tools.files import locked, sha256_of, write_json, write_jsonl
from medasst_tools.inference.answers import AnswerStore
from medasst_tools.machine import preflight

BATCH_TOKENS = 8192  # padded tokens at once: a few hundred MB for a 7B model
EXAM_KEYS = ("benchmark", "subject", "id", "answer", "predicted", "probs")
Keys = dict[tuple[Question, int], str]  # of the answers to questions in orders of their options
VERSIONS = ("llamafactory", "transformers", "torch")


class Prompt(NamedTuple):
    """A question in one order of its options as token ids, and how many examples had to go for it to fit the model."""

    question: Question
    ids: list[int]
    dropped: int
    order: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("chat_config", type=Path, help="factory_configs/<experiment>/chat.yaml")
    parser.add_argument(
        "--exams-dir", type=Path, required=True, help="holds ceval-exam.zip and cmmlu_v1_0_1.zip, or their folders"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for exam.jsonl and exam.json")
    parser.add_argument("--shots", type=int, choices=(0, 5), default=0, help="examples before each question (0)")
    parser.add_argument("--orders", type=int, choices=(1, 4), default=1, help="cyclic orders of the options (1)")
    parser.add_argument("--prompt", help="one of the prompts of exams.yaml (its first)")
    parser.add_argument("--labels", type=Path, help="JSON lines of benchmark, subject, id, label: scores by label")
    parser.add_argument("--limit", type=int, help="only the first N questions of each subject")
    parser.add_argument("--check", action="store_true", help="only look whether the questions can be read")
    preflight.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Ask every question that isn't answered yet and write the results."""
    protocol = load_protocol()
    prompts = protocol["prompts"]
    name = args.prompt or next(iter(prompts))
    if name not in prompts:
        raise UserError(f"no prompt {name!r} in exams.yaml{nearest(name, prompts)}; there are {', '.join(prompts)}")
    subjects = load_subjects(args.exams_dir, protocol)
    config = load(args.chat_config, kind="chat")
    if args.check:
        print(f"{args.exams_dir}: {sum(len(subject.questions) for subject in subjects):,} exam questions")
        return
    trained = provenance.check_model(config, args.chat_config)
    facts = {
        "shots": args.shots,
        "orders": args.orders,
        "limit": args.limit,
        "prompt": name,
        "exam_version": protocol["version"],
        "questions_sha256": questions_sha256(subjects),
    }
    by_label = {"labels": contamination.read_labels(args.labels, subjects)} if args.labels else {}
    audit = contamination.audit_file(args.chat_config)
    sources = {"labels": args.labels, "audit": audit}
    about = made_of(config, facts, {name: sha256_of(path) for name, path in sources.items() if path})
    if provenance.up_to_date(args.out / "exam.json", about):
        return
    print(provenance.describe(config, trained))
    args.out.mkdir(parents=True, exist_ok=True)
    with locked(
        args.out.parent / f".{args.out.name}.exam.lock",
        f"{args.out} is being examined by another process; wait for it",
    ):
        asked = {"model": about["model"], "settings": provenance.exam_settings(config), "version": protocol["version"]}
        store = AnswerStore(args.out / "answers" / "exam.jsonl")
        rows = answer_all(args, config, subjects, prompts[name], asked, store)
        first = [row for row in rows if row["order"] == 0]
        splits: dict[str, Any] = {}
        try:
            by_label["training"] = contamination.of_training(config, audit, subjects)
        except UserError as error:
            splits["unknown"] = str(error)
        splits |= {name: contamination.split(first, labels) for name, labels in by_label.items()}
        report = summarise(first, subjects) | facts | {"contamination": splits}
        keys = {name: _keys(args, subjects, wording, asked, orders=1) for name, wording in prompts.items()}
        report["by_prompt"] = by_prompt(keys, subjects, store)
        if args.orders > 1:
            report["by_order"] = summarise_orders(rows, args.orders)
        report["dropped_examples"] = sum(row["dropped"] for row in rows)
        report["signature"] = signature(report, config)
        write_results(args.out, first, rows, report, about)
    print_summary(args.out / "exam.json", report, provenance.shown_name(args.out.name, exam=about))


def made_of(config: dict[str, Any], facts: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """Return what the exam's result depends on: the model, how it is asked, the questions."""
    settings = provenance.exam_settings(config) | {key: value for key, value in facts.items() if value is not None}
    files = {"questions": settings.pop("questions_sha256")} | labels
    modules = (f"evaluation/{name}.py" for name in ("exam", "statistics", "contamination"))
    code = {"medasst exam": provenance.code_sha256(*modules)}
    return provenance.made_of(settings, files, provenance.model_identity(config), code)


# ---- asking ---------------------------------------------------------------------------------------------------------
def answer_all(
    args: argparse.Namespace,
    config: dict[str, Any],
    subjects: list[Subject],
    wording: dict[str, str],
    asked: dict[str, Any],
    store: AnswerStore,
) -> list[dict[str, Any]]:
    """Return the row of every question in every order, in the exams' order; each is kept as it is answered."""
    keys = _keys(args, subjects, wording, asked, args.orders)
    if missing := {one for one, key in keys.items() if key not in store}:
        preflight.require(config, args)
        answers = (
            (keys[prompt.question, prompt.order], {"probs": probabilities, "dropped": prompt.dropped})
            for prompt, probabilities in _answers(config, subjects, missing, args.shots, wording)
        )
        store.fill(len(missing), len(keys), answers, args.out / "exam.log", "question")
    return [_row(question, order, **store[key]) for (question, order), key in keys.items()]


def _keys(
    args: argparse.Namespace, subjects: list[Subject], wording: dict[str, str], asked: dict[str, Any], orders: int
) -> Keys:
    """Return {(question, order): the key of its answer} in the exams' order."""
    return {
        (question, order): AnswerStore.key(asked, wording, question, order, [*subject.examples[: args.shots]])
        for subject in subjects
        for question in subject.questions[: args.limit]
        for order in range(orders)
    }


def by_prompt(prompts: dict[str, Keys], subjects: list[Subject], store: AnswerStore) -> dict[str, dict[str, float]]:
    """Return the scores, in percent, under each prompt in which this model has answered every question, now or before."""
    scores = {}
    for name, keys in prompts.items():
        if all(key in store for key in keys.values()):
            report = summarise([_row(question, 0, **store[key]) for (question, _), key in keys.items()], subjects)
            scores[name] = {score: report[score] for score in (*report["n_by_benchmark"], "average")}
    return scores


def _answers(
    config: dict[str, Any],
    subjects: list[Subject],
    missing: set[tuple[Question, int]],
    shots: int,
    wording: dict[str, str],
) -> Iterator[tuple[Prompt, list[float]]]:
    """Yield (prompt, probabilities of A to D as they stood in it) of all that is missing; CheckFailed if they are no numbers."""
    model, tokenizer, template = load_model(config)
    opening, letter_ids = letters_of(tokenizer, template)
    encode = encoder(tokenizer, template, opening)
    positions = getattr(model.config, "max_position_embeddings", None) or 2048
    for subject in subjects:
        prompts = [
            make_prompt(question, subject, shots, wording, encode, positions, order)
            for question in subject.questions
            for order in range(len(LETTERS))
            if (question, order) in missing
        ]
        for batch, probabilities in answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id):
            if not all(math.isfinite(value) for row in probabilities for value in row):
                raise CheckFailed("the model answers with NaN: its weights, or the adapter's, aren't numbers; no exam")
            yield from zip(batch, probabilities, strict=True)


def rotated(question: Question, order: int) -> Question:
    """Return the question with its options moved up by `order` places, and its answer with them."""
    a, b, c, d = (*question.choices[order:], *question.choices[:order])
    answer = LETTERS[(LETTERS.index(question.answer) - order) % len(LETTERS)]
    return question._replace(choices=(a, b, c, d), answer=answer)


def _row(question: Question, order: int, probs: list[float], dropped: int) -> dict[str, Any]:
    """Return a row of exam.jsonl in the letters of that order, with what else the summary needs."""
    asked = rotated(question, order)
    row = {"benchmark": asked.benchmark, "subject": asked.subject, "id": asked.id, "answer": asked.answer}
    row["predicted"] = LETTERS[max(range(len(LETTERS)), key=probs.__getitem__)]
    return row | {"probs": dict(zip(LETTERS, probs, strict=True)), "dropped": dropped, "order": order}


def load_model(config: dict[str, Any]):
    """Return (model, tokenizer, template) as LLaMA-Factory's chat loads them."""
    from llamafactory.chat import ChatModel

    engine = ChatModel(config | {"infer_backend": "huggingface"}).engine
    return engine.model, engine.tokenizer, engine.template


def letters_of(tokenizer, template) -> tuple[list[int], list[int]]:
    """Return (what a trained answer begins with before its letter, the tokens of A to D there).

    Mostly nothing stands before it; with Mistral's template and tokenizer it is a space. CheckFailed if they aren't a token each.
    """
    turns = [[{"role": "user", "content": "1"}, {"role": "assistant", "content": letter}] for letter in LETTERS]
    answers = [template.encode_oneturn(tokenizer, turn)[1] for turn in turns]
    opening = _common_prefix(answers)
    at = len(opening)
    letter_ids = [answer[at] for answer in answers]
    if len({*letter_ids}) < len(LETTERS) or any(answer[at + 1 :] != answers[0][at + 1 :] for answer in answers):
        raise CheckFailed("with this tokenizer and template A to D aren't one token each; no exam")
    return opening, letter_ids


def encoder(tokenizer, template, opening: list[int]):
    """Return the function from messages, the answer last, to the token ids up to the answer's letter."""
    return lambda turns: template.encode_oneturn(tokenizer, turns)[0] + opening


def make_prompt(
    question: Question, subject: Subject, shots: int, wording: dict[str, str], encode, positions: int, order: int = 0
) -> Prompt:
    """Return the question's prompt; examples go, last first, until it fits `positions`. The question stays whole."""
    examples, asked = subject.examples[:shots], rotated(question, order)
    for kept in range(len(examples), -1, -1):
        ids = encode(messages(asked, examples[:kept], subject.chinese_name, wording))
        if len(ids) <= positions:
            return Prompt(question, ids, shots - kept, order)
    raise UserError(
        f"{question.benchmark} {question.subject} {question.id}: {len(ids)} tokens don't fit the model's {positions} positions"
    )


def answer_prompts(
    model, prompts: list[Prompt], letter_ids: list[int], pad_id: int
) -> Iterator[tuple[list[Prompt], list[list[float]]]]:
    """Yield (prompts, their probabilities of A to D) in batches of like length.

    What all prompts begin with (system prompt, opening, examples) goes through the model once, and its keys and values
    serve every batch.
    """
    import torch

    if not prompts:
        return
    prefix = _common_prefix([prompt.ids for prompt in prompts])
    with torch.inference_mode():
        begun = torch.tensor([prefix], device=model.device)
        cache = model(begun, use_cache=True, logits_to_keep=1).past_key_values if prefix else None
        for batch in _batches(prompts, len(prefix)):
            suffixes = [prompt.ids[len(prefix) :] for prompt in batch]
            yield batch, _probabilities(model, suffixes, cache, letter_ids, pad_id)


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    """Return what all sequences begin with, short of the last token of the shortest: each keeps one of its own."""
    return list(os.path.commonprefix(sequences))[: min(map(len, sequences)) - 1]


def _batches(prompts: list[Prompt], prefix_length: int) -> Iterator[list[Prompt]]:
    """Yield batches of like length whose padded tokens, the prefix's keys and values included, stay within BATCH_TOKENS."""
    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: len(prompt.ids), reverse=True):
        if batch and (len(batch) + 1) * max(len(batch[0].ids), prefix_length) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def _probabilities(model, suffixes: list[list[int]], cache, letter_ids: list[int], pad_id: int) -> list[list[float]]:
    """Return the float32 softmax over the letters at each sequence's last position; right padding, so positions are true."""
    import torch

    lengths, past = torch.tensor([len(suffix) for suffix in suffixes]), 0
    rows = [torch.tensor(suffix) for suffix in suffixes]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    if cache is not None:
        past = cache.get_seq_length()
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(suffixes))
    mask = (torch.arange(past + ids.shape[1])[None, :] < past + lengths[:, None]).long()
    kept, place = torch.unique(lengths - 1, return_inverse=True)  # only the positions where some sequence ends
    logits = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept.to(model.device),
    ).logits
    ends = logits[torch.arange(len(suffixes)), place.to(logits.device)][:, letter_ids]
    return torch.softmax(ends.float(), dim=-1).tolist()


# ---- the outcome ----------------------------------------------------------------------------------------------------
def write_results(
    out: Path, first: list[dict[str, Any]], rows: list[dict[str, Any]], report: dict[str, Any], about: dict[str, Any]
) -> None:
    """Write exam.jsonl of the first order, with several orders exam_orders.jsonl, and last exam.json."""
    files = {"exam.jsonl": (first, EXAM_KEYS)}
    if report["orders"] > 1:
        files["exam_orders.jsonl"] = rows, ("order", *EXAM_KEYS)
    for name, (lines, keys) in files.items():
        write_jsonl(out / name, ({key: row[key] for key in keys} for row in lines))
    write_json(out / "exam.json", report | provenance.record(out / "exam.json", about, [out / name for name in files]))


def summarise(rows: list[dict[str, Any]], subjects: list[Subject]) -> dict[str, Any]:
    """Return exam.json's numbers, in percent: per benchmark, the plain mean of the paper's two, per subject, ECE, Brier."""
    by_benchmark = {name: _right(group) for name, group in groupby(rows, key=itemgetter("benchmark"))}
    by_subject = {"/".join(names): _right(group) for names, group in groupby(rows, itemgetter("benchmark", "subject"))}
    report: dict[str, Any] = {name: share["percent"] for name, share in by_benchmark.items()}
    intervals = {name: share["ci95"] for name, share in by_benchmark.items()}
    averaged = {name: report[name] for name in AVERAGED if name in report}
    report["average"] = sum(averaged.values()) / len(averaged)
    intervals["average"] = average_interval(averaged, intervals)
    return report | {
        "n": len(rows),
        "n_by_benchmark": {name: share["n"] for name, share in by_benchmark.items()},
        "ci95": intervals,
        "by_subject": {
            name: {"n": share["n"], "correct": share["count"], "accuracy": share["percent"], "ci95": share["ci95"]}
            for name, share in by_subject.items()
        },
        "ece": expected_calibration_error(rows),
        "brier": brier(rows),
        "ties": sum([*row["probs"].values()].count(max(row["probs"].values())) > 1 for row in rows),
        "as_released": all(
            len(subject.questions) == subject.released == by_subject[f"{subject.benchmark}/{subject.name}"]["n"]
            for subject in subjects
        ),
    }


def _is_right(row: dict[str, Any]) -> bool:
    return row["predicted"] == row["answer"]


def _right(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return rate([_is_right(row) for row in rows])


def summarise_orders(rows: list[dict[str, Any]], orders: int) -> dict[str, Any]:
    """Return what the options' order does: accuracy per order, questions right in all (OpenCompass's CircularEval), the
    letters' shares of the wrong answers, and the accuracy of the option that is likeliest over all orders."""
    by_question = [list(group) for _, group in groupby(rows, key=contamination.row_key)]
    wrong = Counter(row["predicted"] for row in rows if not _is_right(row))
    return {
        "accuracy": [_right(row for row in rows if row["order"] == order)["percent"] for order in range(orders)],
        "all_orders": rate([all(map(_is_right, group)) for group in by_question]),
        "wrong_letters": {letter: wrong[letter] / max(1, sum(wrong.values())) for letter in LETTERS},
        "debiased": rate([_debiased_is_right(group) for group in by_question]),
    }


def _debiased_is_right(group: list[dict[str, Any]]) -> bool:
    """Say whether the option with the highest mean probability over all orders is the right one."""
    places = range(len(LETTERS))  # an option's in the first order; in the next it stands one before
    sums = [sum(row["probs"][LETTERS[place - row["order"]]] for row in group) for place in places]
    return LETTERS[max(places, key=sums.__getitem__)] == group[0]["answer"]


def signature(report: dict[str, Any], config: dict[str, Any]) -> str:
    """Return what it takes to get the same numbers again."""
    counts = "+".join(f"{name}:{count}" for name, count in report["n_by_benchmark"].items())
    system = provenance.short(config.get("default_system"))
    versions = "|".join(f"{name}:{version}" for name, version in provenance.package_versions(*VERSIONS).items())
    return (
        f"exam:v{report['exam_version']}|{counts}|questions:{report['questions_sha256'][:8]}|shots:{report['shots']}"
        f"|orders:{report['orders']}|limit:{report['limit']}|prompt:{report['prompt']}|choice:argmax-ABCD,float32"
        f"|template:{config['template']}|system:{system}|{versions}|medasst:{__version__}"
    )


def print_summary(path: Path, report: dict[str, Any], name: str) -> None:
    """Print the scores with their intervals."""
    for score in (*report["n_by_benchmark"], "average"):
        print(f"{name} {score:8} {report[score]:6.2f} {interval(report['ci95'][score])}")
    if orders := report.get("by_order"):
        accuracy = ", ".join(f"{value:.2f}" for value in orders["accuracy"])
        print(
            f"by order of the options {accuracy}; right in all {orders['all_orders']['percent']:.2f}; debiased {orders['debiased']['percent']:.2f}"
        )
    for source, split in report["contamination"].items():
        if source == "unknown":
            print(f"exam questions in training: not known: {split}")
            continue
        for benchmark, label, row in ((name, *one) for name, rows in split.items() for one in rows.items()):
            more = f", {row['difference']:+.2f} {interval(row['difference_ci95'], '+')}" if "difference" in row else ""
            print(f"{benchmark:8} by {source}, {label}: {row['percent']:6.2f}, n {row['n']}{more}")
    if not report["as_released"]:
        print(f"not the released 1,415 questions but {report['n']}: not to be compared with the paper's scores")
    if report["dropped_examples"]:
        print(f"{report['dropped_examples']} examples were left out to fit the model's length")
    print(
        f"{path}: n {report['n']}, ECE {report['ece']:.2f}, Brier {report['brier']:.3f}, ties {report['ties']}\n{report['signature']}"
    )
