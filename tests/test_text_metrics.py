"""BLEU-4 and ROUGE: known values, and equality with LLaMA-Factory's ComputeSimilarity on odd, random and real pairs."""

import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import jieba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medasst_tools.evaluation.text_metrics import DESCRIPTIONS, Pair, bleu_4, is_farewell, score_pair
from medasst_tools.evaluation.word_segmenter import spaced_words

ODD = [
    "", " ", "\n", "　", "\u200b", ".", "。", "？！", "......", "…… ", "。\n\n\n。好", "”。好“", "好？”又", "\x00", "\x1c", "\x85", "a\u2028b",
    "😀", "👨‍👩‍👧好", "吃吃吃吃吃", "吃", "好的", "ABC", "abc def ghi", "5mg/次", "1.5%", "38.5℃", "COVID-19", "a-b_c", "120/80mmHg", "+86",
    "繁體中文醫學", "龘䶮𠮷", "頭痛\t發燒", "您好，请问有什么不舒服？", "您好。请问有什么不舒服", "Ａ１２３", "<br>", "&quot;", "①②③", "é̂ñ", "\ufffd", "医生\r\n你好",
]  # fmt: skip


def reference(pairs: list[tuple[str, str]]) -> list[tuple[float, ...]]:
    """Score with LLaMA-Factory's own class, whose tokenizer only has to give the texts back."""
    from llamafactory.train.sft.metric import ComputeSimilarity

    texts = [text for pair in pairs for text in pair]
    tokenizer = SimpleNamespace(
        pad_token_id=0, batch_decode=lambda ids, skip_special_tokens: [texts[row[0]] for row in ids]
    )
    metric = ComputeSimilarity(tokenizer=tokenizer)
    places = np.arange(len(texts)).reshape(-1, 2)
    metric(SimpleNamespace(predictions=places[:, :1], label_ids=places[:, 1:]), compute_result=False)
    return list(zip(*(metric.score_dict[name] for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l")), strict=True))


def ours(pairs: list[tuple[str, str]]) -> list[tuple[float, ...]]:
    return [tuple(score_pair(predict, label)[:4]) for predict, label in pairs]  # LLaMA-Factory's


@pytest.mark.parametrize(
    ("predict", "label", "expected"),
    [
        ("", "", (0, 0, 0, 0)),
        ("", "您好", (0, 0, 0, 0)),
        ("您好", " \n", (0, 0, 0, 0)),
        ("您好", "再见", (0, 0, 0, 0)),
        (
            "好",
            "好",
            (35.3553, 100, 0, 100),
        ),  # a perfect match under four characters: method3 smooths what isn't there
        ("您好", "您好", (59.4604, 100, 0, 100)),
        ("请就医", "请就医", (84.0896, 100, 100, 100)),
        ("建议多喝水，注意休息", "建议多喝水，注意休息", (100, 100, 100, 100)),
    ],
)
def test_known_values(predict, label, expected):
    assert score_pair(predict, label)[:4] == pytest.approx(expected, abs=1e-4)


def test_equal_on_odd_pairs():
    pairs = list(itertools.product(ODD, ODD))[:: len(ODD) // 10] + [(text, text) for text in ODD]
    assert {predict for predict, _ in pairs} == {label for _, label in pairs} == set(ODD) and len(pairs) >= 500
    assert ours(pairs) == reference(pairs)


def test_words_equal_jiebas_on_its_whole_dictionary():
    jieba.initialize()
    words = list(jieba.dt.FREQ)
    assert len(words) > 300_000
    texts = ["。".join(words[start : start + 50]) for start in range(0, len(words), 50)]  # cut apart at the stops
    assert [text for text in texts if spaced_words(text) != " ".join(jieba.cut(text))] == []


def test_words_equal_jiebas_on_random_words():
    jieba.initialize()
    dictionary, generator = list(jieba.dt.FREQ), random.Random(7)
    kinds = [dictionary, [chr(code) for code in range(0x4E00, 0x9FD6)], list("常在带的了是不，。 -.%a1m\n")]
    texts = ["".join(generator.choice(generator.choice(kinds)) for _ in range(12)) for _ in range(5_000)]
    assert [text for text in texts if spaced_words(text) != " ".join(jieba.cut(text))] == []


def test_equal_on_a_very_long_answer():
    long = "".join(random.Random(1).choices("头痛发热咳嗽建议您及时就医，。检查血常规", k=1500))
    assert ours([(long, long[::-1])]) == reference([(long, long[::-1])])
    six_thousand = long * 4
    assert ours([(six_thousand, six_thousand)])[0][0] == 100


ALPHABET = st.text(
    st.one_of(st.sampled_from("头痛发热您好。，？！ \n.…”a1-%"), st.characters(exclude_categories=("Cs",))),
    max_size=40,
)


def test_the_first_text_of_a_process_is_cut_as_any_other():
    """jieba's dictionary is empty until something loads it; then a word looks unknown, and stays so."""
    code = f"from {spaced_words.__module__} import spaced_words; print(spaced_words('明确病因方能对症下药'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "明确 病因 方 能 对症下药"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ALPHABET, ALPHABET)
def test_equal_on_random_pairs(predict, label):
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    assert spaced_words(predict) == " ".join(jieba.cut(predict))
    assert bleu_4(Pair(predict, label)) == sentence_bleu(
        [list(label)], list(predict), smoothing_function=SmoothingFunction().method3
    )
    assert ours([(predict, label)]) == reference([(predict, label)])


@pytest.mark.real_data
def test_equal_on_real_pairs(real_data):
    with (real_data / "raw/huatuo_encyclopedia_qa/train_datasets.jsonl").open(encoding="utf-8") as lines:
        answers = [json.loads(line)["answers"][0] for line in lines]
    answers += [
        turn
        for record in json.loads((real_data / "raw/cmtmedqa/CMtMedQA_test.json").read_bytes())
        for turn in [record["output"]]
    ]
    shuffled = random.Random(3).sample(answers, len(answers))
    pairs = list(zip(shuffled, answers, strict=True))[:1000]
    assert len(pairs) >= 1000
    assert ours(pairs) == reference(pairs)


@pytest.mark.parametrize(
    ("name", "prompt", "predict", "label", "expected"),
    [
        ("length-ratio", "", "四个字呢", "两字", 2.0),
        ("length-ratio", "", "四个字呢", "", None),
        ("repeated-4-grams", "", "多喝水", "", None),
        ("repeated-4-grams", "", "abcdefgh", "", 0.0),
        ("repeated-4-grams", "", "哈哈哈哈哈哈", "", 100 * 2 / 3),
        ("new-numbers", "发烧38.5度", "38.5℃不高，布洛芬10mg，每日三次", "每日3次", 1),
        ("new-numbers", "３天", "3天，两片，两片", "", 1),
        ("new-numbers", "每次5 mg", "每次5g", "", 1),
        ("new-numbers", "每次５毫克", "每次5mg，500微克", "", 1),
        ("new-numbers", "", "0.5克，500毫克", "半克", 1),  # the same dose, another number
        ("new-numbers", "血压120/80", "120/80mmHg", "", 0),  # one side gives no unit
        ("new-numbers", "", "用3-5天，3周", "3天", 2),
        ("new-numbers", "", "二十五片，一百二十毫升，一个月", "25片，120ml，1月", 0),
        ("new-numbers", "", "一般不用担心，十分安全", "", 0),
        ("chrf", "", "请及时就医", "请及时就医", 100.0),
        ("chrf", "", "", "请及时就医", 0.0),
    ],
)
def test_descriptions(name, prompt, predict, label, expected):
    assert DESCRIPTIONS[name](prompt, predict, label) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "farewell"),
    [
        ("不客气，祝您早日康复！如果还有其他问题，随时可以咨询。", True),
        ("不用谢，希望我的建议对您有所帮助。", True),
        ("很好，祝您和孩子健康！", True),
        ("不客气，如果疼痛加重，请及时就医。祝您健康！", False),  # advice
        ("不客气！记得避免劳累。", False),
        ("您好，请问有什么问题？", False),
        ("多喝水，祝您健康。", False),
        ("", False),
    ],
)
def test_farewells(text, farewell):
    assert is_farewell(text) is farewell


@pytest.mark.real_data
def test_farewells_of_real_dialogues(real_data):
    """Most last answers of CMtMedQA's test file, hardly any before them, and none of another corpus."""
    records = json.loads((real_data / "raw/cmtmedqa/CMtMedQA_test.json").read_bytes())
    records = [record for record in records if "instruct" not in record]
    last = [record["output"] for record in records]
    earlier = [answer for record in records for _, answer in record.get("history") or []]
    lines = (real_data / "raw/webmedqa/medQA.test.txt").read_text(encoding="utf-8").splitlines()
    counts = [sum(map(is_farewell, texts)) for texts in (last, earlier, [line.split("\t")[-1] for line in lines])]
    assert (len(last), *counts) == (1000, 670, 8, 0)
