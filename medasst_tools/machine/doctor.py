"""Is everything here that the work needs? The environment, and for an experiment its data, model, device, memory, disk and hours.

Run: `medasst doctor [EXPERIMENT] [--json]`, or `make doctor EXPERIMENT=medasst`

One line a finding: ok, warn, fail (with the next step) or unknown. Exit status 1 if something fails. Nothing is downloaded, and no model
is loaded. How the estimates come about stands in medasst_tools/machine/cost.py.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import read_json, sha256_of
from medasst_tools.machine import cost as training_cost
from medasst_tools.machine import hardware as machine
from medasst_tools.machine import hub as hub_models
from medasst_tools.machine import preflight
from medasst_tools.machine.cost import Method
from medasst_tools.machine.preflight import Check

CONFIGS_DIR = Path("factory_configs")
SAMPLES_DATA = Path("data/demo")  # made of the bundled samples
TINY_MODEL = Path("saves/tiny_qwen2")
PYTHON = (3, 11)
SAME_SIZE = (
    10  # a run's rate holds for steps of up to ten times its arithmetic, up or down: smaller ones are mostly overhead
)
LOW_DISK = 6 << 30  # what the installation takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("experiment", nargs="?", help="a folder of factory_configs/; without it only the environment")
    parser.add_argument("--json", action="store_true", help="the findings as JSON")


def run(args: argparse.Namespace) -> None:
    """Print every finding."""
    findings = []
    for check in all_checks(args.experiment):
        findings.append(check)
        if not args.json:
            print(f"{check.status:7} {check.what:14} {check.line()}", flush=True)
    if args.json:
        print(json.dumps([check._asdict() for check in findings], ensure_ascii=False, indent=2))
    failed = [check.what for check in findings if check.status == "fail"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}")


def all_checks(experiment: str | None) -> Iterator[Check]:
    """Yield the environment's findings, then the experiment's."""
    configs = load_configs(experiment) if experiment else {}
    yield from check_environment(needed_extras())
    if experiment:
        yield from check_experiment(configs)


def load_configs(experiment: str, configs_dir: Path = CONFIGS_DIR) -> dict[str, dict[str, Any]]:
    """Return {kind: config} of an experiment's rendered configs; UserError if there is no such experiment."""
    import yaml

    folder = configs_dir / experiment
    configs = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            configs[path.stem] = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}; run `medasst render`") from None
        if not isinstance(configs[path.stem], dict):
            raise UserError(f"{path} holds no settings; run `medasst render`")
    if not configs:
        there = ", ".join(sorted(path.parent.name for path in configs_dir.glob("*/chat.yaml"))) or "none"
        raise UserError(f"no experiment {experiment!r} in {configs_dir}; there are: {there}")
    return configs


# ---- the environment ------------------------------------------------------------------------------------------------
def check_environment(needed: dict[str, list[str]]) -> Iterator[Check]:
    """Yield what concerns every experiment. needed: {extra package: experiments that ask for it}."""
    version = platform.python_version()
    if sys.version_info >= PYTHON:
        yield Check("ok", "python", f"Python {version}")
    else:
        yield Check(
            "fail", "python", f"Python {version} is older than 3.11", "`make setup PYTHON=python3.12` in a fresh .venv"
        )
    yield check_packages()
    for package, (purpose, _) in preflight.EXTRAS.items():
        there = machine.installed(package)
        for_whom = f", for {', '.join(needed[package])}" if needed.get(package) else ""
        yield Check("ok", package, f"{package} {there or 'is not installed (optional)'}: {purpose}{for_whom}")
    yield check_cuda()
    free = machine.free_disk(Path())
    text = f"{free / (1 << 30):.1f} GiB free here"
    yield (
        Check("ok", "disk", text)
        if free > LOW_DISK
        else Check("warn", "disk", text, "the installation alone takes 6 GB")
    )
    answer = hub_models.reachable()
    yield Check(answer.status, "hub", answer.detail, answer.step)
    yield check_fonts()


def needed_extras(configs_dir: Path = CONFIGS_DIR) -> dict[str, list[str]]:
    """Return {extra package: experiments whose rendered configs ask for it}."""
    import yaml

    needed: dict[str, list[str]] = {}
    for path in sorted(configs_dir.glob("*/*.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue  # `medasst render --check` says so
        for package, (_, asks) in preflight.EXTRAS.items():
            if isinstance(config, dict) and asks(config) and path.parent.name not in needed.setdefault(package, []):
                needed[package].append(path.parent.name)
    return needed


def check_packages() -> Check:
    """Compare the installed packages with constraints.txt, and see that none is missing."""
    missing = machine.missing_packages()
    if missing:
        return Check("fail", "packages", f"not installed: {', '.join(missing)}", "`make setup`")
    differing = machine.differing_packages()
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        return Check(
            "warn",
            "packages",
            f"other versions than constraints.txt: {shown}",
            "`make setup` in a fresh .venv installs those",
        )
    return Check("ok", "packages", "all installed packages are constraints.txt's versions")


def check_cuda() -> Check:
    """Say which cards there are and whether torch can use them."""
    version, cuda = machine.torch_build()
    gpus = machine.gpus()
    torch = f"torch {version} is built for {'CUDA ' + cuda if cuda else 'the CPU'}"
    if not gpus:
        return Check("ok", "gpu", f"no NVIDIA GPU; {torch}; the demo needs none")
    problem = machine.driver_problem(gpus[0].driver, cuda)
    cards = ", ".join(f"{gpu.name} {gpu.memory / (1 << 30):.0f} GiB" for gpu in gpus)
    if problem:
        return Check("fail", "gpu", f"{cards}, driver {gpus[0].driver}", problem)
    return Check("ok", "gpu", f"{cards}, driver {gpus[0].driver}; {torch}")


def check_fonts() -> Check:
    """Say whether the figures can have Chinese labels."""
    from medasst_tools.report.figures import chinese_font

    font = chinese_font()
    if font:
        return Check("ok", "fonts", f"{font}, for Chinese figures and pages")
    return Check(
        "warn",
        "fonts",
        "no Chinese font: figures are labelled in English",
        "install fonts-wqy-microhei or fonts-noto-cjk",
    )


# ---- an experiment --------------------------------------------------------------------------------------------------
def check_experiment(configs: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """Yield what an experiment needs and whether this machine has it."""
    config = configs.get("train") or configs.get("predict") or configs["chat"]
    yield from check_data(configs)
    located = hub_models.locate(config["model_name_or_path"], config.get("model_revision"))
    if located.status == "fail" and made_by_make(config["model_name_or_path"]):
        located = located._replace(
            status="warn", detail=f"{config['model_name_or_path']} isn't made yet", step="`make train` makes it first"
        )
    yield Check(located.status, "model", located.detail, located.step)
    gpus = machine.gpus()
    extras = (check for kind in configs.values() for check in preflight.check_extras(kind) if check.status != "ok")
    yield from dict.fromkeys(extras)  # training, prediction and chat ask for the same
    yield preflight.check_device(config, gpus)
    shape = preflight.shape_of(config, located)
    yield preflight.check_memory(config, shape, gpus)
    yield preflight.check_disk(config, shape, located)
    if config.get("do_train"):
        yield check_hours(config, shape, gpus)


def made_by_make(path: str) -> bool:
    """Say whether `make` makes this model itself, on its way."""
    folder = Path(path)
    return folder == TINY_MODEL or (
        folder.parent == Path("saves") and (CONFIGS_DIR / folder.name / "train.yaml").is_file()
    )


def check_data(configs: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """Compare the files of every dataset that the configs name with their folder's manifest."""
    wanted: dict[Path, list[str]] = {}
    for config in configs.values():
        for key in ("dataset", "eval_dataset"):
            names = [name.strip() for name in str(config.get(key) or "").split(",") if name.strip()]
            if names:
                wanted.setdefault(Path(config["dataset_dir"]), []).extend(names)
    for folder, names in wanted.items():
        if folder == TINY_MODEL:  # plain text that `medasst tiny-model` writes beside the model
            continue
        yield check_folder(folder, list(dict.fromkeys(names)))


def check_folder(folder: Path, names: list[str]) -> Check:
    """Say whether a converted folder has these datasets, byte for byte as its manifest says."""
    samples = folder == SAMPLES_DATA
    step = (
        "`make data` makes it of the bundled samples"
        if samples
        else "put the corpora into data/raw (README), then `make data EXPERIMENT=medasst`"
    )
    if not folder.is_dir():
        return Check("warn" if samples else "fail", "data", f"no {folder} yet", step)
    manifest = (read_json(folder / "manifest.json") or {}).get("datasets")
    if not isinstance(manifest, dict):
        return Check("fail", "data", f"{folder} has no whole manifest.json: its conversion didn't end", step)
    if missing := [name for name in names if name not in manifest]:
        return Check("fail", "data", f"{folder} lacks {', '.join(missing)}", step)
    for name in names:
        path = folder / f"{name}.jsonl"
        if (
            not path.is_file()
            or path.stat().st_size != manifest[name]["bytes"]
            or sha256_of(path) != manifest[name]["sha256"]
        ):
            return Check("fail", "data", f"{path} isn't what manifest.json says (missing, cut or changed)", step)
    records = sum(manifest[name]["kept"] for name in names)
    return Check(
        "ok", "data", f"{folder}: {len(names)} datasets, {records:,} records, every sha256 as the manifest says"
    )


def check_hours(config: dict[str, Any], shape: training_cost.ModelShape | None, gpus: list[machine.Gpu]) -> Check:
    """Say how long the training takes, from runs that were measured here; without one, the least that the card allows."""
    if shape is None:
        return Check("unknown", "hours", "the model's shape isn't known")
    counted = preflight.training_tokens(config)
    if counted is None:
        return Check("unknown", "hours", f"{config['dataset_dir']} isn't converted yet, so its tokens aren't counted")
    batch = config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    if config.get("max_steps", -1) > 0:
        tokens = config["max_steps"] * batch * counted.tokens / counted.records
    else:
        tokens = config.get("num_train_epochs", 3.0) * counted.tokens
    length = counted.tokens / counted.records
    work = tokens * training_cost.flops_per_token(shape, Method.from_config(config), length)
    size = f"{'' if counted.exact else 'at most '}{tokens:,.0f} tokens, {work:.2g} operations"
    step = "" if counted.exact else '`make audit` with AUDIT_ARGS="--tokenizer MODEL" counts the tokens'
    a_step = work / tokens * length * batch
    near = [
        (abs(size_of / a_step - 1), name, rate)
        for name, rate, size_of in training_cost.measured_rates(Path("saves"), hardware())
        if 1 / SAME_SIZE <= size_of / a_step <= SAME_SIZE
    ]
    if near:
        _, name, rate = min(near)
        most = "" if counted.exact else "at most "
        return Check(
            "ok", "hours", f"{most}{_hours(work / rate)} ({size}, {rate:.2g} a second as in saves/{name})", step
        )
    peaks = {training_cost.card_peak(gpu.name) for gpu in gpus}
    if not preflight.on_cpu(config) and peaks and None not in peaks and counted.exact:
        least = work / (min(peaks) * preflight.processes(gpus))
        return Check(
            "unknown",
            "hours",
            f"no run of this size was measured on this machine; no less than {_hours(least)}, the card's matrix peak ({size})",
        )
    return Check("unknown", "hours", f"no run of this size was measured on this machine ({size})", step)


def hardware() -> dict[str, Any]:
    """Return this machine as run.json describes it."""
    from medasst_tools.machine.hardware import made_with

    return made_with()["hardware"]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
