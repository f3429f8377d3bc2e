"""Is a model there, or can its hub give it? Asked of the hubs' own clients, before anything is downloaded.

`locate` looks where LLaMA-Factory will: a local folder, the hub's cache, then the hub itself (ModelScope with
USE_MODELSCOPE_HUB=1, else Hugging Face), at the clients' own endpoints with their own tokens.
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 3.0  # seconds


class Located(NamedTuple):
    """Where a model is. status: ok (usable now, or after its download), fail, or unknown (the hub answers late or wrongly)."""

    status: str
    detail: str
    step: str = ""  # what to do next
    config: dict[str, Any] | None = None
    download: bool = False


def use_modelscope() -> bool:
    """Say which hub LLaMA-Factory takes models from, by its own rule."""
    return os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("true", "y", "1")


def locate(model: str, revision: str | None = None) -> Located:
    """Return where `model`, a folder or a hub id, is to be had."""
    folder = Path(model)
    if folder.exists():
        return look_at_folder(folder)
    if model.startswith(("saves/", "/", "./", "../", "~")) or model.count("/") > 1:
        step = f"`make train EXPERIMENT={folder.name.removesuffix('_merged')}` makes it" if model.startswith("saves/") else "give the folder's path, or a hub id"  # fmt: skip
        return Located("fail", f"no folder {model}", step)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        return Located("fail", f"{model!r} is no folder and no hub id", "an id is owner/name, as in Qwen/Qwen2-7B")
    return _ask_modelscope(model, revision) if use_modelscope() else _ask_hugging_face(model, revision)


def look_at_folder(folder: Path) -> Located:
    """Say whether a model's folder has its config and all its weights, in safetensors or PyTorch's format."""
    step = f"get the model again, or give another than {folder}"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        indexes = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")][:1]
        wanted = {
            name for index in indexes for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        }
    except FileNotFoundError:
        return Located("fail", f"{folder} has no config.json", step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Located("fail", f"{folder}: config.json or the index of its weights is damaged", step)
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        return Located("fail", f"{folder}: {len(missing)} of {len(wanted)} weight files are missing", step, config)
    if not wanted and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        return Located("fail", f"{folder} has no weights", step, config)
    return Located("ok", f"{folder} is there", config=config)


def _ask_hugging_face(model: str, revision: str | None) -> Located:
    from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    cached = try_to_load_from_cache(model, "config.json", revision=revision or "main")
    if isinstance(cached, str) and (found := look_at_folder(Path(cached).parent)).status == "ok":
        return found._replace(detail=f"{model} is in Hugging Face's cache")
    try:
        HfApi().auth_check(model)
    except GatedRepoError:
        return _gated(model, f"{constants.ENDPOINT}/{model}", bool(get_token()), "HF_TOKEN")
    except RepositoryNotFoundError:
        return _no_such_model("Hugging Face", model, 1)
    except OfflineModeIsEnabled:
        return Located(
            "fail", f"{model} isn't whole in the cache and HF_HUB_OFFLINE is set", "unset it, or give a local folder"
        )
    except HfHubHTTPError as error:
        return Located(
            "unknown",
            f"{constants.ENDPOINT} can't say of {model} ({error.response.status_code})",
            "try again later",
            None,
            True,
        )
    except Exception as error:  # its transport's own errors, by version
        return _unreachable(model, constants.ENDPOINT, error)
    return Located("ok", f"{model} is on Hugging Face, not yet downloaded", download=True)


def _ask_modelscope(model: str, revision: str | None) -> Located:
    """ModelScope's client retries for a minute where nobody answers, so its address and token are used for one request."""
    import httpx
    from modelscope_hub.config import HubConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of MODELSCOPE_DOMAIN, which its older client knows only
        hub = HubConfig()
    owner, name = model.split("/")
    for folder in (
        hub.cache_dir / "models" / owner / name.replace(".", "___"),
        hub.cache_dir / "models" / f"{owner}--{name}" / "snapshots" / (revision or "master"),
    ):
        if folder.is_dir() and (found := look_at_folder(folder)).status == "ok":
            return found._replace(detail=f"{model} is in ModelScope's cache")
    about = {"Revision": revision or "master", "FilePath": "config.json"}
    headers = {"Authorization": f"Bearer {hub.token}"} if hub.token else {}
    try:
        answer = httpx.get(
            f"{hub.endpoint}/api/v1/models/{model}/repo",
            params=about,
            headers=headers,
            timeout=TIMEOUT,
            follow_redirects=True,
        )
        config = answer.json() if answer.status_code == 200 else None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return _unreachable(model, hub.endpoint or "ModelScope", error)
    if answer.status_code in (401, 403):
        return _gated(model, f"{hub.endpoint}/models/{model}", bool(hub.token), "MODELSCOPE_API_TOKEN")
    if answer.status_code == 404:
        return _no_such_model("ModelScope", model, 0)
    if config is None:
        return Located(
            "unknown", f"{hub.endpoint} can't say of {model} ({answer.status_code})", "try again later", None, True
        )
    return Located("ok", f"{model} is on ModelScope, not yet downloaded", config=config, download=True)


def _gated(model: str, page: str, has_token: bool, variable: str) -> Located:
    if has_token:
        return Located("fail", f"{model} is gated and your token has no access", f"ask for it at {page}")
    return Located(
        "fail", f"{model} is gated and there is no token", f"accept its terms at {page}, then set {variable}"
    )


def _no_such_model(hub: str, model: str, other: int) -> Located:
    step = f"check the id's spelling; USE_MODELSCOPE_HUB={other} asks the other hub"
    return Located("fail", f"{hub} has no model {model!r}", step)


def _unreachable(model: str, endpoint: str, error: Exception) -> Located:
    detail = f"{model} isn't in the cache, and {endpoint} doesn't answer ({type(error).__name__})"
    return Located(
        "fail", detail, "check the network, HF_ENDPOINT or MODELSCOPE_ENDPOINT, or give a local folder", None, True
    )
