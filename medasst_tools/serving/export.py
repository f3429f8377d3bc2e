"""Merge an experiment's adapter into its base, with a model card and a Modelfile that says what training said.

Run: `medasst export factory_configs/demo/export.yaml`, which `make export` calls.

LLaMA-Factory merges and writes safetensors, in this process, into a folder beside the place, which takes the place only when
it is whole. The chat template and the Ollama Modelfile that go with it are compared with the template that the model was trained
with and corrected where they differ (`medasst_tools/serving/exported_prompts.py`). README.md is rendered from templates/model_card.md.j2; export.json, written last, says what the
model was made of: the same again merges nothing and renews the card.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import PROJECT_ROOT, model_sha256, write_json, write_text
from medasst_tools.machine import preflight
from medasst_tools.serving.exported_prompts import correct_prompts
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH
from medasst_tools.training.train import COMPLETE, made_with

BASES = PROJECT_ROOT / "dataset_info" / "base_models.yaml"
DONE = "export.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("config", type=Path, help="factory_configs/<experiment>/export.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over what the file says, as for llamafactory-cli"
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"), help="where the scores are (results)")


def run(args: argparse.Namespace) -> None:
    """Export, or find the same model exported before."""
    config = load_export_config(args.config, args.overrides)
    target = Path(config["export_dir"])
    facts = gather_facts(args.config, config, args.results_dir)
    card = render_card(facts)
    inputs = facts["inputs"]
    earlier = read_json(target / DONE)
    if earlier.get("inputs") == inputs and earlier.get("sha256") == model_sha256(target):
        write_text(target / "README.md", card)  # the scores may be new
        print(f"{target}: exported before from the same adapter and base; nothing to merge, the card is up to date")
        return
    if target.is_dir() and any(target.iterdir()) and not (target / DONE).is_file():
        raise UserError(f"{target} holds something that `medasst export` didn't write; move it or give export_dir=...")
    preflight.require(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        made = Path(folder) / target.name
        corrections = merge(config | {"export_dir": str(made)})
        write_text(made / "README.md", card)
        note = {"inputs": inputs, "corrections": corrections, "sha256": model_sha256(made)} | made_with()
        write_json(made / DONE, note)
        if target.exists():
            target.rename(Path(folder) / "replaced")
        made.rename(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print("\n".join(f"corrected: {line}" for line in corrections) or "chat template and Modelfile: as in training")
    print(f"{target}: {size / 1e6:,.1f} MB")


def load_export_config(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return an export.yaml with its overrides; UserError if it isn't one or its models aren't there."""
    from omegaconf import OmegaConf

    if bad := [word for word in overrides if "=" not in word or word.startswith("-")]:
        raise UserError(f"override {bad[0]!r} must be key=value, without dashes")
    try:
        config = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides)))
    except FileNotFoundError:
        raise UserError(f"no {path}; `medasst render` writes one for each LoRA experiment") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    needed = ("model_name_or_path", "adapter_name_or_path", "template", "export_dir")
    if missing := [key for key in needed if not config.get(key)]:
        raise UserError(f"{path} says no {', '.join(missing)}; is it an export.yaml?")
    for key in ("model_name_or_path", "adapter_name_or_path"):
        if config[key].startswith("saves/") and not Path(config[key]).is_dir():
            raise UserError(f"{path}: no {config[key]}; `make train EXPERIMENT={Path(config[key]).name}` makes it")
    places = [Path(config[key]).resolve() for key in ("model_name_or_path", "adapter_name_or_path")]
    target = Path(config["export_dir"]).resolve()
    if any(place == target or target in place.parents for place in places):
        raise UserError(f"export_dir is {config['export_dir']}, which holds what is to be merged; give another folder")
    return config


def merge(config: dict[str, Any]) -> list[str]:
    """Let LLaMA-Factory merge into config["export_dir"] and correct its Modelfile; return the corrections."""
    from llamafactory.train.tuner import export_model

    export_model(config)
    folder = Path(config["export_dir"])
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"LLaMA-Factory wrote no safetensors into {folder}; is export_legacy_format set?")
    return correct_prompts(folder, {key: config[key] for key in ("template", "default_system") if key in config})


def gather_facts(path: Path, config: dict[str, Any], results_dir: Path) -> dict[str, Any]:
    """Return everything that the model card says; what isn't known is None or empty."""
    adapter, base = Path(config["adapter_name_or_path"]), config["model_name_or_path"]
    experiment = path.parent.name
    trained = read_json(adapter / COMPLETE)
    settings = trained.get("inputs", {}).get("config", {})
    return {
        "experiment": experiment,
        "base": base,
        "base_facts": base_facts(base),
        "template": config["template"],
        "system": config.get("default_system"),
        "run": trained,
        "settings": settings,
        "data": data_rows(settings),
        "scores": read_json(results_dir / experiment / "scores.json"),
        "exam": read_json(results_dir / experiment / "exam.json"),
        "safety": read_json(results_dir / experiment / "safety.json"),
        "adapter_sha256": model_sha256(adapter),
        "inputs": {
            "config": dict(sorted(config.items())),
            "adapter": model_sha256(adapter),
            "base": model_sha256(Path(base)) or base,
        },
        "notice_zh": NOTICE_ZH,
        "notice_en": NOTICE_EN,
    }


def base_facts(base: str) -> dict[str, Any]:
    """Return the base's licence and page; a folder of this project says what it is made of, an unknown id that it is unknown."""
    known = yaml.safe_load(BASES.read_text(encoding="utf-8"))
    for entry in known:
        if base in entry["ids"]:
            return entry
    return {"licence": None, "licence_id": None, "homepage": None}


def data_rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each dataset trained on: its corpus, licence, count from the manifest, sha256."""
    datasets = load_datasets()
    manifest = read_json(Path(settings.get("dataset_dir", "")) / "manifest.json").get("datasets", {})
    rows = []
    for name in filter(None, settings.get("dataset", "").split(",")):
        corpus = datasets[name].corpus if name in datasets else None
        rows.append(
            {
                "name": name,
                "corpus": corpus.title if corpus else None,
                "homepage": corpus.homepage if corpus else None,
                "licence": corpus.licence if corpus else None,
                "counts": manifest.get(name),
            }
        )
    return rows


def render_card(facts: dict[str, Any]) -> str:
    """Return the model card."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PROJECT_ROOT / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    return environment.get_template("model_card.md.j2").render(facts)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none; UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); run the step that writes it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; run the step that writes it again")
    return value
