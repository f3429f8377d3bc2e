"""Training killed at random moments ends as if nobody had killed it; damaged checkpoints are skipped; one run at a time."""

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from medasst_tools import cli
from medasst_tools.files import sha256_of
from medasst_tools.report.figures import read_losses
from medasst_tools.training import checkpoints, train


def medasst_in_process(words: list[str], log: Path) -> None:
    """Run `medasst train` in a child that has imported LLaMA-Factory already; all that llamafactory-cli would do is real."""
    from llamafactory.train.tuner import run_exp

    def launch_training(args, config, launch, lock=None):
        run_exp(train.load_config(args.config, [*args.overrides, "include_num_input_tokens_seen=non_padding"]))
        return 0

    train.launch_training = launch_training
    os.environ["OMP_NUM_THREADS"] = "1"  # read at the first parallel region; a very small model is faster so
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = cli.main(words)
    sys.exit(status)


def start(forkserver, tiny_run: Path, name: str, *overrides: str):
    log = tiny_run.with_name(f"{name}.log")
    words = ["train", str(tiny_run), f"output_dir={tiny_run.parent}/saves/{name}", *overrides]
    process = forkserver.Process(target=medasst_in_process, args=(words, log))
    process.start()
    return process, log


def finish(forkserver, tiny_run: Path, name: str, *overrides: str) -> str:
    process, log = start(forkserver, tiny_run, name, *overrides)
    process.join()
    assert process.exitcode == 0, log.read_text()[-4000:]
    return log.read_text()


def checkpoint_steps(folder: Path) -> list[int]:
    found = [checkpoints.NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*")]
    return [int(match[1]) for match in found if match]


def kill_at_a_random_moment(process, saves: Path, dice: random.Random) -> None:
    """Kill in the start-up, or in the first tenth of a second after one or two new checkpoints began to be written."""
    newest = max(checkpoint_steps(saves), default=0)
    wanted, delay = dice.choice([(0, 1.5), (1, 0.1), (2, 0.1)])
    while wanted and process.is_alive() and max(checkpoint_steps(saves), default=0) < newest + 3 * wanted:
        time.sleep(0.002)
    time.sleep(dice.uniform(0, delay))
    process.kill()
    process.join()


@pytest.fixture(scope="session")
def killed_run(forkserver, tiny_run):
    """The same run twice: not interrupted, and with ten kills."""
    finish(forkserver, tiny_run, "whole")
    saves, dice = tiny_run.parent / "saves/killed", random.Random(20240607)
    exits = []
    for _ in range(10):
        process, log = start(forkserver, tiny_run, "killed")
        kill_at_a_random_moment(process, saves, dice)
        exits.append(process.exitcode)
    said = finish(forkserver, tiny_run, "killed")
    return {"exits": exits, "said": said, "whole": saves.with_name("whole"), "killed": saves}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_ten_random_kills_change_nothing(killed_run):
    assert killed_run["exits"] == [-signal.SIGKILL] * 10
    assert len(re.findall(r"going on from step \d+", killed_run["said"])) >= 5
    whole, killed = (sha256_of(killed_run[run] / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert whole == killed


def test_the_results_of_a_killed_run_cover_the_whole_run(killed_run):
    whole, killed = (
        {name: read(killed_run[run], name) for name in ("train_results.json", "run.json")}
        for run in ("whole", "killed")
    )
    ours, theirs = killed["train_results.json"], whole["train_results.json"]
    assert ours.keys() == theirs.keys()
    for key in ("epoch", "train_loss", "total_flos", "num_input_tokens_seen"):
        assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-6), key
    assert killed["run.json"]["legs"] >= 6 and whole["run.json"]["legs"] == 1
    assert killed["run.json"]["steps"] == whole["run.json"]["steps"] == 90
    assert killed["run.json"]["tokens"] == whole["run.json"]["tokens"] > 0
    assert killed["run.json"]["seconds"] > ours["train_runtime"] > 0
    losses = [read_losses(killed_run[run] / "trainer_log.jsonl") for run in ("whole", "killed")]
    assert [step for step, _ in losses[0]] == list(range(3, 91, 3))
    assert dict(losses[0]) == pytest.approx(dict(losses[1]), rel=1e-6)
    rows = [row for row in checkpoints.read_log(killed_run["killed"]) if "loss" in row]
    assert len(rows) == len({row["current_steps"] for row in rows})


def test_a_finished_run_is_not_run_again(killed_run, forkserver, tiny_run):
    before = sha256_of(killed_run["killed"] / "run.json")
    assert "finished before" in finish(forkserver, tiny_run, "killed").splitlines()[-1]
    assert sha256_of(killed_run["killed"] / "run.json") == before


def test_a_kill_while_the_finished_model_is_saved(killed_run, forkserver, tiny_run):
    """The last checkpoint is there, the final weights are cut short, and run.json isn't written."""
    saves = tiny_run.parent / "saves/saving"
    shutil.copytree(killed_run["whole"], saves)
    inputs = read(saves, "run.json")["inputs"]
    inputs["config"]["output_dir"] = str(saves)
    note = {"inputs": inputs, "legs": 0, "seconds": 0.0, "training_seconds": 0.0, "resumed_from": [], "processes": 1}
    (saves / "run.started.json").write_text(json.dumps(note | {"leg": {"began": time.time(), "log_rows": 0}}))
    (saves / "run.json").unlink()
    weights = saves / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    said = finish(forkserver, tiny_run, "saving")
    assert "finished from checkpoint-90" in said and "Running training" not in said
    assert sha256_of(weights) == sha256_of(killed_run["whole"] / "adapter_model.safetensors")
    ours, theirs = read(saves, "train_results.json"), read(killed_run["whole"], "train_results.json")
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-6)
    assert read(saves, "run.json")["tokens"] == read(killed_run["whole"], "run.json")["tokens"]


# ---- which checkpoint is whole --------------------------------------------------------------------------------------
def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flip_byte_in(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    path.write_bytes(bytes(data))


DAMAGES = {
    "nothing": (lambda folder: None, None),
    "weights cut short": (
        lambda folder: cut(folder / "adapter_model.safetensors"),
        "adapter_model.safetensors is cut",
    ),
    "weights missing": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
    "optimizer cut short": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut short"),
    "optimizer empty": (lambda folder: cut(folder / "optimizer.pt", 0), "optimizer.pt is cut short"),
    "optimizer has a wrong byte": (lambda folder: flip_byte_in(folder / "optimizer.pt"), "wrong checksum"),
    "optimizer missing": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer state"),
    "schedule missing": (lambda folder: (folder / "scheduler.pt").unlink(), "no scheduler.pt"),
    "schedule cut short": (lambda folder: cut(folder / "scheduler.pt", 0.9), "scheduler.pt is cut short"),
    "random state cut short": (lambda folder: cut(folder / "rng_state.pth"), "rng_state.pth is cut short"),
    "random state missing": (lambda folder: (folder / "rng_state.pth").unlink(), "0 of the processes' random states"),
    "state missing": (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "state cut short": (
        lambda folder: cut(folder / "trainer_state.json"),
        "trainer_state.json is missing, unreadable",
    ),
    "state of another step": (
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 4}'),
        "of another step",
    ),
    "half deleted": (lambda folder: [cut(path, 0) for path in folder.iterdir()], "trainer_state.json is missing"),
    "a shard missing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
        ),
        "model-00001-of-00002.safetensors, which isn't there",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_last_checkpoint_is_skipped_with_a_warning(killed_run, tmp_path, capsys, damage, message):
    """Of a real run: transformers wrote these."""
    for step in (87, 90):
        shutil.copytree(killed_run["whole"] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    damage(tmp_path / "checkpoint-90")
    assert checkpoints.whole_steps(tmp_path) == ([87, 90] if message is None else [87])
    said = capsys.readouterr().out
    assert said == "" if message is None else ("warning: " in said and "checkpoint-90" in said and message in said)
    assert (tmp_path / "checkpoint-best").is_dir()


def make_deepspeed_checkpoint(folder: Path, processes: int) -> None:
    """As DeepSpeed's engine names its files; the contents are torch.save's kind of archive."""
    (folder / "global_step5").mkdir(parents=True)
    (folder / "latest").write_text("global_step5")
    (folder / "trainer_state.json").write_text('{"global_step": 5, "max_steps": 9}')
    names = [f"global_step5/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
    for name in [*names, *(f"rng_state_{rank}.pth" for rank in range(processes))]:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("archive/data/0", b"0" * 1000)
    save_file({"weight": numpy.zeros(10, dtype=numpy.float32)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: None, None),
        (lambda folder: cut(next(folder.glob("global_step5/*rank_1_*.pt"))), "optim_states.pt is cut short"),
        (lambda folder: next(folder.glob("global_step5/*rank_1_*.pt")).unlink(), "1 of 2 processes' optimizer states"),
        (lambda folder: (folder / "rng_state_1.pth").unlink(), "1 of 2 processes' random states"),
    ],
)
def test_every_processs_part_of_a_deepspeed_checkpoint_must_be_there(tmp_path, damage, message):
    make_deepspeed_checkpoint(tmp_path / "checkpoint-5", 2)
    damage(tmp_path / "checkpoint-5")
    fault = checkpoints.fault_of(tmp_path / "checkpoint-5", processes=2)
    assert (fault is None) if message is None else (message in fault)


def test_no_two_trainings_in_one_folder(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOCK_PATIENCE", 0.1)
    (tmp_path / ".run.lock").touch()
    with (tmp_path / ".run.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cli.main(["train", str(tiny_run), f"output_dir={tmp_path}/run"]) == 2
    assert "is being trained by another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"), [("0:00:07", 7), ("1:02:03", 3723), ("1 day, 0:00:01", 86401), ("3 days, 1:00:00", 262800)]
)
def test_elapsed_time_of_the_log(text, seconds):
    assert checkpoints.logged_seconds({"elapsed_time": text}) == seconds


def test_losses_of_legs_that_began_between_two_logs():
    history = [
        {"step": 4, "loss": 1.0},
        {"step": 8, "loss": 3.0},
        {"step": 12, "loss": 2.0},
        {"train_loss": 9, "step": 12},
    ]
    assert checkpoints._logged_losses(history, [], until=12) == (24.0, 12)
    assert checkpoints._logged_losses(history, [6], until=12) == (4 * 1.0 + 2 * 3.0 + 4 * 2.0, 10)
    assert checkpoints._logged_losses(history, [6], until=6) == (4.0, 4)
