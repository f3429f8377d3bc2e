"""A tiny Qwen2 with a tokenizer of its own, so that every step runs on a laptop with no hub and no GPU.

Run: `medasst tiny-model --data-dir data/demo --out saves/tiny_qwen2`

The weights are random. `factory_configs/demo_base/train.yaml` then trains all of them through LLaMA-Factory on the plain
sentences that this module writes beside them (`text.jsonl`), which gives the demo something to adapt: a base that knows
words, and neither dialogue nor what belongs together. Nothing that it says is medical advice, or sense.
"""

import argparse
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from medasst_tools import provenance
from medasst_tools.data.registry import load_datasets
from medasst_tools.errors import UserError
from medasst_tools.files import locked, open_permissions, read_jsonl, sha256_of, write_json, write_jsonl

# Qwen2's own special tokens; LLaMA-Factory's `qwen` template writes the two chat marks and pads with the first.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT_DATASET = "text"
RECORD = "tiny_model.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder that `medasst convert` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, replaced as a whole")
    parser.add_argument("--seed", type=int, default=42, help="of the random weights (default 42)")


def run(args: argparse.Namespace) -> None:
    """Build the model from the training sets in `--data-dir`, if it isn't there and of just these."""
    paths = training_files(args.data_dir)
    about = provenance.made_of({"seed": args.seed}, {path.stem: sha256_of(path) for path in paths})
    busy = f"{args.out} is being made by another process; wait for it"
    with locked(args.out.parent / f".{args.out.name}.lock", busy):
        if provenance.up_to_date(args.out / RECORD, about):
            return
        documents = list(training_documents(args.data_dir))
        build_tiny_model(documents, args.out, seed=args.seed)
        weights = args.out / "model.safetensors"
        write_json(args.out / RECORD, provenance.record(args.out / RECORD, about, [weights]))
    print(f"{args.out}: a random Qwen2 and a tokenizer trained on {len(documents)} documents of {args.data_dir}")


def training_files(data_dir: Path) -> list[Path]:
    """Return the `*_train` datasets of a converted folder: the test records stay unseen by the tokenizer and by the weights.

    A corpus of one's own beside them is none of the demo's. UserError if there is none.
    """
    own = load_datasets().keys() - load_datasets(own=Path(os.devnull)).keys()
    paths = [path for path in sorted(data_dir.glob("*_train.jsonl")) if path.stem not in own]
    if not paths:
        raise UserError(
            f"no *_train.jsonl in {data_dir}; run `medasst convert --raw-dir RAW --out-dir {data_dir}` first"
        )
    return paths


def training_documents(data_dir: Path) -> Iterator[str]:
    """Yield each training record of a converted folder as plain text: its turns, oldest first, one a line."""
    for path in training_files(data_dir):
        for record in read_jsonl(path):
            turns = [text for pair in record.get("history", []) for text in pair]
            turns += [record["instruction"], record["input"], record["output"]]
            yield "\n".join(turn for turn in turns if turn)


def build_tiny_model(
    documents: list[str],
    out: Path,
    seed: int = 42,
    vocab_size: int = 4096,
    hidden_size: int = 256,
    layers: int = 2,
) -> None:
    """Write a random Qwen2 (transformers' ordinary format), its tokenizer and `text.jsonl` for stage `pt` to `out`.

    documents: plain text, one document an item. vocab_size is an upper bound: a small text gives fewer merges.
    The folder appears whole or not at all.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one file of a few megabytes
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents, vocab_size)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,  # rounded up as Qwen2's own is
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped-query attention, as in Qwen2-7B
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,  # Qwen2's 0.02 is for widths in the thousands; this learns in minutes
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        work = Path(folder, out.name)
        Qwen2ForCausalLM(config).save_pretrained(work)
        tokenizer.save_pretrained(work)
        _write_text_dataset(documents, work, seed)
        work.chmod(0o755)  # mkdtemp's folder is for its owner only
        open_permissions(work)
        shutil.rmtree(out, ignore_errors=True)
        work.rename(out)


def train_tokenizer(documents: list[str], vocab_size: int):
    """Return a byte-level BPE tokenizer (transformers' PreTrainedTokenizerFast) trained on `documents`, with no unknown byte."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(unicode_normalizer="nfc")  # as Qwen2's
    bpe.train_from_iterator(documents, vocab_size, min_frequency=0, show_progress=False, special_tokens=SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=4096,
    )


def _write_text_dataset(documents: list[str], folder: Path, seed: int) -> None:
    """Write the documents' sentences, shuffled, as a LLaMA-Factory dataset for stage `pt`, which reads the prompt column alone.

    Shuffled, because a base that had read the answers behind their questions would leave fine-tuning nothing to show.
    """
    sentences = [sentence.strip() for document in documents for sentence in re.split(r"(?<=[。？！\n])", document)]
    random.Random(seed).shuffle(sentences)
    write_jsonl(folder / "text.jsonl", ({"text": text} for text in sentences if text))
    write_json(
        folder / "dataset_info.json", {TEXT_DATASET: {"file_name": "text.jsonl", "columns": {"prompt": "text"}}}
    )
