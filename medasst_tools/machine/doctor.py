"""Is everything here that the work needs? The environment, and for an experiment its data, model, device, memory, disk and days.

Run: `medasst doctor [EXPERIMENT] [--json]`, or `make doctor EXPERIMENT=medasst`

One line a finding: ok, warn, fail (with the next step) or unknown. Exit status 1 if something fails. No weights are
downloaded, and no model is loaded. How the estimates come about stands in medasst_tools/machine/cost.py.
"""

import argparse
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medasst_tools import provenance
from medasst_tools.config import load
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import read_json, sha256_of
from medasst_tools.language import said, word
from medasst_tools.machine import cost, hardware, preflight
from medasst_tools.machine.hub import Check
from medasst_tools.machine.preflight import gib

CONFIGS_DIR, RAW_DIR = Path("factory_configs"), Path("data/raw")
LOW_DISK = 6 << 30  # what the installation takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("experiment", nargs="?", help="a folder of factory_configs/; without it only the environment")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print every finding."""
    configs = load_configs(args.experiment) if args.experiment else {}
    findings = []
    for check in itertools.chain(check_environment(), check_experiment(configs) if configs else ()):
        if check in findings:  # of training data and test sets, say
            continue
        findings.append(check)
        if not args.json:
            print(f"{column(check.status, 7)} {column(check.what, 14)} {said(check.line())}", flush=True)
    if args.json:
        print(json.dumps([check._asdict() for check in findings], ensure_ascii=False, indent=2))
    if failed := [check.what for check in findings if check.status == "fail"]:
        raise CheckFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(map(word, failed))}")


def column(text: str, width: int) -> str:
    """Return one of the fixed words, filled up to a width; a Chinese character is two wide."""
    shown = word(text)
    return shown + " " * (width - len(shown) - sum(not letter.isascii() for letter in shown))


def load_configs(experiment: str, configs_dir: Path = CONFIGS_DIR) -> dict[str, dict[str, Any]]:
    """Return {kind: config} of an experiment's rendered configs; UserError if there is no such experiment."""
    paths = sorted((configs_dir / experiment).glob("*.yaml"))
    if not paths:
        there = ", ".join(sorted(path.parent.name for path in configs_dir.glob("*/chat.yaml"))) or "none"
        raise UserError(f"no experiment {experiment!r} in {configs_dir}; there are: {there}")
    return {path.stem: load(path, kind=path.stem) for path in paths}


# ---- the environment ------------------------------------------------------------------------------------------------
def check_environment() -> Iterator[Check]:
    """Yield what concerns every experiment."""
    yield Check("ok", "python", f"Python {platform.python_version()}")
    yield check_packages()
    yield check_attention()
    for package, (purpose, _, _) in preflight.EXTRAS.items():
        there = hardware.installed(package) or "is not installed (optional)"
        yield Check("ok", package, f"{package} {there}: {purpose}")
    version, cuda = hardware.torch_build()
    yield Check("ok", "torch", f"torch {version} is built for {f'CUDA {cuda}' if cuda else 'the CPU'}")
    yield preflight.check_device({}, hardware.gpus())
    free = hardware.free_disk(Path())
    step = "" if free > LOW_DISK else "the installation alone takes 6 GB"
    yield Check("ok" if free > LOW_DISK else "warn", "disk", f"{gib(free)} free here", step)


def check_packages() -> Check:
    """Compare the installed packages with constraints.txt, and see that none is missing."""
    if missing := hardware.missing_packages():
        return Check("fail", "packages", f"not installed: {', '.join(missing)}", "`make setup`")
    if differing := hardware.differing_packages():
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        step = "`make setup` in a fresh .venv"
        return Check("warn", "packages", f"other versions than constraints.txt: {shown}", step)
    return Check("ok", "packages", "all installed packages are constraints.txt's versions")


def check_attention() -> Check:
    """Refuse transformers 5.6.0 beside flash-attn: its call fails for every Qwen2 (LlamaFactory 10610, transformers 45588)."""
    version = hardware.installed("transformers")
    if version == "5.6.0" and hardware.installed("flash-attn"):
        step = "`make setup` installs another, or uninstall flash-attn"
        return Check("fail", "attention", "transformers 5.6.0 fails with flash-attn", step)
    return Check("ok", "attention", f"transformers {version}")


# ---- an experiment --------------------------------------------------------------------------------------------------
def check_experiment(configs: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """Yield what an experiment needs and whether this machine has it."""
    trained = configs.get("train")
    config = trained or configs.get("predict") or configs["chat"]
    yield from check_data(configs)
    for check in preflight.checks(config, configs.get("predict") if trained else None):
        not_made = (
            check.what == "model" and check.status == "fail" and config["model_name_or_path"].startswith("saves/")
        )
        yield check._replace(status="warn") if not_made else check  # `make train` makes it first
    if trained:
        yield check_days(config, cost.known_shape(config["model_name_or_path"]), hardware.gpus())


def check_data(configs: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """Yield a finding for each folder of data that the configs name."""
    wanted: dict[Path, list[str]] = {}
    for config in configs.values():
        for key in ("dataset", "eval_dataset"):
            if config.get(key):
                wanted.setdefault(Path(config["dataset_dir"]), []).extend(provenance.dataset_names(config[key]))
    for folder, names in wanted.items():
        if folder.parts[:1] != ("saves",):  # plain text that `medasst tiny-model` writes beside the model
            yield check_folder(folder, list(dict.fromkeys(names)))


def check_folder(folder: Path, names: list[str]) -> Check:
    """Say whether a folder has these datasets, and if it was converted here, byte for byte as its manifest says."""
    at_hand, step = False, "`make download`, then `make data EXPERIMENT=...`"
    if folder == Path("data/demo"):
        at_hand, step = True, "`make data` makes it of the bundled samples"
    elif raw_files_are_there(names):
        at_hand, step = True, f"`make train` makes it of {RAW_DIR}"
    if not (folder / "dataset_info.json").is_file():
        return Check("warn" if at_hand else "fail", "data", f"no {folder}/dataset_info.json yet", step)
    try:
        paths = provenance.dataset_files(folder, names)
    except UserError as error:
        return Check("fail", "data", str(error), step)
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        detail = f"{folder}: {len(names)} datasets, your own: not converted here, so nothing vouches for them"
        return Check("ok", "data", detail)
    made = manifest["datasets"]
    if changed := [name for name in names if made.get(name, {}).get("sha256") != sha256_of(paths[name])]:
        return Check(
            "fail", "data", f"{folder}: {', '.join(changed)}: not what manifest.json says (cut or changed)", step
        )
    records = sum(made[name]["kept"] for name in names)
    detail = f"{folder}: {len(names)} datasets, {records:,} records, every sha256 as the manifest says"
    return Check("ok", "data", detail)


def raw_files_are_there(names: list[str]) -> bool:
    """Say whether the raw file of each of these datasets was downloaded, so that they only wait for the conversion."""
    known = load_datasets()
    return all(
        name in known and any((RAW_DIR / known[name].corpus.name / file).exists() for file in known[name].files)
        for name in names
    )


def training_tokens(config: dict[str, Any]) -> tuple[float, str] | None:
    """Return (useful tokens of one epoch, where the number is from); None if nothing is known of the data."""
    folder = Path(config["dataset_dir"])
    manifest = (read_json(folder / "manifest.json") or {}).get("datasets", {})
    audited = (read_json(folder / "audit.json") or {}).get("datasets", {})
    names, cutoff = provenance.dataset_names(config["dataset"]), config.get("cutoff_len", 2048)
    if any(name not in manifest for name in names):
        registry = load_datasets()
        published = [registry[name].paper if name in registry else None for name in names]
        records = sum(count or 0 for count in published)
        return (records * cost.TOKENS_A_RECORD, "the paper's records, not converted yet") if all(published) else None
    means = [audited.get(name, {}).get("tokens", {}).get("mean") for name in names]
    tokens = 0.0
    for name, mean in zip(names, means, strict=True):
        kept = max(1, manifest[name]["kept"])
        tokens += kept * min(cutoff, mean or manifest[name]["bytes"] / kept / cost.BYTES_A_TOKEN)
    return tokens, "estimated from bytes" if None in means else "counted by the audit"


def check_days(config: dict[str, Any], shape: cost.ModelShape | None, cards: list[hardware.Gpu]) -> Check:
    """Say how long the training takes on these cards, on one A10 if there is none, as a range."""
    found = training_tokens(config)
    peaks = [cost.card_peak(card.name) for card in cards] or [cost.card_peak("A10")]
    if shape is None or found is None or None in peaks or config.get("max_steps", -1) > 0:
        return Check("unknown", "days", "the data isn't converted yet, or the model's shape or the card isn't known")
    tokens, source = found[0] * config.get("num_train_epochs", 3.0), found[1]
    peak = min(filter(None, peaks)) * len(peaks)
    least, most = (seconds / 86400 for seconds in cost.seconds_of_training(shape, config, tokens, peak))
    where = f"{len(cards)} x {cards[0].name}" if cards else "one A10"
    text = f"{least:.1f} to {most:.1f} days on {where}, estimated: {tokens:,.0f} useful tokens ({source})"
    return Check("unknown", "days", text)
