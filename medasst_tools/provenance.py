"""The ledger: what each file was made of. Every verb that makes something asks here, and nobody else compares hashes.

Beside what it makes, a verb leaves a JSON record with `made_of` (settings as used, sha256 of each input, the model's
identity, versions that matter) and `outputs` (sha256 of what it wrote). What changes no result is not part of it:
logging, saving, workers, comments, and how a path is spelled.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from medasst_tools import config as configs
from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT, read_json, sha256_of

RUN, STARTED = "run.json", "run.started.json"
CONFIGS_DIR = PROJECT_ROOT / "factory_configs"
MODEL_FILES = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer*", "vocab*", "merges*",
    "special_tokens_map.json", "added_tokens.json", "*.safetensors", "*.bin",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json")
# They change how a run is logged, saved, fed or shown, not what comes out of it. Paths are here because files count by
# what they hold, not by where they are.
_CHANGE_NO_RESULT = (
    "adapter_name_or_path cache_dir dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
    "dataloader_prefetch_factor dataset_dir ddp_timeout disable_tqdm do_predict do_train hf_hub_token hub_model_id "
    "hub_token include_effective_tokens_per_second include_num_input_tokens_seen include_tokens_per_second log_level "
    "log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter logging_steps "
    "logging_strategy model_name_or_path ms_hub_token om_hub_token output_dir overwrite_cache overwrite_output_dir "
    "per_device_eval_batch_size plot_loss preprocessing_num_workers print_param_status project push_to_hub report_to "
    "resume_from_checkpoint run_name save_on_each_node save_only_model save_safetensors save_steps save_strategy "
    "save_total_limit trackio_space_id "
)
CHANGES_NO_RESULT = frozenset(_CHANGE_NO_RESULT.split())
SAME_AS_UNSET = {"flash_attn": ("auto", "sdpa")}  # transformers takes SDPA where nothing is asked for
MUST_FIT = {"template": "template", "default_system": "system prompt", "enable_thinking": "enable_thinking"}


# ---- what something is made of --------------------------------------------------------------------------------------
def made_of(
    settings: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
    model: dict[str, Any] | None = None,
    versions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the `made_of` of a record: settings as used, {input: sha256}, the model's identity, {what: version}."""
    parts = {"settings": settings, "files": files, "model": model, "versions": versions}
    return {name: dict(sorted(part.items())) for name, part in parts.items() if part}


def settings_that_matter(config: dict[str, Any], also_neutral: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings of a LLaMA-Factory config on which its outcome depends, without those that are as if unset.

    Of a training the generation settings are no part: they don't change a weight. also_neutral: what else is no part.
    """
    known, kept = configs.known_settings(), {}
    for key, value in sorted(config.items()):
        generation = key in known and known[key].owner == configs.GENERATION_CLASS
        if key in CHANGES_NO_RESULT or key in also_neutral or (config.get("do_train") and generation):
            continue
        if value is None or value in SAME_AS_UNSET.get(key, ()) or (key in known and value == known[key].default):
            continue
        if key in ("dataset", "eval_dataset"):
            value = ",".join(dataset_names(value))
        elif isinstance(value, str) and key in ("deepspeed", "fsdp_config") and Path(value).is_file():
            value = sha256_of(Path(value))
        kept[key] = value
    return kept


def dataset_names(value: str | list[str]) -> list[str]:
    """Return the names in a config's `dataset` or `eval_dataset`, as LLaMA-Factory splits them."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]


def dataset_files(dataset_dir: Path, names: str | list[str]) -> dict[str, Path]:
    """Return {dataset: its file or folder}; UserError names what dataset_info.json or the folder hasn't got."""
    info = read_json(dataset_dir / "dataset_info.json")
    if info is None:
        raise UserError(
            f"no {dataset_dir}/dataset_info.json; `make data` or `medasst convert --out-dir {dataset_dir}` writes it"
        )
    paths = {}
    for name in dataset_names(names):
        if name not in info:
            raise UserError(f"no dataset {name!r} in {dataset_dir}/dataset_info.json; there are {', '.join(info)}")
        if file := info[name].get("file_name"):
            paths[name] = dataset_dir / file
            if not paths[name].exists():
                raise UserError(f"{dataset_dir}/dataset_info.json names {paths[name]}, which isn't there")
    return paths


def data_hashes(config: dict[str, Any], key: str) -> dict[str, str]:
    """Return {dataset: sha256} of a config's `dataset` or `eval_dataset`; one that a hub has counts by its entry."""
    folder = Path(config["dataset_dir"])
    hashes = {}
    paths, info = dataset_files(folder, config[key]), read_json(folder / "dataset_info.json") or {}
    for name in dataset_names(config[key]):
        path = paths.get(name)
        hashes[name] = (folder_sha256(path, ("*",)) or sha256_of(path)) if path else short(info[name])
    return hashes


def code_sha256(*rooms: str) -> str:
    """Return one sha256 over the source of these rooms or modules of medasst_tools: an update makes cheap steps anew."""
    places = [PROJECT_ROOT / "medasst_tools" / room for room in rooms]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def package_versions(*names: str) -> dict[str, str]:
    """Return {package: version}."""
    return {name: metadata.version(name) for name in names}


# ---- records --------------------------------------------------------------------------------------------------------
def record(path: Path, about: dict[str, Any], outputs: Iterable[Path] = ()) -> dict[str, Any]:
    """Return the keys that every record has: `made_of`, and `outputs` with the sha256 of each file, named as seen from `path`."""
    return {"made_of": about, "outputs": {os.path.relpath(file, path.parent): sha256_of(file) for file in outputs}}


def up_to_date(path: Path, about: dict[str, Any]) -> bool:
    """Say, and print, whether the record's output is there, whole, and made of just this; if not, what differs."""
    found = read_json(path)
    if found is None:
        return False
    changed = [f"{name} was changed since" for name in changed_outputs(path, found)]
    if changed := [*differences(found.get("made_of") or {}, about), *changed]:
        print(f"{path}: made anew: {'; '.join(changed)}")
        return False
    print(f"{path}: up to date")
    return True


def changed_outputs(path: Path, found: dict[str, Any]) -> Iterator[str]:
    """Yield the names of a record's outputs that are gone or were changed since."""
    for name, digest in found.get("outputs", {}).items():
        file = path.parent / name
        if not file.is_file() or sha256_of(file) != digest:
            yield name


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two `made_of`, each as "learning_rate 0.005 -> 0.002"."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    return [
        f"{key} {brief(flat_old.get(key))} -> {brief(flat_new.get(key))}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    words = {"settings": "", "files": "file ", "model": "model ", "versions": "version of "}
    for key, inner in value.items():
        name = prefix + (words.get(key, key) if not prefix else key)
        if isinstance(inner, dict):
            yield from _flat(inner, name if name in words.values() else f"{name}.")
        else:
            yield name, inner


def brief(value: Any) -> str:
    """Return a value as a message can hold it: a sha256 by eight digits, a long text by its beginning, None as unset."""
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if len(text) in (32, 40, 64) and all(digit in "0123456789abcdef" for digit in text):
        return text[:8]
    return text if len(text) <= 40 else f"{text[:24]}… ({short(text)})"


def short(value: Any) -> str:
    """Return eight digits that stand for a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:8]


# ---- models ---------------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)
def folder_sha256(folder: Path, patterns: tuple[str, ...] = MODEL_FILES) -> str | None:
    """Return one sha256 over a model's or adapter's config, tokenizer and weights; None if it is no folder (a hub id)."""
    if not folder.is_dir():
        return None
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def model_identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return what answers are answers of: {"base", "adapter", "run"}, as far as there is one of each.

    A folder here counts by its sha256, a hub's model by its id.
    """
    base, adapters = str(config["model_name_or_path"]), str(config.get("adapter_name_or_path") or "")
    run = run_of(config)
    found = {
        "base": folder_sha256(Path(base)) or base,
        "adapter": ",".join(folder_sha256(Path(name)) or name for name in adapters.split(",") if name),
        "run": run and run_id(run),
    }
    return {key: value for key, value in found.items() if value}


def trained_folder(config: dict[str, Any]) -> Path | None:
    """Return the folder of the trained part that a predict.yaml or chat.yaml uses; None if it is a base as it came."""
    if adapter := config.get("adapter_name_or_path"):
        return Path(str(adapter).split(",")[-1])
    folder = Path(str(config.get("model_name_or_path", "")))
    return folder if (folder / RUN).is_file() or (folder / STARTED).is_file() else None


def run_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the run.json of the config's trained part, None if it has none; UserError if it is damaged."""
    folder = trained_folder(config)
    return read_run(folder) if folder else None


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return a trained folder's run.json, None if there is none; UserError if it is damaged."""
    run = read_json(folder / RUN)
    if run is not None and not isinstance(run.get("made_of"), dict):
        raise UserError(f"{folder / RUN} is damaged or of an older version; `make train` says what it needs")
    return run


def run_id(run: dict[str, Any]) -> str:
    """Return eight digits that stand for all that the run was made of."""
    return short(run["made_of"])


def check_model(config: dict[str, Any], where: Path) -> dict[str, Any] | None:
    """Return the run that made the config's model, None if it isn't known; UserError if the config doesn't fit it.

    A model that answers with another template, system prompt or base than it was trained with is worse than it is, and
    nothing else would say so.
    """
    folder = trained_folder(config)
    if folder is None:
        base = Path(str(config.get("model_name_or_path", "")))
        if base.parts[:1] == ("saves",) and not base.is_dir():
            here, there = ((CONFIGS_DIR / name).is_dir() for name in (where.parent.name, base.name))
            target = f"model EXPERIMENT={where.parent.name}" if here and not there else f"train EXPERIMENT={base.name}"
            raise UserError(f"{where}: no {base}; `make {target}` makes it")
        return None
    if not folder.is_dir() and folder.parts[:1] == ("saves",):
        raise UserError(f"{where}: no {folder}; `make train EXPERIMENT={folder.name}` makes it")
    run = read_run(folder)
    if run is None:
        if (folder / STARTED).is_file():
            raise UserError(
                f"{where}: the training in {folder} isn't finished; `make train EXPERIMENT={folder.name}` goes on"
            )
        return None
    trained = run["made_of"]["settings"]
    for key, name in MUST_FIT.items():
        used = settings_that_matter({key: config.get(key)}).get(key)
        if used != trained.get(key):
            raise UserError(
                f"{where} has the {name} {brief(used)}, but {folder} was trained with {brief(trained.get(key))}; "
                "use the same, or train again"
            )
    if config.get("adapter_name_or_path") and (wrong := _other_base(config, run)):
        raise UserError(f"{where} puts {folder} on {wrong}")
    return run


def _other_base(config: dict[str, Any], run: dict[str, Any]) -> str | None:
    """Return what a config puts its last adapter on, base or lower adapters, if that isn't what it was trained on."""
    *lower, _ = str(config["adapter_name_or_path"]).split(",")
    here, then = model_identity(config | {"adapter_name_or_path": ",".join(lower)}), dict(run["made_of"]["model"])
    if not run["made_of"]["settings"].get("create_new_adapter"):
        then.pop("adapter", None)  # an adapter that was trained on stands for both
    names = {"base": f"the base {config['model_name_or_path']}", "adapter": ",".join(lower) or "no adapter"}
    for key, name in names.items():
        if here.get(key) != then.get(key):
            trained = f"it was trained on {brief(then.get(key))}; train again, or put the old {key} back"
            return f"{name} ({brief(here.get(key))}), but {trained}"
    return None


def describe(config: dict[str, Any], run: dict[str, Any] | None) -> str:
    """Return one line on what will answer."""
    folder = trained_folder(config)
    if folder is None:
        return f"model {config.get('model_name_or_path')}, not tuned; template {config.get('template')}"
    if run is None:
        return f"model {folder}: no {RUN} beside it, what it was trained on is unknown"
    trained = run["made_of"]["settings"]
    facts = [
        f"model {folder}, run {run_id(run)}: {trained.get('finetuning_type', 'lora')} on {config['model_name_or_path']}",
        f"template {trained.get('template')}",
        f"data {', '.join(run['made_of']['files'])}",
        f"seed {run.get('seed')}",
        *(f"{run[key]:,} {key}" for key in ("steps", "tokens") if run.get(key)),
        f"commit {run.get('commit')}",
    ]
    return "; ".join(facts)


# ---- names ----------------------------------------------------------------------------------------------------------
def shown_name(experiment: str, configs_dir: Path = CONFIGS_DIR, **used: dict[str, Any] | None) -> str:
    """Return an experiment's name as it may stand beside a number: `demo (max_steps=2)` if it was run otherwise.

    used: the `made_of` of what the number comes from: train=, predict=, chat= (safety) or exam=. What differs from the
    config as it is rendered now is part of the name.
    """
    other = {}
    for kind, about in used.items():
        rendered = configs_dir / experiment / f"{'chat' if kind == 'exam' else kind}.yaml"
        if not about or not rendered.is_file():
            continue
        config = configs.load(rendered, kind=rendered.stem)
        expected = exam_settings(config) if kind == "exam" else settings_that_matter(config)
        actual = {key: value for key, value in about.get("settings", {}).items() if key in configs.known_settings()}
        for key in sorted(expected.keys() | actual.keys()):
            if actual.get(key) != expected.get(key):
                other[key] = brief(actual.get(key))
        if limit := about.get("settings", {}).get("limit"):
            other["limit"] = limit
    return experiment + (f" ({', '.join(f'{key}={value}' for key, value in other.items())})" if other else "")


def exam_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a chat.yaml on which an answer by its letters' probabilities depends: none of generation's."""
    return settings_that_matter(config | {"do_train": True}, also_neutral=("infer_backend",))
