"""Answers that outlive a kill: what a model was asked, and what it said. Prediction, exams and safety questions share it.

An answer is kept as it comes, under the sha256 of everything that it depends on: model, prompt, question. So a killed run
goes on where it stopped, and a changed test set asks only what is new.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from medasst_tools import console
from medasst_tools.files import atomic_writer


class AnswerStore(dict[str, Any]):
    """{key: answer} in JSON lines of {"key", "answer"}, appended; several processes may each write a file of their own beside it."""

    def __init__(self, path: Path):
        """Read what is there: `path` and, of other processes, `<stem>-*.jsonl` beside it. A line that a kill cut counts for nothing."""
        super().__init__()
        self.path = path
        for file in [path, *sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))]:
            if file.is_file():
                self.update(_rows(file))

    @staticmethod
    def key(*asked: Any) -> str:
        """Return the key of an answer: one sha256 over all that it depends on."""
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def __enter__(self) -> "AnswerStore":
        """Open the file to add answers, without a last line that a kill cut: the next would be glued to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            with atomic_writer(self.path) as file:
                file.writelines(_line(key, answer) for key, answer in _rows(self.path).items())
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._file.close()

    def keep(self, key: str, answer: Any) -> None:
        """Add one answer, on disk when this returns."""
        self[key] = answer
        self._file.write(_line(key, answer))

    def fill(self, missing: int, of: int, answers: Iterable[tuple[str, Any]], log: Path, unit: str) -> None:
        """Keep each (key, answer) as it comes, with a bar of `missing`; what libraries print meanwhile goes to `log`."""
        with console.logged(log) as terminal, self:
            if missing < of:
                print(f"going on: {of - missing} of {of} answers are there", file=terminal)
            with console.bar(terminal, total=missing, desc=log.stem, unit=unit) as bar:
                for key, answer in answers:
                    self.keep(key, answer)
                    bar.update()


def _line(key: str, answer: Any) -> bytes:
    return orjson.dumps({"key": key, "answer": answer}, option=orjson.OPT_APPEND_NEWLINE)


def _rows(path: Path) -> dict[str, Any]:
    rows = {}
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
            rows[row["key"]] = row["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return rows
