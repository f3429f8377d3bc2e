"""What stops a LLaMA-Factory config on this machine, in seconds, before anything long starts.

Verbs call `require(config, args)`; `medasst doctor` prints the same checks. Each finding is one line that names what is and
the next step. An estimate only warns, what can't be known stops nothing, and `--anyway` goes past the rest.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medasst_tools.errors import UserError
from medasst_tools.language import said
from medasst_tools.machine import cost, hardware
from medasst_tools.machine.cost import GIB, ModelShape
from medasst_tools.machine.hub import Check, locate

# package: (what it is for, its name in `make setup EXTRAS=`, whether a config needs it)
EXTRAS = {
    "deepspeed": ("ZeRO over many GPUs", "distributed", lambda config: bool(config.get("deepspeed"))),
    "bitsandbytes": ("4-bit bases (QLoRA), 8-bit optimizers", "qlora", lambda config: _needs_bitsandbytes(config)),
    "liger-kernel": ("fused kernels", "gpu", lambda config: bool(config.get("enable_liger_kernel"))),
}
NEED_A_GPU = ("quantization_bit", "deepspeed", "bf16", "fp16", "pure_bf16", "bf16_full_eval", "fp16_full_eval")


def add_config_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the rendered config of that kind, what goes over its settings, and the option that goes past every refusal."""
    parser.add_argument("config", type=Path, help=f"factory_configs/<experiment>/{kind}.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for LLaMA-Factory, over what the file says")
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option that goes past every refusal."""
    parser.add_argument("--anyway", action="store_true", help="warn of what the checks find, and go on")


def require(config: dict[str, Any], args: argparse.Namespace | None = None) -> None:
    """Raise UserError with one line if something will stop this config; print what is only doubtful."""
    for check in checks(config):
        if check.status == "fail" and not (args is not None and args.anyway):
            raise UserError(f"{check.line()}; --anyway goes on all the same")
        if check.status in ("warn", "fail"):
            print(said(f"warning: {check.line()}"))


def checks(config: dict[str, Any], in_use: dict[str, Any] | None = None) -> Iterator[Check]:
    """Yield the findings about a train, predict, chat or export config, the cheap ones first.

    in_use: the config that the trained model is then used with, for a finding about its memory too.
    """
    yield from check_extras(config)
    cards = hardware.gpus()
    yield check_device(config, cards)
    found, download = locate(config["model_name_or_path"], config.get("model_revision"))
    yield found
    shape = cost.known_shape(config["model_name_or_path"])
    yield check_memory(config, shape, cards)
    if in_use:
        yield check_memory(in_use, shape, cards)
    yield check_disk(config, shape, download)


def _needs_bitsandbytes(config: dict[str, Any]) -> bool:
    quantized = config.get("quantization_bit") and config.get("quantization_method", "bnb") in ("bnb", "bitsandbytes")
    return bool(quantized) or any(word in str(config.get("optim", "")) for word in ("8bit", "paged"))


def check_extras(config: dict[str, Any]) -> Iterator[Check]:
    """Yield a finding for each optional package that the config asks for and that isn't installed."""
    for package, (purpose, extra, needed) in EXTRAS.items():
        if needed(config) and not hardware.installed(package):
            missing = f"{package} isn't installed, and this config needs it ({purpose})"
            yield Check("fail", package, missing, f"`make setup EXTRAS={extra}`")
    if config.get("flash_attn") == "fa2" and not hardware.installed("flash-attn"):
        yield Check("warn", "flash-attn", "flash-attn isn't installed: LLaMA-Factory takes PyTorch's attention")


def on_cpu(config: dict[str, Any]) -> bool:
    """Say whether the config, or the environment, keeps the work on the CPU."""
    return bool(config.get("use_cpu")) or os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu"


def check_device(config: dict[str, Any], cards: list[hardware.Gpu]) -> Check:
    """Say whether there is the device that the config runs on."""
    if cards and not on_cpu(config):
        if problem := hardware.driver_problem(cards[0].driver):
            return Check("fail", "device", f"{cards[0].name} can't be used", problem)
        names = ", ".join(sorted({f"{card.name} {gib(card.memory)}" for card in cards}))
        return Check("ok", "device", f"{len(cards)} x {names}, driver {cards[0].driver}")
    setting = None if on_cpu(config) else next((key for key in NEED_A_GPU if config.get(key)), None)
    if setting is None:
        return Check("ok", "device", f"the CPU, {os.cpu_count()} cores")
    step = "run it on a machine with an NVIDIA GPU and driver; `make train EXPERIMENT=demo` needs none"
    value = "..." if isinstance(config[setting], dict) else str(config[setting]).lower()
    return Check("fail", "device", f"no GPU here, and {setting}: {value} needs one", step)


def check_memory(config: dict[str, Any], shape: ModelShape | None, cards: list[hardware.Gpu]) -> Check:
    """Compare the formula's peak with the smallest card; an estimate, so too little only warns."""
    if on_cpu(config) or not cards or config.get("export_dir"):
        return Check("unknown", "memory", "judged on GPUs only")
    need = cost.memory_bytes(shape, config) if shape else None
    if need is None:
        return Check("unknown", "memory", "judged for LoRA and QLoRA on one card only")
    have, purpose = min(card.memory for card in cards), "training" if config.get("do_train") else "use"
    text = f"about {gib(need)} of GPU memory needed in {purpose} (estimated), {gib(have)} there"
    step = "lower per_device_train_batch_size or cutoff_len, or use medasst_qlora"
    return Check("ok", "memory", text) if need <= have else Check("warn", "memory", text, step)


def check_disk(config: dict[str, Any], shape: ModelShape | None, download: bool) -> Check:
    """Compare what the run writes with the free space where it writes it."""
    if shape is None:
        return Check("unknown", "disk", "the model's shape isn't known, so neither is what it writes")
    place = Path(str(config.get("output_dir") or config.get("export_dir") or "."))
    need = 2.0 * shape.parameters * (bool(config.get("export_dir")) + download)
    if config.get("do_train"):
        need += ((config.get("save_total_limit") or 2) + 1.5) * cost.checkpoint_bytes(shape, config)
    have = hardware.free_disk(place)
    text = f"about {gib(need)} to write, {gib(have)} free at {place}"
    step = "make room, or set HF_HOME, MODELSCOPE_CACHE or output_dir to another disk"
    return Check("ok", "disk", text) if need <= have else Check("fail", "disk", text, step)


def gib(size: float) -> str:
    """Return bytes as people read them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"
