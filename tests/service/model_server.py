"""A small server that speaks OpenAI's API as vLLM does: completions, streams, adapters by path, log-probabilities of prompts. Not a test.

Its model is arithmetic: what it says depends on the adapter, the last text and how bright the image is, and an image that is partly black
makes what it said less likely. The shapes are those of vLLM's protocol files (chat_completion, lora), read and not run.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image

MODEL = "tiny/model"
PIECES = re.compile(r"\s*\S+")
IMAGE_TOKENS = 16


@dataclass
class Server:
    """What tests look at and change."""

    key: str = "server-key"
    owner: str = "vllm"
    prompt_logprobs: bool = True
    lora_routes: bool = True
    trouble: str = ""  # hang, garbage, shapes, cut, error, or a status
    loaded: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    running: int = 0
    left: int = 0  # clients that hung up
    pause_s: float = 0.0

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/v1/models")(self.models)
        app.post("/v1/chat/completions")(self.chat)
        if self.lora_routes:
            app.post("/v1/load_lora_adapter")(self.load)
            app.post("/v1/unload_lora_adapter")(self.unload)
        return app

    def _stranger(self, request: Request) -> Response | None:
        if request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    async def models(self, request: Request) -> Response:
        cards = [{"id": MODEL, "object": "model", "owned_by": self.owner, "root": MODEL, "parent": None}]
        cards += [{"id": n, "object": "model", "owned_by": self.owner, "parent": MODEL} for n in self.loaded]
        return self._stranger(request) or JSONResponse({"object": "list", "data": cards})

    async def load(self, request: Request) -> Response:
        body = await request.json()
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.loaded:
            return _error(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
        if not (path / "adapter_config.json").is_file():
            return _error(404, f"No adapter found for '{path}'", "NotFoundError")
        self.loaded[name] = str(path)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        if self.loaded.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        self.unloaded.append(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def chat(self, request: Request) -> Response:
        if refusal := self._stranger(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if self.trouble == "hang":
            await asyncio.sleep(3600)
        if self.trouble == "garbage":
            return PlainTextResponse("<html>canary" * 3)
        if self.trouble == "shapes":
            return PlainTextResponse('data: {"choices": [{"delta": {"content": ["canary"]}}]}\n\n')
        if self.trouble == "endless":
            return StreamingResponse(_endless(), media_type="text/event-stream")
        if self.trouble.isdigit():
            answer = _error(int(self.trouble), "canary of the question", "BadRequestError")
            answer.headers["retry-after"] = "7"
            return answer
        if body["model"] not in (MODEL, *self.loaded):
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if body.get("continue_final_message"):
            return self._forced(body)
        assert body["stream"]
        return StreamingResponse(self._events(body, request), media_type="text/event-stream")

    def _forced(self, body: dict[str, Any]) -> Response:
        *before, last = body["messages"]
        told = None
        if self.prompt_logprobs and "prompt_logprobs" in body:
            light = 1.0 - dark(before)
            at = [{"5": {"logprob": -1.0, "rank": 1, "decoded_token": "x"}} for _ in range(count(before))]
            at += [
                {str(n): {"logprob": -0.5 - (1 - light) * (n + 1), "rank": 1, "decoded_token": piece}}
                for n, piece in enumerate(PIECES.findall(last["content"]))
            ]
            told = [None, *at[1:]]
        n = count(before) + len(PIECES.findall(last["content"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": " x"}, "finish_reason": "length"}
        usage = {"prompt_tokens": n, "completion_tokens": 1, "total_tokens": n + 1}
        return JSONResponse({"id": "x", "choices": [choice], "usage": usage, "prompt_logprobs": told})

    async def _events(self, body: dict[str, Any], request: Request) -> AsyncIterator[str]:
        self.running += 1
        try:
            pieces = PIECES.findall(said(body["model"], body["messages"]))
            finish = "stop"
            if any(stop in "".join(pieces) for stop in body.get("stop", ())):
                cut = min("".join(pieces).find(s) for s in body["stop"] if s in "".join(pieces))
                pieces = PIECES.findall("".join(pieces)[:cut])
            if len(pieces) > body["max_tokens"]:
                pieces, finish = pieces[: body["max_tokens"]], "length"
            yield _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for n, piece in enumerate(pieces):
                await asyncio.sleep(self.pause_s)
                if self.trouble == "error" and n == 1:
                    yield f"data: {json.dumps({'error': {'message': 'canary', 'code': 500}})}\n\n"
                    return
                if self.trouble == "cut" and n == 1:
                    return
                choice: dict[str, Any] = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
                if body.get("logprobs"):
                    top = [{"token": piece, "logprob": -0.25, "bytes": None}] * body.get("top_logprobs", 0)
                    choice["logprobs"] = {"content": [{"token": piece, "logprob": -0.25, "top_logprobs": top}]}
                if body.get("return_token_ids"):
                    choice["token_ids"] = [100 + n]
                yield _event([choice])
            yield _event([{"index": 0, "delta": {}, "finish_reason": finish, "stop_reason": None}])
            n, m = count(body["messages"]), len(pieces)
            yield _event([], usage={"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m})
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += 1
            raise
        finally:
            self.running -= 1


def said(model: str, messages: list[dict[str, Any]]) -> str:
    shade = int(np.mean([np.asarray(i).mean() for i in images(messages)]))
    policy = "base" if model == MODEL else model[-6:]
    return f"The lesion ({policy}) is {shade} bright after {len(messages)} turns: {text(messages[-1])[-20:]}"


def images(messages: list[dict[str, Any]]) -> list[Image.Image]:
    urls = [p["image_url"]["url"] for m in messages for p in m["content"] if isinstance(p, dict) and "image_url" in p]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def dark(messages: list[dict[str, Any]]) -> float:
    """The share of black pixels."""
    return float(np.mean([(np.asarray(i).max(axis=-1) == 0).mean() for i in images(messages)]))


def text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def count(messages: list[dict[str, Any]]) -> int:
    return sum(3 + len(PIECES.findall(text(m))) for m in messages) + IMAGE_TOKENS * len(images(messages))


def _event(choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"


async def _endless() -> AsyncIterator[str]:
    while True:
        await asyncio.sleep(0)
        yield "x" * 65536


def _error(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
