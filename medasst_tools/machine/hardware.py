"""What this machine has, found without importing torch: GPUs and driver, memory, disk, packages against constraints.txt."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.files import PROJECT_ROOT

CONSTRAINTS = PROJECT_ROOT / "constraints.txt"
# The oldest driver that a CUDA version's programs run on (NVIDIA's table of minor-version compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


class Gpu(NamedTuple):
    """One card as nvidia-smi lists it; memory in bytes."""

    name: str
    memory: int
    driver: str


def gpus() -> list[Gpu]:
    """Return the NVIDIA cards that CUDA_VISIBLE_DEVICES leaves; [] without nvidia-smi or without a card."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if listed.returncode != 0:
        return []
    rows = [
        [field.strip() for field in line.split(",")] for line in listed.stdout.splitlines() if line.count(",") == 3
    ]
    cards = [(uuid, Gpu(name, _mebibytes(memory), driver)) for name, memory, driver, uuid in rows]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [card for _, card in cards]
    kept = []
    for word in visible.split(","):  # CUDA stops at the first that isn't there
        found = [
            card
            for place, (uuid, card) in enumerate(cards)
            if word.strip() == str(place) or (word.strip() and uuid.startswith(word.strip()))
        ]
        if not found:
            break
        kept += found[:1]
    return kept


def _mebibytes(text: str) -> int:
    return int(text) << 20 if text.isdecimal() else 0


def torch_build() -> tuple[str, str | None]:
    """Return torch's version and the CUDA version that it was built for (None: without CUDA), read from its files."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda: Optional\[str\] = '([^']+)'", text, re.MULTILINE)
    return version.group(1) if version else "", cuda.group(1) if cuda else None


def driver_problem(driver: str, cuda: str | None) -> str | None:
    """Say why torch's CUDA build doesn't run on this driver, None if it does."""
    if cuda is None:
        return "this torch was built without CUDA; install the ordinary build: `make setup` in a fresh .venv"
    major, oldest = driver.split(".")[0], OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest and major.isdecimal() and int(major) < oldest:
        return f"driver {driver} is older than {oldest}, which torch's CUDA {cuda} needs; update the driver, or install torch for an older CUDA: `rm -rf .venv; UV_TORCH_BACKEND=cu126 make setup` (docs/install.md)"
    return None


def free_disk(path: Path) -> int:
    """Return the bytes free where `path` is or would be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def installed(package: str) -> str | None:
    """Return an installed package's version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def differing_packages(constraints: Path = CONSTRAINTS) -> list[str]:
    """Return a line for each package that constraints.txt pins, that is installed, and in another version."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    there: dict[str, str] = {}
    for package in metadata.distributions():  # the first on the path counts: setuptools puts copies of its own behind
        there.setdefault(canonicalize_name(package.metadata["Name"]), package.version)
    differing = []
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pin = Requirement(line)
        version = there.get(canonicalize_name(pin.name))
        if version and (pin.marker is None or pin.marker.evaluate()) and not pin.specifier.contains(version, True):
            differing.append(f"{pin.name} {version} ({pin.specifier})")
    return differing


def missing_packages() -> list[str]:
    """Return this project's own dependencies that aren't installed."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires("medasst-tools") or ()]
    return [r.name for r in wanted if (r.marker is None or r.marker.evaluate()) and installed(r.name) is None]


PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "medasst-tools")


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
        described = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        described = ""
    return described or "unknown"


def visible_gpus() -> list[str]:
    """Return the names under which CUDA_VISIBLE_DEVICES may give each card to a process."""
    count = len(gpus())
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [name.strip() for name in names[:count]]
