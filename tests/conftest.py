"""What several test modules share: the bundled samples, the real text where it is at hand, and one trained tiny model."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers, each with as many threads as cores, wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test means a hub, and a wrong path should fail at once

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "dataset_info" / "samples"
REAL_DATA = Path(os.environ.get("MEDASST_REAL_DATA", ROOT.parent / "shared" / "data"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Give one of `make test`'s workers all that reads the outcome of `make eval`, first, for it takes longest; else a file at a time.

    What a file's fixtures make, and the evaluation, should be made once.
    """
    for item in items:
        reads = "evaluated" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("evaluated" if reads else item.path.name))
    items.sort(key=lambda item: "evaluated" not in item.fixturenames)


def lines_of(folder: Path) -> set[str]:
    """Return every line of text under a folder, in whatever format: whole files, dirt included."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".zip"]
    return {line for path in files for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line}


def sample_lines() -> set[str]:
    """Return every line of the bundled samples."""
    return lines_of(SAMPLES)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `raw/` and `exams/` of real text; its tests are marked `real_data`."""
    if not (REAL_DATA / "raw").is_dir():
        pytest.skip(f"no real text at {REAL_DATA}; set MEDASST_REAL_DATA to the folder that holds raw/ and exams/")
    return REAL_DATA


def copy_project(target: Path, change: Callable[[Path], None] = lambda folder: None) -> Path:
    """Copy the working tree (what git tracks or would track) to `target`, a checkout of its own, with this environment.

    change: what is done to it before it is committed.
    """
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    venv = target / ".venv"  # its own, as far as make sees
    venv.mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith("."):
            (venv / part.name).symlink_to(part)
    change(target)
    git = ["git", "-C", str(target), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "copy"], check=True)
    return target


def make_environment(project: Path) -> dict[str, str]:
    """Return the environment in which make in a copy runs the copy's own medasst_tools, not the installed tree's."""
    # `make test ARGS=...` hands its variables to every make below it, by the environment too
    names = "MAKEFLAGS MAKEOVERRIDES MAKELEVEL MFLAGS ARGS EXPERIMENT EXPERIMENTS RAW EXAMS SHOTS BACKEND API_BASE RESTART V"
    of_the_outer_make = names.split()
    kept = {key: value for key, value in os.environ.items() if key not in of_the_outer_make}
    return kept | {"PYTHONPATH": str(project), "PYTHON": sys.executable}


def run_make(project: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run make in a copy; the result has its whole output in stdout, and a failure shows the end of it."""
    run = subprocess.run(
        ["make", *words], cwd=project, env=make_environment(project), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if check and run.returncode != 0:
        pytest.fail(f"make {' '.join(words)} ended with {run.returncode}:\n{run.stdout[-6000:]}", pytrace=False)
    return run


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """A copy of the project for the tests that run make; what `evaluated` makes in it is there for all of them.

    Its demo makes a third of the steps, its base half of them: enough to be told from each other.
    """
    return copy_project(tmp_path_factory.mktemp("project"), fewer_steps)


def fewer_steps(folder: Path) -> None:
    path = folder / "factory_configs/experiments.yaml"
    text = path.read_text(encoding="utf-8")
    for many, few in (("max_steps: [600,", "max_steps: [200,"), ("max_steps: [150,", "max_steps: [75,")):
        assert text.count(many) == 1
        text = text.replace(many, few)
    path.write_text(text, encoding="utf-8")
    words = [sys.executable, "-m", "medasst_tools.cli", "render"]
    subprocess.run(words, cwd=folder, env=make_environment(folder), check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def evaluated(project) -> dict[str, str]:
    """`make eval` in the copy, killed once in the middle of training; {"killed": output, "eval": output}."""
    log = project.parent / "killed.log"
    with log.open("w") as output:
        killed = subprocess.Popen(
            ["make", "train"], cwd=project, env=make_environment(project), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while killed.poll() is None and not list(project.glob("saves/demo_base/checkpoint-*/trainer_state.json")):
            time.sleep(0.5)
        if killed.poll() is not None:
            pytest.fail(f"make train ended before its first checkpoint:\n{log.read_text()[-6000:]}", pytrace=False)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    return {"killed": log.read_text(), "eval": run_make(project, "eval").stdout}


@pytest.fixture(scope="session")
def forkserver():
    """A process that imports LLaMA-Factory once: each child that it forks starts at once, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llamafactory.train.tuner"])
    return context


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A LoRA train.yaml of 45 steps on a very small model; dropout, so that the random state matters too."""
    from medasst_tools import cli
    from medasst_tools.training.tiny_model import build_tiny_model, training_documents

    folder = tmp_path_factory.mktemp("resume")
    data = folder / "data"
    words = ["convert", "--raw-dir", str(SAMPLES / "raw"), "--out-dir", str(data), "--max-rejects", "0.1"]
    assert cli.main(words) == 0
    build_tiny_model(list(training_documents(data)), folder / "base", vocab_size=1024, hidden_size=32, layers=1)
    config = yaml.safe_load((SAMPLES.parents[1] / "factory_configs/demo/train.yaml").read_text(encoding="utf-8"))
    config |= {
        "model_name_or_path": str(folder / "base"), "dataset_dir": str(data), "output_dir": str(folder / "saves/run"),
        "dataset": "cmtmedqa_train,webmedqa_train", "cutoff_len": 64, "lora_dropout": 0.1, "per_device_train_batch_size": 2,
        "max_steps": 45, "save_steps": 3, "logging_steps": 3, "save_total_limit": 2, "warmup_steps": 2, "plot_loss": False,
        "preprocessing_num_workers": None,
    }  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    return path
