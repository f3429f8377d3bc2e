"""Verbs one after the other, until one fails; which ones, steps.py says.

Each runs in a forked process of its own, which leaves nothing behind. What they all import, torch and LLaMA-Factory, takes
longer than the demo's exams; so without a GPU it is imported once, before they are forked. With one it isn't: importing
LLaMA-Factory touches the GPU, which a fork doesn't survive, and beside hours of work it is no matter. Nor can a process be
forked in which several of torch's threads have worked: OpenMP (GNU's) waits in its child for those that aren't there.
"""

import argparse
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from medasst_tools import console
from medasst_tools.config import read_yaml

FORK = multiprocessing.get_context("fork")
TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
PRELOADED: list = []  # the module below, once it is imported for this process and those forked from it
HEAVY = "llamafactory.train.tuner"  # what `llamafactory-cli train` imports, and prediction and exams need
# {verb: what it leaves when it is done}, of those that need it
RECORDS: dict[str, Callable[[argparse.Namespace], Path]] = {
    "tiny-model": lambda args: args.out / "tiny_model.json",
    "train": lambda args: Path(read_yaml(args.config)["output_dir"], "run.json"),
    "predict": lambda args: Path(read_yaml(args.config)["output_dir"], "predictions.json"),
    "exam": lambda args: args.out / "exam.json",
    "safety": lambda args: args.out / "safety.json",
}


def run(verbs: list[argparse.Namespace], run_verb: Callable[[argparse.Namespace], int]) -> int:
    """Run the verbs until one fails, and return its exit status, else 0."""
    heavy = [args for args in verbs if is_to_do(args)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        for args in verbs:
            if args in heavy[:1] and len(heavy) > 1 and not shutil.which("nvidia-smi"):
                preload()
            if status := run_forked(args, run_verb):
                return status
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run_forked(args: argparse.Namespace, run_verb: Callable[[argparse.Namespace], int]) -> int:
    """Run a verb in a fork of this process, which ends with it, and return its exit status."""
    child = FORK.Process(target=lambda: sys.exit(run_verb(args)))
    child.start()
    try:
        child.join()
    except KeyboardInterrupt:  # the child has it too, and says so; its status may be lost
        child.join()
        return INTERRUPTED
    except SystemExit:
        child.terminate()
        child.join()
        raise
    status = child.exitcode or 0
    return status if status >= 0 else 128 - status  # ended by a signal


def is_to_do(args: argparse.Namespace) -> bool:
    """Say whether a verb has never been done that needs LLaMA-Factory. One that is done and stale imports it by itself."""
    try:
        looks_only = getattr(args, "check", False)
        return args.verb in RECORDS and not looks_only and not RECORDS[args.verb](args).is_file()
    except Exception:  # a config that can't be read: the verb itself says what is wrong, when it is its turn
        return False


def preload() -> None:
    """Import LLaMA-Factory for all processes that are forked from here; no thread has worked by then."""
    gc.disable()  # it would look a dozen times through what an import leaves, a quarter of the time
    with console.logged(Path(os.devnull)):
        PRELOADED.append(importlib.import_module(HEAVY))
    gc.enable()
    gc.freeze()  # a million objects that stay: no fork looks through them, or copies their pages, again and again
