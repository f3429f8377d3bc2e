"""The released bases' own tokenizers out of packages, and tiny random models of their architectures that carry them, cut.

| family | file | what it is |
|---|---|---|
| qwen2, qwen3 | dashscope, resources/qwen.tiktoken | Qwen's 151,643 ranks; the tokens that each generation adds stand below |
| llama | llama-models, llama3/tokenizer.model | Llama 3's 128,000 ranks, as tiktoken reads them |
| mistral | mistral-common, data/tokenizer.model.v1 | Mistral-7B-v0.1's 32,000 SentencePiece pieces |
| gemma | none | no package has Gemma's: Mistral's pieces stand in, in Gemma's class and with Gemma's special tokens |

A tokenizer is written as the hubs have it and read back by AutoTokenizer, as LLaMA-Factory does. Without the extra `real`
whatever asks for one is skipped.
"""

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

HIDDEN, LAYERS, POSITIONS = 64, 2, 4096
QWEN, LLAMA3, MISTRAL = (
    ("dashscope", "resources/qwen.tiktoken"),
    ("llama_models", "llama3/tokenizer.model"),
    ("mistral_common", "data/tokenizer.model.v1"),
)
QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_SPECIAL = [
    *QWEN2_SPECIAL,
    *(f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
QWEN3_PLAIN = [  # added, but no special tokens: they stay in text
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
]
LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4))),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
]
LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
Bpe = tuple[dict[str, int], list[tuple[str, str]]]  # vocabulary, merges


def packaged(package: str, file: str) -> Path:
    """Return a file of a package, which isn't imported; skip where it isn't installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"no {package}, which holds a released tokenizer; `make setup EXTRAS=real` installs it")
    return Path(found.submodule_search_locations[0]) / file


@cache
def byte_level(package: str, file: str) -> Bpe:
    """Return tiktoken's ranks as transformers converts them."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    return TikTokenConverter().extract_vocab_merges_from_model(str(packaged(package, file)))


@cache
def sentencepiece() -> Bpe:
    """Return Mistral's pieces and what is merged, the best score first."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

    pieces = SentencePieceExtractor(str(packaged(*MISTRAL))).proto.pieces
    vocab = {piece.piece: number for number, piece in enumerate(pieces)}
    return vocab, generate_merges(vocab, {piece.piece: piece.score for piece in pieces})


def cut(bpe: Bpe, *kept: range) -> Bpe:
    """Return the tokens of these ids alone, numbered anew in their order, with the merges among them."""
    tokens = [token for token, number in bpe[0].items() if any(number in ids for ids in kept)]
    vocab = {token: number for number, token in enumerate(sorted(tokens, key=bpe[0].__getitem__))}
    return vocab, [pair for pair in bpe[1] if {*pair, "".join(pair)} <= vocab.keys()]


def cut_pieces() -> Bpe:
    """Return Mistral's special tokens, bytes, first pieces and most frequent characters."""
    return cut(sentencepiece(), range(600), range(28705, 29105))


def cut_bytes(package: str, file: str) -> Bpe:
    """Return the bytes and the first merges of a byte-level vocabulary."""
    return cut(byte_level(package, file), range(600))


# ---- as released ----------------------------------------------------------------------------------------------------
def write_qwen2(folder: Path, small: bool) -> None:
    """Qwen2's: <|endoftext|> ends and pads, the two chat marks are special."""
    write_qwen(folder, small, QWEN2_SPECIAL, [])


def write_qwen3(folder: Path, small: bool) -> None:
    """Qwen3's: as Qwen2's, and more added tokens; the marks of a thought are no special tokens."""
    write_qwen(folder, small, QWEN3_SPECIAL, QWEN3_PLAIN)


def write_qwen(folder: Path, small: bool, special: list[str], plain: list[str]) -> None:
    """Write a Qwen tokenizer with these added tokens."""
    from transformers import Qwen2Tokenizer

    vocab, merges = cut_bytes(*QWEN) if small else byte_level(*QWEN)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[1:])
    tokenizer.add_tokens(plain)
    tokenizer.save_pretrained(folder)


def write_llama3(folder: Path, small: bool) -> None:
    """Llama 3's: its eos is not what ends a turn, it has no pad token and no <|eom_id|>, which is Llama 3.1's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = cut_bytes(*LLAMA3) if small else byte_level(*LLAMA3)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence([words, in_bytes]), decoders.ByteLevel()
    bpe.add_special_tokens(LLAMA3_SPECIAL)
    bos, eos = LLAMA3_SPECIAL[:2]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos).save_pretrained(folder)


def write_mistral(folder: Path, small: bool) -> None:
    """Mistral's: SentencePiece's way of putting a ▁ before text, no pad token, [INST] is plain text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab, merges = cut_pieces() if small else sentencepiece()
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    bpe.decoder = decoders.Sequence(to_text)
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    # transformers 5 takes the file as it is only where the model is a Mistral; a Llama's tokenizer it builds anew
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}), encoding="utf-8")


def write_gemma(folder: Path, small: bool) -> None:
    """Not Gemma's, but of its kind: its eos is not what ends a turn, and text gets no ▁ in front."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    pieces, merges = cut_pieces()
    tokens = [*special, *(token for token in pieces if token not in ("<unk>", "<s>", "</s>"))]
    vocab = {token: number for number, token in enumerate(tokens)}
    GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[-2:]).save_pretrained(folder)


# ---- the families ---------------------------------------------------------------------------------------------------
class Family(NamedTuple):
    """What a family's template writes, spelled out; `experiment` is the one whose rendered configs are run."""

    experiment: str
    config: str  # transformers' class
    write: Callable[[Path, bool], None]  # the tokenizer's files into a folder; small: the vocabulary cut
    prompt: str  # {system} and {user}: from the first token to where the assistant begins
    turn: str  # the same of every later question
    end: str  # what is learnt after an answer
    stop: set[str]  # tokens at which generation stops
    before_letter: tuple[str, ...] = ()  # tokens with which a trained answer "B" begins before its letter
    space: str = ""  # the same as text, before any answer


CHATML = "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM_CHATML = "<|im_start|>system\n{system}<|im_end|>\n" + CHATML
THOUGHT = "<think>\n\n</think>\n\n"
LLAMA3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA_TURN = "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n"
FAMILIES = {
    "qwen2": Family("medasst", "Qwen2Config", write_qwen2, SYSTEM_CHATML, CHATML, "<|im_end|>\n", {"<|im_end|>"}),
    "qwen3": Family(
        "medasst_qwen3_8b",
        "Qwen3Config",
        write_qwen3,
        SYSTEM_CHATML + THOUGHT,
        CHATML + THOUGHT,
        "<|im_end|>\n",
        {"<|im_end|>"},
    ),
    "llama": Family(
        "llama3_8b",
        "LlamaConfig",
        write_llama3,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>" + LLAMA3_TURN,
        LLAMA3_TURN,
        "<|eot_id|>",
        {"<|eot_id|>", "<|eom_id|>"},
    ),
    "gemma": Family(
        "gemma_7b",
        "GemmaConfig",
        write_gemma,
        "<bos>" + GEMMA_TURN.replace("{user}", "{system}\n\n{user}"),
        GEMMA_TURN,
        "<end_of_turn>\n",
        {"<end_of_turn>"},
    ),
    "mistral": Family(
        "mistral_7b",
        "MistralConfig",
        write_mistral,
        "<s> [INST] {system}\n\n{user}[/INST]",
        "[INST] {user}[/INST]",
        "</s>",
        {"</s>"},
        before_letter=("▁",),
        space=" ",
    ),
}
REAL = [name for name in FAMILIES if name != "gemma"]  # whose tokenizer is the released one


def build(family: Family, folder: Path) -> None:
    """Write a random model with the family's cut tokenizer to `folder`, as a hub has them."""
    import torch
    import transformers

    family.write(folder, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(42)
    config = getattr(transformers, family.config)(
        vocab_size=len(tokenizer),  # no row to spare: a token that a template adds has none
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=POSITIONS,
        initializer_range=HIDDEN**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
