"""Chinese where the reader's language is Chinese: what the code can say and the catalogue lacks, errors and doctor as they come."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from medasst_tools import cli, language
from medasst_tools.machine import doctor

TOOLS = ROOT / "medasst_tools"
SAYING = {
    "UserError",
    "CheckFailed",
    "Check",
    "Located",
    "said",
    "_replace",
    "append",
    "locked",
}  # what they are given is shown
# where a message is also what a function returns, yields or gives a name, for one of these
RETURNING = {
    "config.py", "data/download.py", "data/registry.py", "inference/endpoint.py", "machine/doctor.py", "machine/hardware.py",
    "machine/hub.py", "machine/preflight.py", "provenance.py", "render.py", "training/checkpoints.py", "training/launch.py",
    "training/train.py",
}  # fmt: skip
# functions whose texts are no messages, or progress beside English numbers, or both languages' already
NOT_SAID = {"describe", "only_more_samples", "summary", "train", "_flat", "up_to_date"}
ENGLISH = re.compile(
    r"\b(the|an?|is|isn't|are|aren't|it|its|no|not|of|and|or|in|to|on|must|has|have|be|there|which|with|than|that|goes|was|needs?"
    r"|doesn't|can't|made|makes|given?|again|another|other)\b"
)
SENTENCE = re.compile(r"[a-z']{2,} [a-z{']")


def template(node: ast.AST) -> str | None:
    """Return a text's parts with {} for each value in it, None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join((template(part) or "") if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(node.left), template(node.right)]
        return None if parts == [None, None] else "".join("{}" if part is None else part for part in parts)
    return None


def templates_in(node: ast.AST):
    """Yield the texts of an expression, and those of the values within them."""
    if (text := template(node)) is not None:
        yield text
        inner = [part.value for part in ast.walk(node) if isinstance(part, ast.FormattedValue)]
    else:
        inner = list(ast.iter_child_nodes(node))
    for child in inner:
        yield from templates_in(child)


def said_in(path: Path) -> set[str]:
    """Return the templates of all that a module says to the user, sentences only."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    progress = {node for one in ast.walk(tree) if getattr(one, "name", "") in NOT_SAID for node in ast.walk(one)}
    for node in set(ast.walk(tree)) - progress:
        values = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in SAYING:
            values = [*node.args, *(word.value for word in node.keywords)]
        elif isinstance(node, ast.Return | ast.Yield | ast.Assign) and str(path.relative_to(TOOLS)) in RETURNING:
            values = [node.value] if node.value else []
        found |= {text for value in values for text in templates_in(value) if SENTENCE.search(text)}
    return found


TEMPLATES = sorted(set().union(*(said_in(path) for path in TOOLS.rglob("*.py"))))


def left_english(text: str) -> list[str]:
    """Return the English words that no translation would leave, but for commands and code."""
    return [found[0] for found in ENGLISH.finditer(re.sub(r"`[^`]*`|\S*[/=.*_]\S*", "", text))]


def test_there_is_a_lot_that_is_said():
    assert len(TEMPLATES) > 200


@pytest.mark.parametrize("english", TEMPLATES)
def test_all_that_is_said_has_its_chinese(english, monkeypatch):
    monkeypatch.setenv("MEDASST_LANG", "zh")
    places = iter(range(1, 20))
    text = re.sub(r"\{\}", lambda _: f"<{next(places)}>", english).strip("\n")
    said = language.said(text)
    assert not left_english(said), said
    assert [value for value in re.findall(r"<\d+>", text) if value not in said] == [], said


def test_no_entry_of_the_catalogue_is_stale():
    """The words of each stand in the code."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in TOOLS.rglob("*.py")]
    code = "\n".join(template(node) or "" for tree in trees for node in ast.walk(tree))
    words = {english: re.split(r"\{\}|; ", english) for english in language._catalogue()["messages"]}
    assert [
        english for english, parts in words.items() if any(part.format().strip(" ():") not in code for part in parts)
    ] == []


# ---- which language --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("variables", "chinese"),
    [
        ({}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LC_ALL": "zh_CN.UTF-8"}, True),
        ({"LC_MESSAGES": "zh_TW.UTF-8", "LANG": "en_US.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False),
        ({"LC_ALL": "", "LANG": "zh_CN.UTF-8"}, True),
        ({"MEDASST_LANG": "zh"}, True),
        ({"MEDASST_LANG": "zh", "LC_ALL": "en_US.UTF-8"}, True),
        ({"MEDASST_LANG": "en", "LC_ALL": "zh_CN.UTF-8"}, False),
    ],
)
def test_the_language_is_the_locales_unless_said(variables, chinese):
    assert language.is_chinese(variables) == chinese


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("no experiment 'y'; there are demo, medasst", "没有实验 'y'；可用的有 demo, medasst"),
        ("x.yaml: unknown key 'lr'; did you mean 'lora_rank'?; bf16 is 'yes', must be true or false",
         "x.yaml：未知的键 'lr'；是否想写 'lora_rank'？；bf16 为 'yes'，应为 true 或 false"),
        ("no folder saves/nothing; `make train EXPERIMENT=nothing` makes it; --anyway goes on all the same",
         "没有目录 saves/nothing；`make train EXPERIMENT=nothing` 会生成它；--anyway 可强行继续"),
        ("data is empty; get it again", "data 是空的；请重新获取"),
        ("a.json: no hub has it; put it there from https://a.cn, folder data/; a.json has 3 bytes instead of 5",
         "a.json：没有平台提供；请从 https://a.cn, folder data/ 获取后放在那里；a.json 有 3 字节，应为 5"),
        ("http://a/v1: wrong or missing key: set API_KEY or OPENAI_API_KEY (no (at all))",
         "http://a/v1：密钥错误或缺失：请设置 API_KEY 或 OPENAI_API_KEY（no (at all)）"),
        ("/a b/data (1)/no data.zip is empty; get it again", "/a b/data (1)/no data.zip 是空的；请重新获取"),
        ("what nobody ever wrote", "what nobody ever wrote"),
        ("llamafactory-cli train ended with status 1; the same command goes on from the last checkpoint; more in a.log\n  | no module; x: y",
         "llamafactory-cli train 以状态 1 结束；再次运行同一命令会从最后一个检查点接着训练；详见 a.log\n  | no module; x: y"),
    ],
)  # fmt: skip
def test_a_message_keeps_its_values(monkeypatch, english, chinese):
    monkeypatch.setenv("MEDASST_LANG", "zh")
    assert language.said(english) == chinese
    monkeypatch.setenv("MEDASST_LANG", "en")
    assert language.said(english) == english


# ---- as they come ----------------------------------------------------------------------------------------------------
ERRORS = [
    (["train", "nowhere.yaml"], "nowhere.yaml", "找不到"),
    (["train", "factory_configs/demo/train.yaml", "learning_rte=2"], "'learning_rate'", "是否想写"),
    (["train", "factory_configs/qwen2_7b/train.yaml"], "qwen2_7b", "没有微调"),
    (["predict", "factory_configs/demo/predict.yaml", "--workers", "0"], "--workers", "应不小于 1"),
    (["score", "x.jsonl", "--out", "x", "--workers", "0"], "--workers", "应不小于 1"),
    (["exam", "factory_configs/demo/chat.yaml", "--exams-dir", "nowhere", "--out", "x"], "nowhere", "没有考题目录"),
    (["score", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl", "会生成它"),
    (["report", "nope"], "'nope'", "没有实验"),
    (["convert", "--raw-dir", "nowhere", "--out-dir", "x"], "nowhere", "没有原始数据目录"),
    (["convert", "nope", "--raw-dir", "nowhere", "--out-dir", "x"], "'nope'", "没有数据集"),
    (["download", "nope"], "'nope'", "没有名为"),
    (["doctor", "nope"], "'nope'", "没有实验"),
    (["compare", "nowhere", "x"], "nowhere", "没有目录"),
    (["render", "--configs-dir", "nowhere"], "nowhere", "找不到"),
]


@pytest.mark.parametrize(("words", "value", "chinese"), ERRORS)
def test_errors(monkeypatch, capsys, tmp_path, words, value, chinese):
    monkeypatch.chdir(ROOT)
    for variables, expected in (({"MEDASST_LANG": "zh"}, True), ({"LC_ALL": "zh_CN.UTF-8"}, True), ({"LC_ALL": "C"}, False)):  # fmt: skip
        monkeypatch.delenv("MEDASST_LANG", raising=False)
        monkeypatch.delenv("LC_ALL", raising=False)
        for name, setting in variables.items():
            monkeypatch.setenv(name, setting)
        assert cli.main(words) == 2
        said = capsys.readouterr().err
        assert value in said and (chinese in said) == expected and len(said.splitlines()) == 1, said
        if expected:
            assert said.startswith(f"medasst {words[0]}: 错误: ") and not left_english(said), said


@pytest.mark.parametrize(("lang", "shown"), [("en", "ok     |"), ("zh", "正常   |")])
def test_doctors_columns_stand_one_below_the_other(monkeypatch, lang, shown):
    """A Chinese character is two wide."""
    monkeypatch.setenv("MEDASST_LANG", lang)
    assert doctor.column("ok", 7) + "|" == shown


@pytest.mark.parametrize("experiment", ["demo", "medasst", "medasst_qlora", "demo_dpo"])
def test_doctor_says_nothing_in_english(monkeypatch, capsys, experiment):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    monkeypatch.setenv("MEDASST_LANG", "zh")
    status = cli.main(["doctor", experiment])
    captured = capsys.readouterr()
    lines = [*captured.out.splitlines(), *captured.err.splitlines()]
    assert len(lines) > 12 and status in (0, 1)
    assert [line for line in lines if left_english(line)] == []
    assert [line for line in lines if not re.search("[一-鿿]", line)] == []
    monkeypatch.setenv("MEDASST_LANG", "en")
    cli.main(["doctor", experiment])
    assert not re.search("[一-鿿]", capsys.readouterr().out)


def test_doctors_json_is_the_same_in_every_language(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    said = []
    for name in ("zh", "en"):
        monkeypatch.setenv("MEDASST_LANG", name)
        cli.main(["doctor", "--json"])
        said.append(re.sub(r"[\d.]+ GiB", "", capsys.readouterr().out))
    assert said[0] == said[1] and '"status": "ok"' in said[0]


@pytest.mark.parametrize(
    ("words", "chinese"),
    [
        (["help"], "从安装到报告"),
        (["train", "EXPERIMENT=nope"], "没有实验 'nope'"),
        (["predict", "BACKEND=vllm"], "BACKEND 为 'vllm'"),
        (["train", "EXPERIMNT=demo"], "没有 make 变量 EXPERIMNT"),
        (["setup", "PYTHON=nopython"], "PYTHON 为 'nopython'"),
    ],
)
def test_make(words, chinese):
    for name in ("zh", "en"):
        run = subprocess.run(
            ["make", *words], cwd=ROOT, env=os.environ | {"MEDASST_LANG": name}, text=True, capture_output=True, check=False
        )  # fmt: skip
        said = run.stdout + run.stderr
        assert (chinese in said) == (name == "zh"), said
        assert bool(re.search("[一-鿿]", said)) == (name == "zh"), said
