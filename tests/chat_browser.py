"""The chat page as a person uses it, in the system's chromium; what the tests and `make screenshot` share.

Run: `python tests/chat_browser.py --out docs/chat.png`; it starts `medasst chat` on the demo and asks it two questions.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium")
LAPTOP, PHONE = (1280, 900), (390, 844)
BOX, ANSWERS = "textarea:visible", '[data-testid="bot"]'
QUESTIONS = ("失眠怎么办？", "需要去医院吗？")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server(NamedTuple):
    """A server's process, the address that it will answer at, and what it says."""

    url: str
    process: subprocess.Popen
    log: Path

    def wait(self, path: str = "", seconds: int = 240) -> None:
        """Return when the address answers; an error shows what the server said."""
        for _ in range(seconds * 4):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(self.url + path, timeout=5).close()
                return
            except OSError:
                time.sleep(0.25)
        raise RuntimeError(
            f"{self.url}{path}: no answer, status {self.process.poll()}:\n{self.log.read_text()[-4000:]}"
        )


@contextlib.contextmanager
def started(command: list[str], port: int, log: Path, **options) -> Iterator[Server]:
    """Run a server's command until the block ends."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )
        try:
            yield Server(f"http://127.0.0.1:{port}/", process, log)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@contextlib.contextmanager
def browser_page(url: str, size: tuple[int, int] = LAPTOP, ready: str = BOX) -> Iterator:
    """Yield the page, opened in a fresh headless chromium of this size; `page.hosts` are those that it asked anything of."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(urllib.parse.urlsplit(request.url).netloc))
        page.goto(url)
        page.wait_for_selector(ready)
        yield page
        browser.close()


WATCH = """() => {
  window.answerSeen = [];
  new MutationObserver(() => {
    const answers = document.querySelectorAll('[data-testid="bot"]');
    const text = answers.length ? answers[answers.length - 1].innerText.trim() : '';
    if (text && text !== window.answerSeen.at(-1)) window.answerSeen.push(text);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def ask(page, question: str, box: str = BOX, send: str | None = None) -> tuple[str, list[str]]:
    """Type a question, press Enter (or click `send`), and return the whole answer and what was seen of it while it came."""
    before = page.locator(ANSWERS).count()
    page.evaluate(WATCH)
    page.locator(box).last.fill(question)
    if send:
        page.locator(send).click()
    else:
        page.keyboard.press("Enter")
    return whole_answer(page, before + 1), page.evaluate("window.answerSeen")


def whole_answer(page, count: int) -> str:
    """Return the last of `count` answers when it is whole: quiet for two seconds."""
    page.wait_for_function(f"document.querySelectorAll(`{ANSWERS}`).length >= {count}", timeout=120_000)
    answer, quiet = "", 0
    for _ in range(600):
        now = page.locator(ANSWERS).last.inner_text().strip()
        quiet = quiet + 1 if now and now == answer else 0
        answer = now
        if quiet == 10:
            break
        page.wait_for_timeout(200)
    return answer


def main() -> None:
    """Take the picture of docs/chat.md: the page on a laptop and on a phone."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    port = free_port()
    command = [str(Path(sys.executable).with_name("medasst")), "chat", "factory_configs/demo/chat.yaml"]
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
        with started(command, port, Path(folder, "log"), env=environment) as server:
            server.wait()
            for size, questions in ((LAPTOP, QUESTIONS), (PHONE, ())):
                with browser_page(server.url, size) as page:
                    for question in questions:
                        ask(page, question)
                    page.wait_for_timeout(1000)
                    pictures.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    both = Image.new("RGB", (LAPTOP[0] + PHONE[0] + 20, LAPTOP[1]), "#d1d5db")
    both.paste(pictures[0])
    both.paste(pictures[1], (LAPTOP[0] + 20, 0))
    both.quantize(64).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
