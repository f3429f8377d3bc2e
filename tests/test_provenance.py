"""The ledger: a config that doesn't fit its model is refused, a number carries its settings in its name, rooms stand in order."""

import ast
import hashlib
import json
from pathlib import Path

import numpy
import pytest
import yaml
from conftest import ROOT
from safetensors.numpy import save_file

from medasst_tools import cli, files, provenance
from medasst_tools.errors import UserError
from medasst_tools.evaluation.score import metric_names

ROOMS = ["", "data", "machine", "training", "inference", "evaluation", "report", "serving"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A folder with a base, an adapter, its run.json and a config that fits; {"config": ..., "path": ...}."""
    monkeypatch.chdir(tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "saves/a"
    for folder, name in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir(parents=True)
        save_file({"weight": numpy.zeros(8, dtype=numpy.float32)}, folder / name)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    settings = {"template": "qwen", "default_system": "你是医疗助手。" * 20, "model_name_or_path": str(base)}
    about = provenance.made_of(
        provenance.settings_that_matter(settings | {"seed": 7, "do_train": True}), {"a_train": "00"},
        provenance.model_identity({"model_name_or_path": str(base)}),
    )  # fmt: skip
    run = {"made_of": about, "outputs": {}, "seed": 7, "steps": 1200, "tokens": 34567, "commit": "abc1234"}
    (adapter / "run.json").write_text(json.dumps(run), encoding="utf-8")
    config = settings | {"adapter_name_or_path": str(adapter)}
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return {"config": config, "path": path, "base": base, "adapter": adapter}


def test_what_fits_is_described(trained):
    line = provenance.describe(trained["config"], provenance.check_model(trained["config"], trained["path"]))
    for fact in ("template qwen", "a_train", "seed 7", "1,200 steps", "34,567 tokens", "abc1234"):
        assert fact in line and "\n" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "llama3"}, "has the template llama3, but"),
        ({"template": None}, "has the template unset, but"),
        ({"default_system": "另一个"}, "has the system prompt 另一个, but"),
        ({"enable_thinking": False}, "has the enable_thinking false, but"),
        ({"model_name_or_path": "other/base"}, "on the base other/base"),
        ({"adapter_name_or_path": "saves/none"}, "no saves/none; `make train EXPERIMENT=none` makes it"),
    ],
)
def test_a_mismatch_is_one_line(trained, change, message):
    with pytest.raises(UserError) as error:
        provenance.check_model(trained["config"] | change, trained["path"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_base_of_the_same_name_is_refused(trained):
    save_file({"weight": numpy.ones(8, dtype=numpy.float32)}, trained["base"] / "model.safetensors")
    provenance.folder_sha256.cache_clear()
    with pytest.raises(UserError, match="train again, or put the old base back"):
        provenance.check_model(trained["config"], trained["path"])


def test_models_without_a_run(trained, tmp_path):
    base_only = {"model_name_or_path": str(trained["base"]), "template": "qwen"}
    assert provenance.check_model(base_only, tmp_path) is None
    assert "not tuned" in provenance.describe(base_only, None)
    (trained["adapter"] / "run.json").unlink()
    assert provenance.check_model(trained["config"], tmp_path) is None
    assert "what it was trained on is unknown" in provenance.describe(trained["config"], None)
    (trained["adapter"] / "run.started.json").write_text("{}")
    with pytest.raises(UserError, match="isn't finished; `make train EXPERIMENT=a` goes on"):
        provenance.check_model(trained["config"], tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"made_of": 3}'])
def test_a_damaged_run_json_is_named(trained, text):
    (trained["adapter"] / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        provenance.read_run(trained["adapter"])


def test_every_verb_that_asks_a_model_refuses(trained, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a_test.jsonl").write_text('{"instruction": "问", "input": "", "output": "答"}\n', encoding="utf-8")
    (data / "dataset_info.json").write_text(json.dumps({"a_test": {"file_name": "a_test.jsonl"}}), encoding="utf-8")
    chat = trained["config"] | {"template": "llama3"}
    predict = chat | {"dataset_dir": "data", "eval_dataset": "a_test", "do_predict": True, "output_dir": "results/a"}
    export = chat | {"export_dir": "saves/merged"}
    for name, config in (("chat", chat), ("predict", predict), ("export", export)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    exams = str(ROOT / "dataset_info/samples/exams")
    for words in (
        ["predict", "predict.yaml"],
        ["exam", "chat.yaml", "--exams-dir", exams, "--out", "results/a"],
        ["safety", "chat.yaml", "--out", "results/a"],
        ["export", "export.yaml"],
        ["chat", "chat.yaml", "--terminal"],
        ["api", "chat.yaml"],
    ):
        assert cli.main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "has the template llama3, but" in line, words


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("train", {}, "demo"),
        ("train", {"max_steps": 2}, "demo (max_steps=2)"),
        ("train", {"learning_rate": 1e-3, "seed": 7}, "demo (learning_rate=0.001, seed=7)"),
        ("train", {"save_steps": 7, "max_new_tokens": 9}, "demo"),
        ("predict", {"max_samples": 50}, "demo (max_samples=50)"),
        ("exam", {"max_new_tokens": 7}, "demo"),
        ("exam", {"template": "llama3"}, "demo (template=llama3)"),
    ],
)
def test_other_settings_stand_in_the_name(kind, changes, name):
    file = "chat" if kind == "exam" else kind
    config = yaml.safe_load((ROOT / f"factory_configs/demo/{file}.yaml").read_text(encoding="utf-8")) | changes
    settings = provenance.exam_settings(config) if kind == "exam" else provenance.settings_that_matter(config)
    assert provenance.shown_name("demo", **{kind: provenance.made_of(settings)}) == name


def test_a_record_is_up_to_date_only_if_its_output_is_whole(tmp_path, capsys):
    output, record, about = tmp_path / "x.jsonl", tmp_path / "x.json", provenance.made_of({"a": 1})
    output.write_text("1")
    record.write_text(json.dumps(provenance.record(record, about, [output])))
    assert provenance.up_to_date(record, about)
    assert not provenance.up_to_date(record, provenance.made_of({"a": 2}))
    output.write_text("2")
    assert not provenance.up_to_date(record, about)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{record}: up to date",
        f"{record}: made anew: a 1 -> 2",
        f"{record}: made anew: x.jsonl was changed since",
    ]


def test_a_large_files_hash_is_remembered_once_nobody_writes_it_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HASHES", tmp_path / "cache/sha256.json")
    path = tmp_path / "large"
    path.write_bytes(b"a" * files._WORTH_KEEPING)
    assert files.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not files.HASHES.exists()  # it was written just now, and may be again
    later = path.stat().st_ctime + 10
    monkeypatch.setattr(files.time, "time", lambda: later)
    first = files.sha256_of(path)
    assert list(json.loads(files.HASHES.read_text()).values()) == [first]
    monkeypatch.setattr(files.hashlib, "file_digest", None)
    assert files.sha256_of(path) == first


def test_no_room_imports_a_later_one_and_there_are_no_circles():
    package = ROOT / "medasst_tools"
    edges: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).parts
        module = ".".join(parts).removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medasst_tools"):
                base = node.module.split(".")[1:]
                found = [".".join([*base, name.name]) for name in node.names] if len(base) < 2 else [".".join(base)]
                targets = [t for t in found if (package / Path(*t.split("."))).with_suffix(".py").is_file()]
                edges.setdefault(module, set()).update(targets or [".".join(base)] * bool(base))
        room = parts[0] if len(parts) > 1 else ""
        for target in edges.get(module, ()):
            target_room = target.split(".")[0] if target.split(".")[0] in ROOMS else ""
            assert ROOMS.index(target_room) <= ROOMS.index(room), f"{module} imports {target}, a later room"
    assert len(edges) > 30

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        for target in edges.get(module, ()):
            visit(target, (*above, module))

    for module in edges:
        visit(module, ())


def test_the_rooms_say_what_is_in_them():
    for room in ROOMS[1:]:
        docstring = ast.get_docstring(
            ast.parse((ROOT / "medasst_tools" / room / "__init__.py").read_text(encoding="utf-8"))
        )
        assert docstring and docstring.count("\n") == 0


def test_the_four_metrics_come_first():
    assert metric_names()[:4] == ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
