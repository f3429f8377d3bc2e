"""Prediction in batches of like length against LLaMA-Factory's own order and batch, on the same model and test sets.

Run: `make bench-predict`, or `make train RAW=data/raw` first and `make bench-predict RAW=data/raw` for other test sets. Both
are timed with their start; the answers are compared one by one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

BIN = Path(sys.executable).parent


def main() -> None:
    """Predict each way once and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="factory_configs/demo/predict.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "llamafactory-cli train predict.yaml": [BIN / "llamafactory-cli", "train"],
            "medasst predict": [BIN / "medasst", "predict"],
            "medasst predict --workers 2": [BIN / "medasst", "predict", "--workers", "2"],
        }
        rows = [
            predict(name, command, args, Path(folder) / str(at)) for at, (name, command) in enumerate(ways.items())
        ]
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
          f"llamafactory {metadata.version('llamafactory')}, torch {metadata.version('torch')}\n")  # fmt: skip
    print(f"| {len(rows[0][2]):,} records | seconds | faster | other answers |\n|---|---:|---:|---:|")
    for name, seconds, answers in rows:
        others = sum(ours != theirs for ours, theirs in zip(answers, rows[0][2], strict=True))
        print(f"| {name} | {seconds:.1f} | {rows[0][1] / seconds:.2f}x | {others} |")


def predict(name: str, command: list, args: argparse.Namespace, out: Path) -> tuple[str, float, list[str]]:
    """Run one way; (its name, seconds, the answers)."""
    began = time.monotonic()
    words = [*map(str, command), args.config, *args.overrides, f"output_dir={out}"]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{name} ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    lines = (out / "generated_predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return name, time.monotonic() - began, [json.loads(line)["predict"] for line in lines]


if __name__ == "__main__":
    main()
