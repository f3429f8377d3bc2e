"""Run one training config through `llamafactory-cli train`: once if it is finished, on from where it stopped if not.

Run: `medasst train factory_configs/demo/train.yaml [key=value ...]`, which `make train` calls.

LLaMA-Factory resumes by itself from the last checkpoint in `output_dir`, whatever that checkpoint was trained on, stops
at a half-written one, and trains on when a finished run is started again. So this module notes beside the checkpoints
what the run is made of (`run.started.json`), removes checkpoints that are not whole, and writes `run.json` last: only
with that file is the run complete. A folder whose run was made of something else is moved aside, not overwritten.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from medasst_tools import preflight
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import PROJECT_ROOT, model_sha256, sha256_of, write_json

STARTED = "run.started.json"
COMPLETE = "run.json"
# They change how a run is logged, saved or fed, not what comes out of it: changing one doesn't start the run again.
NEUTRAL_SETTINGS = {
    "dataloader_num_workers",
    "logging_steps",
    "overwrite_output_dir",
    "plot_loss",
    "preprocessing_num_workers",
    "report_to",
    "save_steps",
    "save_total_limit",
}
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
    inputs = run_inputs(config)
    output_dir = Path(config["output_dir"])
    if _read_json(output_dir / COMPLETE).get("inputs") == inputs:
        print(f"{output_dir}: finished before with the same config, data and base; nothing to do")
        return
    preflight.require(config)
    earlier = prepare_output_dir(output_dir, inputs)
    started = time.monotonic()
    status = subprocess.run([_llamafactory_cli(), "train", str(args.config), *args.overrides], check=False).returncode
    seconds = earlier.get("seconds", 0.0) + time.monotonic() - started
    note = {"inputs": inputs, "legs": earlier.get("legs", 0) + 1, "seconds": round(seconds, 1)}
    if status != 0:
        write_json(output_dir / STARTED, note)
        raise CheckFailed(
            f"llamafactory-cli train ended with status {status}; the same command goes on from the last checkpoint"
        )
    write_json(output_dir / COMPLETE, note | made_with())
    (output_dir / STARTED).unlink(missing_ok=True)


def load_config(path: Path, overrides: list[str]) -> dict[str, Any]:
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
    if missing := [
        key for key in ("output_dir", "dataset", "dataset_dir", "model_name_or_path") if not config.get(key)
    ]:
        raise UserError(f"{path} says no {', '.join(missing)}; is it a train.yaml?")
    return config


def run_inputs(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the run's outcome depends on: settings, sha256 of each dataset file, sha256 of a local base's files."""
    dataset_dir, base = Path(config["dataset_dir"]), Path(config["model_name_or_path"])
    datasets = {name: _dataset_file(dataset_dir, name) for name in config["dataset"].split(",")}
    return {
        "config": {key: value for key, value in sorted(config.items()) if key not in NEUTRAL_SETTINGS},
        "data": {name: sha256_of(path) for name, path in datasets.items()},
        "base": model_sha256(base) or str(base),
    }


def _dataset_file(dataset_dir: Path, name: str) -> Path:
    info = _read_json(dataset_dir / "dataset_info.json")
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


def prepare_output_dir(output_dir: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Make `output_dir` ready for a run of `inputs` and return the note of its earlier legs, {} for a fresh run.

    Whole checkpoints of the same inputs stay, half-written ones go, and a folder of other inputs is moved to
    `<parent>/previous/`.
    """
    earlier = _read_json(output_dir / STARTED)
    if output_dir.is_dir() and any(output_dir.iterdir()) and earlier.get("inputs") != inputs:
        previous = output_dir.parent / "previous" / f"{output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        previous.parent.mkdir(exist_ok=True)
        output_dir.rename(previous)
        print(f"{output_dir} held a run of another config, data or base: moved to {previous}")
        earlier = {}
    step = last_whole_checkpoint(output_dir)
    if step is None:
        shutil.rmtree(output_dir, ignore_errors=True)  # final weights without a checkpoint would stop LLaMA-Factory
        earlier = {}
    else:
        print(f"{output_dir}: going on from step {step}")
    output_dir.mkdir(parents=True, exist_ok=True)
    if not earlier:
        write_json(output_dir / STARTED, {"inputs": inputs})
    return earlier


def last_whole_checkpoint(output_dir: Path) -> int | None:
    """Remove the checkpoints that a kill or a full disk left half-written; return the last whole one's step or None."""
    steps = []
    for folder in output_dir.glob("checkpoint-*"):
        if _is_whole(folder):
            steps.append(int(folder.name.removeprefix("checkpoint-")))
        else:
            print(f"{folder} is not whole: removed")
            shutil.rmtree(folder)
    return max(steps, default=None)


def _is_whole(checkpoint: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    weights = list(checkpoint.glob("*.safetensors"))
    try:
        for path in weights:
            safe_open(path, framework="numpy").keys()  # reads the header, which says how long the file must be
    except (SafetensorError, OSError):
        return False
    return bool(weights) and "global_step" in _read_json(checkpoint / "trainer_state.json")


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


def _llamafactory_cli() -> str:
    return str(Path(sys.executable).with_name("llamafactory-cli"))


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is none or it is half-written."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
