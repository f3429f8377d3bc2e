"""Fetch corpora, exams and models from ModelScope or Hugging Face with the hubs' own clients.

Run: `medasst download`, or by name: a corpus, an exam, an experiment (its model), or a model's owner/name:
`medasst download cmtmedqa ceval medasst --source modelscope`

Corpora go to data/raw/<corpus>/, exams to data/exams/, models to the client's own cache, where LLaMA-Factory looks. The
clients resume what was interrupted (a model from Hugging Face: file by file), and read mirrors and tokens from their own
variables: HF_ENDPOINT, HF_TOKEN, MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN), MODELSCOPE_API_TOKEN. A file comes to its place
when its size and sha256 are right.
"""

import argparse
import os
import re
import shutil
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.data.exam_questions import load_protocol
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import LFS_POINTER, locked, sha256_of
from medasst_tools.render import CONFIGS_DIR, load_experiments, resolve

HUBS = {"huggingface": "Hugging Face", "modelscope": "ModelScope"}
MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
# weights in formats that transformers doesn't read where safetensors are there, and pickles
NOT_NEEDED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "consolidated*"]


class Wanted(NamedTuple):
    """A file that a corpus or exam needs. `repositories`: {hub: id}; `places`: where it may be, the first is where it goes."""

    title: str
    licence: str
    homepage: str
    repositories: dict[str, str | None]
    places: list[Path]
    known: list[dict[str, Any]]  # of each place's file: bytes, sha256, elsewhere

    @property
    def path(self) -> Path:
        return self.places[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="corpora, datasets, exams, experiments (their models) or owner/name of a model; default: all corpora and exams",
    )
    parser.add_argument(
        "--source",
        choices=HUBS,
        help="the only hub to ask; default: ModelScope first if USE_MODELSCOPE_HUB=1, else Hugging Face first",
    )
    parser.add_argument("--raw-dir", type=Path, default=Path("data/raw"), help="for corpora (data/raw)")
    parser.add_argument("--exams-dir", type=Path, default=Path("data/exams"), help="for exams (data/exams)")
    parser.add_argument(
        "--models-dir", type=Path, help="for models, as DIR/<owner>/<name>; default: the client's cache"
    )


def run(args: argparse.Namespace) -> None:
    """Fetch what was asked for; what fails doesn't stop the rest, and is named at the end."""
    files, models = choose(args.names, args.raw_dir, args.exams_dir)
    hubs = [args.source] if args.source else hubs_in_order()
    failures: list[str] = []
    told: set[str] = set()
    for file in files:
        faults = {path: fault_of(path, known) for path, known in zip(file.places, file.known, strict=True)}
        if present := [path for path, fault in faults.items() if not fault]:
            print(f"{present[0]}: already there")
        elif elsewhere := file.known[0].get("elsewhere"):
            wrong = "".join(f"; {path} {fault}" for path, fault in faults.items() if path.exists())
            note = f"{' or '.join(map(str, file.places))}: no hub has it; put it there from {elsewhere}{wrong}"
            if args.names:
                failures.append(note)
            else:
                print(note)
        else:
            if file.title not in told:
                print(f"{file.title}: licence {file.licence} ({file.homepage})", flush=True)
                told.add(file.title)
            if file.path.exists():
                print(f"{file.path} {faults[file.path]}; fetching it again", flush=True)
            which = [hub for hub in hubs if file.repositories[hub]] or hubs
            failures += from_first_hub(which, partial(fetch_file, file))
    for model in models:
        failures += from_first_hub(hubs[:1], partial(fetch_model, model, args.models_dir))
    if failures:
        raise UserError("\n".join(failures))


def hubs_in_order() -> list[str]:
    """Return the hubs, the one that LLaMA-Factory would take a model from first."""
    modelscope_first = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("true", "y", "1")
    return sorted(HUBS, reverse=modelscope_first)


def from_first_hub(hubs: list[str], fetch: Callable[[str], None]) -> list[str]:
    """Fetch from the first hub that has it; return what to say of each where none has."""
    failures = []
    for hub in hubs:
        try:
            fetch(hub)
            return []
        except UserError as error:
            failures.append(str(error))
    return failures


def choose(names: list[str], raw_dir: Path, exams_dir: Path) -> tuple[list[Wanted], list[str]]:
    """Return (files, model ids) for the names; every file of every corpus and exam without any."""
    datasets, benchmarks = load_datasets().values(), load_protocol()["benchmarks"]
    experiments = load_experiments(CONFIGS_DIR / "experiments.yaml")
    files: list[tuple[set[str], Wanted]] = []
    for dataset in datasets:
        corpus = dataset.corpus
        repositories = {"huggingface": corpus.hugging_face, "modelscope": corpus.modelscope}
        places = [raw_dir / corpus.name / file for file in dataset.files]
        known = [corpus.known_files.get(file, {}) for file in dataset.files]
        if not (corpus.hugging_face or corpus.modelscope or any(file.get("elsewhere") for file in known)):
            continue  # on no hub, and nobody says where else
        wanted = Wanted(corpus.title, corpus.licence, corpus.homepage, repositories, places, known)
        files.append(({corpus.name, dataset.name}, wanted))
    for name, exam in benchmarks.items():
        repositories = {"huggingface": exam["hugging_face"], "modelscope": exam["modelscope"]}
        place = exams_dir / f"{exam['archive']}.zip"
        known = [exam.get("known_file", {})]
        files.append(({name}, Wanted(name, exam["licence"], exam["homepage"], repositories, [place], known)))
    models = []
    for name in names:
        if name in experiments["experiments"]:
            models.append(resolve(experiments, name)["model"]["model_name_or_path"][0])
            if models[-1].startswith("saves/"):  # trained here
                raise UserError(f"{name}'s model {models[-1]} is no hub's: `make train EXPERIMENT={name}` makes it")
        elif MODEL_ID.fullmatch(name):
            models.append(name)
        elif not any(name in known_as for known_as, _ in files):
            known = [
                *dict.fromkeys(dataset.corpus.name for dataset in datasets),
                *benchmarks,
                *experiments["experiments"],
            ]
            raise UserError(f"nothing is named {name!r}; there are {', '.join(known)}, or a model as owner/name")
    return [file for known_as, file in files if not names or known_as & set(names)], list(dict.fromkeys(models))


def fault_of(path: Path, known: dict[str, Any]) -> str | None:
    """Say what is wrong with a file, as far as is known what it should be; None if nothing is."""
    if not path.is_file():
        return "isn't there"
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "is a Git LFS pointer, not the file"
    if not size:
        return "is empty"
    if size != known.get("bytes", size):
        return f"has {size:,} bytes instead of {known['bytes']:,}"
    if "sha256" in known and (found := sha256_of(path)) != known["sha256"]:
        return f"has sha256 {found} instead of {known['sha256']}"
    return None


def fetch_file(file: Wanted, hub: str) -> None:
    """Fetch one file into a folder of its own beside its place, check it, and move it there."""
    repository = file.repositories[hub]
    if not repository:
        raise UserError(f"{file.path}: {HUBS[hub]} doesn't have {file.title}")
    staging = file.path.parent / f".download-{file.path.name}"
    staging.mkdir(parents=True, exist_ok=True)
    with locked(staging / ".lock", f"another run is fetching {file.path}; wait for it"):
        fetched, known = staging / file.path.name, {}
        try:
            known = FETCH_FILE[hub](repository, file.path.name, staging)
        except Exception as error:  # two clients with a dozen kinds of errors each: `reason` names those that it knows
            if [path.name for path in staging.iterdir()] == [".lock"]:
                shutil.rmtree(staging)
            raise UserError(f"{file.path}: {reason(error, hub, repository)}") from error
        if fault := fault_of(fetched, known | file.known[0]):
            shutil.rmtree(staging)
            raise UserError(
                f"{file.path}: what {HUBS[hub]} sent as {repository} {fault}; it was not kept, try another --source or mirror"
            )
        fetched.replace(file.path)
        shutil.rmtree(staging)
    print(f"{file.path}: {file.path.stat().st_size:,} bytes from {HUBS[hub]}, {repository}", flush=True)


def _file_from_huggingface(repository: str, name: str, folder: Path) -> dict[str, Any]:
    """Fetch a data set's file into the folder; return what the hub says of it (bytes; sha256 of large files).

    With the client's http_get: its hf_hub_download begins a killed run's file again (since 1.x, see its _download_to_tmp_and_move).
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    _refuse_offline()
    url = hf_hub_url(repository, name, repo_type="dataset")
    facts = get_hf_file_metadata(url)
    part = folder / f"{name}.{facts.etag}.part"  # another version is another part
    if part.exists() and facts.size is not None and part.stat().st_size > facts.size:
        part.unlink()
    with part.open("ab") as file:
        http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=facts.size)
    part.replace(folder / name)
    known = {} if facts.size is None else {"bytes": facts.size}
    return known | ({"sha256": facts.etag} if re.fullmatch(r"[0-9a-f]{64}", facts.etag or "") else {})


def _file_from_modelscope(repository: str, name: str, folder: Path) -> dict[str, Any]:
    """Fetch a data set's file into the folder; the client itself compares it with the hub's list, by size and sha256."""
    from modelscope_hub import HubApi

    HubApi().download_repo(repository, "dataset", local_dir=folder, allow_patterns=[name])
    if not (folder / name).is_file():
        raise UserError(f"ModelScope's {repository} has no file {name}")
    return {}


FETCH_FILE = {"huggingface": _file_from_huggingface, "modelscope": _file_from_modelscope}


def fetch_model(model: str, models_dir: Path | None, hub: str) -> None:
    """Fetch a model to where LLaMA-Factory looks for it, or below a folder."""
    folder = models_dir / model if models_dir else None
    try:
        if hub == "huggingface":
            from huggingface_hub import model_info, snapshot_download

            _refuse_offline()
            card = model_info(model).card_data
            print(f"{model}: licence {(card and card.get('license')) or 'not named'}, see its page", flush=True)
            path = snapshot_download(model, local_dir=folder, ignore_patterns=NOT_NEEDED)
        else:
            from modelscope_hub import HubApi

            api = HubApi()
            print(f"{model}: licence {api.get_repo(model, 'model').license or 'not named'}, see its page", flush=True)
            # in its cache LLaMA-Factory would fetch what is left out here
            path = api.download_repo(model, "model", local_dir=folder, ignore_patterns=NOT_NEEDED if folder else None)
    except Exception as error:  # as above
        raise UserError(f"{model}: {reason(error, hub, model)}") from error
    if not [*Path(path).glob("*.safetensors")]:
        raise UserError(
            f"{model}: {path} has no weights in safetensors; what its page has else, such as pytorch_model.bin, is a pickle, "
            "which can run code, and isn't fetched: ask its authors for safetensors, or convert it on a machine that may fail"
        )
    print(f"{model}: in {path}", flush=True)


def _refuse_offline() -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so that nothing comes from Hugging Face; run it with HF_HUB_OFFLINE=0")


def reason(error: BaseException, hub: str, repository: str) -> str:
    """Return one line for a client's error: what happened, and what to do."""
    import httpx
    import requests
    from huggingface_hub import errors as huggingface
    from modelscope_hub import errors as modelscope

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, modelscope.FileDownloadError) and (inner := next(iter(error.failed_files.values()), None)):
        return reason(inner, hub, repository)
    whose, token = (
        f"{HUBS[hub]}'s {repository}",
        {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}[hub],
    )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, huggingface.GatedRepoError):
        return f"{whose} is gated: accept its terms on its page, then set {token}"
    if status in (401, 403) or isinstance(error, modelscope.AuthenticationError | modelscope.PermissionDeniedError):
        return f"{whose} doesn't exist or needs a token ({token}) that may read it"
    if isinstance(error, huggingface.RepositoryNotFoundError | huggingface.HFValidationError):
        return f"{whose} doesn't exist, or is private and needs {token}"
    unreachable = (
        httpx.TransportError,
        requests.RequestException,
        modelscope.NetworkError,
        huggingface.LocalEntryNotFoundError,
    )
    if isinstance(error, unreachable):
        return f"{HUBS[hub]} can't be reached ({_first_line(error)}); what is there is kept, run it again, or set a mirror: {MIRRORS[hub]}"
    if isinstance(error, huggingface.EntryNotFoundError | modelscope.NotExistError) or status == 404:
        return f"{whose} doesn't have it ({_first_line(error)})"
    return f"{whose}: {_first_line(error)}"


MIRRORS = {"huggingface": "HF_ENDPOINT", "modelscope": "MODELSCOPE_ENDPOINT"}


def _first_line(error: BaseException) -> str:
    return textwrap.shorten(next(iter(str(error).strip().splitlines()), type(error).__name__), 160)
