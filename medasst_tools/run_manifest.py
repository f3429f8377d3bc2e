"""What a trained model was made of (`run.json`, which `medasst train` writes beside it), and whether a config fits it.

A model that answers with another template, system prompt or base than it was trained with is worse than it is, and
nothing else would say so: prediction, exams, scores and the report refuse it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from medasst_tools.errors import UserError
from medasst_tools.files import model_sha256

COMPLETE = "run.json"
COMPARED = {"template": "template", "default_system": "system prompt"}


def trained_model(config: dict[str, Any]) -> Path | None:
    """Return the folder of the trained part that a predict.yaml or chat.yaml uses; None if it is a base as it came."""
    adapter = config.get("adapter_name_or_path")
    if adapter:
        return Path(str(adapter).split(",")[-1])
    folder = Path(str(config.get("model_name_or_path", "")))
    return folder if (folder / COMPLETE).is_file() else None


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the folder's run.json, None if there is none; UserError if it isn't one."""
    path = folder / COMPLETE
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["inputs"]["config"]["output_dir"]  # noqa: B018  # the least that every run.json has
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; `make train` writes it again from the last checkpoint") from None
    return run


def check_model(config: dict[str, Any], where: Path, hash_base: bool = True) -> dict[str, Any] | None:
    """Return the run that made the config's model, None if it isn't known; UserError if the config doesn't fit it.

    config: what `where`, a predict.yaml or chat.yaml, says. hash_base: also compare the files of a local base.
    """
    folder = trained_model(config)
    run = read_run(folder) if folder else None
    if run is None:
        return None
    trained = run["inputs"]["config"]
    for key, name in COMPARED.items():
        if config.get(key) != trained.get(key):
            raise UserError(
                f"{where} has the {name} {shown(config.get(key))}, but {folder} was trained with "
                f"{shown(trained.get(key))}; use the same, or train again"
            )
    if not config.get("adapter_name_or_path"):
        return run
    base = config["model_name_or_path"]
    if base != trained["model_name_or_path"]:
        raise UserError(
            f"{where} puts {folder} on the base {base}, but it was trained on {trained['model_name_or_path']}"
        )
    if hash_base and (found := model_sha256(Path(base)) or base) != run["inputs"]["base"]:
        raise UserError(
            f"the base {base} ({found[:8]}) is not the one that {folder} was trained on "
            f"({run['inputs']['base'][:8]}); train again, or put the old base back"
        )
    return run


def shown(value: Any) -> str:
    """Return a setting as a message can hold it."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:24]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def run_id(run: dict[str, Any]) -> str:
    """Return eight digits that stand for all that the run's outcome depends on."""
    return hashlib.sha256(json.dumps(run["inputs"], sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]


def describe(config: dict[str, Any], run: dict[str, Any] | None) -> str:
    """Return one line on what will answer."""
    folder = trained_model(config)
    if folder is None:
        return f"model {config.get('model_name_or_path')}, not tuned; template {config.get('template')}"
    if run is None:
        return f"model {folder}: no {COMPLETE} beside it, what it was trained on is unknown"
    trained = run["inputs"]["config"]
    facts = [
        f"model {folder}, run {run_id(run)}: {trained.get('finetuning_type', 'lora')} on {trained['model_name_or_path']}",
        f"template {trained['template']}" if trained.get("template") else "no template",
        f"data {', '.join(run['inputs']['data'])}",
        f"seed {trained.get('seed', 42)}",
        *(f"{run[key]:,} {key}" for key in ("steps", "tokens") if run.get(key)),
        f"{run['seconds']:,.0f} s" if "seconds" in run else "",
        f"commit {run['commit']}" if run.get("commit") else "",
    ]
    return "; ".join(filter(None, facts))


def check_and_print(config: dict[str, Any], where: Path, hash_base: bool = True) -> dict[str, Any] | None:
    """Check the config's model, print what it is, and return what a result keeps of it, None for a base or an unknown run."""
    run = check_model(config, where, hash_base)
    print(describe(config, run))
    return {"id": run_id(run), "commit": run.get("commit")} if run else None
