"""Convert and audit at the paper's full size, against a floor and against what people use instead, as Markdown tables.

Run: `make bench-data`, or `python benchmarks/bench_data.py --scale 0.1 --folder /some/disk` for a tenth on another disk.

The corpora are made here, the same every time: as many records as the real ones have, as long on average, in the five raw
layouts, of slices of the bundled samples' sentences. The floor is a loop that reads each line, parses it with orjson and
writes it with orjson: less than that no conversion of JSON lines can do in Python. Memory is the peak of all processes
together, a page that several share counted once (the proportional set size; on systems without it the resident one). What
is compared takes turns, --repeat times, and the fastest turn of each counts: other work on the machine only slows down.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import psutil

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples" / "raw"
# records, mean characters of a question and of an answer: the real files' sizes in bytes are about three times the sum
SIZES = {
    "medchatzh/MedChatZH_train.json": (763_629, 60, 290),
    "huatuo_encyclopedia_qa/train_datasets.jsonl": (362_420, 50, 480),
    "huatuogpt_sft/HuatuoGPT_sft_data_v1.jsonl": (226_042, 60, 190),  # twice: two turns
    "cmtmedqa/CMtMedQA.json": (68_023, 45, 110),  # four times: four turns
    "webmedqa/medQA.train.txt": (50_570, 60, 110),  # five lines a question
    "medchatzh/MedChatZH_valid.json": (494, 60, 290),
    "huatuo_encyclopedia_qa/test_datasets.jsonl": (1_000, 50, 480),
    "cmtmedqa/CMtMedQA_test.json": (1_144, 45, 110),
    "webmedqa/medQA.test.txt": (6_337, 60, 110),
}
JSON_LINES = [name for name in SIZES if name.endswith(("MedChatZH_train.json", "train_datasets.jsonl", "v1.jsonl"))]
COPY_EVERY, LEAK_EVERY = 200, 2_000  # so that the audit has something to find


def source_text() -> str:
    """Return a few MB of the samples' sentences, shuffled."""
    lines = (SAMPLES / "medchatzh/MedChatZH_train.json").read_text(encoding="utf-8").splitlines()
    lines += (SAMPLES / "huatuo_encyclopedia_qa/train_datasets.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = sorted(
        {part + "。" for line in lines for part in line.split("。") if part.isprintable() and '"' not in part}
    )
    generator, text = random.Random(1), []
    for _ in range(400):
        generator.shuffle(sentences)
        text += sentences
    return "".join(text)


def make_corpora(folder: Path, scale: float) -> None:
    """Write every raw file."""
    text, generator = source_text(), random.Random(42)

    def take(mean: int) -> str:
        length = int(generator.expovariate(1 / (mean * 0.75)) + mean * 0.25) + 1
        start = generator.randrange(len(text) - length)
        return text[start : start + length]

    asked: list[str] = []
    for name in sorted(SIZES, key=lambda name: "test" not in name and "valid" not in name):  # tests first: they leak
        count, question_length, answer_length = SIZES[name]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        is_test = "test" in name or "valid" in name

        def pair(number: int, question_length=question_length, answer_length=answer_length, is_test=is_test):
            question, answer = take(question_length), take(answer_length)
            if is_test:
                asked.append(question)
            elif number % LEAK_EVERY == 0:
                question = generator.choice(asked)
            return question, answer

        with (folder / name).open("wb") as file:
            file.writelines(raw_lines(name.split("/")[0], max(1, int(count * scale)), pair))


def raw_lines(corpus: str, count: int, pair) -> Iterator[bytes]:
    """Yield the bytes of one raw file in its corpus's layout; every COPY_EVERY-th record is the one before."""
    before = b""
    for number in range(count):
        if number % COPY_EVERY == COPY_EVERY - 1 and corpus != "cmtmedqa":
            yield before
            continue
        question, answer = pair(number)
        if corpus == "medchatzh":
            before = _line({"instruction": question, "input": "", "output": answer})
        elif corpus == "huatuo_encyclopedia_qa":
            before = _line({"questions": [[question, question]], "answers": [answer]})
        elif corpus == "huatuogpt_sft":
            turns = [question, answer, *pair(number + 1)]
            before = _line({"data": [f"{'问答'[at % 2]}：{turn}" for at, turn in enumerate(turns)]})
        elif corpus == "cmtmedqa":
            history = [list(pair(number + 1)) for _ in range(3)]
            record = {
                "id": str(number),
                "cate1": "内科",
                "cate2": "内科",
                "instruction": question,
                "output": answer,
                "history": history,
            }
            indented = json.dumps(record, ensure_ascii=False, indent=4).replace("\n", "\n    ")
            before = f"{',' if number else '['}\n    {indented}{'' if number < count - 1 else chr(10) + ']'}".encode()
        else:
            rows = [
                f"内科\t{int(at == number % 5)}\t{number}\t{question}\t{pair(1)[1] if at else answer}\n"
                for at in range(5)
            ]
            before = "".join(rows).encode()
        yield before


def _line(record: dict[str, Any]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


FLOOR = """
import sys, orjson
for name in sys.argv[2:]:
    with open(name, "rb") as source, open(sys.argv[1], "wb") as target:
        for line in source:
            target.write(orjson.dumps(orjson.loads(line), option=orjson.OPT_APPEND_NEWLINE))
"""
DATASETS = """
import sys, datasets
datasets.disable_progress_bars()
def convert(record):
    return {"instruction": record["instruction"].strip(), "input": record["input"].strip(), "output": record["output"].strip()}
data = datasets.load_dataset("json", data_files=sys.argv[2], split="train", cache_dir=sys.argv[3])
data.map(convert).to_json(sys.argv[1], force_ascii=False)
"""
JSON = """
import sys, json
with open(sys.argv[2], encoding="utf-8") as source:
    array = source.read(1) == "["
    source.seek(0)
    records = json.load(source) if array else [json.loads(line) for line in source]
kept = []
for record in records:
    kept.append({"instruction": record["instruction"].strip(), "input": "", "output": record["output"].strip()})
    if "history" in record:
        kept[-1]["history"] = [[user.strip(), doctor.strip()] for user, doctor in record["history"]]
with open(sys.argv[1], "w", encoding="utf-8") as target:
    json.dump(kept, target, ensure_ascii=False)
"""


class Outcome(NamedTuple):
    """What a command took: seconds, processor seconds and peak MB, all its processes together."""

    seconds: float
    processor: float
    memory: float


def measure(words: list[Any]) -> Outcome:
    """Run a command. Its failure ends the benchmark."""
    peak, ended = [0.0], threading.Event()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def watch() -> None:
        while not ended.wait(0.1):
            try:
                root = psutil.Process(process.pid)
                peak[0] = max(peak[0], sum(map(memory_of, [root, *root.children(recursive=True)])) / 2**20)
            except psutil.Error:  # it just ended
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, words[:4]))} ended with {process.returncode}:\n{output[-3000:]}")
    return Outcome(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak[0])


def memory_of(process: psutil.Process) -> int:
    """Return a process's bytes in memory, its share of those that it shares."""
    full = process.memory_full_info()
    return getattr(full, "pss", full.rss)


def take_turns(commands: dict[str, list[Any]], repeat: int, clear: list[Path]) -> dict[str, Outcome]:
    """Run each command `repeat` times, in turns, without what an earlier one left; return the fastest turn of each."""
    turns: dict[str, list[Outcome]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, words in commands.items():
            for path in clear:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            turns[name].append(measure(words))
    best = {name: min(outcomes, key=lambda outcome: outcome.seconds) for name, outcomes in turns.items()}
    return {name: best[name]._replace(memory=max(turn.memory for turn in turns[name])) for name in commands}


def print_table(title: str, last: str, rows: list[tuple[str, Outcome, float | None, str]]) -> None:
    """Print outcomes as Markdown; the third of a row is its MB, the fourth the last column."""
    print(
        f"\n| {title} | seconds | processor seconds | MB a second | peak memory, MB | {last} |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, (seconds, processor, memory), size, text in rows:
        speed = f"{size / seconds:.0f}" if size else ""
        print(f"| {name} | {seconds:.1f} | {processor:.1f} | {speed} | {memory:.0f} | {text} |", flush=True)


def convert_against_the_floor(raw: Path, out: Path, convert: list[Any], repeat: int) -> None:
    """The floor over the JSON lines corpora, convert over the same, and convert over all."""
    sizes = {name: (raw / name).stat().st_size / 1e6 for name in SIZES}
    lines_size, all_size = sum(sizes[name] for name in JSON_LINES), sum(sizes.values())
    same = ["medchatzh_train", "huatuo_encyclopedia_train", "huatuogpt_sft_train"]
    floor = "floor: read, orjson, write"
    commands = {floor: [sys.executable, "-c", FLOOR, out / "floor.jsonl", *(raw / name for name in JSON_LINES)]}
    for workers in (1, 2):
        times = f"{workers} worker{'s' * (workers > 1)}"
        commands[f"medasst convert, the same, {times}"] = [*convert, *same, "--workers", workers]
        commands[f"medasst convert, all corpora, {times}"] = [*convert, "--workers", workers]
    outcomes = take_turns(commands, repeat, [out / "data", out / "floor.jsonl"])
    rows = []
    for name, outcome in outcomes.items():
        size = all_size if "all corpora" in name else lines_size
        share = (size / outcome.seconds) / (lines_size / outcomes[floor].seconds)
        rows.append((name, outcome, size, f"{share:.2f}"))
    print_table(f"the three JSON lines corpora, {lines_size:.0f} MB; all {all_size:.0f} MB", "of the floor", rows)


def convert_against_others(raw: Path, out: Path, convert: list[Any], repeat: int) -> None:
    """Convert against what people write instead, each over a corpus that it can read."""
    for corpus, dataset, others, turns in (
        # the first takes a minute, and is far off
        (
            "medchatzh/MedChatZH_train.json",
            "medchatzh_train",
            {"datasets: load_dataset, map, to_json": DATASETS, "json.loads a line, json.dump": JSON},
            1,
        ),
        ("cmtmedqa/CMtMedQA.json", "cmtmedqa_train", {"json.load, json.dump": JSON}, repeat),
    ):
        commands = {
            name: [sys.executable, "-c", code, out / "theirs.json", raw / corpus, out / "cache"]
            for name, code in others.items()
        }
        for workers in (1, 2):
            name = f"medasst convert, {workers} worker{'s' * (workers > 1)}"
            commands[name] = [*convert, dataset, "--workers", workers]
        outcomes = take_turns(commands, turns, [out / "data", out / "theirs.json", out / "cache"])
        size = (raw / corpus).stat().st_size / 1e6
        rows = []
        for name, outcome in outcomes.items():
            faster = [f"{outcomes[other].seconds / outcome.seconds:.1f}x" for other in others]
            rows.append((name, outcome, size, ", ".join(faster)))
        print_table(
            f"{dataset}, {size:.0f} MB", f"faster than {' and '.join(name.split(':')[0] for name in others)}", rows
        )


def audit(out: Path, medasst: list[Any], convert: list[Any]) -> None:
    """The audit of all corpora, once."""
    subprocess.run([*convert, "--workers", "2"], check=True, capture_output=True)
    outcome = measure([*medasst, "audit", "--data-dir", out / "data", "--workers", 2])
    records = sum(
        entry["n"] for entry in json.loads((out / "data/audit.json").read_text(encoding="utf-8"))["datasets"].values()
    )
    print_table(
        "all corpora",
        "records a second",
        [("medasst audit, 2 workers", outcome, None, f"{records / outcome.seconds:,.0f}")],
    )
    print(f"\n{records:,} records")


def main() -> None:
    """Make the corpora in a temporary folder and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the paper's records (1.0)")
    parser.add_argument("--repeat", type=int, default=3, help="turns of each conversion; the fastest counts (3)")
    parser.add_argument("--folder", type=Path, help="where to make them: about 9 GB at scale 1, removed at the end")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("orjson", "datasets", "datasketch"))
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}, scale {args.scale}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "out"
        out.mkdir()
        make_corpora(raw, args.scale)
        medasst = [sys.executable, "-m", "medasst_tools.cli"]
        convert = [*medasst, "convert", "--raw-dir", raw, "--out-dir", out / "data"]
        convert_against_the_floor(raw, out, convert, args.repeat)
        convert_against_others(raw, out, convert, args.repeat)
        audit(out, medasst, convert)


if __name__ == "__main__":
    main()
