"""An OpenAI-style endpoint that answers, or fails in every ordinary way, as a test says."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-of-this-test"


class Endpoint(ThreadingHTTPServer):
    """Its answer tells what it was asked; `script` says what the n-th attempt at a question meets: a failure, or another answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server_port}/v1"
        self.script = lambda question, attempt: 200
        self.models = ["medasst"]
        self.attempts: dict[str, int] = {}
        self.requests: list[dict] = []
        self.at_once = self.most_at_once = self.lists = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """Say nothing of a client that hung up: the tests read what the command prints."""


class Handler(BaseHTTPRequestHandler):
    """Speaks just enough of OpenAI's API."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, status: int, value: dict, **headers) -> None:
        body = json.dumps(value).encode() if value else b"{]"
        with contextlib.suppress(OSError):  # a killed client
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
            for name, text in headers.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

    def allowed(self) -> bool:
        allowed = self.headers["Authorization"] == f"Bearer {KEY}"
        if not allowed:
            self.answer(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        return allowed

    def do_GET(self):  # noqa: N802
        self.server.lists += 1
        if self.allowed() and self.server.models is None:
            self.answer(200, "<html>", **{"Content-Type": "text/html"})
        elif self.allowed():
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models]
            self.answer(200, {"object": "list", "data": models})

    def do_POST(self):  # noqa: N802
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        question = request["messages"][-1]["content"]
        with self.server.lock:
            self.server.attempts[question] = attempt = self.server.attempts.get(question, 0) + 1
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        try:
            self.meet(self.server.script(question, attempt), request)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def meet(self, what, request: dict) -> None:
        if what == "hang":
            time.sleep(30)
        elif what == "slow":
            time.sleep(1.5)
        elif what == "drop":
            self.close_connection = True
        elif what == "html":
            self.answer(200, "<html>hello</html>", **{"Content-Type": "text/html"})
        elif what == "no choices":
            self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": []})
        elif what == "no content":
            choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "length"}
            self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        elif what == "no json":
            self.answer(200, None, **{"Content-Length": "2"})
        elif what == 429:
            self.answer(429, {"error": {"message": "too many"}}, **{"Retry-After": "0.05"})
        elif what == 401:
            self.answer(401, {"error": {"message": f"no entry for {KEY}"}})
        elif isinstance(what, int) and what != 200:
            self.answer(what, {"error": {"message": f"status {what}"}})
        else:
            self.server.requests.append(request)
            turns = "|".join(f"{turn['role']}:{turn['content']}" for turn in request["messages"])
            message = {"role": "assistant", "content": f"  答 {turns} \n" if what == 200 else what}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(
                200,
                {
                    "id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                    "usage": {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6},
                },
            )  # fmt: skip
