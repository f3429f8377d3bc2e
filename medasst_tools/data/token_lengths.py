"""How long converted records are in tokens, and what LLaMA-Factory's cutoff_len takes away from them: question, answer, history.

The counting is LLaMA-Factory's own: its template makes the tokens, its `infer_seqlen` shares out what fits
(data/processor/supervised.py). Without mask_history it fills up from the first turn, so that the last turns are lost first.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import orjson

from medasst_tools.config import read_yaml
from medasst_tools.errors import UserError

SEED = 42


def add_tokens(datasets: dict[str, dict[str, Any]], files: dict[str, Path], args: argparse.Namespace) -> None:
    """Add `tokens` to each dataset's findings, counted over a seeded sample of its records."""
    from tqdm import tqdm

    config = read_config(args.config)
    encode = load_encoder(args.tokenizer, config)
    for name, path in files.items():
        wanted = sample(datasets[name]["n"], args.token_sample)
        rows = []
        with path.open("rb") as lines, tqdm(total=len(wanted), desc=f"{name}, tokens", disable=None) as bar:
            for place, line in enumerate(lines):
                if place in wanted:
                    rows.append(tokens_of(orjson.loads(line), encode, config["cutoff_len"]))
                    bar.update()
        datasets[name]["tokens"] = summarise(rows) | {"cutoff_len": config["cutoff_len"]}


def read_config(path: Path) -> dict[str, Any]:
    """Return cutoff_len, template and default_system of a train.yaml."""
    config = read_yaml(path)
    try:
        return {"cutoff_len": int(config["cutoff_len"]), "template": config["template"],
                "default_system": config.get("default_system")}  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} has no cutoff_len and template ({error!r}); give a train.yaml with --config"
        ) from None


def load_encoder(tokenizer_name: str, config: dict[str, Any]):
    """Return a function from an Alpaca record to [(question ids, answer ids), ...], one pair a turn, through LLaMA-Factory."""
    from llamafactory.data import Role, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {tokenizer_name!r}: {str(error).splitlines()[0]}") from None
    template = get_template_and_fix_tokenizer(
        tokenizer, DataArguments(template=config["template"], default_system=config["default_system"])
    )

    def encode(record: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        question = "\n".join(filter(None, (record["instruction"], record["input"])))
        messages = []
        for user, doctor in [*(record.get("history") or ()), (question, record.get("output") or record["chosen"])]:
            messages += [{"role": Role.USER, "content": user}, {"role": Role.ASSISTANT, "content": doctor}]
        return template.encode_multiturn(tokenizer, messages)

    return encode


def sample(count: int, size: int) -> set[int]:
    """Return the places of `size` of `count` records, all of them if size is 0 or larger; seeded."""
    return set(range(count)) if not size or size >= count else set(random.Random(SEED).sample(range(count), size))


def tokens_of(record: dict[str, Any], encode, cutoff_len: int) -> dict[str, int]:
    """Return the record's tokens, and how many of its question, answer and history cutoff_len takes away."""
    from llamafactory.data.processor.processor_utils import infer_seqlen

    pairs = encode(record)
    total, kept = 0, []
    for source, target in pairs:
        left = cutoff_len - total
        lengths = infer_seqlen(len(source), len(target), left) if left > 0 else (0, 0)
        total += sum(lengths)
        kept.append(lengths)
    lost = [(len(source) - a, len(target) - b) for (source, target), (a, b) in zip(pairs, kept, strict=True)]
    return {
        "total": sum(len(source) + len(target) for source, target in pairs),
        "question": lost[-1][0],
        "answer": lost[-1][1],
        "history": sum(a + b for a, b in lost[:-1]),
    }


def summarise(rows: list[dict[str, int]]) -> dict[str, Any]:
    """Return the sample's size, mean, median, p99 and longest, and the shares of records that lose something, by what."""
    if not rows:
        return {"n": 0, "cut": 0.0, "cut_by_part": {}}
    lengths = sorted(row["total"] for row in rows)
    parts = ("question", "answer", "history")
    return {
        "n": len(rows),
        "mean": round(sum(lengths) / len(lengths), 2),
        "p50": lengths[len(lengths) // 2],
        "p99": lengths[int(len(lengths) * 0.99)],
        "max": lengths[-1],
        "cut": sum(any(row[part] for part in parts) for row in rows) / len(rows),
        "cut_by_part": {part: sum(row[part] > 0 for row in rows) / len(rows) for part in parts},
    }
