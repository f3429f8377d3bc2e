"""medasst predict against an endpoint that fails in every ordinary way: killed, gone on with, in order, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from rigged_endpoint import KEY, Endpoint

from medasst_tools import cli
from medasst_tools.evaluation.score import read_predictions
from medasst_tools.inference.answers import AnswerStore

RECORDS = {
    "a_test": [{"instruction": f"问题{n}", "input": "补充" if n % 2 else "", "output": f"参考{n}"} for n in range(20)],
    "b_test": [
        {
            "instruction": f"再问{n}",
            "input": "",
            "output": f"参考{n}\n",
            "history": [["先问", "先答"]] * n,
        }
        for n in range(1, 6)
    ],
}


@pytest.fixture
def endpoint(monkeypatch):
    server = Endpoint()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.delenv("API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, records in RECORDS.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {"a_test": {"file_name": "a_test.jsonl", "columns": columns}}
    info["b_test"] = {"file_name": "b_test.jsonl", "columns": columns | {"history": "history"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def words(endpoint, data_dir, *more: str) -> list[str]:
    config = {
        "model_name_or_path": "owner/elsewhere", "template": "qwen", "do_predict": True, "predict_with_generate": True,
        "dataset_dir": str(data_dir), "eval_dataset": "a_test,b_test", "output_dir": str(data_dir.parent / "out"), "use_cpu": True,
    }  # fmt: skip
    path = data_dir.parent / "predict.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return ["predict", str(path), "--api-base", endpoint.base, *more]


def rows(data_dir) -> list[dict]:
    path = data_dir.parent / "out/generated_predictions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(system: str | None = None) -> list[str]:
    answers = []
    for record in [record for records in RECORDS.values() for record in records]:
        turns = [f"system:{system}"] if system else []
        turns += [f"{role}:{t}" for pair in record.get("history", []) for role, t in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
        turns.append("user:" + "\n".join(part for part in (record["instruction"], record["input"]) if part))
        answers.append("  答 " + "|".join(turns) + " \n")
    return answers


def kept_answers(data_dir):
    return data_dir.parent / "out/answers/predict.jsonl"


def test_in_order_greedy_as_asked_and_readable_by_score(endpoint, data_dir, capfd):
    endpoint.script = lambda question, attempt: time.sleep(0.05 if question == "问题0" else 0) or 200
    assert cli.main(words(endpoint, data_dir, "default_system=助手", "max_new_tokens=7", "--concurrency", "4")) == 0
    assert [row["predict"] for row in rows(data_dir)] == expected("助手")
    assert {(r["model"], r["temperature"], r["max_tokens"]) for r in endpoint.requests} == {("medasst", 0, 7)}
    assert 2 <= endpoint.most_at_once <= 4
    out = data_dir.parent / "out/generated_predictions.jsonl"
    references = [record["output"].strip() for rows in RECORDS.values() for record in rows]
    assert [row.label.strip() for row in read_predictions(out)] == references
    record = json.loads((data_dir.parent / "out/predictions.json").read_text())
    assert (
        record["datasets"] == {"a_test": 20, "b_test": 5}
        and record["made_of"]["settings"]["endpoint"] == endpoint.base
    )
    said = capfd.readouterr().err
    assert "tokens/s" in said and "going on" not in said


@pytest.mark.parametrize(
    "proxy",
    [
        {"ALL_PROXY": "socks://127.0.0.1:9"},
        {"http_proxy": "http://127.0.0.1:9"},
        {"HTTP_PROXY": "socks5h://127.0.0.1:9"},
    ],
)
def test_an_endpoint_on_this_machine_is_asked_past_any_proxy(endpoint, data_dir, monkeypatch, proxy):
    for name in ("no_proxy", "NO_PROXY"):  # as it was, afterwards
        monkeypatch.setenv(name, "intranet")
    for name, value in proxy.items():
        monkeypatch.setenv(name, value)
    assert cli.main(words(endpoint, data_dir, "max_samples=2")) == 0
    assert len(rows(data_dir)) == 4


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ([], None),
        (["template=qwen3", "enable_thinking=false"], {"enable_thinking": False}),
        (["template=qwen3", "enable_thinking=true"], {"enable_thinking": True}),
    ],
)
def test_thinking_is_asked_for_as_in_training(endpoint, data_dir, more, asked):
    assert cli.main(words(endpoint, data_dir, *more)) == 0
    assert [request.get("chat_template_kwargs") for request in endpoint.requests] == [asked] * 25


def test_failures_that_pass_are_retried(endpoint, data_dir):
    script = {
        "问题0": [429, 429],
        "问题2": [500, 503],
        "问题4": ["slow"],
        "问题6": ["drop"],
        "再问1": [502, 429, "drop"],
    }
    endpoint.script = lambda question, attempt: [*script.get(question, []), 200, 200, 200, 200][attempt - 1]
    assert cli.main(words(endpoint, data_dir, "--timeout", "1")) == 0
    assert [row["predict"] for row in rows(data_dir)] == expected()
    # more where a loaded machine takes more than the second for an answer
    assert all(endpoint.attempts[question] > len(failures) for question, failures in script.items())


def test_a_killed_run_goes_on(endpoint, data_dir, capfd):
    endpoint.script = lambda question, attempt: 200 if question < "问题5" or attempt > 1 else "hang"
    command = [sys.executable, "-m", "medasst_tools.cli", *words(endpoint, data_dir, "--concurrency", "8")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(endpoint.attempts) < 18 and process.poll() is None:  # 10 answered, 8 hang
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {request["messages"][-1]["content"] for request in endpoint.requests}
    kept = len(AnswerStore(kept_answers(data_dir)))
    assert kept >= 5 and not (data_dir.parent / "out/generated_predictions.jsonl").exists()
    with kept_answers(data_dir).open("ab") as file:
        file.write(b'{"key": "cut in the mid')
    endpoint.requests.clear()
    endpoint.script = lambda question, attempt: 200
    assert cli.main(words(endpoint, data_dir)) == 0
    asked = {request["messages"][-1]["content"] for request in endpoint.requests}
    assert f"going on, {25 - kept} of 25 records are still to be asked" in capfd.readouterr().err
    assert len(endpoint.requests) == 25 - kept and len(asked & before) <= len(before) - kept
    assert [row["predict"] for row in rows(data_dir)] == expected()


def test_what_was_asked_otherwise_is_asked_again(endpoint, data_dir):
    endpoint.script = lambda question, attempt: 200 if question != "再问5" else 400
    assert cli.main(words(endpoint, data_dir)) == 1
    endpoint.requests.clear()
    path = data_dir / "a_test.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("问题7", "另问7"), encoding="utf-8")
    endpoint.script = lambda question, attempt: 200
    assert cli.main(words(endpoint, data_dir)) == 0
    assert sorted(request["messages"][-1]["content"] for request in endpoint.requests) == ["再问5", "另问7\n补充"]
    assert cli.main(words(endpoint, data_dir, "max_new_tokens=9")) == 0
    assert len(endpoint.requests) == 2 + 25


def test_a_refused_record_costs_no_other(endpoint, data_dir, capsys):
    endpoint.script = lambda question, attempt: 400 if question == "再问2" else 200
    assert cli.main(words(endpoint, data_dir)) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "refused 1 of 25 records, first b_test, record 2: status 400" in said
    assert not (data_dir.parent / "out/generated_predictions.jsonl").exists()
    endpoint.requests.clear()
    assert cli.main(words(endpoint, data_dir, "--empty-if-refused")) == 0
    assert endpoint.requests == [] and [row["predict"] for row in rows(data_dir)].count("") == 1


@pytest.mark.parametrize("what", ["html", "no choices", "no content", "no json"])
def test_an_answer_without_text_is_refused(endpoint, data_dir, capsys, what):
    endpoint.script = lambda question, attempt: what if question == "再问2" else 200
    assert cli.main(words(endpoint, data_dir)) == 1
    assert "b_test, record 2: the answer holds no text" in capsys.readouterr().err.splitlines()[-1]


def test_an_address_that_is_no_api(endpoint, data_dir, capsys):
    endpoint.models = None
    assert cli.main(words(endpoint, data_dir)) == 2
    assert "lists no models: does --api-base end in /v1?" in capsys.readouterr().err.splitlines()[-1]


def test_an_endpoint_that_breaks_down_keeps_the_answers(endpoint, data_dir, capsys, monkeypatch):
    monkeypatch.setattr("medasst_tools.inference.endpoint.RETRIES", 0)
    endpoint.script = lambda question, attempt: 500 if question == "再问2" else 200
    assert cli.main(words(endpoint, data_dir, "--concurrency", "1")) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the endpoint failed (status 500)" in said and "the same command goes on" in said
    assert len(AnswerStore(kept_answers(data_dir))) == 21


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        (["--api-base", "127.0.0.1:8000/v1"], KEY, "--api-base must be http://HOST/v1"),
        (["--api-base", "http://me:secret@host/v1"], KEY, "a key belongs into API_KEY"),
        (["--api-base", "http://127.0.0.1:9/v1"], KEY, "http://127.0.0.1:9/v1: can't be reached"),
        ([], "sk-wrong", "wrong or missing key: set API_KEY or OPENAI_API_KEY (Incorrect API key: Bearer ***)"),
        ([], None, "wrong or missing key: set API_KEY or OPENAI_API_KEY"),
        (["eval_dataset=c_test"], KEY, "no dataset 'c_test'"),
        (["dataset_dir=nowhere"], KEY, "no nowhere/dataset_info.json"),
        (["--concurrency", "0"], KEY, "--concurrency must be 1 or more"),
        (["max_new_token=5"], KEY, "unknown key 'max_new_token'; did you mean 'max_new_tokens'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(endpoint, data_dir, capsys, monkeypatch, more, key, message):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert cli.main(words(endpoint, data_dir, *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and "secret" not in lines[0]
    assert endpoint.requests == [] and endpoint.lists <= 1  # what is wrong from the start isn't tried again


def test_an_unknown_or_unnamed_model(endpoint, data_dir, capsys):
    endpoint.models = ["one", "two"]
    assert cli.main(words(endpoint, data_dir)) == 2
    assert "has 2 models (one, two); name one with --model" in capsys.readouterr().err
    endpoint.script = lambda question, attempt: 404
    assert cli.main(words(endpoint, data_dir, "--model", "three")) == 2
    assert "no such model or path" in capsys.readouterr().err.splitlines()[-1]


def test_the_key_is_written_nowhere(endpoint, data_dir, tmp_path):
    endpoint.script = lambda question, attempt: 400 if question == "再问2" else 200
    command = [sys.executable, "-m", "medasst_tools.cli", *words(endpoint, data_dir)]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OPENAI_LOG": "debug"}
    )
    assert run.returncode == 1 and "sha256" not in run.stdout
    assert KEY not in run.stdout + run.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
