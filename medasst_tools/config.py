"""The one reader of YAML, of LLaMA-Factory configs and of `key=value` overrides.

Keys, templates and values that LLaMA-Factory would refuse, or take without a word, are refused here, before anything is
touched. What it knows is read from the source of its argument classes: importing them takes ten seconds.
"""

import ast
import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.errors import UserError

ARGUMENT_SOURCES = {
    "transformers": ("training_args.py", "training_args_seq2seq.py"),
    "llamafactory": tuple(
        f"hparams/{name}_args.py" for name in ("model", "data", "generating", "finetuning", "training")
    ),
}
GENERATION_CLASS = "GeneratingArguments"
UNKNOWN_DEFAULT = ...  # one that isn't a plain value in the source
REQUIRED = {
    "train": ("do_train", "output_dir", "dataset", "dataset_dir", "model_name_or_path", "template"),
    "predict": ("do_predict", "output_dir", "eval_dataset", "dataset_dir", "model_name_or_path", "template"),
    "chat": ("model_name_or_path", "template"),
    "export": ("model_name_or_path", "template", "export_dir"),
}
NOT_FOR_CHAT = ("stage", "do_train", "do_predict")


class Setting(NamedTuple):
    """One setting that LLaMA-Factory knows: the class that has it, its annotation as text, its default."""

    owner: str
    annotation: str
    default: Any


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds; UserError if it isn't there or isn't YAML in UTF-8."""
    import yaml

    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}; run this in the project's folder, or see that the name is right") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds, read by libyaml, which is ten times as fast; yaml.YAMLError if it isn't YAML."""
    import yaml

    return yaml.load(text, Loader=yaml.CSafeLoader)


def load(path: Path, overrides: Iterable[str] = (), kind: str = "train") -> dict[str, Any]:
    """Return a rendered config with `key=value` overrides, merged as LLaMA-Factory's `read_args` does.

    kind: "train", "predict", "chat" or "export". UserError names all that LLaMA-Factory wouldn't take.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    if bad := [word for word in overrides if not re.match(r"[A-Za-z_][\w.]*=", word)]:
        raise UserError(f"override {bad[0]!r} must be key=value, without dashes")
    if not path.is_file():
        raise UserError(_why_missing(path, kind))
    if not isinstance(written := read_yaml(path), dict):
        raise UserError(f"{path} holds {type(written).__name__}, must be settings; is it a {kind}.yaml?")
    try:  # OmegaConf reads the file again: 1e-4 is a number to it, and text to YAML 1.1
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(overrides))
        config: dict[str, Any] = dict(OmegaConf.to_container(merged, resolve=True))  # ty: ignore[no-matching-overload]
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{' '.join([str(path), *overrides])}: {' '.join(str(error).split())}") from None
    if missing := [key for key in REQUIRED[kind] if config.get(key) in (None, "", False)]:
        raise UserError(f"{path} says no {', '.join(missing)}; is it a {kind}.yaml?")
    if kind == "chat" and (found := [key for key in NOT_FOR_CHAT if config.get(key)]):
        raise UserError(
            f"{path} says {found[0]}: a config for training or prediction; give the experiment's chat.yaml"
        )
    if problems := list(faults(config)):
        raise UserError(f"{path}: " + "; ".join(problems))
    return config


def _why_missing(path: Path, kind: str) -> str:
    others = sorted(file.name for file in path.parent.glob("*.yaml"))
    reasons = {"train": "it isn't fine-tuned", "export": "it has no adapter to merge into a base"}
    if kind in reasons and path.name == f"{kind}.yaml" and "chat.yaml" in others:
        return (
            f"{path.parent.name} has no {path.name}: {reasons[kind]}; use it as it is, there are {', '.join(others)}"
        )
    return f"no {path}; `medasst render` writes the configs of factory_configs/experiments.yaml"


def faults(config: dict[str, Any]) -> Iterable[str]:
    """Yield what LLaMA-Factory wouldn't take: unknown keys with the nearest known one, wrong types, unknown templates."""
    known = known_settings()
    for key, value in config.items():
        if key not in known:
            yield f"unknown key {key!r}{nearest(key, known)}"
        elif wrong := _wrong_type(value, known[key].annotation):
            yield f"{key} is {value!r}, must be {wrong}"
    template = config.get("template")
    if isinstance(template, str) and template not in known_templates():
        yield f"LLaMA-Factory has no template {template!r}{nearest(template, known_templates())}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like this one, as the end of a sentence; empty if none is."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _wrong_type(value: Any, annotation: str) -> str | None:
    """Return what a text, number or switch should have been, where the annotation is plain enough to say."""
    plain = set(re.findall(r"\w+", annotation)) - {"None", "Optional", "Union"}
    numbers = plain <= {"int", "float"}
    if not plain or not (numbers or plain == {"bool"}) or value is None:
        return None
    if plain == {"bool"}:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "a number"
    return "a whole number" if plain == {"int"} and value != int(value) else None


def package_folder(name: str) -> Path:
    """Return where an installed package's source is, without importing it, which takes seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {name} isn't installed; `make setup` installs it")
    return Path(spec.origin).parent


@functools.cache
def known_settings() -> dict[str, Setting]:
    """Return every setting of LLaMA-Factory's and transformers' argument classes by name; the later class counts."""
    settings = {}
    for package, files in ARGUMENT_SOURCES.items():
        folder = package_folder(package)
        for file in files:
            tree = ast.parse((folder / file).read_text(encoding="utf-8"))
            classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
            for owner, field in ((one, field) for one in classes for field in one.body):
                if isinstance(field, ast.AnnAssign) and (setting := _setting(owner.name, field)):
                    settings[ast.unparse(field.target)] = setting
    return settings


def _setting(owner: str, field: ast.AnnAssign) -> Setting | None:
    """Return a dataclass field as a setting, None if a config can't set it (`init=False`, ClassVar)."""
    annotation = ast.unparse(field.annotation)
    options = {word.arg: word.value for word in field.value.keywords} if isinstance(field.value, ast.Call) else {}
    if "ClassVar" in annotation or ("init" in options and ast.unparse(options["init"]) == "False"):
        return None
    default = options.get("default", field.value)
    plain = isinstance(default, ast.Constant)
    return Setting(owner, annotation, default.value if plain else UNKNOWN_DEFAULT)


@functools.cache
def known_templates() -> frozenset[str]:
    """Return the names of LLaMA-Factory's chat templates."""
    source = package_folder("llamafactory") / "data" / "template.py"
    return frozenset(re.findall(r'register_template\(\s*name="([^"]+)"', source.read_text(encoding="utf-8")))
