"""Several verbs in one call: one after the other, each in a process of its own, until one fails; LLaMA-Factory imported once."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from medasst_tools import chain
from medasst_tools.training.tiny_model import build_tiny_model, training_documents


def verbs(*names: str) -> list[argparse.Namespace]:
    return [argparse.Namespace(verb=name) for name in names]


def test_each_verb_runs_in_a_process_of_its_own_until_one_fails(tmp_path):
    def run_verb(args):
        with (tmp_path / "log").open("a") as log:
            print(args.verb, os.environ.pop("MEDASST_CHAIN_TEST", None), os.getpid() != parent, file=log)
        return {"b": 2}.get(args.verb, 0)

    parent, os.environ["MEDASST_CHAIN_TEST"] = os.getpid(), "there"
    assert chain.run(verbs("a", "b", "c"), run_verb) == 2
    assert (tmp_path / "log").read_text().splitlines() == ["a there True", "b there True"]
    assert chain.run(verbs("a"), lambda args: os.kill(os.getpid(), signal.SIGKILL)) == 137
    del os.environ["MEDASST_CHAIN_TEST"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_verb_that_runs(tmp_path, number, status):
    code = (
        "import argparse, os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from medasst_tools import chain, cli\n"
        "def run_verb(args):\n"
        "    cli.import_verb = lambda verb: argparse.Namespace(run=slow)\n"
        "    return cli.run_verb(args)\n"
        "def slow(args):\n"
        "    pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "sys.exit(chain.run([argparse.Namespace(verb='a')] * 2, run_verb))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MEDASST_LANG": "en"},
    )  # fmt: skip
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    send = os.killpg if number == signal.SIGINT else os.kill  # a terminal's Ctrl-C reaches them all
    send(run.pid, number)
    _, said = run.communicate(timeout=30)
    assert run.returncode == status
    lines = said.splitlines()
    assert lines == ["medasst a: interrupted; the same command goes on or starts again"] * (number == signal.SIGINT)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_is_done_is_not_prepared_for(tmp_path):
    config = tmp_path / "train.yaml"
    config.write_text(f"output_dir: {tmp_path}/saves\n")
    training = argparse.Namespace(verb="train", config=config)
    assert chain.is_to_do(training)
    (tmp_path / "saves").mkdir()
    (tmp_path / "saves/run.json").touch()
    assert not chain.is_to_do(training)
    assert not chain.is_to_do(argparse.Namespace(verb="train", config=tmp_path / "nowhere.yaml"))
    assert not chain.is_to_do(argparse.Namespace(verb="score"))
    exam = argparse.Namespace(verb="exam", out=tmp_path, check=False)
    assert chain.is_to_do(exam) and not chain.is_to_do(argparse.Namespace(**vars(exam) | {"check": True}))


def test_a_forked_training_is_llamafactorys_bit_for_bit(tiny_run):
    """Two in one call, whose LLaMA-Factory is imported once, against one that starts llamafactory-cli; one of them was killed.

    With two threads: a process in which torch's have worked can't be forked any more, its child would wait for ever.
    """
    folder = tiny_run.parent
    documents = list(training_documents(folder / "data"))
    build_tiny_model(
        documents, folder / "wide", vocab_size=1024, hidden_size=128, layers=1
    )  # large enough for two threads
    settings = f"finetuning_type=full max_steps=6 model_name_or_path={folder}/wide"
    words = {name: f"train {tiny_run} output_dir={folder}/{name} {settings}" for name in ("cli", "one", "two")}
    chained = "import sys; from medasst_tools import chain, cli; "
    chained += "sys.exit(chain.run([cli.parse(words.split()) for words in sys.argv[1:]], cli.run_verb))"
    for call in (["-m", "medasst_tools.cli", *words["cli"].split()], ["-c", chained, words["one"], words["two"]]):
        run = subprocess.run(
            [sys.executable, *call], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"},
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert "***** Running training" not in run.stdout + run.stderr
        if not (folder / "one").exists():
            shutil.copytree(folder / "cli", folder / "one")
            killed_at(folder / "one", 3)
    assert "one: going on from step 3" in run.stdout
    weights = {name: (folder / name / "model.safetensors").read_bytes() for name in words}
    assert len({hashlib.sha256(file).hexdigest() for file in weights.values()}) == 1
    logs = {name: (folder / name / "train.log").read_text() for name in words}
    assert all("***** Running training" in log for log in logs.values())
    assert "pkg_resources" in logs["cli"] and "pkg_resources" not in logs["two"]  # imported before its log began


def killed_at(output_dir, step: int) -> None:
    """Leave of a finished run what a kill after a step's checkpoint would have left."""
    run = json.loads((output_dir / "run.json").read_text())
    note = {key: run[key] for key in ("made_of", "processes", "resumed_from")}
    (output_dir / "run.started.json").write_text(json.dumps(note))
    for path in output_dir.iterdir():
        if path.is_file() and path.name not in ("run.started.json", "train.log", "trainer_log.jsonl"):
            path.unlink()
        elif path.is_dir() and path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


def test_a_reader_who_has_enough_is_no_error(tmp_path):
    """`medasst doctor | head -1`"""
    words = f"{sys.executable} -m medasst_tools.cli doctor | head -1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(run.stdout.splitlines()) == 1 and run.stderr == "" and run.returncode in (0, 141)
