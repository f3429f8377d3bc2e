"""Tiny random models of the five architectures that the experiments use, each with a tokenizer of its family's own kind.

A tokenizer is transformers' own class for the family, with the family's special tokens, over a small vocabulary that is
trained on the samples: what LLaMA-Factory's template does with it is what it does with the real one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from conftest import SAMPLES

HIDDEN, LAYERS, POSITIONS, VOCAB = 64, 2, 4096, 420


class Family(NamedTuple):
    """What a family's template writes, spelled out; `experiment` is the one whose rendered configs are run."""

    experiment: str
    config: str  # transformers' class
    tokenizer: Callable
    prompt: str  # {system} and {user}: from the first token to where the assistant begins
    end: str  # what is learnt after an answer
    stop: set[str]  # tokens at which generation stops


def byte_level_bpe(texts: list[str]) -> tuple[dict[str, int], list]:
    """Return (vocabulary, merges) over bytes, as GPT-2's, Qwen's and Llama 3's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def sentencepiece_bpe(texts: list[str], special: list[str]) -> tuple[dict[str, int], list]:
    """Return (vocabulary, merges) over characters, a space as ▁, unknown characters as bytes: Gemma's and Mistral's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    letters = ["A", "B", "C", "D"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=["▁", *letters], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    merges = [tuple(pair) for pair in model["merges"]]
    for letter in letters:  # the real ones have the letters with and without a space before them
        if f"▁{letter}" not in tokens:
            tokens.append(f"▁{letter}")
            merges.append(("▁", letter))
    return {token: number for number, token in enumerate(tokens)}, merges


def qwen2_tokenizer(texts: list[str], plain: tuple[str, ...] = ()):
    """Qwen2's: <|endoftext|> ends and pads, the two chat marks are special; `plain` tokens are added and stay in text."""
    from transformers import Qwen2Tokenizer

    vocab, merges = byte_level_bpe(texts)
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=special, model_max_length=POSITIONS)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def qwen3_tokenizer(texts: list[str]):
    """Qwen3's: as Qwen2's, and the marks of a thought, which are no special tokens."""
    return qwen2_tokenizer(texts, plain=("<think>", "</think>"))


def llama3_tokenizer(texts: list[str]):
    """Llama 3's: its eos is not what ends a turn, it has no pad token and no <|eom_id|>, which is Llama 3.1's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab, merges = byte_level_bpe(texts)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe.add_special_tokens(special)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[1], model_max_length=POSITIONS
    )


def gemma_tokenizer(texts: list[str]):
    """Gemma's: its eos is not what ends a turn, and text gets no ▁ in front."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    vocab, merges = sentencepiece_bpe(texts, special)
    return GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=special[-2:], model_max_length=POSITIONS)


def mistral_tokenizer(texts: list[str]):
    """Mistral's: Llama 2's class, the old way of putting a ▁ before text, no pad token, [INST] is plain text."""
    from transformers import LlamaTokenizer

    vocab, merges = sentencepiece_bpe(texts, ["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=True, model_max_length=POSITIONS)


CHATML = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "qwen2": Family("medasst", "Qwen2Config", qwen2_tokenizer, CHATML, "<|im_end|>\n", {"<|im_end|>"}),
    "qwen3": Family(
        "medasst_qwen3_8b",
        "Qwen3Config",
        qwen3_tokenizer,
        CHATML + "<think>\n\n</think>\n\n",
        "<|im_end|>\n",
        {"<|im_end|>"},
    ),
    "llama": Family(
        "llama3_8b",
        "LlamaConfig",
        llama3_tokenizer,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        {"<|eot_id|>", "<|eom_id|>"},
    ),
    "gemma": Family(
        "gemma_7b",
        "GemmaConfig",
        gemma_tokenizer,
        "<bos><start_of_turn>user\n{system}\n\n{user}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>\n",
        {"<end_of_turn>"},
    ),
    "mistral": Family(
        "mistral_7b", "MistralConfig", mistral_tokenizer, "<s> [INST] {system}\n\n{user}[/INST]", "</s>", {"</s>"}
    ),
}


def build(family: Family, folder: Path) -> None:
    """Write a random model and its tokenizer to `folder`, as a hub has them."""
    import torch
    import transformers

    texts = [path.read_text(encoding="utf-8") for path in sorted((SAMPLES / "exams").glob("*/*/*.csv"))]
    tokenizer = family.tokenizer(texts)
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
    tokenizer.save_pretrained(folder)
