"""medasst judge: rigged judges behind a real server, whose bias and self-agreement the summary must show; a kill; mistakes."""

import json
import multiprocessing
import os
import random
import re
import signal
import threading

import pytest
from rigged_endpoint import KEY, Endpoint

from medasst_tools import cli
from medasst_tools.evaluation import judge
from medasst_tools.inference import endpoint

pytest.importorskip("evalscope")  # the extra `judge`
N = 24


class Judge(Endpoint):
    """`verdict(first, second)` is what it says of each aspect, or a whole reply, or a status."""

    def __init__(self, verdict):
        super().__init__()
        self.models, self.script, self.verdict = ["rigged"], self.judge, verdict

    def judge(self, text: str, attempt: int):
        first, second = re.search(
            r"【回答一】\n(.*)\n【回答一结束】\n\n【回答二】\n(.*)\n【回答二结束】", text, re.DOTALL
        ).groups()
        with self.lock:
            said = self.verdict(first, second)
        return json.dumps(dict.fromkeys(judge.ASPECTS, said)) if said in ("first", "second", "tie") else said


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Return run(verdict, *words) -> (status, judge.json or None, server) on two experiments' answers to the same questions."""
    monkeypatch.setenv("API_KEY", KEY)
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    for name, text in (("a", "请及时就医。{}"), ("b", "多喝水。{}")):
        rows = [{"prompt": f"问{at}|", "predict": text.format(at), "label": f"参考{at}"} for at in range(N)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "generated_predictions.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    servers = []

    def run(verdict, *words, b=True):
        server = Judge(verdict)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folders = [str(tmp_path / "a"), *([str(tmp_path / "b")] if b else [])]
        status = cli.main(["judge", *folders, "--api-base", server.base, *words])
        found = tmp_path / "a/judge.json"
        return status, json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None, server

    yield run
    for server in servers:
        server.shutdown()


def fair(first, second):
    return "first" if "就医" in first else "second" if "就医" in second else "tie"


def leaning(share: float):
    """Return a judge that prefers what stands first in this share of cases, and else what stands second."""
    generator = random.Random(1)
    return lambda first, second: "first" if generator.random() < share else "second"


@pytest.mark.parametrize(
    ("verdict", "difference", "position", "again", "other_order"),
    [
        (fair, (100, 100), (0, 0), (100, 100), (100, 100)),
        (lambda first, second: "first", (0, 0), (100, 100), (100, 100), (0, 0)),
        (lambda first, second: "tie", (0, 0), (0, 0), (100, 100), (100, 100)),
        (leaning(0.5), (-25, 25), (-25, 25), (25, 75), (25, 75)),
        (leaning(0.85), (-25, 25), (50, 90), (60, 90), (10, 50)),
    ],
    ids=["fair", "constant", "always tie", "random", "position-biased"],
)
def test_rigged_judges(judged, capsys, verdict, difference, position, again, other_order):
    status, report, server = judged(verdict)
    assert status == 0 and len(server.requests) == 4 * N and report["judge"] == "rigged"
    assert (report["n"], report["incomplete"]) == (N, 0) and list(report["aspects"]) == list(judge.ASPECTS)
    for row in report["aspects"].values():
        for key, (least, most) in (("difference", difference), ("position", position)):
            low, high = row["ci95"][key]
            assert least <= row[key] <= most and low <= row[key] <= high
        assert again[0] <= row["again"] <= again[1] and other_order[0] <= row["other_order"] <= other_order[1]
    lines = capsys.readouterr().out.splitlines()[-1 - len(judge.ASPECTS) :]
    assert lines[0].startswith("judge rigged; a = ") and f"both-orders-twice,greedy|n:{N},incomplete:0|" in lines[0]
    for line in lines[1:]:  # no verdict without bias, agreement and n
        assert re.search(r"a - b .*first - second .*asked again [\d.]+ %, in the other order [\d.]+ %; n 24$", line)


def test_what_is_asked_and_kept(judged, tmp_path):
    status, report, server = judged(fair, "--limit", "5", b=False)
    assert status == 0 and report["n"] == 5 and report["b"] == "references"
    rows = [json.loads(line) for line in (tmp_path / "a/judge.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 5 and all(row["b"].startswith("参考") and row["a"].startswith("请及时就医") for row in rows)
    assert rows[0]["original"][0] == dict.fromkeys(judge.ASPECTS, "first") == rows[0]["original"][1]
    assert rows[0]["swapped"][0]["overall"] == "second"
    request = server.requests[0]
    text = request["messages"][-1]["content"]
    assert request["temperature"] == 0
    for word in (
        "正确性",
        "安全性",
        "完整性",
        "就医指引",
        "语气",
        '"correctness": exactly one of "first" or "second" or "tie"',
    ):
        assert word in text
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "a").rglob("*.json*"))


def test_what_can_not_be_read_counts_for_nothing_and_is_said(judged, capsys):
    replies = iter(["很难说", '{"overall": "both"}'])
    status, report, _ = judged(lambda first, second: next(replies, "first"))
    assert status == 0 and report["incomplete"] in (1, 2) and report["n"] == N - report["incomplete"]
    assert f"incomplete:{report['incomplete']}" in capsys.readouterr().out


def test_only_what_is_missing_is_asked(judged, tmp_path, capfd):
    _, first, server = judged(fair, "--limit", "6")
    log = tmp_path / "a/answers/judge.jsonl"
    kept = log.read_text().splitlines(keepends=True)
    log.write_text("".join(kept[:2]) + kept[2][:50])  # killed while it wrote
    (tmp_path / "a/judge.json").unlink()
    words = ["judge", str(tmp_path / "a"), str(tmp_path / "b"), "--api-base", server.base, "--limit", "6"]
    assert cli.main(words) == 0 and len(server.requests) == 4 * (6 + 4)
    assert "going on: 2 of 6 answers are there" in capfd.readouterr().err
    assert json.loads((tmp_path / "a/judge.json").read_text()) == first
    assert cli.main(words) == 0 and len(server.requests) == 4 * (6 + 4)
    assert "judge.json: up to date" in capfd.readouterr().out


def test_a_killed_judgement_goes_on(judged, tmp_path):
    """SIGKILL in the middle; the second run asks only for what the first hadn't kept, and both end alike."""
    asked = []

    def slow(first, second):
        asked.append(1)
        if len(asked) == 4 * N // 2:
            os.kill(child.pid, signal.SIGKILL)
        return fair(first, second)

    server = Judge(slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["judge", str(tmp_path / "a"), str(tmp_path / "b"), "--api-base", server.base]
    child = multiprocessing.get_context("fork").Process(target=cli.main, args=(words,))
    child.start()
    child.join()
    kept = len((tmp_path / "a/answers/judge.jsonl").read_bytes().splitlines())
    assert child.exitcode == -signal.SIGKILL and 0 < kept < N and not (tmp_path / "a/judge.json").exists()
    asked.clear()
    asked += [1] * 4 * N  # no second kill
    assert cli.main(words) == 0
    assert len(asked) - 4 * N in (4 * (N - kept), 4 * (N - kept) + 4)  # a line that the kill cut is asked again
    server.shutdown()
    assert json.loads((tmp_path / "a/judge.json").read_text())["n"] == N


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["A", "B", "--api-base", "nowhere"], "--api-base must be http://HOST/v1"),
        (["A", "B", "--api-base", "http://127.0.0.1:9/v1"], "can't be reached: is the server running there?"),
        (["A", "B", "--api-base", "http://127.0.0.1:9/v1", "--limit", "-1"], "--limit is -1, must be 1 or more"),
        (["A", "none/x", "--api-base", "http://127.0.0.1:9/v1"], "`make predict EXPERIMENT=x` makes it"),
    ],
)
def test_mistakes_are_one_line(judged, tmp_path, capsys, words, message):
    places = {"A": str(tmp_path / "a"), "B": str(tmp_path / "b")}
    assert cli.main(["judge", *(places.get(word, word) for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_a_refused_key_is_named_and_never_shown(judged, capsys):
    status, report, _ = judged(lambda first, second: 401)
    error = capsys.readouterr().err
    assert status == 2 and report is None and KEY not in error
    assert "wrong or missing key: set API_KEY or OPENAI_API_KEY" in error and "the same command goes on" in error


def test_without_evalscope_the_extra_is_named(judged, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert judged(fair)[0] == 2
    assert "`make setup EXTRAS=judge` installs it" in capsys.readouterr().err
