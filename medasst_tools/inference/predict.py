"""Answer the dialogue test sets of a predict.yaml, here through LLaMA-Factory or through an OpenAI-style endpoint.

Run: `medasst predict factory_configs/demo/predict.yaml [--api-base URL] [key=value ...]`, which `make predict` calls. The
outcome is `generated_predictions.jsonl` as `llamafactory-cli train predict.yaml` writes it, in the test sets' order, and
`predictions.json`, which says what it was made of.

LLaMA-Factory predicts in file order, pads each batch to its longest prompt, keeps one batch size that must suit the
longest of all, and writes nothing until the last answer. Here its own prediction is given the records in batches of like
length, on a GPU as many at once as the config allows tokens, and each answer is kept as it comes. Greedy answers don't
depend on the batch but for rounding (docs/runs.md).
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from medasst_tools import console, provenance
from medasst_tools.config import known_settings, load
from medasst_tools.errors import CheckFailed
from medasst_tools.files import atomic_writer, locked, read_jsonl, write_json
from medasst_tools.inference.answers import AnswerStore
from medasst_tools.machine import hardware, preflight

PREDICTIONS, RECORD = "generated_predictions.jsonl", "predictions.json"
# Of a config they say which records are asked, not how one is asked.
WHICH_RECORDS = ("eval_dataset", "max_samples", "preprocessing_num_workers", "dataset")
CONTEXT = multiprocessing.get_context("spawn")  # importing LLaMA-Factory touches the GPU, which a fork doesn't survive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    preflight.add_config_arguments(parser, "predict")
    parser.add_argument("--workers", type=int, help="processes (one a GPU, without GPUs one)")
    endpoint = parser.add_argument_group("through an endpoint; the key comes from API_KEY or OPENAI_API_KEY")
    endpoint.add_argument("--api-base", metavar="URL", help="such as http://127.0.0.1:8000/v1")
    endpoint.add_argument("--model", help="the endpoint's name of the model (the only one it has)")
    endpoint.add_argument("--concurrency", type=int, default=16, help="requests at once (16)")
    endpoint.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer (600)")
    endpoint.add_argument(
        "--empty-if-refused",
        action="store_true",
        help="an empty answer, which scores 0, where the endpoint refuses a record (too long for the model, say)",
    )


def run(args: argparse.Namespace) -> None:
    """Answer what isn't answered yet and write the predictions."""
    config = load(args.config, args.overrides, "predict")
    out = Path(config["output_dir"])
    run_of_model = provenance.check_model(config, args.config)
    about = made_of(config)
    if args.api_base:
        from medasst_tools.inference import endpoint

        about["settings"] |= endpoint.asked_of(args)
    if provenance.up_to_date(out / RECORD, about):
        return
    print(provenance.describe(config, run_of_model))
    if not args.api_base:
        preflight.require(config, args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the workers are ended with it
    started = time.monotonic()
    with locked(out.parent / f".{out.name}.predict.lock", f"{out} is being written by another process; wait for it"):
        store = out / "answers" / "predict.jsonl"
        rows, sizes = (
            endpoint.answer(args, config, asked_with(about), store)
            if args.api_base
            else answer_here(config, asked_with(about), store, args.workers)
        )
        write_predictions(out, rows, sizes, about, time.monotonic() - started)


def made_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the predictions depend on."""
    return provenance.made_of(
        provenance.settings_that_matter(config),
        provenance.data_hashes(config, "eval_dataset"),
        provenance.model_identity(config),
    )


def asked_with(about: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a prediction's `made_of` that every answer depends on: the model, and how it is asked."""
    settings = {key: value for key, value in about["settings"].items() if key not in WHICH_RECORDS}
    return {"model": about["model"], "settings": settings}


def write_predictions(
    out: Path, rows: list[dict[str, str]], sizes: dict[str, int], about: dict[str, Any], seconds: float
) -> None:
    """Write the predictions in the test sets' order and, last, their record; sizes: records of each dataset, in that order."""
    with atomic_writer(out / PREDICTIONS) as file:  # as LLaMA-Factory writes a line
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    more = {"n": len(rows), "datasets": sizes, "seconds": round(seconds, 1)} | hardware.made_with()
    write_json(out / RECORD, provenance.record(out / RECORD, about, [out / PREDICTIONS]) | more)
    print(f"{out / PREDICTIONS}: {len(rows)} answers in {seconds:.0f} s")


# ---- through LLaMA-Factory ------------------------------------------------------------------------------------------
def answer_here(
    config: dict[str, Any], asked: dict[str, Any], store: Path, workers: int | None
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Return the answers of LLaMA-Factory's own prediction, in order, and each dataset's size; each is kept as it comes."""
    devices = _devices(config, workers)
    if len(devices) > 1:
        crew = [
            CONTEXT.Process(target=_work, args=(config, asked, store, at, devices), daemon=True)
            for at in range(len(devices))
        ]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
        if failed := [process.exitcode for process in crew if process.exitcode]:
            raise CheckFailed(f"a process that predicted ended with status {failed[0]}; the same command goes on")
    else:
        os.environ.update(devices[0])
    rows, sizes = predict_share(config, asked, store, 0, 1)
    if len(rows) != sum(sizes.values()):
        raise CheckFailed(f"{sum(sizes.values()) - len(rows)} records have no answer; the same command goes on")
    return rows, sizes


def _devices(config: dict[str, Any], workers: int | None) -> list[dict[str, str]]:
    """Return each worker's environment: a GPU of its own, or its share of the cores."""
    gpus = [] if config.get("use_cpu") else hardware.gpus()
    count = workers or max(len(gpus), 1)
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)].visible_as} for number in range(count)]
    threads = max(1, (os.cpu_count() or 1) // count)
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))} for _ in range(count)]


def _work(
    config: dict[str, Any], asked: dict[str, Any], store: Path, number: int, devices: list[dict[str, str]]
) -> None:
    os.environ.update(devices[number])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    predict_share(config, asked, store.with_name(f"{store.stem}-{number}{store.suffix}"), number, len(devices))


def predict_share(
    config: dict[str, Any], asked: dict[str, Any], store: Path, number: int, of: int
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Let LLaMA-Factory's workflow answer every `of`-th batch, from `number` on; return all answers there are, and sizes.

    The workflow is called as `llamafactory-cli train` calls it, but its trainer keeps answers, and gets the test sets one
    by one, so that their sizes are known.
    """
    store.parent.mkdir(parents=True, exist_ok=True)
    log = store.parent.parent / "predict.log"
    with (
        tempfile.TemporaryDirectory(prefix=".predicting-", dir=store.parent) as folder,
        console.logged(log) as terminal,
    ):
        from llamafactory.train import tuner
        from llamafactory.train.sft import workflow

        settings = {key: setting.default for key, setting in known_settings().items()}
        settings |= {key: value for key, value in config.items() if value is not None}
        share = Share(settings, asked, AnswerStore(store), number, of, terminal)
        changed = dict.fromkeys(("overwrite_output_dir", "eval_on_each_dataset", "disable_tqdm"), True)
        theirs = workflow.CustomSeq2SeqTrainer
        try:
            workflow.CustomSeq2SeqTrainer = keeping_trainer(theirs, share)
            tuner.run_exp(config | changed | {"output_dir": folder})
        finally:
            workflow.CustomSeq2SeqTrainer = theirs
    return share.rows, share.sizes


@dataclass
class Share:
    """What one process answers: every `of`-th batch from `number` on, and what came of it."""

    settings: dict[str, Any]
    asked: dict[str, Any]
    answers: AnswerStore
    number: int
    of: int
    terminal: TextIO
    rows: list[dict[str, str]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)

    def batches(self, lengths: dict[int, int], on_gpu: bool) -> list[list[int]]:
        """Return this share's batches of like length, the longest first: what doesn't fit the memory shows at once.

        lengths: {record: tokens of its prompt}. On a GPU as many go at once as the budget has tokens for; more than the
        config's batch is no faster on a CPU.
        """
        batch, new_tokens = self.settings["per_device_eval_batch_size"], self.settings["max_new_tokens"]
        # what the config lets a batch of the longest prompts have: padded prompts and answers
        budget = batch * (self.settings["cutoff_len"] + new_tokens)
        batches: list[list[int]] = []
        for at in sorted(lengths, key=lambda at: -lengths[at]):
            most = budget // (lengths[batches[-1][0]] + new_tokens) if batches and on_gpu else batch
            if not batches or len(batches[-1]) >= max(1, most):
                batches.append([])
            batches[-1].append(at)
        return batches[self.number :: self.of]


def keeping_trainer(theirs: Any, share: Share) -> type:
    """Return LLaMA-Factory's trainer class, with a prediction that takes batches of like length and keeps each answer."""

    class KeepingTrainer(theirs):
        """LLaMA-Factory's trainer; only the order of the records, and what happens to an answer, are ours."""

        def predict(self, test_dataset, **kwargs):
            """Answer what the store hasn't got of {name: records}, and note all answers in the records' order."""
            from datasets import concatenate_datasets
            from transformers.trainer_utils import PredictionOutput

            self.compute_metrics = None  # `medasst score` scores, once
            share.sizes = {name: len(records) for name, records in test_dataset.items()}
            records = concatenate_datasets(list(test_dataset.values()))
            keys = [AnswerStore.key(share.asked, row["input_ids"], row["labels"]) for row in records]
            lengths = {at: len(ids) for at, ids in enumerate(records["input_ids"]) if keys[at] not in share.answers}
            if lengths and len(lengths) < len(keys):
                print(f"going on: {len(keys) - len(lengths)} of {len(keys)} answers are there", file=share.terminal)
            batches = share.batches(lengths, self.args.n_gpu > 0)
            bar = console.bar(share.terminal, total=sum(map(len, batches)), desc="predict", unit="answer")
            with share.answers, bar:
                while batches:
                    batch = batches[0]
                    try:
                        rows = self._rows(records.select(batch), kwargs)
                    except (RuntimeError, MemoryError) as error:
                        batches = halved(error, batches)
                        less = f"going on with {len(batches[0])}"
                        print(f"out of memory with {len(batch)} records: {less}", file=share.terminal)
                        continue
                    for at, row in zip(batch, rows, strict=True):
                        share.answers.keep(keys[at], row)
                    bar.update(len(batch))
                    batches = batches[1:]
            share.rows = [share.answers[key] for key in keys if key in share.answers]
            return PredictionOutput(None, None, {"predict_samples": len(keys)})

        def _rows(self, chosen, kwargs: dict[str, Any]) -> list[dict[str, str]]:
            self.args.per_device_eval_batch_size = len(chosen)
            super().save_predictions(chosen, super().predict(chosen, **kwargs), share.settings["skip_special_tokens"])
            return list(read_jsonl(Path(self.args.output_dir, PREDICTIONS)))

        def save_predictions(self, *_: Any) -> None:
            """Nothing: the answers are kept already."""

    return KeepingTrainer


def halved(error: Exception, batches: list[list[int]]) -> list[list[int]]:
    """Return the batches cut in halves after an error for want of memory; any other is raised again."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
        raise error
    if len(batches[0]) == 1:
        raise CheckFailed("the memory doesn't suffice for one record; lower cutoff_len or max_new_tokens") from None
    clear_device_cache()
    half = (len(batches[0]) + 1) // 2
    return [batch[at : at + half] for batch in batches for at in range(0, len(batch), half)]
