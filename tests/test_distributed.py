"""Several processes and machines: launches are checked, machines go on from one step, and two of them really train."""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from chat_browser import free_port
from conftest import copy_project, make_environment, run_make
from safetensors.numpy import load_file

from medasst_tools.errors import UserError
from medasst_tools.files import sha256_of
from medasst_tools.machine import hardware
from medasst_tools.training import launch
from medasst_tools.training.launch import Launch, agree_on_step, read_launch, written

CPU = {"use_cpu": True}
TWO = {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "NPROC_PER_NODE": "1"}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(launch.hardware, "gpus", list)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 0, 1, None)),
        ({"NNODES": "", "NODE_RANK": " "}, (1, 0, 1, None)),
        ({"NPROC_PER_NODE": "2"}, (1, 0, 2, None)),
        (TWO, (2, 0, 2, ("10.0.0.1", 29500))),
        (TWO | {"NODE_RANK": "1", "NPROC_PER_NODE": "4"}, (2, 1, 8, ("10.0.0.1", 29500))),
        ({"RDZV_ID": "job", "NPROC_PER_NODE": "2", "MAX_RESTARTS": "3"}, (1, 0, 2, None)),
        (TWO | {"RDZV_ID": "job", "MIN_NNODES": "1", "MAX_NNODES": "2", "NODE_RANK": "1"}, (2, 1, None, None)),
    ],
)
def test_launches(variables, expected):
    read = read_launch(variables, CPU)
    assert (read.nodes, read.rank, read.processes, read.address) == expected
    distributed = any(variables.get(key, "").strip() for key in ("NNODES", "NPROC_PER_NODE", "RDZV_ID"))
    assert (read.environment.get("FORCE_TORCHRUN") == "1") is distributed
    assert (read.environment.get("ACCELERATE_TORCH_DEVICE") == "cpu") is distributed
    assert read.settings == ({"ddp_timeout": 90} if "RDZV_ID" in variables else {})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "two"}, "NNODES is 'two', must be a whole number, 1 or more"),
        ({"NNODES": "0"}, "NNODES is '0'"),
        ({"NPROC_PER_NODE": "-1"}, "NPROC_PER_NODE is '-1'"),
        (TWO | {"NODE_RANK": "2"}, "NODE_RANK is 2, but there are 2 nodes: they are numbered from 0 to 1"),
        ({"NNODES": "2", "NPROC_PER_NODE": "1"}, "2 nodes need MASTER_ADDR and MASTER_PORT"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NPROC_PER_NODE": "1"}, "2 nodes need MASTER_PORT"),
        ({key: value for key, value in TWO.items() if key != "NPROC_PER_NODE"}, "NPROC_PER_NODE isn't set"),
        (TWO | {"RANK": "1"}, "RANK=1 is an old launcher's name that LLaMA-Factory doesn't read: say NODE_RANK=1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "NODE_RANK": "0"}, "WORLD_SIZE=2 is an old launcher's name"),
    ],
)
def test_what_would_hang_is_named(variables, message):
    with pytest.raises(UserError) as error:
        read_launch(variables, CPU)
    assert message in str(error.value)


def test_on_a_machine_with_four_gpus(monkeypatch):
    """A config for the CPU stays there, in one process; NPROC_PER_NODE=1 takes one card."""
    cards = [hardware.Gpu("NVIDIA A10", 24 << 30, "580.1")] * 4
    monkeypatch.setattr(launch.hardware, "gpus", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert read_launch({}, CPU) == Launch(environment={"CUDA_VISIBLE_DEVICES": ""})
    assert read_launch({}, {}) == Launch(processes=4)
    assert read_launch({"NPROC_PER_NODE": "1"}, {}) == Launch(environment={"CUDA_VISIBLE_DEVICES": "0"})
    two = {key: value for key, value in TWO.items() if key != "NPROC_PER_NODE"}
    assert read_launch(two, {}).processes == 8  # its cards are counted
    with pytest.raises(UserError, match="NPROC_PER_NODE isn't set"):
        read_launch(two, CPU)


def test_the_launched_config_is_in_a_file_whose_name_torchrun_can_take(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path / "a space"))
    config = {"output_dir": str(tmp_path / "my model"), "template": "qwen", "learning_rate": 1e-4}
    with written(config) as word:
        assert " " not in word and yaml.safe_load(Path(word).read_text(encoding="utf-8")) == config
    assert not Path(word).exists()


@pytest.mark.parametrize(
    ("steps", "outcome"),
    [
        ([[10, 20], [10, 20]], 20),
        ([[10, 20], [10, 20, 30]], 20),
        ([[], []], None),
        ([[10, 20], []], "no checkpoint is on every node (node 0: [10, 20]; node 1: none)"),
    ],
)
def test_machines_go_on_from_the_last_step_that_all_have(steps, outcome):
    address = ("127.0.0.1", free_port())

    def node(rank: int):
        try:
            return agree_on_step(Launch(2, rank, 2, address=address), lambda: steps[rank], patience=30)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(node, (0, 1)))
    for answer in answers:
        assert answer == outcome if not isinstance(outcome, str) else outcome in answer


def test_a_machine_that_does_not_come_is_named():
    port = free_port()
    with pytest.raises(
        UserError, match=f"no common start at 127.0.0.1:{port} .*start the same command on all 2 nodes"
    ):
        agree_on_step(Launch(2, 0, 2, address=("127.0.0.1", port)), list, patience=1)


# ---- really run -----------------------------------------------------------------------------------------------------
SETTINGS = {
    "dataset": "cmtmedqa_train,webmedqa_train", "cutoff_len": 64, "max_steps": 6, "save_steps": 2, "logging_steps": 1,
    "learning_rate": 1e-3, "warmup_steps": 1, "plot_loss": "false",
}  # fmt: skip


def words_of(settings: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory, tiny_run) -> Path:
    """A checkout that all machines share, with data and a very small base, where only `make train` is left to do."""
    project = copy_project(tmp_path_factory.mktemp("cluster"))
    shutil.copytree(tiny_run.parent / "data", project / "data/demo")
    shutil.copytree(tiny_run.parent / "base", project / "saves/demo_base")
    return project


@contextlib.contextmanager
def started(project: Path, log: Path, **variables: str):
    """`medasst train` with these variables, in a group of its own that is ended with the block."""
    # the base and the data are there; make would train the demo's own base first
    arguments = variables.pop("ARGS", "").split()
    words = [str(Path(sys.executable).with_name("medasst")), "train", "factory_configs/demo/train.yaml", *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            words, cwd=project, env=make_environment(project) | variables, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Kill a make with everything below it, torchrun's workers in their own groups too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def single_process(config: dict, log: Path) -> None:
    from llamafactory.train.tuner import run_exp

    os.environ["OMP_NUM_THREADS"] = "1"
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_exp(config)


@pytest.fixture(scope="session")
def reference(forkserver, cluster, tmp_path_factory):
    """Return a function that trains one process with the same records a step: in one batch of 4, or in two of 2 added up."""
    folder = tmp_path_factory.mktemp("reference")
    config = yaml.safe_load((cluster / "factory_configs/demo/train.yaml").read_text(encoding="utf-8"))
    config |= SETTINGS | {"plot_loss": False, "dataset_dir": str(cluster / "data/demo")}
    config |= {"model_name_or_path": str(cluster / "saves/demo_base"), "preprocessing_num_workers": None}

    @functools.cache
    def train(batch: int) -> Path:
        out, log = folder / str(batch), folder / f"{batch}.log"
        more = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 4 // batch,
            "output_dir": str(out),
        }
        process = forkserver.Process(target=single_process, args=(config | more, log))
        process.start()
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
        return out

    return train


def assert_same_training(ours: Path, theirs: Path, steps: int) -> None:
    """The same losses and gradient norms at every step, and the same weights, but for the order of additions."""
    state, other = (json.loads((folder / "trainer_state.json").read_text()) for folder in (ours, theirs))
    history, expected = ([row for row in one["log_history"] if "loss" in row] for one in (state, other))
    assert [row["step"] for row in history] == list(range(1, steps + 1))
    for row, wanted in zip(history, expected, strict=False):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert row[key] == pytest.approx(wanted[key], rel=1e-3), (key, row["step"])
    weights = load_file(ours / "adapter_model.safetensors")
    for name, wanted in load_file(theirs / ("adapter_model.safetensors")).items():
        assert abs(weights[name] - wanted).max() < 1e-4, name


def two_machines(cluster: Path, logs: Path, settings: dict, stack: contextlib.ExitStack) -> list[subprocess.Popen]:
    port = str(free_port())
    return [
        stack.enter_context(
            started(
                cluster, logs / f"node{rank}.log", NNODES="2", NODE_RANK=str(rank), NPROC_PER_NODE="1",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ARGS=words_of(settings),
            )
        )
        for rank in (0, 1)
    ]  # fmt: skip


def wait_for_all(nodes: list[subprocess.Popen], logs: Path) -> str:
    for node in nodes:
        node.wait()
    said = "".join((logs / f"node{rank}.log").read_text() for rank in range(len(nodes)))
    assert [node.returncode for node in nodes] == [0] * len(nodes), said[-6000:]
    return said


@pytest.mark.end_to_end
def test_two_processes_train_as_one_does(cluster, reference, tmp_path):
    """2 records each a step, through torchrun; one process with the same 4."""
    shutil.rmtree(cluster / "saves/demo", ignore_errors=True)
    arguments = words_of(SETTINGS | {"per_device_train_batch_size": 2})
    log, port = tmp_path / "log", str(free_port())
    with started(cluster, log, NPROC_PER_NODE="2", MASTER_PORT=port, ARGS=arguments) as launched:
        folder = reference(4)  # at the same time
        assert launched.wait() == 0, log.read_text()[-6000:]
    assert "node 0 of 1, 2 process(es) each; a step takes 4 records in all" in log.read_text()
    assert_two_trained_as(folder, cluster)


def assert_two_trained_as(one: Path, cluster: Path) -> None:
    assert_same_training(cluster / "saves/demo", one, steps=6)
    run = json.loads((cluster / "saves/demo/run.json").read_text())
    assert (run["processes"], run["steps"], run["resumed_from"]) == (2, 6, [])
    states = {path.name for path in (cluster / "saves/demo/checkpoint-6").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_machines_train_as_one_process_does(cluster, reference, tmp_path):
    """Two launches on loopback, a shared folder, 2 records each a step; one process with the same 4, or twice 2."""
    shutil.rmtree(cluster / "saves/demo", ignore_errors=True)
    settings = SETTINGS | {"per_device_train_batch_size": 2}
    with contextlib.ExitStack() as stack:
        said = wait_for_all(two_machines(cluster, tmp_path, settings, stack), tmp_path)
    assert "node 1 of 2, 1 process(es) each; a step takes 4 records in all" in said
    for batch in (4, 2):
        assert_two_trained_as(reference(batch), cluster)


def wait_for_checkpoint(folder: Path, step: int, processes: list[subprocess.Popen], log: Path) -> None:
    while not (folder / f"checkpoint-{step}/trainer_state.json").is_file():
        assert all(process.poll() is None for process in processes), log.read_text()[-4000:]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_machines_killed_go_on_from_the_last_whole_checkpoint(cluster, reference, tmp_path):
    """Both killed after step 2 is saved; what is newest then is cut short."""
    saves = cluster / "saves/demo"
    shutil.rmtree(saves, ignore_errors=True)
    settings = SETTINGS | {"per_device_train_batch_size": 2}
    with contextlib.ExitStack() as stack:
        nodes = two_machines(cluster, tmp_path, settings, stack)
        wait_for_checkpoint(saves, 4, nodes, tmp_path / "node0.log")
    newest = max(saves.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    (newest / "rng_state_1.pth").unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        said = wait_for_all(two_machines(cluster, tmp_path, settings, stack), tmp_path)
    before = int(newest.name.split("-")[1]) - 2
    assert f"{newest.name} is skipped: it has 1 of 2 processes' random states" in said
    assert f"saves/demo: going on from step {before}" in said
    assert_same_training(saves, reference(4), steps=6)
    assert json.loads((saves / "run.json").read_text())["resumed_from"] == [before]


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_worker_that_dies_is_restarted_by_the_elastic_launch(cluster, reference, tmp_path):
    """Two processes on one machine; one is killed after step 2 is saved, and the launch goes on without any help."""
    saves, log = cluster / "saves/demo", tmp_path / "elastic.log"
    shutil.rmtree(saves, ignore_errors=True)
    settings = SETTINGS | {"per_device_train_batch_size": 2}
    with started(
        cluster, log, NPROC_PER_NODE="2", RDZV_ID="test", MAX_RESTARTS="3", MASTER_PORT=str(free_port()),
        ARGS=words_of(settings),
    ) as launched:  # fmt: skip
        wait_for_checkpoint(saves, 2, [launched], log)
        workers = [
            child
            for child in psutil.Process(launched.pid).children(recursive=True)
            if "RANK" in child.environ() and "launcher.py" in " ".join(child.cmdline())
        ]
        assert len(workers) == 2
        workers[1].kill()
        assert launched.wait() == 0, log.read_text()[-6000:]
    assert "Resuming training from" in (saves / "train.log").read_text(encoding="utf-8")
    assert_same_training(saves, reference(4), steps=6)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_make_train_survives_ten_random_kills(tmp_path, monkeypatch):
    """The demo through make, 200 of its 600 steps, with the whole group killed: in the start-up, or soon after a checkpoint."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    project = copy_project(tmp_path / "project")
    run_make(project, "train", "EXPERIMENT=demo_base")
    saves, arguments = project / "saves/demo", "ARGS=max_steps=200 save_steps=10"
    run_make(project, "train", arguments)
    whole = sha256_of(saves / "adapter_model.safetensors")
    saves.rename(tmp_path / "whole")
    dice, kills = random.Random(10), 0
    for after_a_checkpoint in dice.sample([True] * 5 + [False] * 5, 10):
        newest, delay = max(_steps(saves), default=0), dice.uniform(0, 0.5 if after_a_checkpoint else 25)
        with started(project, tmp_path / f"kill{kills}.log", ARGS=arguments.removeprefix("ARGS=")) as launched:
            while after_a_checkpoint and max(_steps(saves), default=0) <= newest and launched.poll() is None:
                time.sleep(0.01)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launched.wait(delay)
            kills += launched.poll() is None
    said = run_make(project, "train", arguments).stdout
    assert kills == 10
    assert re.search(r"saves/demo: going on from step \d+", said)
    assert sha256_of(saves / "adapter_model.safetensors") == whole
    run = json.loads((saves / "run.json").read_text())
    assert run["steps"] == 200 and len(run["resumed_from"]) > 4
    assert "saves/demo: up to date" in run_make(project, "train", arguments).stdout
    print(f"kills: {kills}, resumed from {run['resumed_from']}, adapter {whole[:8]}")


def _steps(folder: Path) -> list[int]:
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return [int(match[1]) for match in found if match]
