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
