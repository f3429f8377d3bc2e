"""The paper's padding against batches of like length and against packing, at equal useful tokens in one run, as a Markdown table.

Run: `make bench-train`, or `python benchmarks/bench_train.py --data-dir data/real` for real text that `medasst convert` made.

Each leg is LLaMA-Factory's own training (run_exp) over the same records once, with the recipe of factory_configs/medasst/train.yaml
on a small Qwen2 in float32: LoRA of rank 8 on all linear layers, recomputation, cutoff_len 512, AdamW. Legs are repeated in
turn, after a short one that doesn't count, and their medians compared. Tokens are counted in the batches that reach the model: useful ones
are no padding. What padding costs is padded / useful tokens: the limit of what can be gained by removing it. transformers looks for records of like length among as many as
fill 50 batches, a quarter of the data at most.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
SEED = 42
CUTOFF = 512
WARM_UP = 10  # steps of the first leg of each kind, which doesn't count
# Blocks of 512 tokens; two of them are about the useful tokens of four records, so that a step is of like size.
VARIANTS: dict[str, dict[str, Any]] = {
    "padding, batches of 4 (the paper)": {"per_device_train_batch_size": 4},
    "4 records of like length": {"per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length"},
    "packing, 2 blocks of 512": {"per_device_train_batch_size": 2, "neat_packing": True},
}


class Leg(NamedTuple):
    """What one training did: optimizer steps, tokens that aren't padding, all tokens, seconds of training."""

    steps: int
    useful: int
    padded: int
    seconds: float


def write_dataset(data_dir: Path, folder: Path, count: int) -> int:
    """Write a seeded sample of the training records as one LLaMA-Factory dataset; how many they are."""
    lines = [line for path in sorted(data_dir.glob("*_train.jsonl")) for line in path.open(encoding="utf-8")]
    random.Random(SEED).shuffle(lines)
    records = [json.loads(line) for line in lines[:count]]
    for record in records:
        record["history"] = record.get("history") or []
    records.sort(
        key=lambda record: not record["history"]
    )  # the types of the first block count: a history must be in it
    with (folder / "bench.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
    if not any(record["history"] for record in records):
        del columns["history"]
    info = {"bench": {"file_name": "bench.jsonl", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return len(records)


def leg_config(folder: Path, variant: str) -> dict[str, Any]:
    """Return medasst's own train.yaml with the small model and data, and what the variant changes."""
    import yaml

    config = yaml.safe_load((ROOT / "factory_configs/medasst/train.yaml").read_text(encoding="utf-8"))
    config |= {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "dataset": "bench", "cutoff_len": CUTOFF,
        "output_dir": str(folder / "out"), "overwrite_output_dir": True, "num_train_epochs": 1.0, "bf16": False, "use_cpu": True,
        "save_strategy": "no", "plot_loss": False, "preprocessing_num_workers": 1, "dataloader_num_workers": 0, "disable_tqdm": True,
        "logging_steps": 1000, "seed": SEED,
    }  # fmt: skip
    return config | VARIANTS[variant]


def run_leg(folder: Path, variant: str, steps: int = -1) -> Leg:
    """Train once over the records, or `steps` steps, counting the tokens of the batches as the model gets them."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    counts = {"useful": 0, "padded": 0}

    class CountTokens(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
            def count(module, positional, named):
                counts["padded"] += named["input_ids"].numel()
                counts["useful"] += int((named["input_ids"] != processing_class.pad_token_id).sum())

            self.hook = model.register_forward_pre_hook(count, with_kwargs=True)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # example records, bars
        run_exp(leg_config(folder, variant) | {"max_steps": steps}, callbacks=[CountTokens()])
    state = json.loads((folder / "out/trainer_state.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "out/train_results.json").read_text(encoding="utf-8"))
    return Leg(state["global_step"], counts["useful"], counts["padded"], results["train_runtime"])


def print_table(legs: dict[str, list[Leg]]) -> None:
    """Print a row a variant: medians, beside the limit that the paper's padding sets."""
    paper = next(iter(legs))

    def rate(name: str) -> float:
        return statistics.median(leg.useful / leg.seconds for leg in legs[name])

    limit = legs[paper][0].padded / legs[paper][0].useful
    print(
        "\n| batches | steps | useful tokens | padded / useful | useful tokens a second | faster | share of the limit |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, (leg, *_) in legs.items():
        faster = rate(name) / rate(paper)
        share = f"{faster / limit:.2f}" if name != paper else ""
        print(
            f"| {name} | {leg.steps:,} | {leg.useful:,} | {leg.padded / leg.useful:.3f} | {rate(name):,.0f} "
            f"| {faster:.2f}x | {share} |"
        )
    spread = max(max(leg.seconds for leg in runs) / min(leg.seconds for leg in runs) for runs in legs.values())
    print(
        f"\nlimit: {limit:.3f}, the paper's padded / useful tokens; slowest / fastest repetition of a row at most {spread:.2f}"
    )


def main() -> None:
    """Make model and data, run every leg in turn, print the table."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="a folder that `medasst convert` wrote (default: the samples)")
    parser.add_argument("--records", type=int, default=500, help="records a leg (500)")
    parser.add_argument("--repeats", type=int, default=3, help="legs of each kind (3)")
    parser.add_argument("--hidden", type=int, default=256, help="the model's width (256)")
    parser.add_argument("--layers", type=int, default=2, help="the model's layers (2)")
    args = parser.parse_args()
    if args.data_dir and not list(args.data_dir.glob("*_train.jsonl")):
        parser.error(
            f"no *_train.jsonl in {args.data_dir}; `medasst convert --raw-dir RAW --out-dir {args.data_dir}` writes them"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        data_dir = args.data_dir
        if data_dir is None:
            data_dir = folder / "samples"
            words = ["convert", "--raw-dir", SAMPLES / "raw", "--out-dir", data_dir, "--max-rejects", "0.1"]
            subprocess.run([sys.executable, "-m", "medasst_tools.cli", *words], check=True, capture_output=True)
        from medasst_tools.training.tiny_model import build_tiny_model, training_documents

        count = write_dataset(data_dir, folder, args.records)
        documents = list(training_documents(data_dir))
        build_tiny_model(documents, folder / "model", seed=SEED, hidden_size=args.hidden, layers=args.layers)
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("llamafactory", "torch", "transformers"))
        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}; seed {SEED}; "
            f"{count} records of {args.data_dir or 'the samples'}; width {args.hidden}, {args.layers} layers",
            flush=True,
        )
        legs: dict[str, list[Leg]] = {name: [] for name in VARIANTS}
        for repeat in range(args.repeats + 1):
            for variant in (
                VARIANTS if repeat % 2 else reversed(VARIANTS)
            ):  # neither first nor last place is always the same's
                leg = run_leg(folder, variant, -1 if repeat else WARM_UP)
                print(
                    f"{repeat or 'warm-up'}: {variant}: {leg.seconds:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                if repeat:
                    legs[variant].append(leg)
    print_table(legs)


if __name__ == "__main__":
    main()
