"""Talk to an experiment's model: LLaMA-Factory's chat page or its terminal chat, with our notice and safe defaults.

Run: `medasst chat factory_configs/demo/chat.yaml` (`make chat`), or with `--terminal` (`make chat-cli`).

The page is LLaMA-Factory's own chat box. Ours are the title, the notice, the address (127.0.0.1 unless CHAT_AUTH sets a
password), the language, sliders that begin at the config's values, and that what a text model has no use for isn't shown.
"""

import argparse
import ipaddress
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from medasst_tools.errors import UserError
from medasst_tools.evaluation.exam import load_chat_config
from medasst_tools.machine import preflight
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH, TITLE

# LLaMA-Factory's tools, uploads and switches: of no use with a text model, and some would break it or unescape HTML
HIDDEN = ("role", "system", "tools", "mm_box", "skip_special_tokens", "escape_html", "enable_thinking")


class Address(NamedTuple):
    """Where the page is served, and who may see it; None: everybody on this machine."""

    host: str
    port: int
    auth: tuple[str, str] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "LLaMA-Factory's chat page on 127.0.0.1:7860. Environment: GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, as gradio's "
        "own; CHAT_AUTH=user:password, needed for any address that other machines reach."
    )
    parser.add_argument("chat_config", type=Path, help="factory_configs/<experiment>/chat.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="over what the file says, as llamafactory-cli"
    )
    parser.add_argument("--terminal", action="store_true", help="chat in the terminal instead")


def run(args: argparse.Namespace) -> None:
    """Chat until interrupted."""
    config = load_chat_config(args.chat_config)
    if bad := [word for word in args.overrides if "=" not in word or word.startswith("-")]:
        raise UserError(f"override {bad[0]!r} must be key=value, without dashes")
    address = None if args.terminal else read_address(os.environ)
    preflight.require(config)
    print(f"{NOTICE_ZH}\n{NOTICE_EN}", flush=True)
    # LLaMA-Factory's chats read their config from the command line
    sys.argv = ["llamafactory-cli", str(args.chat_config), *args.overrides]
    if address is None:
        chat_in_terminal()
    else:
        serve_page(address, config.get("adapter_name_or_path") or config["model_name_or_path"])


def read_address(environment: os._Environ | dict[str, str]) -> Address:
    """Return the address that the environment asks for; UserError if it is open to others, taken or nonsense."""
    host = environment.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    port_text = environment.get("GRADIO_SERVER_PORT") or "7860"
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
        raise UserError(f"GRADIO_SERVER_PORT is {port_text!r}, must be a number from 1 to 65535")
    if environment.get("GRADIO_SHARE", "").lower() in ("1", "true", "y"):
        raise UserError("GRADIO_SHARE would publish the chat through a tunnel; unset it, and see CHAT_AUTH in --help")
    auth = read_auth(environment.get("CHAT_AUTH"))
    if auth is None and not is_loopback(host):
        raise UserError(
            f"GRADIO_SERVER_NAME is {host!r}: other machines could reach the chat; set CHAT_AUTH=user:password, or leave it at 127.0.0.1"
        )
    check_port(host, int(port_text))
    return Address(host, int(port_text), auth)


def read_auth(text: str | None) -> tuple[str, str] | None:
    """Return (user, password) of "user:password", None without it; the error doesn't repeat the password."""
    if not text:
        return None
    user, _, password = text.partition(":")
    if not (user and password):
        raise UserError("CHAT_AUTH must be user:password, neither of them empty")
    return user, password


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """Say at once what gradio would say only after the model is loaded."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot serve on {host}:{port} ({error.strerror}); set GRADIO_SERVER_PORT to a free port"
        ) from None


def chat_in_terminal() -> None:
    """Run LLaMA-Factory's terminal chat; the end of the input ends it."""
    from llamafactory.chat.chat_model import run_chat

    try:
        run_chat()
    except EOFError:
        print()


def serve_page(address: Address, model: str) -> None:
    """Serve the page until interrupted."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from llamafactory.extras.misc import fix_proxy

    fix_proxy()  # gradio asks its own page whether it is up, and must not ask through a proxy
    with tempfile.TemporaryDirectory(prefix="medasst-chat-") as folder:
        page = build_page(model, Path(folder))
        page.queue().launch(
            server_name=address.host,
            server_port=address.port,
            auth=address.auth,
            share=False,
            show_api=False,
            inbrowser=False,
        )


def build_page(model: str, cache_dir: Path) -> Any:
    """Return the page as gradio Blocks: what LLaMA-Factory's `create_web_demo` builds, in Chinese, and ours around it.

    LLaMA-Factory writes files that this page has no use for, by default into the working directory: into `cache_dir` here.
    """
    import gradio as gr
    from llamafactory.webui import common
    from llamafactory.webui.components import create_chat_box
    from llamafactory.webui.css import CSS
    from llamafactory.webui.engine import Engine
    from llamafactory.webui.locales import LOCALES

    common.DEFAULT_CACHE_DIR = str(cache_dir)
    engine = Engine(pure_chat=True)
    with gr.Blocks(title=TITLE, css=CSS) as page:
        gr.Markdown(f"# {TITLE}\n\n**{NOTICE_ZH}**\n\n{NOTICE_EN}", elem_id="notice")
        lang = gr.Dropdown(choices=["zh", "en", "ko", "ja", "ru"], value="zh", scale=1)  # LLaMA-Factory's
        engine.manager.add_elems("top", {"lang": lang})
        chatbot, messages, elements = create_chat_box(engine, visible=True)
        engine.manager.add_elems("infer", elements)
        chatbot.label, chatbot.height = f"对话 / conversation: {model}", 520
        chatbot.clear(lambda: [], outputs=[messages])  # else its bin would empty what is seen and keep what is sent
        set_defaults(elements, engine.chatter.engine.generating_args)
        for name, element in engine.manager.get_elem_iter():
            for attribute, text in LOCALES.get(name, {}).get("zh", {}).items():
                setattr(element, attribute, text)
        lang.change(engine.change_lang, [lang], engine.manager.get_elem_list(), queue=False)
    return page


def set_defaults(elements: dict[str, Any], generating: dict[str, Any]) -> None:
    """Start the sliders at the config's values, and hide what isn't for this page."""
    for name in ("max_new_tokens", "top_p", "temperature"):
        elements[name].value = generating[name]
    elements["query"].lines = 4
    for name in HIDDEN + (() if generating["do_sample"] else ("top_p", "temperature")):  # greedy: nothing to set
        elements[name].visible = False
