"""Peak memory, speed, hours and energy of the 7B experiments on this machine's GPU, with Qwen2-7B's real shape and random weights.

Run: `make bench-gpu`, or `python benchmarks/bench_gpu.py --cpu` for the same code on a CPU with a tiny shape, which says nothing about 7B.

Nothing is downloaded: the weights are random (arithmetic takes as long), the tokenizer is Qwen2's out of a package (else one
trained on the samples), the records are made of the samples' sentences with the lengths of real ones (LENGTHS). LEGS run one
after the other, the most valuable first, each in a process of its own with the memory that its card has and no more: does it
fit? Each row is printed and added to --out as it comes, and no leg begins after --minutes, so that a run that is cut off has
shown something. In training the first steps take records longer than cutoff_len, so that the peak is the worst there is; the
steps after them, of real lengths, are timed.
"""

import argparse
import importlib.util
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
from typing import Any, NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
SEED = 42
GIB = 1 << 30


class Leg(NamedTuple):
    """One row: what is run of an experiment, in how many GiB (a card's as nvidia-smi counts them, less a CUDA context)."""

    name: str
    kind: str  # train, losses, predict or exam
    experiment: str
    limit: float | None = None
    changes: dict[str, Any] = {}


SDPA = {"flash_attn": "sdpa"}
LEGS = [
    Leg("medasst", "train", "medasst", 22.0),
    Leg("medasst_fast", "train", "medasst_fast", 22.0),  # FlashAttention, where its wheel is
    Leg("medasst_fast, SDPA", "train", "medasst_fast", 22.0, SDPA),
    Leg("medasst, loss", "losses", "medasst"),
    Leg("medasst_fast, loss", "losses", "medasst_fast"),
    Leg("medasst, predict", "predict", "medasst", 22.0),
    Leg("medasst, exam", "exam", "medasst", 22.0),
    Leg("medasst_qlora", "train", "medasst_qlora", 11.5),
    Leg("medasst_qlora, predict", "predict", "medasst_qlora", 11.5),
    Leg("medasst_qlora, exam", "exam", "medasst_qlora", 11.5),
    Leg(
        "medasst_fast, SDPA, 8 blocks a step", "train", "medasst_fast", None, SDPA | {"per_device_train_batch_size": 8}
    ),
]
RECORDS, EPOCHS = 1_470_684, 3  # the paper's training
LONG_STEPS, WARM_STEPS, TIMED_STEPS, TIMED_SECONDS = 2, 4, 60, 60.0
COMPARED_STEPS, DIALOGUES_ASKED, NEW_TOKENS, TEST_RECORDS = 20, 256, 256, 8_975
LONG_RECORDS = LONG_STEPS * 4  # a step takes the paper's four records, whatever it is accumulated from
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
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
    """Write the model with random weights, a small one, their tokenizer, and the datasets."""
    from medasst_tools.training.tiny_model import training_documents

    data = folder / "samples"
    words = ["convert", "--raw-dir", SAMPLES / "raw", "--out-dir", data, "--max-rejects", "0.1"]
    subprocess.run([sys.executable, "-m", "medasst_tools.cli", *words], check=True, capture_output=True)
    documents = list(training_documents(data))
    made = make_records(documents, max(records, DIALOGUES_ASKED), LONG_RECORDS)
    info = {}
    for name, chosen in (("bench", made), ("asked", made[LONG_RECORDS:][:DIALOGUES_ASKED])):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl"}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    for name, shape in (("model", config), ("small", config | (SMALL if config["hidden_size"] > 64 else {}))):
        write_tokenizer(folder / name, documents, shape["vocab_size"])
        write_random_model(shape, folder / name, device, {"model": "bfloat16", "small": "float32"}[name])


def write_tokenizer(folder: Path, documents: list[str], vocab_size: int) -> None:
    """Write Qwen2's own tokenizer if its package is here and the model has its rows, else one trained on the samples."""
    from medasst_tools.training.tiny_model import train_tokenizer

    if vocab_size > 150_000 and importlib.util.find_spec("dashscope"):
        sys.path.insert(0, str(ROOT / "tests"))
        import families

        families.FAMILIES["qwen2"].write(folder, False)
    else:
        train_tokenizer(documents, min(4096, vocab_size)).save_pretrained(folder)


def write_random_model(config: dict[str, Any], folder: Path, device: str, dtype: str = "bfloat16") -> None:
    """Write a model's config and random weights in transformers' format, a file a few layers."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    full = AutoConfig.for_model(**config, max_position_embeddings=32768, dtype=dtype)
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
        part[name] = weight.to("cpu", getattr(torch, dtype)).contiguous()
        size += part[name].nbytes
        if size > 2 * GIB:
            flush()
    flush()
    total = {"total_size": sum(path.stat().st_size for path in folder.glob("*.safetensors"))}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": total, "weight_map": index}), encoding="utf-8"
    )


# ---- one leg, in a process of its own --------------------------------------------------------------------------------
def leg_config(leg: Leg, folder: Path, cpu: bool) -> dict[str, Any]:
    """Return the experiment's own train.yaml on the benchmark's model and data; on a CPU without kernels and quantization."""
    config = rendered(leg, "train", folder, cpu) | {
        "dataset_dir": str(folder), "dataset": "bench", "output_dir": str(folder / "out"),
        "overwrite_output_dir": True, "save_strategy": "no", "plot_loss": False, "disable_tqdm": True, "logging_steps": 1000,
        "preprocessing_num_workers": 1, "disable_shuffling": True, "num_train_epochs": 1.0, "warmup_steps": 1,
    }  # fmt: skip
    if cpu:
        config |= {"dataloader_num_workers": 0, "cutoff_len": min(128, config["cutoff_len"]), "optim": "adamw_torch"}
    if leg.kind == "losses":
        config |= {"model_name_or_path": str(folder / "small"), "max_steps": COMPARED_STEPS, "logging_steps": 1}
    return config | leg.changes


def rendered(leg: Leg, kind: str, folder: Path, cpu: bool) -> dict[str, Any]:
    """Return a rendered config of the leg's experiment on the benchmark's model, as it can run on this device."""
    import yaml

    config = yaml.safe_load((ROOT / f"factory_configs/{leg.experiment}/{kind}.yaml").read_text(encoding="utf-8"))
    config["model_name_or_path"] = str(folder / "model")
    if cpu:
        for key in ("enable_liger_kernel", "flash_attn", "quantization_bit", "quantization_method", "quantization_type",
                    "double_quantization", *["bf16"] * (leg.kind != "train")):  # fmt: skip
            config.pop(key, None)
        config |= {"use_cpu": True} if kind != "chat" else {}
    return config


def run_leg(leg: Leg, folder: Path, cpu: bool, steps: int) -> dict[str, Any]:
    """Run a leg and return what was measured; {"problem": ...} if it doesn't fit the card."""
    import torch

    if leg.limit and not cpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, leg.limit * GIB / whole))
    try:
        measured = {"train": train, "losses": losses, "predict": ask, "exam": ask}[leg.kind](leg, folder, cpu, steps)
    except torch.OutOfMemoryError:
        return {"problem": f"out of memory at {leg.limit} GiB"}
    if cpu:
        import resource

        return measured | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return measured | {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def train(leg: Leg, folder: Path, cpu: bool, steps: int) -> dict[str, Any]:
    """Train through LLaMA-Factory and return each step's seconds and tokens, and the card's power in watts."""
    import torch
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    measured: dict[str, Any] = {"useful": [], "padded": [], "seconds": [], "watts": []}

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
            if state.global_step % 10 == 9 and not cpu:  # nvidia-smi's figure is a mean over the second before
                measured["watts"].append(power())
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

    run_exp(leg_config(leg, folder, cpu), callbacks=[Measure()])
    return measured


def power() -> float:
    """Return what the card takes, in watts; nan if nvidia-smi doesn't say."""
    query = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", card_number()]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return float(said) if said.replace(".", "", 1).isdigit() else float("nan")


def card_number() -> str:
    """Return the name of the one card that is measured, as nvidia-smi and CUDA_VISIBLE_DEVICES know it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def losses(leg: Leg, folder: Path, cpu: bool, _steps: int) -> dict[str, Any]:
    """Return the losses of the first steps on a small shape, as the config says, and in float32 on the CPU."""
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    found: list[list[float]] = []

    class Keep(TrainerCallback):
        """Keep the losses."""

        def on_train_end(self, args, state, control, **kwargs):
            found.append([row["loss"] for row in state.log_history if "loss" in row])

    for on_cpu in (cpu, True):
        config = leg_config(leg, folder, on_cpu)
        if on_cpu and not cpu:  # the same records in the same batches
            config["cutoff_len"] = leg_config(leg, folder, False)["cutoff_len"]
        run_exp(config, callbacks=[Keep()])
    return {"losses": found}


def ask(leg: Leg, folder: Path, cpu: bool, _steps: int) -> dict[str, Any]:
    """Let `medasst predict` or `medasst exam` ask the random model, and return its seconds and how many questions."""
    from medasst_tools import cli

    kind = {"predict": "predict", "exam": "chat"}[leg.kind]
    config, out = rendered(leg, kind, folder, cpu), folder / leg.kind
    config.pop("adapter_name_or_path", None)
    if kind == "predict":
        config |= {
            "dataset_dir": str(folder),
            "eval_dataset": "asked",
            "output_dir": str(out),
            "max_new_tokens": NEW_TOKENS,
        }
        config |= {"preprocessing_num_workers": 1} | ({"max_samples": 4, "max_new_tokens": 4} if cpu else {})
    path = folder / f"{leg.kind}_config" / f"{kind}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    words = [str(path), "--anyway"] + (["--exams-dir", str(EXAMS[0]), "--out", str(out)] if kind == "chat" else [])
    began = time.perf_counter()
    if status := cli.main([leg.kind, *words]):
        return {"problem": f"medasst {leg.kind} ended with status {status}"}
    seconds = time.perf_counter() - began
    made = json.loads(
        (out / {"predict": "predictions.json", "exam": "exam.json"}[leg.kind]).read_text(encoding="utf-8")
    )
    return {"whole": seconds, "asked": made["n"], "ties": made.get("ties")}


def missing(leg: Leg, cpu: bool) -> str | None:
    """Say what the experiment lacks here: its config, or a package that it asks for."""
    from medasst_tools.machine import preflight

    path = ROOT / "factory_configs" / leg.experiment / "train.yaml"
    if not path.is_file():
        return f"no {path.relative_to(ROOT)}: `medasst render` writes it if experiments.yaml has {leg.experiment}"
    if cpu:
        return None
    config = rendered(leg, "train", Path(), cpu)
    return next((check.line() for check in preflight.check_extras(config) if check.status == "fail"), None)


# ---- the rows --------------------------------------------------------------------------------------------------------
HEADERS = {
    "train": "records x accumulated x cutoff_len | attention | peak GiB | by formula | seconds a step | useful tokens a second"
    " | padded tokens a second | share of the matrix peak | hours for 1,470,684 x 3 | doctor's hours | kWh",
    "losses": "steps | first and last loss | float32 on the CPU | largest difference",
    "predict": "peak GiB | dialogues | seconds | hours for 8,975 test records",
    "exam": "peak GiB | questions | seconds | ties",
}


def row(leg: Leg, measured: dict[str, Any], shape, peak: float | None, mean_tokens: float, cpu: bool) -> str:
    """Return a leg's row; of a training medians over the timed steps."""
    if "problem" in measured:
        return f"| {leg.name} | {measured['problem']} {'|' * (HEADERS[leg.kind].count('|') + 1)}"
    cells = {"train": train_cells, "losses": loss_cells, "predict": ask_cells, "exam": ask_cells}[leg.kind]
    return f"| {leg.name} | {' | '.join(cells(leg, measured, shape, peak, mean_tokens, cpu))} |"


def train_cells(leg: Leg, measured: dict[str, Any], shape, peak: float | None, mean: float, cpu: bool) -> list[str]:
    """Return the cells of a training."""
    from medasst_tools.machine.cost import flops_per_token, memory_bytes, seconds_of_training

    config = leg_config(leg, Path(), cpu)
    timed = slice(LONG_STEPS + WARM_STEPS, None)
    seconds, useful, padded = (measured[key][timed] for key in ("seconds", "useful", "padded"))
    rate, padded_rate = sum(useful) / sum(seconds), sum(padded) / sum(seconds)
    hours, formula = RECORDS * EPOCHS * mean / rate / 3600, memory_bytes(shape, config)
    doctor = seconds_of_training(shape, config, RECORDS * EPOCHS * mean, peak) if peak else None
    watts = [one for one in measured["watts"] if one == one]
    return [
        f"{config['per_device_train_batch_size']} x {config.get('gradient_accumulation_steps', 1)} x {config['cutoff_len']}",
        measured["attention"],
        f"{measured['peak'] / GIB:.1f}",
        f"{formula / GIB:.1f}" if formula else "unknown",
        f"{statistics.median(seconds):.3f}",
        f"{rate:,.0f}",
        f"{padded_rate:,.0f}",
        f"{padded_rate * flops_per_token(shape, config) / peak:.1%}" if peak else "unknown",
        f"{hours:,.0f}",
        f"{doctor[0] / 3600:,.0f} to {doctor[1] / 3600:,.0f}" if doctor else "unknown",
        f"{statistics.median(watts) * hours / 1000:,.0f}" if watts else "unknown",
    ]


def loss_cells(leg: Leg, measured: dict[str, Any], *_: Any) -> list[str]:
    """Return the cells of a comparison of losses."""
    ours, reference = measured["losses"]
    difference = max(abs(a - b) for a, b in zip(ours, reference, strict=True))
    return [str(len(ours)), *(f"{one[0]:.4f}, {one[-1]:.4f}" for one in (ours, reference)), f"{difference:.4f}"]


def ask_cells(leg: Leg, measured: dict[str, Any], *_: Any) -> list[str]:
    """Return the cells of a prediction or an exam."""
    hours = f"{measured['whole'] / measured['asked'] * TEST_RECORDS / 3600:.1f}, each answer {NEW_TOKENS} tokens"
    last = hours if leg.kind == "predict" else str(measured["ties"])
    return [f"{measured['peak'] / GIB:.1f}", f"{measured['asked']:,}", f"{measured['whole']:.0f}", last]


# ---- all of them -----------------------------------------------------------------------------------------------------
EXAMS = [SAMPLES / "exams"]  # --exams-dir


def main() -> None:
    """Make the inputs, run every leg in a process of its own, print and keep each row as it comes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "ERROR", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("legs", nargs="*", help=f"default: all of {'; '.join(leg.name for leg in LEGS)}")
    parser.add_argument("--cpu", action="store_true", help="the same code on a CPU, with a tiny shape")
    parser.add_argument("--steps", type=int, default=TIMED_STEPS, help=f"timed steps at most ({TIMED_STEPS})")
    parser.add_argument("--minutes", type=float, default=8, help="no leg begins later (8)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench_gpu.md", help="rows are added as they come")
    parser.add_argument("--exams-dir", type=Path, default=EXAMS[0], help="the exams as released (the bundled samples)")
    parser.add_argument("--work-dir", type=Path, help="for 15 GB of weights (default: the system's temporary folder)")
    parser.add_argument("--leg", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    EXAMS[0] = args.exams_dir.resolve()
    if args.leg:
        folder = Path(args.leg[1])
        measured = run_leg(leg_of(args.leg[0]), folder, args.cpu, args.steps)
        (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
        return
    from medasst_tools.machine import hardware
    from medasst_tools.machine.cost import ModelShape, card_peak, known_config

    gpus = [] if args.cpu else hardware.gpus()
    if not args.cpu and not gpus:
        sys.exit("bench_gpu: no NVIDIA GPU here; --cpu runs the same code with a tiny shape")
    config = known_config("Qwen/Qwen2-7B") | (TINY if args.cpu else {})
    shape, peak = ModelShape.from_config(config), card_peak(gpus[0].name) if gpus else None
    began = time.monotonic()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name, args.out.open("a", encoding="utf-8") as kept:
        folder = Path(name)
        if not args.cpu and shutil.disk_usage(folder).free < 2.2 * shape.parameters:
            sys.exit(f"bench_gpu: {folder} has less free than the 15 GB of weights take; give another --work-dir")
        write_inputs(folder, 40 + 8 * args.steps, config, "cpu" if args.cpu else "cuda")
        lengths = token_lengths(folder)
        mean = sum(min(length, 512) for length in lengths) / len(lengths)
        say(f"\n{signature(gpus, shape, mean)}", kept)
        kind = None
        for leg in [leg_of(name) for name in args.legs] or LEGS:
            if leg.kind != kind:
                kind, header = leg.kind, HEADERS[leg.kind]
                say(f"\n| {kind} | {header} |\n|---{'|---:' * (header.count('|') + 1)}|", kept)
            late = "no time was left" if time.monotonic() - began > 60 * args.minutes else None
            problem = late or missing(leg, args.cpu)
            measured = {"problem": problem} if problem else in_a_process(leg, folder, args)
            say(row(leg, measured, shape, peak, mean, args.cpu), kept)
        say(f"\nwhole benchmark {(time.monotonic() - began) / 60:.1f} minutes", kept)


def leg_of(name: str) -> Leg:
    """Return the leg of this name; of an experiment that has none, its training."""
    return next((leg for leg in LEGS if leg.name == name), Leg(name, "train", name))


def say(text: str, kept: TextIO) -> None:
    """Print a text and keep it, on disk when this returns."""
    print(text, flush=True)
    print(text, file=kept, flush=True)


def signature(gpus: list, shape, mean: float) -> str:
    """Return what it takes to believe the rows: card, driver, versions, seed, date."""
    from medasst_tools.machine import hardware

    packages = ("llamafactory", "torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "flash-attn")
    versions = ", ".join(f"{name} {hardware.installed(name)}" for name in packages if hardware.installed(name))
    cpu = f"CPU, {os.cpu_count()} cores, tiny shape: no statement about 7B"
    card = f"{gpus[0].name}, driver {gpus[0].driver}" if gpus else cpu
    return (
        f"{card}; {platform.machine()}, Python {platform.python_version()}, {versions}; seed {SEED}; {time.strftime('%Y-%m-%d')}; "
        f"{shape.parameters:,} parameters; mean {mean:.0f} tokens a record after cutoff_len 512"
    )


def in_a_process(leg: Leg, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one leg in a fresh process, whose memory is then all free again."""
    words = [sys.executable, __file__, "--leg", leg.name, str(folder), "--steps", str(args.steps)]
    words += ["--exams-dir", str(EXAMS[0]), *(["--cpu"] if args.cpu else [])]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "V": "1"}
    if not args.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = card_number()
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
