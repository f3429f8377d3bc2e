"""What others call an OpenAI-style server with: openai, litellm and langchain-openai against `medasst api`, whole and streamed."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT
from test_api import CONVERSATION, DOCUMENTS, KEY

from medasst_tools.training.tiny_model import build_tiny_model

MODEL, TOKENS = "tiny", 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """`medasst api` as a process of its own over a tiny random model; its address."""
    folder = tmp_path_factory.mktemp("clients")
    build_tiny_model(DOCUMENTS, folder / "model", vocab_size=400, hidden_size=32)
    config = {"model_name_or_path": str(folder / "model"), "template": "qwen", "do_sample": False, "max_new_tokens": 8}
    (folder / MODEL).mkdir()
    (folder / MODEL / "chat.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    log = folder / "api.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "medasst_tools.cli", "api", str(folder / MODEL / "chat.yaml")], cwd=folder,
            env=os.environ | {"API_KEY": KEY, "API_PORT": "0", "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output,
        )  # fmt: skip
    address, until = None, time.monotonic() + 300
    while not address and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
        address = re.search(r"(http://127\.0\.0\.1:\d+/v1)$", log.read_text(), re.MULTILINE)
    if not address:
        process.kill()
        pytest.fail(f"medasst api does not serve:\n{log.read_text()[-3000:]}", pytrace=False)
    yield address[1]
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def expected(base) -> str:
    """What the openai client gets."""
    import openai

    client = openai.OpenAI(base_url=base, api_key=KEY)
    asked = {"model": MODEL, "messages": CONVERSATION, "max_tokens": TOKENS, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == TOKENS
    text = whole.choices[0].message.content
    streamed = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(streamed) == text and len(list(filter(None, streamed))) > 1
    return text


def test_litellm(base, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would fetch prices
    litellm = pytest.importorskip("litellm", reason="no litellm; `make setup EXTRAS=readers` installs it")
    asked = {"model": f"openai/{MODEL}", "api_base": base, "api_key": KEY, "messages": CONVERSATION}
    asked |= {"max_tokens": TOKENS, "temperature": 0}
    whole = litellm.completion(**asked)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (expected, "length")
    assert whole.usage.completion_tokens == TOKENS
    streamed = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert "".join(streamed) == expected and len(list(filter(None, streamed))) > 1
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**asked | {"api_key": "wrong"})


def test_langchain(base, expected):
    langchain = pytest.importorskip(
        "langchain_openai", reason="no langchain-openai; `make setup EXTRAS=readers` installs it"
    )
    chat = langchain.ChatOpenAI(base_url=base, api_key=KEY, model=MODEL, max_tokens=TOKENS, temperature=0)
    whole = chat.invoke(CONVERSATION)
    assert whole.content == expected and whole.response_metadata["finish_reason"] == "length"
    assert whole.usage_metadata["output_tokens"] == TOKENS
    streamed = [chunk.content for chunk in chat.stream(CONVERSATION)]
    assert "".join(streamed) == expected and len(list(filter(None, streamed))) > 1
