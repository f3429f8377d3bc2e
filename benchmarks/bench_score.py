"""Scores and exams against LLaMA-Factory's own way, in the same run, as Markdown tables.

Run: `make bench-score`, or `python benchmarks/bench_score.py --exams-dir data/exams` for the real questions.

Dialogues: 8,975 pairs with the lengths that real answers have and about the overlap that the paper reports (BLEU-4 6.7), made of
the samples' sentences with every 50th character exchanged, so that no cache sees the same text again. Exams: 5 shots, the tiny model with random weights on the CPU. Only the
work is timed, not the start of Python or the loading of model and dictionary, which both ways have.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
PAIRS = 8975  # the paper's dialogue test set
MEDIAN_LENGTH, SPREAD, LONGEST = 92, 0.6, 6600  # characters; log-normal, as the answers of the four real test sets
SENTENCES_TO_CHOOSE_FROM = 80
METHODS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")


def make_pairs(data_dir: Path, count: int) -> list[tuple[str, str]]:
    """Return (prediction, reference) pairs of real lengths; a few of a prediction's sentences are the reference's."""
    records = (json.loads(line) for path in data_dir.glob("*.jsonl") for line in path.open(encoding="utf-8"))
    answers = [record["output"] for record in records if "output" in record]  # preference pairs have none
    sentences = sorted({part + "。" for answer in answers for part in answer.split("。") if part})
    characters = "".join(sentences)
    generator = random.Random(42)

    def text(source: list[str]) -> str:
        length = min(LONGEST, generator.lognormvariate(0, SPREAD) * MEDIAN_LENGTH)
        written = ""
        while len(written) < length:
            written += generator.choice(source)
        letters = list(written[: int(length) + 1])
        for _ in range(len(letters) // 50):
            letters[generator.randrange(len(letters))] = generator.choice(characters)
        return "".join(letters)

    pairs = []
    for _ in range(count):
        reference = text(sentences)
        parts = [part + "。" for part in reference.split("。") if part]
        pairs.append((text(parts + generator.sample(sentences, SENTENCES_TO_CHOOSE_FROM)), reference))
    return pairs


def llamafactory_scores(pairs: list[tuple[str, str]]) -> tuple[float, list]:
    """Return (seconds, scores) of LLaMA-Factory's own class; its tokenizer only has to give the texts back."""
    import jieba
    import numpy as np
    from llamafactory.train.sft.metric import ComputeSimilarity

    jieba.initialize()
    texts = [text for pair in pairs for text in pair]
    tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda ids, **_: [texts[row[0]] for row in ids])
    metric = ComputeSimilarity(tokenizer=tokenizer)
    places = np.arange(len(texts)).reshape(-1, 2)
    began = time.perf_counter()
    metric(SimpleNamespace(predictions=places[:, :1], label_ids=places[:, 1:]), compute_result=False)
    seconds = time.perf_counter() - began
    return seconds, list(zip(*(metric.score_dict[name] for name in METHODS), strict=True))


def our_scores(pairs: list[tuple[str, str]], workers: int) -> tuple[float, list]:
    """Return (seconds, scores) of `medasst score`'s loop."""
    from medasst_tools.evaluation import score

    score.prepare()
    records = [score.Prediction("", predict, label) for predict, label in pairs]
    began = time.perf_counter()
    scores = list(score.score_all(records, workers))
    return time.perf_counter() - began, scores


def our_descriptions(pairs: list[tuple[str, str]]) -> tuple[float, dict]:
    """Return (seconds, means) of what `medasst score` says of the answers beside the scores."""
    from medasst_tools.evaluation import score

    records = [score.Prediction("", predict, label) for predict, label in pairs]
    began = time.perf_counter()
    means = score.descriptions(records, {})
    return time.perf_counter() - began, means


def exam_prompts(model_dir: Path, exams_dir: Path):
    """Return (model, tokenizer, letters' ids, prompts by subject) at 5 shots."""
    from medasst_tools.data.exam_questions import LETTERS, load_protocol, load_subjects
    from medasst_tools.evaluation import exam

    protocol = load_protocol()
    config = {"model_name_or_path": str(model_dir), "template": "qwen", "infer_dtype": "float32"}
    model, tokenizer, template = exam.load_model(config)
    tokenizer.padding_side = "right"
    letter_ids = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    prompts = [
        [
            exam.make_prompt(
                question,
                subject,
                5,
                next(iter(protocol["prompts"].values())),
                lambda turns: template.encode_oneturn(tokenizer, turns)[0],
                4096,
            )
            for question in subject.questions
        ]
        for subject in load_subjects(exams_dir, protocol)
    ]
    return model, tokenizer, letter_ids, prompts


def llamafactory_exam(model_dir: Path, exams_dir: Path) -> tuple[float, list]:
    """Return (seconds, answers) of the Evaluator's own loop: its default batches of 4, in the questions' order."""
    from llamafactory.eval.evaluator import Evaluator

    model, tokenizer, letter_ids, subjects = exam_prompts(model_dir, exams_dir)
    evaluator = Evaluator.__new__(Evaluator)  # the loading above is what its constructor does
    evaluator.model, evaluator.tokenizer, evaluator.choice_inputs = model, tokenizer, letter_ids
    began, answers = time.perf_counter(), []
    for prompts in subjects:
        for start in range(0, len(prompts), 4):
            rows = [{"input_ids": prompt.ids} for prompt in prompts[start : start + 4]]
            answers += evaluator.batch_inference(tokenizer.pad(rows, return_attention_mask=True, return_tensors="pt"))
    return time.perf_counter() - began, answers


def our_exam(model_dir: Path, exams_dir: Path) -> tuple[float, list]:
    """Return (seconds, answers) of `medasst exam`'s loop."""
    from medasst_tools.evaluation import exam

    model, tokenizer, letter_ids, subjects = exam_prompts(model_dir, exams_dir)
    began, answers = time.perf_counter(), []
    for prompts in subjects:
        chosen = {}
        for batch, probabilities in exam.answer_prompts(model, prompts, letter_ids, tokenizer.pad_token_id):
            for prompt, probs in zip(batch, probabilities, strict=True):
                chosen[prompt.question.id] = "ABCD"[max(range(4), key=probs.__getitem__)]
        answers += [chosen[prompt.question.id] for prompt in prompts]
    return time.perf_counter() - began, answers


def _child(connection, function, arguments) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a command of its own; a spawned process spawns
    seconds, result = function(*arguments)
    # the largest of the process and its workers
    after = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    connection.send((seconds, result, after / 1024))


def in_a_process(function, *arguments) -> tuple[float, list, float]:
    """Run `function` in a fresh process; (seconds, result, peak resident MB)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    seconds, result, peak = ours.recv()
    process.join()
    return seconds, result, peak


def print_table(unit: str, count: int, rows: list[tuple[str, float, float]]) -> None:
    """Print (name, seconds, peak MB) rows with each one's ratio to the first."""
    print(f"\n| {count:,} {unit} | seconds | {unit} a second | peak memory, MB | faster |\n|---|---:|---:|---:|---:|")
    for name, seconds, peak in rows:
        print(f"| {name} | {seconds:.2f} | {count / seconds:,.0f} | {peak:.0f} | {rows[0][1] / seconds:.1f}x |")


def main() -> None:
    """Run both comparisons; exit 1 if the scores or answers differ."""
    os.environ |= {"LLAMAFACTORY_VERBOSITY": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exams-dir", type=Path, default=SAMPLES / "exams", help="as released (the samples)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"dialogues ({PAIRS})")
    args = parser.parse_args()
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("llamafactory", "torch", "rjieba", "rapidfuzz")
    )
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        data, model = Path(folder) / "data", Path(folder) / "model"
        medasst = [sys.executable, "-m", "medasst_tools.cli"]
        convert = ["convert", "--raw-dir", SAMPLES / "raw", "--out-dir", data, "--max-rejects", "0.1"]
        for words in (convert, ["tiny-model", "--data-dir", data, "--out", model]):
            subprocess.run([*medasst, *words], check=True, capture_output=True)
        pairs = make_pairs(data, args.pairs)
        lengths = sorted(len(text) for pair in pairs for text in pair)
        theirs_seconds, theirs, theirs_peak = in_a_process(llamafactory_scores, pairs)
        rows, equal = [("LLaMA-Factory's ComputeSimilarity", theirs_seconds, theirs_peak)], True
        for workers in (1, 2):
            seconds, ours, peak = in_a_process(our_scores, pairs, workers)
            rows.append((f"medasst score, {workers} worker{'s' * (workers > 1)}", seconds, peak))
            equal &= ours == theirs
        print_table("pairs", len(pairs), rows)
        mean = sum(lengths) / len(lengths)
        bleu = sum(row[0] for row in theirs) / len(theirs)
        print(f"\nmean BLEU-4 {bleu:.2f}; lengths: mean {mean:.0f}, median {lengths[len(lengths) // 2]}, longest {lengths[-1]} characters; "
              f"the scores of every pair are {'equal' if equal else 'DIFFERENT'}")  # fmt: skip
        print(
            f"the answers' descriptions, which LLaMA-Factory has none of, take another {in_a_process(our_descriptions, pairs)[0]:.2f} s"
        )
        theirs_seconds, theirs, theirs_peak = in_a_process(llamafactory_exam, model, args.exams_dir)
        seconds, ours, peak = in_a_process(our_exam, model, args.exams_dir)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print_table(
            "questions",
            len(ours),
            [("LLaMA-Factory's Evaluator", theirs_seconds, theirs_peak), ("medasst exam", seconds, peak)],
        )
        print(f"\n5 shots; {same} of {len(ours)} answers are the same")
    sys.exit(0 if equal and same == len(ours) else 1)


if __name__ == "__main__":
    main()
