"""Which checkpoints of a run are whole, and how a run that was killed after its last step is finished.

LLaMA-Factory resumes from the checkpoint with the highest number, whatever state it is in. A kill, a full disk or a
power cut can leave one half-written, half-deleted or cut short, so `medasst train` looks first.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from medasst_tools.files import read_json, write_json

NAME = re.compile(r"checkpoint-(\d+)")  # any other folder is the user's own
STATE = "trainer_state.json"
# what only a resumed training needs: the rest of a checkpoint is what LLaMA-Factory writes as the finished model
ONLY_FOR_RESUME = re.compile(r"(optimizer|rng_state|scheduler|scaler|pytorch_model_fsdp).*|latest|zero_to_fp32\.py")


def whole_steps(output_dir: Path, processes: int | None = None) -> list[int]:
    """Remove the checkpoints that aren't whole, saying why; return the whole ones' steps, oldest first.

    processes: how many trained, where that is known: each leaves its own random state. The newest whole checkpoint is
    read in full, those before it, which no resume needs, are only looked over.
    """
    numbered = sorted((int(NAME.fullmatch(f.name)[1]), f) for f in output_dir.glob("*/") if NAME.fullmatch(f.name))
    steps: list[int] = []
    for step, folder in reversed(numbered):
        if fault := fault_of(folder, processes, read_all=not steps):
            print(f"warning: {folder} is damaged and skipped: {fault}; removed")
            shutil.rmtree(folder, ignore_errors=True)
        else:
            steps.append(step)
    return steps[::-1]


def fault_of(checkpoint: Path, processes: int | None = None, read_all: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, None if a training can go on from it exactly."""
    state = read_json(checkpoint / STATE)  # written last by process 0
    if state.get("global_step") != int(NAME.fullmatch(checkpoint.name)[1]):
        return f"{STATE} is missing, unreadable or of another step"
    return (
        _weights_fault(checkpoint)
        or _missing_part(checkpoint, processes)
        or next(filter(None, (_torch_fault(path, read_all) for path in _torch_files(checkpoint))), None)
    )


def _weights_fault(checkpoint: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    weights = {path.name: path for path in checkpoint.glob("*.safetensors")}
    for index in checkpoint.glob("*.safetensors.index.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        if not shards or shards - weights.keys():
            return f"{index.name} names {', '.join(sorted(shards - weights.keys())) or 'nothing'}, which isn't there"
    for name, path in weights.items():
        try:
            with safe_open(path, framework="numpy") as file:  # the header says how long the file must be
                file.keys()
        except (SafetensorError, OSError):
            return f"{name} is cut short or unreadable"
    return None if weights or (checkpoint / "latest").is_file() else "it has no weights"


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


def _torch_files(checkpoint: Path) -> list[Path]:
    return sorted(
        path for pattern in ("*.pt", "*.pth", "*.bin", "global_step*/*.pt") for path in checkpoint.glob(pattern)
    )


def _torch_fault(path: Path, read_all: bool) -> str | None:
    """torch.save writes a zip archive, whose directory is at the end and which has a checksum for each part."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if read_all else None
    except (zipfile.BadZipFile, OSError, EOFError):
        return f"{path.name} is cut short or unreadable"
    return f"{path.name} has a wrong checksum in {damaged}" if damaged else None


def is_last_step(checkpoint: Path) -> bool:
    """Return whether the training was over with this checkpoint: what a kill took was only the saving."""
    state = read_json(checkpoint / STATE)
    return state.get("global_step", 0) >= state.get("max_steps", float("inf"))


def finish_from(checkpoint: Path, output_dir: Path) -> None:
    """Put what the last checkpoint holds of the finished model into `output_dir`, as LLaMA-Factory would have saved it.

    Started again instead, LLaMA-Factory would train one step more.
    """
    for path in checkpoint.iterdir():
        if path.is_file() and not ONLY_FOR_RESUME.fullmatch(path.name):
            shutil.copyfile(path, output_dir / path.name)


# ---- results over all legs ------------------------------------------------------------------------------------------
LOG = "trainer_log.jsonl"


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of LLaMA-Factory's trainer_log.jsonl; a row that a kill cut doesn't count."""
    path = output_dir / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind_log(output_dir: Path, step: int) -> int:
    """Drop the log's rows after `step`, which will be trained again; return how many are left."""
    rows = [row for row in read_log(output_dir) if row["current_steps"] <= step]
    if (output_dir / LOG).is_file():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        temporary = output_dir / f".{LOG}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output_dir / LOG)
    return len(rows)


def logged_seconds(row: dict[str, Any]) -> float:
    """Return the seconds of a log row's elapsed_time, "1 day, 2:03:04" or "0:03:04", counted from its leg's start."""
    days, _, clock = row["elapsed_time"].rpartition(", ")
    hours, minutes, seconds = map(int, clock.split(":"))
    return 86400 * int(days.split()[0] if days else 0) + 3600 * hours + 60 * minutes + seconds


def write_whole_run_results(output_dir: Path, resumed_from: list[int], earlier_seconds: float) -> dict[str, Any]:
    """Make train_results.json and all_results.json cover every leg of a resumed run; return the results.

    LLaMA-Factory's own cover the last leg, and divide its losses by the steps of all. resumed_from: the steps at which
    the legs began, {} of the first; earlier_seconds: training time of the legs before the last.
    """
    path = output_dir / "train_results.json"
    results = read_json(path)
    if not resumed_from:
        return results
    state = read_json(output_dir / STATE)
    steps, runtime = state["global_step"], results.get("train_runtime", 0.0) + earlier_seconds
    total, counted = _logged_losses(state["log_history"], resumed_from, until=resumed_from[-1] if results else steps)
    if results:  # the last leg's: its summed losses over the steps of the whole run
        total, counted = total + results["train_loss"] * steps, counted + steps - resumed_from[-1]
    results |= {"epoch": state["epoch"], "total_flos": state["total_flos"], "train_runtime": round(runtime, 4)}
    results["train_loss"] = total / counted if counted else None
    if "train_samples_per_second" in results and runtime:
        share = (runtime - earlier_seconds) / runtime
        results["train_samples_per_second"] = round(results["train_samples_per_second"] * share, 3)
    results["train_steps_per_second"] = round(steps / runtime, 3) if runtime else None
    write_json(path, results)
    write_json(output_dir / "all_results.json", read_json(output_dir / "all_results.json") | results)
    return results


def _logged_losses(history: list[dict[str, Any]], resumed_from: list[int], until: int) -> tuple[float, int]:
    """Return (sum of losses, steps) that the log covers up to `until`; a log's loss is the mean since the last log or resume."""
    total, counted, before = 0.0, 0, 0
    for row in history:
        if "loss" not in row or row["step"] > until:
            continue
        begin = max([before, *(step for step in resumed_from if step < row["step"])])
        total, counted, before = (
            total + row["loss"] * (row["step"] - begin),
            counted + row["step"] - begin,
            row["step"],
        )
    return total, counted
