"""Answer the test set through LLaMA-Factory's own prediction, in parts of like length: sooner done, and resumed after a kill.

Run: `medasst generate factory_configs/demo/predict.yaml [key=value ...]`, which `make predict` calls. The outcome is what
`llamafactory-cli train factory_configs/demo/predict.yaml` writes: generated_predictions.jsonl in the test sets' order, and
predict_results.json.

LLaMA-Factory predicts in file order, pads each batch to its longest prompt, keeps one batch size that must suit the
longest of all, and writes nothing until the last answer. So the records are sorted by length and cut into parts; each
part is one LLaMA-Factory prediction, on a GPU with as many records a batch as the padded tokens that the config allows for
its longest prompt, in a process that imports LLaMA-Factory once; finished parts stay. Greedy answers don't depend on the batch
but for rounding (docs/runs.md).
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import atomic_writer, model_sha256, read_jsonl, sha256_of, write_json
from medasst_tools.machine import preflight
from medasst_tools.run_manifest import check_and_print
from medasst_tools.training.launch import count_gpus
from medasst_tools.training.train import NEUTRAL_SETTINGS, dataset_file, load_config, locked

PART_SIZE = 256  # records: minutes of a 7B model, which is what a kill can cost, against seconds to load it again
LIKE = 0.5  # so that padding at most doubles a batch, for a handful of parts more
CONTEXT = multiprocessing.get_context("spawn")  # importing LLaMA-Factory touches the GPU, which a fork doesn't survive
WORK = ".predicting"
PREDICTIONS, RESULTS, ABOUT = "generated_predictions.jsonl", "predict_results.json", "predictions.json"
BESIDE_THE_TEXT = 64  # tokens of system prompt and template, roughly
# LLaMA-Factory's defaults
DEFAULTS = {"cutoff_len": 2048, "max_new_tokens": 1024, "per_device_eval_batch_size": 8}
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class Record(NamedTuple):
    """One test record: its place in the predictions, its dataset, its line, and about how many tokens its prompt has."""

    place: int
    dataset: str
    line: bytes
    length: int


class Part(NamedTuple):
    """Records that one LLaMA-Factory prediction answers, in the order in which it is given them."""

    number: int
    records: list[Record]

    @property
    def longest(self) -> int:
        """About how many tokens the longest prompt has."""
        return max(record.length for record in self.records)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("config", type=Path, help="factory_configs/<experiment>/predict.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for LLaMA-Factory, over what the file says")
    parser.add_argument(
        "--part-size", type=int, default=PART_SIZE, help=f"records that a kill can cost at most ({PART_SIZE})"
    )
    parser.add_argument("--workers", type=int, help="processes (one a GPU, without GPUs one)")


def run(args: argparse.Namespace) -> None:
    """Answer what isn't answered yet and write the predictions."""
    for option in ("part_size", "workers"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}, must be 1 or more")
    required = ("output_dir", "eval_dataset", "dataset_dir", "model_name_or_path", "template", "do_predict")
    config = load_config(args.config, args.overrides, "predict.yaml", required)
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if str(config.get(key, "")).startswith("saves/") and not Path(config[key]).is_dir():
            raise UserError(
                f"{args.config}: no {config[key]}; `make train EXPERIMENT={Path(config[key]).name}` makes it"
            )
    preflight.require(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the workers are ended with it
    started, out = time.monotonic(), Path(config["output_dir"])
    about = {"run": check_and_print(config, args.config), "inputs": predict_inputs(config, args.part_size)}
    with locked(out, "written"):
        parts = cut_into_parts(read_records(config), args.part_size)
        answer_parts(parts, config, out / WORK, about["inputs"], args.workers)
        join_parts(parts, out, about | {"seconds": round(time.monotonic() - started, 1)})


def predict_inputs(config: dict[str, Any], part_size: int) -> dict[str, Any]:
    """Return what the answers depend on: finished parts of anything else are not used."""
    neutral = NEUTRAL_SETTINGS | {"per_device_eval_batch_size"}
    datasets = config["eval_dataset"].split(",")
    models = [config[key] for key in ("model_name_or_path", "adapter_name_or_path") if config.get(key)]
    return {
        "config": {key: value for key, value in sorted(config.items()) if key not in neutral},
        "data": {name: sha256_of(dataset_file(Path(config["dataset_dir"]), name)) for name in datasets},
        "models": {model: model_sha256(Path(model)) for model in models},
        "part_size": part_size,
        "packages": {name: metadata.version(name) for name in ("llamafactory", "torch", "transformers")},
    }


def read_records(config: dict[str, Any]) -> Iterator[Record]:
    """Yield the test sets' records in the order in which LLaMA-Factory predicts them."""
    place = 0
    for name in config["eval_dataset"].split(","):
        path = dataset_file(Path(config["dataset_dir"]), name)
        if path.suffix != ".jsonl":
            raise UserError(
                f"{path} is no .jsonl and can't be cut into parts; `llamafactory-cli train` predicts it in one"
            )
        with path.open("rb") as lines:
            for number, line in enumerate(filter(bytes.strip, lines)):
                if number == config.get("max_samples"):
                    break
                yield Record(place, name, line.rstrip(b"\r\n"), _prompt_length(line, path, number + 1))
                place += 1


def _prompt_length(line: bytes, path: Path, number: int) -> int:
    try:
        record = json.loads(line)
        turns = [text for pair in record.get("history") or [] for text in pair]
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}, line {number} is damaged; run `medasst convert` again") from None
    texts = [*turns, record.get("instruction"), record.get("input")]
    return BESIDE_THE_TEXT + sum(len(text or "") for text in texts)  # a Chinese character is about a token


def cut_into_parts(records: Iterator[Record], size: int) -> list[Part]:
    """Return parts of like length, the longest first: what doesn't fit the memory shows at once, not after hours.

    A part ends after `size` records, or where a prompt is less than LIKE of the part's longest, to which it would be padded.
    Inside a part the records are grouped by dataset, as LLaMA-Factory reads them.
    """
    ordered = sorted(records, key=lambda record: -record.length)
    chunks: list[list[Record]] = []
    for record in ordered:
        if not chunks or len(chunks[-1]) == size or record.length < LIKE * chunks[-1][0].length:
            chunks.append([])
        chunks[-1].append(record)
    order = {name: at for at, name in enumerate(dict.fromkeys(r.dataset for r in sorted(ordered)))}
    return [
        Part(number, sorted(chunk, key=lambda record: order[record.dataset])) for number, chunk in enumerate(chunks)
    ]


# ---- the parts ------------------------------------------------------------------------------------------------------
def answer_parts(
    parts: list[Part], config: dict[str, Any], work: Path, inputs: dict[str, Any], workers: int | None
) -> None:
    """Have every part answered that isn't: each has its finished folder in `work` then."""
    from tqdm import tqdm

    plan = work / "plan.json"
    if not plan.is_file() or json.loads(plan.read_text(encoding="utf-8")) != inputs:
        shutil.rmtree(work, ignore_errors=True)
        write_json(plan, inputs)
    pending = [part for part in parts if not _done(work, part).is_dir()]
    total = sum(len(part.records) for part in parts)
    answered = total - sum(len(part.records) for part in pending)
    if answered:
        print(
            f"{work}: going on after {answered} of {total} answers ({len(parts) - len(pending)} of {len(parts)} parts)"
        )
    if not pending:
        return
    print(
        f"{total - answered} records in {len(pending)} parts of like length; LLaMA-Factory's own output: {work}/*.log"
    )
    with tqdm(total=total, initial=answered, desc="generate", unit="record", disable=None) as bar:
        for part in Crew(config, work, _devices(config, workers, len(pending))).answer(pending):
            bar.update(len(part.records))


def _done(work: Path, part: Part) -> Path:
    return work / f"part-{part.number:04}"


def _devices(config: dict[str, Any], workers: int | None, parts: int) -> list[dict[str, str]]:
    """Return each worker's environment: a GPU of its own, or its share of the cores."""
    gpus = 0 if config.get("use_cpu") else count_gpus(os.environ)
    count = min(workers or max(gpus, 1), parts)
    if gpus:
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return [{"CUDA_VISIBLE_DEVICES": names[number % gpus].strip()} for number in range(count)]
    threads = max(1, (os.cpu_count() or 1) // count)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))} for _ in range(count)]


class Crew:
    """Processes that answer parts; one that runs out of memory is replaced, and all batches are halved."""

    def __init__(self, config: dict[str, Any], work: Path, devices: list[dict[str, str]]):
        """Start no process yet."""
        settings = DEFAULTS | {key: value for key, value in config.items() if value is not None}
        self.config, self.work, self.devices = config, work, devices
        self.cutoff, self.new_tokens = settings["cutoff_len"], settings["max_new_tokens"]
        self.batch = settings["per_device_eval_batch_size"]
        # what the config lets a batch of the longest prompts have: padded prompts and answers
        self.budget = self.batch * (self.cutoff + self.new_tokens)
        self.on_gpu = "CUDA_VISIBLE_DEVICES" in devices[0]

    def batch_size(self, part: Part) -> int:
        """Return how many of the part's records go at once: on a GPU all that fit the budget; more is no faster on a CPU."""
        most = len(part.records) if self.on_gpu else min(self.batch, len(part.records))
        return max(1, min(most, self.budget // self._tokens(part)))

    def _tokens(self, part: Part) -> int:
        return min(part.longest, self.cutoff) + self.new_tokens

    def answer(self, pending: list[Part]) -> Iterator[Part]:
        """Yield each part when it is answered."""
        pending, working = pending[::-1], {}
        with contextlib.ExitStack() as crew:
            for number in range(len(self.devices)):
                self._give(pending.pop(), number, working, crew)
            while working:
                for connection in wait(list(working)):
                    number, process, part, batch = working.pop(connection)
                    word = _receive(connection, process)
                    if word == "done":
                        yield part
                        if pending:
                            self._give(pending.pop(), number, working, crew, process, connection)
                        continue
                    if word != "memory":
                        raise CheckFailed(
                            f"LLaMA-Factory ended while it answered part {part.number}: {word}; "
                            f"see {self.work}/worker-{number}.log; the same command goes on"
                        )
                    self._halve(part, batch)
                    self._give(part, number, working, crew)

    def _give(self, part: Part, number: int, working: dict, crew: contextlib.ExitStack, process=None, connection=None):
        if process is None:
            connection, theirs = CONTEXT.Pipe()
            environment = self.devices[number] | {"HF_DATASETS_CACHE": str(self.work / f"cache-{number}")}
            log = self.work / f"worker-{number}.log"
            process = CONTEXT.Process(target=work_on_parts, args=(theirs, environment, log), daemon=True)
            process.start()
            theirs.close()
            crew.callback(process.join)
            crew.callback(process.terminate)
        batch = self.batch_size(part)
        with contextlib.suppress(BrokenPipeError):  # it died: the next wait says so
            connection.send((part_config(self.config, part, self.work, batch), _done(self.work, part)))
        working[connection] = (number, process, part, batch)

    def _halve(self, part: Part, batch: int) -> None:
        if batch == 1:
            raise CheckFailed(
                f"the memory doesn't suffice for one record of about {part.longest} tokens; lower cutoff_len"
            )
        self.budget = min(self.budget, batch // 2 * self._tokens(part))
        print(f"\nout of memory with {batch} records of about {part.longest} tokens: going on with {batch // 2}")


def _receive(connection: Connection, process) -> str:
    """Return a worker's word, or what its end says: the system kills who takes too much memory."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return "memory" if process.exitcode == -signal.SIGKILL else f"status {process.exitcode}"


def part_config(config: dict[str, Any], part: Part, work: Path, batch_size: int) -> dict[str, Any]:
    """Write the part as a dataset_dir, its datasets described as they are in the whole, and return its predict config."""
    folder = work / f"data-{part.number:04}"
    info = json.loads((Path(config["dataset_dir"]) / "dataset_info.json").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(record.dataset for record in part.records))
    for name in names:
        with atomic_writer(folder / f"{name}.jsonl") as file:
            file.writelines(record.line + b"\n" for record in part.records if record.dataset == name)
    write_json(folder / "dataset_info.json", {name: info[name] | {"file_name": f"{name}.jsonl"} for name in names})
    changed = {
        "dataset_dir": str(folder),
        "eval_dataset": ",".join(names),
        "per_device_eval_batch_size": batch_size,
        "preprocessing_num_workers": None,
        "max_samples": None,
    }
    return config | changed


def work_on_parts(connection: Connection, environment: dict[str, str], log: Path) -> None:
    """Answer one part after the other in this process, until nobody gives any more."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who gives the parts ends this process
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from llamafactory.train.tuner import run_exp

    while True:
        try:
            config, finished = connection.recv()
        except EOFError:
            return
        # of its own: the worker of a killed command may still be at the same part
        running = Path(f"{finished.parent / finished.name.replace('part', 'running')}-{os.getpid()}")
        try:
            run_exp(config | {"output_dir": str(running)})
        except Exception as error:
            if not is_out_of_memory(error):
                connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
                raise
            connection.send("memory")
            sys.exit(1)
        if finished.is_dir():
            shutil.rmtree(running)
        else:
            running.rename(finished)
        connection.send("done")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU's or the machine's memory was too small."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS)


# ---- the whole ------------------------------------------------------------------------------------------------------
def join_parts(parts: list[Part], out: Path, about: dict[str, Any]) -> None:
    """Write the predictions in the test sets' order, then the results over all, and remove the parts."""
    answers, results = {}, []
    for part in parts:
        folder = _done(out / WORK, part)
        rows = list(read_jsonl(folder / PREDICTIONS))
        if len(rows) != len(part.records):
            shutil.rmtree(folder)
            raise CheckFailed(
                f"LLaMA-Factory answered {len(rows)} of the {len(part.records)} records of part {part.number}: it drops "
                "records without a question or an answer; run `medasst convert` again"
            )
        answers |= {record.place: row for record, row in zip(part.records, rows, strict=True)}
        results.append((len(rows), json.loads((folder / RESULTS).read_text(encoding="utf-8"))))
    with atomic_writer(out / PREDICTIONS) as file:  # as LLaMA-Factory writes a line
        file.writelines(json.dumps(answers[at], ensure_ascii=False).encode() + b"\n" for at in range(len(answers)))
    write_json(out / RESULTS, whole_results(results))
    about |= {"n": len(answers), "parts": len(parts), "predictions": sha256_of(out / PREDICTIONS)}
    write_json(out / ABOUT, about)
    shutil.rmtree(out / WORK)
    print(f"{out / PREDICTIONS}: {len(answers)} answers in {about['seconds']:.0f} s")


def whole_results(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return LLaMA-Factory's own results over all parts: scores are means over records, seconds add up."""
    n = sum(size for size, _ in parts)
    whole = {}
    for key in sorted({key for _, results in parts for key in results}):
        if key.endswith(("_runtime", "_time")):
            whole[key] = sum(results.get(key, 0.0) for _, results in parts)
        elif not key.endswith("_per_second"):
            whole[key] = sum(size * results[key] for size, results in parts) / n
    whole["predict_samples_per_second"] = round(n / whole["predict_runtime"], 3)
    return whole
