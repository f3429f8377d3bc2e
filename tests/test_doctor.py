"""`medasst doctor` and the checks before a training: a table of situations and the line that each gives; hubs are real servers."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hub_server import Hub

from medasst_tools import cli
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import sha256_of
from medasst_tools.machine import cost, doctor, preflight
from medasst_tools.machine import hardware as machine
from medasst_tools.machine import hub as hub_models

QWEN2_7B = cost.known_config("Qwen/Qwen2-7B")
CONFIG = json.dumps(QWEN2_7B).encode()


# ---- a hub -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hub():
    """A hub that has owner/open; owner/closed is gated, and private on ModelScope."""
    server = Hub()
    server.repositories = {"owner/open": {"config.json": CONFIG}, "owner/closed": {}}
    server.gated, server.private = {"owner/closed"}, {"owner/closed"}
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def closed_port():
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def make_data(folder: Path) -> None:
    folder.mkdir(parents=True)
    path = folder / "a_train.jsonl"
    path.write_text('{"instruction": "问", "input": "", "output": "答"}\n', encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"a_train": {"file_name": path.name}}), encoding="utf-8")
    entry = {"read": 1, "kept": 1, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (folder / "manifest.json").write_text(json.dumps({"datasets": {"a_train": entry}}), encoding="utf-8")


def train_config(folder: Path, **changes) -> dict:
    return {
        "model_name_or_path": "owner/open", "do_train": True, "stage": "sft", "finetuning_type": "lora", "lora_rank": 8,
        "dataset_dir": str(folder / "data"), "dataset": "a_train", "template": "qwen", "cutoff_len": 128,
        "output_dir": str(folder / "saves/x"), "per_device_train_batch_size": 1, "use_cpu": True, "max_steps": 1,
        "save_total_limit": 1, "report_to": "none",
    } | changes  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for key in ("HF_TOKEN", "CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


HF = {"HF_HUB_OFFLINE": "0"}
MODELSCOPE = {"USE_MODELSCOPE_HUB": "1", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0"}
NO_TOKEN = "is gated: accept its terms on its page, then set HF_TOKEN"
# environment beside the endpoint, {model: what its line says}
HUB_SITUATIONS = [
    (HF, {"owner/open": "owner/open is on Hugging Face, not yet downloaded", "owner/closed": f"Hugging Face's owner/closed {NO_TOKEN}",
          "owner/absent": "Hugging Face's owner/absent doesn't exist, or is private and needs HF_TOKEN"}),
    ({"HF_HUB_OFFLINE": "1"}, {"owner/open": "owner/open isn't whole here, and HF_HUB_OFFLINE is set"}),
    (MODELSCOPE, {"owner/open": "owner/open is on ModelScope, not yet downloaded", "owner/absent": "owner/absent doesn't have it",
                  "owner/closed": "owner/closed doesn't exist or needs a token (MODELSCOPE_API_TOKEN) that may read it"}),
]  # fmt: skip
LOCATE = """
import sys
from medasst_tools.machine import hub
for model in sys.argv[1:]:
    found, download = hub.locate(model)
    print(found.status, download, found.line())
"""


@pytest.mark.parametrize(("variables", "expected"), HUB_SITUATIONS)
def test_what_a_hub_says_of_a_model_is_one_line(workplace, hub, variables, expected):
    """In a process of its own: the clients read their endpoints when they are imported."""
    said = run_python(workplace, hub, variables, "-c", LOCATE, *expected).stdout.splitlines()
    assert len(said) == len(expected)
    for line, message in zip(said, expected.values(), strict=True):
        assert message in line
        status = "ok" if message.endswith("not yet downloaded") else "fail"
        assert line.startswith(f"{status} True ")
        other = "0 asks Hugging Face" if "USE_MODELSCOPE_HUB" in variables else "1 asks ModelScope"
        assert (f"USE_MODELSCOPE_HUB={other}" if status == "fail" else "not yet downloaded") in line


@pytest.mark.parametrize("variables", [HF, MODELSCOPE])
def test_a_hub_that_does_not_answer_is_said(workplace, closed_port, variables):
    said = run_python(workplace, closed_port, variables, "-c", LOCATE, "owner/open").stdout
    assert said.startswith("fail") and "can't be reached" in said and "set a mirror: " in said


def test_a_model_that_cannot_be_had_ends_a_training_before_it_begins(workplace, hub):
    (workplace / "train.yaml").write_text(yaml.safe_dump(train_config(workplace, model_name_or_path="owner/closed")))
    done = run_python(workplace, hub, HF, "-m", "medasst_tools.cli", "train", "train.yaml")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and NO_TOKEN in line and line.endswith("--anyway goes on all the same")
    assert done.stdout == "" and not (workplace / "saves").exists()


def run_python(workplace: Path, hub: str, variables: dict, *words: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_", "USE_MODEL"))}
    homes = {"HF_HOME": "hf", "MODELSCOPE_CACHE": "ms", "MODELSCOPE_HOME": "ms"}
    places = {name: str(workplace / folder) for name, folder in homes.items()} | {"PYTHONPATH": str(ROOT)}
    env = kept | places | {"HF_ENDPOINT": hub, "MODELSCOPE_ENDPOINT": hub} | variables
    return subprocess.run(
        [sys.executable, *words], cwd=workplace, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("variables", "after"),
    [
        ({"http_proxy": "http://a:1"}, "http://a:1"),
        ({"all_proxy": "socks://127.0.0.1:1080/"}, "socks5://127.0.0.1:1080/"),
        ({"ALL_PROXY": "socks5h://127.0.0.1:1080/"}, "socks5h://127.0.0.1:1080/"),
    ],
)
def test_proxies(variables, after):
    """A local endpoint is never asked through a proxy; what desktops set works."""
    environment = dict(variables) | {"NO_PROXY": "a.cn"}
    cli.fit_proxies(environment)
    assert environment[next(iter(variables))] == after
    assert environment["NO_PROXY"] == "a.cn,127.0.0.1,localhost,::1" and "127.0.0.1" in environment["no_proxy"]


# ---- local models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "status", "detail"),
    [
        ({"config.json": "{}", "model.safetensors": ""}, "ok", "is there"),
        ({"model.safetensors": ""}, "fail", "has no config.json"),
        ({"config.json": "{", "model.safetensors": ""}, "fail", "is damaged"),
        ({"config.json": "{}"}, "fail", "has no weights"),
        (
            {"config.json": "{}", "a.safetensors": "",
             "model.safetensors.index.json": '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'},
            "fail", "1 of 2 weight files are missing",
        ),
        ({"config.json": "{}", "model.safetensors.index.json": "[]"}, "fail", "is damaged"),
    ],
)  # fmt: skip
def test_a_local_model_is_looked_at(tmp_path, files, status, detail):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found, download = hub_models.locate(str(tmp_path))
    assert found.status == status and detail in found.detail and not download


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("saves/nothing", "no folder saves/nothing; `make train EXPERIMENT=nothing` makes it"),
        ("/no/such/folder", "no folder /no/such/folder; give the folder's path, or a hub id"),
        ("Qwen2-7B", "'Qwen2-7B' is no folder and no hub id; an id is owner/name, as in Qwen/Qwen2-7B"),
        ("owner/a b", "'owner/a b' is no folder and no hub id"),
    ],
)
def test_a_name_that_is_no_model(workplace, model, message):
    with pytest.raises(UserError) as error:
        preflight.require(train_config(workplace, model_name_or_path=model))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("modelscope", [False, True])
def test_a_model_in_the_cache_needs_no_hub(workplace, closed_port, modelscope):
    """In a process of its own: the clients read where their caches are when they are imported."""
    if modelscope:
        folder = workplace / "ms/models/owner--name/snapshots/master"
    else:
        repo = workplace / "hf/hub/models--owner--name"
        folder = repo / "snapshots/0123456789abcdef0123456789abcdef01234567"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(folder.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").touch()
    variables = MODELSCOPE if modelscope else {"HF_HUB_OFFLINE": "1"}
    said = run_python(workplace, closed_port, variables, "-c", LOCATE, "owner/name").stdout
    assert said.startswith("ok False ") and "owner/name is in " in said and "'s cache" in said


# ---- device, extras, memory, disk ------------------------------------------------------------------------------------
def fake_gpus(folder: Path, monkeypatch, *rows: str) -> None:
    program = folder / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


A10 = "NVIDIA A10, 23028, 580.65.06, GPU-0a"


@pytest.fixture
def model(workplace):
    """A local model with Qwen2-7B's config and no weights to speak of."""
    folder = workplace / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").touch()
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "gpus", "message"),
    [
        ({"bf16": True}, [], "no GPU here, and bf16: true needs one; run it on a machine with an NVIDIA GPU"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, [], "no GPU here, and quantization_bit: 4 needs one"),
        ({"quantization_bit": 4}, [A10], "bitsandbytes isn't installed, and this config needs it"),
        ({"optim": "paged_adamw_8bit"}, [A10], "bitsandbytes isn't installed"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, [A10], "deepspeed isn't installed, and this config needs it"),
        ({"enable_liger_kernel": True, "bf16": True}, [A10], "liger-kernel isn't installed, and this config needs it"),
        ({"bf16": True}, ["NVIDIA A10, 23028, 535.104.05, GPU-0a"], "NVIDIA A10 can't be used; driver 535.104.05 is older than 580"),
    ],
)  # fmt: skip
def test_what_stops_a_gpu_experiment(workplace, model, monkeypatch, capsys, settings, gpus, message):
    if gpus:
        fake_gpus(workplace, monkeypatch, *gpus)
    monkeypatch.setattr(machine, "installed", lambda package: None)
    config = train_config(workplace, model_name_or_path=model, use_cpu=False, **settings)
    with pytest.raises(UserError) as error:
        preflight.require(config)
    assert message in str(error.value) and "--anyway" in str(error.value) and "\n" not in str(error.value)
    preflight.require(config, argparse.Namespace(anyway=True))
    assert f"warning: {message}" in capsys.readouterr().out


def test_too_little_memory_is_an_estimate_and_only_warns(workplace, model, monkeypatch, capsys):
    fake_gpus(workplace, monkeypatch, "NVIDIA GeForce RTX 3060, 12288, 580.1, GPU-0a")
    monkeypatch.setattr(machine, "free_disk", lambda path: 2**40)
    settings = {"bf16": True, "use_cpu": False, "per_device_train_batch_size": 4, "cutoff_len": 512}
    preflight.require(train_config(workplace, model_name_or_path=model, **settings))
    said = capsys.readouterr().out
    assert "(estimated), 12.0 GiB there; lower per_device_train_batch_size or cutoff_len, or use medasst_qlora" in said
    preflight.require(train_config(workplace, model_name_or_path=model, **settings | {"finetuning_type": "full"}))
    assert "memory" not in capsys.readouterr().out  # not judged


def test_the_papers_experiment_passes_on_its_card(workplace, model, monkeypatch, capsys):
    fake_gpus(workplace, monkeypatch, A10)
    paper = {"bf16": True, "use_cpu": False, "per_device_train_batch_size": 4, "cutoff_len": 512}
    preflight.require(train_config(workplace, model_name_or_path=model, **paper))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["A", "B"]), ("1", ["B"]), ("1,0", ["B", "A"]), ("", []), ("-1", []), ("0,7,1", ["A"]), ("GPU-0b", ["B"])],
)
def test_visible_gpus(tmp_path, monkeypatch, visible, names):
    fake_gpus(tmp_path, monkeypatch, "A, 1000, 580.1, GPU-0a", "B, 1000, 580.1, GPU-0b")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in machine.gpus()] == names


def test_too_little_disk_is_one_line(workplace, model, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 100 << 20)
    with pytest.raises(UserError, match=r"about 0\.\d GiB to write, 100 MiB free at .*saves/x; make room"):
        preflight.require(train_config(workplace, model_name_or_path=model))


def test_training_tokens(workplace):
    config = train_config(workplace)
    size = (workplace / "data/a_train.jsonl").stat().st_size
    assert doctor.training_tokens(config) == (pytest.approx(size / cost.BYTES_A_TOKEN), "estimated from bytes")
    assert doctor.training_tokens(config | {"cutoff_len": 10}) == (10, "estimated from bytes")
    (workplace / "data/audit.json").write_text(
        json.dumps({"datasets": {"a_train": {"n": 1, "tokens": {"mean": 12.5}}}})
    )
    assert doctor.training_tokens(config) == (12.5, "counted by the audit")
    assert doctor.training_tokens(config | {"dataset": "b_train"}) is None
    published = doctor.training_tokens(config | {"dataset": "cmtmedqa_train,webmedqa_train"})
    assert published == ((68_023 + 50_570) * cost.TOKENS_A_RECORD, "the paper's records, not converted yet")


# ---- the environment -------------------------------------------------------------------------------------------------
def test_packages_against_constraints(tmp_path, monkeypatch):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nPyYAML==1.0\norjson==0.1 ; python_version < '3'\nnot-installed==1\npackaging>=1\n")
    assert [line.split()[0] for line in machine.differing_packages(constraints)] == ["PyYAML"]
    assert machine.differing_packages() == [] and machine.missing_packages() == []
    wanted = ["no-such-package>=1", "torch>=2", "no-such-extra; extra == 'dev'"]
    monkeypatch.setattr(machine.metadata, "requires", lambda _: wanted)
    assert machine.missing_packages() == ["no-such-package"]


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        ("580.65.06", "13.0", None), ("570.1", "13.0", "older than 580, which torch's CUDA 13.0 needs; update the driver, or install torch for an older CUDA: `rm -rf .venv; UV_TORCH_BACKEND=cu126 make setup`"), ("535.104", "12.8", None),
        ("515.1", "12.8", "older than 525"), ("580.1", None, "built without CUDA"), ("580.1", "99.0", None),
    ],
)  # fmt: skip
def test_drivers(monkeypatch, driver, cuda, problem):
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.11.0", cuda))
    said = machine.driver_problem(driver)
    assert said is None if problem is None else problem in said


def test_every_extra_of_pyproject_is_known_by_its_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, (_, extra, _) in preflight.EXTRAS.items():
        assert any(line.startswith(package) for line in extras[extra])


# ---- doctor ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def experiment(workplace, model, monkeypatch):
    """An experiment over the workplace's data, with nothing wrong."""
    folder = workplace / "factory_configs/x"
    folder.mkdir(parents=True)
    config = train_config(Path(), dataset_dir="data", output_dir="saves/x", model_name_or_path=model)
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    (folder / "chat.yaml").write_text(yaml.safe_dump({"model_name_or_path": model, "template": "qwen"}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    return workplace


def findings(capsys, *words: str) -> tuple[int, dict[str, dict]]:
    status = cli.main(["doctor", *words, "--json"])
    return status, {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_all_well_exits_0(experiment, capsys):
    assert cli.main(["doctor", "x"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "unknown"}
    assert any("1 datasets, 1 records, every sha256" in line for line in lines)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "a_train.jsonl").unlink(), "which isn't there"),
        (lambda data: (data / "a_train.jsonl").write_text("{}\n"), "cut or changed"),
        (lambda data: (data / "a_train.jsonl").write_bytes((data / "a_train.jsonl").read_bytes().replace(b"i", b"j", 1)),
         "cut or changed"),
        (lambda data: (data / "dataset_info.json").unlink(), "no data/dataset_info.json"),
        (lambda data: (data / "dataset_info.json").write_text("{}"), "no dataset 'a_train'"),
        (lambda data: (data / "manifest.json").write_text('{"datasets": {}}'), "not what manifest.json says"),
    ],
)  # fmt: skip
def test_data_that_is_not_whole(experiment, capsys, damage, message):
    damage(experiment / "data")
    status, found = findings(capsys, "x")
    data = found["data"]
    assert status == 1 and data["status"] == "fail" and message in data["detail"] and data["step"]


def test_data_that_only_waits_for_its_conversion_is_no_failure(experiment, capsys):
    """`make download`, then doctor, as the README says: `make train` converts what was downloaded."""
    config = experiment / "factory_configs/x/train.yaml"
    config.write_text(config.read_text().replace("a_train", "webmedqa_train"))
    (experiment / "data/dataset_info.json").unlink()
    status, found = findings(capsys, "x")
    assert (status, found["data"]["status"]) == (1, "fail") and "`make download`" in found["data"]["step"]
    raw = load_datasets()["webmedqa_train"]
    path = experiment / "data/raw" / raw.corpus.name / raw.files[0]
    path.parent.mkdir(parents=True)
    path.write_text("x")
    status, found = findings(capsys, "x")
    assert (status, found["data"]["status"]) == (0, "warn") and "`make train` makes it" in found["data"]["step"]


def test_data_of_ones_own_is_said(experiment, capsys):
    (experiment / "data/manifest.json").unlink()
    status, found = findings(capsys, "x")
    assert status == 0 and "your own: not converted here" in found["data"]["detail"]


def test_days_are_a_range(experiment, model, monkeypatch, capsys):
    path = experiment / "factory_configs/x/train.yaml"
    config = yaml.safe_load(path.read_text()) | {"max_steps": -1, "bf16": True, "use_cpu": False}
    path.write_text(yaml.safe_dump(config))
    fake_gpus(experiment, monkeypatch, A10)
    _, found = findings(capsys, "x")
    assert re.match(r"[\d.]+ to [\d.]+ days on 1 x NVIDIA A10, estimated", found["days"]["detail"])


@pytest.mark.parametrize(
    ("transformers", "flash_attn", "status"),
    [("5.6.0", "2.8.3", "fail"), ("5.6.0", None, "ok"), ("5.5.4", "2.8.3", "ok")],
)
def test_the_pair_whose_attention_fails_is_refused(monkeypatch, transformers, flash_attn, status):
    monkeypatch.setattr(doctor.hardware, "installed", {"transformers": transformers, "flash-attn": flash_attn}.get)
    assert doctor.check_attention().status == status


def test_the_environment_alone_and_an_unknown_experiment(experiment, capsys):
    status, found = findings(capsys)
    assert status == 0 and {"python", "packages", "attention", "torch", "device", "disk", *preflight.EXTRAS} == set(
        found
    )
    assert cli.main(["doctor", "y"]) == 2
    assert capsys.readouterr().err == "medasst doctor: error: no experiment 'y' in factory_configs; there are: x\n"


def test_every_rendered_experiment_can_be_judged(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")  # ModelScope's client tries again and again
    for folder in sorted(path.parent for path in (ROOT / "factory_configs").glob("*/chat.yaml")):
        found = {check.what: check for check in doctor.check_experiment(doctor.load_configs(folder.name))}
        assert {"model", "device", "memory", "disk"} <= set(found)
        assert all(check.step for check in found.values() if check.status == "fail")
