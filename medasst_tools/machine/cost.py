"""What a training costs: parameters, arithmetic, memory and disk, by formula, so that `medasst doctor` can say it beforehand.

Notation: L layers of width h with MLPs of width i, v rows of vocabulary, b records of t tokens at once, N weights that multiply
(all but the embedding table), A adapter weights.

Arithmetic. A weight costs a token 2 operations (multiply, add) forward and 2 backward for the gradient of its input; a trained one
2 more for its own gradient, and recomputation (gradient checkpointing, LLaMA-Factory's default) repeats the 2 forward in the layers,
not in the output head. So a frozen layer weight costs 6, the frozen head 4, a trained layer weight 8; without recomputation 4, 4, 6.
Attention's two products are like 2 x t x heads x head_dim trained weights a layer (masked halves are computed too). Without
recomputation a frozen embedding asks for no gradient, so the first layer's q, k, v give none.
tests/test_training_cost.py compares this with torch's FlopCounterMode around LLaMA-Factory's trainings: equal.

Memory. At rest: the weights (2 bytes; in 4 bits 0.516 with double quantization, 0.5625 without, head and embedding stay at 2), and
of each trained weight a float32 copy and two moments (12). Its gradient (4) comes when activations go. On top the larger of:
- the loss: every layer's input, and logits in float32 three times (log-softmax, its gradient, the gradient behind it),
  12 x b x t x v: for Qwen2-7B's 152,064 rows 3.5 GiB at 4 x 512, which decides. liger-kernel never holds the logits.
- one layer's backward pass: every layer's input, and that layer's activations, recomputed.
Without recomputation the layers' inputs are all their activations. LAYER_BYTES were counted over torch's operations on Qwen2 layers of
several widths with a LoRA on every linear layer; the test counts again, on the real shape too, to 3 % of the whole. A CUDA
context and the allocator's gaps come on top (CUDA_OVERHEAD, an assumption until a GPU has been measured); a CPU process has Python
and its libraries (PROCESS_BYTES).

Time. Operations over a rate that a finished run on this hardware reached; there is no other source, and no guess.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medasst_tools.files import PROJECT_ROOT

BASE_MODELS = PROJECT_ROOT / "dataset_info" / "base_models.yaml"
GIB = 1 << 30
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")  # whose layers the formulas below describe

# (per i, per h) and token: while a layer is recomputed and goes backward; kept by a layer without recomputation; on top of
# what is kept while one goes backward.
LAYER_BYTES = {
    "bf16": {"recomputed": (14, 41), "kept": (8, 28), "backward": (6, 20)},
    "fp32": {"recomputed": (24, 37), "kept": (16, 33), "backward": (8, 4)},
}
LOGIT_BYTES = 12
TRAINED_BYTES, GRADIENT_BYTES = 12, 4  # float32: the weight and two moments; the gradient
CUDA_OVERHEAD = 0.75 * GIB
PROCESS_BYTES = 1.2 * GIB
TOKENISED_BYTES = 13  # a token in the datasets library's cache: input_ids int32, attention_mask int8, labels int64

# Dense bfloat16 (float16 where a card has no bfloat16) matrix peaks in TFLOPS, from the makers' data sheets; nvidia-smi's names.
CARD_PEAKS = {
    r"A10": 125, r"A30": 165, r"A40": 149.7, r"A100": 312, r"A800": 312, r"RTX A6000": 154.8, r"L4": 121, r"L20": 119.5, r"L40": 181,
    r"L40S": 362, r"H20": 148, r"H100 PCIe": 756, r"H100(?: 80GB HBM3| SXM5?)": 989, r"H200": 989, r"H800": 989, r"V100": 125,
    r"T4": 65, r"RTX 3090": 71, r"RTX 4090": 165.2, r"RTX 5090": 209.5,
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """What of a config.json decides the cost of a decoder-only model."""

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelShape | None":
        """Return the shape that a config.json describes, None for an architecture that the formulas don't know."""
        try:
            if config["model_type"] not in FAMILIES:
                return None
            return cls(
                family=config["model_type"],
                vocabulary=config["vocab_size"],
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=config["num_attention_heads"],
                kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                tied=config.get("tie_word_embeddings", config["model_type"] == "gemma"),
            )
        except (KeyError, TypeError):
            return None

    def linear_layers(self) -> list[tuple[int, int]]:
        """Return (in, out) of every linear layer of one decoder layer: q, k, v, o, gate, up, down."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, queries),
            (self.hidden, values),
            (self.hidden, values),
            (queries, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def layer_weights(self) -> int:
        """The weights of all decoder layers that multiply: no norms, no biases."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers())

    @property
    def head_weights(self) -> int:
        """The output head, which is the embedding table where they are tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, as a checkpoint has them."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.family == "qwen2" else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.family == "qwen3" else 0)
        tables = self.head_weights * (1 if self.tied else 2)
        return tables + self.layer_weights + self.layers * (biases + norms) + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """The adapter's weights, on every linear layer (lora_target: all)."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linear_layers())


@dataclass(frozen=True)
class Method:
    """What of a train.yaml decides the cost; the defaults are LLaMA-Factory's."""

    lora_rank: int | None = 8  # None: all weights are trained
    batch: int = 1
    cutoff: int = 2048
    recompute: bool = True
    mixed: bool = True  # bf16 or fp16; else float32
    bits: int | None = None
    double_quantization: bool = True
    liger: bool = False
    shards: int = 1  # GPUs over which ZeRO-3 or FSDP spread the weights

    @classmethod
    def from_config(cls, config: dict[str, Any], processes: int = 1) -> "Method":
        """Read a train.yaml; `processes` is how many train together."""
        lora = config.get("finetuning_type", "lora") == "lora"
        stage = zero_settings(config).get("stage")
        return cls(
            lora_rank=config.get("lora_rank", 8) if lora else None,
            batch=config.get("per_device_train_batch_size", 8),
            cutoff=config.get("cutoff_len", 2048),
            recompute=not config.get("disable_gradient_checkpointing", False),
            mixed=bool(config.get("bf16") or config.get("fp16") or config.get("pure_bf16")),
            bits=config.get("quantization_bit"),
            double_quantization=config.get("double_quantization", True),
            liger=bool(config.get("enable_liger_kernel")),
            shards=processes if stage == 3 or config.get("fsdp") else 1,
        )


def zero_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's zero_optimization of a train.yaml, which may hold it or name its file; {} without."""
    deepspeed = config.get("deepspeed")
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            deepspeed = None
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, dict) else None
    return zero if isinstance(zero, dict) else {}


def base_config(model: str, path: Path = BASE_MODELS) -> dict[str, Any] | None:
    """Return what is known of a model id's config.json without the model; None if it isn't in base_models.yaml."""
    known = yaml.safe_load(path.read_text(encoding="utf-8"))
    return next((entry.get("config") for entry in known if model in entry["ids"]), None)


def trained_parameters(shape: ModelShape, method: Method) -> int:
    """Return how many weights learn."""
    return shape.parameters if method.lora_rank is None else shape.lora_parameters(method.lora_rank)


def flops_per_token(shape: ModelShape, method: Method, length: float) -> float:
    """Return the operations that training takes for a token of a sequence of `length`."""
    passes = 8 if method.recompute else 6
    attention = shape.layers * 2 * length * shape.heads * shape.head_dim  # a "weight" that both operands train
    if method.lora_rank is None:
        return passes * (shape.layer_weights + attention) + 6 * shape.head_weights
    frozen = (passes - 2) * shape.layer_weights + 4 * shape.head_weights
    learning = passes * (shape.lora_parameters(method.lora_rank) + attention)
    if method.recompute:
        return frozen + learning
    no_gradient = sum(inputs * outputs + method.lora_rank * inputs for inputs, outputs in shape.linear_layers()[:3])
    return frozen + learning - 2 * no_gradient


def resting_bytes(shape: ModelShape, method: Method) -> float:
    """Return what a device holds between two steps: the weights, and the moments of those that learn."""
    trained = TRAINED_BYTES * trained_parameters(shape, method)
    if method.lora_rank is None:
        return trained / method.shards
    width = 2 if method.mixed else 4
    layers = width * shape.layer_weights
    if method.bits:  # one scale a block of 64: float32, or 8 bits with a second level
        layers = shape.layer_weights * (method.bits / 8 + (1 / 64 if method.double_quantization else 4 / 64))
    return (layers + width * (shape.parameters - shape.layer_weights) + trained) / method.shards


def working_bytes(shape: ModelShape, method: Method, tokens: int) -> float:
    """Return the most that a step takes on top, for `tokens` padded tokens on the device at once."""
    width, bytes_of = (2, LAYER_BYTES["bf16"]) if method.mixed else (4, LAYER_BYTES["fp32"])

    def layer(kind: str) -> float:
        per_i, per_h = bytes_of[kind]
        return tokens * (per_i * shape.intermediate + per_h * shape.hidden)

    kept = shape.layers * (tokens * shape.hidden * width if method.recompute else layer("kept"))
    backward = layer("recomputed" if method.recompute else "backward")
    logits = 0 if method.liger else LOGIT_BYTES * tokens * shape.vocabulary
    unpacked = max(a * b for a, b in shape.linear_layers()) * width if method.bits else 0
    gradients = GRADIENT_BYTES * trained_parameters(shape, method) / method.shards
    return max(kept + max(logits, backward) + unpacked, gradients)


def training_bytes(shape: ModelShape, method: Method, *, gpu: bool) -> float:
    """Return the peak memory of a device (a CPU process) at a batch that is `cutoff` long throughout."""
    overhead = CUDA_OVERHEAD if gpu else PROCESS_BYTES
    return resting_bytes(shape, method) + working_bytes(shape, method, method.batch * method.cutoff) + overhead


def checkpoint_bytes(shape: ModelShape, method: Method) -> int:
    """Return one checkpoint's size: the trained weights (float32) and their two moments."""
    return 12 * trained_parameters(shape, method)


def card_peak(name: str) -> float | None:
    """Return a card's dense bfloat16 matrix peak in operations a second; None for a card that the table hasn't."""
    for pattern, tflops in CARD_PEAKS.items():
        if re.fullmatch(
            rf"(?:NVIDIA |Tesla |GeForce |NVIDIA GeForce )*{pattern}(?:[- ](?:SXM|PCI|NVL|\d+G).*)?", name
        ):
            return tflops * 1e12
    return None


def measured_rates(saves: Path, hardware: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return (run, operations a second, operations a step) of the finished runs in `saves` that ran on this hardware.

    run.json has the useful tokens and the seconds; padding is in the seconds and not in the tokens, so the rate is of useful work.
    """
    rates = []
    for path in sorted(saves.glob("*/run.json")):
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            config, tokens, seconds = run["inputs"]["config"], run["tokens"], run["training_seconds"]
            shape = shape_of(config["model_name_or_path"])
            if shape is None or run["hardware"] != hardware or not (tokens and seconds):
                continue
            method = Method.from_config(config)
            work = tokens * flops_per_token(shape, method, tokens_a_record(tokens, run, config))
            rates.append((path.parent.name, work / seconds, work / run["steps"]))
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            continue  # a run of an earlier version, or of something else
    return rates


def tokens_a_record(tokens: int, run: dict[str, Any], config: dict[str, Any]) -> float:
    """Return a run's mean sequence length: the length at which attention is charged."""
    records = (
        run["steps"] * config.get("per_device_train_batch_size", 8) * config.get("gradient_accumulation_steps", 1)
    )
    return tokens / records


def shape_of(model: str) -> ModelShape | None:
    """Return a local model's shape from its config.json, a known id's from base_models.yaml, else None."""
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else base_config(model)
    except (OSError, ValueError):
        return None
    return ModelShape.from_config(config) if isinstance(config, dict) else None
