"""Is a model there, or can its hub give it? Asked of the hubs' own clients, before anything is downloaded.

`locate` looks where LLaMA-Factory will: a local folder, the hub's cache, then the hub itself (ModelScope with
USE_MODELSCOPE_HUB=1, else Hugging Face), at the clients' own endpoints with their own tokens.
"""

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from medasst_tools.data.download import HUBS, MODEL_ID, cached_folder, hubs_in_order, reason


class Check(NamedTuple):
    """One finding. status: ok, warn, fail or unknown; a fail says the next step."""

    status: str
    what: str
    detail: str
    step: str = ""

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.detail}; {self.step}" if self.step else self.detail


def locate(model: str, revision: str | None = None) -> tuple[Check, bool]:
    """Return whether `model`, a folder or a hub id, is to be had, and whether it is still to be downloaded."""
    folder = Path(model)
    if folder.exists():
        return look_at_folder(folder), False
    if model.startswith(("saves/", "/", "./", "../", "~")) or model.count("/") > 1:
        made = f"`make train EXPERIMENT={folder.name.removesuffix('_merged')}` makes it"
        step = made if folder.parts[0] == "saves" else "give the folder's path, or a hub id"
        return Check("fail", "model", f"no folder {model}", step), False
    if not MODEL_ID.fullmatch(model):
        step = "an id is owner/name, as in Qwen/Qwen2-7B"
        return Check("fail", "model", f"{model!r} is no folder and no hub id", step), False
    hub, other = hubs_in_order()
    with contextlib.suppress(Exception):  # what a client raises where nothing is cached
        cached = look_at_folder(cached_folder(model, revision))
        if cached.status == "ok":
            return cached._replace(detail=f"{model} is in {HUBS[hub].name}'s cache"), False
    try:
        ask(model, revision)
    except Exception as error:  # two clients with a dozen kinds of errors each
        step = f"give a folder, or USE_MODELSCOPE_HUB={int(other == 'modelscope')} asks {HUBS[other].name}"
        return Check("fail", "model", reason(error, hub, model), step), True
    return Check("ok", "model", f"{model} is on {HUBS[hub].name}, not yet downloaded"), True


def ask(model: str, revision: str | None) -> None:
    """Raise what the hub's client raises if it can't give the model."""
    if hubs_in_order()[0] == "huggingface":
        from huggingface_hub import HfApi

        HfApi().auth_check(model)
    else:
        from modelscope_hub import HubApi

        HubApi().download_file(model, "model", "config.json", revision=revision)


def look_at_folder(folder: Path) -> Check:
    """Say whether a model's folder has its config and all its weights, in safetensors or PyTorch's format."""
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        indexes = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
        maps = [json.loads(index.read_text(encoding="utf-8"))["weight_map"] for index in indexes[:1]]
        wanted = {name for weights in maps for name in weights.values()}
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            detail = f"{folder}: {len(missing)} of {len(wanted)} weight files are missing"
        elif not wanted and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
            detail = f"{folder} has no weights"
        else:
            return Check("ok", "model", f"{folder} is there")
    except FileNotFoundError:
        detail = f"{folder} has no config.json"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        detail = f"{folder}: config.json or the index of its weights is damaged"
    return Check("fail", "model", detail, f"get the model again, or give another than {folder}")
