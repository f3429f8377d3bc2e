"""What a chat request may hold: OpenAI's fields, checked by pydantic, and what LLaMA-Factory's engine gets of them.

Only what is named here reaches the model. LLaMA-Factory answers some of the rest with a 500, takes some for something
else (`presence_penalty` becomes the repetition penalty) and ignores some, so that an answer isn't what was asked for:
all of that is refused with a reason, as OpenAI's own API words it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

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
INSTEAD = {"presence_penalty": "; give repetition_penalty", "n": "; ask n times"}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets an error instead of an answer, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        kind = "server_error" if status >= 500 else ERROR_TYPES.get(status, "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}

    def response(self) -> JSONResponse:
        """Return it as it is sent."""
        return JSONResponse(self.body, self.status, self.headers)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A part of a message; of pictures, sound and files LLaMA-Factory would read paths and fetch addresses."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn; OpenAI's developer is the system, and an assistant's content may be absent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def turn(self) -> dict[str, str]:
        """Return it as LLaMA-Factory takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


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
    stop: Annotated[list[str], BeforeValidator(_stops), Field(max_length=MAX_STOPS)] = []
    repetition_penalty: float | None = Field(None, gt=0, le=2)

    def settings(self) -> dict[str, Any]:
        """Return what LLaMA-Factory's engine takes; None is as the experiment's chat.yaml says."""
        given = {
            "max_new_tokens": self.max_tokens or self.max_completion_tokens,
            "top_p": self.top_p or None,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature is None and self.top_p != 0:
            return given
        sampled = (self.temperature or 0) >= GREEDY_BELOW and self.top_p != 0
        return given | {"do_sample": sampled, "temperature": self.temperature if sampled else None}

    def turns(self) -> list[dict[str, str]]:
        """Return the turns that LLaMA-Factory takes; Refused if they don't alternate or don't end with a question.

        A greeting of the assistant before the first question is left out: no dialogue that the model learnt from has one.
        """
        turns = [message.turn() for message in self.messages]
        first = 1 if turns[0]["role"] == "system" else 0
        asked = first + (len(turns) > first and turns[first]["role"] == "assistant")
        for place, turn in enumerate(turns[asked:], asked):
            expected, where = ("user", "assistant")[(place - asked) % 2], f"messages.{place}"
            if turn["role"] != expected:
                rule = "after an optional system message, user and assistant take turns"
                message = f"{where}.role is {turn['role']}, must be {expected}: {rule}"
                raise Refused(400, message, f"{where}.role")
            if expected == "user" and self.messages[place].content is None:
                raise Refused(400, f"{where}.content is null, must be text", f"{where}.content")
        if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise Refused(400, "The last message must be the user's, and not blank", f"messages.{len(turns) - 1}")
        return turns[:first] + turns[asked:]


def parse(body: bytes) -> ChatRequest:
    """Return the request; Refused names the first field that is wrong."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        # of a content that is neither text nor a list of parts pydantic names both: the first is what is usually meant
        where = ".".join(str(part) for part in problem["loc"] if part != "str")
        raise Refused(400, f"{where}: {problem['msg']}".removeprefix(": "), where or None, problem["type"]) from None
    for name, neutral in NOT_SUPPORTED.items():
        value = (request.model_extra or {}).get(name)
        if value is not None and value not in neutral:
            message = f"{name} is not supported{INSTEAD.get(name, '; leave it out')}"
            raise Refused(400, message, name, code="unsupported_parameter")
    return request


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
