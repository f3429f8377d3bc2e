"""Time and peak memory of each step of `make eval`, on a copy of the checkout, as a Markdown table.

Run: `make bench`, or `python benchmarks/bench_steps.py --with-setup RAW=data/raw EXAMS=data/exams` to count the
installation too and to run on other inputs. Starts of llamafactory-cli are counted, because each costs about 11 s of imports.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from conftest import copy_project, make_environment  # noqa: E402  # the tests' way to run make in a copy

STEPS = [
    ("convert", ["data"], 0),
    ("render", ["configs"], 0),
    ("tiny base, all weights", ["train", "EXPERIMENT=demo_base"], 1),
    ("LoRA", ["train", "EXPERIMENT=demo"], 1),
    ("predict, tuned", ["predict", "EXPERIMENT=demo"], 0),
    ("predict, base", ["predict", "EXPERIMENT=demo_base"], 0),
    ("exam, tuned", ["exam", "EXPERIMENT=demo"], 0),
    ("exam, base", ["exam", "EXPERIMENT=demo_base"], 0),
    ("score both, report", ["eval"], 0),
]


def main() -> None:
    """Run every step once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with-setup", action="store_true", help="install into a fresh .venv first, and count it")
    parser.add_argument("inputs", nargs="*", metavar="RAW=DIR EXAMS=DIR", help="other inputs than the samples")
    args = parser.parse_args()
    words = [f"{key}={Path(value).resolve()}" for key, value in (word.split("=", 1) for word in args.inputs)]
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(Path(folder) / "project")
        steps = STEPS
        if args.with_setup:
            subprocess.run(["rm", "-rf", str(project / ".venv")], check=True)
            steps = [("install", ["setup"], 0), *STEPS]
        print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
              f"llamafactory {metadata.version('llamafactory')}, torch {metadata.version('torch')}, "
              f"inputs: {' '.join(args.inputs) or 'samples'}\n")  # fmt: skip
        print("| step | seconds | peak memory, MB | starts of llamafactory-cli |\n|---|---:|---:|---:|", flush=True)
        rows = [run_step(project, name, [*target, *words], starts) for name, target, starts in steps]
    seconds, memory, starts = sum(row[0] for row in rows), max(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"| **all** | **{seconds:.0f}** | **{memory:.0f}** | **{starts}** |")


def run_step(project: Path, name: str, words: list[str], starts: int) -> tuple[float, float, int]:
    """Run one make target and print its row; (seconds, peak resident MB of its largest process, starts)."""
    began = time.monotonic()
    # a child of its own, because the kernel keeps the peak of all finished children together
    code = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode;"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr); sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "make", *words],
        cwd=project, env=make_environment(project), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        sys.exit(f"make {' '.join(words)} ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    seconds, memory = time.monotonic() - began, int(run.stderr.splitlines()[-1]) / 1024
    print(f"| {name} | {seconds:.1f} | {memory:.0f} | {starts or ''} |", flush=True)
    return seconds, memory, starts


if __name__ == "__main__":
    main()
