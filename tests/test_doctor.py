"""`medasst doctor` and the checks before a training: a table of situations and the line that each gives; hubs are real servers."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_training_cost import QWEN2_7B

from medasst_tools import cli
from medasst_tools.errors import UserError
from medasst_tools.files import sha256_of
from medasst_tools.machine import doctor, preflight
from medasst_tools.machine import hardware as machine
from medasst_tools.machine import hub as hub_models

CONFIG = json.dumps(QWEN2_7B).encode()


# ---- a hub -----------------------------------------------------------------------------------------------------------
class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for both hubs as they do: by repository name; `closed` is gated, and opens to the token `good`."""

    def do_GET(self):  # noqa: N802
        path, token = self.path, self.headers.get("Authorization", "")
        error, status = None, 200
        if "absent" in path:  # Hugging Face says 401 to strangers, so as not to tell what is private
            status, error = (404, "RepoNotFound") if path.startswith("/api/v1") else (401, "RepoNotFound")
        elif "closed" in path and token != "Bearer good":
            status, error = (403 if token else 401), "GatedRepo"
        elif "notamodel" in path:
            status, error = 404, "EntryNotFound"
        elif "broken" in path:
            status = 500
        body = CONFIG if status == 200 else b'{"Code": 1, "Message": "no"}'
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


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


HF, MODELSCOPE = {"HF_HUB_OFFLINE": "0"}, {"USE_MODELSCOPE_HUB": "1"}
# model, environment beside the endpoint, what the one line says
HUB_SITUATIONS = [
    ("owner/absent", HF, "Hugging Face has no model 'owner/absent'; check the id's spelling"),
    ("owner/closed", HF, "owner/closed is gated and there is no token; accept its terms at"),
    ("owner/closed", HF | {"HF_TOKEN": "bad"}, "owner/closed is gated and your token has no access; ask for it at"),
    ("owner/notamodel", HF, "owner/notamodel has no config.json"),
    ("owner/open", {"HF_HUB_OFFLINE": "1"}, "isn't whole in the cache and HF_HUB_OFFLINE is set"),
    ("owner/absent", MODELSCOPE, "ModelScope has no model 'owner/absent'; check the id's spelling"),
    ("owner/closed", MODELSCOPE, "then set MODELSCOPE_API_TOKEN"),
    ("owner/closed", MODELSCOPE | {"MODELSCOPE_API_TOKEN": "bad"}, "owner/closed is gated and your token has no access"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "variables", "message"), HUB_SITUATIONS)
def test_a_model_that_cannot_be_had_is_one_line_before_training(workplace, hub, model, variables, message):
    """Through the command, whose clients read their endpoints when they are imported."""
    (workplace / "train.yaml").write_text(yaml.safe_dump(train_config(workplace, model_name_or_path=model)))
    done = run_medasst(workplace, hub, variables, "train", "train.yaml")
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert done.stdout == "" and not (workplace / "saves").exists()


def run_medasst(workplace: Path, hub: str, variables: dict, *words: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_", "USE_MODEL"))}
    homes = {
        "HF_HOME": str(workplace / "hf"),
        "MODELSCOPE_CACHE": str(workplace / "ms"),
        "MODELSCOPE_HOME": str(workplace / "ms"),
    }
    return subprocess.run(
        [sys.executable, "-m", "medasst_tools.cli", *words], cwd=workplace, capture_output=True, text=True, check=False,
        env=kept | {"HF_ENDPOINT": hub, "MODELSCOPE_DOMAIN": hub, "PYTHONPATH": str(ROOT)} | homes | variables,
    )  # fmt: skip


@pytest.mark.parametrize("variables", [HF, HF | {"HF_TOKEN": "good"}, MODELSCOPE])
def test_a_model_that_the_hub_has_passes(workplace, hub, variables):
    """Memory is what stops Qwen2-7B on a CPU here, and the hub's own config.json said how large it is."""
    model = "owner/closed" if "HF_TOKEN" in variables else "owner/open"
    config = train_config(workplace, model_name_or_path=model, per_device_train_batch_size=1 << 20)
    (workplace / "train.yaml").write_text(yaml.safe_dump(config))
    done = run_medasst(workplace, hub, variables, "train", "train.yaml")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "of memory needed" in done.stderr and "lower per_device_train_batch_size or cutoff_len" in done.stderr


@pytest.mark.parametrize("variables", [HF, MODELSCOPE])
def test_an_unreachable_or_broken_hub_is_unknown_not_a_crash(workplace, hub, closed_port, variables):
    code = (
        "from medasst_tools.machine import hub as h; print(*h.locate('owner/broken')[:2]); print(*h.reachable()[:2])"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_"))}
    for address, expected in ((hub, ("answers 500", "answers")), (closed_port, ("is unreachable", "is unreachable"))):
        env = kept | {
            "HF_ENDPOINT": address,
            "MODELSCOPE_DOMAIN": address,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(workplace),
        }
        env |= {"MODELSCOPE_HOME": str(workplace), "MODELSCOPE_CACHE": str(workplace)} | variables
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        model, itself = done.stdout.splitlines()
        assert model.startswith("unknown" if address == hub else "fail") and expected[0] in model and done.stderr == ""
        assert itself.startswith("ok" if address == hub else "unknown") and expected[1] in itself


# ---- local models ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("files", "status", "detail"),
    [
        ({"config.json": "{}", "model.safetensors": ""}, "ok", "is there"),
        ({"model.safetensors": ""}, "fail", "config.json is missing"),
        ({"config.json": "{", "model.safetensors": ""}, "fail", "config.json is damaged"),
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
    located = hub_models.locate(str(tmp_path))
    assert located.status == status and detail in located.detail


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
def test_a_model_in_the_cache_needs_no_hub(workplace, monkeypatch, modelscope):
    from huggingface_hub import constants

    monkeypatch.setenv("USE_MODELSCOPE_HUB", str(int(modelscope)))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(workplace / "ms"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(workplace / "hf"))
    if modelscope:
        folder = workplace / "ms/models/owner--name/snapshots/master"
    else:
        repo = workplace / "hf/models--owner--name"
        folder = repo / "snapshots/0123456789abcdef0123456789abcdef01234567"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(folder.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").touch()
    located = hub_models.locate("owner/name")
    assert located.status == "ok" and "cache" in located.detail and located.config == QWEN2_7B


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
        ({"bf16": True, "per_device_train_batch_size": 4, "cutoff_len": 512}, ["NVIDIA GeForce RTX 3060, 12288, 580.1, GPU-0a"],
         "about 19.0 GiB of GPU memory needed, 12.0 GiB there; lower per_device_train_batch_size or cutoff_len, or use medasst_qlora"),
        ({"bf16": True, "finetuning_type": "full"}, [A10], "GPU memory needed, 22.5 GiB there"),
    ],
)  # fmt: skip
def test_what_stops_a_gpu_experiment(workplace, model, monkeypatch, settings, gpus, message):
    if gpus:
        fake_gpus(workplace, monkeypatch, *gpus)
    monkeypatch.setattr(machine, "OTHER_ACCELERATORS", ())
    monkeypatch.setattr(machine, "installed", lambda package: None)
    with pytest.raises(UserError) as error:
        preflight.require(train_config(workplace, model_name_or_path=model, use_cpu=False, **settings))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_papers_experiment_passes_on_its_card(workplace, model, monkeypatch, capsys):
    fake_gpus(workplace, monkeypatch, A10)
    paper = {"bf16": True, "use_cpu": False, "per_device_train_batch_size": 4, "cutoff_len": 512}
    preflight.require(train_config(workplace, model_name_or_path=model, **paper))
    assert capsys.readouterr().out == ""


def test_another_accelerator_is_unknown_not_wrong(workplace, monkeypatch):
    monkeypatch.setattr(machine, "OTHER_ACCELERATORS", (str(workplace),))
    check = preflight.check_device(train_config(workplace, use_cpu=False, bf16=True), [])
    assert check.status == "unknown" and str(workplace) in check.detail


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
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    with pytest.raises(UserError, match=r"about 0\.\d GiB to write at .*saves/x, 100 MiB free; make room"):
        preflight.require(train_config(workplace, model_name_or_path=model))


def test_an_adapter_that_was_never_trained(workplace, model):
    use = {"model_name_or_path": model, "adapter_name_or_path": "saves/never", "template": "qwen", "use_cpu": True}
    with pytest.raises(UserError, match=r"no trained adapter in saves/never; `make train EXPERIMENT=never` makes it"):
        preflight.require(use)


def test_training_tokens(workplace):
    config = train_config(workplace)
    size = (workplace / "data/a_train.jsonl").stat().st_size
    assert preflight.training_tokens(config) == (1, size, False)  # no tokenizer gives more tokens than bytes
    assert preflight.training_tokens(config | {"cutoff_len": 10}) == (1, 10, False)
    (workplace / "data/audit.json").write_text(
        json.dumps({"datasets": {"a_train": {"n": 1, "tokens": {"mean": 12.5}}}})
    )
    assert preflight.training_tokens(config) == (1, 12.5, True)
    assert preflight.training_tokens(config | {"dataset": "b_train"}) is None


# ---- the environment -------------------------------------------------------------------------------------------------
def test_packages_against_constraints(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# pins\nPyYAML==1.0\norjson==0.1 ; python_version < '3'\nnot-installed==1\npackaging>=1\n")
    assert [line.split()[0] for line in machine.differing_packages(constraints)] == ["PyYAML"]
    assert machine.differing_packages() == [] and machine.missing_packages() == []


@pytest.mark.parametrize(
    ("driver", "cuda", "problem"),
    [
        ("580.65.06", "13.0", None), ("570.1", "13.0", "older than 580"), ("535.104", "12.8", None),
        ("515.1", "12.8", "older than 525"), ("580.1", None, "built without CUDA"), ("580.1", "99.0", None),
    ],
)  # fmt: skip
def test_drivers(driver, cuda, problem):
    said = machine.driver_problem(driver, cuda)
    assert said is None if problem is None else problem in said


def test_every_extra_of_pyproject_is_known_by_its_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, extra in preflight.SETUP_EXTRAS.items():
        assert any(line.startswith(package) for line in extras[extra])


def test_torch_build_is_torchs_own():
    import torch

    assert machine.torch_build() == (torch.__version__, torch.version.cuda)


# ---- doctor ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def experiment(workplace, model, monkeypatch):
    """An experiment over the workplace's data, with nothing wrong."""
    folder = workplace / "factory_configs/x"
    folder.mkdir(parents=True)
    config = train_config(Path(), dataset_dir="data", output_dir="saves/x", model_name_or_path=model)
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    (folder / "chat.yaml").write_text(yaml.safe_dump({"model_name_or_path": model, "template": "qwen"}))
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
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
    assert any(line.startswith("unknown hours") for line in lines)  # nothing was measured in this folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: (data / "a_train.jsonl").unlink(), "missing, cut or changed"),
        (lambda data: (data / "a_train.jsonl").write_text("{}\n"), "missing, cut or changed"),
        (lambda data: (data / "a_train.jsonl").write_bytes((data / "a_train.jsonl").read_bytes().replace(b"i", b"j", 1)),
         "missing, cut or changed"),
        (lambda data: (data / "manifest.json").unlink(), "its conversion didn't end"),
        (lambda data: (data / "manifest.json").write_text('{"datasets": {}}'), "lacks a_train"),
    ],
)  # fmt: skip
def test_data_that_is_not_whole(experiment, capsys, damage, message):
    damage(experiment / "data")
    status, found = findings(capsys, "x")
    assert (
        status == 1
        and found["data"]["status"] == "fail"
        and message in found["data"]["detail"]
        and found["data"]["step"]
    )


def test_hours_from_a_run_that_was_measured_here(experiment, model, capsys):
    config = yaml.safe_load((experiment / "factory_configs/x/train.yaml").read_text())
    run = {
        "inputs": {"config": config}, "tokens": 60, "training_seconds": 100.0, "steps": 1, "hardware": doctor.hardware(),
    }  # fmt: skip
    (experiment / "saves/earlier").mkdir(parents=True)
    (experiment / "saves/earlier/run.json").write_text(json.dumps(run))
    (experiment / "data/audit.json").write_text(
        json.dumps({"datasets": {"a_train": {"n": 1, "tokens": {"mean": 60}}}})
    )
    _, found = findings(capsys, "x")
    assert found["hours"]["status"] == "ok" and found["hours"]["detail"].startswith("1.7 minutes (60 tokens")


def test_the_environment_alone_and_an_unknown_experiment(experiment, capsys):
    status, found = findings(capsys)
    assert status == 0 and {"python", "packages", "gpu", "disk", "hub", "fonts", *preflight.EXTRAS} == set(found)
    assert cli.main(["doctor", "y"]) == 2
    assert capsys.readouterr().err == "medasst doctor: error: no experiment 'y' in factory_configs; there are: x\n"


def test_every_rendered_experiment_can_be_judged(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder in sorted(path.parent for path in (ROOT / "factory_configs").glob("*/chat.yaml")):
        status, found = findings(capsys, folder.name)
        assert status in (0, 1) and {"model", "device", "memory", "disk"} <= set(found)
        assert all(finding["step"] for finding in found.values() if finding["status"] == "fail")
