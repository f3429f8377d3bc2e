"""What the READMEs say is there: targets, verbs, files, experiments; and both languages say the same."""

import json
import re
import subprocess
import sysconfig

import pytest
import yaml
from conftest import ROOT

from medasst_tools.cli import VERBS
from medasst_tools.data.exam_questions import load_protocol
from medasst_tools.data.registry import load_datasets

READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXPERIMENTS = yaml.safe_load((ROOT / "factory_configs/experiments.yaml").read_text(encoding="utf-8"))["experiments"]
TARGETS = set(re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1].replace("\\\n", " ").split())


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_commands_exist(name):
    text = READMES[name]
    assert (
        set(re.findall(r"\bmake ([a-z][a-z-]*)", "\n".join(re.findall(r"`(make [^`]+)`", text) + code_blocks(text))))
        <= TARGETS
    )
    assert set(re.findall(r"medasst ([a-z][a-z-]+)", "\n".join(code_blocks(text)))) <= VERBS.keys()
    assert set(re.findall(r"EXPERIMENT=(\w+)", text)) <= EXPERIMENTS.keys()


@pytest.mark.parametrize("name", READMES)
def test_the_tree_is_the_tree(name):
    tree = next(block for block in code_blocks(READMES[name]) if block.startswith("Makefile"))
    entries = [entry for line in tree.splitlines() for entry in re.split(r"\s{2,}", line)[0].split()]
    missing = [
        entry for entry in entries if not (ROOT / entry).exists() and entry not in ("data/", "saves/", "results/")
    ]
    assert not missing
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True, check=True
    )
    folders = {f"{line}/" for line in listed.stdout.split() if (ROOT / line).is_dir() and not line.startswith(".")}
    assert folders <= set(entries)


def test_both_languages_have_the_same_commands_and_numbers():
    def strip_comments(block: str) -> list[str]:
        return [
            line.split("#")[0].split("  ")[0].strip() for line in block.splitlines() if line.strip().startswith("make")
        ]

    commands = [[line for block in code_blocks(text) for line in strip_comments(block)] for text in READMES.values()]
    assert commands[0] == commands[1] and len(commands[0]) >= 10
    tables = ["\n".join(line for line in text.splitlines() if line.startswith("|")) for text in READMES.values()]
    numbers = [re.findall(r"\d+\.\d\d", table) for table in tables]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize("name", READMES)
def test_paper_rows_are_the_papers(name):
    paper = yaml.safe_load((ROOT / "dataset_info/paper.yaml").read_text(encoding="utf-8"))["models"]
    for model in ("Qwen2-7B", "MedAsst"):
        row = next(line for line in READMES[name].splitlines() if re.match(rf"\| (paper, |论文，){model} \|", line))
        keys = ("cmmlu", "ceval", "average", "bleu-4", "rouge-1", "rouge-2", "rouge-l")
        assert re.findall(r"\d+\.\d\d", row) == [f"{paper[model][key]:.2f}" for key in keys]


def test_licences_of_all_corpora_are_named():
    for text in READMES.values():
        for dataset in load_datasets().values():
            assert dataset.corpus.title.split(",")[0] in text
            assert dataset.corpus.licence.split(";")[0].split(" ")[0] in text
        for benchmark in load_protocol()["benchmarks"].values():
            assert benchmark["licence"] in text


def test_every_dependency_is_pinned_and_every_pin_is_installed():
    """constraints.txt against this environment: a package that isn't pinned would differ from machine to machine."""
    from importlib import metadata

    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {
        r.name.lower().replace("_", "-"): str(r.specifier)
        for r in requirements
        if r.marker is None or r.marker.evaluate()
    }
    installed = {
        d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version
        for d in metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    ours = {"medasst-tools", "pip", "setuptools", "wheel"}
    assert {name for name in installed if name not in pins} <= ours
    assert {
        name: version for name, version in installed.items() if name in pins and pins[name] != f"=={version}"
    } == {}


def test_no_large_or_foreign_files():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    sizes = {name: (ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file()}
    assert {name: size for name, size in sizes.items() if size > 300_000} == {}


def test_the_paper_file_names_known_experiments_and_datasets():
    paper = yaml.safe_load((ROOT / "dataset_info/paper.yaml").read_text(encoding="utf-8"))
    named = [name for entry in [*paper["table_1"].values(), paper["table_1_test"]] for name in entry["datasets"]]
    assert set(named) <= set(load_datasets()), json.dumps(named)


@pytest.mark.parametrize("path", ["README.md", "README_zh.md", "docs/models.md", "docs/models_zh.md"])
def test_every_experiment_is_in_the_tables_with_its_base(path):
    rows = [line for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    expected = set(EXPERIMENTS) - (set() if path.startswith("README") else {"demo", "demo_base"})
    assert expected <= set(named)
    for name in expected - {"demo", "demo_base"}:
        config = yaml.safe_load((ROOT / f"factory_configs/{name}/chat.yaml").read_text(encoding="utf-8"))
        row = next(row for row in rows if f"`{name}`" in row.split("|")[1])
        assert f"`{config['model_name_or_path']}`" in row, name
