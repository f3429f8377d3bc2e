"""Chinese for what a verb says, where the locale is Chinese; MEDASST_LANG=zh or en goes before the locale.

Messages stay f-strings in English where they arise. On its way to the terminal a message is found among the patterns of
messages_zh.yaml, whose {} stand for the values in it: names, paths and keys stay as they are, and a value that is a message
itself is put into Chinese too. What isn't found, or only in parts, is shown so.
"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

from medasst_tools.config import read_yaml

CATALOGUE = Path(__file__).with_name("messages_zh.yaml")
WHOLE_MESSAGE = 30  # characters besides the values
VARIABLES = ("MEDASST_LANG", "LC_ALL", "LC_MESSAGES", "LANG")  # the first that is set counts


def is_chinese(environment: Mapping[str, str] = os.environ) -> bool:
    """Say whether the reader wants Chinese."""
    return next((environment[name] for name in VARIABLES if environment.get(name)), "").lower().startswith("zh")


def said(text: str) -> str:
    """Return a message, or several a line each, in the reader's language; lines of a log (`  | ...`) stay as they are."""
    if not is_chinese():
        return text
    return "\n".join(line if line.startswith("  | ") else translated(line) for line in text.split("\n"))


def word(text: str) -> str:
    """Return one of doctor's fixed words in the reader's language."""
    return _catalogue()["words"].get(text, text) if is_chinese() else text


def translated(text: str) -> str:
    """Return a message in Chinese: by its own pattern, else by its parts: before brackets, between semicolons, behind a colon."""
    for pattern, chinese in _patterns():
        if found := pattern.fullmatch(text):
            return chinese.format(*map(translated, found.groups()))
    if (found := re.fullmatch(r"(.+?) \((.*)\)", text)) and (inner := translated(found[1])) != found[1]:
        return f"{inner}（{found[2]}）"
    for mark, full_width in (("; ", "；"), (": ", "：")):
        before, found, after = text.partition(mark)
        if found and (parts := (translated(before), translated(after))) != (before, after):
            return full_width.join(parts)
    return text


@functools.cache
def _catalogue() -> dict[str, dict[str, str]]:
    return read_yaml(CATALOGUE)


@functools.cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Return (pattern, Chinese), the most literal first: of two that fit, it says more."""
    messages = sorted(_catalogue()["messages"].items(), key=lambda one: -len(one[0].replace("{}", "")))
    return [(_pattern(english), chinese) for english, chinese in messages]


def _pattern(english: str) -> re.Pattern[str]:
    literals = [part.format() for part in english.split("{}")]
    # few words fit much: they are a part of a message, between semicolons
    value = "(.*?)" if len("".join(literals)) >= WHOLE_MESSAGE else "((?:(?!; ).)*?)"
    return re.compile(value.join(map(re.escape, literals)))
