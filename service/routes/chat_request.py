"""What OpenAI's clients send to /v1/chat/completions: messages in, turns and images out; each refusal names its `param`.

Images are data in the request (data URLs), never addresses. What is not done here (tools, formats, audio, several answers) is refused and
not ignored, but for values that ask for nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from hscr.chat import Turn
from hscr.data_url import data_of
from hscr.image_view import View
from hscr.record_fields import MAX_IMAGES
from service.errors import Problem
from service.routes.vqa import ViewFields

MAX_TURN_CHARS, MAX_CHARS, MAX_MESSAGES, MAX_STOPS = 8000, 32_000, 64, 4
# Taken and not used: they name the caller or bookkeeping of OpenAI's own.
IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
# Not done here; these values ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}


class ImageURL(ViewFields):
    """A data URL; frame, plane, slice and window are ours."""

    url: str = Field(min_length=1, description="data:image/png;base64,… (or another type that /vqa reads).")
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str = Field(max_length=MAX_TURN_CHARS)


class ImagePart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageURL


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        BeforeValidator(_parts, json_schema_input_type=str | list[TextPart | ImagePart]),
        Field(min_length=1, max_length=MAX_IMAGES + 16),
    ]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, data: Any) -> Any:
        """Answers come back as they were given, with fields that say nothing: refusal, tool_calls, audio."""
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key in cls.model_fields or value not in (None, [])}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "model": "brain-mri@champion",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo…"}},
                                {"type": "text", "text": "Which lobe holds the lesion?"},
                            ],
                        }
                    ],
                    "grounding": "summary",
                }
            ]
        },
    )

    model: str = Field(max_length=200, description="The base model's id, `name@alias`, `name:version` or `name`.")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1024)
    max_tokens: int | None = Field(None, ge=1, le=1024, description="The older name; 256 where neither is given.")
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False, description="0, unlike OpenAI's: the likeliest.")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=str | list[str]),
        Field(max_length=MAX_STOPS),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    grounding: Literal["none", "summary", "tokens"] = Field("none", description="Ours; the stock client's extra_body.")


_FIELDS = {
    name
    for model in (ChatRequest, StreamOptions, Message, TextPart, ImagePart, ImageURL)
    for name in model.model_fields
}


def read(body: bytes) -> ChatRequest:
    """The request. Raises Problem with its `param`; no message holds a value that was sent."""
    try:
        given = from_json(body)
    except ValueError:
        raise invalid(None, "The body is no JSON.") from None
    if not isinstance(given, dict):
        raise invalid(None, "The body is no JSON object.")
    fields = {}
    for name, value in given.items():
        if name in ChatRequest.model_fields:
            if value is not None:
                fields[name] = value
        elif name in NEUTRAL:
            if value is not None and value not in NEUTRAL[name]:
                raise Problem("unsupported_parameter", f"{name}: {_unsupported(name)}", param=name)
        elif name not in IGNORED:
            raise Problem("unsupported_parameter", "Leave out what `param` names.", param=name[:80])
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        raise invalid(_param(first["loc"]), _reason(first)) from None
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "It needs logprobs: true.")
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "It needs stream: true.")
    if request.max_tokens and request.max_completion_tokens:
        raise invalid("max_tokens", "Give max_completion_tokens or max_tokens, not both.")
    return request


def conversation(request: ChatRequest) -> tuple[tuple[Turn, ...], list[bytes], list[View]]:
    """The turns, and their images in order with what is chosen of each. Raises Problem."""
    turns, images, views = [], [], []
    for n, message in enumerate(request.messages):
        text = "\n".join(p.text for p in message.content if isinstance(p, TextPart))
        shown = [(m, p.image_url) for m, p in enumerate(message.content) if isinstance(p, ImagePart)]
        if shown and message.role != "user":
            raise invalid(f"messages[{n}].content", "Only messages of the user may hold images.")
        if len(text) > MAX_TURN_CHARS:
            raise invalid(f"messages[{n}].content", f"A message has at most {MAX_TURN_CHARS} characters.")
        if not text.strip():
            raise invalid(f"messages[{n}].content", "A message needs text.")
        for m, image in shown:
            images.append(_data(image.url, f"messages[{n}].content[{m}].image_url.url"))
            views.append(image.view())
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, text, len(shown)))
    if turns[-1].role != "user":
        raise invalid("messages", "The last message must be the user's.")
    if sum(len(t.text) for t in turns) > MAX_CHARS:
        raise invalid("messages", f"All messages together have at most {MAX_CHARS} characters.")
    if not 1 <= len(images) <= MAX_IMAGES:
        raise invalid("messages", f"Questions here are about images: send 1 to {MAX_IMAGES}, as data URLs.")
    return tuple(turns), images, views


def invalid(param: str | None, why: str) -> Problem:
    """The client shows the message alone, so it names the field too; a name that the caller made up stands in `param` only."""
    known = param is not None and set(re.sub(r"\[\d+\]", "", param).split(".")) <= _FIELDS
    return Problem("invalid_parameter", f"{param}: {why}" if known else why, param=param)


def _data(url: str, param: str) -> bytes:
    """The bytes of a data URL; no address is ever fetched."""
    try:
        return data_of(url)
    except ValueError as error:
        said = str(error)
        raise invalid(param, said[0].upper() + said[1:] + ("" if said.endswith("…") else ".")) from None


def _unsupported(name: str) -> str:
    allowed = " or ".join(str(v) for v in NEUTRAL[name])
    return "Leave it out." if not allowed else f"Leave it out, or send {allowed}."


def _param(loc: tuple[str | int, ...]) -> str:
    """messages[0].content[1].image_url.url: OpenAI's way of writing where; a part's type, which pydantic names too, is left out."""
    named = [p for n, p in enumerate(loc) if not (n >= 2 and isinstance(loc[n - 1], int) and loc[n - 2] == "content")]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p[:80]}" for p in named[:8]).removeprefix(".")


def _reason(error: Any) -> str:
    if error["type"].startswith("union_tag"):
        return "A part of a message is of type text or image_url."
    return str(error["msg"]).removeprefix("Value error, ")[:200] + "."
