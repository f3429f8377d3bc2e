"""A hub on 127.0.0.1 that speaks as much of Hugging Face's and of ModelScope's HTTP interface as their clients need to fetch files."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub:
    """Repositories as {"owner/name": {file: bytes}}, and how the hub misbehaves. `asked`: (method, path, Range) of each request."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.sent: dict[str, bytes] = {}  # what is sent for a file instead of what the hub says it has
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.stall_after: int | None = None  # bytes of a body after which nothing comes any more
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *words):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that hung up is no news
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts, query = urlsplit(request.path), parse_qs(urlsplit(request.path).query)
        self.asked.append((request.command, unquote(request.path), request.headers.get("Range")))
        path = unquote(parts.path).strip("/")
        if path.startswith(("api/v1/", "openapi/v1/")):
            self.modelscope(request, path.split("/v1/", 1)[1].split("/"), query)
        else:
            self.huggingface(request, path.removeprefix("datasets/"))

    def huggingface(self, request, path: str) -> None:
        words = path.removeprefix("api/").removeprefix("models/").split("/")
        repository = "/".join(words[:2])
        files = self.repositories.get(repository)
        if repository in self.gated:
            return self.reply(request, 401, b"gated", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if files is None or repository in self.private:
            return self.reply(request, 401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no repo"})
        if path.startswith("api/"):
            facts = {"id": repository, "sha": "c0ffee", "cardData": {"license": "apache-2.0"}}
            facts["siblings"] = [{"rfilename": name} for name in files]
            if "tree" in words:
                facts = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()
                ]
            return self.reply(request, 200, json.dumps(facts).encode(), {"Content-Type": "application/json"})
        name = "/".join(words[4:])
        if name not in files:
            return self.reply(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "c0ffee"})
        etag = hashlib.sha256(files[name]).hexdigest()
        self.send_file(request, name, files[name], {"X-Repo-Commit": "c0ffee", "ETag": f'"{etag}"'})

    def modelscope(self, request, words: list[str], query: dict[str, list[str]]) -> None:
        repository, rest = "/".join(words[1:3]), words[3:]
        files = self.repositories.get(repository)
        if repository in self.private:
            return self.reply(request, 403, b'{"Code": 403, "Message": "no access"}')
        if files is None:
            return self.reply(request, 404, b'{"Code": 404, "Message": "record not found"}')
        if rest == ["repo"]:
            name = query["FilePath"][0]
            return self.send_file(request, name, files[name], {})
        if rest:
            listed = [
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": hashlib.sha256(data).hexdigest(),
                }
                for name, data in files.items()
            ]
            body = {"Code": 200, "Success": True, "Data": {"Files": listed}}
        else:
            body = {
                "Code": 200,
                "Success": True,
                "success": True,
                "data": {"license": "apache-2.0"},
                "Data": {"License": "apache-2.0"},
            }
        self.reply(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def reply(self, request, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def send_file(self, request, name: str, data: bytes, headers: dict[str, str]) -> None:
        data = self.sent.get(name, data)
        start, wanted = 0, request.headers.get("Range")
        if wanted and request.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(data)
            headers |= {"Content-Range": f"bytes {start}-{min(end, len(data)) - 1}/{len(data)}"}
            data, status = data[start:end], 206
        else:
            status = 200
        if self.stall_after is None or request.command == "HEAD":
            return self.reply(request, status, data, headers | {"Accept-Ranges": "bytes"})
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(data[: self.stall_after])
        request.wfile.flush()
        time.sleep(60)
