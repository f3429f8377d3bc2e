"""Is a model there, or can its hub give it? Answered from the files and one short request, before anything is downloaded.

`locate` looks where LLaMA-Factory will: a local folder, the hub's cache, then the hub itself (ModelScope with
USE_MODELSCOPE_HUB=1, else Hugging Face), at the clients' own endpoints (HF_ENDPOINT, MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN) with
their own tokens. The request is for config.json: a gated repository shows its page to anyone, and only its files to some.
"""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

TIMEOUT = 3.0  # seconds to connect, and to answer
TRUE = ("1", "true", "y", "yes", "on")


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


def offline() -> bool:
    """Say whether Hugging Face's client may not use the network."""
    return any(os.environ.get(key, "").lower() in TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def locate(model: str, revision: str | None = None) -> Located:
    """Return where `model`, a folder or a hub id, is to be had."""
    folder = Path(model)
    if folder.exists():
        return look_at_folder(folder, f"make the model again, or give another than {model}")
    if model.startswith(("saves/", "/", "./", "../", "~")) or model.count("/") > 1:
        name = folder.name.removesuffix("_merged")
        made = model.startswith("saves/")
        step = f"`make train EXPERIMENT={name}` makes it" if made else "give the folder's path, or a hub id"
        return Located("fail", f"no folder {model}", step)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        return Located("fail", f"{model!r} is no folder and no hub id", "an id is owner/name, as in Qwen/Qwen2-7B")
    hub = "ModelScope" if use_modelscope() else "Hugging Face"
    cached = _cached(model, revision)
    if cached is not None:
        found = look_at_folder(cached, "")
        if found.status == "ok":
            return found._replace(detail=f"{model} is in {hub}'s cache")
    if hub == "Hugging Face" and offline():
        return Located(
            "fail", f"{model} isn't whole in the cache and HF_HUB_OFFLINE is set", "unset it, or give a local folder"
        )
    if hub == "ModelScope":
        return _ask_modelscope(model, revision)
    return _ask_hugging_face(model, revision)


def look_at_folder(folder: Path, step: str) -> Located:
    """Say whether a model's folder has its config and all its weights."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "damaged" if isinstance(error, ValueError) else "missing"
        return Located("fail", f"{folder}: config.json is {what}", step)
    wanted: set[str] = set()
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        try:
            wanted |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Located("fail", f"{index} is damaged", step, config)
        break  # one format is enough
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        return Located("fail", f"{folder}: {len(missing)} of {len(wanted)} weight files are missing", step, config)
    if not wanted and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        return Located("fail", f"{folder} has no weights", step, config)
    return Located("ok", f"{folder} is there", config=config)


def _cached(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model in its hub's cache, whole or not."""
    if use_modelscope():
        # the layouts of modelscope 1.40's DownloadManager, and of its forerunners, which it still reads
        root, (owner, name) = _modelscope_config().cache_dir, model.split("/")
        branch = revision if revision not in (None, "main") else "master"
        for folder in (
            root / "models" / owner / name.replace(".", "___"),
            root / "hub" / "models" / owner / name.replace(".", "___"),
            root / "models" / f"{owner}--{name}" / "snapshots" / branch,
        ):
            if folder.is_dir():
                return folder
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, "config.json", revision=revision or "main")
    return Path(path).parent if isinstance(path, str) else None


def endpoint() -> str:
    """Return the address of the hub in use."""
    if use_modelscope():
        return _modelscope_config().endpoint
    from huggingface_hub import constants

    return constants.ENDPOINT


def _modelscope_config():
    from modelscope_hub.config import HubConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MODELSCOPE_DOMAIN is the older name
        return HubConfig()


def reachable() -> Located:
    """Say whether the hub in use answers at all."""
    import httpx

    if not use_modelscope() and offline():
        return Located("ok", "not asked: HF_HUB_OFFLINE is set")
    try:
        httpx.get(endpoint(), timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Located("unknown", f"{endpoint()} is unreachable ({type(error).__name__})", "needed for downloads only")
    return Located("ok", f"{endpoint()} answers")


def _ask_hugging_face(model: str, revision: str | None) -> Located:
    import httpx
    from huggingface_hub import get_token, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    page = f"{endpoint()}/{model}"
    url = hf_hub_url(model, "config.json", revision=revision)
    try:
        answer = httpx.get(url, headers=build_hf_headers(), timeout=TIMEOUT, follow_redirects=True)
        hf_raise_for_status(answer)
    except GatedRepoError:
        if get_token():
            return Located("fail", f"{model} is gated and your token has no access", f"ask for it at {page}")
        return Located(
            "fail", f"{model} is gated and there is no token", f"accept its terms at {page}, then set HF_TOKEN"
        )
    except RepositoryNotFoundError:
        return Located(
            "fail",
            f"Hugging Face has no model {model!r}",
            "check the id's spelling; USE_MODELSCOPE_HUB=1 asks ModelScope",
        )
    except EntryNotFoundError:
        return Located("fail", f"{model} has no config.json at {endpoint()}", "give the id of a transformers model")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        return Located("unknown", f"{endpoint()} answers {status} for {model}", "try again later", None, True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _unreachable(model, error)
    return Located("ok", f"{model} is on Hugging Face, not yet downloaded", config=_json(answer.text), download=True)


def _ask_modelscope(model: str, revision: str | None) -> Located:
    import httpx

    hub = _modelscope_config()
    revision = revision if revision not in (None, "main") else "master"
    url = f"{hub.endpoint}/api/v1/models/{model}/repo"
    headers = {"Authorization": f"Bearer {hub.token}"} if hub.token else {}
    try:
        answer = httpx.get(
            url,
            params={"Revision": revision, "FilePath": "config.json"},
            headers=headers,
            cookies={"m_session_id": hub.token} if hub.token else None,
            timeout=TIMEOUT,
            follow_redirects=True,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _unreachable(model, error)
    page = f"{hub.endpoint}/models/{model}"
    if answer.status_code in (401, 403):
        if hub.token:
            return Located("fail", f"{model} is gated and your token has no access", f"ask for it at {page}")
        step = f"accept its terms at {page}, then set MODELSCOPE_API_TOKEN"
        return Located("fail", f"{model} is gated and there is no token", step)
    if answer.status_code == 404:
        return Located(
            "fail",
            f"ModelScope has no model {model!r}",
            "check the id's spelling; USE_MODELSCOPE_HUB=0 asks Hugging Face",
        )
    if answer.status_code != 200:
        return Located(
            "unknown", f"{hub.endpoint} answers {answer.status_code} for {model}", "try again later", None, True
        )
    return Located("ok", f"{model} is on ModelScope, not yet downloaded", config=_json(answer.text), download=True)


def _unreachable(model: str, error: Exception) -> Located:
    """A refused connection or an unknown host stays so; a slow answer may come yet."""
    import httpx

    status = "fail" if isinstance(error, httpx.ConnectError | httpx.InvalidURL) else "unknown"
    detail = f"{model} isn't in the cache, and {endpoint()} is unreachable ({type(error).__name__})"
    step = "check the network, HF_ENDPOINT or MODELSCOPE_ENDPOINT, or give a local folder"
    return Located(status, detail, step, None, True)


def _json(text: str) -> dict[str, Any] | None:
    try:
        config = json.loads(text)
    except ValueError:
        return None
    return config if isinstance(config, dict) else None
