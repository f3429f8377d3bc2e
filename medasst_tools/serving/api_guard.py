"""The thin layer between the network and LLaMA-Factory's OpenAI-style app: what may come in, how many, how long.

A pure ASGI app around theirs. It checks the key before it reads anything, the size while it reads, and the request before
a model sees it (`api_requests`); it lets MAX_CONCURRENT generations run, some wait and refuses the rest; it ends a
generation whose client has hung up or whose time is over (`stoppable_model`); and it answers every error in OpenAI's shape.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medasst_tools.serving.api_requests import PromptRules, Refused, stops_of
from medasst_tools.serving.stoppable_model import CURRENT, Generation

logger = logging.getLogger("uvicorn.error")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
CHAT, MODELS, HEALTH = ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/health")
MAX_BODY = 1 << 20  # bytes: more than the text of 32,768 tokens
BODY_SECONDS = 30  # for a request to arrive
SEND_SECONDS = 30  # for a client to take a part of its answer
RETRY_SECONDS = 5
NOTICE = (b"x-medasst-notice", b"Generated text, no medical advice: this is no doctor.")


class ApiGuard:
    """The layer. `concurrent` generations at once, `queue` requests waiting, `time_limit` seconds for a generation."""

    def __init__(
        self, app: ASGIApp, rules: PromptRules, key: str | None, concurrent: int, queue: int, time_limit: float
    ) -> None:
        self.app, self.rules, self.time_limit = app, rules, time_limit
        self.key = key.encode() if key else None
        self.slots = asyncio.Semaphore(concurrent)
        self.most, self.present = concurrent + queue, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand start-up and shutdown on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_notice(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], NOTICE]}
            await send(message)

        path = re.sub("/+", "/", scope["path"]).rstrip("/")  # clients join addresses carelessly
        scope = {**scope, "path": path, "raw_path": path.encode()}
        request = Request(scope, receive)
        try:
            if (request.method, path) == HEALTH:
                await JSONResponse({"status": "ok"})(scope, receive, send_with_notice)
                return
            self._check_caller(request)
            if (request.method, path) == CHAT:
                await self._chat(request, send_with_notice)
            elif (request.method, path) == MODELS:
                await self.app(scope, receive, send_with_notice)
            else:
                asked = f"{request.method} {path[:100]}"
                raise Refused(
                    404, f"No {asked} here; there are {', '.join(' '.join(one) for one in (CHAT, MODELS, HEALTH))}"
                )
        except Refused as refused:
            await error_response(refused)(scope, receive, send_with_notice)
        except ClientDisconnect:
            pass

    def _check_caller(self, request: Request) -> None:
        # without a key, who calls this machine by its own name, and not a web page whose name was given its address
        if not self.key and host_name(request.headers.get("host", "")) not in LOCAL_HOSTS:
            raise Refused(403, f"Without an API key only {' and '.join(LOCAL_HOSTS)} are answered, as the host's name")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.key)):
            raise Refused(401, "Wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key")

    async def _chat(self, request: Request, send: Send) -> None:
        if self.present >= self.most:
            raise Refused(
                429,
                f"{self.most} requests are here already; try again in {RETRY_SECONDS} s",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self.present += 1
        try:
            body = await read_body(request)
            checked = await asyncio.to_thread(self.rules.for_llamafactory, body)
            await self._answer(request, json.dumps(checked).encode(), Trimmer(stops_of(body)), send)
        finally:
            self.present -= 1

    async def _answer(self, request: Request, body: bytes, trimmer: "Trimmer", send: Send) -> None:
        """Wait for a slot and let the app answer; the slot is free again when the generation's thread has ended."""
        generation = Generation()
        gone = asyncio.create_task(watch(request.receive, generation))
        try:
            if not await self._slot(gone):
                return
            late = Refused(
                504,
                f"The answer took longer than {self.time_limit:g} s",
                code="time_limit",
                headers={"x-should-retry": "false"},  # the openai client would try twice more
            )
            timer = asyncio.get_running_loop().call_later(self.time_limit, generation.stop, late)
            try:
                await self._run_app(request.scope, body, Reply(request.scope, send, generation, trimmer))
            finally:
                timer.cancel()
                generation.stop(HUNG_UP)
                await generation.ended()
                self.slots.release()
        finally:
            gone.cancel()

    async def _slot(self, gone: asyncio.Task) -> bool:
        """Return True with a slot, or False without one if the client hangs up first."""
        slot = asyncio.ensure_future(self.slots.acquire())
        await asyncio.wait({slot, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not gone.done():
            return True
        if not slot.cancel():  # it had come by then
            self.slots.release()
        return False

    async def _run_app(self, scope: Scope, body: bytes, reply: "Reply") -> None:
        CURRENT.set(reply.generation)
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            # a client that hangs up is ours to see: the generation ends, and with it the answer
            if not parts:
                await asyncio.Event().wait()
            return parts.pop()

        length = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*length, (b"content-length", str(len(body)).encode())]}
        try:
            await self.app(scope, receive, reply)
        except Exception as error:
            if not reply.generation.failure:
                logger.exception("the app failed")
            reply.generation.stop(Refused(500, f"The server failed ({type(error).__name__})"))
        if not reply.finished:
            with contextlib.suppress(TimeoutError):  # a client that takes nothing takes no error either
                await reply.refuse(reply.generation.failure or Refused(500, "The server gave no whole answer"))


HUNG_UP = Refused(499, "The client hung up")
STOPPED = Refused(499, "A stop text has come")


class Trimmer:
    """Ends a text at the first of the stop texts, also where that comes in pieces."""

    def __init__(self, stops: list[str]) -> None:
        self.stops, self.held, self.ended = stops, "", False

    def feed(self, piece: str, last: bool = False) -> str:
        """Return what of the text so far may be shown; what may be the beginning of a stop text is held back."""
        if self.ended:
            return ""
        self.held += piece
        places = [place for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            self.ended = True
            return self.held[: min(places)]
        kept = 0 if last else max((self._overlap(stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown

    def _overlap(self, stop: str) -> int:
        return next((n for n in range(min(len(stop) - 1, len(self.held)), 0, -1) if self.held.endswith(stop[:n])), 0)


class Reply:
    """Hands the app's answer on. If its generation fails the client is told: by a status, or by an event of its stream."""

    def __init__(self, scope: Scope, send: Send, generation: Generation, trimmer: Trimmer) -> None:
        self.scope, self.send, self.generation, self.trimmer = scope, send, generation, trimmer
        self.started = self.finished = False
        self.about = {"object": "chat.completion.chunk", "created": int(time.time())}

    async def __call__(self, message: Message) -> None:
        """Send a part of the app's answer, or an error in its place."""
        if self.finished:
            return
        if self.generation.failure and not self.trimmer.ended:
            await self.refuse(self.generation.failure)
        elif message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self.refuse(Refused(message["status"], "LLaMA-Factory's app refused the request"))
                return
            self.started = True
            headers = [pair for pair in message["headers"] if pair[0] != b"content-length"]  # a stop text shortens it
            await self._send({**message, "headers": headers})
        else:
            self.finished = not message.get("more_body")
            await self._send({**message, "body": self._body(message.get("body", b""))})

    def _body(self, body: bytes) -> bytes:
        """Return a part of the body: a stream's event, or the whole answer, ended at a stop text and with OpenAI's fields."""
        start = body.find(b"{")
        if start < 0 or self.scope["path"] != CHAT[1]:
            return body
        end = body.rindex(b"}") + 1
        answer = json.loads(body[start:end])
        for choice in answer.get("choices", ()):
            part = choice.get("delta") or choice.get("message") or {}
            last = choice.get("finish_reason") is not None
            if isinstance(part.get("content"), str) or last:
                part["content"] = self.trimmer.feed(part.get("content") or "", last)
            if self.trimmer.ended:
                self.generation.stop(STOPPED)
                choice["finish_reason"] = choice.get("finish_reason") and "stop"
            elif last and self.generation.cut:  # LLaMA-Factory's streams always end with stop
                choice["finish_reason"] = "length"
        if any("delta" in choice for choice in answer.get("choices", ())):
            answer |= self.about
        return body[:start] + json.dumps(answer, ensure_ascii=False).encode() + body[end:]

    async def refuse(self, refused: Refused) -> None:
        """End the answer with an error."""
        self.finished = True
        if self.started:
            event = b"data: " + json.dumps(refused.body).encode() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        else:
            await error_response(refused)(self.scope, None, self._send)

    async def _send(self, message: Message) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            await self.send(message)


def host_name(header: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def error_response(refused: Refused) -> JSONResponse:
    """Return the error as OpenAI's API sends it."""
    return JSONResponse(refused.body, refused.status, refused.headers)


async def watch(receive: Receive, generation: Generation) -> None:
    """Stop the generation when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.stop(HUNG_UP)


async def read_body(request: Request) -> bytes:
    """Return the request's body; Refused if it isn't JSON by its header, too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send JSON, with Content-Type: application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:  # what is too long is read on, so that the client gets to read the answer
                    parts.append(part)
                elif size > 16 * MAX_BODY:
                    break
    except TimeoutError:
        raise Refused(408, f"The request did not arrive within {BODY_SECONDS} s") from None
    if size > MAX_BODY:
        raise Refused(413, f"The request is longer than {MAX_BODY} bytes", code="request_too_large")
    return b"".join(parts)
