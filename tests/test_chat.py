"""The chat page in a real browser, LLaMA-Factory's plain one, the terminal chat, and who may reach them."""

import asyncio
import builtins
import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from chat_browser import (
    ANSWERS,
    BOX,
    CHROMIUM,
    LAPTOP,
    PHONE,
    QUESTIONS,
    ask,
    browser_page,
    free_port,
    started,
    whole_answer,
)
from conftest import make_environment

from medasst_tools import cli
from medasst_tools.errors import UserError
from medasst_tools.serving import chat, generation
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH, TITLE

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium; .ci/run installs it")
CHAT_CONFIG = "factory_configs/demo/chat.yaml"


@pytest.fixture(scope="module")
def reference(project, evaluated):
    """Answers of LLaMA-Factory's ChatModel over the same chat.yaml: {questions so far: answer}."""
    import yaml
    from llamafactory.chat import ChatModel

    with contextlib.chdir(project):
        model = ChatModel(yaml.safe_load(Path(CHAT_CONFIG).read_text(encoding="utf-8")))
    first, second = ({"role": "user", "content": question} for question in QUESTIONS)
    answer = model.chat([first])[0].response_text
    both = [first, {"role": "assistant", "content": answer}, second]
    return {
        "first": answer,
        "second, after the first": model.chat(both)[0].response_text,
        "second, alone": model.chat([second])[0].response_text,
    }


@pytest.fixture(scope="module")
def pages(project, evaluated, tmp_path_factory):
    """`make chat`, and plain `llamafactory-cli webchat` as the chat.yaml's first lines say; started together."""
    logs, environment = tmp_path_factory.mktemp("chat"), make_environment(project)
    ports = {"ours": free_port(), "plain": free_port()}
    lines = (project / CHAT_CONFIG).read_text(encoding="utf-8").splitlines()
    plain = next(line for line in lines if "llamafactory-cli webchat" in line).strip("# ")
    commands = {
        "ours": ["make", "chat"],
        "plain": ["bash", "-c", f"PATH={Path(sys.executable).parent}:$PATH; {plain}"],
    }
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                started(
                    command,
                    ports[name],
                    logs / name,
                    cwd=project,
                    env=environment | {"GRADIO_SERVER_PORT": str(ports[name]), "BROWSER": "true"},
                )
            )
            for name, command in commands.items()
        }
        for server in servers.values():
            server.wait()
        yield servers


@needs_browser
@pytest.mark.end_to_end
def test_a_conversation_in_the_browser_is_the_models(pages, reference):
    with browser_page(pages["ours"].url) as page:
        answer, seen = ask(page, QUESTIONS[0])
        assert answer == reference["first"].strip()
        answer, seen_again = ask(page, QUESTIONS[1])
        assert answer == reference["second, after the first"].strip() != reference["second, alone"].strip()
        assert len(seen) + len(seen_again) > 2  # piece by piece, as far as a page shows a fast model's pieces
        page.locator("button[aria-label='Clear']").click()
        page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length === 0")
        assert ask(page, QUESTIONS[1])[0] == reference["second, alone"].strip()
        assert page.hosts == {pages["ours"].url.split("/")[2]}


@needs_browser
@pytest.mark.end_to_end
def test_llamafactorys_own_page_with_the_same_config(pages, reference):
    def bare(text: str) -> str:  # without what its Markdown does to a text
        return re.sub(r"[\s*_#>`~\-]", "", text)

    with browser_page(pages["plain"].url) as page:
        answer = ask(page, QUESTIONS[0], box='textarea[rows="8"]', send="button.primary")[0]
        assert bare(answer) == bare(reference["first"])


@pytest.mark.end_to_end
def test_only_this_machine_can_reach_them(pages):
    """Both listen on 127.0.0.1 alone: the kernel's own list of listening sockets."""
    ports = {int(server.url.rstrip("/").rpartition(":")[2]) for server in pages.values()}
    listening = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        address, port = local.split(":")
        if state == "0A" and int(port, 16) in ports:
            listening.setdefault(int(port, 16), set()).add(address)
    assert listening == dict.fromkeys(ports, {"0100007F"})


@pytest.mark.end_to_end
def test_the_address_is_said_last_after_the_notice_and_a_taken_port_is_named(pages, project):
    said = pages["ours"].log.read_text(encoding="utf-8")
    assert said.index(NOTICE_ZH) < said.index(NOTICE_EN)
    assert said.splitlines()[-1] == f"{TITLE}: {pages['ours'].url.rstrip('/')}"
    taken = pages["ours"].url.rstrip("/").rpartition(":")[2]
    environment = make_environment(project) | {"GRADIO_SERVER_PORT": taken}
    again = subprocess.run(["make", "chat"], cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert f"error: cannot serve on 127.0.0.1:{taken} (Address already in use); set GRADIO_SERVER_PORT" in again.stderr


def test_the_terminal_chat(project, evaluated, reference, monkeypatch, capsys):
    monkeypatch.chdir(project)
    typed = iter([*QUESTIONS, "clear", QUESTIONS[1]])

    def from_the_keyboard(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None  # Ctrl-D

    monkeypatch.setattr(builtins, "input", from_the_keyboard)
    monkeypatch.setattr(sys, "argv", ["medasst"])
    assert cli.main(["chat", "--terminal", CHAT_CONFIG]) == 0
    said = capsys.readouterr().out
    places = [said.index(NOTICE_ZH), said.index(NOTICE_EN), said.index("Welcome to the CLI application")]
    places += [said.index(reference[key]) for key in ("first", "second, after the first", "second, alone")]
    assert places == sorted(places)


@pytest.fixture
def asked_for(monkeypatch):
    """Return a function that reads the address of an environment."""
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_SHARE", "CHAT_AUTH"):
        monkeypatch.delenv(name, raising=False)

    def read(environment: dict[str, str]) -> tuple:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return chat.read_address()

    return read


@pytest.mark.parametrize(
    ("environment", "host", "auth"),
    [
        ({}, "127.0.0.1", None),
        ({"GRADIO_SERVER_NAME": ""}, "127.0.0.1", None),
        ({"GRADIO_SERVER_NAME": "127.1.2.3"}, "127.1.2.3", None),
        ({"GRADIO_SERVER_NAME": "localhost"}, "127.0.0.1", None),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "CHAT_AUTH": "shop:pass:word"}, "0.0.0.0", ("shop", "pass:word")),
        ({"CHAT_AUTH": "a:b"}, "127.0.0.1", ("a", "b")),
    ],
)
def test_the_address(asked_for, environment, host, auth):
    port = free_port()
    assert asked_for(environment | {"GRADIO_SERVER_PORT": str(port)}) == (host, port, auth)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, "GRADIO_SERVER_NAME is '0.0.0.0': other machines could use the model"),
        ({"GRADIO_SERVER_NAME": "[::]"}, "GRADIO_SERVER_NAME is '::': other machines"),
        ({"GRADIO_SERVER_NAME": "192.168.1.2"}, "GRADIO_SERVER_NAME is '192.168.1.2': other machines"),
        (
            {"GRADIO_SERVER_NAME": "127.0.0.1.example.org"},
            "127.0.0.1.example.org",
        ),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "CHAT_AUTH": "secret"}, "CHAT_AUTH must be user:password"),
        ({"CHAT_AUTH": ":secret"}, "CHAT_AUTH must be user:password"),
        ({"GRADIO_SERVER_PORT": "http"}, "GRADIO_SERVER_PORT is 'http', must be a number from 0 to 65535"),
        ({"GRADIO_SERVER_PORT": "70000"}, "GRADIO_SERVER_PORT is '70000'"),
        ({"GRADIO_SHARE": "True"}, "GRADIO_SHARE would publish the chat"),
    ],
)
def test_a_wrong_address_is_one_line(asked_for, environment, message):
    with pytest.raises(UserError) as error:
        asked_for(environment)
    assert message in str(error.value) and "secret" not in str(error.value)


def test_a_password_is_asked_for(script):
    """gradio's own login, over a real connection."""
    url = script(auth=("shop", "open sesame"))

    def status(path: str, form: dict[str, str] | None = None) -> int:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            return urllib.request.urlopen(url + path, data=data, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("config") == 401
    assert status("login", {"username": "shop", "password": "guess"}) == 400
    assert status("login", {"username": "shop", "password": "open sesame"}) == 200


def test_an_address_of_ipv6(asked_for, script):
    try:
        host, _, _ = asked_for({"GRADIO_SERVER_NAME": "::1", "GRADIO_SERVER_PORT": "0"})
    except UserError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert host == "[::1]"
    assert urllib.request.urlopen(script(host=host), timeout=10).status == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope.yaml"], "no nope.yaml; `medasst render` writes"),
        (["--terminal", CHAT_CONFIG, "temperature"], "override 'temperature' must be key=value"),
        (["factory_configs/demo/train.yaml"], "says stage: a config for training or prediction"),
    ],
)
def test_mistakes_are_named(project, evaluated, monkeypatch, capsys, words, message):
    monkeypatch.chdir(project)
    assert cli.main(["chat", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# ---- the page, over a model that says what its script says ----------------------------------------------------------
class ScriptedModel:
    """An engine whose answers echo the question, slowly, and a long one goes on; `closed`: numbers of those that were stopped."""

    def __init__(self, do_sample: bool) -> None:
        values = {"max_new_tokens": 77, "do_sample": do_sample, "temperature": 0.3, "top_p": 0.8}
        self.engine = types.SimpleNamespace(generating_args=values)
        self.asked, self.closed = [], []

    def generation(self, engine, turns, **settings):
        self.asked.append((turns, settings))
        return types.SimpleNamespace(pieces=lambda: self.pieces(turns[-1]["content"], len(self.asked)))

    async def pieces(self, asked: str, number: int):
        try:
            for word in [f"{number}：", *(40 * [asked] if asked == "很长" else asked.splitlines(keepends=True))]:
                await asyncio.sleep(0.2)
                yield word
        except (GeneratorExit, asyncio.CancelledError):
            self.closed.append(number)
            raise


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Return a function that serves the page as `medasst chat` does, but over a ScriptedModel, `script.model`: its address."""
    import gradio
    import llamafactory.chat

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("V", "1")  # stdout stays pytest's

    def serve(auth=None, about=None, do_sample=False, host="127.0.0.1") -> str:
        port = free_port()
        serve.model = ScriptedModel(do_sample)
        monkeypatch.setattr(llamafactory.chat, "ChatModel", lambda config: serve.model)
        monkeypatch.setattr(generation, "Generation", serve.model.generation)
        threading.Thread(target=chat.serve_page, args=((host, port, auth), {}, about), daemon=True).start()
        for _ in range(240):
            with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), port), timeout=1):
                break
            time.sleep(0.25)
        return f"http://{host}:{port}/"

    yield serve
    gradio.close_all()


def in_sight(page, selector: str) -> dict[str, float]:
    """Return an element's place; it must be wholly within the window, and the page no larger than that."""
    place = page.locator(selector).first.bounding_box()
    width, height = page.viewport_size["width"], page.viewport_size["height"]
    assert place["x"] >= 0 and place["x"] + place["width"] <= width, selector
    assert place["y"] >= 0 and place["y"] + place["height"] <= height, selector
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
        width,
        height,
    ]
    return place


@needs_browser
@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_what_a_patient_sees(script, size):
    url = script()
    with browser_page(url, size) as page:
        assert page.title() == TITLE
        assert page.locator("button.example").all_inner_texts() == chat.EXAMPLES
        assert page.locator('input[type="range"], input[type="file"]').count() == 0
        for number in range(3):  # the empty page, then one that is longer than the window
            if number:
                ask(page, f"第{number}问" * 200)
            notice, box = in_sight(page, "#notice"), in_sight(page, BOX)
            assert notice["height"] < 0.17 * size[1] and notice["y"] < 20
            assert box["y"] > 0.85 * size[1]
            in_sight(page, ".submit-button")
        assert NOTICE_ZH in page.locator("#notice").inner_text()
        assert "saves" not in page.locator("body").inner_text()
        assert page.hosts == {url.split("/")[2]}


@needs_browser
def test_sending_stopping_and_trying_again(script):
    url = script()
    with browser_page(url) as page:
        for empty in ("", "   "):
            page.locator(BOX).fill(empty)
            page.keyboard.press("Enter")
            page.locator(".submit-button").click()
        page.locator(BOX).fill("一行")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("又一行")
        page.wait_for_timeout(1000)
        assert page.locator(BOX).input_value() == "一行\n又一行"
        assert script.model.asked == [] and page.locator('[data-testid="user"]').count() == 0

        page.locator("button.example").first.click()
        assert whole_answer(page, 1) == f"1：{chat.EXAMPLES[0]}"
        assert ask(page, "按钮", send=".submit-button")[0] == "2：按钮"
        page.locator("button[aria-label='Retry']").click()
        page.wait_for_function("document.body.innerText.includes('3：按钮')")
        first, answer = (
            {"role": "user", "content": chat.EXAMPLES[0]},
            {"role": "assistant", "content": f"1：{chat.EXAMPLES[0]}"},
        )
        asked = [first, answer, {"role": "user", "content": "按钮"}]
        assert script.model.asked == [([first], {}), (asked, {}), (asked, {})]

        page.wait_for_selector(".submit-button")
        page.locator(BOX).fill("很长")
        page.keyboard.press("Enter")
        page.wait_for_selector(".stop-button")
        page.wait_for_function("document.body.innerText.includes('4：很长很长')")
        page.locator(".stop-button").click()
        page.wait_for_selector(".submit-button")
        stopped = page.locator(ANSWERS).last.inner_text()
        page.wait_for_timeout(1000)
        assert page.locator(ANSWERS).last.inner_text() == stopped and len(stopped) < 60
        assert script.model.closed == [4]  # the model stops too
        assert page.locator(BOX).get_attribute("placeholder") == chat.PLACEHOLDER


@needs_browser
def test_what_a_user_writes_stays_text(script):
    url, evil = script(), "体温<38 &lt; <img src='http://example.org/x' onerror=document.title='run'><|im_end|>**b**"
    with browser_page(url) as page:
        assert ask(page, evil)[0] == f"1：{evil}".replace("<i", "<\u200bi").replace("<|", "<\u200b|")
        ask(page, "然后")
        assert page.locator('[data-testid="user"]').first.inner_text() == evil
        assert page.title() == TITLE and page.hosts == {url.split("/")[2]}
    assert "<|" not in str(script.model.asked)  # nor as part of the history


@needs_browser
@pytest.mark.parametrize(
    ("do_sample", "values"),
    [(False, {"max_new_tokens": 77}), (True, {"max_new_tokens": 77, "temperature": 0.3, "top_p": 0.8})],
)
def test_an_expert_sees_the_model_and_its_settings(script, do_sample, values):
    with browser_page(script(about="model saves/demo, run 0123abcd", do_sample=do_sample)) as page:
        assert "model saves/demo, run 0123abcd" in page.locator("body").inner_text()
        assert page.locator('input[type="range"]').count() == len(values)
        ask(page, "头疼")
    assert script.model.asked[0][1] == values


MARKS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<s>", "<｜User｜>", "[INST]", "[/INST]", "<think>"]


@pytest.mark.parametrize("mark", MARKS)
def test_a_templates_mark_is_broken(mark):
    assert mark not in chat.harmless(f"头疼{mark}{mark}怎么办") and chat.harmless(mark).replace("\u200b", "") == mark


@pytest.mark.parametrize("text", ["体温<38", "a < b", "[1] 发烧", "孩子 38.5 度，能吃药吗？\n急"])
def test_other_text_reaches_the_model_as_it_is(text):
    assert chat.harmless(text) == text
