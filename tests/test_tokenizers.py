"""The released bases' own tokenizers: the ids that tiktoken and SentencePiece give, and what LLaMA-Factory's templates make of them.

Gemma's is in no package, so its template is looked at with pieces that aren't its own, and no ids of it are pinned.
"""

import dataclasses
import unicodedata
from functools import cache

import pytest
import yaml
from conftest import ROOT, lines_of, sample_lines
from families import FAMILIES, LLAMA3, LLAMA3_SPECIAL, LLAMA3_WORDS, MISTRAL, QWEN, REAL, packaged

from medasst_tools.data.exam_questions import LETTERS, load_protocol, load_subjects
from medasst_tools.evaluation import exam
from medasst_tools.serving.exported_prompts import chat_template_of, reference_ids, served_template, without_bos

QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# of the models' pages: words in all, and the ids of what the templates write
RELEASED = {
    "qwen2": (151_646, {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "qwen3": (
        151_669,
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<tool_call>": 151657}
        | {"<think>": 151667, "</think>": 151668},
    ),
    "llama": (
        128_256,
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006}
        | {"<|end_header_id|>": 128007, "<|eot_id|>": 128009, "<|reserved_special_token_250|>": 128255},
    ),
    "mistral": (32_000, {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 28705}),
}
SYSTEM = "你是医生。"
DIALOGUE = [
    {"role": "user", "content": "发烧 38.5 度怎么办？"},
    {"role": "assistant", "content": "多喝水；\n精神差请就医。"},
    {"role": "user", "content": "能吃 “退烧药” 吗？"},
    {"role": "assistant", "content": "B，能吃。"},
]
# the dialogue above, source and target a turn, as LLaMA-Factory's templates make it
PINNED = {
    "qwen2": [
        [151644, 8948, 198, 105043, 103998, 1773, 151645, 198, 151644, 872, 198, 113079, 220, 18, 23, 13, 20, 95522, 99, 102572, 11319, 151645, 198, 151644, 77091, 198],
        [42140, 111824, 59217, 100150, 99572, 14880, 110166, 1773, 151645, 198],
        [151644, 872, 198, 26232, 99405, 1036, 55806, 100228, 99471, 854, 38433, 245, 11319, 151645, 198, 151644, 77091, 198],
        [33, 3837, 26232, 99405, 1773, 151645, 198],
    ],
    "qwen3": [
        [151644, 8948, 198, 105043, 103998, 1773, 151645, 198, 151644, 872, 198, 113079, 220, 18, 23, 13, 20, 95522, 99, 102572, 11319, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271],
        [42140, 111824, 59217, 100150, 99572, 14880, 110166, 1773, 151645, 198],
        [151644, 872, 198, 26232, 99405, 1036, 55806, 100228, 99471, 854, 38433, 245, 11319, 151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271],
        [33, 3837, 26232, 99405, 1773, 151645, 198],
    ],
    "llama": [
        [128000, 128006, 9125, 128007, 271, 57668, 21043, 103242, 21990, 1811, 128009, 128006, 882, 128007, 271, 29391, 120467, 220, 1987, 13, 20, 124575, 104237, 103225, 11571, 128009, 128006, 78191, 128007, 271],
        [43240, 116337, 53610, 60317, 113116, 104364, 15225, 81258, 103242, 1811, 128009],
        [128006, 882, 128007, 271, 27327, 105271, 1054, 56906, 120467, 107634, 863, 39533, 245, 11571, 128009, 128006, 78191, 128007, 271],
        [33, 3922, 27327, 105271, 1811, 128009],
    ],
    "mistral": [
        [1, 733, 16289, 28793, 28705, 29383, 28971, 31213, 29128, 28944, 13, 13, 29099, 234, 134, 170, 28705, 28770, 28783, 28723, 28782, 28705, 29184, 31401, 29797, 31298, 29771, 28792, 28748, 16289, 28793],
        [259, 29292, 232, 153, 160, 29692, 29743, 13, 30170, 29836, 30397, 29067, 29379, 31213, 28944, 2],
        [733, 16289, 28793, 28705, 29084, 31182, 981, 29980, 234, 134, 170, 31793, 28838, 28705, 30930, 29771, 28792, 28748, 16289, 28793],
        [28705, 365, 28924, 29084, 31182, 28944, 2],
    ],
}  # fmt: skip
LETTER_IDS = {
    "qwen2": [32, 33, 34, 35],
    "qwen3": [32, 33, 34, 35],
    "llama": [32, 33, 34, 35],
    "mistral": [330, 365, 334, 384],
}


@cache
def released(name: str, small: bool, folder):
    """Return a family's tokenizer, read from files as the hubs have them."""
    from transformers import AutoTokenizer

    FAMILIES[name].write(folder / f"{name}{small}", small)
    return AutoTokenizer.from_pretrained(folder / f"{name}{small}")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@cache
def reference(name: str):
    """Return the ids of a text by the library that the release was made with, special tokens and all."""
    if name == "mistral":
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(packaged(*MISTRAL)))
        return lambda text: (
            [1] * text.startswith("<s> ")
            + pieces.encode(text.removeprefix("<s> ").removesuffix("</s>"))
            + [2] * text.endswith("</s>")
        )
    from tiktoken import Encoding
    from tiktoken.load import load_tiktoken_bpe

    file, words = (LLAMA3, LLAMA3_WORDS) if name == "llama" else (QWEN, QWEN_WORDS)
    ranks = load_tiktoken_bpe(str(packaged(*file)))
    special = (
        {token: len(ranks) + n for n, token in enumerate(LLAMA3_SPECIAL)} if name == "llama" else RELEASED[name][1]
    )
    encoding = Encoding(name, pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    if name == "llama":
        return lambda text: encoding.encode(text, allowed_special="all")
    return lambda text: encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")  # as Qwen's own


# ---- the tokenizers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REAL)
def test_words_and_special_tokens_are_the_released_ones(name, folder):
    tokenizer = released(name, False, folder)
    words, special = RELEASED[name]
    assert len(tokenizer) == words
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    assert [tokenizer.encode(token, add_special_tokens=False)[-1:] for token in special if token != "▁"] == [
        [number] for token, number in special.items() if token != "▁"
    ]


def differing(name: str, tokenizer, texts) -> list[str]:
    """Return the texts of which the ids aren't the reference's, or don't give the text back."""
    wrong = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = unicodedata.normalize("NFC", text) if name.startswith("qwen") else text
        if ids != reference(name)(text) or tokenizer.decode(ids) != whole:
            wrong.append(text)
    return wrong


@pytest.mark.parametrize("name", REAL)
def test_the_samples_have_the_references_ids_and_come_back(name, folder):
    assert len(sample_lines()) > 500
    assert differing(name, released(name, False, folder), sample_lines()) == []


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", REAL)
def test_real_text_has_the_references_ids_and_comes_back(name, folder, real_data):
    texts = lines_of(real_data / "raw")
    for subject in load_subjects(real_data / "exams", load_protocol()):
        texts |= {text for question in subject.questions for text in (question.text, *question.choices)}
    assert len(texts) > 10_000
    assert differing(name, released(name, False, folder), texts) == []


# ---- the templates --------------------------------------------------------------------------------------------------
def prepared(name: str, tokenizer):
    """Return (a tokenizer of its own, the template) as the family's experiment has LLaMA-Factory make them."""
    import copy

    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    config = yaml.safe_load(
        (ROOT / f"factory_configs/{FAMILIES[name].experiment}/chat.yaml").read_text(encoding="utf-8")
    )
    chat = {key: config[key] for key in ("template", "enable_thinking") if key in config} | {"default_system": SYSTEM}
    tokenizer = copy.deepcopy(tokenizer)
    return tokenizer, get_template_and_fix_tokenizer(tokenizer, DataArguments(**chat))


@cache
def released_and_prepared(name: str, folder):
    """Return the same of the whole released tokenizer, once: nothing here changes it."""
    return prepared(name, released(name, False, folder))


def turns_of(tokenizer, template) -> list[list[int]]:
    """Return DIALOGUE's sources and targets in turn; what is trained on is these, and only the targets are learnt."""
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments

    turns = [piece for pair in template.encode_multiturn(tokenizer, DIALOGUE) for piece in pair]
    processor = SupervisedDatasetProcessor(template, tokenizer, None, DataArguments(cutoff_len=512))
    ids, labels = processor._encode_data_example(DIALOGUE[:-1], DIALOGUE[-1:], None, None, [], [], [])
    assert ids == sum(turns, [])
    assert labels == sum([[-100] * len(turn) if n % 2 == 0 else turn for n, turn in enumerate(turns)], [])
    return turns


def spelled(name: str) -> list[str]:
    """Return DIALOGUE's sources and targets as the family writes them."""
    family, contents = FAMILIES[name], [message["content"] for message in DIALOGUE]
    first, then = family.prompt.format(system=SYSTEM, user=contents[0]), family.turn.format(user=contents[2])
    return [first, family.space + contents[1] + family.end, then, family.space + contents[3] + family.end]


def check(name: str, tokenizer, template) -> list[list[int]]:
    """Assert that the template writes, learns, stops and is examined as the family does; return the dialogue's turns."""
    family, turns = FAMILIES[name], turns_of(tokenizer, template)
    assert [tokenizer.decode(turn, skip_special_tokens=False) for turn in turns] == spelled(name)
    assert set(tokenizer.convert_ids_to_tokens(template.get_stop_token_ids(tokenizer))) == family.stop
    opening, letters = exam.letters_of(tokenizer, template)
    assert tuple(tokenizer.convert_ids_to_tokens(opening)) == family.before_letter
    assert turns[3][: len(opening) + 1] == [*opening, letters[1]]  # the last answer begins with B
    return turns


@pytest.mark.parametrize("name", REAL)
def test_a_dialogue_and_its_labels(name, folder):
    turns = check(name, *released_and_prepared(name, folder))
    assert turns == [reference(name)(text) for text in spelled(name)]
    assert turns == PINNED[name]


@pytest.mark.parametrize("name", REAL)
def test_the_letters_of_an_exam(name, folder):
    tokenizer, template = released_and_prepared(name, folder)
    assert exam.letters_of(tokenizer, template)[1] == LETTER_IDS[name]
    theirs = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS]
    assert theirs == LETTER_IDS[name]  # LLaMA-Factory's evaluator's, which looks for Mistral's where the space is


@pytest.mark.parametrize("name", REAL)
def test_the_exported_chat_template_gives_the_trainings_ids(name, folder):
    tokenizer, template = released_and_prepared(name, folder)
    wanted = {None: reference_ids(tokenizer, template, None)}
    text = chat_template_of(served_template(tokenizer, template, wanted), tokenizer)
    for messages in (DIALOGUE[:1], DIALOGUE[:3], [{"role": "system", "content": "请简短回答。"}, *DIALOGUE[:3]]):
        served = tokenizer.apply_chat_template(
            messages, chat_template=text, add_generation_prompt=True, return_dict=False
        )
        system, turns = (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)
        ours = template.encode_oneturn(tokenizer, [*turns, DIALOGUE[-1]], system)[0]
        assert without_bos(served, tokenizer) == without_bos(ours, tokenizer)


# ---- a mistake in a template is found ---------------------------------------------------------------------------------
def in_slots(formatter, old, new):
    """Return a formatter in whose slots `old` stands as `new`."""
    slots = [
        new if slot == old else slot.replace(old, new, 1) if isinstance(slot, str) and isinstance(old, str) else slot
        for slot in formatter.slots
    ]
    assert slots != formatter.slots
    return dataclasses.replace(formatter, slots=slots)


MISTAKES = {
    "a line end is missing": {
        "qwen2": ("format_user", "assistant\n", "assistant"),
        "qwen3": ("format_assistant", "<|im_end|>\n", "<|im_end|>"),
        "llama": ("format_user", "assistant<|end_header_id|>\n\n", "assistant<|end_header_id|>\n"),
        "gemma": ("format_user", "model\n", "model"),
        "mistral": ("format_system", "\n\n", "\n"),
    },
    "another special token": {
        "qwen2": ("format_assistant", "<|im_end|>", "<|endoftext|>"),
        "qwen3": ("format_system", "<|im_end|>", "<|endoftext|>"),
        "llama": ("format_assistant", "<|eot_id|>", "<|end_of_text|>"),
        "gemma": ("format_assistant", "<end_of_turn>", "<eos>"),
        "mistral": ("format_assistant", {"eos_token"}, {"bos_token"}),
    },
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mistake", [None, "another stop word", *MISTAKES])
def test_a_mistake_in_a_template_is_found(name, mistake, folder, monkeypatch):
    from llamafactory.data.template import TEMPLATES

    config = yaml.safe_load(
        (ROOT / f"factory_configs/{FAMILIES[name].experiment}/chat.yaml").read_text(encoding="utf-8")
    )
    template = TEMPLATES[config["template"]]
    if mistake == "another stop word":
        template = dataclasses.replace(
            template, stop_words=["<unk>" if name in ("gemma", "mistral") else "<|endoftext|>"]
        )
    elif mistake:
        part, old, new = MISTAKES[mistake][name]
        template = dataclasses.replace(template, **{part: in_slots(getattr(template, part), old, new)})
    monkeypatch.setitem(TEMPLATES, config["template"], dataclasses.replace(template))
    tokenizer = released(name, True, folder)
    if mistake is None:
        check(name, *prepared(name, tokenizer))
    else:
        with pytest.raises(AssertionError):
            check(name, *prepared(name, tokenizer))
