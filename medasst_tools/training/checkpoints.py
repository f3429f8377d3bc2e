"""Which checkpoints of a run a training can go on from exactly, and how a run that was killed after its last step is finished.

LLaMA-Factory resumes from the checkpoint with the highest number, whatever state it is in. A kill, a full disk or a
power cut can leave one half-written, half-deleted or cut short, so `medasst train` looks first. What has no whole weights
is removed; whole weights are never deleted, but moved aside.
"""

import itertools
import json
import math
import re
import shutil
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from medasst_tools.language import said

NAME = re.compile(r"checkpoint-(\d+)")  # any other folder is the user's own
STATE, LOG = "trainer_state.json", "trainer_log.jsonl"
# what only a resumed training needs: the rest of a checkpoint is what LLaMA-Factory writes as the finished model
ONLY_FOR_RESUME = re.compile(r"(optimizer|rng_state|scheduler|scaler|pytorch_model_fsdp).*|latest|zero_to_fp32\.py")


def numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint, whole or not, oldest first."""
    return sorted((int(match[1]), path) for path in output_dir.glob("*/") if (match := NAME.fullmatch(path.name)))


def whole_steps(output_dir: Path, processes: int | None = None) -> list[int]:
    """Clear away the checkpoints that no training can go on from, saying why; return the others' steps, oldest first.

    processes: how many trained, where that is known: each leaves its own random state.
    """
    steps = []
    for step, folder in numbered(output_dir):
        fault = weights_fault(folder)
        if fault:
            print(said(f"warning: {folder} is damaged and skipped: {fault}; removed"))
            shutil.rmtree(folder, ignore_errors=True)
        elif fault := _state_fault(folder) or _missing_part(folder, processes) or _torch_fault(folder):
            kept = move_aside(folder)
            print(said(f"warning: {folder} is skipped: {fault}; its weights are whole and kept in {kept}"))
        else:
            steps.append(step)
    return steps


def move_aside(folder: Path) -> Path:
    """Move a folder under saves/ (or wherever its run lies) to `previous/` there, under a name of its own; return the new place."""
    run = folder.parent if NAME.fullmatch(folder.name) else folder
    name = run.name if run == folder else f"{run.name}-{folder.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    target = next(place for one in names if not (place := run.parent / "previous" / one).exists())
    target.parent.mkdir(exist_ok=True)
    return folder.rename(target)


# ---- faults ---------------------------------------------------------------------------------------------------------
def weights_fault(folder: Path) -> str | None:
    """Return what is wrong with a folder's weights, None if they are whole and every number in them is one."""
    weights = {path.name: path for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        shards = set(_read(index).get("weight_map", {}).values())
        if not shards or shards - weights.keys():
            return f"{index.name} names {', '.join(sorted(shards - weights.keys())) or 'nothing'}, which isn't there"
    for path in weights.values():
        if fault := _safetensors_fault(path):
            return fault
    return None if weights or (folder / "latest").is_file() else "it has no weights"


def _safetensors_fault(path: Path) -> str | None:
    import torch
    from safetensors import SafetensorError, safe_open

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a process in which several have worked can't be forked any more, as chain.py does
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                if not file.get_tensor(name).isfinite().all():
                    return f"{path.name} holds NaN or infinity in {name}"
    except (SafetensorError, OSError):
        return f"{path.name} is cut short or unreadable"
    finally:
        torch.set_num_threads(threads)
    return None


def _state_fault(checkpoint: Path) -> str | None:
    """trainer_state.json is written last by process 0."""
    whole = _read(checkpoint / STATE).get("global_step") == int(checkpoint.name.removeprefix("checkpoint-"))
    return None if whole else f"{STATE} is missing, unreadable or of another step"


def _missing_part(checkpoint: Path, processes: int | None) -> str | None:
    """Return what a resume would silently do without: optimizer, schedule, random states."""
    names = {path.name for path in checkpoint.iterdir()}
    if "latest" in names:  # DeepSpeed: each process has its share of the optimizer in the folder that `latest` names
        folder = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
        shares = len(list(folder.glob("*optim_states.pt")))
        if shares == 0 or (processes and shares < processes):
            return f"{folder.name} has {shares} of {processes or 'the'} processes' optimizer states"
    elif not any(name.startswith("optimizer") for name in names):
        return "it has no optimizer state (save_only_model?)"
    elif "scheduler.pt" not in names:
        return "it has no scheduler.pt"
    states = sum(name.startswith("rng_state") for name in names)
    if states == 0 or (processes and states < processes):
        return f"it has {states} of {processes or 'the'} processes' random states"
    return None


def _torch_fault(checkpoint: Path) -> str | None:
    """torch.save writes a zip archive, whose directory is at the end."""
    for pattern in ("*.pt", "*.pth", "*.bin", "global_step*/*.pt"):
        for path in sorted(checkpoint.glob(pattern)):
            try:
                zipfile.ZipFile(path).close()
            except (zipfile.BadZipFile, OSError, EOFError):
                return f"{path.name} is cut short or unreadable"
    return None


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object that transformers wrote, {} if a kill left none or half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- the end of a run -----------------------------------------------------------------------------------------------
def is_last_step(folder: Path) -> bool:
    """Return whether all steps were made: of a checkpoint, that what a kill took was only the saving."""
    state = _read(folder / STATE)
    return state.get("global_step", 0) >= state.get("max_steps", math.inf)


def finish_from(checkpoint: Path, output_dir: Path) -> None:
    """Put what the last checkpoint holds of the finished model into `output_dir`, as LLaMA-Factory would have saved it.

    Started again instead, LLaMA-Factory would train one step more.
    """
    for path in checkpoint.iterdir():
        if path.is_file() and not ONLY_FOR_RESUME.fullmatch(path.name):
            shutil.copyfile(path, output_dir / path.name)


def totals(output_dir: Path) -> dict[str, Any]:
    """Return what the whole run came to, from the files that transformers and LLaMA-Factory keep over all resumes.

    train_loss is the mean over all logged steps; seconds are those of training, without start-ups.
    """
    state = _read(output_dir / STATE)
    losses = [(row["step"], row["loss"]) for row in state.get("log_history", []) if "loss" in row]
    steps = [step for step, _ in losses]
    weighted = sum(loss * (step - before) for (step, loss), before in zip(losses, [0, *steps], strict=False))
    return {
        "steps": state.get("global_step"),
        "max_steps": state.get("max_steps"),
        "epochs": state.get("epoch"),
        "tokens": state.get("num_input_tokens_seen") or None,
        "train_loss": weighted / steps[-1] if steps else None,
        "seconds": sum(seconds_of_legs(read_log(output_dir))),
    }


# ---- LLaMA-Factory's log --------------------------------------------------------------------------------------------
def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of trainer_log.jsonl; a row that a kill cut doesn't count, steps that were trained again stand twice."""
    path = output_dir / LOG
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def seconds_of_legs(rows: list[dict[str, Any]]) -> Iterator[float]:
    """Yield how long each leg of a resumed run trained: the log's clock starts anew with each."""
    clocks = [clock_seconds(row["elapsed_time"]) for row in rows]
    yield from (now for now, after in zip(clocks, [*clocks[1:], -1.0], strict=False) if after < now)


def clock_seconds(text: str) -> float:
    """Return the seconds of "1 day, 2:03:04" or "0:03:04", as LLaMA-Factory prints a timedelta."""
    days, _, clock = text.rpartition(", ")
    hours, minutes, seconds = map(int, clock.split(":"))
    return timedelta(int(days.split()[0]) if days else 0, seconds, 0, 0, minutes, hours).total_seconds()
