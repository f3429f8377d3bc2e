"""Talk to an experiment's model: a chat page for everybody, or LLaMA-Factory's terminal chat, with our notice and safe defaults.

Run: `medasst chat factory_configs/demo/chat.yaml` (`make chat`), or with `--terminal` (`make chat-cli`).

The page is gradio's ChatInterface over LLaMA-Factory's ChatModel: greedy or as the config says, on this machine only unless
CHAT_AUTH sets a password, and it asks no other host for anything. `--expert` shows the model and its settings.
"""

import argparse
import contextlib
import html
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from medasst_tools import console, provenance
from medasst_tools.config import load
from medasst_tools.errors import UserError
from medasst_tools.machine import preflight
from medasst_tools.serving.address import listen
from medasst_tools.serving.notice import NOTICE_EN, NOTICE_ZH, TITLE

EXAMPLES = [
    "最近总是失眠，应该怎么调整？",
    "感冒了需要吃抗生素吗？",
    "高血压患者饮食上要注意什么？",
    "体检发现轻度脂肪肝，需要治疗吗？",
]
PLACEHOLDER = "请输入问题，回车发送"
# The notice and the box stay in sight, on a phone too; fonts are the system's own.
CSS = """
footer { display: none !important; }
.gradio-container { max-width: 64rem !important; margin: 0 auto !important; padding: 0 !important; }
main.fillable { padding: 0.75rem !important; }
#notice { font-size: 0.8rem; line-height: 1.4; padding: 0.2rem 0.7rem; border-left: 4px solid #d97706 !important; background: #fef3c7; }
#notice * { color: #78350f !important; }
textarea { height: auto !important; max-height: 9rem; field-sizing: content; } /* gradio's own stays as high as what was sent */
.examples { grid-template-columns: repeat(2, 1fr) !important; }
.examples .example { border: 1px solid var(--border-color-primary) !important; border-radius: 0.6rem !important; }
.submit-button, .stop-button { background: var(--primary-500) !important; color: white !important; border-radius: 0.4rem !important; }
@media (max-width: 600px) {
  main.fillable { padding: 0.4rem !important; }
  #notice { font-size: 0.75rem; }
  #notice .english { display: none; }
  .examples { grid-template-columns: 1fr !important; }
}
"""
# gradio sends an empty message and asks for its answer, and takes the placeholder away with the first one
SCRIPT = f"""
<script>
const stopIfEmpty = (event, box) => {{
  if (box?.value.trim() === "") {{ event.preventDefault(); event.stopImmediatePropagation(); }}
}};
addEventListener("keydown", (event) => {{
  if (event.key === "Enter" && !event.shiftKey && event.target.matches("textarea")) stopIfEmpty(event, event.target);
}}, true);
addEventListener("click", (event) => {{
  stopIfEmpty(event, event.target.closest?.(".submit-button")?.closest(".input-container").querySelector("textarea"));
}}, true);
new MutationObserver(() => {{
  document.querySelectorAll("textarea[placeholder='']").forEach((box) => {{ box.placeholder = "{PLACEHOLDER}"; }});
}}).observe(document, {{subtree: true, attributeFilter: ["placeholder"]}});
</script>
"""
Address = tuple[str, int, tuple[str, str] | None]  # host, port, (user, password) where the page has them
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.description = (
        "The chat page on 127.0.0.1:7860. Environment: GRADIO_SERVER_NAME and GRADIO_SERVER_PORT, as gradio's own; "
        "CHAT_AUTH=user:password, needed for any address that other machines reach."
    )
    preflight.add_config_arguments(parser, "chat")
    parser.add_argument("--terminal", action="store_true", help="chat in the terminal instead")
    parser.add_argument("--expert", action="store_true", help="show the model's path and sliders for its settings")


def run(args: argparse.Namespace) -> None:
    """Chat until interrupted."""
    config = load(args.config, args.overrides, "chat")
    address = None if args.terminal else read_address()  # before the model is loaded
    trained = provenance.check_model(config, args.config)
    preflight.require(config, args)
    if address is None:
        # LLaMA-Factory's terminal chat reads its config from the command line
        sys.argv = ["llamafactory-cli", str(args.config), *args.overrides]
        chat_in_terminal()
    else:
        serve_page(address, config, provenance.describe(config, trained) if args.expert else None)


def read_address() -> Address:
    """Return the address that the environment asks for; UserError if it is open to others, taken or nonsense."""
    if os.environ.get("GRADIO_SHARE", "").lower() in ("1", "true", "y"):
        raise UserError("GRADIO_SHARE would publish the chat through a tunnel; unset it, and see CHAT_AUTH in --help")
    auth = None
    if text := os.environ.get("CHAT_AUTH"):
        user, _, password = text.partition(":")
        if not (user and password):
            raise UserError("CHAT_AUTH must be user:password, neither of them empty")
        auth = user, password
    # gradio would say that it can't serve there only after the model is loaded
    with listen("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", 7860, "CHAT_AUTH") as listener:
        host, port = listener.getsockname()[:2]
        return f"[{host}]" if ":" in host else host, port, auth  # as gradio takes one of IPv6


def chat_in_terminal() -> None:
    """Run LLaMA-Factory's terminal chat, the notice at its prompt; the end of the input ends it."""
    from llamafactory.chat.chat_model import run_chat

    print(f"{NOTICE_ZH}\n{NOTICE_EN}", flush=True)
    try:
        run_chat()
    except EOFError:
        print()


# ---- the page -------------------------------------------------------------------------------------------------------
def serve_page(address: Address, config: dict[str, Any], about: str | None) -> None:
    """Serve the page until interrupted; its address is the last line that is printed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.pop("GRADIO_SERVER_NAME", None)  # is in `address`; gradio would try it as one of IPv4
    with console.logged(Path("results") / "chat.log") as terminal:
        from llamafactory.chat import ChatModel
        from llamafactory.extras.misc import fix_proxy

        fix_proxy()  # gradio asks its own page whether it is up, and must not ask through a proxy
        ask_no_other_host()
        page = build_page(ChatModel(config).engine, about)
        host, port, auth = address
        quietly = {"share": False, "show_api": False, "inbrowser": False, "quiet": True}
        page.queue().launch(server_name=host, server_port=port, auth=auth, prevent_thread_lock=True, **quietly)
        print(f"{NOTICE_ZH}\n{NOTICE_EN}\n{TITLE}: http://{host}:{port}", file=terminal, flush=True)
        page.block_thread()


def ask_no_other_host() -> None:
    """Take the scripts of other hosts out of gradio's page: slow or blocked in China, and nobody's business."""
    import jinja2
    from gradio.routes import templates

    name = "frontend/index.html"
    source = templates.env.loader.get_source(templates.env, name)[0]
    without = re.sub(r'<script[^>]*src="https?://[^>]*>\s*</script>|<link[^>]*href="https?://[^>]*>', "", source)
    templates.env.loader = jinja2.ChoiceLoader([jinja2.DictLoader({name: without}), templates.env.loader])


def build_page(engine: Any, about: str | None = None) -> Any:
    """Return the page as gradio Blocks over a LLaMA-Factory chat engine; `about` is shown with the settings, to experts."""
    import gradio as gr

    from medasst_tools.serving.generation import Generation

    async def answer(message: str, history: list[dict[str, Any]], *settings: float) -> AsyncIterator[str]:
        """Stream the answer to a message, each time as far as it has come; whoever presses stop ends the generation too."""
        turns = [
            {"role": turn["role"], "content": harmless(turn["content"]) if turn["role"] == "user" else turn["content"]}
            for turn in [*history, {"role": "user", "content": message}]
        ]
        given = dict(zip(("max_new_tokens", "temperature", "top_p"), settings, strict=False))
        text = ""
        async with contextlib.aclosing(Generation(engine, turns, **given).pieces()) as pieces:
            async for piece in pieces:
                text += piece
                yield text

    theme = gr.themes.Soft(font=FONTS, font_mono=["monospace"])
    options = {"css": CSS, "theme": theme, "head": SCRIPT}
    labels = {"show_label": False, "submit_btn": "发送", "stop_btn": "停止"}
    with gr.Blocks(title=TITLE, fill_height=True, analytics_enabled=False, **options) as page:
        english = f'<span class="english">{NOTICE_EN}</span>'
        gr.HTML(f"<b>{TITLE}</b>　{NOTICE_ZH} {english}", elem_id="notice")
        if about:
            gr.Markdown(about)
        gr.ChatInterface(
            answer,
            type="messages",
            chatbot=text_chatbot(),
            textbox=gr.Textbox(placeholder=PLACEHOLDER, max_lines=6, max_length=4000, autofocus=True, **labels),
            examples=[[example] for example in EXAMPLES],
            cache_examples=False,
            additional_inputs=_sliders(engine) if about else None,
            fill_height=True,
            analytics_enabled=False,
        )
    return page


def text_chatbot() -> Any:
    """Return a gr.Chatbot that shows text as it is: gradio takes `体温<38` for HTML, and would fetch an image that a text names."""
    import gradio as gr

    def each(turns, change):
        return [turn | {"content": change(turn["content"])} for turn in turns or []]

    chatbot = gr.Chatbot(type="messages", show_label=False, scale=1, sanitize_html=True, render_markdown=False)
    show, read = chatbot.postprocess, chatbot.preprocess
    chatbot.postprocess = lambda value: show(each(value, html.escape))
    chatbot.preprocess = lambda payload: each(read(payload), html.unescape)
    return chatbot


def harmless(text: str) -> str:
    """Return a user's text with all that looks like a template's mark broken: the model would take `</s>` for the end of a turn."""
    return re.sub(r"([<\[])(?=[|｜/A-Za-z_])", "\\1\u200b", text)


def _sliders(engine: Any) -> list[Any]:
    import gradio as gr

    values = engine.generating_args
    sliders = [gr.Slider(8, 2048, value=values["max_new_tokens"], step=1, label="max_new_tokens")]
    if values["do_sample"]:  # greedy: nothing to set
        sliders += [gr.Slider(0.01, 1.5, value=values["temperature"], label="temperature")]
        sliders += [gr.Slider(0.01, 1.0, value=values["top_p"], label="top_p")]
    return sliders
