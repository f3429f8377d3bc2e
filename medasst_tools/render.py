"""Turn `factory_configs/experiments.yaml` into complete LLaMA-Factory configs.

Run: `medasst render`, or `medasst render --check` to see whether a committed file differs (exit status 1).

One rendered file is one complete run. Templates are strict: an undefined name is an error. So is an unknown key here,
because it would silently do nothing; LLaMA-Factory's parser refuses the settings that it doesn't know.
"""

import argparse
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from medasst_tools import config as configs
from medasst_tools.errors import CheckFailed, UserError
from medasst_tools.files import PROJECT_ROOT, write_text

CONFIGS_DIR = PROJECT_ROOT / "factory_configs"
TEMPLATES_DIR = PROJECT_ROOT / "templates"
KINDS = {  # finetuning: the configs that such an experiment has
    "lora": ("train", "predict", "chat", "export"),
    "full": ("train", "predict", "chat"),
    "none": ("predict", "chat"),
}
# launch: environment variables in front of the command; after: the experiment on whose adapter this one trains another
PLAIN_KEYS = {"purpose", "finetuning", "dataset_dir", "train_dataset_dir", "huggingface_id", "launch", "after"}
SECTIONS = {
    "model",
    "quantization",
    "dialogue",
    "method",
    "dataset",
    "train",
    "predict",
    "generate",
    "chat",
    "export",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed file differs")
    parser.add_argument(
        "--configs-dir", type=Path, default=CONFIGS_DIR, help="where experiments.yaml is (factory_configs)"
    )


def run(args: argparse.Namespace) -> None:
    """Render every experiment, or check that every rendered file is what it should be."""
    rendered = render_all(args.configs_dir / "experiments.yaml")
    present = {path.relative_to(args.configs_dir) for path in args.configs_dir.glob("*/*.yaml")}
    stale = [
        path
        for path, text in rendered.items()
        if path not in present or (args.configs_dir / path).read_text(encoding="utf-8") != text
    ]
    orphans = sorted(present - rendered.keys())
    if args.check:
        if stale or orphans:
            names = ", ".join(str(path) for path in [*stale, *orphans])
            raise CheckFailed(f"not what experiments.yaml and templates/ give: {names}; run `medasst render`")
    else:
        for path in stale:  # an unchanged file keeps its time, so that make runs only what depends on a change
            write_text(args.configs_dir / path, rendered[path])
        for path in orphans:
            (args.configs_dir / path).unlink()
    print(f"{len(rendered)} configs, {len(stale)} {'stale' if args.check else 'written'}")


def render_all(experiments_yaml: Path) -> dict[Path, str]:
    """Return {relative path: text} of every config of every experiment. All problems are reported at once."""
    source = load_experiments(experiments_yaml)
    rendered, problems = {}, []
    for name in source["experiments"]:
        try:
            experiment = resolve(source, name)
            texts = dict(render_experiment(name, experiment))
            faults = [fault for text in texts.values() for fault in configs.faults(configs.parse_yaml(text))]
            problems += [f"{name}: {fault}" for fault in dict.fromkeys(faults)]
            rendered |= {Path(name, f"{kind}.yaml"): text for kind, text in texts.items()}
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{experiments_yaml}: " + "; ".join(problems))
    return rendered


def load_experiments(path: Path) -> dict[str, Any]:
    """Return experiments.yaml: {"system_prompt": {"version", "text"}, "experiments": {name: {...}}}; UserError if it isn't that."""
    source = configs.read_yaml(path)
    if not isinstance(source, dict) or set(source) != {"system_prompt", "experiments"}:
        got = sorted(source) if isinstance(source, dict) else type(source).__name__
        raise UserError(f"{path} must have just the keys system_prompt and experiments, got {got}")
    prompt = source["system_prompt"]
    if not (isinstance(prompt, dict) and set(prompt) == {"version", "text"} and isinstance(prompt["text"], str)):
        raise UserError(f"{path}: system_prompt is {prompt!r}, must have just the keys version and text")
    experiments = source["experiments"]
    if not isinstance(experiments, dict):
        raise UserError(f"{path}: experiments is {experiments!r}, must be a mapping")
    if wrong := [name for name, experiment in experiments.items() if not isinstance(experiment, dict)]:
        raise UserError(f"{path}: {wrong[0]} is {experiments[wrong[0]]!r}, must be a mapping")
    return source


def resolve(source: dict[str, Any], name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the experiment with everything that it takes over through `based_on`; a null removes what was taken over."""
    experiments = source["experiments"]
    if not isinstance(name, str) or name not in experiments:
        near = configs.nearest(str(name), experiments)
        raise UserError(f"no experiment {name!r}{near}; there are {', '.join(experiments)}")
    if name in seen:
        raise UserError(f"{name}: based_on goes round in a circle: {' -> '.join([*seen, name])}")
    own = dict(experiments[name])
    base = own.pop("based_on", None)
    inherited = resolve(source, base, (*seen, name)) if base else {"dialogue": {}}
    merged = inherited | own
    for section in SECTIONS & own.keys():
        if isinstance(own[section], dict):
            both = inherited.get(section, {}) | own[section]
            merged[section] = {key: setting for key, setting in both.items() if setting is not None}
    _check(name, merged)
    prompt = source["system_prompt"]
    reason = f"system prompt v{prompt['version']}, one for all experiments; paper silent"
    merged["dialogue"].setdefault("default_system", [prompt["text"], reason])
    return merged


def _check(name: str, experiment: dict[str, Any]) -> None:
    if unknown := experiment.keys() - PLAIN_KEYS - SECTIONS:
        raise UserError(
            f"{name}: unknown key {', '.join(sorted(unknown))}; known: {', '.join(sorted(PLAIN_KEYS | SECTIONS))}"
        )
    for key, value in experiment.items():
        if key in SECTIONS and isinstance(value, dict):
            _check_settings(f"{name}: {key}", value)
        elif key in SECTIONS or not isinstance(value, str):
            must = "a mapping of settings" if key in SECTIONS else "a text"
            raise UserError(f"{name}: {key} is {value!r}, must be {must}")
    if experiment.get("finetuning") not in KINDS:
        raise UserError(f"{name}: finetuning is {experiment.get('finetuning')!r}, must be one of {', '.join(KINDS)}")


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    for key, setting in settings.items():
        if isinstance(setting, dict):
            _check_settings(f"{where}.{key}", setting)
        elif not (isinstance(setting, list) and len(setting) == 2 and isinstance(setting[1], str)):
            raise UserError(f"{where}.{key} is {setting!r}, must be [value, reason]")


@functools.cache  # its templates stay compiled
def template_environment(**filters: Any) -> Any:
    """Return jinja2's environment of templates/: a name that isn't there is an error, and a block's line leaves none."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES_DIR),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment


def render_experiment(name: str, experiment: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each config that the experiment has: no train without finetuning, no export without LoRA."""
    import jinja2

    environment = template_environment(settings=settings_lines)
    for kind in KINDS[experiment["finetuning"]]:
        try:
            yield kind, environment.get_template(f"{kind}.yaml.j2").render(name=name, **experiment)
        except jinja2.UndefinedError as error:
            raise UserError(f"{name}: templates/{kind}.yaml.j2: {error.message}") from None


def settings_lines(section: dict[str, Any], indent: str = "") -> str:
    """Return a section's settings as YAML lines, each with its reason as a comment; a mapping of settings is nested."""
    lines = []
    for key, setting in section.items():
        if isinstance(setting, dict):
            lines += [f"{indent}{key}:", settings_lines(setting, indent + "  ")]
        else:
            value, reason = setting
            lines.append(f"{indent}{key}: {_scalar(value)}  # {reason}")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    # YAML 1.1 reads 1e-4 as text: PyYAML's floats have a dot; JSON's quoting of a text is safe in it and in OmegaConf
    if isinstance(value, float):
        return yaml.safe_dump(value).splitlines()[0]
    if isinstance(value, str) and re.fullmatch(r"[\w./,-]+", value, re.ASCII) and yaml.safe_load(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
