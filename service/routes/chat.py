"""POST /v1/chat/completions: OpenAI's form of /vqa, for its clients unchanged. The same engine, adapters, limits and answers.

Ours beside OpenAI's: `grounding` in the request (the stock client's extra_body), `hscr` in the answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal
from uuid import uuid4

from fastapi import Request, Response
from pydantic import BaseModel, Field

from hscr.answers import Answer, Delta, TokenLogprob
from hscr.artifacts import json_digest
from service import asking, openai_errors
from service.adapters import Resolved
from service.answer_view import AdapterRef, Grounding, answer_view
from service.body_schema import body_schema
from service.engine import Question
from service.errors import Problem
from service.event_stream import event_stream
from service.routes.chat_request import ChatRequest, conversation, read
from service.routes.vqa import ModelRef, model_ref
from service.routing import Router, direct, json_response
from service.state import Service, State

router = Router(prefix="/v1", tags=["openai"])
MAX_TOKENS = 256  # where a request names no limit
_NO_SUCH = ("adapter_not_found", "alias_not_found", "version_not_found", "adapter_for_other_model")


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[Logprob]
    refusal: None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: Literal[0] = 0
    message: Said
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Ours(BaseModel):
    model: ModelRef
    adapter: AdapterRef | None
    grounding: Grounding | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = Field(description="The version that answered, as `name:version`; the base model's id without one.")
    choices: list[Choice]
    usage: ChatUsage
    system_fingerprint: str = Field(description="Of the digests of the base model and the adapter.")
    hscr: Ours = Field(description="Not OpenAI's.")


OPENAPI: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema(ChatRequest)}}},
}


class _Told:
    """What every part of one answer says of itself."""

    def __init__(self, state: State, resolved: Resolved | None) -> None:
        base = model_ref(state)
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self.model = f"{resolved.name}:{resolved.version}" if resolved else base.id
        own = json_digest([base.id, base.digest, resolved.digest if resolved else None])
        self.fingerprint = f"fp_{own.removeprefix('sha256:')[:12]}"
        self.base, self.resolved = base, resolved

    def ours(self, wish: ChatRequest, answer: Answer) -> Ours:
        view = answer_view(answer, self.resolved, wish.grounding, abstain=False)
        return Ours(model=self.base, adapter=view.adapter, grounding=view.grounding)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        body = {**head, "system_fingerprint": self.fingerprint, "choices": choices, **more}
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


@router.post(
    "/chat/completions",
    summary="Ask with OpenAI's client",
    openapi_extra=OPENAPI,
    response_model=ChatCompletion,
)
@direct
async def chat(state: Service, request: Request) -> Response:
    """Several turns; images as data URLs, placed before the text of their turn. `stream: true` answers with server-sent events."""
    asking.ready(state, request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem("unsupported_media_type", "Send application/json.")
    wish = read(await request.body())
    turns, data, views = conversation(wish)
    asking.require_images(state, len(data))
    resolved = None
    if wish.model != state.settings.model_id:  # the base asks no thread
        resolved = await asyncio.to_thread(version_of, state, wish.model)
    decoded = await asyncio.to_thread(asking.decode, state, request, data, views)
    question = Question(
        images=tuple(d.image for d in decoded),
        text=turns,
        adapter_digest=resolved.digest if resolved else None,
        adapter_folder=await asking.adapter_folder(state, resolved),
        max_tokens=wish.max_completion_tokens or wish.max_tokens or MAX_TOKENS,
        temperature=wish.temperature,
        # Our streams of chance have 31 bits; without a seed every answer is drawn anew, as OpenAI's clients expect.
        seed=secrets.randbelow(2**31) if wish.seed is None else wish.seed % 2**31,
        grounding=wish.grounding,
        top_p=wish.top_p,
        stop=tuple(wish.stop),
        logprobs=(wish.top_logprobs or 0) if wish.logprobs else None,
    )
    told = _Told(state, resolved)
    if wish.stream:
        parts = await asking.stream(state, question, request)
        return event_stream(_events(told, wish, parts))
    answer = await asking.ask(state, question, request)
    completion = ChatCompletion(
        id=told.id,
        created=told.created,
        model=told.model,
        choices=[
            Choice(
                message=Said(content=answer.text),
                logprobs=_logprobs(answer.logprobs) if wish.logprobs else None,
                finish_reason=answer.finish_reason,
            )
        ],
        usage=_usage(answer),
        system_fingerprint=told.fingerprint,
        hscr=told.ours(wish, answer),
    )
    return json_response(completion)


def version_of(state: State, name: str) -> Resolved:
    """The adapter version that a model's name means, which is not the base's. Blocks. Raises Problem."""
    try:
        resolved = asking.resolve(state, name)
    except Problem as problem:
        if problem.code not in _NO_SUCH:
            raise
        resolved = None
    if resolved is None:
        raise Problem("model_not_found", "GET /v1/models lists what this service answers as.", param="model")
    return resolved


async def _events(told: _Told, wish: ChatRequest, parts: AsyncGenerator[Delta | Answer]) -> AsyncIterator[str]:
    """Server-sent events: the role, what is said as it is said, the end with our fields, the usage where it was asked for."""
    counted = wish.stream_options is not None and wish.stream_options.include_usage
    more = {"usage": None} if counted else {}

    def choice(delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]

    try:
        async with aclosing(parts):
            yield told.chunk(choice({"role": "assistant", "content": "", "refusal": None}), **more)
            async for part in parts:
                if isinstance(part, Delta):
                    logprobs = _logprobs(part.logprobs).model_dump() if wish.logprobs and part.logprobs else None
                    if part.text or logprobs:
                        yield told.chunk(choice({"content": part.text}, logprobs), **more)
                    continue
                ours = told.ours(wish, part).model_dump(mode="json")
                yield told.chunk(choice({}, finish=part.finish_reason), **more, hscr=ours)
                if counted:
                    yield told.chunk([], usage=_usage(part).model_dump())
                yield "data: [DONE]\n\n"
    except Problem as problem:  # the status is sent already; the client raises what stands under `error`
        yield f"data: {json.dumps(openai_errors.document(problem))}\n\n"


def _usage(answer: Answer) -> ChatUsage:
    n, m = answer.prompt_tokens, answer.completion_tokens
    return ChatUsage(prompt_tokens=n, completion_tokens=m, total_tokens=n + m)


def _logprobs(tokens: list[TokenLogprob] | None) -> Logprobs:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return Logprobs(
        content=[
            Logprob(**one(t.text, t.logprob), top_logprobs=[TopLogprob(**one(*other)) for other in t.top])
            for t in tokens or ()
        ]
    )
