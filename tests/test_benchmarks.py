"""The training benchmarks do what their tables say: same records in every leg, tokens counted right, real shape; on the tiniest models."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_gpu  # noqa: E402
import bench_train  # noqa: E402

from medasst_tools.machine.cost import ModelShape, known_config  # noqa: E402
from medasst_tools.training.tiny_model import build_tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and 96 records, of lengths from one sentence to more than cutoff_len, one with a history."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "data").mkdir()
    records = [
        {"instruction": "头痛怎么办？" * (1 + n % 5), "input": "", "output": "建议休息。" * (1 + 7 * (n % 24))}
        for n in range(96)
    ]
    records[5]["history"] = [["您好", "您好，请说。"]]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "data/a_train.jsonl").write_text(text, encoding="utf-8")
    assert bench_train.write_dataset(folder / "data", folder, 200) == 96
    build_tiny_model(
        ["头痛怎么办？\n建议休息。您好，请说。"] * 9, folder / "model", vocab_size=300, hidden_size=32, layers=1
    )
    return folder


def test_every_way_of_batching_trains_the_same_tokens(folder, capsys):
    from medasst_tools.data.token_lengths import load_encoder

    legs = {name: [bench_train.run_leg(folder, name)] for name in bench_train.VARIANTS}
    paper, alike, packed = (legs[name][0] for name in bench_train.VARIANTS)
    config = bench_train.leg_config(folder, next(iter(bench_train.VARIANTS)))
    encode = load_encoder(str(folder / "model"), config)
    lines = (folder / "bench.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = [sum(len(a) + len(b) for a, b in encode(json.loads(line))) for line in lines]
    assert paper.useful == alike.useful == sum(min(length, bench_train.CUTOFF) for length in tokens)
    cut = sum(length >= bench_train.CUTOFF for length in tokens)
    assert packed.useful == paper.useful - cut  # a packed record has one token less, LLaMA-Factory's own margin
    assert paper.steps == alike.steps == 24 and packed.steps == packed.padded / 1024
    assert 1 < packed.padded / packed.useful < 1.2 and alike.padded < 0.9 * paper.padded
    bench_train.print_table(legs)
    table = capsys.readouterr().out
    assert f"limit: {paper.padded / paper.useful:.3f}" in table and table.count("\n| ") == 4


def test_lengths_are_the_stored_ones():
    import random

    generator = random.Random(1)
    drawn = [bench_gpu.length("answer", generator) for _ in range(4000)]
    for share, point in zip(bench_gpu.SHARES, bench_gpu.LENGTHS["answer"], strict=True):
        assert sum(length <= point for length in drawn) / len(drawn) == pytest.approx(share, abs=0.02)
    records = bench_gpu.make_records(["头痛怎么办？建议休息。"], 5, 2)
    assert [len(record["output"]) for record in records[:2]] == [4000, 4000] and len(records) == 7


def test_the_random_model_is_whole_and_of_its_shape(tmp_path):
    from transformers import AutoModelForCausalLM

    config = known_config("Qwen/Qwen2-7B") | bench_gpu.TINY
    bench_gpu.write_random_model(config, tmp_path, "cpu")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    whole = ModelShape.from_config(config).parameters
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(
        whole, rel=0.02
    )  # norms and biases are left out
    assert 0.01 < model.lm_head.weight.float().std() < 0.03


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("inputs"), known_config("Qwen/Qwen2-7B") | bench_gpu.TINY
    bench_gpu.write_inputs(folder, 40, config, "cpu")
    return folder, ModelShape.from_config(config)


def leg_row(inputs, name: str) -> str:
    folder, shape = inputs
    leg = bench_gpu.leg_of(name)
    measured = bench_gpu.run_leg(leg, folder, True, 1)
    if leg.kind == "train":
        assert len(measured["seconds"]) == bench_gpu.LONG_STEPS + bench_gpu.WARM_STEPS + 1
    line = bench_gpu.row(leg, measured, shape, 1e12, 100.0, True)
    assert line.count("|") == bench_gpu.HEADERS[leg.kind].count("|") + 3
    return line


@pytest.mark.parametrize("name", ["medasst_fast", "medasst_qlora"])
def test_a_training_leg_on_a_cpu(inputs, name):
    number, percent = r"[\d,.]+", r"[\d.]+%"
    cells = rf"\d x \d x 128 \| \w+ \| {number} \| {number} \| {number} \| {number} \| {number} \| {percent} \| {number} \|"
    assert re.fullmatch(rf"\| {name} \| {cells} {number} to {number} \| unknown \|", leg_row(inputs, name))


def test_the_losses_of_a_leg_beside_the_reference(inputs):
    """Both are the CPU's here, so they are equal."""
    steps = bench_gpu.COMPARED_STEPS
    assert re.fullmatch(rf"\| medasst, loss \| {steps} \| (.*) \| \1 \| 0.0000 \|", leg_row(inputs, "medasst, loss"))


@pytest.mark.parametrize(("name", "asked"), [("medasst, predict", 4), ("medasst, exam", 30)])
def test_a_leg_that_asks(inputs, name, asked):
    assert f" | {asked} | " in leg_row(inputs, name)


def test_bench_gpu_on_a_cpu(tmp_path, monkeypatch, capsys):
    """The whole benchmark, with a process for the leg; what lacks its config says so in its row, and rows are kept."""
    quiet = (
        "LLAMAFACTORY_VERBOSITY",
        "TRANSFORMERS_VERBOSITY",
        "TOKENIZERS_PARALLELISM",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    )
    for name in quiet:
        monkeypatch.setenv(name, "")  # put back afterwards
    out = tmp_path / "rows.md"
    words = ["bench_gpu.py", "--cpu", "--steps", "1", "--out", str(out), "medasst", "no_such_experiment"]
    monkeypatch.setattr(sys, "argv", words)
    bench_gpu.main()
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert re.match(r"\| medasst \| 4 x 1 x 128 \| \w+ \| \d\.\d \|", rows[1])
    assert "| no factory_configs/no_such_experiment/train.yaml: `medasst render` writes it" in rows[2]
    assert "no statement about 7B" in said and "mean 2" in said
    assert out.read_text(encoding="utf-8") == said


def test_without_a_gpu_bench_gpu_is_one_line(tmp_path):
    words = [sys.executable, str(ROOT / "benchmarks/bench_gpu.py")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == "bench_gpu: no NVIDIA GPU here; --cpu runs the same code with a tiny shape\n"
    assert not list(Path(tmp_path).iterdir())
