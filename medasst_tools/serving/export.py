"""Merge an experiment's adapter into its base: what the base's release is, with the adapter in, and a model card.

Run: `medasst export factory_configs/demo/export.yaml`, which `make export` calls.

LLaMA-Factory merges, in this process, into a folder beside the place, which takes the place only when it is whole. Config
and tokenizer are then the base's own files again, because what transformers 5 writes older readers read wrongly, and the
prompt files are made those of the training (`exported_prompts`). README.md is rendered from templates/model_card.md.j2;
export.json, written last, says what the model was made of: the same again merges nothing and renews the card.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medasst_tools import console, provenance
from medasst_tools.config import load
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import open_permissions, read_json, write_json, write_text
from medasst_tools.machine import hardware, hub, preflight
from medasst_tools.machine.cost import released_model
from medasst_tools.render import template_environment
from medasst_tools.serving.exported_prompts import correct_prompts
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH
from medasst_tools.training.checkpoints import weights_fault

DONE = "export.json"
RELEASED = ("config.json", "generation_config.json", "chat_template.jinja", *provenance.TOKENIZER_FILES)
RESULTS = Path("results")
PROMPT_KEYS = ("template", "default_system", "enable_thinking")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    preflight.add_config_arguments(parser, "export")


def run(args: argparse.Namespace) -> None:
    """Export, or find the same model exported before."""
    config = load_export_config(args.config, args.overrides)
    target = Path(config["export_dir"])
    trained = provenance.check_model(config, args.config)
    about = made_of(config)
    results = RESULTS / args.config.parent.name
    card = render_card(gather_facts(results, config, trained))
    if provenance.up_to_date(target / DONE, about):
        write_text(target / "README.md", card)  # the scores may be new
        return
    if target.is_dir() and any(target.iterdir()) and not (target / DONE).is_file():
        raise UserError(f"{target} holds something that `medasst export` didn't write; move it or give export_dir=...")
    preflight.require(config, args)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder) / target.name
        with console.logged(results / "export.log"):
            corrections = merge(config | {"export_dir": str(made)})
        note = {"corrections": corrections} | hardware.made_with()
        write_json(made / DONE, provenance.record(made / DONE, about, sorted(made.glob("*"))) | note)
        write_text(made / "README.md", card)
        open_permissions(made)
        if target.exists():
            target.rename(Path(folder) / "replaced")
        made.rename(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print("\n".join(f"corrected: {line}" for line in corrections) or "prompt files: as the base released them")
    print(f"{target}: {size / 1e6:,.1f} MB")


def load_export_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return an export.yaml with its overrides; UserError if it isn't one or would overwrite what it merges."""
    config = load(path, overrides, "export")
    if not config.get("adapter_name_or_path"):
        raise UserError(f"{path} says no adapter_name_or_path: there is nothing to merge")
    places = [Path(name).resolve() for name in (config["model_name_or_path"], *adapters(config))]
    target = Path(config["export_dir"]).resolve()
    if any(place == target or target in place.parents for place in places):
        raise UserError(f"export_dir is {config['export_dir']}, which holds what is to be merged; give another folder")
    return config


def adapters(config: dict[str, Any]) -> list[str]:
    """Return the adapters that are merged, the lowest first."""
    return str(config["adapter_name_or_path"]).split(",")


def made_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return what the export depends on."""
    settings = provenance.settings_that_matter(config, also_neutral=("export_dir",))
    code = {"medasst export": provenance.code_sha256("serving/export.py", "serving/exported_prompts.py")}
    return provenance.made_of(settings, {}, provenance.model_identity(config), code)


def merge(config: dict[str, Any]) -> list[str]:
    """Let LLaMA-Factory merge into config["export_dir"], and make its files the release's; return what was corrected."""
    for adapter in adapters(config):
        if fault := weights_fault(Path(adapter)):
            raise CheckFailed(f"{adapter}: {fault}; not exported")
    from llamafactory.train.tuner import export_model

    export_model(config)
    folder = Path(config["export_dir"])
    if fault := weights_fault(folder):
        raise CheckFailed(f"the merged weights: {fault}; is the base whole? Not exported")
    base = Path(config["model_name_or_path"])
    put_back_released_files(
        folder, base if base.is_dir() else hub.cached_folder(str(base), config.get("model_revision"))
    )
    return correct_prompts(folder, {key: config[key] for key in PROMPT_KEYS if key in config})


def put_back_released_files(folder: Path, base: Path) -> None:
    """Replace config and tokenizer as transformers wrote them by the base's own; what transformers 5 wrote there is mended.

    CheckFailed if the merged weights aren't the released config's: a vocabulary that the training made larger.
    """
    merged = read_json(folder / "config.json") or {}
    for pattern in RELEASED:
        for path in folder.glob(pattern):
            path.unlink()
        for path in filter(Path.is_file, base.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    released = read_json(folder / "config.json") or {}
    if released.get("vocab_size") != merged.get("vocab_size"):
        sizes = f"{released.get('vocab_size')} to {merged.get('vocab_size')}"
        raise CheckFailed(f"the training changed the vocabulary from {sizes}, which its base's config doesn't fit")
    tokenizer = read_json(folder / "tokenizer_config.json") or {}
    for name, before, after in (
        ("config.json", released, with_older_names(released, merged.get("dtype"))),
        ("tokenizer_config.json", tokenizer, tokenizer_for_older_readers(tokenizer)),
    ):
        if after != before:  # else it stays the base's own, byte by byte
            write_json(folder / name, after)


def with_older_names(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return a config.json with the weights' dtype and rope_theta where transformers 4, vLLM and converters look for them.

    Where transformers 5 wrote rope_theta, inside rope_parameters, they don't, and take 10,000 without a word.
    """
    rope = dict(config.get("rope_parameters") or {})
    older = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    names = {"torch_dtype"} | {"dtype"} & config.keys()
    return older | config | (dict.fromkeys(names, dtype) if dtype else {})


def tokenizer_for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer_config.json without the class and the list that only transformers 5 knows."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        # whose own third input name, token_type_ids, no model here takes
        names = {"model_input_names": ["input_ids", "attention_mask"]}
        config = names | config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(extra := config.get("extra_special_tokens"), list):
        config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
        config["additional_special_tokens"] = extra
    return config


# ---- the card -------------------------------------------------------------------------------------------------------
def gather_facts(folder: Path, config: dict[str, Any], run: dict[str, Any] | None) -> dict[str, Any]:
    """Return everything that the model card says; what isn't known, or isn't of this model, is None or empty."""
    base, identity = config["model_name_or_path"], provenance.model_identity(config)
    found = {name: read_json(folder / f"{name}.json") for name in ("scores", "exam", "safety")}
    made_of = {name: (result or {}).get("made_of", {}) for name, result in found.items()}
    results = {name: found[name] if made_of[name].get("model") == identity else None for name in found}
    made = (run or {}).get("made_of", {})
    below = [(provenance.read_run(Path(name)) or {}).get("made_of", {}) for name in adapters(config)[:-1]]
    datasets = [one["settings"]["dataset"] for one in (*below, made) if one.get("settings", {}).get("dataset")]
    scored, examined = (made_of[name] if results[name] else None for name in ("scores", "exam"))
    return results | {
        "experiment": folder.name,
        "shown": provenance.shown_name(folder.name, train=made, predict=scored, exam=examined),
        "base": base,
        "base_facts": dict.fromkeys(("licence", "licence_id", "homepage")) | released_model(base),
        "template": config["template"],
        "enable_thinking": config.get("enable_thinking"),
        "system": config.get("default_system"),
        "run": run,
        "settings": made.get("settings", {}),
        "data": data_rows(folder.name, ",".join(datasets)),
        "files": {name: sha for one in (*below, made) for name, sha in one.get("files", {}).items()},
        "adapter_sha256": identity.get("adapter"),
        "notice_zh": NOTICE_ZH,
        "notice_en": NOTICE_EN,
    }


def data_rows(experiment: str, names: str) -> list[dict[str, Any]]:
    """Return one row for each dataset trained on: its corpus, licence, and count from the manifest."""
    datasets, rendered = load_datasets(), Path("factory_configs", experiment, "train.yaml")
    dataset_dir = load(rendered)["dataset_dir"] if rendered.is_file() else ""
    manifest = (read_json(Path(dataset_dir) / "manifest.json") or {}).get("datasets", {})
    rows = []
    for name in filter(None, names.split(",")):
        corpus = datasets[name].corpus if name in datasets else None
        about = {key: getattr(corpus, key, None) for key in ("homepage", "licence")}
        rows.append({"name": name, "corpus": getattr(corpus, "title", None), "counts": manifest.get(name)} | about)
    return rows


def render_card(facts: dict[str, Any]) -> str:
    """Return the model card."""
    environment = template_environment(thousands="{:,}".format)
    return environment.get_template("model_card.md.j2").render(facts, metadata=metadata(facts))


def metadata(facts: dict[str, Any]) -> str:
    """Return the card's YAML as the hubs read it, with the scores as a `model-index` by huggingface_hub's own classes."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"medasst-{kind}",
            dataset_name=f"{title}, {found['n']:,} {unit}",
            metric_type=key,
            metric_value=round(found[key], 4),
            metric_config=found["signature"],
        )
        for kind, title, unit in (
            ("scores", "Chinese medical dialogues", "records"),
            ("exam", "CMMLU and C-Eval", "questions"),
        )
        if (found := facts[kind])
        for key in found["ci95"]
        if found.get(key) is not None
    ]
    data = ModelCardData(
        language=["zh"],
        license=facts["base_facts"]["licence_id"],
        base_model=facts["base"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["medical", "llama-factory", "lora"],
        model_name=facts["shown"],
        eval_results=results or None,
    )
    return data.to_yaml()
