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
from medasst_tools.files import LFS_POINTER, PROJECT_ROOT, atomic_writer, locked, sha256_of
from medasst_tools.render import CONFIGS_DIR, load_experiments, resolve


class Hub(NamedTuple):
    """What messages say of a hub, the variables that hold a token and a mirror's address, its key in the registries."""

    name: str
    token: str
    mirror: str
    key: str


HUBS = {
    "huggingface": Hub("Hugging Face", "HF_TOKEN", "HF_ENDPOINT", "hugging_face"),
    "modelscope": Hub("ModelScope", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT", "modelscope"),
}
MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# weights in formats that transformers doesn't read where safetensors are there, and pickles
NOT_NEEDED = ["*.bin", "*.pth", "*.pt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*", "consolidated*"]


class Wanted(NamedTuple):
    """A file that a corpus or exam needs. names: what it is asked for by; about: the registry's entry.

    places: where it may be, with what is known of it there (bytes, sha256; elsewhere, bundled: where it is had if no hub has
    it); it goes to the first.
    """

    names: list[str]
    title: str
    about: dict[str, Any]
    places: dict[Path, dict[str, Any]]


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


def run(args: argparse.Namespace) -> None:
    """Fetch what was asked for; what fails doesn't stop the rest, and is named at the end."""
    files, models = choose(args.names, args.raw_dir, args.exams_dir)
    hubs = [args.source] if args.source else hubs_in_order()
    failures: list[str] = []
    for file in files:
        faults = {path: fault_of(path, known) for path, known in file.places.items()}
        wrong = "".join(f"; {path} {fault}" for path, fault in faults.items() if path.exists())
        if present := [path for path, fault in faults.items() if not fault]:
            print(f"{present[0]}: already there")
        elif bundled := next(iter(file.places.values())).get("bundled"):
            place = next(iter(file.places))
            with atomic_writer(place) as target:
                target.write((PROJECT_ROOT / bundled).read_bytes())
            print(f"{place}: copied from {bundled}")
        elif elsewhere := next(iter(file.places.values())).get("elsewhere"):
            note = f"{' or '.join(map(str, file.places))}: no hub has it; put it there from {elsewhere}{wrong}"
            if args.names:
                failures.append(note)
            else:
                print(note)
        else:
            print(f"{file.title}: licence {file.about['licence']} ({file.about['homepage']}){wrong}", flush=True)
            which = [hub for hub in hubs if file.about[HUBS[hub].key]] or hubs
            failures += from_first_hub(which, partial(fetch_file, file))
    for model in models:
        failures += from_first_hub(hubs[:1], partial(fetch_model, model))
    if failures:
        raise UserError("\n".join(failures))


def hubs_in_order() -> list[str]:
    """Return the hubs, the one that LLaMA-Factory takes a model from first, by its own rule."""
    modelscope_first = os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("true", "y", "1")
    return sorted(HUBS, reverse=modelscope_first)


def cached_folder(model: str, revision: str | None) -> Path:
    """Return where the hub's client keeps a model; raises what the client raises if it doesn't."""
    if hubs_in_order()[0] == "huggingface":
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=True)).parent
    from modelscope_hub import HubApi

    return HubApi().download_repo(model, "model", revision=revision, local_files_only=True)


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
    experiments = load_experiments(CONFIGS_DIR / "experiments.yaml")
    files = all_files(raw_dir, exams_dir)
    models = []
    for name in names:
        if name in experiments["experiments"]:
            models.append(resolve(experiments, name)["model"]["model_name_or_path"][0])
            if models[-1].startswith("saves/"):  # trained here
                raise UserError(f"{name}'s model {models[-1]} is no hub's: `make train EXPERIMENT={name}` makes it")
        elif MODEL_ID.fullmatch(name):
            models.append(name)
        elif not any(name in file.names for file in files):
            there = ", ".join([*dict.fromkeys(file.names[0] for file in files), *experiments["experiments"]])
            raise UserError(f"nothing is named {name!r}; there are {there}, or a model as owner/name")
    # two datasets may be of one file
    wanted = {tuple(file.places): file for file in files if not names or set(file.names) & set(names)}
    return list(wanted.values()), list(dict.fromkeys(models))


def all_files(raw_dir: Path, exams_dir: Path) -> list[Wanted]:
    """Return every file of a corpus or exam that a hub has, or that is had elsewhere or bundled."""
    files = []
    for dataset in load_datasets().values():
        about, name = vars(dataset.corpus), dataset.corpus.name
        places = {raw_dir / name / file: about["known_files"].get(file, {}) for file in dataset.files}
        had = any(known.keys() & {"elsewhere", "bundled"} for known in places.values())
        if had or any(about[hub.key] for hub in HUBS.values()):
            files.append(Wanted([name, dataset.name], about["title"], about, places))
    for name, exam in load_protocol()["benchmarks"].items():
        place = exams_dir / f"{exam['archive']}.zip"
        files.append(Wanted([name], name, exam, {place: exam.get("known_file", {})}))
    return files


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
    (place, registered), repository = next(iter(file.places.items())), file.about[HUBS[hub].key]
    if not repository:
        raise UserError(f"{place}: {HUBS[hub].name} doesn't have {file.title}")
    staging = place.parent / f".download-{place.name}"
    with locked(staging / ".lock", f"another run is fetching {place}; wait for it"):
        try:
            known = FETCH_FILE[hub](repository, place.name, staging)
        except Exception as error:  # two clients with a dozen kinds of errors each: `reason` names those that it knows
            if [path.name for path in staging.iterdir()] == [".lock"]:
                shutil.rmtree(staging)
            raise UserError(f"{place}: {reason(error, hub, repository)}") from error
        fault = fault_of(staging / place.name, known | registered)
        if not fault:
            (staging / place.name).replace(place)
        shutil.rmtree(staging)
    if fault:
        sent = f"{place}: what {HUBS[hub].name} sent as {repository} {fault}"
        raise UserError(f"{sent}; it was not kept, try another --source or mirror")
    print(f"{place}: {place.stat().st_size:,} bytes from {HUBS[hub].name}, {repository}", flush=True)


def _file_from_huggingface(repository: str, name: str, folder: Path) -> dict[str, Any]:
    """Fetch a data set's file into the folder; return what the hub says of it (bytes; sha256 of large files).

    With the client's http_get: its hf_hub_download begins a killed run's file again (since 1.x, see its _download_to_tmp_and_move).
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

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


def fetch_model(model: str, hub: str) -> None:
    """Fetch a model into the client's own cache, where LLaMA-Factory looks for it."""
    try:
        if hub == "huggingface":
            from huggingface_hub import model_info, snapshot_download

            licence = (model_info(model).card_data or {}).get("license")
            fetch = partial(snapshot_download, ignore_patterns=NOT_NEEDED)
        else:
            from modelscope_hub import HubApi

            licence = HubApi().get_repo(model, "model").license
            # LLaMA-Factory would fetch what is left out here
            fetch = partial(HubApi().download_repo, repo_type="model")
        print(f"{model}: licence {licence or 'not named'}, see its page", flush=True)
        path = fetch(model)
    except Exception as error:  # as above
        raise UserError(f"{model}: {reason(error, hub, model)}") from error
    if not [*Path(path).glob("*.safetensors")]:
        raise UserError(
            f"{model}: {path} has no weights in safetensors; what its page has else, such as pytorch_model.bin, is a pickle, "
            "which can run code, and isn't fetched: ask its authors for safetensors, or convert it on a machine that may fail"
        )
    print(f"{model}: in {path}", flush=True)


def reason(error: BaseException, hub: str, repository: str) -> str:
    """Return one line for a client's error: what happened, and what to do."""
    import httpx
    import requests
    from huggingface_hub import constants
    from huggingface_hub import errors as huggingface
    from modelscope_hub import errors as modelscope

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, modelscope.FileDownloadError) and (inner := next(iter(error.failed_files.values()), None)):
        return reason(inner, hub, repository)
    if hub == "huggingface" and constants.HF_HUB_OFFLINE:
        return f"{repository} isn't whole here, and HF_HUB_OFFLINE is set; run it with HF_HUB_OFFLINE=0"
    name, token, mirror, _ = HUBS[hub]
    said = textwrap.shorten(next(iter(str(error).strip().splitlines()), type(error).__name__), 160)
    unreachable = (httpx.TransportError, requests.RequestException, modelscope.NetworkError)
    if isinstance(error, (*unreachable, huggingface.LocalEntryNotFoundError)):
        return f"{name} can't be reached ({said}); what is there is kept, run it again, or set a mirror: {mirror}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, huggingface.GatedRepoError):
        said = f"is gated: accept its terms on its page, then set {token}"
    elif isinstance(error, huggingface.RepositoryNotFoundError):
        said = f"doesn't exist, or is private and needs {token}"
    elif status in (401, 403) or isinstance(error, modelscope.AuthenticationError | modelscope.PermissionDeniedError):
        said = f"doesn't exist or needs a token ({token}) that may read it"
    elif isinstance(error, huggingface.EntryNotFoundError | modelscope.NotExistError) or status == 404:
        said = f"doesn't have it ({said})"
    return f"{name}'s {repository} {said}"
