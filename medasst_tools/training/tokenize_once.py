"""Make the tokens of a training set once, in one process; the runs on many GPUs then only read them.

Run: `medasst tokenize factory_configs/medasst_ddp/tokenize.yaml [key=value ...]`, which `make tokenize` calls.

LLaMA-Factory takes what lies in `tokenized_path` and ignores the run's own data settings; where nothing lies there, every
process but the first waits until one has tokenised everything, and a run of many GPUs times out over it. So this module
writes the tokens through LLaMA-Factory's own `get_dataset`, without loading a model, and beside them `made_of.json`: what
they are made of. The folder appears whole or not at all. `medasst train` refuses tokens that are made of something else.
"""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from medasst_tools.errors import UserError
from medasst_tools.files import TOKENIZER_FILES, model_sha256, write_json

MADE_OF = "made_of.json"
# The settings that a token depends on; unset and null are the same. Beside them: the data, the tokenizer, LLaMA-Factory.
TOKEN_SETTINGS = (
    "cutoff_len",
    "dataset",
    "default_system",
    "enable_thinking",
    "interleave_probs",
    "mask_history",
    "max_samples",
    "mix_strategy",
    "neat_packing",
    "packing",
    "preprocessing_batch_size",
    "preserve_thinking",
    "stage",
    "template",
    "tool_format",
    "train_on_prompt",
    "val_size",
)
# ... as it does on these of the model's
TOKENIZER_SETTINGS = (
    "add_special_tokens",
    "add_tokens",
    "model_revision",
    "new_special_tokens_config",
    "split_special_tokens",
    "use_fast_tokenizer",
)
# ... and those of LLaMA-Factory's data settings that change no token of the training set
NO_TOKEN_SETTINGS = (
    "buffer_size",
    "data_shared_file_system",
    "dataset_dir",
    "eval_dataset",
    "eval_num_beams",
    "eval_on_each_dataset",
    "ignore_pad_token_for_loss",
    "media_dir",
    "overwrite_cache",
    "preprocessing_num_workers",
    "streaming",
    "tokenized_path",
)
# what it takes beside them to make tokens; the rest of a train.yaml may need GPUs or extras that this machine hasn't got
ACCESS = ("cache_dir", "hf_hub_token", "model_name_or_path", "ms_hub_token", "output_dir", "seed", "trust_remote_code")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("config", type=Path, help="factory_configs/<experiment>/tokenize.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over what the file says")


def run(args: argparse.Namespace) -> None:
    """Write the tokens, or find them there."""
    from medasst_tools.training.train import load_config, run_inputs  # which imports this module for its check

    config = load_config(args.config, args.overrides)
    if not config.get("tokenized_path"):
        raise UserError(f"{args.config} says no tokenized_path; is it a tokenize.yaml?")
    target, wanted = Path(config["tokenized_path"]), made_of(config, run_inputs(config)["data"])
    if _read(target) == wanted:
        print(f"{target}: made before of the same data and settings; nothing to do")
        return
    with _whole_folder(target) as folder:
        records, tokens = write_tokens(config, folder)
        write_json(folder / MADE_OF, wanted)
    print(f"{target}: {tokens:,} tokens in {records:,} training examples")


def made_of(config: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    """Return what the tokens depend on. data: sha256 of each dataset's file."""
    base = config["model_name_or_path"]
    settings = {key: config[key] for key in TOKEN_SETTINGS + TOKENIZER_SETTINGS if config.get(key) is not None}
    if {"val_size", "mix_strategy"} & settings.keys():  # they draw
        settings["seed"] = config.get("seed", 42)
    return {
        "settings": settings,
        "data": data,
        "tokenizer": model_sha256(Path(base), TOKENIZER_FILES) or base,
        "versions": {name: metadata.version(name) for name in ("llamafactory", "transformers", "tokenizers")},
    }


def check_tokens(config: dict[str, Any], data: dict[str, str]) -> None:
    """Raise UserError if the config trains on tokens that aren't there or are made of something else than it says."""
    if not config.get("tokenized_path"):
        return
    target, wanted = Path(config["tokenized_path"]), made_of(config, data)
    found = _read(target)
    again = f"run `make tokenize EXPERIMENT={Path(config['output_dir']).name}`"
    if not found:
        raise UserError(f"no tokens in {target}; {again} first")
    for part, values in wanted.items():
        if found.get(part) != values:
            raise UserError(
                f"the tokens in {target} are of other {part}: {_difference(found.get(part), values)}; {again}"
            )


def _difference(found: Any, wanted: Any) -> str:
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return f"{found}, now {wanted}"
    changed = [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {found.get(key)}, now {wanted.get(key)}" for key in changed)


def write_tokens(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Tokenise as `llamafactory-cli train` does before it loads the model; return (training examples, their tokens)."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    config = {key: config.get(key) for key in TOKEN_SETTINGS + TOKENIZER_SETTINGS + NO_TOKEN_SETTINGS + ACCESS}
    config = {key: value for key, value in config.items() if value is not None}
    # use_cpu: one process that sees several GPUs is refused
    config |= {"tokenized_path": str(folder), "do_train": False, "report_to": "none", "use_cpu": True}
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(config)
    tokenizer_module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(tokenizer_module["tokenizer"], data_args)
    dataset = get_dataset(
        template, model_args, data_args, training_args, stage=finetuning_args.stage, **tokenizer_module
    )["train_dataset"]
    lengths = dataset.with_format("arrow")
    return len(dataset), sum(
        len(batch["input_ids"].combine_chunks().flatten()) for batch in lengths.iter(batch_size=10_000)
    )


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target` that replaces it when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folder is for its owner only
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read(target: Path) -> dict[str, Any]:
    try:
        return orjson.loads((target / MADE_OF).read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
