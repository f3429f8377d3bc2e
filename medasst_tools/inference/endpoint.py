"""Ask test sets of any OpenAI-style endpoint, many requests at once, for `medasst predict CONFIG --api-base URL`.

Greedy, and asked as LLaMA-Factory asks in `predict_with_generate`: its own reading of the test sets, the same system
prompt, turns and length, so that the same model gives the same answers. Retries are the openai client's: on 429, 5xx,
timeouts and lost connections, waiting longer each time or as Retry-After says. The key comes from API_KEY or
OPENAI_API_KEY and is written nowhere.
"""

import argparse
import asyncio
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from medasst_tools import console
from medasst_tools.config import known_settings
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.inference.answers import AnswerStore

RETRIES = 10  # waits of 0.5, 1, 2, 4, then 8 seconds: an endpoint that restarts has a minute


class Record(NamedTuple):
    """A test record as it is asked: its place, its messages, its reference and the key of its answer."""

    place: str
    messages: list[Any]
    reference: str
    key: str


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what makes the endpoint's answers this endpoint's: part of their `made_of`. UserError if it can't be asked."""
    if not re.fullmatch(r"https?://[^\s@]+", args.api_base):
        got = "" if "@" in args.api_base else f"; got {args.api_base!r}"
        raise UserError(f"--api-base must be http://HOST/v1 or https://HOST/v1; a key belongs into API_KEY{got}")
    if args.concurrency < 1 or args.timeout <= 0:
        raise UserError("--concurrency must be 1 or more and --timeout above 0")
    return {"endpoint": args.api_base.rstrip("/")} | ({"endpoint_model": args.model} if args.model else {})


def key_of_environment() -> str | None:
    """Return the key, None if there is none."""
    return os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")


def answer(
    args: argparse.Namespace, config: dict[str, Any], asked: dict[str, Any], store: Path
) -> tuple[list[dict[str, str]], dict[str, int]]:
    """Return the predictions in order and each dataset's size; each answer is kept in `store` as it comes.

    CheckFailed if the endpoint refuses records and `--empty-if-refused` isn't given; UserError if it can't be reached.
    """
    key = key_of_environment()
    model = find_model(args.api_base, key, args.model)
    max_tokens = config.get("max_new_tokens", known_settings()["max_new_tokens"].default)
    with console.logged(store.parent.parent / "predict.log") as terminal:
        sets = test_records(config, asked | {"endpoint_model": model})
        records = [record for rows in sets.values() for record in rows]
        answers = AnswerStore(store)
        missing = {record.key: record for record in records if record.key not in answers}
        if missing and len(missing) < len(records):
            print(f"going on, {len(missing)} of {len(records)} records are still to be asked", file=terminal)
        refused: dict[str, str] = {}
        if missing:
            request = {"model": model, "max_tokens": max_tokens, "temperature": 0}
            if "enable_thinking" in config:  # of a chat template such as Qwen3's own, on vLLM and SGLang
                request["extra_body"] = {"chat_template_kwargs": {"enable_thinking": config["enable_thinking"]}}
            refused = asyncio.run(_ask_all(args, key, request, list(missing.values()), answers, terminal))
        if refused and not args.empty_if_refused:
            place, reason = next(iter(refused.items()))
            raise CheckFailed(
                f"the endpoint refused {len(refused)} of {len(records)} records, first {place}: {reason}; the other answers "
                f"are kept; --empty-if-refused gives these an empty answer"
            )
        rows = [_row(record, answers, config["template"]) for record in records]
    return rows, {name: len(members) for name, members in sets.items()}


def _row(record: Record, answers: AnswerStore, template: str) -> dict[str, str]:
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in record.messages)
    return {"prompt": prompt, "predict": answers.get(record.key, ""), "label": label_of(record.reference, template)}


def test_records(config: dict[str, Any], asked: dict[str, Any]) -> dict[str, list[Record]]:
    """Return {dataset: its records in order}, read and aligned by LLaMA-Factory whatever their format is."""
    from llamafactory.data.loader import _get_merged_dataset
    from llamafactory.hparams import get_train_args

    model_args, data_args, training_args, *_ = get_train_args(dict(config))
    names = data_args.eval_dataset
    sets = _get_merged_dataset(names, model_args, data_args, training_args, "sft", return_dict=True)
    records: dict[str, list[Record]] = {name: [] for name in sets}
    for name, rows in sets.items():
        for number, row in enumerate(rows, 1):
            system = row["_system"] or config.get("default_system")
            turns = [{"role": "system", "content": system}] if system else []
            messages = [*turns, *({"role": turn["role"], "content": turn["content"]} for turn in row["_prompt"])]
            key = AnswerStore.key(asked, messages)
            records[name].append(Record(f"{name}, record {number}", messages, row["_response"][0]["content"], key))
    return records


def label_of(reference: str, template: str) -> str:
    """Return a reference as LLaMA-Factory writes it as a label.

    That is the answer as the template writes it less its marks, which leaves a newline (qwen) or a space (mistral) that
    BLEU-4 counts: with it the same answers have the same scores, whoever predicted them.
    """
    from llamafactory.data.template import TEMPLATES

    form = TEMPLATES[template]
    text = "".join(part for part in form.format_assistant.apply(content=reference) if isinstance(part, str))
    for mark in form.stop_words:
        text = text.replace(mark, "")
    return text


def find_model(api_base: str, key: str | None, wanted: str | None) -> str:
    """Return the model to ask: `wanted`, or the only one that the endpoint lists. UserError if it can't be reached.

    Asked once, without retries: what is wrong from the start shall not take a minute to show.
    """
    import openai

    try:
        with openai.OpenAI(base_url=api_base, api_key=key or "none", timeout=30, max_retries=0) as client:
            names = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        if wanted and isinstance(error, openai.NotFoundError):  # an endpoint without a list
            return wanted
        raise UserError(explained(error, api_base, key)) from None
    except (AttributeError, TypeError, ValueError):  # a web page, say, which the client doesn't expect
        raise UserError(f"{api_base} lists no models: does --api-base end in /v1?") from None
    if not wanted and len(names) != 1:
        raise UserError(f"{api_base} has {len(names)} models ({', '.join(names[:10])}); name one with --model")
    return wanted or names[0]


async def _ask_all(
    args: argparse.Namespace,
    key: str | None,
    request: dict[str, Any],
    records: list[Record],
    answers: AnswerStore,
    terminal: TextIO,
) -> dict[str, str]:
    """Ask the records, several at once, and keep each answer; return {place: reason} of those that were refused."""
    import openai

    refused, tokens, cut, begin, waiting, problem = {}, 0, 0, time.monotonic(), iter(records), None

    async def worker() -> None:
        nonlocal tokens, cut
        for record in waiting:
            try:
                completion = await client.chat.completions.create(messages=record.messages, **request)
                choice = completion.choices[0]
                if not isinstance(choice.message.content, str):
                    raise TypeError("an answer without text is none")
                answers.keep(record.key, choice.message.content)
                cut += choice.finish_reason == "length"
                tokens += completion.usage.completion_tokens if completion.usage else 0
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused[record.place] = _reason(error)
            # the client lets any JSON and any text through
            except (AttributeError, IndexError, TypeError, ValueError):
                refused[record.place] = "the answer holds no text"
            bar.update()
            bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):.0f} tokens/s", refresh=False)

    with answers, console.bar(terminal, total=len(records), desc="predict", unit="answer") as bar:
        async with openai.AsyncOpenAI(
            base_url=args.api_base, api_key=key or "none", timeout=args.timeout, max_retries=RETRIES
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(args.concurrency, len(records))):
                        group.create_task(worker())
            except* openai.OpenAIError as errors:
                problem = given_up(errors.exceptions[0], args.api_base, key)
    if problem:
        raise problem
    seconds = time.monotonic() - begin
    rates = f"{len(records) / seconds:.1f} answers/s, {tokens / seconds:.0f} tokens/s, {cut} cut by max_tokens"
    print(f"{len(records)} records asked in {seconds:.0f} s, {args.concurrency} at once: {rates}", file=terminal)
    return refused


def given_up(error: Exception, api_base: str, key: str | None) -> UserError:
    """Return what to raise where an error ends the asking."""
    return UserError(f"{explained(error, api_base, key)}; answers so far are kept, the same command goes on")


def explained(error: Exception, api_base: str, key: str | None) -> str:
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
