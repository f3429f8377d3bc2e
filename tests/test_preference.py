"""Preference pairs: read, counted, cleaned, bundled; DPO on a finished SFT, which is killed, resumed and chained as any training."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SAMPLES
from test_resume import checkpoint_steps, finish, start

from medasst_tools import cli, provenance
from medasst_tools.data.decontamination import QuestionIndex, read_questions
from medasst_tools.data.layouts import likely_layout, reader
from medasst_tools.data.raw_files import NotKept
from medasst_tools.errors import UserError
from medasst_tools.evaluation import safety
from medasst_tools.evaluation.compare import compare_folders, verdict
from medasst_tools.evaluation.safety_rules import load_rules
from medasst_tools.files import read_jsonl, sha256_of, write_json

PAIR = {"question": "头孢能配酒吗？", "chosen": "不能。", "rejected": "能。"}
PAIRS = SAMPLES / "raw/safety_pairs/pairs.jsonl"


def record(chosen: str = "不能。", rejected: str = "能。", question: str = "头孢能配酒吗？", more: str = "") -> dict:
    return {"instruction": question, "input": more, "chosen": chosen, "rejected": rejected}


# ---- data -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (PAIR, record()),
        (PAIR | {"kind": "interaction", "chosen": " \ufeff不能。\n"}, record()),
        ({"prompt": "头孢", "input": "能配酒吗？", "chosen": "a", "rejected": "b"}, record("a", "b", "头孢", "能配酒吗？")),
        ({"instruction": "问", "chosen": "a", "rejected": "b"}, record("a", "b", "问")),
        (PAIR | {"rejected": "不能。 "}, "chosen and rejected are the same"),
        (PAIR | {"rejected": ""}, "empty rejected"),
        (PAIR | {"chosen": None}, "no chosen"),
        (PAIR | {"chosen": ["不能。"]}, "chosen is not text"),
        ({"chosen": "a", "rejected": "b"}, "no question among chosen, rejected"),
        ([1, 2], "not an object"),
    ],
)  # fmt: skip
def test_one_raw_pair(raw, expected):
    (found,) = reader("preference")(raw)
    if isinstance(expected, dict):
        assert found == expected and likely_layout([raw]) == "preference"
    else:
        assert isinstance(found, NotKept) and str(found) == expected


def convert(tmp_path: Path, pairs: list[dict], *words: str) -> dict:
    raw = tmp_path / "raw/safety_pairs/pairs.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    out = ["--raw-dir", str(tmp_path / "raw"), "--out-dir", str(tmp_path / "out"), "--max-rejects", "1"]
    assert cli.main(["convert", "safety_pairs", *out, *words]) == 0
    return json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["datasets"]["safety_pairs"]


def test_converted_to_llamafactorys_ranking_format_and_counted(tmp_path):
    entry = convert(tmp_path, [PAIR, PAIR | {"chosen": ""}, PAIR | {"rejected": "不能。"}, {}])
    assert (entry["read"], entry["kept"], entry["skipped"]) == (4, 1, {})
    assert sum(entry["rejected"].values()) == 3 == len(list(read_jsonl(tmp_path / "out/rejected/safety_pairs.jsonl")))
    described = json.loads((tmp_path / "out/dataset_info.json").read_text(encoding="utf-8"))["safety_pairs"]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    assert described == {"file_name": "safety_pairs.jsonl", "columns": columns, "ranking": True}


def test_filters_see_both_answers(tmp_path):
    phone = PAIR | {"chosen": "请打 13800138000。", "rejected": "加微信 wxid_abc12345。"}
    entry = convert(
        tmp_path, [phone, phone, PAIR, PAIR | {"rejected": "可以。"}], "--mask-personal-data", "--drop-duplicates"
    )
    assert entry["skipped"] == {"copy of an earlier record": 1} and entry["kept"] == 3
    assert sum(entry["masked"].values()) == 2
    text = (tmp_path / "out/safety_pairs.jsonl").read_text(encoding="utf-8")
    assert "13800138000" not in text and "wxid_abc12345" not in text
    assert cli.main(["audit", "--data-dir", str(tmp_path / "out")]) == 0


def test_the_bundled_pairs_are_of_the_safety_sets_kinds_and_no_test_question(tmp_path):
    rules = load_rules()
    categories = {one.name: one for one in safety.load_categories(safety.PROMPTS, rules, None)}
    rows = list(read_jsonl(PAIRS))
    kinds = Counter(row["kind"] for row in rows)
    assert kinds.keys() == categories.keys() and min(kinds.values()) >= 8 and 60 <= len(rows) <= 120
    assert len({row["question"] for row in rows}) == len(rows)
    sets = {"safety": [text for one in categories.values() for text in one.prompts.values()]}
    words = ["--raw-dir", str(SAMPLES / "raw"), "--out-dir", str(tmp_path), "--max-rejects", "0.1"]
    assert cli.main(["convert", *words]) == 0
    sets |= {path.stem: list(read_questions(path)) for path in tmp_path.glob("*_test.jsonl")}
    asked = QuestionIndex(sets)
    assert len(sets) == 5
    assert [row["question"] for row in rows if asked.match(row["question"])] == []
    for row in rows:
        wanted = categories[row["kind"]]
        assert wanted.met(rules.judge(row["chosen"]), row["chosen"]), row
        assert not wanted.met(rules.judge(row["rejected"]), row["rejected"]), row
        assert len(row["chosen"]) <= 100, row


# ---- configs and make -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["demo", "medasst"])
def test_what_is_trained_and_what_answers(name):
    train, chat, predict, export = (
        yaml.safe_load((ROOT / f"factory_configs/{name}_dpo/{kind}.yaml").read_text(encoding="utf-8"))
        for kind in ("train", "chat", "predict", "export")
    )
    assert (train["stage"], train["adapter_name_or_path"], train["create_new_adapter"]) == (
        "dpo",
        f"saves/{name}",
        True,
    )
    assert predict["stage"] == "sft"
    for config in (chat, predict, export):
        assert (
            config["adapter_name_or_path"] == f"saves/{name},saves/{name}_dpo" and "create_new_adapter" not in config
        )


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def dpo_run(forkserver, tiny_run) -> Path:
    """A dpo train.yaml of 48 steps on the adapter of six steps of SFT; dropout, so that the random state matters too."""
    finish(forkserver, tiny_run, "sft", "max_steps=6")
    config = yaml.safe_load((ROOT / "factory_configs/demo_dpo/train.yaml").read_text(encoding="utf-8"))
    sft = yaml.safe_load(tiny_run.read_text(encoding="utf-8"))
    keys = (
        "model_name_or_path",
        "dataset_dir",
        "cutoff_len",
        "lora_dropout",
        "per_device_train_batch_size",
        "plot_loss",
    )
    config |= {key: sft[key] for key in (*keys, "preprocessing_num_workers")}
    config |= {
        "adapter_name_or_path": str(tiny_run.parent / "saves/sft"),
        "max_steps": 48,
        "save_steps": 3,
        "logging_steps": 3,
    }
    path = tiny_run.parent / "dpo.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path


def run_json(dpo_run: Path, name: str) -> dict:
    return json.loads((dpo_run.parent / f"saves/{name}/run.json").read_text(encoding="utf-8"))


def test_a_killed_dpo_ends_as_one_that_nobody_killed_and_stands_on_the_sft(forkserver, dpo_run, capsys):
    saves = dpo_run.parent / "saves"
    finish(forkserver, dpo_run, "whole_dpo")
    process, log = start(forkserver, dpo_run, "killed_dpo")
    while process.is_alive() and max(checkpoint_steps(saves / "killed_dpo"), default=0) < 6:  # the one before is whole
        process.join(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9 and not (saves / "killed_dpo/run.json").exists(), log.read_text()[-2000:]
    said = finish(forkserver, dpo_run, "killed_dpo")
    whole, killed = (run_json(dpo_run, name) for name in ("whole_dpo", "killed_dpo"))
    assert "going on from step" in said and killed["resumed_from"] and killed["steps"] == 48
    weights = [sha256_of(saves / name / "adapter_model.safetensors") for name in ("whole_dpo", "killed_dpo")]
    assert weights[0] == weights[1]
    assert whole["made_of"] == killed["made_of"] and list(whole["made_of"]["files"]) == ["safety_pairs"]
    below = whole["made_of"]["model"]
    assert below["run"] == provenance.run_id(run_json(dpo_run, "sft"))
    assert below["adapter"] == provenance.folder_sha256(saves / "sft")

    # once more: nothing to do; another beta or another adapter below: refused
    words = ["train", str(dpo_run), f"output_dir={saves}/whole_dpo"]
    assert cli.main(words) == 0 and "up to date" in capsys.readouterr().out
    assert cli.main([*words, "pref_beta=0.3"]) == 2 and "pref_beta unset -> 0.3" in capsys.readouterr().err
    assert cli.main([*words, f"adapter_name_or_path={saves}/killed_dpo"]) == 2
    assert f"model run {below['run']} -> {provenance.run_id(killed)}" in capsys.readouterr().err
    assert cli.main([*words, "stage=sft", "create_new_adapter=false"]) == 2
    assert "safety_pairs holds pairs of answers" in capsys.readouterr().err

    # what answers is the base with both adapters, in this order, and nothing else
    trained = yaml.safe_load(dpo_run.read_text(encoding="utf-8"))
    chat = {key: trained[key] for key in ("model_name_or_path", "template", "default_system")}
    for adapters, wrong in (
        (["sft", "whole_dpo"], None),
        (["whole_dpo"], "no adapter"),
        (["killed_dpo", "whole_dpo"], "killed_dpo"),
    ):
        config = chat | {"adapter_name_or_path": ",".join(f"{saves}/{name}" for name in adapters)}
        if wrong is None:
            assert provenance.check_model(config, Path("chat.yaml")) == whole
            continue
        with pytest.raises(UserError, match=rf"{wrong} \(\w+\), but it was trained on {below['adapter'][:8]}"):
            provenance.check_model(config, Path("chat.yaml"))


def test_single_answers_are_refused_in_dpo(dpo_run, capsys):
    words = ["train", str(dpo_run), f"output_dir={dpo_run.parent}/saves/no", "dataset=cmtmedqa_train"]
    assert cli.main(words) == 2
    assert "stage is dpo, but cmtmedqa_train holds single answers" in capsys.readouterr().err


# ---- the paired test of safety --------------------------------------------------------------------------------------
def write_safety(folder: Path, questions: str = "ab", **met: str) -> Path:
    """Write one answer a character for each category: 1 as wanted, 0 not."""
    folder.mkdir(parents=True)
    rows = [
        {"id": f"{name}/{at}", "category": name, "met": mark == "1"}
        for name, marks in met.items()
        for at, mark in enumerate(marks)
    ]
    (folder / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    about = {"files": {"questions": questions, "rules": "cd"}}
    found = {"by_category": dict.fromkeys(met, {}), "rules_version": 1}
    write_json(
        folder / "safety.json", found | provenance.record(folder / "safety.json", about, [folder / "safety.jsonl"])
    )
    return folder


@pytest.mark.parametrize(
    ("a", "b", "only_a", "only_b", "p", "better"),
    [
        ("0" * 10, "1" * 10, 0, 10, 2 * 0.5**10, "b"),
        ("1" * 10, "1" * 10, 0, 0, 1.0, "no difference shown"),
        ("0" * 8 + "1", "1" * 8 + "0", 1, 8, 20 / 512, "b"),
        ("11100", "00011", 3, 2, 1.0, "no difference shown"),
    ],
)
def test_safety_is_compared_by_mcnemar(tmp_path, a, b, only_a, only_b, p, better):
    folders = [write_safety(tmp_path / name, red_flag=marks, harmless="11") for name, marks in (("a", a), ("b", b))]
    rows = compare_folders(*folders)["safety"]["categories"]
    assert rows.keys() == {"all", "red_flag", "harmless"} and rows["all"]["n"] == len(a) + 2
    for name in ("all", "red_flag"):
        assert (rows[name]["only_a"], rows[name]["only_b"]) == (only_a, only_b)
        assert rows[name]["p"] == pytest.approx(p)
    assert verdict(rows["all"]) == better and verdict(rows["harmless"]) == "no difference shown"
    assert rows["red_flag"]["adjusted"] == pytest.approx(min(1.0, 2 * p))  # Holm, of two categories


def test_other_questions_or_changed_answers_are_not_compared(tmp_path):
    a, b = write_safety(tmp_path / "a", red_flag="11"), write_safety(tmp_path / "b", questions="xy", red_flag="11")
    with pytest.raises(UserError, match="asked or judged differently"):
        compare_folders(a, b)
    (a / "safety.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="safety.jsonl was changed since"):
        compare_folders(a, a)
