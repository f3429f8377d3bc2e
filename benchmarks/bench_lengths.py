"""How long the corpora's records are in Qwen2's own tokens: what cutoff_len takes away, what padding costs, what three epochs are.

Run: `make bench-lengths EXTRAS=real RAW=data/raw`, RAW laid out as `medasst convert` reads it

Records are converted and tokenised as training does it, with the template, system prompt and cutoff_len of
factory_configs/medasst/train.yaml; the tokenizer is Qwen2's, out of a package (tests/families.py). A batch is four records
drawn at random, filled to its longest, rounded up to eight, as LLaMA-Factory's collator does. The mixture has each corpus in
the paper's number. `medasst doctor` takes its constants from the last row (medasst_tools/machine/cost.py).
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
SEED, BATCH, BATCHES, MULTIPLE, EPOCHS = 42, 4, 20_000, 8, 3


class Lengths(NamedTuple):
    """A dataset's records: tokens before and after the cut, the bytes of the file, how many the paper has."""

    whole: list[int]
    kept: list[int]
    size: int
    paper: int


def measure(raw: Path, folder: Path) -> dict[str, Lengths]:
    """Convert the corpora under `raw` and return the lengths of medasst's training sets."""
    import families

    from medasst_tools import cli
    from medasst_tools.config import load
    from medasst_tools.data.registry import load_datasets
    from medasst_tools.data.token_lengths import load_encoder, tokens_of
    from medasst_tools.provenance import dataset_names

    if cli.main(["convert", "--raw-dir", str(raw), "--out-dir", str(folder / "data"), "--max-rejects", "0.5"]):
        sys.exit(1)
    families.FAMILIES["qwen2"].write(folder / "tokenizer", False)
    config = load(ROOT / "factory_configs/medasst/train.yaml", kind="train")
    encode, found = load_encoder(str(folder / "tokenizer"), config), {}
    for name in dataset_names(config["dataset"]):
        path = folder / "data" / f"{name}.jsonl"
        lines = path.read_bytes().splitlines()
        rows = [tokens_of(orjson.loads(line), encode, config["cutoff_len"]) for line in lines]
        kept = [row["total"] - row["question"] - row["answer"] - row["history"] for row in rows]
        found[name] = Lengths([row["total"] for row in rows], kept, path.stat().st_size, load_datasets()[name].paper)
    return found


def padding(lengths: list[list[int]], weights: list[int]) -> float:
    """Return the tokens of random batches, padding included, for a useful one; a record's dataset is drawn by weight."""
    generator, useful, padded = random.Random(SEED), 0, 0
    for _ in range(BATCHES):
        batch = [generator.choice(members) for members in generator.choices(lengths, weights, k=BATCH)]
        useful += sum(batch)
        padded += BATCH * -(-max(batch) // MULTIPLE) * MULTIPLE
    return padded / useful


def row(name: str, sets: list[Lengths]) -> str:
    """Return a row of the table: of one dataset, or of several mixed in the paper's numbers."""
    papers = [one.paper for one in sets]

    def mean(value) -> float:
        return sum(value(one) * one.paper for one in sets) / sum(papers)

    kept = mean(lambda one: sum(one.kept) / len(one.kept))
    cut = mean(lambda one: sum(a > b for a, b in zip(one.whole, one.kept, strict=True)) / len(one.kept))
    size = mean(lambda one: one.size / len(one.kept))
    return (
        f"| {name} | {sum(len(one.kept) for one in sets):,} | {sum(papers):,} "
        f"| {mean(lambda one: sum(one.whole) / len(one.whole)):.0f} | {kept:.0f} | {100 * cut:.1f} "
        f"| {padding([one.kept for one in sets], papers):.2f} | {size / kept:.1f} | {EPOCHS * kept * sum(papers) / 1e6:,.0f} |"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--raw-dir", type=Path, default=ROOT / "dataset_info/samples/raw", help="the corpora (samples)"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(parser.parse_args().raw_dir, Path(folder))
    print(
        "\n| training set | records here | the paper's | tokens a record | after the cut | cut, % | padded / useful, batches of 4 "
        "| bytes a token | useful tokens of 3 epochs, millions |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, lengths in found.items():
        print(row(f"`{name}`", [lengths]))
    print(row("mixed as the paper's", [*found.values()]))


if __name__ == "__main__":
    main()
