"""What the READMEs say is there: targets, verbs, files, experiments; and both languages say the same."""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from medasst_tools.cli import VERBS
from medasst_tools.config import load
from medasst_tools.data.exam_questions import load_protocol
from medasst_tools.data.registry import load_datasets
from medasst_tools.machine import cost, doctor


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


READMES = {name: read(name) for name in ("README.md", "README_zh.md")}
DEVELOPMENT = read("docs/development.md")
PAGES = [*READMES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
EXPERIMENTS = yaml.safe_load((ROOT / "factory_configs/experiments.yaml").read_text(encoding="utf-8"))["experiments"]
TARGETS = set(re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1].replace("\\\n", " ").split())


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)


def test_the_tree_is_the_tree():
    tree = next(block for block in code_blocks(DEVELOPMENT) if block.startswith("Makefile"))
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
    assert commands[0] == commands[1] and len(commands[0]) >= 8
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


@pytest.mark.parametrize("page", ["docs/data.md", "docs/data_zh.md"])
def test_the_licences_are_the_registrys(page):
    text = read(page)
    for dataset in load_datasets(own=Path(os.devnull)).values():
        if dataset.corpus.title and dataset.corpus.title.split(",")[0] in text:
            assert dataset.corpus.licence.split(";")[0].split(" ")[0] in text
    for name, benchmark in load_protocol()["benchmarks"].items():
        if name in text:
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


@pytest.mark.parametrize("path", ["docs/models.md", "docs/models_zh.md"])
def test_the_bases_in_the_table_are_the_configs(path):
    """A row of the experiments' table (its second column is the config's model) names what is rendered."""
    rows = [line.split("|") for line in read(path).splitlines() if line.startswith("| `") and line.count("|") == 6]
    named = {row[1].strip(" `"): row for row in rows}
    assert {"medasst", "qwen2_7b"} <= named.keys() & EXPERIMENTS.keys()
    for name in named.keys() & EXPERIMENTS.keys():
        config = yaml.safe_load(read(f"factory_configs/{name}/chat.yaml"))
        assert named[name][3].strip(" `") == config["model_name_or_path"], name
        assert named[name][4].strip(" `") == config["template"], name


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    """Links to files and headings; files in code; verbs and targets in commands."""
    text = read(page)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, anchor
    for file in re.findall(
        r"\b((?:tests|benchmarks|medasst_tools|templates|examples|dataset_info)/[\w/]+\.\w+)", text
    ):
        assert (ROOT / file).exists() or file.startswith("dataset_info/own"), file
    commands = re.findall(r"`((?:make|medasst) [^`]+)`", text) + "\n".join(code_blocks(text)).splitlines()
    for command in commands:
        for target in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", command.split("#")[0]):
            assert target in TARGETS, command
        for verb in re.findall(r"^(?:\.venv/bin/)?medasst ([a-z][a-z-]+)", command.split("#")[0]):
            assert verb in VERBS, command
    assert set(re.findall(r"EXPERIMENT=(\w+)", text)) <= EXPERIMENTS.keys() | {"mine", "llama3_8b_hf"}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "_zh" not in page and (ROOT / page.replace(".md", "_zh.md")).exists()]
)
def test_both_languages_are_complete(page):
    """The same headings, tables and commands; the same numbers in the tables."""
    pages = [read(page), read(page.replace(".md", "_zh.md"))]
    for pattern in (r"^(#+) ", r"^\|[-:| ]+\|$"):
        found = [re.findall(pattern, text, re.MULTILINE) for text in pages]
        assert len(found[0]) == len(found[1]), pattern
    rows = [
        [sorted(re.findall(r"\d[\d.,]*\d|\d", row)) for row in text.splitlines() if row.startswith("|")]
        for text in pages
    ]
    assert rows[0] == rows[1]
    commands = [
        [
            line.split("#")[0].rstrip()
            for block in code_blocks(text)
            for line in block.splitlines()
            if re.match(r"\S*(make|medasst) ", line)
        ]
        for text in pages
    ]
    assert commands[0] == commands[1]


@pytest.mark.parametrize("name", READMES)
def test_the_days_are_doctors(name):
    """The table of estimates, from the formula and the number of tokens that `medasst doctor` uses."""
    cards = {"A10": "A10", "RTX 4090": "RTX 4090", "A100": "A100", "H100": "H100 80GB HBM3"}
    for start, card in cards.items():
        row = next(line for line in READMES[name].splitlines() if re.match(rf"\| {start}\b", line))
        expected = []
        for experiment in ("medasst", "medasst_fast"):
            config = load(ROOT / f"factory_configs/{experiment}/train.yaml")
            shape = cost.known_shape(config["model_name_or_path"])
            tokens = doctor.training_tokens(config | {"dataset_dir": "nowhere"})[0] * config["num_train_epochs"]
            seconds = cost.seconds_of_training(shape, config, tokens, cost.card_peak(card))
            expected += [f"{value / 86400:.1f}" for value in seconds]
            memory = cost.memory_bytes(shape, config) / cost.GIB
        assert re.findall(r"\d+\.\d", row) == expected
        assert row.split("|")[-2].strip() == f"{memory:.0f}"


@pytest.mark.parametrize("page", [*READMES, "docs/web_shop.md", "docs/web_shop_zh.md"])
def test_the_shops_customer_has_the_servers_key(page):
    """A server that is started with a key answers 401 to a client that has none."""
    commands = [line for line in re.split(r"\n|`", read(page)) if "python examples/shop_chat.py" in line]
    assert commands and all(line.startswith("API_KEY=secret ") for line in commands)
