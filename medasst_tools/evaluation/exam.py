"""Ask a model the medical questions of CMMLU and C-Eval and mark its answers by the probabilities of A, B, C, D.

Run: `medasst exam factory_configs/demo/chat.yaml --exams-dir data/exams --out results/demo [--shots 5]`

The model is loaded through LLaMA-Factory, with the experiment's own template and system prompt; `dataset_info/exams.yaml`
says how is asked. Answers are kept as they come: a killed run goes on where it stopped.
"""

import argparse
import copy
import hashlib
import math
from collections.abc import Iterator
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml

from medasst_tools import __version__
from medasst_tools.errors import UserError
from medasst_tools.evaluation.exam_questions import (
    LETTERS,
    Question,
    Subject,
    load_protocol,
    load_subjects,
    messages,
    questions_sha256,
)
from medasst_tools.files import atomic_writer, model_sha256, sha256_of, write_json
from medasst_tools.machine import preflight
from medasst_tools.run_manifest import check_and_print

BATCH_TOKENS = 8192  # padded tokens at once: a few hundred MB for a 7B model
PARTIAL = ".exam.partial.jsonl"
ECE_BINS = 10


class Prompt(NamedTuple):
    """A question as token ids, and how many examples had to go for it to fit the model."""

    question: Question
    ids: list[int]
    dropped: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("chat_config", type=Path, help="factory_configs/<experiment>/chat.yaml")
    parser.add_argument(
        "--exams-dir", type=Path, required=True, help="holds ceval-exam.zip and cmmlu_v1_0_1.zip, or their folders"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for exam.jsonl and exam.json")
    parser.add_argument("--shots", type=int, choices=(0, 5), default=0, help="examples before each question (0)")
    parser.add_argument("--limit", type=int, help="only the first N questions of each subject")


def run(args: argparse.Namespace) -> None:
    """Ask every question that isn't answered yet and write the results."""
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}, must be 1 or more")
    protocol = load_protocol()
    subjects = load_subjects(args.exams_dir, protocol)
    config = load_chat_config(args.chat_config)
    facts = {
        "run": check_and_print(config, args.chat_config),
        "chat_config": {"file": args.chat_config.as_posix(), "sha256": sha256_of(args.chat_config)},
        "model": {
            config[key]: model_sha256(Path(config[key]))
            for key in ("model_name_or_path", "adapter_name_or_path")
            if key in config
        },
        "questions_sha256": questions_sha256(subjects),
        "shots": args.shots,
        "limit": args.limit,
        "exam_version": protocol["version"],
    }
    asked = [question for subject in subjects for question in subject.questions[: args.limit]]
    partial = args.out / PARTIAL
    args.out.mkdir(parents=True, exist_ok=True)
    answers = read_partial(partial, facts)
    if len(answers) < len(asked):
        if answers:
            print(f"{partial}: going on after {len(answers)} of {len(asked)} answers")
        answers |= answer_rest(config, subjects, protocol, facts, answers, partial)
    rows = [answers[_key(question)] for question in asked]
    with atomic_writer(args.out / "exam.jsonl") as file:
        file.writelines(orjson.dumps({k: row[k] for k in EXAM_KEYS}, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    report = summarise(rows, subjects) | facts
    report["dropped_examples"] = sum(row["dropped"] for row in rows)
    report["signature"] = signature(report, config)
    write_json(args.out / "exam.json", report)
    partial.unlink()
    print_summary(args.out / "exam.json", report)


EXAM_KEYS = ("benchmark", "subject", "id", "answer", "predicted", "probs")


def load_chat_config(path: Path) -> dict[str, Any]:
    """Return a chat.yaml; UserError if it isn't one."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no {path}; `medasst render` writes the configs of factory_configs/experiments.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not config.get("model_name_or_path") or not config.get("template"):
        raise UserError(f"{path} says no model_name_or_path or no template; is it a chat.yaml?")
    if "stage" in config or "do_predict" in config:
        raise UserError(f"{path} is a config for training or prediction; give the experiment's chat.yaml")
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if str(config.get(key, "")).startswith("saves/") and not Path(config[key]).is_dir():
            raise UserError(f"{path}: no {config[key]}; `make train EXPERIMENT={Path(config[key]).name}` makes it")
    return config


def _key(question: Question) -> tuple[str, str, str]:
    return question.benchmark, question.subject, question.id


def read_partial(path: Path, facts: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the answers of an interrupted run over the same model, questions and settings; a cut last line doesn't count."""
    if not path.is_file():
        return {}
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
    if not rows or rows[0] != facts:
        return {}
    return {(row["benchmark"], row["subject"], row["id"]): row for row in rows[1:]}


def answer_rest(config, subjects: list[Subject], protocol, facts, answered: dict, partial: Path) -> dict:
    """Answer what isn't answered, keeping every batch in the partial file; return the new answers by key."""
    from tqdm import tqdm

    preflight.require(config)
    model, tokenizer, template = load_model(config)
    letter_ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    new = {}
    with atomic_writer(partial) as start:
        start.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in [facts, *answered.values()])
    total = sum(len(subject.questions[: facts["limit"]]) for subject in subjects)
    with (
        partial.open("ab", buffering=0) as file,
        tqdm(total=total, initial=len(answered), desc="exam", disable=None) as bar,
    ):
        for subject in subjects:
            open_questions = [
                question for question in subject.questions[: facts["limit"]] if _key(question) not in answered
            ]
            encode = lambda turns: template.encode_oneturn(tokenizer, turns)[0]  # noqa: E731
            prompts = [
                make_prompt(q, subject, facts["shots"], protocol["prompt"], encode, _positions(model))
                for q in open_questions
            ]
            for batch, probabilities in answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id):
                rows = [_row(prompt, probs) for prompt, probs in zip(batch, probabilities, strict=True)]
                new |= {_key(prompt.question): row for prompt, row in zip(batch, rows, strict=True)}
                file.write(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
                bar.update(len(batch))
    return new


def _row(prompt: Prompt, probs: list[float]) -> dict[str, Any]:
    question = prompt.question
    row = {"benchmark": question.benchmark, "subject": question.subject, "id": question.id, "answer": question.answer}
    row["predicted"] = LETTERS[max(range(len(LETTERS)), key=probs.__getitem__)]
    return row | {"probs": dict(zip(LETTERS, probs, strict=True)), "dropped": prompt.dropped}


def load_model(config: dict[str, Any]):
    """Return (model, tokenizer, template) through LLaMA-Factory, as its Evaluator and its chat load them."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model as load
    from llamafactory.model import load_tokenizer

    model_args, data_args, finetuning_args, _ = get_infer_args(config)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    return load(tokenizer, model_args, finetuning_args).eval(), tokenizer, template


def _positions(model) -> int:
    return getattr(model.config, "max_position_embeddings", None) or 2048


def make_prompt(
    question: Question, subject: Subject, shots: int, wording: dict[str, str], encode, positions: int
) -> Prompt:
    """Return the question's prompt; examples go, last first, until it fits `positions`. The question stays whole."""
    examples = subject.examples[:shots]
    for kept in range(len(examples), -1, -1):
        ids = encode(messages(question, examples[:kept], subject.chinese_name, wording))
        if len(ids) <= positions:
            return Prompt(question, ids, shots - kept)
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
        cache = (
            model(torch.tensor([prefix], device=model.device), use_cache=True, logits_to_keep=1).past_key_values
            if prefix
            else None
        )
        for batch in _batches(prompts, len(prefix)):
            yield (
                batch,
                _probabilities(model, [prompt.ids[len(prefix) :] for prompt in batch], cache, letter_ids, pad_id),
            )


def _common_prefix(sequences: list[list[int]]) -> list[int]:
    """Return what all sequences begin with, short of the last token of the shortest: each keeps one of its own."""
    first, last = min(sequences), max(sequences)
    shortest = min(map(len, sequences))
    length = 0
    while length < shortest - 1 and first[length] == last[length]:
        length += 1
    return first[:length]


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

    lengths = torch.tensor([len(suffix) for suffix in suffixes])
    width, past = int(lengths.max()), 0
    ids = torch.full((len(suffixes), width), pad_id)
    for row, suffix in enumerate(suffixes):
        ids[row, : len(suffix)] = torch.tensor(suffix)
    if cache is not None:
        past = cache.get_seq_length()
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(suffixes))
    mask = (torch.arange(past + width)[None, :] < past + lengths[:, None]).long()
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


def summarise(rows: list[dict[str, Any]], subjects: list[Subject]) -> dict[str, Any]:
    """Return exam.json's numbers, in percent: per benchmark, their plain mean (the paper's average), per subject, ECE."""
    by_benchmark = {name: list(group) for name, group in groupby(rows, key=lambda row: row["benchmark"])}
    correct = {name: sum(map(_is_right, group)) for name, group in by_benchmark.items()}
    report: dict[str, Any] = {name: 100 * correct[name] / len(group) for name, group in by_benchmark.items()}
    intervals = {name: wilson(correct[name], len(group)) for name, group in by_benchmark.items()}
    report["average"] = sum(report.values()) / len(by_benchmark)
    intervals["average"] = average_interval({name: report[name] for name in by_benchmark}, intervals)
    report |= {
        "n": len(rows),
        "n_by_benchmark": {name: len(group) for name, group in by_benchmark.items()},
        "ci95": intervals,
    }
    report["by_subject"] = {
        f"{benchmark}/{subject}": _subject(list(group))
        for (benchmark, subject), group in groupby(rows, key=lambda row: (row["benchmark"], row["subject"]))
    }
    report["ece"] = expected_calibration_error(rows)
    report["as_released"] = all(
        len(subject.questions) == subject.released == report["by_subject"][f"{subject.benchmark}/{subject.name}"]["n"]
        for subject in subjects
    )
    return report


def _is_right(row: dict[str, Any]) -> bool:
    return row["predicted"] == row["answer"]


def _subject(rows: list[dict[str, Any]]) -> dict[str, Any]:
    correct = sum(map(_is_right, rows))
    return {
        "n": len(rows),
        "correct": correct,
        "accuracy": 100 * correct / len(rows),
        "ci95": wilson(correct, len(rows)),
    }


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """Return Wilson's 95 % interval of a share, in percent (Wilson 1927)."""
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return [round(100 * (centre - half), 4), round(100 * (centre + half), 4)]


def average_interval(scores: dict[str, float], intervals: dict[str, list[float]]) -> list[float]:
    """Return the interval of the plain mean of independent shares: Wilson's distances, squared and added (Newcombe 1998)."""
    mean = sum(scores.values()) / len(scores)
    below, above = (
        math.sqrt(sum((scores[name] - intervals[name][side]) ** 2 for name in scores)) / len(scores) for side in (0, 1)
    )
    return [round(mean - below, 4), round(mean + above, 4)]


def calibration_bins(rows: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """Return (size, mean confidence, accuracy), from 0 to 1, of each of ten equal bins of the answer's probability."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        confidence = row["probs"][row["predicted"]]
        bins.setdefault(min(int(confidence * ECE_BINS), ECE_BINS - 1), []).append((confidence, _is_right(row)))
    return [
        (len(members), *(sum(column) / len(members) for column in zip(*members, strict=True)))
        for _, members in sorted(bins.items())
    ]


def expected_calibration_error(rows: list[dict[str, Any]]) -> float:
    """Return the ECE in percent: the bins' |confidence - accuracy|, weighted by their size (Naeini et al. 2015)."""
    gaps = (size * abs(confidence - accuracy) for size, confidence, accuracy in calibration_bins(rows))
    return 100 * sum(gaps) / len(rows)


def signature(report: dict[str, Any], config: dict[str, Any]) -> str:
    """Return what it takes to get the same numbers again."""
    counts = "+".join(f"{name}:{count}" for name, count in report["n_by_benchmark"].items())
    system = hashlib.sha256(str(config.get("default_system")).encode()).hexdigest()[:8]
    versions = "|".join(f"{name}:{metadata.version(name)}" for name in ("llamafactory", "transformers", "torch"))
    return (
        f"exam:v{report['exam_version']}|{counts}|questions:{report['questions_sha256'][:8]}|shots:{report['shots']}|limit:{report['limit']}"
        f"|prompt:llamafactory-zh|choice:argmax-ABCD,float32|template:{config['template']}|system:{system}|{versions}|medasst:{__version__}"
    )


def print_summary(path: Path, report: dict[str, Any]) -> None:
    """Print the scores with their intervals."""
    for name in (*report["n_by_benchmark"], "average"):
        low, high = report["ci95"][name]
        print(f"{name:8} {report[name]:6.2f} [{low:.2f}, {high:.2f}]")
    if not report["as_released"]:
        print(f"not the released 1,415 questions but {report['n']}: not to be compared with the paper's scores")
    if report["dropped_examples"]:
        print(f"{report['dropped_examples']} examples were left out to fit the model's length")
    print(f"{path}: n {report['n']}, ECE {report['ece']:.2f}\n{report['signature']}")
