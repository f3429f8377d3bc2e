"""`medasst predict` answers as `llamafactory-cli train predict.yaml` does, goes on after a kill, and makes do with less memory."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from medasst_tools import cli
from medasst_tools.inference import predict
from medasst_tools.inference.answers import AnswerStore
from medasst_tools.inference.predict import Share, halved


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
    """The bytes of LLaMA-Factory's own prediction of the whole, in file order."""
    folder = predict_config.with_name("plain")
    config = yaml.safe_load(predict_config.read_text(encoding="utf-8")) | {"output_dir": str(folder)}
    process = forkserver.Process(target=plain_prediction, args=(config, predict_config.with_name("plain.log")))
    process.start()
    process.join()
    assert process.exitcode == 0, predict_config.with_name("plain.log").read_text()[-3000:]
    return (folder / "generated_predictions.jsonl").read_bytes()


def medasst_in_process(words: list[str]) -> None:
    os.setsid()
    sys.exit(cli.main(words))


def run_in_child(forkserver, *words: str) -> int:
    process = forkserver.Process(target=medasst_in_process, args=(["predict", *words],))
    process.start()
    process.join()
    return process.exitcode


def test_it_answers_as_the_whole_and_asks_only_what_is_new(forkserver, predict_config, plain):
    out = predict_config.with_name("here")
    words = (str(predict_config), f"output_dir={out}")
    assert run_in_child(forkserver, *words) == 0, (out / "predict.log").read_text()[-3000:]
    assert (out / "generated_predictions.jsonl").read_bytes() == plain
    record = json.loads((out / "predictions.json").read_text())
    assert record["n"] == sum(record["datasets"].values()) == plain.count(b"\n") >= 40
    answered = (out / "answers/predict.jsonl").read_bytes()
    assert run_in_child(forkserver, *words, "max_samples=3") == 0
    rows = (out / "generated_predictions.jsonl").read_bytes().splitlines()
    assert len(rows) == 12 and set(rows) <= set(plain.splitlines())
    assert (out / "answers/predict.jsonl").read_bytes() == answered  # nothing was asked again
    assert run_in_child(forkserver, *words) == 0
    assert (out / "generated_predictions.jsonl").read_bytes() == plain


def test_a_killed_prediction_goes_on_with_several_workers(forkserver, monkeypatch, predict_config, plain):
    out = predict_config.with_name("killed_prediction")
    words = ["predict", str(predict_config), f"output_dir={out}"]
    process = forkserver.Process(target=medasst_in_process, args=(words,))
    process.start()
    store = out / "answers/predict.jsonl"
    while process.is_alive() and (not store.is_file() or store.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (out / "generated_predictions.jsonl").exists()
    with store.open("ab") as file:
        file.write(b'{"key": "cut in the mid')
    before = len(AnswerStore(store))
    assert 4 <= before < plain.count(b"\n")
    monkeypatch.setattr(predict, "CONTEXT", forkserver)
    assert cli.main([*words, "--workers", "2"]) == 0, (out / "predict.log").read_text()[-3000:]
    assert (out / "generated_predictions.jsonl").read_bytes() == plain
    assert len(list(out.glob("answers/predict-*.jsonl"))) == 2


def greedy_for_memory(words: list[str]) -> None:
    """A model that can't hold more than 3 records: it raises torch's words."""
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

    real = CustomSeq2SeqTrainer.predict

    def limited(self, dataset, *args, **kwargs):
        if len(dataset) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return real(self, dataset, *args, **kwargs)

    CustomSeq2SeqTrainer.predict = limited
    sys.exit(cli.main(words))


def test_too_little_memory_halves_the_batch(forkserver, predict_config, plain):
    out = predict_config.with_name("small")
    words = ["predict", str(predict_config), f"output_dir={out}", "max_samples=4", "per_device_eval_batch_size=8"]
    process = forkserver.Process(target=greedy_for_memory, args=(words,))
    process.start()
    process.join()
    assert process.exitcode == 0, (out / "predict.log").read_text()[-3000:]
    rows = (out / "generated_predictions.jsonl").read_bytes().splitlines()
    assert len(rows) == 16 and set(rows) <= set(plain.splitlines())


# ---- what is decided before anything runs ---------------------------------------------------------------------------
def share(batch: int = 8, number: int = 0, of: int = 1) -> Share:
    config = {"per_device_eval_batch_size": batch, "cutoff_len": 4096, "max_new_tokens": 512}
    return Share(config, {}, AnswerStore(Path("none")), number, of, sys.stderr)


def test_batches_hold_every_record_once_the_longest_first():
    lengths = dict(enumerate([5, 100, 7, 3, 100, 50, 8]))
    batches = share(batch=3).batches(lengths, on_gpu=False)
    assert [[lengths[at] for at in batch] for batch in batches] == [[100, 100, 50], [8, 7, 5], [3]]
    halves = [share(3, number, 2).batches(lengths, on_gpu=False) for number in (0, 1)]
    assert sorted(at for half in halves for batch in half for at in batch) == list(range(7))


@pytest.mark.parametrize(("longest", "size"), [(4096, 8), (512, 36), (64, 64), (99999, 1)])
def test_on_a_gpu_a_batch_has_as_many_tokens_as_the_config_allows(longest, size):
    lengths = dict.fromkeys(range(64), longest)
    assert len(share().batches(lengths, on_gpu=True)[0]) == size
    assert len(share().batches(lengths, on_gpu=False)[0]) == 8


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
    if expected:
        assert halved(error, [[1, 2, 3], [4]]) == [[1, 2], [3], [4]]
    else:
        with pytest.raises(type(error)):
            halved(error, [[1, 2, 3]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "no nowhere.yaml; `medasst render` writes"),
        (["CONFIG", "--workers", "-1"], "--workers is -1, must be 1 or more"),
        (["CONFIG", "eval_dataset=nope"], "no dataset 'nope'"),
        (["CONFIG", "adapter_name_or_path=saves/nope"], "no saves/nope; `make train EXPERIMENT=nope` makes it"),
        (["CONFIG", "do_predict=false"], "says no do_predict; is it a predict.yaml?"),
        (["CONFIG", "max_sample=5"], "unknown key 'max_sample'; did you mean 'max_samples'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(predict_config, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", *(str(predict_config) if word == "CONFIG" else word for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("medasst predict: error: ") and message in line
