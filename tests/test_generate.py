"""`medasst generate` answers as `llamafactory-cli train predict.yaml` does, goes on after a kill, and makes do with less memory."""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from medasst_tools import cli
from medasst_tools.inference import generate
from medasst_tools.inference.generate import (
    Crew,
    Part,
    Record,
    cut_into_parts,
    is_out_of_memory,
    read_records,
    whole_results,
)

PART_SIZE = 8


@pytest.fixture(scope="session")
def predict_config(tiny_run):
    """A predict.yaml of all sample test sets on the very small base: its answers are noise, and the same every time."""
    root = Path(__file__).resolve().parent.parent
    config = yaml.safe_load((root / "factory_configs/demo/predict.yaml").read_text(encoding="utf-8"))
    train = yaml.safe_load(tiny_run.read_text(encoding="utf-8"))
    config |= {key: train[key] for key in ("model_name_or_path", "dataset_dir")}
    config |= {
        "max_new_tokens": 12,
        "cutoff_len": 1024,
        "preprocessing_num_workers": None,
        "adapter_name_or_path": None,
    }
    config["per_device_eval_batch_size"] = 4
    path = tiny_run.with_name("predict.yaml")
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def plain_prediction(config: dict, log: Path) -> None:
    from llamafactory.train.tuner import run_exp

    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_exp(config)


@pytest.fixture(scope="session")
def plain(forkserver, predict_config):
    """The folder of LLaMA-Factory's own prediction of the whole."""
    folder = predict_config.with_name("plain")
    config = yaml.safe_load(predict_config.read_text(encoding="utf-8")) | {"output_dir": str(folder)}
    process = forkserver.Process(target=plain_prediction, args=(config, predict_config.with_name("plain.log")))
    process.start()
    process.join()
    assert process.exitcode == 0, predict_config.with_name("plain.log").read_text()[-3000:]
    return folder


def medasst_in_process(words: list[str], log: Path) -> None:
    os.setsid()  # so that its worker, which has LLaMA-Factory imported by being forked, is killed with it
    generate.CONTEXT = multiprocessing.get_context("fork")
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = cli.main(words)
    sys.exit(status)


def answer(predict_config: Path, name: str, *more: str) -> Path:
    out = predict_config.with_name(name)
    words = ["generate", str(predict_config), f"output_dir={out}", *more, "--part-size", str(PART_SIZE)]
    assert cli.main(words) == 0, "".join(path.read_text()[-3000:] for path in out.glob(".predicting/*.log"))
    return out


def assert_equal(ours: Path, theirs: Path) -> None:
    assert (ours / "generated_predictions.jsonl").read_bytes() == (theirs / "generated_predictions.jsonl").read_bytes()
    results = [json.loads((folder / "predict_results.json").read_text()) for folder in (ours, theirs)]
    scores = [{key: value for key, value in one.items() if "bleu" in key or "rouge" in key} for one in results]
    assert len(scores[0]) == 4 and scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert not (ours / ".predicting").exists()


def test_parts_answer_as_the_whole(forkserver, monkeypatch, predict_config, plain):
    monkeypatch.setattr(generate, "CONTEXT", forkserver)
    out = answer(predict_config, "parts")
    assert_equal(out, plain)
    about = json.loads((out / "predictions.json").read_text())
    assert about["n"] >= 40 and about["parts"] >= about["n"] / PART_SIZE


def test_a_killed_prediction_goes_on_with_several_workers(forkserver, monkeypatch, predict_config, plain, capsys):
    out, log = predict_config.with_name("killed_prediction"), predict_config.with_name("killed_prediction.log")
    words = ["generate", str(predict_config), f"output_dir={out}", "--part-size", str(PART_SIZE)]
    process = forkserver.Process(target=medasst_in_process, args=(words, log))
    process.start()
    while not list(out.glob(".predicting/part-*")) and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (out / "generated_predictions.jsonl").exists()
    monkeypatch.setattr(generate, "CONTEXT", forkserver)
    answer(predict_config, "killed_prediction", "--workers", "2")
    assert "going on after" in capsys.readouterr().out
    assert_equal(out, plain)


def greedy_for_memory(connection, environment, log):
    """A worker that can't hold more than 3 records: it raises torch's words at 4 to 5, and the system kills it at more."""
    import llamafactory.train.tuner as tuner

    run_exp = tuner.run_exp

    def limited(config):
        if config["per_device_eval_batch_size"] > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if config["per_device_eval_batch_size"] > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        run_exp(config)

    tuner.run_exp = limited
    generate.work_on_parts(connection, environment, log)


def test_too_little_memory_halves_the_batch(forkserver, monkeypatch, predict_config, plain, capsys):
    monkeypatch.setattr(generate, "CONTEXT", forkserver)
    monkeypatch.setattr(generate, "work_on_parts", greedy_for_memory)
    out = answer(predict_config, "small", "max_samples=4", "per_device_eval_batch_size=8")
    said = capsys.readouterr().out
    assert "out of memory with 8 records" in said and "going on with 4" in said and "going on with 2" in said
    rows = (out / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    everything = (plain / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 16 and set(rows) <= set(everything)


# ---- what is decided before anything runs ---------------------------------------------------------------------------
def record(place: int, length: int, dataset: str = "a") -> Record:
    return Record(place, dataset, b"{}", length)


def test_parts_hold_every_record_once_the_longest_first():
    lengths = [5, 100, 7, 3, 100, 50, 8]
    records = [record(at, length, "ab"[at % 2]) for at, length in enumerate(lengths)]
    parts = cut_into_parts(iter(records), 3)
    assert [len(part.records) for part in parts] == [3, 3, 1]  # 3 is less than half of 8, too
    assert sorted(r.place for part in parts for r in part.records) == list(range(7))
    assert [part.longest for part in parts] == [100, 8, 3]
    assert [r.dataset for r in parts[0].records] == ["a", "b", "b"]  # as LLaMA-Factory reads them: set by set


@pytest.mark.parametrize(("longest", "batch"), [(4096, 8), (4097, 8), (512, 36), (64, 64), (99999, 8)])
def test_a_batch_has_as_many_tokens_as_the_config_allows_for_its_longest(longest, batch, tmp_path):
    config = {"per_device_eval_batch_size": 8, "cutoff_len": 4096, "max_new_tokens": 512}
    part = Part(0, [record(at, longest) for at in range(64)])
    assert Crew(config, tmp_path, [{"CUDA_VISIBLE_DEVICES": "0"}]).batch_size(part) == batch
    assert Crew(config, tmp_path, [{}]).batch_size(part) == 8  # on a CPU


def test_results_are_means_over_records():
    parts = [
        (1, {"predict_bleu-4": 10.0, "predict_runtime": 2.0, "predict_samples_per_second": 0.5}),
        (3, {"predict_bleu-4": 20.0, "predict_runtime": 6.0, "predict_samples_per_second": 0.5}),
    ]
    assert whole_results(parts) == {
        "predict_bleu-4": 17.5, "predict_runtime": 8.0, "predict_samples_per_second": 0.5
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("no such template"), False),
    ],
)
def test_what_counts_as_too_little_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no nowhere.yaml; `medasst render` writes"),
        (["CONFIG", "--part-size", "0"], "--part-size is 0, must be 1 or more"),
        (["CONFIG", "--workers", "-1"], "--workers is -1, must be 1 or more"),
        (["CONFIG", "eval_dataset=nope"], "no dataset 'nope'"),
        (["CONFIG", "adapter_name_or_path=saves/nope"], "no saves/nope; `make train EXPERIMENT=nope` makes it"),
        (["CONFIG", "do_predict=false"], "says no do_predict; is it a predict.yaml?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(predict_config, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *(str(predict_config) if word == "CONFIG" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medasst generate: error: ") and message in line


def test_a_damaged_test_set_is_named(tmp_path):
    (tmp_path / "a_test.jsonl").write_text('{"instruction": "问", "output": "答"}\n{"instr', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"a_test": {"file_name": "a_test.jsonl"}}')
    with pytest.raises(Exception, match="a_test.jsonl, line 2 is damaged"):
        list(read_records({"dataset_dir": str(tmp_path), "eval_dataset": "a_test"}))
