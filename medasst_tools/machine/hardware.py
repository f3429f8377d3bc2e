"""What this machine has, found without importing torch: GPUs and driver, memory, disk, packages against constraints.txt."""

import importlib.util
import os
import platform
import runpy
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.files import PROJECT_ROOT

CONSTRAINTS = PROJECT_ROOT / "constraints.txt"
# The oldest driver that a CUDA version's programs run on (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "medasst-tools")


class Gpu(NamedTuple):
    """One card as nvidia-smi lists it; memory in bytes. visible_as: its name in CUDA_VISIBLE_DEVICES."""

    name: str
    memory: int
    driver: str
    visible_as: str = "0"


def gpus() -> list[Gpu]:
    """Return the NVIDIA cards that CUDA_VISIBLE_DEVICES leaves; [] without nvidia-smi or without a card."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.count(",") == 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(rows)))))
    cards = []
    for word in map(str.strip, visible.split(",")):
        found = [row for place, row in enumerate(rows) if word and (word == str(place) or row[3].startswith(word))]
        if not found:  # CUDA stops at the first that isn't there
            break
        name, memory, driver, _ = found[0]
        cards.append(Gpu(name, int(memory) << 20 if memory.isdecimal() else 0, driver, word))
    return cards


def torch_build() -> tuple[str, str | None]:
    """Return torch's version and the CUDA version that it was built for (None: without CUDA), read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    facts = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return facts["__version__"], facts["cuda"]


def driver_problem(driver: str) -> str | None:
    """Say why torch's CUDA build doesn't run on this driver, None if it does."""
    cuda = torch_build()[1]
    if cuda is None:
        return "this torch was built without CUDA; install the ordinary build: `make setup` in a fresh .venv"
    major, oldest = driver.split(".")[0], OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest and major.isdecimal() and int(major) < oldest:
        return f"driver {driver} is older than {oldest}, which torch's CUDA {cuda} needs; update the driver, or install torch for an older CUDA: `rm -rf .venv; UV_TORCH_BACKEND=cu126 make setup` (docs/install.md)"
    return None


def free_disk(path: Path) -> int:
    """Return the bytes free where `path` is or would be made."""
    path = path.absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def installed(package: str) -> str | None:
    """Return an installed package's version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def differing_packages(constraints: Path = CONSTRAINTS) -> list[str]:
    """Return a line for each package that constraints.txt pins, that is installed, and in another version."""
    from packaging.requirements import Requirement

    lines = [
        line for line in constraints.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
    ]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    there = {pin.name: (installed(pin.name), pin.specifier) for pin in pins}
    return [f"{name} {has} ({pin})" for name, (has, pin) in there.items() if has and not pin.contains(has, True)]


def missing_packages() -> list[str]:
    """Return this project's own dependencies that aren't installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("medasst-tools") or ()]
    return [r.name for r in wanted if (r.marker is None or r.marker.evaluate()) and installed(r.name) is None]


def made_with() -> dict[str, Any]:
    """Return what else something was made with: package versions, Python, git commit, hardware; for the record only."""
    return {
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": commit(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": [card.name for card in gpus()]},
    }


def commit() -> str:
    """Return the checkout's commit, "-dirty" with changes; "unknown" outside a checkout or without git."""
    words = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
