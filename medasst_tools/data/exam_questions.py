"""Read the exam questions out of the archives as they were released, or out of their unpacked folders.

Repeated stems stay: anatomy has 15, and without them 1,415 would be wrong. The csv module reads every cell as text, so
that an option "NA" stays one.
"""

import csv
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.config import read_yaml
from medasst_tools.errors import UserError
from medasst_tools.files import LFS_POINTER, PROJECT_ROOT

PROTOCOL = PROJECT_ROOT / "dataset_info" / "exams.yaml"
LETTERS = "ABCD"
AVERAGED = ("cmmlu", "ceval")  # the paper's two; its average is theirs, whatever else is asked


class Question(NamedTuple):
    """One four-way question; `choices` are the texts of A to D, `answer` is a letter."""

    benchmark: str
    subject: str
    id: str
    text: str
    choices: tuple[str, str, str, str]
    answer: str


@dataclass(frozen=True)
class Subject:
    """The questions of one subject, the examples that may precede them, and the count that was released."""

    benchmark: str
    name: str
    chinese_name: str
    questions: list[Question]
    examples: list[Question]
    released: int


def load_protocol() -> dict[str, Any]:
    """Return dataset_info/exams.yaml."""
    return read_yaml(PROTOCOL)


def load_subjects(exams_dir: Path, protocol: dict[str, Any]) -> list[Subject]:
    """Return every subject of every benchmark, in the protocol's order; UserError names what is missing or damaged.

    An exam beside the paper's two is left out where its archive isn't there.
    """
    if not exams_dir.is_dir():
        archives = " and ".join(f"{protocol['benchmarks'][name]['archive']}.zip" for name in AVERAGED)
        raise UserError(f"no exams folder {exams_dir}; it must hold {archives}, or their unpacked folders")
    subjects = []
    for benchmark_name, benchmark in protocol["benchmarks"].items():
        if benchmark_name not in AVERAGED and not list(exams_dir.glob(f"{benchmark['archive']}*")):
            continue
        archive = _Archive(exams_dir, benchmark)
        for name, facts in benchmark["subjects"].items():
            splits = (benchmark["split"], protocol["examples_from"])
            parts = [
                _questions(benchmark_name, name, benchmark["columns"], archive.rows(split, name)) for split in splits
            ]
            subjects.append(Subject(benchmark_name, name, facts["name"], *parts, facts["questions"]))
    return subjects


class _Archive:
    """A released zip or its unpacked folder."""

    def __init__(self, exams_dir: Path, benchmark: dict[str, Any]):
        self.file = benchmark["file"]
        folder, packed = exams_dir / benchmark["archive"], exams_dir / f"{benchmark['archive']}.zip"
        if not packed.is_file() and not folder.is_dir():  # unpacked a folder deeper, as some programs do
            packed = next(iter(sorted(exams_dir.rglob(packed.name))), packed)
            folder = next((path for path in sorted(exams_dir.rglob(folder.name)) if path.is_dir()), folder)
        self.path = packed if packed.is_file() else folder
        self.zip = None
        if packed.is_file():
            if packed.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER:
                raise UserError(
                    f"{packed} is a Git LFS pointer, not the file; run `git lfs pull` or download the file itself"
                )
            try:
                self.zip = zipfile.ZipFile(packed)
            except zipfile.BadZipFile as error:
                raise UserError(f"{packed} is not a whole zip archive ({error}); get it again") from None
        elif not folder.is_dir():
            raise UserError(f"neither {packed} nor {folder}/ is there; get it from {benchmark['homepage']}")

    def rows(self, split: str, subject: str) -> list[tuple[dict[str, str], str]]:
        """Return (row by column name, place for messages) of one subject's CSV file."""
        name = self.file.format(split=split, subject=subject)
        place = f"{self.path}, {name}"
        try:
            data = self.zip.read(self._member(self.zip, name)) if self.zip else self._file(name).read_bytes()
        except (KeyError, FileNotFoundError):
            raise UserError(f"{self.path} has no {name}, nor a folder below it; get the archive again") from None
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{place} can't be unpacked ({error}); get the archive again") from None
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{place} is not UTF-8; get the archive again") from None
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [(row, f"{place}, line {rows.line_num}") for row in rows]

    def _member(self, archive: zipfile.ZipFile, name: str) -> str:
        return next((one for one in archive.namelist() if one == name or one.endswith(f"/{name}")), name)

    def _file(self, name: str) -> Path:
        direct = self.path / name
        deeper = (path for path in sorted(self.path.rglob(direct.name)) if path.as_posix().endswith(f"/{name}"))
        return direct if direct.is_file() else next(deeper, direct)


def _questions(
    benchmark: str, subject: str, columns: dict[str, str], rows: list[tuple[dict[str, str], str]]
) -> list[Question]:
    """Return the checked questions of a CSV file; UserError at the second of two with one id, which would share an answer."""
    questions, places = [], {}
    for row, place in rows:
        question = _question(benchmark, subject, columns, row, place)
        if question.id in places:
            raise UserError(
                f"{place}: the id {question.id!r} stands in {places[question.id].rpartition(', ')[2]} too; make ids unique"
            )
        places[question.id] = place
        questions.append(question)
    return questions


def _question(benchmark: str, subject: str, columns: dict[str, str], row: dict[str, Any], place: str) -> Question:
    """Return a checked question of one CSV row."""
    needed = [columns["id"], columns["question"], *LETTERS, columns["answer"]]
    if missing := [name for name in needed if row.get(name) is None]:
        raise UserError(f"{place}: no column {missing[0]!r}; is it the released file?")
    answer = row[columns["answer"]].strip()
    if answer not in tuple(LETTERS):
        raise UserError(f"{place}: the answer is {answer!r}, must be one of A, B, C, D")
    choices = tuple(row[letter] for letter in LETTERS)
    return Question(benchmark, subject, row[columns["id"]], row[columns["question"]], choices, answer)


def questions_sha256(subjects: list[Subject]) -> str:
    """Return one sha256 over all questions and examples, whatever they were packed in."""
    digest = hashlib.sha256()
    for subject in subjects:
        for question in [*subject.questions, *subject.examples]:
            digest.update(repr(question).encode("utf-8"))
    return digest.hexdigest()


def messages(
    question: Question, examples: list[Question], chinese_name: str, prompt: dict[str, str]
) -> list[dict[str, str]]:
    """Return the conversation whose next word is the answer: LLaMA-Factory's EvalTemplate.format_example.

    Each example is a user turn and the assistant's letter; the opening stands before the first.
    """
    turns = []
    for asked in [*examples, question]:
        choices = (
            prompt["choice"].format(letter=letter, text=text)
            for letter, text in zip(LETTERS, asked.choices, strict=True)
        )
        turns.append({"role": "user", "content": asked.text + "".join(choices) + prompt["closing"]})
        turns.append({"role": "assistant", "content": asked.answer})
    turns[0]["content"] = prompt["opening"].format(subject=chinese_name) + turns[0]["content"]
    return turns
