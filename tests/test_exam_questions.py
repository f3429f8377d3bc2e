"""Exam questions: the released counts, the prompt to the letter, and archives that aren't what they should be."""

import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import SAMPLES

from medasst_tools.data.exam_questions import load_protocol, load_subjects, messages, questions_sha256
from medasst_tools.errors import UserError

PROTOCOL = load_protocol()
EXAMS = SAMPLES / "exams"


def test_samples_have_every_subject_and_odd_cells():
    subjects = load_subjects(EXAMS, PROTOCOL)
    assert len(subjects) == 9 and all(
        len(subject.examples) == 5 and len(subject.questions) >= 3 for subject in subjects
    )
    questions = [question for subject in subjects for question in subject.questions]
    assert len(questions) >= 24 and {question.answer for question in questions} == set("ABCD")
    choices = {choice for question in questions for choice in question.choices}
    assert {"NA", "None"} <= choices  # text, not a missing value
    assert any('"不"' in question.text for question in questions)


@pytest.mark.real_data
def test_the_released_archives_have_the_papers_questions(real_data):
    subjects = load_subjects(real_data / "exams", PROTOCOL)
    assert {subject.name: len(subject.questions) for subject in subjects} == {
        subject.name: subject.released for subject in subjects
    }
    counts = [
        sum(subject.released for subject in subjects if subject.benchmark == name) for name in ("cmmlu", "ceval")
    ]
    assert counts == [1325, 90]
    assert all(len(subject.examples) == 5 for subject in subjects)
    keys = {
        (question.benchmark, question.subject, question.id) for subject in subjects for question in subject.questions
    }
    assert len(keys) == 1415


@pytest.mark.parametrize("shots", [0, 2])
def test_the_prompt_is_llamafactorys(shots):
    from llamafactory.eval.template import get_eval_template

    subject = load_subjects(EXAMS, PROTOCOL)[0]

    def example(question):
        return {"question": question.text, "answer": question.answer} | dict(
            zip("ABCD", question.choices, strict=True)
        )

    question, examples = subject.questions[0], subject.examples[:shots]
    theirs = get_eval_template("zh").format_example(
        example(question), [example(e) for e in examples], subject.chinese_name
    )
    assert messages(question, examples, subject.chinese_name, PROTOCOL["prompts"]["llamafactory-zh"]) == theirs


def test_a_zip_reads_like_its_folder(tmp_path):
    for archive in ("cmmlu_v1_0_1", "ceval-exam"):
        shutil.make_archive(str(tmp_path / archive), "zip", EXAMS / archive)
    assert questions_sha256(load_subjects(tmp_path, PROTOCOL)) == questions_sha256(load_subjects(EXAMS, PROTOCOL))


def without(path):
    path.unlink()


def lfs_pointer(path):
    shutil.rmtree(path.parent.parent)
    path.parent.parent.with_name("cmmlu_v1_0_1.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def not_a_zip(path):
    path.parent.parent.with_name("cmmlu_v1_0_1.zip").write_bytes(b"hello")


def zip_without_subject(path):
    with zipfile.ZipFile(path.parent.parent.with_name("cmmlu_v1_0_1.zip"), "w") as archive:
        archive.writestr("test/other.csv", "")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without, "has no test/anatomy.csv"),
        (lfs_pointer, "is a Git LFS pointer"),
        (not_a_zip, "is not a whole zip archive"),
        (zip_without_subject, "has no test/anatomy.csv"),
        (lambda path: shutil.rmtree(path.parent.parent), "is there; get it from"),
        (lambda path: path.write_bytes(b",Question,A,B,C,D\n0,q,1,2,3,4\n"), "line 2: no column 'Answer'"),
        (lambda path: path.write_bytes(b",Question,A,B,C,D,Answer\n0,q,1,2,3,4,E\n"), "the answer is 'E'"),
        (lambda path: path.write_bytes("问".encode("gbk")), "is not UTF-8"),
    ],
)
def test_damaged_archives_are_named(tmp_path, damage, message):
    shutil.copytree(EXAMS, tmp_path / "exams")
    damage(tmp_path / "exams/cmmlu_v1_0_1/test/anatomy.csv")
    with pytest.raises(UserError) as error:
        load_subjects(tmp_path / "exams", PROTOCOL)
    assert message in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="cmmlu_v1_0_1.zip and ceval-exam.zip"):
        load_subjects(tmp_path / "nowhere", PROTOCOL)


def ceval_folder(tmp_path: Path, text: str) -> Path:
    """The samples' exams with one C-Eval file replaced."""
    shutil.copytree(EXAMS, tmp_path / "exams")
    next((tmp_path / "exams").rglob("physician_val.csv")).write_text(text, encoding="utf-8")
    return tmp_path / "exams"


HEADER = "id,question,A,B,C,D,answer\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "0,问,甲,乙,丙,丁,BC\n", "line 2: the answer is 'BC', must be one of A, B, C, D"),
        (HEADER + "0,问,甲,乙,丙,丁,\n", "line 2: the answer is '', must be"),
        (
            HEADER + "0,问,甲,乙,丙,丁,A\n1,问,甲,乙,丙,丁,A\n0,问,甲,乙,丙,丁,B\n",
            "line 4: the id '0' stands in line 2 too",
        ),
    ],
)
def test_what_would_be_wrong_for_ever_is_said_before_anything_is_asked(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_subjects(ceval_folder(tmp_path, text), PROTOCOL)
    assert message in str(error.value) and "physician_val.csv" in str(error.value)


def test_exams_unpacked_a_folder_deeper_are_found(tmp_path):
    exams = ceval_folder(tmp_path, HEADER + "0,问,甲,乙,丙,丁,A\n")
    before = load_subjects(exams, PROTOCOL)
    (tmp_path / "deeper").mkdir()
    for folder in [*exams.iterdir()]:
        if folder.is_dir():
            (tmp_path / "deeper" / folder.name / folder.name).parent.mkdir()
            folder.rename(tmp_path / "deeper" / folder.name / folder.name)
    assert load_subjects(tmp_path / "deeper", PROTOCOL) == before
    assert load_subjects(tmp_path, PROTOCOL) == before
