"""What medasst convert writes trains in LLaMA-Factory, wherever the multi-turn records are: its loader takes types from the first 10 MiB."""

import json
from pathlib import Path

import pytest
from test_convert import converted, dump

from medasst_tools import cli
from medasst_tools.data.registry import load_datasets
from medasst_tools.training.tiny_model import build_tiny_model

TRAIN_SETS = [name for name in load_datasets() if name.endswith("_train")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(["头痛两天怎么办？\n您好，建议休息，必要时就医。"] * 20, folder, vocab_size=400, hidden_size=32)
    return folder


def train(model: Path, data: Path, work: Path, datasets: list[str], **more) -> dict:
    """Train two steps in this process, as llamafactory-cli does; return the last line of its log."""
    from llamafactory.train.tuner import run_exp

    settings = {
        "model_name_or_path": str(model), "template": "qwen", "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": ",".join(datasets), "dataset_dir": str(data), "cutoff_len": 256, "cache_dir": str(work / "cache"),
        "output_dir": str(work / "save"), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "save_only_model": True,
    }  # fmt: skip
    run_exp(settings | more)
    assert (work / "save/adapter_model.safetensors").is_file()
    return json.loads((work / "save/trainer_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def multi_turn(histories: list[bool], padding: int) -> bytes:
    turn = ["问：一", "答：二"]
    rows = ({"data": (turn if has else []) + ["问：" + "长" * padding, "答：好"]} for has in histories)
    return b"\n".join(map(dump, rows))


@pytest.mark.parametrize(
    ("histories", "moved"),
    [([False] * 4000 + [True] + [False] * 10, True), ([True] * 4000, False), ([False] * 4000, False)],
    ids=["the-first-history-after-10-MiB", "all-multi-turn", "none-multi-turn"],
)
def test_histories_load_and_train_wherever_they_start(tmp_path, tiny, histories, moved):
    import datasets

    _, _, entry = converted(tmp_path, "huatuogpt_sft_train", multi_turn(histories, 1500))
    assert entry["first_history_moved_to_top"] is moved
    assert entry["bytes"] > 11 << 20 and entry["kept"] == len(histories)
    assert train(tiny, tmp_path / "out", tmp_path, ["huatuogpt_sft_train"], max_samples=4)["total_steps"] == 2
    # LLaMA-Factory's own cache: every record with its history, the first one the multi-turn one
    file = str(tmp_path / "out/huatuogpt_sft_train.jsonl")
    loaded = datasets.load_dataset("json", data_files=[file], split="train", cache_dir=str(tmp_path / "cache"))
    found = [len(history) for history in loaded["history"]]
    assert sorted(found) == sorted(map(int, histories)) and found[0] == max(found)


def independent_count(raw: Path, name: str) -> int:
    """Count a raw file's records without the project's readers: lines, or elements of an array."""
    path = raw / load_datasets()[name].corpus.name / load_datasets()[name].files[0]
    text = path.read_text(encoding="utf-8-sig")
    return len(json.loads(text)) if text.lstrip().startswith("[") else sum(1 for line in text.split("\n") if line)


@pytest.mark.real_data
def test_all_five_real_corpora_are_accounted_for_and_train_together(tmp_path, tiny, real_data):
    out = tmp_path / "real"
    assert cli.main(["convert", "--raw-dir", str(real_data / "raw"), "--out-dir", str(out), "--workers", "2"]) == 0
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["datasets"]
    present = [
        name
        for name, dataset in load_datasets().items()
        if (real_data / "raw" / dataset.corpus.name / dataset.files[0]).is_file() and not dataset.optional
    ]
    assert list(manifest) == present and set(TRAIN_SETS) <= set(present)
    for name, entry in manifest.items():
        blank = entry["skipped"].get("blank line", 0)
        assert entry["read"] - blank == independent_count(real_data / "raw", name)
        assert entry["read"] == entry["kept"] + sum(entry["skipped"].values()) + sum(entry["rejected"].values())
        assert len((out / f"{name}.jsonl").read_bytes().splitlines()) == entry["kept"]
        assert len((out / "rejected" / f"{name}.jsonl").read_bytes().splitlines()) == sum(entry["rejected"].values())
    log = train(
        tiny,
        out,
        tmp_path,
        TRAIN_SETS,
        max_samples=8,
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=20,
    )
    assert log["total_steps"] == 2  # 5 x 8 records, 20 a step
