"""`medasst exam` beside EleutherAI's lm-eval on the same questions and prompts: same letters, log-probabilities, and seconds.

Run: `make bench-exam EXTRAS=readers` (EXAMS=data/exams for the released questions), which exports the experiment first

lm-eval reads the exported folder as anybody would: its own loading, the folder's chat template, a local multiple-choice task
of the exam's questions. Ours is the experiment's chat.yaml, base and adapter, through LLaMA-Factory. Loading isn't timed.
Exit status 1 if a letter differs or a log-probability (of the four letters among themselves) by more than TOLERANCE.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TASK, TOLERANCE = "medasst_exam", 1e-4


def load_questions(exams_dir: Path, limit: int | None) -> tuple[list, dict[str, str]]:
    """Return (the subjects, the exam's wording)."""
    from medasst_tools.data.exam_questions import load_protocol, load_subjects

    protocol = load_protocol()
    subjects = [replace(one, questions=one.questions[:limit]) for one in load_subjects(exams_dir, protocol)]
    return subjects, next(iter(protocol["prompts"].values()))


def ours(chat: Path, subjects: list, wording: dict[str, str]) -> tuple[dict[tuple, list[float]], float]:
    """Return ({question: log-probabilities of A to D}, seconds) of `medasst exam`."""
    from medasst_tools.config import load
    from medasst_tools.evaluation import exam

    model, tokenizer, template = exam.load_model(load(chat, kind="chat"))
    opening, letter_ids = exam.letters_of(tokenizer, template)
    encode, found, began = exam.encoder(tokenizer, template, opening), {}, time.perf_counter()
    for subject in subjects:
        positions = model.config.max_position_embeddings
        prompts = [exam.make_prompt(one, subject, 0, wording, encode, positions) for one in subject.questions]
        for batch, rows in exam.answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id):
            for prompt, row in zip(batch, rows, strict=True):
                found[key(prompt.question)] = [math.log(value) for value in row]
    return found, time.perf_counter() - began


def theirs(
    exported: Path, subjects: list, wording: dict[str, str], folder: Path
) -> tuple[dict[tuple, list[float]], float]:
    """Return the same of lm-eval, in its own order and batches of 8."""
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    from medasst_tools.data.exam_questions import LETTERS, messages

    asked = [(one, subject) for subject in subjects for one in subject.questions]
    with (folder / "exam.jsonl").open("w", encoding="utf-8") as file:
        for one, subject in asked:
            prompt = messages(one, [], subject.chinese_name, wording)[0]["content"]
            file.write(json.dumps({"prompt": prompt, "answer": one.answer}, ensure_ascii=False) + "\n")
    task: dict[str, Any] = {
        "task": TASK, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "exam.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}",
        "doc_to_choice": list(LETTERS), "target_delimiter": "", "num_fewshot": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(exported), dtype="auto", batch_size=8, device=device)
    began = time.perf_counter()
    samples = lm_eval.simple_evaluate(
        model, tasks=[task], apply_chat_template=True, log_samples=True, bootstrap_iters=0
    )
    seconds, found = time.perf_counter() - began, {}
    for sample in samples["samples"][TASK]:
        values = [float(value) for value, *_ in sample["filtered_resps"]]
        among = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)
        found[key(asked[sample["doc_id"]][0])] = [value - among for value in values]
    return found, seconds


def key(question) -> tuple[str, str, str]:
    """Return what tells a question from the others."""
    return question.benchmark, question.subject, question.id


def main() -> None:
    """Ask both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chat", type=Path, nargs="?", default=Path("factory_configs/demo/chat.yaml"))
    parser.add_argument("--exported", type=Path, default=Path("saves/demo_merged"), help="what make export wrote")
    parser.add_argument("--exams-dir", type=Path, default=Path("dataset_info/samples/exams"))
    parser.add_argument("--limit", type=int, help="only the first N questions of each subject")
    args = parser.parse_args()
    try:
        version = metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        sys.exit("bench_exam: no lm-eval; `make setup EXTRAS=readers` installs it")
    subjects, wording = load_questions(args.exams_dir, args.limit)
    with tempfile.TemporaryDirectory() as folder:
        (a, a_seconds), (b, b_seconds) = (
            ours(args.chat, subjects, wording),
            theirs(args.exported, subjects, wording, Path(folder)),
        )
    letters = sum(row.index(max(row)) != b[one].index(max(b[one])) for one, row in a.items())
    largest = max(abs(x - y) for one, row in a.items() for x, y in zip(row, b[one], strict=True))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
          f"transformers {metadata.version('transformers')}, torch {metadata.version('torch')}\n")  # fmt: skip
    print(
        f"| {len(a):,} questions | seconds | other letters | largest difference of a log-probability |\n|---|---:|---:|---:|"
    )
    print(
        f"| medasst exam | {a_seconds:.1f} | | |\n| lm-eval {version} | {b_seconds:.1f} | {letters} | {largest:.1e} |"
    )
    if a.keys() != b.keys() or letters or largest > TOLERANCE:
        sys.exit("bench_exam: the answers differ")


if __name__ == "__main__":
    main()
