"""An OpenAI-style server over LLaMA-Factory's chat engine: what may come in, how many at once, how long.

A small ASGI app instead of LLaMA-Factory's own, which single requests hang or kill. It checks the key before it reads
anything, the size while it reads, and the request before a model sees it (`api_requests`); it lets MAX_CONCURRENT
generations run, some wait and refuses the rest; it ends a generation whose client has hung up or whose time is over
(`generation`); and it answers every error in OpenAI's shape.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from medasst_tools.serving.address import LOCAL_HOSTS
from medasst_tools.serving.api_requests import ChatRequest, Refused, control_tokens, parse
from medasst_tools.serving.generation import Generation, before_stop

logger = logging.getLogger("uvicorn.error")
CHAT, MODELS, HEALTH = "POST /v1/chat/completions", "GET /v1/models", "GET /health"
MAX_BODY = 1 << 20  # bytes: more than the text of 32,768 tokens
BODY_SECONDS = 30  # for a request to arrive
SEND_SECONDS = 30  # for a client to take a part of its answer
NOTICE = (b"x-medasst-notice", b"Generated text, no medical advice: this is no doctor.")


class ApiServer:
    """The app. `concurrent` generations at once, `queue` requests waiting, `time_limit` seconds for a generation.

    `key`: the API key, None without; `verbose`: log the requests.
    """

    def __init__(
        self, engine, name: str, key: str | None, concurrent: int, queue: int, time_limit: float, verbose: bool = False
    ) -> None:
        self.engine, self.name, self.time_limit, self.verbose = engine, name, time_limit, verbose
        self.key = key.encode() if key else None
        self.slots = asyncio.Semaphore(concurrent)
        self.most, self.present = concurrent + queue, 0
        self.control_tokens = control_tokens(engine.tokenizer, engine.template)
        self.positions = getattr(engine.model.config, "max_position_embeddings", None) or 2048

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, message = True, {**message, "headers": [*message["headers"], NOTICE]}
            async with asyncio.timeout(SEND_SECONDS):
                await send(message)

        try:
            await self._route(Request(scope, receive), reply)
        except ClientDisconnect:
            return
        except Exception as error:
            if not (refused := error if isinstance(error, Refused) else None):
                logger.exception("the server failed")
                refused = Refused(500, f"The server failed ({type(error).__name__})")
            with contextlib.suppress(TimeoutError):  # a client that takes nothing takes no error either
                if started:
                    await reply(event(refused.body, last=True))
                else:
                    await refused.response()(scope, receive, reply)

    async def _route(self, request: Request, reply: Send) -> None:
        path = re.sub("/+", "/", request.scope["path"]).rstrip("/")  # clients join addresses carelessly
        asked = f"{request.method} {path}"
        if asked == HEALTH:
            await JSONResponse({"status": "ok"})(request.scope, request.receive, reply)
            return
        self._check_caller(request)
        if asked == CHAT:
            await self._chat(request, reply)
        elif asked == MODELS:
            card = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": "owner"}
            await JSONResponse({"object": "list", "data": [card]})(request.scope, request.receive, reply)
        else:
            raise Refused(404, f"No {asked[:100]} here; there are {CHAT}, {MODELS}, {HEALTH}")

    def _check_caller(self, request: Request) -> None:
        # without a key, who calls this machine by its own name, and not a web page whose name was given its address
        if not self.key and host_name(request.headers.get("host", "")) not in LOCAL_HOSTS:
            raise Refused(403, f"Without an API key only {' and '.join(LOCAL_HOSTS)} are answered, as the host's name")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if self.key and not (scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.key)):
            raise Refused(401, "Wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key")

    async def _chat(self, request: Request, reply: Send) -> None:
        if self.present >= self.most:
            message = f"{self.most} requests are here already; try again in 5 s"
            raise Refused(429, message, code="queue_full", retry_after="5")
        self.present += 1
        try:
            body = await read_body(request)
            if self.verbose:
                logger.info("request: %s", body.decode(errors="replace"))
            asked, generation = await asyncio.to_thread(self._prepare, body)
            await until_hung_up(request.receive, self._answer(asked, generation, request.scope, reply))
        finally:
            self.present -= 1

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Generation]:
        """Return the request and its generation; Refused if `body` isn't a request that can be answered."""
        request = parse(body)
        if request.model != self.name:
            message = f"The model {request.model[:100]!r} does not exist; this server has {self.name!r}"
            raise Refused(404, message, "model", code="model_not_found")
        turns = request.turns()
        for number, turn in enumerate(turns):
            for token in self.engine.tokenizer.encode(turn["content"], add_special_tokens=False):
                if name := self.control_tokens.get(token):
                    where = f"messages.{number}.content"
                    message = f"{where} holds {name}, which the model would take for the end or start of a turn"
                    raise Refused(400, message, where, code="control_token")
        generation = Generation(self.engine, turns, **request.settings())
        left = self.positions - generation.prompt_tokens
        if left < 1:
            taken = f"the messages take {generation.prompt_tokens}"
            message = f"The model has {self.positions} tokens for prompt and answer; {taken}"
            raise Refused(400, message, "messages", code="context_length_exceeded")
        # vLLM's clients send 4096 whatever the model has
        generation.config.max_new_tokens = min(generation.config.max_new_tokens or left, left)
        return request, generation

    async def _answer(self, asked: ChatRequest, generation: Generation, scope: Scope, reply: Send) -> None:
        """Wait for a slot and answer; the slot is free again when the generation's thread has ended."""
        async with self.slots:
            try:
                async with asyncio.timeout(self.time_limit):
                    await self._generate(asked, generation, scope, reply)
            except TimeoutError:
                message = f"The answer took longer than {self.time_limit:g} s"
                # the openai client would try twice more
                raise Refused(504, message, code="time_limit", x_should_retry="false") from None
            except Exception as error:
                logger.exception("generation failed")
                message = f"The generation failed ({type(error).__name__})"
                raise Refused(500, message, code="generation_failed") from None

    async def _generate(self, asked: ChatRequest, generation: Generation, scope: Scope, reply: Send) -> None:
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}

        def chunk(delta: dict[str, str], end: str | None = None) -> Message:
            choice = {"index": 0, "delta": delta, "finish_reason": end}
            return event({**about, "object": "chat.completion.chunk", "choices": [choice]})

        if asked.stream:
            await reply({"type": "http.response.start", "status": 200, "headers": EVENTS})
            await reply(chunk({"role": "assistant", "content": ""}))
        text = ""
        async with contextlib.aclosing(generation.pieces()) as pieces:
            async for piece in before_stop(pieces, asked.stop):
                text += piece
                if asked.stream and piece:
                    await reply(chunk({"content": piece}))
        end = "length" if generation.was_cut else "stop"
        if asked.stream:
            await reply(chunk({}, end))
            await reply(event("[DONE]", last=True))
            return
        answer = {"role": "assistant", "content": generation.text if generation.whole else text}
        prompt, completion = generation.prompt_tokens, len(generation.ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        choice = {"index": 0, "message": answer, "finish_reason": end}
        whole = JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage})
        await whole(scope, None, reply)


EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


def event(data: dict[str, Any] | str, last: bool = False) -> Message:
    """Return an event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": not last}


def host_name(header: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


async def until_hung_up(receive: Receive, work: Coroutine) -> None:
    """Do the work, or as much of it as there is time for until the client hangs up."""

    async def hung_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, watching = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def read_body(request: Request) -> bytes:
    """Return the request's body; Refused if it isn't JSON by its header, too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send JSON, with Content-Type: application/json")
    body, size = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY:  # what is too long is read on, so that the client gets to read the answer
                    body += part
                elif size > 16 * MAX_BODY:
                    break
    except TimeoutError:
        raise Refused(408, f"The request did not arrive within {BODY_SECONDS} s") from None
    if size > MAX_BODY:
        raise Refused(413, f"The request is longer than {MAX_BODY} bytes", code="request_too_large")
    return body
