"""What stops a LLaMA-Factory config on this machine, in seconds, before anything long starts.

`medasst train` calls `require(config)`; `medasst doctor` prints the same checks. Each finding is one line that names what is and
the next step. What can't be known is unknown and stops nothing.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.errors import UserError
from medasst_tools.files import read_json
from medasst_tools.machine import cost as training_cost
from medasst_tools.machine import hardware as machine
from medasst_tools.machine.cost import GIB, Method, ModelShape
from medasst_tools.machine.hub import Located, locate

ROOM_FOR_ERROR = 0.1  # the memory formula's own uncertainty: nearer than that is a warning
TOKENIZER_BYTES = 16 << 20  # beside each checkpoint
CPU_ACCELERATOR = "cpu"

# package: (what it is for, whether a config needs it). The package names are those that LLaMA-Factory checks for.
EXTRAS = {
    "deepspeed": ("ZeRO over many GPUs", lambda config: bool(config.get("deepspeed"))),
    "bitsandbytes": ("4-bit bases (QLoRA), 8-bit optimizers", lambda config: _needs_bitsandbytes(config)),
    "liger-kernel": ("fused kernels", lambda config: bool(config.get("enable_liger_kernel"))),
    "flash-attn": ("FlashAttention-2; without it PyTorch's own attention", lambda config: config.get("flash_attn") == "fa2"),
    "vllm": ("fast generation on a GPU", lambda config: config.get("infer_backend") == "vllm"),
}  # fmt: skip
SETUP_EXTRAS = {"deepspeed": "distributed", "bitsandbytes": "qlora", "liger-kernel": "gpu"}  # pyproject.toml's names
OPTIONAL = {"flash-attn"}  # LLaMA-Factory goes on without it, with a warning


class Check(NamedTuple):
    """One finding. status: ok, warn, fail or unknown; a fail says the next step."""

    status: str
    what: str
    detail: str
    step: str = ""

    def line(self) -> str:
        """Return the finding as one line."""
        return f"{self.detail}; {self.step}" if self.step else self.detail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that goes past every refusal."""
    parser.add_argument("--anyway", action="store_true", help="warn of what the checks find, and go on")


def require(config: dict[str, Any], args: argparse.Namespace | None = None) -> None:
    """Raise UserError with one line if something will stop this config; print what is only doubtful."""
    failed = []
    for check in checks(config):
        if check.status == "fail":
            failed.append(check)
            break  # the later ones ask more, and cost more
        if check.status == "warn" or (check.status, check.what) == ("unknown", "model"):
            print(f"warning: {check.line()}")
    if failed and args is not None and args.anyway:
        print(f"warning: {failed[0].line()}; going on, as told")
    elif failed:
        raise UserError(failed[0].line())


def checks(config: dict[str, Any]) -> Iterator[Check]:
    """Yield the findings about a train, predict, chat or export config, the cheap ones first."""
    yield from check_extras(config)
    gpus = machine.gpus()
    yield check_device(config, gpus)
    yield from check_adapters(config)
    located = locate(config["model_name_or_path"], config.get("model_revision"))
    yield Check(located.status, "model", located.detail, located.step)
    shape = shape_of(config, located)
    yield check_memory(config, shape, gpus)
    yield check_disk(config, shape, located)


def shape_of(config: dict[str, Any], located: Located) -> ModelShape | None:
    """Return the base's shape: from its own config.json, else from base_models.yaml."""
    known = located.config or training_cost.base_config(config["model_name_or_path"])
    return ModelShape.from_config(known) if known else None


def _needs_bitsandbytes(config: dict[str, Any]) -> bool:
    quantized = config.get("quantization_bit") and config.get("quantization_method", "bnb") in ("bnb", "bitsandbytes")
    return bool(quantized) or "8bit" in str(config.get("optim", "")) or "paged" in str(config.get("optim", ""))


def check_extras(config: dict[str, Any]) -> Iterator[Check]:
    """Yield a finding for each optional package that the config asks for."""
    for package, (purpose, needed) in EXTRAS.items():
        if not needed(config):
            continue
        version = machine.installed(package)
        if version:
            yield Check("ok", package, f"{package} {version}")
        elif package in OPTIONAL:
            yield Check(
                "warn",
                package,
                f"{package} isn't installed ({purpose})",
                f"`{install(package)}` makes it faster",
            )
        else:
            yield Check(
                "fail",
                package,
                f"{package} isn't installed, and this config needs it ({purpose})",
                f"`{install(package)}`",
            )


def install(package: str) -> str:
    """Return the command that installs an optional package."""
    if package in SETUP_EXTRAS:
        return f"make setup EXTRAS={SETUP_EXTRAS[package]}"
    return f".venv/bin/uv pip install --constraint constraints.txt {package}"


def on_cpu(config: dict[str, Any]) -> bool:
    """Say whether the config, or the environment, keeps the work on the CPU."""
    return bool(config.get("use_cpu")) or os.environ.get("ACCELERATE_TORCH_DEVICE") == CPU_ACCELERATOR


def needs_gpu(config: dict[str, Any]) -> str | None:
    """Return the setting for which the config can't run on a CPU, None if it can."""
    if on_cpu(config):
        return None
    asked = ("quantization_bit", "deepspeed", "bf16", "fp16", "pure_bf16", "bf16_full_eval", "fp16_full_eval")
    return next((key for key in asked if config.get(key)), None)


def check_device(config: dict[str, Any], gpus: list[machine.Gpu]) -> Check:
    """Say whether there is the device that the config runs on."""
    setting = needs_gpu(config)
    if gpus and not on_cpu(config):
        problem = machine.driver_problem(gpus[0].driver, machine.torch_build()[1])
        if problem:
            return Check("fail", "device", f"{gpus[0].name} can't be used", problem)
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        return Check("ok", "device", f"{len(gpus)} x {names}, driver {gpus[0].driver}")
    if setting is None:
        return Check("ok", "device", f"the CPU, {os.cpu_count()} cores")
    if other := next((path for path in machine.OTHER_ACCELERATORS if Path(path).exists()), None):
        return Check("unknown", "device", f"no NVIDIA GPU, but {other}: another accelerator is not judged here")
    step = "run it on a machine with an NVIDIA GPU and driver; `make train EXPERIMENT=demo` needs none"
    return Check("fail", "device", f"no GPU here, and {setting}: {_short(config[setting])} needs one", step)


def _short(value: Any) -> str:
    return "..." if isinstance(value, dict) else str(value).lower()


def check_adapters(config: dict[str, Any]) -> Iterator[Check]:
    """Yield a finding for each local adapter that the config loads."""
    for adapter in filter(None, str(config.get("adapter_name_or_path") or "").split(",")):
        folder = Path(adapter.strip())
        whole = (folder / "adapter_config.json").is_file() and [*folder.glob("adapter_model.*")]
        if whole or not adapter.startswith("saves/"):
            continue
        yield Check(
            "fail", "adapter", f"no trained adapter in {adapter}", f"`make train EXPERIMENT={folder.name}` makes it"
        )


def processes(gpus: list[machine.Gpu]) -> int:
    """Return how many processes train together, as far as the environment and the cards here say."""
    per_node = os.environ.get("NPROC_PER_NODE", "")
    nodes = os.environ.get("NNODES", "")
    return (int(nodes) if nodes.isdecimal() else 1) * (int(per_node) if per_node.isdecimal() else max(1, len(gpus)))


def memory_needed(config: dict[str, Any], shape: ModelShape, *, gpu: bool, together: int = 1) -> float:
    """Return the peak bytes of one process: training by formula; use is the weights and a tenth."""
    if config.get("do_train"):
        return training_cost.training_bytes(shape, Method.from_config(config, together), gpu=gpu)
    overhead = training_cost.CUDA_OVERHEAD if gpu else training_cost.PROCESS_BYTES
    return 1.1 * 2 * shape.parameters + overhead


def check_memory(config: dict[str, Any], shape: ModelShape | None, gpus: list[machine.Gpu]) -> Check:
    """Compare the formula's peak with the smallest card, or with the memory that is free."""
    if shape is None:
        return Check("unknown", "memory", "the model's shape isn't known, so neither is the memory it takes")
    if any(key.startswith("offload") for key in training_cost.zero_settings(config)):
        return Check("unknown", "memory", "DeepSpeed offloads to the CPU: the formula doesn't cover that")
    gpu = not on_cpu(config) and config.get("export_device") != "cpu" and (bool(gpus) or needs_gpu(config) is not None)
    need = memory_needed(config, shape, gpu=gpu, together=processes(gpus))
    where = "GPU memory" if gpu else "memory"
    if gpu and not gpus:
        return Check("unknown", "memory", f"about {_gib(need)} of GPU memory are needed")
    have = min(card.memory for card in gpus) if gpu else machine.available_memory()
    text = f"about {_gib(need)} of {where} needed, {_gib(have)} there"
    if need * (1 - ROOM_FOR_ERROR) > have:
        if not config.get("do_train"):
            return Check("fail", "memory", text, "use a larger card or machine, or a smaller base")
        step = "lower per_device_train_batch_size or cutoff_len" + (", or use medasst_qlora" if gpu else "")
        return Check("fail", "memory", text, step)
    if need > have:
        return Check("warn", "memory", text, "it may just fit, or not")
    return Check("ok", "memory", text)


def check_disk(config: dict[str, Any], shape: ModelShape | None, located: Located) -> Check:
    """Compare what the run writes with the free space, on each file system that it writes to."""
    needs: dict[Path, float] = {}
    if shape is not None:
        if located.download:
            needs[hub_cache()] = 2.0 * shape.parameters
        if config.get("do_train") and config.get("output_dir"):
            method = Method.from_config(config)
            kept = (config.get("save_total_limit") or 2) + 1  # the oldest goes when the newest is there
            one = training_cost.checkpoint_bytes(shape, method) + TOKENIZER_BYTES
            needs[Path(config["output_dir"])] = kept * one + 4.0 * training_cost.trained_parameters(shape, method)
        if config.get("export_dir"):
            needs[Path(config["export_dir"])] = 2.0 * shape.parameters
    if config.get("do_train") and (data := dataset_bytes(config)):
        cache, counted = datasets_cache(), training_tokens(config)
        # once as it is read, once as it is laid out, and the tokens: at most a token a byte
        needs[cache] = (
            needs.get(cache, 0) + 2 * data + training_cost.TOKENISED_BYTES * (counted.tokens if counted else data)
        )
    if not needs:
        return Check("unknown", "disk", "the model's shape isn't known, so neither is what it writes")
    for path, need, have in _by_file_system(needs):
        if need > have:
            return Check(
                "fail",
                "disk",
                f"about {_gib(need)} to write at {path}, {_gib(have)} free",
                "make room, or set HF_HOME, MODELSCOPE_CACHE or output_dir to another disk",
            )
    total = sum(needs.values())
    return Check(
        "ok",
        "disk",
        f"about {_gib(total)} at most to write, {_gib(min(machine.free_disk(path) for path in needs))} free",
    )


def _by_file_system(needs: dict[Path, float]) -> Iterator[tuple[Path, float, int]]:
    """Yield (a path, bytes needed, bytes free) for each file system."""
    together: dict[int, list] = {}
    for path, need in needs.items():
        there = path.absolute()
        while not there.exists():
            there = there.parent
        entry = together.setdefault(there.stat().st_dev, [path, 0.0])
        entry[1] += need
    for path, need in together.values():
        yield path, need, machine.free_disk(path)


def hub_cache() -> Path:
    """Return where the hub in use downloads to."""
    from medasst_tools.machine.hub import _modelscope_config, use_modelscope

    if use_modelscope():
        return _modelscope_config().cache_dir
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def datasets_cache() -> Path:
    """Return where the datasets library keeps what it read and tokenised."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface"
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets").expanduser()


def dataset_files(config: dict[str, Any]) -> list[Path]:
    """Return the training files by the usual naming; those that aren't there are left out."""
    folder = Path(config.get("dataset_dir") or "data")
    names = [name.strip() for name in str(config.get("dataset") or "").split(",") if name.strip()]
    return [path for name in names if (path := folder / f"{name}.jsonl").is_file()]


def dataset_bytes(config: dict[str, Any]) -> int:
    """Return the size of the training files."""
    return sum(path.stat().st_size for path in dataset_files(config))


class Tokens(NamedTuple):
    """The training data in tokens after cutoff_len. exact: counted with a tokenizer by `medasst audit`, else an upper bound."""

    records: int
    tokens: float
    exact: bool


def training_tokens(config: dict[str, Any]) -> Tokens | None:
    """Return the records and tokens of the training data from the converted folder's own notes; None without them."""
    folder, cutoff = Path(config.get("dataset_dir") or "data"), config.get("cutoff_len", 2048)
    names = [name.strip() for name in str(config.get("dataset") or "").split(",") if name.strip()]
    manifest = (read_json(folder / "manifest.json") or {}).get("datasets", {})
    audited = (read_json(folder / "audit.json") or {}).get("datasets", {})
    if not names or any(name not in manifest for name in names):
        return None
    records, tokens, exact = 0, 0.0, True
    for name in names:
        count = manifest[name]["kept"]
        counted = audited.get(name, {}).get("tokens", {}).get("mean")
        if counted is not None and audited[name]["n"] == count:
            tokens += count * min(counted, cutoff)
        else:  # a byte-level tokenizer makes no more tokens than there are bytes
            tokens += min(manifest[name]["bytes"], count * cutoff)
            exact = False
        records += count
    return Tokens(records, tokens, exact)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"
