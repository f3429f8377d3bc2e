"""`make bench-exam`: lm-eval reads an exported folder's own chat template and gives the exam's letters and probabilities."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SAMPLES

from medasst_tools.serving.exported_prompts import correct_prompts
from medasst_tools.training.tiny_model import build_tiny_model

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_exam  # noqa: E402

CHAT = {"template": "qwen", "default_system": "你是医疗助手。"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with chat.yaml of a tiny random model, and the same exported."""
    pytest.importorskip("lm_eval", reason="no lm-eval; `make setup EXTRAS=readers` installs it")
    folder = tmp_path_factory.mktemp("bench_exam")
    subjects, _ = bench_exam.load_questions(SAMPLES / "exams", None)
    texts = [one.text + "".join(one.choices) for subject in subjects for one in subject.questions]
    build_tiny_model(texts * 5, folder / "base", vocab_size=1000, hidden_size=64)
    shutil.copytree(folder / "base", folder / "exported")
    correct_prompts(folder / "exported", CHAT)
    config = CHAT | {"model_name_or_path": str(folder / "base")}
    (folder / "chat.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return folder


def asked(models: Path, monkeypatch, capsys, *words: str) -> str:
    places = [str(models / "chat.yaml"), "--exported", str(models / "exported"), "--exams-dir", str(SAMPLES / "exams")]
    monkeypatch.setattr(sys, "argv", ["bench_exam", *places, *words])
    bench_exam.main()
    return capsys.readouterr().out


def test_lm_eval_gives_the_same_answers(models, monkeypatch, capsys):
    table = asked(models, monkeypatch, capsys)
    assert "| 30 questions | seconds |" in table and "| lm-eval 0.4.13 | " in table and " | 0 | " in table


def test_another_prompt_is_seen(models, monkeypatch, capsys):
    template = models / "exported/chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace("assistant\n", "assistant"), encoding="utf-8")
    assert template.read_text(encoding="utf-8") != text
    with pytest.raises(SystemExit, match="the answers differ"):
        asked(models, monkeypatch, capsys, "--limit", "2")
    template.write_text(text, encoding="utf-8")
