"""Run one training config through `llamafactory-cli train`: once if it is finished, on from where it stopped if not.

Run: `medasst train factory_configs/demo/train.yaml [key=value ...]`, which `make train` calls; on several processes or
machines as docs/distributed.md says.

LLaMA-Factory resumes by itself from the last checkpoint in `output_dir`, whatever that checkpoint was trained on, stops
at a half-written one, and trains on when a finished run is started again. So this module notes beside the checkpoints
what the run is made of (`run.started.json`), removes checkpoints that are not whole, and writes `run.json` last: only
with that file is the run complete. A folder whose run was made of something else is moved aside, not overwritten.
"""

import argparse
import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import PROJECT_ROOT, model_sha256, read_json, sha256_of, write_json
from medasst_tools.machine import preflight
from medasst_tools.run_manifest import COMPLETE
from medasst_tools.training import checkpoints
from medasst_tools.training.launch import Launch, agree_on_step, child_environment, launchable, read_launch
from medasst_tools.training.tokenize_once import check_tokens

STARTED = "run.started.json"
# They change how a run is logged, saved or fed, not what comes out of it: changing one doesn't start the run again.
NEUTRAL_SETTINGS = {
    "dataloader_num_workers",
    "ddp_timeout",
    "include_num_input_tokens_seen",
    "logging_steps",
    "overwrite_output_dir",
    "plot_loss",
    "preprocessing_num_workers",
    "report_to",
    "save_on_each_node",
    "save_steps",
    "save_total_limit",
}
LOCK_PATIENCE = 5.0  # seconds: one that was just killed takes a moment to end
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "medasst-tools")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("config", type=Path, help="factory_configs/<experiment>/train.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for llamafactory-cli, over what the file says"
    )


def run(args: argparse.Namespace) -> None:
    """Train, resume or find the run finished."""
    config = load_config(args.config, args.overrides)
    launch = read_launch(os.environ, config)
    inputs = run_inputs(config)
    output_dir = Path(config["output_dir"])
    if read_json(output_dir / COMPLETE).get("inputs") == inputs:
        print(f"{output_dir}: finished before with the same config, data and base; nothing to do")
        return
    preflight.require(config)
    check_tokens(config, inputs["data"])
    if launch.rank and not config.get("save_on_each_node"):  # node 0 prepares the folder that they share, and writes
        step = agree_on_step(launch, lambda: checkpoints.whole_steps(output_dir))
        if step is None or not checkpoints.is_last_step(output_dir / f"checkpoint-{step}"):
            check_status(launch_training(args, config, launch))
        return
    with locked(output_dir) as lock:
        train(args, config, launch, inputs, lock)


def train(args: argparse.Namespace, config: dict[str, Any], launch: Launch, inputs: dict[str, Any], lock: int) -> None:
    """Bring the run in `output_dir` to its end, and write run.json."""
    output_dir = Path(config["output_dir"])
    note = claim_output_dir(output_dir, inputs)
    # of several machines with a folder each, none holds the random states of all processes
    processes = None if config.get("save_on_each_node") else note.get("processes")
    step = agree_on_step(launch, lambda: checkpoints.whole_steps(output_dir, processes))
    note = start_leg(output_dir, inputs, note, step, launch.processes)
    last = output_dir / f"checkpoint-{step}"
    if step is not None and checkpoints.is_last_step(last):
        print(f"{output_dir}: the last step was done, the kill took only the saving: finished from {last.name}")
        for name in ("train_results.json", "all_results.json"):
            (output_dir / name).unlink(missing_ok=True)  # an earlier kill may have left them
        checkpoints.finish_from(last, output_dir)
    else:
        started = time.monotonic()
        status = launch_training(args, config, launch, lock)
        if status != 0:
            write_json(output_dir / STARTED, end_leg(note, output_dir, time.monotonic() - started))
        check_status(status)
    write_json(output_dir / COMPLETE, complete(output_dir, config, note))
    (output_dir / STARTED).unlink(missing_ok=True)


def check_status(status: int) -> None:
    """Raise CheckFailed if the training ended with an error, which it has printed."""
    if status != 0:
        raise CheckFailed(
            f"llamafactory-cli train ended with status {status}; the same command goes on from the last checkpoint"
        )


REQUIRED = ("output_dir", "dataset", "dataset_dir", "model_name_or_path")


def load_config(
    path: Path, overrides: list[str], kind: str = "train.yaml", required: tuple[str, ...] = REQUIRED
) -> dict[str, Any]:
    """Return the config with `key=value` overrides, merged as LLaMA-Factory's `read_args` does; UserError if unusable."""
    from omegaconf import OmegaConf

    if bad := [word for word in overrides if "=" not in word or word.startswith("-")]:
        raise UserError(f"override {bad[0]!r} must be key=value, without dashes")
    try:
        config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides)))
    except FileNotFoundError:
        raise UserError(
            f"no {path}; `medasst render` writes the configs of factory_configs/experiments.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if missing := [key for key in required if not config.get(key)]:
        raise UserError(f"{path} says no {', '.join(missing)}; is it a {kind}?")
    return config


def run_inputs(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the run's outcome depends on: settings, sha256 of each dataset file, sha256 of a local base's files."""
    dataset_dir, base = Path(config["dataset_dir"]), Path(config["model_name_or_path"])
    datasets = {name: dataset_file(dataset_dir, name) for name in config["dataset"].split(",")}
    return {
        "config": {key: value for key, value in sorted(config.items()) if key not in NEUTRAL_SETTINGS},
        "data": {name: sha256_of(path) for name, path in datasets.items()},
        "base": model_sha256(base) or str(base),
    }


def dataset_file(dataset_dir: Path, name: str) -> Path:
    """Return a dataset's file; UserError if dataset_info.json or the folder hasn't got it."""
    info = read_json(dataset_dir / "dataset_info.json")
    if name not in info:
        raise UserError(
            f"no dataset {name!r} in {dataset_dir}/dataset_info.json; `medasst convert` makes it from its raw file"
        )
    path = dataset_dir / info[name]["file_name"]
    if not path.is_file():
        raise UserError(
            f"{dataset_dir}/dataset_info.json names {path}, which isn't there; run `medasst convert` again"
        )
    return path


@contextmanager
def locked(output_dir: Path, what: str = "trained") -> Iterator[int]:
    """Hold the folder's lock, and yield its file descriptor for the training to inherit: UserError if another has it.

    A kill that reaches this process alone leaves the training at work, and two in one folder would damage both.
    """
    path = output_dir.parent / f".{output_dir.name}.lock"  # beside the folder, which may be moved or removed
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        until = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"{output_dir} is being {what} by another process; wait for it, or end it first"
                    ) from None
                time.sleep(0.1)
        yield file.fileno()


# ---- legs: a run is one, and one more after each kill ---------------------------------------------------------------
def claim_output_dir(output_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the note of the run in `output_dir` if it is one of `inputs`, else {}, with what was there moved aside."""
    note = read_json(output_dir / STARTED)
    if output_dir.is_dir() and any(output_dir.iterdir()) and note.get("inputs") != inputs:
        previous = output_dir.parent / "previous" / f"{output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        previous.parent.mkdir(exist_ok=True)
        output_dir.rename(previous)
        print(f"{output_dir} held a run of another config, data or base: moved to {previous}")
        return {}
    return note


def start_leg(
    output_dir: Path, inputs: dict[str, Any], note: dict[str, Any], step: int | None, processes: int | None
) -> dict[str, Any]:
    """Make `output_dir` ready to go on from the checkpoint of `step`, or to start if None; note it there and return the note."""
    fresh = {"inputs": inputs, "legs": 0, "seconds": 0.0, "training_seconds": 0.0, "resumed_from": []}
    if step is None:
        shutil.rmtree(output_dir, ignore_errors=True)  # final weights without a checkpoint would stop LLaMA-Factory
        output_dir.mkdir(parents=True)
        note, rows = fresh, 0
    else:
        note = end_leg(fresh | note, output_dir)
        note["resumed_from"] = [earlier for earlier in note["resumed_from"] if earlier < step] + [step]
        for newer in output_dir.glob("checkpoint-*/"):  # whole here, and missing on another machine
            if checkpoints.NAME.fullmatch(newer.name) and int(newer.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(newer, ignore_errors=True)
        rows = checkpoints.rewind_log(output_dir, step)
        print(f"{output_dir}: going on from step {step}")
        if note.get("processes") != processes:
            print(
                f"warning: {note.get('processes')} processes trained until here, {processes or 'an open number'} will "
                "from here: a step takes other records, and the result is not the uninterrupted run's"
            )
    note |= {"processes": processes, "leg": {"began": time.time(), "log_rows": rows}}
    write_json(output_dir / STARTED, note)
    return note


def end_leg(note: dict[str, Any], output_dir: Path, seconds: float | None = None) -> dict[str, Any]:
    """Return the note with its leg counted; of a killed leg, whose end nobody saw, until it last wrote something."""
    if "leg" not in note:
        return note
    leg, rows = note["leg"], checkpoints.read_log(output_dir)
    if seconds is None:
        written = [path.stat().st_mtime for path in output_dir.rglob("*") if path.name != STARTED]
        seconds = max(0.0, max(written, default=0.0) - leg["began"])
    trained = checkpoints.logged_seconds(rows[-1]) if len(rows) > leg["log_rows"] else 0.0
    ended = {
        "legs": note["legs"] + 1,
        "seconds": round(note["seconds"] + seconds, 1),
        "training_seconds": note["training_seconds"] + trained,
    }
    return {key: value for key, value in note.items() if key != "leg"} | ended


def complete(output_dir: Path, config: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """Return run.json, after making LLaMA-Factory's results cover the whole run."""
    results = checkpoints.write_whole_run_results(output_dir, note["resumed_from"], note["training_seconds"])
    state = read_json(output_dir / checkpoints.STATE)
    manifest = Path(config["dataset_dir"]) / "manifest.json"
    ended = end_leg(note, output_dir, time.time() - note["leg"]["began"])
    return {
        "inputs": note["inputs"],
        "legs": ended["legs"],
        "resumed_from": note["resumed_from"],
        "seconds": ended["seconds"],
        "training_seconds": results.get("train_runtime"),
        "steps": state.get("global_step"),
        "tokens": state.get("num_input_tokens_seen") or None,
        "train_loss": results.get("train_loss"),
        "seed": config.get("seed", 42),
        "processes": note["processes"],
        "data_manifest": sha256_of(manifest) if manifest.is_file() else None,
    } | made_with()


def launch_training(args: argparse.Namespace, config: dict[str, Any], launch: Launch, lock: int | None = None) -> int:
    """Run `llamafactory-cli train` and return its status; if this process is told to end, it ends with all its workers."""
    overrides = [*args.overrides, *launch.overrides]
    if "include_num_input_tokens_seen" not in config:
        # a packed batch is full, and its mask numbers the examples
        overrides.append(f"include_num_input_tokens_seen={'all' if config.get('neat_packing') else 'non_padding'}")
    config = load_config(args.config, overrides)
    with launchable(args.config, overrides, config, torchrun="FORCE_TORCHRUN" in launch.environment) as words:
        command = [str(Path(sys.executable).with_name("llamafactory-cli")), "train", *words]
        held = () if lock is None else (lock,)
        child = subprocess.Popen(command, env=child_environment(os.environ, launch), pass_fds=held)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            return child.wait()
        except BaseException:
            _end_with_children(child)
            raise
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with_children(child: subprocess.Popen) -> None:
    import psutil

    try:
        processes = [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]
    except psutil.NoSuchProcess:
        return
    for signal_of in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            try:
                signal_of(process)
            except psutil.NoSuchProcess:
                continue
        _, processes = psutil.wait_procs(processes, timeout=10)
    child.wait()


def made_with() -> dict[str, Any]:
    """Return what else the run was made with: package versions, Python, git commit (None outside a checkout), hardware."""
    commit = subprocess.run(
        ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()},
    }


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
