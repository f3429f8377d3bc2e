"""medasst download against a hub that the test makes, through both hubs' own clients in a process of their own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SAMPLES
from hub_server import Hub

from medasst_tools.data import download
from medasst_tools.data.exam_questions import load_protocol
from medasst_tools.data.registry import load_datasets

CORPUS = "tyang816/MedChatZH"
LINE = (
    json.dumps({"instruction": "头痛怎么办？", "input": "", "output": "建议休息。"}, ensure_ascii=False).encode()
    + b"\n"
)
FILES = {"MedChatZH_train.json": LINE * 20_000, "MedChatZH_valid.json": LINE * 3, "README.md": b"card"}


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def environment(hub: Hub, folder: Path, **more: str) -> dict[str, str]:
    """The clients' own variables: where the hub is, and homes without the user's tokens and caches."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE", "USE_MODELSCOPE"))
    }
    return kept | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "MODELSCOPE_ENDPOINT": hub.url,
        "MODELSCOPE_CACHE": str(folder / "ms"), "MODELSCOPE_HOME": str(folder / "ms_home"), "no_proxy": "127.0.0.1",
        "DOWNLOAD_RETRY_TIMES": "1", "MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS": "1", "HOME": str(folder),
    } | more  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "medasst_tools.cli", "download", *words]


def run(hub: Hub, folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
    places = ["--raw-dir", str(folder / "raw"), "--exams-dir", str(folder / "exams")]
    return subprocess.run(
        command(*words, *places), env=environment(hub, folder, **more), capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip


def mistakes(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("medasst download: error: ")]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_corpus_and_a_second_run(tmp_path, hub, source):
    """The registry has no ModelScope id of a corpus: an exam stands for one there."""
    if source == "huggingface":
        name, repository, files, folder = "medchatzh", CORPUS, FILES, tmp_path / "raw/medchatzh"
    else:
        files, folder = {"cmmlu_v1_0_1.zip": b"PK\x03\x04" + bytes(100_000), "README.md": b""}, tmp_path / "exams"
        name, repository = "cmmlu", load_protocol()["benchmarks"]["cmmlu"]["modelscope"]
    hub.repositories[repository] = files
    result = run(hub, tmp_path, name, "--source", source)
    assert result.returncode == 0, result.stderr
    assert "licence" in result.stdout.splitlines()[0]
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert there == {name: data for name, data in files.items() if name != "README.md"}
    asked = len(hub.asked)
    again = run(hub, tmp_path, name, "--source", source)
    assert again.returncode == 0 and again.stdout.count("already there") == len(there) and len(hub.asked) == asked


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_killed_download_goes_on(tmp_path, hub, source):
    data = bytes(range(256)) * 80_000  # 20 MB, in pieces as the clients write them
    repository = load_protocol()["benchmarks"]["cmmlu"][{"huggingface": "hugging_face"}.get(source, source)]
    hub.repositories[repository] = {"cmmlu_v1_0_1.zip": data}
    hub.stall_after = 15_000_000
    words = ["cmmlu", "--source", source, "--exams-dir", str(tmp_path / "exams")]
    killed = subprocess.Popen(
        command(*words), env=environment(hub, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 8_000_000:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    busy = run(hub, tmp_path, *words)
    assert busy.returncode == 2 and "another run is fetching" in busy.stderr
    killed.kill()
    killed.wait()
    assert not (tmp_path / "exams/cmmlu_v1_0_1.zip").exists()
    hub.stall_after, asked = None, len(hub.asked)
    result = run(hub, tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "exams/cmmlu_v1_0_1.zip").read_bytes() == data
    starts = [int(span.removeprefix("bytes=").split("-")[0]) for _, _, span in hub.asked[asked:] if span]
    assert max(starts) >= 8_000_000, "the second run fetched it all again"
    assert [path.name for path in (tmp_path / "exams").iterdir()] == ["cmmlu_v1_0_1.zip"]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_other_bytes_than_the_registry_knows_are_not_kept(tmp_path, hub, source):
    facts = load_protocol()["benchmarks"]["ceval"]
    repository = facts[{"huggingface": "hugging_face"}.get(source, source)]
    hub.repositories[repository] = {"ceval-exam.zip": bytes(facts["known_file"]["bytes"])}
    result = run(hub, tmp_path, "ceval", "--source", source)
    assert result.returncode == 2
    [line] = mistakes(result)
    assert "has sha256" in line and facts["known_file"]["sha256"] in line
    assert list((tmp_path / "exams").iterdir()) == []


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_other_bytes_than_the_hub_says_are_not_kept(tmp_path, hub, source):
    repository = load_protocol()["benchmarks"]["cmmlu"][{"huggingface": "hugging_face"}.get(source, source)]
    hub.repositories[repository] = {"cmmlu_v1_0_1.zip": b"A" * 1000}
    hub.sent["cmmlu_v1_0_1.zip"] = b"B" * 1000
    result = run(hub, tmp_path, "cmmlu", "--source", source, DOWNLOAD_HASH_RETRY_TIMES="1")
    assert result.returncode == 2 and len(mistakes(result)) == 1, result.stderr
    assert not (tmp_path / "exams/cmmlu_v1_0_1.zip").exists()


def test_a_wrong_file_that_is_there_is_replaced(tmp_path, hub):
    hub.repositories[CORPUS] = FILES
    place = tmp_path / "raw/medchatzh/MedChatZH_train.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    result = run(hub, tmp_path, "medchatzh_train", "--source", "huggingface")
    assert result.returncode == 0 and "is a Git LFS pointer" in result.stdout
    assert place.read_bytes() == FILES["MedChatZH_train.json"]


def unreachable(hub: Hub) -> None:
    hub.server.shutdown()
    hub.server.server_close()


ENCYCLOPEDIA, CMTMEDQA = (
    load_datasets()[f"{name}_train"].corpus.hugging_face for name in ("huatuo_encyclopedia", "cmtmedqa")
)
ERRORS = {  # source, what is wrong, variables, {name: what its line says}
    "Hugging Face": (
        "huggingface", lambda hub: hub.gated.add(CMTMEDQA) or hub.repositories.update({ENCYCLOPEDIA: {}}), {},
        {"medchatzh_train": f"{CORPUS} doesn't exist", "cmtmedqa_train": f"{CMTMEDQA} is gated: accept its terms",
         "huatuo_encyclopedia_train": f"{ENCYCLOPEDIA} doesn't have it", "no/such": "no/such doesn't exist"},
    ),
    "ModelScope": (
        "modelscope", lambda hub: hub.private.add("modelscope/ceval-exam") or hub.repositories.update({"modelscope/cmmlu": {"a": b""}}), {},
        {"medchatzh_train": "ModelScope doesn't have MedChatZH", "cmmlu": "has no file", "no/such": "no/such doesn't have it",
         "ceval": "needs a token (MODELSCOPE_API_TOKEN)"},
    ),
    "no network": ("huggingface", unreachable, {}, {"medchatzh_train": "can't be reached"}),
    "no network to ModelScope": ("modelscope", unreachable, {}, {"cmmlu": "can't be reached"}),
    "offline": ("huggingface", lambda hub: None, {"HF_HUB_OFFLINE": "1"}, {"medchatzh_train": "HF_HUB_OFFLINE is set"}),
}  # fmt: skip


@pytest.mark.parametrize(("source", "spoil", "more", "expected"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_each(tmp_path, hub, source, spoil, more, expected):
    spoil(hub)
    result = run(hub, tmp_path, *expected, "--source", source, **more)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    lines = mistakes(result)
    found = {name: [line for line in lines if message in line] for name, message in expected.items()}
    assert len(lines) == len(expected) and all(len(those) == 1 for those in found.values()), result.stderr
    assert not list(tmp_path.rglob(".download-*"))


def test_without_names_everything_that_a_hub_has(tmp_path, hub):
    for dataset in load_datasets().values():
        if repository := dataset.corpus.hugging_face:
            size = dataset.corpus.known_files.get(dataset.files[0], {}).get("bytes", len(LINE))
            if size == len(LINE):  # HuatuoGPT's 333 MB are not made here
                hub.repositories.setdefault(repository, {})[dataset.files[0]] = LINE
    hub.repositories["modelscope/cmmlu"] = {"cmmlu_v1_0_1.zip": b"PK\x03\x04"}
    huatuo = tmp_path / "raw/huatuogpt_sft/HuatuoGPT_sft_data_v1.jsonl"
    huatuo.parent.mkdir(parents=True)
    with huatuo.open("wb") as file:
        file.truncate(333_326_040)
    result = run(hub, tmp_path, USE_MODELSCOPE_HUB="1")
    # C-Eval is on neither hub here: a line for each; what no hub ever has is told, and no error
    assert result.returncode == 2
    assert len([line for line in mistakes(result) if "ceval-exam.zip" in line]) == 2
    assert not [line for line in mistakes(result) if "raw/" in line or "cmmlu" in line]
    there = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.glob("*/**/*")
        if path.is_file() and path.parts[-3] in ("raw", tmp_path.name)
    }
    assert {name for name in there if name.startswith(("raw", "exams"))} == {
        "raw/medchatzh/MedChatZH_train.json", "raw/medchatzh/MedChatZH_valid.json", "raw/cmtmedqa/CMtMedQA.json",
        "raw/huatuo_encyclopedia_qa/train_datasets.jsonl", "raw/huatuo_encyclopedia_qa/test_datasets.jsonl",
        "raw/huatuogpt_sft/HuatuoGPT_sft_data_v1.jsonl", "raw/safety_pairs/pairs.jsonl", "exams/cmmlu_v1_0_1.zip",
    }  # fmt: skip
    assert result.stdout.count("CMtMedQA_test.json") == 1  # two datasets are of it
    pairs = tmp_path / "raw/safety_pairs/pairs.jsonl"
    assert pairs.read_bytes() == (SAMPLES / "raw/safety_pairs/pairs.jsonl").read_bytes()
    for name in ("CMtMedQA_test.json", "medQA.train.txt or", "medQA.test.txt or"):
        assert any(
            name in line and "no hub has it" in line and "github.com" in line for line in result.stdout.splitlines()
        )


def test_a_file_that_no_hub_has_is_an_error_only_by_name(tmp_path, hub):
    result = run(hub, tmp_path, "webmedqa")
    assert result.returncode == 2 and len(mistakes(result)) == 2
    folder = tmp_path / "raw/webmedqa"
    folder.mkdir(parents=True)
    (folder / "medQA.train.txt").write_text("内科\t1\t1\t问\t答\n", encoding="utf-8")
    (folder / "test.zip").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    result = run(hub, tmp_path, "webmedqa")
    assert len(mistakes(result)) == 1 and "is a Git LFS pointer" in mistakes(result)[0]
    (tmp_path / "raw/cmtmedqa").mkdir()
    (tmp_path / "raw/cmtmedqa/CMtMedQA_test.json").write_bytes(b"[]")
    result = run(hub, tmp_path, "cmtmedqa_test")
    assert "has 2 bytes instead of 2,477,458" in mistakes(result)[0] and hub.asked == []


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_models(tmp_path, hub, source):
    files = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "pytorch_model.bin": b"p" * 1000}
    hub.repositories["Qwen/Qwen2-7B"] = files
    result = run(hub, tmp_path, "medasst", "--source", source)
    assert result.returncode == 0, result.stderr
    assert "Qwen/Qwen2-7B: licence apache-2.0" in result.stdout
    place = Path(result.stdout.splitlines()[-1].split(": in ")[1])
    assert place.is_relative_to(tmp_path / {"huggingface": "hf", "modelscope": "ms"}[source])
    # LLaMA-Factory asks ModelScope for every file of the repository: what is left out it would fetch
    left_out = {"pytorch_model.bin"} if source == "huggingface" else set()
    assert {path.name for path in place.iterdir() if not path.name.startswith(".")} == set(files) - left_out


def test_a_model_is_asked_of_the_hub_alone_where_llamafactory_looks_for_it(tmp_path, hub):
    result = run(hub, tmp_path, "medasst")
    assert result.returncode == 2 and len(mistakes(result)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("nope", "nothing is named 'nope'; there are medchatzh"), ("demo", "make train EXPERIMENT=demo")],
)
def test_names_that_are_wrong(tmp_path, hub, name, message):
    result = run(hub, tmp_path, name)
    assert result.returncode == 2 and message in mistakes(result)[0] and len(mistakes(result)) == 1


def test_what_the_registry_knows_is_used(tmp_path):
    """Every known size and sha256 belongs to a file of a dataset, or it would check nothing."""
    for dataset in load_datasets().values():
        names = {
            file
            for other in load_datasets().values()
            if other.corpus.name == dataset.corpus.name
            for file in other.files
        }
        assert dataset.corpus.known_files.keys() <= names
        for known in dataset.corpus.known_files.values():
            assert known and known.keys() <= {"bytes", "sha256", "elsewhere", "bundled"}


@pytest.mark.real_data
def test_the_genuine_files_are_what_the_registry_knows(real_data):
    corpus = load_datasets()["cmtmedqa_test"].corpus
    path = real_data / "raw/cmtmedqa/CMtMedQA_test.json"
    assert download.fault_of(path, corpus.known_files[path.name]) is None
    exam = load_protocol()["benchmarks"]["ceval"]
    assert download.fault_of(real_data / "exams/ceval-exam.zip", exam["known_file"]) is None
