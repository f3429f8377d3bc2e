"""Run one training config through `llamafactory-cli train`: once if it is finished, on from where it stopped if not.

Run: `medasst train factory_configs/demo/train.yaml [key=value ...] [--restart]`, which `make train` calls; on several
processes or machines as docs/distributed.md says.

LLaMA-Factory resumes by itself from the last checkpoint in `output_dir`, whatever that checkpoint was trained on, stops
at a half-written one, and trains on when a finished run is started again. So this module notes beside the checkpoints
what the run is made of (`run.started.json`), and writes `run.json` last: only with that file is the run complete. A
training that is there, finished or begun, is never restarted, moved or deleted without `--restart`.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from medasst_tools import chain, console, provenance
from medasst_tools.config import load
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import locked, open_permissions, read_json, write_json
from medasst_tools.machine import hardware, preflight
from medasst_tools.provenance import RUN, STARTED
from medasst_tools.training import checkpoints
from medasst_tools.training.launch import Launch, agree_on_step, child_environment, read_launch, written

LOCK_PATIENCE = 5.0  # seconds: one that was just killed takes a moment to end
PAIRED_STAGES = ("dpo", "rm")
LOOK_EVERY = 1.0  # seconds between looks at the log, for a loss that is no number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    preflight.add_config_arguments(parser, "train")
    smoke = "leave a finished training as it is if only max_samples differs: a smoke test of what comes after"
    for option, text in (
        ("--restart", "move what is there to saves/previous/ and train anew"),
        ("--restart-if-other", "the same, only if it was made of something else"),
        ("--more-samples-will-do", smoke),
    ):
        parser.add_argument(option, action="store_true", help=text)


def run(args: argparse.Namespace) -> None:
    """Train, resume, find the run finished, or say why none of these is right."""
    config = load(args.config, args.overrides, "train")
    launch = read_launch(os.environ, config)
    about = made_of(config)
    check_stage(config)
    output_dir = Path(config["output_dir"])
    different = what_is_against(output_dir, about, launch)
    restart = args.restart or (args.restart_if_other and different)
    if not restart:
        if (output_dir / RUN).is_file() and not different:
            print(f"{output_dir}: up to date")
            return
        if different and args.more_samples_will_do and only_more_samples(output_dir, different):
            print(f"{output_dir}: trained on all samples, not {config['max_samples']} a dataset; used as it is")
            return
        if different:
            raise UserError(refusal(output_dir, different, args))
    preflight.require(config, args)
    if launch.rank and not config.get("save_on_each_node"):  # node 0 prepares the folder that they share, and writes
        step = agree_on_step(launch, lambda: checkpoints.whole_steps(output_dir))
        if step is None or not checkpoints.is_last_step(output_dir / f"checkpoint-{step}"):
            launch_training(config, launch)
        return
    lock = output_dir.parent / f".{output_dir.name}.lock"  # beside the folder, which may be moved
    busy = f"{output_dir} is being trained by another process; wait for it, or end it first"
    with locked(lock, busy, LOCK_PATIENCE) as held:
        if restart and output_dir.exists():
            check_with_llamafactory(config)
            print(f"{output_dir}: moved to {checkpoints.move_aside(output_dir)}")
        train(config, launch, about, held)


def made_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the run's outcome depends on: settings, sha256 of each dataset, identity of the base."""
    base = provenance.model_identity(config)  # with the adapter that it goes on with, or after: DPO on a finished SFT
    return provenance.made_of(provenance.settings_that_matter(config), provenance.data_hashes(config, "dataset"), base)


def check_stage(config: dict[str, Any]) -> None:
    """Raise UserError for pairs in another stage than dpo or rm, and for the reverse: LLaMA-Factory says so after its start."""
    info, stage = read_json(Path(config["dataset_dir"]) / "dataset_info.json") or {}, config.get("stage", "sft")
    for name in provenance.dataset_names(config["dataset"]):
        pairs = bool(info.get(name, {}).get("ranking"))
        if pairs != (stage in PAIRED_STAGES):
            holds = "pairs of answers" if pairs else "single answers"
            only = f"stages {' and '.join(PAIRED_STAGES)} train on pairs (layout preference), the others don't"
            raise UserError(f"stage is {stage}, but {name} holds {holds}; {only}")


def what_is_against(output_dir: Path, about: dict[str, Any], launch: Launch) -> list[str]:
    """Return what in `output_dir` is of another run than this one, empty if nothing is."""
    finished = provenance.read_run(output_dir)
    if finished:
        gone = [f"{name} was changed or removed" for name in provenance.changed_outputs(output_dir / RUN, finished)]
        return provenance.differences(finished["made_of"], about) + gone
    there = [path.name for _, path in checkpoints.numbered(output_dir)]
    there += [path.name for path in output_dir.glob("*.safetensors")]
    note = read_json(output_dir / STARTED)
    if not there:
        return []  # nothing to lose
    if note is None:
        return [f"it holds {', '.join(sorted(there)[:3])} and no {STARTED}: not trained by medasst"]
    differing = provenance.differences(note["made_of"], about)
    if note["processes"] != launch.processes:
        differing.append(f"number of processes {note['processes']} -> {launch.processes or 'open'}")
    return differing


def only_more_samples(output_dir: Path, different: list[str]) -> bool:
    """Say whether the training in `output_dir` is finished, on all samples, and differs from this one in that alone."""
    return (output_dir / RUN).is_file() and all(word.startswith("max_samples unset ") for word in different)


def refusal(output_dir: Path, different: list[str], args: argparse.Namespace) -> str:
    """Return one line with the difference and both ways on."""
    state = "is finished" if (output_dir / RUN).is_file() else "has begun"
    words = " ".join([str(args.config), *args.overrides])
    return (
        f"the training in {output_dir} {state} and is of something else: {'; '.join(different)}. Keep it: give the settings "
        f"that it has, or output_dir=saves/another. Train anew: `medasst train {words} --restart` (make: RESTART=1), "
        f"which moves it to {output_dir.parent}/previous/"
    )


def train(config: dict[str, Any], launch: Launch, about: dict[str, Any], lock: int) -> None:
    """Bring the run in `output_dir` to its end, and write run.json."""
    output_dir = Path(config["output_dir"])
    # of several machines with a folder each, none holds the random states of all processes
    processes = None if config.get("save_on_each_node") else launch.processes
    step = agree_on_step(launch, lambda: checkpoints.whole_steps(output_dir, processes))
    note = begin(output_dir, about, step, launch.processes)
    last = output_dir / f"checkpoint-{step}"
    if step is not None and checkpoints.is_last_step(last):
        print(f"{output_dir}: the last step was done, the kill took only the saving: finished from {last.name}")
        checkpoints.finish_from(last, output_dir)
    else:
        launch_training(config, launch, lock)
    run = complete(output_dir, config, note)
    write_json(output_dir / RUN, run)
    (output_dir / STARTED).unlink(missing_ok=True)
    loss = "no loss logged" if run["train_loss"] is None else f"mean loss {run['train_loss']:.3f}"
    print(
        f"{output_dir}: trained {run['steps']} steps in {run['seconds']:.0f} s, {loss}; run {provenance.run_id(run)}"
    )


def begin(output_dir: Path, about: dict[str, Any], step: int | None, processes: int | None) -> dict[str, Any]:
    """Make `output_dir` ready to go on from the checkpoint of `step`, or to start if None; return the note that is left there."""
    note: dict[str, Any] = read_json(output_dir / STARTED) or {"resumed_from": []}
    if step is None:
        note = {"resumed_from": []}
        if (output_dir / STARTED).is_file():  # what a kill left before the first checkpoint would stop LLaMA-Factory
            for path in output_dir.glob("*.safetensors"):
                path.unlink()
    else:
        for newer, folder in checkpoints.numbered(output_dir):  # whole here, and missing on another machine
            if newer > step:
                print(f"{folder}: not on every machine; kept in {checkpoints.move_aside(folder)}")
        note["resumed_from"] = [*note["resumed_from"], step]
        print(f"{output_dir}: going on from step {step}")
    note |= {"made_of": about, "processes": processes}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / STARTED, note)
    return note


def complete(output_dir: Path, config: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """Return run.json; CheckFailed if not all steps were made, or the weights aren't numbers."""
    totals = checkpoints.totals(output_dir)
    if not checkpoints.is_last_step(output_dir):
        raise CheckFailed(
            f"{output_dir}: LLaMA-Factory ended after {totals['steps']} of {totals['max_steps']} steps; the same command goes on"
        )
    if fault := checkpoints.weights_fault(output_dir):
        raise CheckFailed(
            f"{output_dir}: {fault}: the training went wrong; a lower learning_rate or other data, and --restart"
        )
    open_permissions(output_dir)
    return (
        provenance.record(output_dir / RUN, note["made_of"], sorted(output_dir.glob("*.safetensors")))
        | totals
        | {"seed": config.get("seed", 42), "processes": note["processes"], "resumed_from": note["resumed_from"]}
        | hardware.made_with()
    )


def check_with_llamafactory(config: dict[str, Any]) -> None:
    """Let LLaMA-Factory's own parser read the config, which takes seconds, before anything is moved; UserError if it won't."""
    from llamafactory.hparams import get_train_args

    try:
        get_train_args(dict(config))
    except (ValueError, TypeError, AttributeError, OSError, ImportError, AssertionError) as error:
        raise UserError(f"LLaMA-Factory refuses this config: {' '.join(str(error).split())[:300]}") from None


def launch_training(config: dict[str, Any], launch: Launch, lock: int | None = None) -> None:
    """Run `llamafactory-cli train`, its output in `train.log` beside the model; CheckFailed if it fails.

    It ends with this process, and when its loss is no number.
    """
    output_dir = Path(config["output_dir"])
    log = output_dir / (f"train-{launch.rank}.log" if launch.rank else "train.log")
    with written(as_launched(config, launch)) as path, console.log_of_child(log) as output:
        command = ["llamafactory-cli", "train", path]
        environment = child_environment(os.environ, launch)
        fork = chain.PRELOADED and "FORCE_TORCHRUN" not in launch.environment
        child = fork_with(command, environment, output) if fork else start(command, environment, output, lock)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if status := _wait(child, output_dir):
                ended = f"llamafactory-cli train ended with status {status}; the same command goes on from the last checkpoint"
                raise CheckFailed(f"{ended}; {console.end_of(log)}")
        except BaseException:
            _end_with_children(child)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def as_launched(config: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """Return the config as llamafactory-cli gets it: with the tokens counted, and NaN logged as such, not as 0."""
    # a packed batch is full, and its mask numbers the examples
    tokens = "all" if config.get("neat_packing") else "non_padding"
    return {"include_num_input_tokens_seen": tokens} | config | launch.settings | {"logging_nan_inf_filter": False}


def start(command: list[str], environment: dict[str, str], output: int | None, lock: int | None) -> psutil.Process:
    """Start the command, which stands beside this Python, with the lock's descriptor."""
    program, *words = command
    words = [str(Path(sys.executable).with_name(program)), *words]
    held = () if lock is None else (lock,)
    return psutil.Popen(words, env=environment, pass_fds=held, stdout=output, stderr=output)


def fork_with(command: list[str], environment: dict[str, str], output: int | None) -> psutil.Process:
    """Start the command in a fork of this process, which has imported what it needs, and holds the lock."""

    def run_command() -> None:
        from llamafactory.cli import main

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = command
        main()

    child = chain.FORK.Process(target=run_command)
    child.start()
    assert child.pid
    return psutil.Process(child.pid)


def _wait(child: psutil.Process, output_dir: Path) -> int:
    """Show how far the child is and return its status; a training whose loss is no number is ended, with CheckFailed."""
    seen, status = len(checkpoints.read_log(output_dir)), None
    with console.bar(sys.stderr, desc=f"train {output_dir.name}", unit="step") as bar:
        while status is None:
            with contextlib.suppress(psutil.TimeoutExpired):
                status = child.wait(LOOK_EVERY)
            rows = checkpoints.read_log(output_dir)[seen:]
            if rows:
                bar.total = rows[-1].get("total_steps")
                bar.update(rows[-1]["current_steps"] - bar.n)
            if wrong := [row["current_steps"] for row in rows if not math.isfinite(row.get("loss", 0.0))]:
                raise CheckFailed(
                    f"{output_dir}: the loss at step {wrong[0]} is NaN or infinite, and the training was stopped. Look for a base "
                    "with NaN, a learning_rate that is too high, or broken records; then train anew with --restart"
                )
    return status


def _end_with_children(child: psutil.Process) -> None:
    try:
        processes = [*child.children(recursive=True), child]
    except psutil.NoSuchProcess:
        return
    for signal_of in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                signal_of(process)
        _, processes = psutil.wait_procs(processes, timeout=10)
