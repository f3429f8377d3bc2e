"""One raw record to one Alpaca record, for each of the five layouts (see `LAYOUTS`).

A reader takes the record's bytes and returns a dict (`instruction`, `input`, `output`, and `history` in multi-turn
layouts), or the reason why there is none: `Skipped` by design, `Rejected` as bad input. Text stays as it is except for
the rules that the registry names.
"""

import re
from collections.abc import Callable
from typing import Any

import orjson

ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff]")
MARKER = re.compile(r"\s*(问|答)[:：]")
URL_ONLY = re.compile(r"(?:https?://|www\.)\S+", re.ASCII)


class Skipped(str):
    """The reason why a record is left out by design."""


class Rejected(str):
    """The reason why a record is unusable."""


class Trimmed(dict):
    """A kept record that lost an odd tail, so that the loss can be counted."""


class _Unusable(Exception):
    """Carries a Rejected reason out of a nested call."""


def clean(text: str) -> str:
    """Apply the rules edge_whitespace and zero_width."""
    text = text.strip()
    if "\u200b" in text or "\ufeff" in text or "\u2060" in text:
        text = ZERO_WIDTH.sub("", text).strip()
    return text


def _text(record: dict[str, Any], key: str) -> str:
    """Return a required text field, cleaned."""
    value = record.get(key)
    if type(value) is str and (text := clean(value)):
        return text
    if value is None:
        raise _Unusable(f"no {key}")
    raise _Unusable(f"empty {key}" if isinstance(value, str) else f"{key} is not text")


def _input(record: dict[str, Any]) -> str:
    value = record.get("input")
    if not value and (value is None or value == ""):
        return ""
    if not isinstance(value, str):
        raise _Unusable("input is not text")
    return clean(value)


def read_instruction(record: Any) -> dict[str, Any]:
    """MedChatZH: {"instruction", "input", "output"}."""
    return {"instruction": _text(record, "instruction"), "input": _input(record), "output": _text(record, "output")}


def read_dialogue(record: Any) -> dict[str, Any]:
    """CMtMedQA: the last turn in instruction and output, the earlier ones in history; its test file also has `instruct`."""
    question = "instruct" if "instruct" in record and "instruction" not in record else "instruction"
    history = record.get("history")
    if history is None:
        history = []
    if not isinstance(history, list):
        raise _Unusable("history is not a list")
    pairs = []
    for pair in history:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise _Unusable("a history item is not a pair of texts")
        user, doctor = clean(pair[0]), clean(pair[1])
        if not user or not doctor:
            raise _Unusable("an empty turn in history")
        pairs.append([user, doctor])
    return {
        "instruction": _text(record, question),
        "input": _input(record),
        "output": _text(record, "output"),
        "history": pairs,
    }


def read_encyclopedia(record: Any) -> dict[str, Any]:
    """huatuo_encyclopedia_qa: {"questions": [[wording, ...]], "answers": [answer]}, also as str or [str]."""
    answer = _first_text(record, "answers")
    if URL_ONLY.fullmatch(answer):
        raise _Unusable("answers is only a URL")
    return {"instruction": _first_text(record, "questions"), "input": "", "output": answer}


def _first_text(record: dict[str, Any], key: str) -> str:
    """Return the first text of a str, [str] or [[str]]; an empty first one is no answer, whatever follows it."""
    value = record.get(key)
    while isinstance(value, list):
        if not value:
            raise _Unusable(f"empty {key}")
        value = value[0]
    return _text({key: value}, key)


def read_turns(record: Any) -> dict[str, Any]:
    """HuatuoGPT-sft-data-v1: {"data": ["问：...", "答：...", ...]}; the last whole pair is the instruction and output.

    A turn's marker says whose it is; where there is none its place does. An odd tail goes. Two turns of one side in a
    row are rejected: to join or to drop one would be a guess.
    """
    turns = record.get("data")
    if not isinstance(turns, list):
        raise _Unusable("no data" if turns is None else "data is not a list")
    texts = []
    for place, turn in enumerate(turns):
        if type(turn) is not str:
            raise _Unusable("a turn is not text")
        marker = MARKER.match(turn)
        if marker:
            if marker[1] != "问答"[place % 2]:
                raise _Unusable("turns do not alternate")
            turn = turn[marker.end() :]
        texts.append(clean(turn))
    odd_tail = len(texts) % 2 == 1
    if odd_tail:
        texts.pop()
    if not texts:
        raise _Unusable("no answer")
    if not all(texts):
        raise _Unusable("an empty turn")
    pairs = [[texts[place], texts[place + 1]] for place in range(0, len(texts), 2)]
    question, answer = pairs.pop()
    record = {"instruction": question, "input": "", "output": answer, "history": pairs}
    return Trimmed(record) if odd_tail else record


def read_columns(line: bytes) -> dict[str, Any] | Skipped | Rejected:
    """webMedQA: department TAB label TAB question id TAB question TAB answer, one line; split on the tab itself."""
    columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) != 5:
        return Rejected("not 5 columns")
    label = columns[1].strip()
    if label == b"0":
        return Skipped("label 0")
    if label != b"1":
        return Rejected("label is neither 0 nor 1")
    try:
        question, answer = clean(columns[3].decode("utf-8")), clean(columns[4].decode("utf-8"))
    except UnicodeDecodeError:
        return Rejected("not UTF-8")
    if not question or not answer:
        return Rejected("empty question" if not question else "empty answer")
    return {"instruction": question, "input": "", "output": answer}


def _from_json(read: Callable[[Any], dict[str, Any]]) -> Callable[[bytes], dict[str, Any] | Rejected]:
    def read_json(raw: bytes) -> dict[str, Any] | Rejected:
        try:
            record = orjson.loads(raw)
            if type(record) is not dict:
                return Rejected("not an object")
            return read(record)
        except _Unusable as reason:
            return Rejected(str(reason))
        except orjson.JSONDecodeError:
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return Rejected("not UTF-8")
            return Rejected("not JSON")

    return read_json


LAYOUTS: dict[str, Callable[[bytes], dict[str, Any] | Skipped | Rejected]] = {
    "instruction": _from_json(read_instruction),
    "encyclopedia": _from_json(read_encyclopedia),
    "turns": _from_json(read_turns),
    "dialogue": _from_json(read_dialogue),
    "columns": read_columns,
}
