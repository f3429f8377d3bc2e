"""Peak memory, speed and hours of the 7B experiments on this machine's GPU, with Qwen2-7B's real shape and random weights.

Run: `make bench-gpu`, or `python benchmarks/bench_gpu.py --cpu` for the same code on a CPU with a tiny shape, which says nothing about 7B.

Nothing is downloaded: the weights are random (arithmetic takes as long), the tokenizer is trained on the bundled samples, and the
records are made of the samples' sentences with the lengths of real ones (LENGTHS). Each experiment's own train.yaml runs through LLaMA-Factory in
a process of its own, with the memory that its card has and no more (CARDS): does it fit? The first steps take records longer than
cutoff_len, so that the peak is the worst there is; the steps after them, of real lengths, are timed.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
SEED = 42
GIB = 1 << 30
# experiment: GiB that a process gets, which is the card it is meant for (24, 24, 12 GB as nvidia-smi counts them) less a CUDA context
CARDS = {"medasst": 22.0, "medasst_fast": 22.0, "medasst_qlora": 11.5}
RECORDS, EPOCHS = 1_470_684, 3  # the paper's training
LONG_STEPS, WARM_STEPS, TIMED_STEPS, TIMED_SECONDS = 2, 4, 60, 60.0
LONG_RECORDS = LONG_STEPS * 4  # a step takes the paper's four records, whatever it is accumulated from
TINY = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2}  # fmt: skip
# Characters of questions, answers and whole dialogues at these shares of records: 3,715 single-turn and 685 multi-turn records of real
# text in the corpora's formats; the paper's mixture has a dialogue in nine records.
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
LENGTHS = {
    "question": (6, 14, 22, 36, 57, 89, 110, 188, 255),
    "answer": (2, 46, 69, 99, 136, 198, 288, 657, 6608),
    "dialogue": (272, 453, 513, 608, 707, 822, 904, 1063, 1767),
}
DIALOGUES = 1 / 9


# ---- what is measured ------------------------------------------------------------------------------------------------
def length(kind: str, generator: random.Random) -> int:
    """Draw a length in characters from LENGTHS, linearly between its points."""
    share, points = generator.random(), LENGTHS[kind]
    place = next(at for at in range(1, len(SHARES)) if share <= SHARES[at])
    low, high = SHARES[place - 1], SHARES[place]
    return max(2, round(points[place - 1] + (points[place] - points[place - 1]) * (share - low) / (high - low)))


def make_records(documents: list[str], count: int, long: int) -> list[dict[str, str]]:
    """Return `long` records that cutoff_len cuts, then `count` of real lengths, made of the documents' sentences."""
    sentences = sorted({part + "。" for text in documents for part in text.replace("\n", "").split("。") if part})
    generator = random.Random(SEED)

    def text(characters: int) -> str:
        written = ""
        while len(written) < characters:
            written += generator.choice(sentences)
        return written[:characters]

    records = [{"instruction": text(200), "input": "", "output": text(4000)} for _ in range(long)]
    for _ in range(count):
        question = length("question", generator)
        answer = length("answer", generator)
        if generator.random() < DIALOGUES:
            answer = max(2, length("dialogue", generator) - question)
        records.append({"instruction": text(question), "input": "", "output": text(answer)})
    return records


def write_inputs(folder: Path, records: int, config: dict[str, Any], device: str) -> None:
    """Write the model with random weights, its tokenizer, and the two datasets."""
    from medasst_tools.training.tiny_model import train_tokenizer, training_documents

    data = folder / "samples"
    words = ["convert", "--raw-dir", SAMPLES / "raw", "--out-dir", data, "--max-rejects", "0.1"]
    subprocess.run([sys.executable, "-m", "medasst_tools.cli", *words], check=True, capture_output=True)
    documents = list(training_documents(data))
    tokenizer = train_tokenizer(documents, min(4096, config["vocab_size"]))
    made = make_records(documents, records, LONG_RECORDS)
    (folder / "bench.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in made), encoding="utf-8"
    )
    (folder / "dataset_info.json").write_text(json.dumps({"bench": {"file_name": "bench.jsonl"}}), encoding="utf-8")
    write_random_model(config, folder / "model", device)
    tokenizer.save_pretrained(folder / "model")


def write_random_model(config: dict[str, Any], folder: Path, device: str) -> None:
    """Write a model's config and random bfloat16 weights in transformers' format, a file a few layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    full = AutoConfig.for_model(**config, max_position_embeddings=32768, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(full).state_dict().items()}
    full.architectures = ["Qwen2ForCausalLM"]
    full.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(SEED)
    part: dict[str, Any] = {}
    index: dict[str, str] = {}
    size, place = 0, 0

    def flush() -> None:
        nonlocal part, size, place
        name = f"model-{place:05}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part, size, place = {}, 0, place + 1

    for name, shape in shapes.items():
        if len(shape) == 1:
            weight = torch.ones(shape) if "norm" in name else torch.zeros(shape)
        else:
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        part[name] = weight.to("cpu", torch.bfloat16).contiguous()
        size += part[name].nbytes
        if size > 2 * GIB:
            flush()
    flush()
    total = {"total_size": sum(2 * shape.numel() for shape in shapes.values())}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": total, "weight_map": index}), encoding="utf-8"
    )


# ---- one experiment, in a process of its own -------------------------------------------------------------------------
def leg_config(experiment: str, folder: Path, cpu: bool) -> dict[str, Any]:
    """Return the experiment's own train.yaml on the benchmark's model and data; on a CPU without kernels and quantization."""
    import yaml

    config = yaml.safe_load((ROOT / "factory_configs" / experiment / "train.yaml").read_text(encoding="utf-8"))
    config |= {
        "model_name_or_path": str(folder / "model"), "dataset_dir": str(folder), "dataset": "bench", "output_dir": str(folder / "out"),
        "overwrite_output_dir": True, "save_strategy": "no", "plot_loss": False, "disable_tqdm": True, "logging_steps": 1000,
        "preprocessing_num_workers": 1, "disable_shuffling": True, "num_train_epochs": 1.0, "warmup_steps": 1,
    }  # fmt: skip
    config.pop("tokenized_path", None)
    if cpu:
        config |= {
            "use_cpu": True,
            "dataloader_num_workers": 0,
            "cutoff_len": min(128, config["cutoff_len"]),
        }
        for key in ("enable_liger_kernel", "flash_attn", "quantization_bit", "quantization_method", "quantization_type",
                    "double_quantization"):  # fmt: skip
            config.pop(key, None)
        config["optim"] = "adamw_torch"
    return config


def run_leg(experiment: str, folder: Path, cpu: bool, steps: int, limit: float | None) -> dict[str, Any]:
    """Train through LLaMA-Factory and return what was measured; {"problem": ...} if it doesn't fit the card."""
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    if limit and not cpu:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, limit * GIB / torch.cuda.get_device_properties(0).total_memory)
        )
    measured: dict[str, Any] = {"useful": [], "padded": [], "seconds": []}

    class Measure(TrainerCallback):
        """Time each step, and count the tokens that the model got in it."""

        def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs):
            def count(module, positional, named):
                self.padded += named["input_ids"].numel()
                self.useful += int((named["input_ids"] != processing_class.pad_token_id).sum())

            measured["attention"] = model.config._attn_implementation
            model.register_forward_pre_hook(count, with_kwargs=True)
            self.began = time.perf_counter()

        def on_step_begin(self, args, state, control, **kwargs):
            self.useful = self.padded = 0
            self.mark = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if not cpu:
                torch.cuda.synchronize()
            measured["seconds"].append(time.perf_counter() - self.mark)
            measured["useful"].append(self.useful)
            measured["padded"].append(self.padded)
            timed = state.global_step - LONG_STEPS - WARM_STEPS
            if timed >= steps or (timed > 5 and time.perf_counter() - self.began > TIMED_SECONDS):
                control.should_training_stop = True

    try:
        run_exp(leg_config(experiment, folder, cpu), callbacks=[Measure()])
    except torch.OutOfMemoryError:
        return {"problem": f"out of memory at {limit} GiB"}
    if cpu:
        import resource

        measured["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    else:
        measured["peak"], measured["reserved"] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return measured


def missing(experiment: str, cpu: bool) -> str | None:
    """Say what the experiment lacks here: its config, or a package that it asks for."""
    import yaml

    from medasst_tools.machine import preflight

    path = ROOT / "factory_configs" / experiment / "train.yaml"
    if not path.is_file():
        return f"no {path.relative_to(ROOT)}: `medasst render` writes it if experiments.yaml has {experiment}"
    if cpu:
        return None
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return next((check.line() for check in preflight.check_extras(config) if check.status == "fail"), None)


# ---- the table -------------------------------------------------------------------------------------------------------
def row(experiment: str, measured: dict[str, Any], shape, peak: float | None, mean_tokens: float, cpu: bool) -> str:
    """Return an experiment's row: medians over the timed steps."""
    from medasst_tools.machine.cost import flops_per_token, memory_bytes

    if "problem" in measured:
        return f"| {experiment} | {measured['problem']} |  |  |  |  |  |  |"
    config = leg_config(experiment, Path(), cpu)
    timed = slice(LONG_STEPS + WARM_STEPS, None)
    seconds, useful, padded = (measured[key][timed] for key in ("seconds", "useful", "padded"))
    rate = sum(useful) / sum(seconds)
    share = f"{sum(padded) * flops_per_token(shape, config) / sum(seconds) / peak:.1%}" if peak else "unknown"
    hours = RECORDS * EPOCHS * mean_tokens / rate / 3600
    size = f"{config['per_device_train_batch_size']} x {config.get('gradient_accumulation_steps', 1)} x {config['cutoff_len']}"
    formula = memory_bytes(shape, config)
    return (
        f"| {experiment} | {size} | {measured['peak'] / GIB:.1f} | {f'{formula / GIB:.1f}' if formula else 'unknown'} "
        f"| {statistics.median(seconds):.3f} | {rate:,.0f} | {share} | {hours:,.0f} |"
    )


def main() -> None:
    """Make the inputs, run every experiment in a process of its own, print the table."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", default=list(CARDS), help=f"default: {' '.join(CARDS)}")
    parser.add_argument("--cpu", action="store_true", help="the same code on a CPU, with a tiny shape")
    parser.add_argument("--steps", type=int, default=TIMED_STEPS, help=f"timed steps at most ({TIMED_STEPS})")
    parser.add_argument("--work-dir", type=Path, help="for 15 GB of weights (default: the system's temporary folder)")
    parser.add_argument("--leg", nargs=2, metavar=("EXPERIMENT", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.leg:
        experiment, folder = args.leg[0], Path(args.leg[1])
        measured = run_leg(experiment, folder, args.cpu, args.steps, CARDS.get(experiment))
        (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
        return
    from medasst_tools.machine import hardware as machine
    from medasst_tools.machine.cost import ModelShape, card_peak, known_config

    gpus = [] if args.cpu else machine.gpus()
    if not args.cpu and not gpus:
        sys.exit("bench_gpu: no NVIDIA GPU here; --cpu runs the same code with a tiny shape")
    config = known_config("Qwen/Qwen2-7B") | (TINY if args.cpu else {})
    shape = ModelShape.from_config(config)
    card = (
        f"{gpus[0].name}, driver {gpus[0].driver}"
        if gpus
        else f"CPU, {os.cpu_count()} cores, tiny shape: no statement about 7B"
    )
    packages = ("llamafactory", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "flash-attn")
    versions = ", ".join(f"{name} {machine.installed(name)}" for name in packages if machine.installed(name))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        folder = Path(name)
        if not args.cpu and shutil.disk_usage(folder).free < 2.2 * shape.parameters:
            sys.exit(f"bench_gpu: {folder} has less free than the 15 GB of weights take; give another --work-dir")
        write_inputs(folder, 40 + 8 * args.steps, config, "cpu" if args.cpu else "cuda")
        rows = {}
        for experiment in args.experiments:
            problem = missing(experiment, args.cpu)
            rows[experiment] = {"problem": problem} if problem else in_a_process(experiment, folder, args)
            print(
                f"{experiment}: {problem or 'done'} after {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        lengths = token_lengths(folder)
    mean = sum(min(length, 512) for length in lengths) / len(lengths)
    print(f"{card}; {platform.machine()}, Python {platform.python_version()}, {versions}; seed {SEED}\n")
    print(
        "| experiment | records x accumulated x cutoff_len | peak GiB | by formula | seconds a step | useful tokens a second | share of the matrix peak | hours for 1,470,684 x 3 |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    peak = card_peak(gpus[0].name) if gpus else None
    for experiment, measured in rows.items():
        print(row(experiment, measured, shape, peak, mean, args.cpu))
    print(
        f"\n{shape.parameters:,} parameters; mean {mean:.0f} tokens a record after cutoff_len 512; whole benchmark "
        f"{(time.monotonic() - began) / 60:.1f} minutes"
    )


def in_a_process(experiment: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one leg in a fresh process, whose memory is then all free again."""
    words = [
        sys.executable,
        __file__,
        "--leg",
        experiment,
        str(folder),
        "--steps",
        str(args.steps),
        *(["--cpu"] if args.cpu else []),
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    if not args.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    (folder / "measured.json").unlink(missing_ok=True)
    with (folder / "log").open("w") as log:
        status = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status or not (folder / "measured.json").is_file():
        lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"problem": f"ended with status {status}: {lines[-1] if lines else ''}"}
    return json.loads((folder / "measured.json").read_text(encoding="utf-8"))


def token_lengths(folder: Path) -> list[int]:
    """Return the tokens of each record of real length, as LLaMA-Factory makes them."""
    from medasst_tools.data.token_lengths import load_encoder, read_config

    encode = load_encoder(str(folder / "model"), read_config(ROOT / "factory_configs/medasst/train.yaml"))
    lines = (folder / "bench.jsonl").read_text(encoding="utf-8").splitlines()[LONG_RECORDS:]
    return [sum(len(a) + len(b) for a, b in encode(json.loads(line))) for line in lines]


if __name__ == "__main__":
    main()
