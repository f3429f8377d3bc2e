"""What a LoRA or QLoRA training costs, by formula: memory of a card, disk, days. Estimates, and printed as such.

Notation: L layers of width h with MLPs of width i, v rows of vocabulary, b records of t tokens at once.

Memory. At rest the weights (2 bytes; in 4 bits about 0.52, head and embedding stay at 2) and of each adapter weight a
float32 copy, two moments and the gradient (16). On top every layer's input (2 x b x t x h a layer) and the larger of the
loss, which holds logits in float32 three times (12 x b x t x v; liger-kernel never holds them), and one layer's backward pass
(b x t x (14 i + 41 h), counted over torch's operations); without recomputation b x t x (8 i + 28 h) stays of every layer.
A CUDA context and the allocator's gaps: CUDA_OVERHEAD. Trainings of all weights and spread ones aren't judged.

Time. A frozen weight costs a token 2 operations forward, 2 backward, and 2 more where layers are recomputed (gradient
checkpointing, LLaMA-Factory's default). What a card reaches of its matrix peak is assumed (REACHED), until one is measured.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medasst_tools.config import read_yaml
from medasst_tools.files import PROJECT_ROOT, read_json

BASE_MODELS = PROJECT_ROOT / "dataset_info" / "base_models.yaml"
GIB = 1 << 30
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma")  # whose layers the formulas describe
CUDA_OVERHEAD = 0.75 * GIB
# Of real text in Qwen2's own tokens, mixed as the paper's corpora: `make bench-lengths`, table in docs/models.md.
PADDED = 1.65  # padded tokens for a useful one at batch 4; packed 1.0
TOKENS_A_RECORD = 177  # useful ones after the cut at 512, until the data is here and the audit counts them
BYTES_A_TOKEN = 3.7  # of a converted file for a useful token, template and system prompt included
REACHED = (0.30, 0.55)  # share of the matrix peak, an assumption

# Dense bfloat16 (float16 where a card has no bfloat16) matrix peaks in TFLOPS, from the makers' data sheets; nvidia-smi's names.
CARD_PEAKS = {
    r"A10": 125, r"A30": 165, r"A40": 149.7, r"A100": 312, r"A800": 312, r"RTX A6000": 154.8, r"L4": 121, r"L20": 119.5, r"L40": 181,
    r"L40S": 362, r"H20": 148, r"H100 PCIe": 756, r"H100(?: 80GB HBM3| SXM5?)": 989, r"H200": 989, r"H800": 989, r"V100": 125,
    r"T4": 65, r"RTX 3090": 71, r"RTX 4090": 165.2, r"RTX 5090": 209.5,
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """What of a config.json decides the cost of a decoder-only model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    queries: int
    values: int
    tied: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelShape | None":
        """Return the shape that a config.json describes, None for an architecture that the formulas don't know."""
        try:
            if config["model_type"] not in FAMILIES:
                return None
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            width = config.get("head_dim") or hidden // heads
            tied = config.get("tie_word_embeddings", config["model_type"] == "gemma")
            kv_heads = config.get("num_key_value_heads") or heads
            layers, intermediate = config["num_hidden_layers"], config["intermediate_size"]
            return cls(config["vocab_size"], hidden, intermediate, layers, heads * width, kv_heads * width, tied)
        except (KeyError, TypeError):
            return None

    def linear_layers(self) -> list[tuple[int, int]]:
        """Return (in, out) of every linear layer of one decoder layer: q, k, v, o, gate, up, down."""
        h, i, q, kv = self.hidden, self.intermediate, self.queries, self.values
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    @property
    def layer_weights(self) -> int:
        """The weights of all decoder layers that multiply."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_layers())

    @property
    def table_weights(self) -> int:
        """The embedding table, and the output head where it is one of its own."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters, to a thousandth: norms and biases are left out."""
        return self.layer_weights + self.table_weights

    def trained_parameters(self, config: dict[str, Any]) -> int:
        """What a training learns: all weights, or a LoRA adapter's on every linear layer (lora_target: all)."""
        if config.get("finetuning_type", "lora") != "lora":
            return self.parameters
        return self.layers * config.get("lora_rank", 8) * sum(map(sum, self.linear_layers()))


def released_model(model: str) -> dict[str, Any]:
    """Return what dataset_info/base_models.yaml has of a hub id, nothing of another."""
    return next((one for one in read_yaml(BASE_MODELS) if model in one["ids"]), {})


def known_config(model: str) -> dict[str, Any] | None:
    """Return a model's config.json: a folder's own, what base_models.yaml has of a hub id, None of another."""
    if (Path(model) / "config.json").is_file():
        return read_json(Path(model) / "config.json")
    return released_model(model).get("config")


def known_shape(model: str) -> ModelShape | None:
    """Return the shape of a folder, or of a hub id that base_models.yaml describes, None of another."""
    return ModelShape.from_config(known_config(model) or {})


def weight_bytes(shape: ModelShape, config: dict[str, Any]) -> float:
    """Return what the weights take: 2 bytes each, the layers of a base in n bits n/8 and a 64th for the scales."""
    bits = config.get("quantization_bit")
    return shape.layer_weights * (bits / 8 + 1 / 64 if bits else 2) + 2 * shape.table_weights


def memory_bytes(shape: ModelShape, config: dict[str, Any]) -> float | None:
    """Return the peak of GPU memory in training (LoRA, QLoRA; None for others) or in use, the weights and a tenth."""
    if not config.get("do_train"):
        return 1.1 * weight_bytes(shape, config) + CUDA_OVERHEAD
    if config.get("finetuning_type", "lora") != "lora" or config.get("deepspeed") or config.get("fsdp"):
        return None
    answers = 2 if config.get("stage") == "dpo" else 1
    tokens = answers * config.get("per_device_train_batch_size", 8) * config.get("cutoff_len", 2048)
    per_layer = 14 * shape.intermediate + 41 * shape.hidden
    kept = shape.layers * 2 * shape.hidden
    if config.get("disable_gradient_checkpointing"):
        kept, per_layer = shape.layers * (8 * shape.intermediate + 28 * shape.hidden), 0
    logits = 0 if config.get("enable_liger_kernel") else 12 * shape.vocabulary
    resting = weight_bytes(shape, config) + 16 * shape.trained_parameters(config)
    return resting + tokens * (kept + max(logits, per_layer)) + CUDA_OVERHEAD


def checkpoint_bytes(shape: ModelShape, config: dict[str, Any]) -> int:
    """Return one checkpoint's size: the trained weights in float32 and their two moments."""
    return 12 * shape.trained_parameters(config)


def flops_per_token(shape: ModelShape, config: dict[str, Any]) -> float:
    """Return the operations that a LoRA training takes for a token, but for attention's and the adapter's own."""
    passes = 4 if config.get("disable_gradient_checkpointing") else 6
    passes += 2 if config.get("stage") == "dpo" else 0  # the reference: the same model without its new adapter
    return passes * shape.layer_weights + 4 * shape.vocabulary * shape.hidden


def seconds_of_training(shape: ModelShape, config: dict[str, Any], tokens: float, peak: float) -> tuple[float, float]:
    """Return the least and the most seconds for `tokens` useful tokens on cards with `peak` operations a second together."""
    padded = tokens * (1.0 if config.get("packing") or config.get("neat_packing") else PADDED)
    work = padded * flops_per_token(shape, config)
    return work / (peak * REACHED[1]), work / (peak * REACHED[0])


def card_peak(name: str) -> float | None:
    """Return a card's dense bfloat16 matrix peak in operations a second; None for a card that the table hasn't."""
    makers, forms = r"(?:NVIDIA |Tesla |GeForce )*", r"(?:[- ](?:SXM|PCI|NVL|\d+G).*)?"
    found = (tflops for card, tflops in CARD_PEAKS.items() if re.fullmatch(makers + card + forms, name))
    return next((tflops * 1e12 for tflops in found), None)
