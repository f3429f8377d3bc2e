"""Answer test sets through any OpenAI-style endpoint, many requests at once, into a file that `medasst score` reads.

Run: `medasst predict factory_configs/demo/predict.yaml --api-base http://127.0.0.1:8000/v1`, which `make predict
BACKEND=api API_BASE=...` calls, or without a config: `medasst predict --api-base URL --data-dir DIR --datasets a,b
--out FILE`. The key comes from API_KEY or OPENAI_API_KEY and is written nowhere.

Greedy, and asked as LLaMA-Factory asks in `predict_with_generate`: the same system prompt, turns and length, so that the
same model gives the same answers. Retries are the openai client's: on 429, 5xx, timeouts and lost connections, waiting
longer each time or as Retry-After says. Each answer is kept as it comes, under the sha256 of what was asked: a killed run
goes on, and what has changed since is asked anew.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import yaml

from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import atomic_writer, model_sha256

RETRIES = 10  # waits of 0.5, 1, 2, 4, then 8 seconds: an endpoint that restarts has a minute

MAX_TOKENS = 512


class Record(NamedTuple):
    """A test record as it is asked: its place, its messages, its reference and the key of its answer."""

    place: str
    messages: list[dict[str, str]]
    reference: str
    key: str


class Job(NamedTuple):
    """What is to be asked and written."""

    test_sets: list[Path]
    out: Path
    system: str | None
    max_tokens: int
    weights: list[str | None]  # sha256, where they are on this machine: weights trained anew are asked anew
    template: str | None


class Answers:
    """The answers so far, in memory and in a partial file that outlives a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, str] = {}
        if path.is_file():
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the line that a kill cut
                    row = orjson.loads(line)
                    self.by_key[row["key"]] = row["predict"]

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[str, str | None], None]]:
        """Yield a function that keeps an answer."""
        with atomic_writer(self.path) as file:  # without the cut line, or the next would be glued to it
            file.writelines(_line(key, predict) for key, predict in self.by_key.items())
        with self.path.open("ab", buffering=0) as file:

            def keep(key: str, predict: str | None) -> None:
                if predict is None:
                    raise ValueError("an answer without text is none")
                self.by_key[key] = predict
                file.write(_line(key, predict))

            yield keep


def _line(key: str, predict: str) -> bytes:
    return orjson.dumps({"key": key, "predict": predict}, option=orjson.OPT_APPEND_NEWLINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "predict_config", type=Path, nargs="?", help="factory_configs/<experiment>/predict.yaml, for all that follows"
    )
    parser.add_argument("--api-base", required=True, metavar="URL", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--data-dir", type=Path, help="a folder that `medasst convert` wrote")
    parser.add_argument("--datasets", nargs="+", metavar="A,B", help="test sets, in the order of the answers")
    parser.add_argument("--out", type=Path, help="generated_predictions.jsonl to write")
    parser.add_argument("--model", help="the endpoint's name of the model (the only one it has)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max-tokens", type=int, help=f"length of an answer ({MAX_TOKENS})")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at once (16)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer (600)")
    parser.add_argument(
        "--empty-if-refused",
        action="store_true",
        help="an empty answer, which scores 0, where the endpoint refuses a record (too long for the model, say)",
    )


def run(args: argparse.Namespace) -> None:
    """Ask what isn't answered yet and write the file."""
    job = job_of(args)
    key = os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")
    model = asyncio.run(_model(args.api_base, key, args.model))
    asked_of = [args.api_base.rstrip("/"), model, job.weights, job.max_tokens]
    records = list(test_records(job.test_sets, job.system, asked_of))
    answers = Answers(job.out.with_name(f".{job.out.name}.partial"))
    open_records = {record.key: record for record in records if record.key not in answers.by_key}
    if answers.by_key and open_records:
        print(f"{answers.path}: going on, {len(open_records)} of {len(records)} records are still to be asked")
    refused: dict[str, str] = {}
    if open_records:
        request = {"model": model, "max_tokens": job.max_tokens, "temperature": 0}
        refused = asyncio.run(_ask_all(args, key, request, list(open_records.values()), answers))
    if refused and not args.empty_if_refused:
        place, reason = next(iter(refused.items()))
        raise CheckFailed(
            f"the endpoint refused {len(refused)} of {len(records)} records, first {place}: {reason}; the other answers "
            f"are kept in {answers.path}; --empty-if-refused gives these an empty answer"
        )
    label = label_writer(job.template)
    with atomic_writer(job.out) as file:
        for record in records:
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in record.messages)
            row = {"prompt": prompt, "predict": answers.by_key.get(record.key, ""), "label": label(record.reference)}
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    answers.path.unlink(missing_ok=True)
    print(f"{job.out}: {len(records)} answers of {model}, {len(refused)} refused and left empty")


def job_of(args: argparse.Namespace) -> Job:
    """Return what the options say, else the config; UserError if that isn't enough."""
    if not re.fullmatch(r"https?://[^\s@]+", args.api_base):
        got = "" if "@" in args.api_base else f"; got {args.api_base!r}"
        raise UserError(f"--api-base must be http://HOST/v1 or https://HOST/v1; a key belongs into API_KEY{got}")
    if args.concurrency < 1 or args.timeout <= 0:
        raise UserError("--concurrency must be 1 or more and --timeout above 0")
    config = _read_config(args.predict_config) if args.predict_config else {}
    data_dir = args.data_dir or config.get("dataset_dir")
    datasets = args.datasets or config.get("eval_dataset") or []
    out = args.out or (config.get("output_dir") and Path(config["output_dir"], "generated_predictions.jsonl"))
    max_tokens = args.max_tokens if args.max_tokens is not None else config.get("max_new_tokens", MAX_TOKENS)
    missing = {"--data-dir": data_dir, "--datasets": datasets, "--out": out}
    if absent := [option for option, value in missing.items() if not value]:
        raise UserError(f"{', '.join(absent)} must be given where no predict.yaml says it")
    if not isinstance(max_tokens, int) or max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens!r}, must be 1 or more")
    names = ",".join([datasets] if isinstance(datasets, str) else datasets).split(",")
    folders = [config[key] for key in ("model_name_or_path", "adapter_name_or_path") if config.get(key)]
    return Job(
        find_test_sets(Path(data_dir), names),
        Path(out),
        args.system or config.get("default_system"),
        max_tokens,
        [model_sha256(Path(folder)) for folder in folders],
        config.get("template"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"no {path}; `medasst render` writes the configs of factory_configs/experiments.yaml"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or "eval_dataset" not in config:
        raise UserError(f"{path} says no eval_dataset; is it a predict.yaml?")
    return config


def find_test_sets(data_dir: Path, names: list[str]) -> list[Path]:
    """Return the files of the datasets, in order; UserError names what is missing."""
    try:
        info = json.loads((data_dir / "dataset_info.json").read_text(encoding="utf-8"))
        paths = [data_dir / info[name]["file_name"] for name in names]
    except FileNotFoundError:
        raise UserError(f"no {data_dir}/dataset_info.json; `medasst convert --out-dir {data_dir}` writes it") from None
    except ValueError:
        raise UserError(f"{data_dir}/dataset_info.json is damaged; run `medasst convert` again") from None
    except KeyError as error:
        raise UserError(f"no dataset {error} in {data_dir}/dataset_info.json; there are {', '.join(info)}") from None
    if gone := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{data_dir}/dataset_info.json names {gone[0]}, which isn't there; run `medasst convert` again"
        )
    return paths


def test_records(paths: list[Path], system: str | None, asked_of: list) -> Iterator[Record]:
    """Yield the records in order, as LLaMA-Factory turns Alpaca records into turns."""
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                record = orjson.loads(line)
                turns = [("system", system)] if system else []
                for question, answer in record.get("history", []):
                    turns += [("user", question), ("assistant", answer)]
                turns.append(("user", "\n".join(part for part in (record["instruction"], record["input"]) if part)))
                messages = [{"role": role, "content": content} for role, content in turns]
                key = hashlib.sha256(orjson.dumps([*asked_of, messages])).hexdigest()
                yield Record(f"{path}, line {number}", messages, record["output"], key)


def label_writer(template: str | None) -> Callable[[str], str]:
    """Return how a reference becomes a label: where the template is known, as LLaMA-Factory writes it.

    That is the answer as the template writes it less its marks, which leaves a newline (qwen) or a space (mistral) that
    BLEU-4 counts: with it the same answers have the same scores, whoever predicted them.
    """
    if template is None:
        return lambda reference: reference
    from llamafactory.data.template import TEMPLATES

    if template not in TEMPLATES:
        raise UserError(f"LLaMA-Factory has no template {template!r}; the predict.yaml must name one that it has")
    form = TEMPLATES[template]

    def label(reference: str) -> str:
        text = "".join(part for part in form.format_assistant.apply(content=reference) if isinstance(part, str))
        for mark in form.stop_words:
            text = text.replace(mark, "")
        return text

    return label


def _client(api_base: str, key: str | None, timeout: float, retries: int):
    import openai

    return openai.AsyncOpenAI(base_url=api_base, api_key=key or "none", timeout=timeout, max_retries=retries)


async def _model(api_base: str, key: str | None, wanted: str | None) -> str:
    """Return the model to ask: `wanted`, or the only one that the endpoint lists. UserError if it can't be reached.

    Asked once, without retries: what is wrong from the start shall not take a minute to show.
    """
    import openai

    async with _client(api_base, key, timeout=30, retries=0) as client:
        try:
            names = [model.id async for model in client.models.list()]
        except openai.OpenAIError as error:
            if wanted and isinstance(error, openai.NotFoundError):  # an endpoint without a list
                return wanted
            raise UserError(_explained(error, api_base, key)) from None
        except (AttributeError, TypeError, ValueError):  # a web page, say, which the client doesn't expect
            raise UserError(f"{api_base} lists no models: does --api-base end in /v1?") from None
    if not wanted and len(names) != 1:
        raise UserError(f"{api_base} has {len(names)} models ({', '.join(names[:10])}); name one with --model")
    return wanted or names[0]


async def _ask_all(
    args: argparse.Namespace, key: str | None, request: dict[str, Any], records: list[Record], answers: Answers
) -> dict[str, str]:
    """Ask the records, several at once, and keep each answer; return {place: reason} of those that were refused."""
    import openai
    from tqdm import tqdm

    refused, tokens, cut, begin, waiting = {}, 0, 0, time.monotonic(), iter(records)

    async def worker() -> None:
        nonlocal tokens, cut
        for record in waiting:
            try:
                completion = await client.chat.completions.create(messages=record.messages, **request)
                choice = completion.choices[0]
                keep(record.key, choice.message.content)
                cut += choice.finish_reason == "length"
                tokens += completion.usage.completion_tokens if completion.usage else 0
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused[record.place] = _reason(error)
            except (
                AttributeError,
                IndexError,
                TypeError,
                ValueError,
            ):  # the client lets any JSON and any text through
                refused[record.place] = "the answer holds no text"
            bar.update()
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):.0f} tokens/s", refresh=False)

    with answers.kept() as keep, tqdm(total=len(records), desc="predict", unit="answer", disable=None) as bar:
        async with _client(args.api_base, key, args.timeout, RETRIES) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(args.concurrency, len(records))):
                        group.create_task(worker())
            except* openai.OpenAIError as errors:
                problem = _explained(errors.exceptions[0], args.api_base, key)
            else:
                problem = None
    if problem:
        raise UserError(f"{problem}; answers so far are kept in {answers.path}, the same command goes on")
    seconds = time.monotonic() - begin
    rates = f"{len(records) / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s"
    print(
        f"{len(records)} records asked in {seconds:.0f} s, {args.concurrency} at once: {rates}, {cut} cut by max_tokens"
    )
    return refused


def _explained(error: Exception, api_base: str, key: str | None) -> str:
    """Return one line for an error of the openai client: what happened and what to do. The key never shows."""
    import openai

    hints = {
        openai.AuthenticationError: "wrong or missing key: set API_KEY or OPENAI_API_KEY",
        openai.PermissionDeniedError: "the key may not do this: set API_KEY or OPENAI_API_KEY",
        openai.NotFoundError: "no such model or path: does --api-base end in /v1, and --model name a model that is there?",
        openai.APITimeoutError: "no answer in time: is the server overloaded? See --timeout and --concurrency",
        openai.APIConnectionError: "can't be reached: is the server running there?",
    }
    hint = next((hint for kind, hint in hints.items() if isinstance(error, kind)), "the endpoint failed")
    reason = f"{hint} ({_reason(error)})"
    return f"{api_base}: {reason.replace(key, '***') if key else reason}"


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(text or error.__cause__ or error).split())[:300]
