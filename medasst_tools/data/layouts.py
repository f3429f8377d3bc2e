"""One raw record to Alpaca records, for each layout: a function of the record's value, and a line in `LAYOUTS`.

A function returns a dict (`instruction`, `input`, `output`; of a dialogue also `history`, and `system` where the layout has
one), or a list of such dicts where one raw record gives several, and raises NotKept with the reason if it gives none. Text
stays as it is, but for white space at both ends and zero-width characters.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from medasst_tools.data.raw_files import NotKept

ZERO_WIDTH = re.compile("[\u200b\u2060\ufeff]")
MARKER = re.compile(r"\s*(问|答)\s*[:：]")
URL_ONLY = re.compile(r"(?:https?://|www\.)[^\s\u3000-\u303f\uff00-\uffef\u4e00-\u9fff]+")
# the names under which people have questions and answers, likeliest first
QUESTION_NAMES = (
    "question", "q", "query", "instruction", "prompt", "input", "ask", "title", "问题", "提问", "问", "user",
)  # fmt: skip
ANSWER_NAMES = (
    "answer", "a", "response", "output", "reply", "completion", "target", "回答", "答案", "回复", "答复", "答", "assistant",
)  # fmt: skip
USERS, ASSISTANTS, SYSTEMS = ("user", "human"), ("assistant", "gpt", "bot", "model"), ("system", "developer")
ODD_TAIL = "odd_tail"  # a mark on a record that lost an unanswered last question; it isn't written


def clean(text: str) -> str:
    """Remove white space at both ends, U+3000 included, and zero-width characters (U+200B, U+2060, U+FEFF)."""
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
        raise NotKept(f"no {key}")
    raise NotKept(f"empty {key}" if isinstance(value, str) else f"{key} is not text")


def _optional(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise NotKept(f"{key} is not text")
    return clean(value)


def _history(record: dict[str, Any]) -> list[list[str]]:
    """Return the earlier turns, given as pairs or as turns with a role each (ChatGLM3's way)."""
    history = record.get("history")
    if history is None:
        return []
    if not isinstance(history, list):
        raise NotKept("history is not a list")
    if history and isinstance(history[0], dict):
        _, texts = _alternating(history)
        if len(texts) % 2:
            raise NotKept("history ends with a question")
        history = _pairs(texts)
    pairs = []
    for pair in history:
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            raise NotKept("a history item is not a pair of texts")
        user, doctor = clean(pair[0]), clean(pair[1])
        if not user or not doctor:
            raise NotKept("an empty turn in history")
        pairs.append([user, doctor])
    return pairs


def _pairs(texts: list[str]) -> list[list[str]]:
    """Return [[user's, assistant's], ...] of turns; an odd last one is left out."""
    return [[texts[at], texts[at + 1]] for at in range(0, len(texts) - 1, 2)]


def _dialogue(texts: list[str]) -> dict[str, Any]:
    """Return the record of turns that begin with the user's; an unanswered last question goes, and the record is marked."""
    pairs = _pairs(texts)
    if not pairs:
        raise NotKept("no answer")
    if "" in texts[: len(pairs) * 2]:
        raise NotKept("an empty turn")
    question, answer = pairs.pop()
    record = {"instruction": question, "input": "", "output": answer, "history": pairs}
    return record | {ODD_TAIL: True} if len(texts) % 2 else record


# ---- the paper's corpora --------------------------------------------------------------------------------------------
def read_instruction(record: dict[str, Any]) -> dict[str, Any]:
    """Alpaca, and MedChatZH: {"instruction", "input", "output"}; `system` and `history` where there are any."""
    kept = {
        "instruction": _text(record, "instruction"),
        "input": _optional(record, "input"),
        "output": _text(record, "output"),
    }
    if "history" in record:
        kept["history"] = _history(record)
    if "system" in record:
        kept["system"] = _optional(record, "system")
    return kept


def read_dialogue(record: dict[str, Any]) -> dict[str, Any]:
    """CMtMedQA: the last turn in instruction and output, the earlier ones in history; its test file also has `instruct`."""
    question = "instruct" if "instruct" in record and "instruction" not in record else "instruction"
    pairs = _history(record)
    return {
        "instruction": _text(record, question),
        "input": _optional(record, "input"),
        "output": _text(record, "output"),
        "history": pairs,
    }


def read_dialogue_turns(record: dict[str, Any]) -> list[dict[str, Any]]:
    """CMtMedQA, every doctor's turn asked with its true history; `dialogue` says which turns belong together."""
    whole = read_dialogue(record)
    pairs = [*whole["history"], ["\n".join(filter(None, (whole["instruction"], whole["input"]))), whole["output"]]]
    name = record.get("id") if isinstance(record.get("id"), str) else pairs[0][0]
    return [
        {"instruction": user, "input": "", "output": doctor, "history": pairs[:at], "dialogue": name}
        for at, (user, doctor) in enumerate(pairs)
    ]


def read_encyclopedia(record: dict[str, Any]) -> dict[str, Any]:
    """huatuo_encyclopedia_qa: {"questions": [[wording, ...]], "answers": [answer]}, also as str or [str]; the first counts."""
    answer = _first_text(record, "answers")
    if URL_ONLY.fullmatch(answer):
        raise NotKept("answers is only a URL")
    return {"instruction": _first_text(record, "questions"), "input": "", "output": answer}


def _first_text(record: dict[str, Any], key: str) -> str:
    """Return the first text of a str, [str] or [[str]]; an empty first one is no answer, whatever follows it."""
    value = record.get(key)
    while isinstance(value, list):
        if not value:
            raise NotKept(f"empty {key}")
        value = value[0]
    return _text({key: value}, key)


def read_turns(record: dict[str, Any]) -> dict[str, Any]:
    """HuatuoGPT-sft-data-v1: {"data": ["问：...", "答：...", ...]}; the last whole pair is the instruction and output.

    A turn's marker says whose it is; where there is none its place does. An odd tail goes. Two turns of one side in a
    row are rejected: to join or to drop one would be a guess.
    """
    turns = record.get("data")
    if not isinstance(turns, list):
        raise NotKept("no data" if turns is None else "data is not a list")
    texts = []
    for place, turn in enumerate(turns):
        if type(turn) is not str:
            raise NotKept("a turn is not text")
        if turn.startswith(("问：", "答：")[place % 2]):  # nearly all: no pattern is needed
            texts.append(clean(turn[2:]))
            continue
        turn = clean(turn)
        if marker := MARKER.match(turn):
            if marker[1] != "问答"[place % 2]:
                raise NotKept("turns do not alternate")
            turn = clean(turn[marker.end() :])
        texts.append(turn)
    return _dialogue(texts)


def read_columns(columns: list[str]) -> dict[str, Any]:
    """webMedQA: department, label, question id, question, answer; the positives are kept."""
    if len(columns) != 5:
        raise NotKept("not 5 columns")
    label = columns[1].strip()
    if label == "0":
        raise NotKept("label 0", by_design=True)
    if label != "1":
        raise NotKept("label is neither 0 nor 1")
    return read_pair([columns[3], columns[4]])


# ---- what people have -----------------------------------------------------------------------------------------------
def read_pair(pair: list[str]) -> dict[str, Any]:
    """A list of two texts: question and answer."""
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise NotKept("not a list of two texts")
    question, answer = map(clean, pair)
    if not question or not answer:
        raise NotKept("empty question" if not question else "empty answer")
    return {"instruction": question, "input": "", "output": answer}


def read_qa(record: dict[str, Any], question: str | None = None, answer: str | None = None) -> dict[str, Any]:
    """A question and an answer under any names, those given or the first known ones; `input` and `system` beside them."""
    kept = _asked(record, question)
    kept["output"] = _text(record, answer or _known_name(record, ANSWER_NAMES, "answer"))
    return kept | {"system": _optional(record, "system")} if "system" in record else kept


def _asked(record: dict[str, Any], question: str | None = None) -> dict[str, str]:
    question = question or _known_name(record, QUESTION_NAMES, "question")
    more = _optional(record, "input") if question in ("instruction", "prompt") else ""
    return {"instruction": _text(record, question), "input": more}


def _known_name(record: dict[str, Any], names: Iterable[str], what: str) -> str:
    lower = {str(key).strip().lower(): key for key in record}
    if found := next((lower[name] for name in names if name in lower), None):
        return found
    raise NotKept(f"no {what} among {', '.join(map(str, record))[:80]}")


def read_messages(record: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's {"messages": [{"role", "content"}, ...]}, system included."""
    return _from_turns(record, "messages")


def read_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's {"conversations": [{"from", "value"}, ...]}: human and gpt, or user and assistant; `system` beside it."""
    key = "conversation" if "conversation" in record and "conversations" not in record else "conversations"
    return _from_turns(record, key)


def _from_turns(record: dict[str, Any], key: str) -> dict[str, Any]:
    turns = record.get(key)
    if not isinstance(turns, list):
        raise NotKept(f"no {key}" if turns is None else f"{key} is not a list")
    systems, texts = _alternating(turns)
    system = "\n".join(filter(None, (_optional(record, "system"), *systems)))
    return _dialogue(texts) | {"system": system}


def _alternating(turns: list[Any]) -> tuple[list[str], list[str]]:
    """Return (system texts, the user's and the assistant's in turns, the user's first)."""
    systems, texts = [], []
    for turn in turns:
        role, text = _role_and_text(turn)
        if role in SYSTEMS and not texts:
            systems.append(clean(text))
            continue
        if role not in (USERS, ASSISTANTS)[len(texts) % 2]:
            known = role in USERS + ASSISTANTS + SYSTEMS
            raise NotKept("turns do not alternate" if known else f"a turn of {role!r}")
        texts.append(clean(text))
    return systems, texts


def _role_and_text(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise NotKept("a turn is not an object")
    role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(text, list):  # OpenAI's parts; a picture that is asked about can't be left out
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
            raise NotKept("a part of a turn is not text")
        text = "".join(part["text"] for part in text)
    if not isinstance(role, str) or not isinstance(text, str):
        raise NotKept("a turn has no role, or no text")
    return role.strip().lower(), text


def read_history(record: dict[str, Any]) -> dict[str, Any]:
    """A question and an answer under the usual names, with `history` as pairs, oldest first."""
    pairs = _history(record)
    return read_qa(record) | {"history": pairs}


def read_preference(record: dict[str, Any]) -> dict[str, Any]:
    """A question with a better and a worse answer, `chosen` and `rejected`: LLaMA-Factory's ranking format, for DPO."""
    answers = {key: _text(record, key) for key in ("chosen", "rejected")}
    if answers["chosen"] == answers["rejected"]:
        raise NotKept("chosen and rejected are the same")
    return _asked(record) | answers


LAYOUTS: dict[str, Callable[..., dict[str, Any] | list[dict[str, Any]]]] = {
    "instruction": read_instruction,
    "encyclopedia": read_encyclopedia,
    "turns": read_turns,
    "dialogue": read_dialogue,
    "dialogue_turns": read_dialogue_turns,
    "columns": read_columns,
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "history": read_history,
    "preference": read_preference,
    "qa": read_qa,
    "pairs": read_pair,
}
LISTS = ("columns", "pairs")  # their raw records are lists, all others' are objects


def reader(layout: str, columns: dict[str, str] | None = None) -> Callable[[Any], Sequence[Any]]:
    """Return a function from a raw record's parsed value to all that it gives: records, or the NotKept that says why none.

    columns: {"question", "answer"} of layout qa.
    """
    read, kind = partial(LAYOUTS[layout], **columns) if columns else LAYOUTS[layout], list if layout in LISTS else dict

    def records_of(value: Any) -> Sequence[Any]:
        if type(value) is not kind:
            other = NotKept(f"not {'a list' if kind is list else 'an object'}")
            return (value if isinstance(value, NotKept) else other,)
        try:
            found = read(value)
        except NotKept as reason:
            return (reason,)
        return found if type(found) is list else (found,)

    return records_of


def likely_layout(values: list[Any]) -> str | None:
    """Return the layout in which most of these values can be read, the most special first; None if none reads half of them."""
    usable = dict.fromkeys(LAYOUTS, 0)
    for layout in usable:
        records_of = reader(layout)
        for value in values:
            first = records_of(value)[0]
            usable[layout] += not isinstance(first, NotKept) or first.by_design
    del usable["dialogue_turns"]
    # qa reads most, and of those with a history would lose it
    has_history = any(isinstance(value, dict) and value.get("history") for value in values)
    order = ["instruction", *(name for name in usable if name not in ("dialogue", "history", "qa"))]
    order.append("history" if has_history else "qa")
    best = max(order, key=lambda name: usable[name])
    return best if values and usable[best] * 2 >= len(values) else None


def shape_of(value: Any) -> str:
    """Describe a raw record that no layout, or another one than was named, fits."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value))[:80]}"
    return "a list" if isinstance(value, list) else f"{type(value).__name__} {value!r:.80}"
