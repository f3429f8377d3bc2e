"""The chat page in a real browser, LLaMA-Factory's plain one, the terminal chat, and who may reach them."""

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
from chat_browser import CHROMIUM, QUESTIONS, ask, browser_page, free_port, started
from conftest import make_environment

from medasst_tools import cli
from medasst_tools.errors import UserError
from medasst_tools.serving import chat
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH, TITLE

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


def bare(text: str) -> str:
    """Return the text without what Markdown and the browser do to it."""
    return re.sub(r"[\s*_#>`~\-]", "", text)


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
                )  # fmt: skip
            )
            for name, command in commands.items()
        }
        for server in servers.values():
            server.wait()
        yield servers


@pytest.mark.skipif(not CHROMIUM, reason="no chromium; .ci/run installs it")
@pytest.mark.end_to_end
def test_a_conversation_in_the_browser(pages, reference, tmp_path):
    with browser_page(pages["ours"].url) as page:
        assert page.title() == TITLE
        shown = page.locator("#notice").inner_text()
        assert NOTICE_ZH in shown and NOTICE_EN in shown and shown.index(NOTICE_ZH) < shown.index(NOTICE_EN)
        assert page.locator('input[type="range"]:visible').input_value() == "128"  # chat.yaml's max_new_tokens
        assert page.locator('input[type="file"]:visible').count() == 0

        answer, seen = ask(page, QUESTIONS[0])
        assert bare(answer) == bare(reference["first"])
        answer, seen_again = ask(page, QUESTIONS[1])
        assert bare(answer) == bare(reference["second, after the first"]) != bare(reference["second, alone"])
        assert page.locator('[data-testid="user"]').all_inner_texts() == list(QUESTIONS)
        assert (
            len(seen) + len(seen_again) > 2
        )  # they came piece by piece, as far as a page shows a fast model's pieces
        page.screenshot(path=tmp_path / "chat.png", full_page=True)

        for clear in (
            "button:has-text('清空历史')",
            "button[aria-label='Clear']",
        ):  # LLaMA-Factory's, the box's own bin
            page.locator(clear).click()
            page.wait_for_function("document.querySelectorAll('[data-testid=\"bot\"]').length === 0")
            assert bare(ask(page, QUESTIONS[1])[0]) == bare(reference["second, alone"])

        ask(page, "<img src=x onerror=document.title='run'>")
        assert page.title() == TITLE
    from PIL import Image

    with Image.open(tmp_path / "chat.png") as image:
        assert image.width == 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.skipif(not CHROMIUM, reason="no chromium; .ci/run installs it")
@pytest.mark.end_to_end
def test_llamafactorys_own_page_with_the_same_config(pages, reference):
    with browser_page(pages["plain"].url) as page:
        assert bare(ask(page, QUESTIONS[0])[0]) == bare(reference["first"])


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
def test_the_notice_comes_before_the_page_and_a_taken_port_is_named(pages, project):
    said = pages["ours"].log.read_text(encoding="utf-8")
    assert said.index(NOTICE_ZH) < said.index("Running on local URL")
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


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({}, ("127.0.0.1", None)),
        ({"GRADIO_SERVER_NAME": ""}, ("127.0.0.1", None)),
        ({"GRADIO_SERVER_NAME": "localhost"}, ("localhost", None)),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "CHAT_AUTH": "shop:pass:word"}, ("0.0.0.0", ("shop", "pass:word"))),
        ({"CHAT_AUTH": "a:b"}, ("127.0.0.1", ("a", "b"))),
    ],
)
def test_the_address(environment, address):
    port = str(free_port())
    host, auth = address
    assert chat.read_address(environment | {"GRADIO_SERVER_PORT": port}) == chat.Address(host, int(port), auth)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, "GRADIO_SERVER_NAME is '0.0.0.0': other machines could reach the chat"),
        ({"GRADIO_SERVER_NAME": "[::]"}, "GRADIO_SERVER_NAME is '[::]': other machines"),
        ({"GRADIO_SERVER_NAME": "shop.example"}, "GRADIO_SERVER_NAME is 'shop.example': other machines"),
        ({"GRADIO_SERVER_NAME": "0.0.0.0", "CHAT_AUTH": "secret"}, "CHAT_AUTH must be user:password"),
        ({"CHAT_AUTH": ":secret"}, "CHAT_AUTH must be user:password"),
        ({"GRADIO_SERVER_PORT": "http"}, "GRADIO_SERVER_PORT is 'http', must be a number from 1 to 65535"),
        ({"GRADIO_SERVER_PORT": "70000"}, "GRADIO_SERVER_PORT is '70000'"),
        ({"GRADIO_SHARE": "True"}, "GRADIO_SHARE would publish the chat"),
    ],
)
def test_a_wrong_address_is_one_line(environment, message):
    with pytest.raises(UserError) as error:
        chat.read_address(environment)
    assert message in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback(host):
    assert chat.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", ""])
def test_not_loopback(host):
    assert not chat.is_loopback(host)


def test_a_password_is_asked_for(monkeypatch):
    """gradio's own login, over a real connection; the page itself is left out."""
    import gradio

    def small_page(model, folder):
        with gradio.Blocks() as page:
            gradio.Markdown("in")
        return page

    monkeypatch.setattr(chat, "build_page", small_page)
    address = chat.Address("127.0.0.1", free_port(), ("shop", "open sesame"))
    threading.Thread(target=chat.serve_page, args=(address, "m"), daemon=True).start()
    url = f"http://127.0.0.1:{address.port}"
    for _ in range(240):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", address.port), timeout=1):
            break
        time.sleep(0.25)

    def status(path: str, form: dict[str, str] | None = None) -> int:
        data = urllib.parse.urlencode(form).encode() if form else None
        try:
            return urllib.request.urlopen(url + path, data=data, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/config") == 401
    assert status("/login", {"username": "shop", "password": "guess"}) == 400
    assert status("/login", {"username": "shop", "password": "open sesame"}) == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope.yaml"], "no nope.yaml; `medasst render` writes"),
        (["--terminal", CHAT_CONFIG, "temperature"], "override 'temperature' must be key=value"),
        (["factory_configs/demo/train.yaml"], "is a config for training or prediction"),
    ],
)
def test_mistakes_are_named(project, evaluated, monkeypatch, capsys, words, message):
    monkeypatch.chdir(project)
    assert cli.main(["chat", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("do_sample", "shown"), [(False, {"max_new_tokens"}), (True, {"max_new_tokens", "top_p", "temperature"})]
)
def test_sliders_begin_at_the_configs_values(do_sample, shown):
    names = ("max_new_tokens", "top_p", "temperature", "query", *chat.HIDDEN)
    elements = {name: types.SimpleNamespace(visible=True, value=None) for name in names}
    chat.set_defaults(elements, {"do_sample": do_sample, "max_new_tokens": 77, "top_p": 0.8, "temperature": 0.3})
    assert [elements[name].value for name in names[:3]] == [77, 0.8, 0.3]
    assert {name for name in names if elements[name].visible} == shown | {"query"}
