"""The formulas of medasst doctor: released models' sizes, the paper's training on its card, 4 bits in use, days as a range."""

import pytest
from conftest import ROOT

from medasst_tools.config import load, read_yaml
from medasst_tools.machine import cost

GIB = cost.GIB
# of the models' pages, in millions
PARAMETERS = {
    "Qwen/Qwen2-7B": 7616,
    "google/gemma-7b-it": 8538,
    "mistralai/Mistral-7B-v0.1": 7242,
    "Qwen/Qwen3-4B-Base": 4022,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters(model):
    assert cost.known_shape(model).parameters / 1e6 == pytest.approx(PARAMETERS[model], rel=0.002)


def config_of(experiment: str, kind: str) -> dict:
    return load(ROOT / f"factory_configs/{experiment}/{kind}.yaml", kind=kind)


@pytest.mark.parametrize(
    ("experiment", "kind", "least", "most"),
    [
        ("medasst", "train", 17, 22.4),  # the paper's, on 24 GB
        ("medasst_fast", "train", 16, 22.4),
        ("medasst_qlora", "train", 6, 12),
        ("medasst_qlora", "predict", 5, 8),  # the base in 4 bits, in use too
        ("medasst_qlora", "chat", 5, 8),
        ("medasst", "predict", 15, 18),
        ("gemma_7b", "train", 19, 22.5),  # 2 x 2
        ("medasst_zero3", "train", None, None),
        ("demo_base", "train", None, None),
    ],
)
def test_memory(experiment, kind, least, most):
    config = config_of(experiment, kind)
    shape = cost.known_shape(config["model_name_or_path"]) or cost.known_shape("Qwen/Qwen2-7B")
    need = cost.memory_bytes(shape, config)
    assert need is None if least is None else least < need / GIB < most


def test_days_on_the_papers_card():
    """0.78 billion useful tokens for three epochs; independent estimates: 8 to 16 days as the paper trains, 5 to 6 packed."""
    shape, peak = cost.known_shape("Qwen/Qwen2-7B"), cost.card_peak("NVIDIA A10")
    least, most = (s / 86400 for s in cost.seconds_of_training(shape, config_of("medasst", "train"), 0.78e9, peak))
    assert 7 < least < 9 and 14 < most < 17
    least, most = (
        s / 86400 for s in cost.seconds_of_training(shape, config_of("medasst_fast", "train"), 0.78e9, peak)
    )
    assert 3 < least < 5.5 < most < 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A10", 125e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("Tesla T4", 65e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A10G", None), ("x", None)],
)  # fmt: skip
def test_peaks_of_cards(name, peak):
    assert cost.card_peak(name) == peak


def test_every_known_base_has_a_shape():
    assert all(
        cost.ModelShape.from_config(entry["config"]) for entry in read_yaml(cost.BASE_MODELS) if entry.get("config")
    )


SMALL = cost.ModelShape(vocabulary=100, hidden=8, intermediate=16, layers=2, queries=8, values=4, tied=False)
TRAINING = {"do_train": True, "per_device_train_batch_size": 2, "cutoff_len": 3}


@pytest.mark.parametrize(
    ("config", "memory", "operations"),
    [
        # weights 2 x 1,152 + 2 x 1,600; adapter 16 x 2,048; 6 tokens x (inputs 32 + logits 1,200)
        (TRAINING, 5504 + 32768 + 6 * (32 + 1200), 6 * 1152 + 3200),
        # LLaMA-Factory's own batch and cutoff_len
        ({"do_train": True}, 5504 + 32768 + 8 * 2048 * (32 + 1200), 6 * 1152 + 3200),
        (TRAINING | {"lora_rank": 4}, 5504 + 16384 + 6 * (32 + 1200), 6 * 1152 + 3200),
        (TRAINING | {"enable_liger_kernel": True}, 5504 + 32768 + 6 * (32 + 552), 6 * 1152 + 3200),
        (TRAINING | {"disable_gradient_checkpointing": True}, 5504 + 32768 + 6 * (704 + 1200), 4 * 1152 + 3200),
        (TRAINING | {"disable_gradient_checkpointing": True, "enable_liger_kernel": True}, 5504 + 32768 + 6 * 704, 4 * 1152 + 3200),
        (TRAINING | {"stage": "dpo"}, 5504 + 32768 + 12 * (32 + 1200), 8 * 1152 + 3200),
        (TRAINING | {"quantization_bit": 4}, 594 + 3200 + 32768 + 6 * (32 + 1200), 6 * 1152 + 3200),
        ({"quantization_bit": 8}, 1.1 * (1170 + 3200), 6 * 1152 + 3200),
        ({}, 1.1 * 5504, 6 * 1152 + 3200),
    ],
)  # fmt: skip
def test_the_formulas_by_hand(config, memory, operations):
    assert cost.memory_bytes(SMALL, config) - cost.CUDA_OVERHEAD == pytest.approx(memory)
    assert cost.flops_per_token(SMALL, config) == operations


def test_sizes_by_hand():
    assert SMALL.parameters == 1152 + 1600 and SMALL.trained_parameters({"finetuning_type": "full"}) == 2752
    assert cost.checkpoint_bytes(SMALL, {}) == 12 * 2 * 8 * 128 and cost.CUDA_OVERHEAD == 0.75 * 2**30


@pytest.mark.parametrize(("packed", "padding"), [({}, 1.65), ({"packing": True}, 1), ({"neat_packing": True}, 1)])
def test_time_by_hand(packed, padding):
    """As many operations for 1,000 tokens as the card reaches in a second at its best and at its worst."""
    operations = 1000 * padding * cost.flops_per_token(SMALL, {})
    least, most = cost.seconds_of_training(SMALL, packed, 1000, peak=operations)
    assert (least * cost.REACHED[1], most * cost.REACHED[0]) == pytest.approx((1, 1)) and least < most
