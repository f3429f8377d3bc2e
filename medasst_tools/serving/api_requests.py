"""What a chat request may hold: OpenAI's fields, checked by pydantic, and what LLaMA-Factory's app gets of them.

Only what is named here reaches the model. LLaMA-Factory answers some of the rest with a 500, takes some for something
else (`presence_penalty` becomes the repetition penalty) and ignores some, so that an answer isn't what was asked for:
all of that is refused with a reason, as OpenAI's own API words it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_MESSAGES = 512
MAX_STOPS = 16
GREEDY_BELOW = 0.01  # a temperature below it is none, as in vLLM: dividing by it gives infinite scores
# Not supported, and what their value may be all the same: what a client sends that means to leave them alone.
NOT_SUPPORTED: dict[str, tuple] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "top_logprobs": (0,),
}
INSTEAD = {
    "presence_penalty": "; give repetition_penalty",
    "n": "; ask n times",
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "server_error" if status >= 500 else ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; pictures, sound and files would make LLaMA-Factory read paths and fetch addresses."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The content as one text; an assistant's may be absent."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""

    @property
    def speaker(self) -> str:
        """The role as LLaMA-Factory knows it: OpenAI's developer is the system."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(_Strict):
    """OpenAI's chat completion request, as far as it is supported, and `repetition_penalty`, which vLLM has too."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=2)


class PromptRules(NamedTuple):
    """What the loaded model sets for a prompt."""

    model_name: str
    # of a whole prompt (turns, system prompt), as LLaMA-Factory's engine does it
    encode: Callable[[list[dict[str, str]], str | None], list[int]]
    encode_text: Callable[[str], list[int]]
    control_tokens: dict[int, str]
    positions: int
    max_new_tokens: int

    def for_llamafactory(self, body: bytes) -> dict[str, Any]:
        """Return the request that LLaMA-Factory's app gets; Refused if `body` isn't one that can be answered."""
        request = parse(body)
        if request.model != self.model_name:
            raise Refused(
                404,
                f"The model {request.model[:100]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
            )
        turns = turns_of(request.messages)
        self._check_control_tokens(turns)
        asked = request.max_tokens or request.max_completion_tokens
        answer = {
            "model": request.model,
            "messages": turns,
            "stream": bool(request.stream),
            "max_tokens": self._tokens_left(turns, asked),
            "top_p": request.top_p or None,
            "presence_penalty": request.repetition_penalty,  # that is what LLaMA-Factory makes of it
        }
        if request.temperature is not None or request.top_p == 0:  # else as the experiment's chat.yaml says
            answer["do_sample"] = (request.temperature or 0) >= GREEDY_BELOW and request.top_p != 0
            answer["temperature"] = request.temperature if answer["do_sample"] else None
        return answer

    def _check_control_tokens(self, turns: list[dict[str, str]]) -> None:
        for number, turn in enumerate(turns):
            for token in self.encode_text(turn["content"]):
                if name := self.control_tokens.get(token):
                    raise Refused(
                        400,
                        f"messages.{number}.content holds {name}, which the model would take for the end or start of a turn",
                        param=f"messages.{number}.content",
                        code="control_token",
                    )

    def _tokens_left(self, turns: list[dict[str, str]], asked: int | None) -> int:
        """Return how many tokens the answer may have: what was asked, or the experiment's number, as far as it fits.

        Clients of vLLM send 4096 whatever the model has.
        """
        system = turns[0]["content"] if turns[0]["role"] == "system" else None
        prompt = len(self.encode(turns[1:] if system is not None else turns, system))
        left = self.positions - prompt
        if left < 1:
            raise Refused(
                400,
                f"The model has {self.positions} tokens for prompt and answer; the messages take {prompt}",
                param="messages",
                code="context_length_exceeded",
            )
        return min(asked or self.max_new_tokens, left)


def stops_of(body: bytes) -> list[str]:
    """Return the texts at which a parsed request's answer ends; Refused if they are no texts, or too many."""
    stop = ChatRequest.model_validate_json(body).stop
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise Refused(400, f"stop has {len(stops)} texts, must have {MAX_STOPS} at most", param="stop")
    return [text for text in stops if text]


def parse(body: bytes) -> ChatRequest:
    """Return the request; Refused names the first field that is wrong."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        # of a content that is neither text nor a list of parts pydantic names both: the first is what is usually meant
        where = ".".join(str(part) for part in problem["loc"] if part != "str")
        message = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise Refused(400, message, param=where or None, code=problem["type"]) from None
    for name, neutral in NOT_SUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            raise Refused(
                400,
                f"{name} is not supported{INSTEAD.get(name, '; leave it out')}",
                param=name,
                code="unsupported_parameter",
            )
    return request


def turns_of(messages: list[Message]) -> list[dict[str, str]]:
    """Return the turns that LLaMA-Factory takes; Refused if they don't alternate or don't end with a question.

    A greeting of the assistant before the first question is left out: no dialogue that the model learnt from has one.
    """
    turns = [{"role": message.speaker, "content": message.text} for message in messages]
    first = 1 if turns[0]["role"] == "system" else 0
    greeted = len(turns) > first and turns[first]["role"] == "assistant"
    for number, turn in enumerate(turns[first + greeted :]):
        expected, place = ("user", "assistant")[number % 2], first + greeted + number
        if turn["role"] != expected:
            raise Refused(
                400,
                f"messages.{place}.role is {turn['role']}, must be {expected}: after an optional system message, user and assistant take turns",
                param=f"messages.{place}.role",
            )
        if expected == "user" and messages[place].content is None:
            raise Refused(400, f"messages.{place}.content is null, must be text", param=f"messages.{place}.content")
    if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise Refused(400, "The last message must be the user's, and not blank", param=f"messages.{len(turns) - 1}")
    return turns[:first] + turns[first + greeted :]


def prompt_rules(chat_model, model_name: str) -> PromptRules:
    """Return the rules of a LLaMA-Factory ChatModel on its huggingface backend."""
    engine = chat_model.engine
    tokenizer, template = engine.tokenizer, engine.template

    def encode(turns: list[dict[str, str]], system: str | None) -> list[int]:
        return template.encode_oneturn(tokenizer, [*turns, {"role": "assistant", "content": ""}], system)[0]

    return PromptRules(
        model_name=model_name,
        encode=encode,
        encode_text=lambda text: tokenizer.encode(text, add_special_tokens=False),
        control_tokens=control_tokens(tokenizer, template),
        positions=getattr(engine.model.config, "max_position_embeddings", None) or 2048,
        max_new_tokens=engine.generating_args["max_new_tokens"],
    )


def control_tokens(tokenizer, template) -> dict[int, str]:
    """Return {id: token} of the tokenizer's special tokens and of the marks that the template writes between turns.

    The marks, because not every tokenizer calls them special (Gemma's `<start_of_turn>`); not the unknown token, which
    stands for ordinary text.
    """
    formats = (template.format_user, template.format_assistant, template.format_system, template.format_prefix)
    written = "".join(slot for form in formats for slot in form.slots if isinstance(slot, str))
    return {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if number != tokenizer.unk_token_id and (token.special or (token.content.strip() and token.content in written))
    }
