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

    def launch_training(config, launch, lock=None):
        run_exp(train.as_launched(config, launch))

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


def kill_at_a_random_moment(process, saves: Path, wanted: int, dice: random.Random) -> None:
    """Kill in the start-up, or in the first tenth of a second after `wanted` new checkpoints began to be written."""
    newest, delay = max(checkpoint_steps(saves), default=0), 0.1 if wanted else 1.5
    while wanted and process.is_alive() and max(checkpoint_steps(saves), default=0) < newest + 3 * wanted:
        time.sleep(0.002)
    time.sleep(dice.uniform(0, delay))
    process.kill()
    process.join()


@pytest.fixture(scope="session")
def killed_run(forkserver, tiny_run):
    """The same run twice: not interrupted, and with four kills; `make test-slow` kills `make train` ten times."""
    finish(forkserver, tiny_run, "whole")
    saves, dice = tiny_run.parent / "saves/killed", random.Random(20240607)
    exits = []
    for checkpoints_until_then in (0, 1, 2, 1):
        process, _ = start(forkserver, tiny_run, "killed")
        kill_at_a_random_moment(process, saves, checkpoints_until_then, dice)
        exits.append(process.exitcode)
    said = finish(forkserver, tiny_run, "killed")
    return {"exits": exits, "said": said, "whole": saves.with_name("whole"), "killed": saves}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_random_kills_change_nothing(killed_run):
    assert killed_run["exits"] == [-signal.SIGKILL] * 4
    assert len(re.findall(r"going on from step \d+", killed_run["said"])) >= 2
    whole, killed = (sha256_of(killed_run[run] / "adapter_model.safetensors") for run in ("whole", "killed"))
    assert whole == killed


def test_the_totals_of_a_killed_run_are_the_whole_runs(killed_run):
    whole, killed = (read(killed_run[run], "run.json") for run in ("whole", "killed"))
    assert killed["steps"] == killed["max_steps"] == whole["steps"] == 45
    assert killed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-6)
    assert killed["tokens"] == whole["tokens"] > 0 and killed["epochs"] == pytest.approx(whole["epochs"])
    assert len(killed["resumed_from"]) >= 2 and whole["resumed_from"] == []
    losses = [read_losses(killed_run[run]) for run in ("whole", "killed")]
    assert [step for step, _ in losses[0]] == list(range(3, 46, 3))
    assert dict(losses[0]) == pytest.approx(dict(losses[1]), rel=1e-6)
    modes = {path.stat().st_mode & 0o777 for path in killed_run["killed"].glob("*.safetensors")}
    assert modes == {0o666 & ~current_umask()}  # readable like every other file


def test_the_mean_loss_is_over_steps_not_over_rows(tmp_path):
    rows = [{"step": 1, "loss": 4.0}, {"step": 3, "eval_loss": 9.0}, {"step": 5, "loss": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 5, "log_history": rows}))
    assert checkpoints.totals(tmp_path)["train_loss"] == pytest.approx((4.0 + 4 * 1.0) / 5)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_finished_run_is_not_run_again(killed_run, forkserver, tiny_run):
    before = sha256_of(killed_run["killed"] / "run.json")
    assert "up to date" in finish(forkserver, tiny_run, "killed").splitlines()[-1]
    assert sha256_of(killed_run["killed"] / "run.json") == before


def test_a_kill_while_the_finished_model_is_saved(killed_run, forkserver, tiny_run):
    """The last checkpoint is there, the final weights are cut short, and run.json isn't written."""
    saves = tiny_run.parent / "saves/saving"
    shutil.copytree(killed_run["whole"], saves)
    note = {"made_of": read(saves, "run.json")["made_of"], "resumed_from": [], "processes": 1}
    (saves / "run.started.json").write_text(json.dumps(note))
    (saves / "run.json").unlink()
    weights = saves / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    said = finish(forkserver, tiny_run, "saving")
    assert "finished from checkpoint-45" in said and "Running training" not in said
    assert sha256_of(weights) == sha256_of(killed_run["whole"] / "adapter_model.safetensors")
    assert read(saves, "run.json")["tokens"] == read(killed_run["whole"], "run.json")["tokens"]


def test_a_base_with_a_nan_ends_the_training_and_is_never_complete(forkserver, tiny_run):
    """In the real trainer; `medasst train` here has LLaMA-Factory in its own process, so only the outcome is looked at."""
    from safetensors.numpy import load_file

    base = tiny_run.parent / "nan_base"
    shutil.copytree(tiny_run.parent / "base", base)
    weights = load_file(base / "model.safetensors")
    name = next(key for key in weights if "mlp" in key)
    weights[name][0, 0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    process, log = start(forkserver, tiny_run, "nan", f"model_name_or_path={base}", "max_steps=1")
    process.join()
    assert process.exitcode == 1 and "NaN" in log.read_text(), log.read_text()[-2000:]
    assert not (tiny_run.parent / "saves/nan/run.json").exists()


# ---- which checkpoint is whole --------------------------------------------------------------------------------------
def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


DAMAGES = {
    "nothing": (lambda folder: None, None),
    "weights cut short": (
        lambda folder: cut(folder / "adapter_model.safetensors"),
        "adapter_model.safetensors is cut",
    ),
    "weights missing": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no weights"),
    "optimizer cut short": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut short"),
    "optimizer empty": (lambda folder: cut(folder / "optimizer.pt", 0), "optimizer.pt is cut short"),
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
    "half deleted": (lambda folder: [cut(path, 0) for path in folder.iterdir()], "adapter_model.safetensors is cut"),
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
    run = tmp_path / "run"
    for step in (42, 45):
        shutil.copytree(killed_run["whole"] / f"checkpoint-{step}", run / f"checkpoint-{step}")
    (run / "checkpoint-best").mkdir()
    damage(run / "checkpoint-45")
    assert checkpoints.whole_steps(run) == ([42, 45] if message is None else [42])
    said = capsys.readouterr().out
    assert said == "" if message is None else ("warning: " in said and "checkpoint-45" in said and message in said)
    assert (run / "checkpoint-best").is_dir()


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
def test_every_processs_part_of_a_deepspeed_checkpoint_must_be_there(tmp_path, capsys, damage, message):
    make_deepspeed_checkpoint(tmp_path / "checkpoint-5", 2)
    damage(tmp_path / "checkpoint-5")
    assert checkpoints.whole_steps(tmp_path, processes=2) == ([5] if message is None else [])
    assert message is None or message in capsys.readouterr().out


def test_no_two_trainings_in_one_folder(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOCK_PATIENCE", 0.1)
    (tmp_path / ".run.lock").touch()
    with (tmp_path / ".run.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cli.main(["train", str(tiny_run), f"output_dir={tmp_path}/run"]) == 2
    assert "is being trained by another process" in capsys.readouterr().err
