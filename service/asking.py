"""From a caller's question to its answer: what every route that asks the model shares. Knows no route and no form of a request.

A client that leaves takes its question out of the queue, or out of the batch that works on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException

from hscr.answers import Answer, Delta, OnDelta
from hscr.chat import ConversationError
from hscr.image_limits import ImageError, ImageLimits
from hscr.image_view import View
from hscr.images import Decoded
from service import adapters, artifact_store, tracing
from service.adapters import Resolved
from service.artifact_store import brought
from service.batcher import Asked, Closed, Full, Yielded
from service.decoding import DecodersBusy, decoders
from service.engine import AdapterDamaged, Question
from service.errors import Problem
from service.state import State

log = logging.getLogger("hscr.asking")
GONE_S = 0.25  # how often a waiting request looks whether its client is still there


def ready(state: State, request: Request) -> None:
    """Raises Problem where nothing answers, not yet, or not another question of this caller now: before its images are decoded."""
    if state.draining.is_set():  # a question that came before is still taken into the queue
        raise _draining()
    _taking(state)
    _within_limit(state, request)


def _taking(state: State) -> Asked:
    """What answers here. Raises Problem."""
    here = state.answering
    if here is None:
        raise Problem("engine_unavailable", "This replica runs jobs and the registry only (HSCR_ENGINE=none).")
    status = here.status
    if status == "failed":
        raise Problem("engine_unavailable", "The model could not be loaded; /readyz and the service's log say why.")
    if status == "yielded" and here.turn is not None:
        raise _yielded(here.turn.back_in_s)
    if status == "away":
        detail = "It is away, or serves another model than HSCR_UPSTREAM_MODEL; /readyz says when it is there."
        raise Problem("upstream_unavailable", detail, headers={"Retry-After": "5"})
    if status == "loading":
        raise Problem("engine_loading", "Ask again in a few seconds; /readyz says when.", headers={"Retry-After": "5"})
    if (wait_s := here.asked.full_for_s) is not None:
        raise _overloaded(state, wait_s)
    return here.asked


def _draining() -> Problem:
    return Problem("draining", "Ask again in a few seconds.", headers={"Retry-After": "5"})


def _yielded(back_in_s: int) -> Problem:
    detail = "A job has the device (HSCR_DEVICE_POLICY=train_first); Retry-After says about how long."
    return Problem("engine_yielded", detail, headers={"Retry-After": str(back_in_s)})


def require_images(state: State, n: int) -> None:
    """Problem where the model's family takes no question with n images."""
    if n > 1 and not (state.answering is not None and state.answering.engine.several_images):
        raise Problem("one_image_only", "Ask with one image; docs/families.md lists the models that take several.")


def decode(state: State, request: Request, several: list[bytes], views: list[View]) -> tuple[Decoded, ...]:
    """Images of a question, decoded in other processes. Blocks. Raises Problem."""
    salt = request.state.caller.id if state.settings.prefix_cache_per_key else ""
    try:
        with tracing.span("vqa.decode", images=len(several), bytes=sum(map(len, several))):
            return decoders(state.settings).decode(several, ImageLimits(), views, salt)
    except DecodersBusy:
        raise Problem("decoders_busy", "Ask again in a few seconds.", headers={"Retry-After": "5"}) from None
    except ImageError as error:
        raise Problem("invalid_image", f"{error}.") from None


async def version(state: State, reference: str | None) -> Resolved | None:
    """The version that a reference means now, None for the base. Raises Problem."""
    return await asyncio.to_thread(resolve, state, reference) if reference else None


def resolve(state: State, reference: str | None) -> Resolved | None:
    """The same. Blocks."""
    if not reference:
        return None
    with state.database.read() as session:
        resolved = adapters.resolve(session, reference)
    if resolved.model != state.settings.model_id:
        raise Problem("adapter_for_other_model", "Ask a service that serves the base model of this adapter.")
    return resolved


async def adapter_folder(state: State, resolved: Resolved | None) -> Path | None:
    """Where the version's files are, brought from the store where they are not at hand; None for the base. Raises Problem."""
    return await brought(state.artifacts, artifact_store.adapter(resolved.digest)) if resolved else None


async def ask(state: State, question: Question, request: Request) -> Answer:
    """Wait for the answer. Raises Problem, and HTTPException where the client is gone."""
    return (await ask_all(state, [question], request))[0]


async def ask_all(state: State, questions: Sequence[Question], request: Request) -> list[Answer]:
    """Wait for several answers that are worked on together; all are asked, or none. Raises as `ask` does."""
    futures: list[asyncio.Future[Answer]] = []
    try:
        for question in questions:
            futures.append(_submit(state, question, request))
        while not all(future.done() for future in futures):
            await asyncio.wait(futures, timeout=GONE_S, return_when=asyncio.FIRST_EXCEPTION)
            if any(future.done() and (future.cancelled() or future.exception()) for future in futures):
                break
            if not all(future.done() for future in futures) and await request.is_disconnected():
                raise HTTPException(400)  # nobody reads this
        failed = [future for future in futures if future.done() and (future.cancelled() or future.exception())]
        return [_result(future) for future in failed or futures]
    finally:
        for future in futures:
            future.cancel()


async def stream(state: State, question: Question, request: Request) -> AsyncGenerator[Delta | Answer]:
    """What is said as it is said, then the whole Answer. Awaiting it submits the question: a refusal (Problem) comes before the first byte.

    A failure on the way is raised as Problem by the iterator; it ends without an Answer where the client is gone.
    """
    loop, said = asyncio.get_running_loop(), asyncio.Queue[Delta | None]()

    def heard(delta: Delta) -> None:
        loop.call_soon_threadsafe(said.put_nowait, delta)

    future = _submit(state, question, request, heard)
    # Done is told by the loop after every delta of the same thread, so the queue's order is what was said.
    future.add_done_callback(lambda _: said.put_nowait(None))

    async def parts() -> AsyncGenerator[Delta | Answer]:
        try:
            yield Delta("", [])  # taken below: one that is closed before it began would not cancel its question
            while True:
                try:
                    delta = await asyncio.wait_for(said.get(), GONE_S)
                except TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if delta is None:
                    break
                yield delta
            yield _result(future)
        finally:
            future.cancel()

    begun = parts()
    await anext(begun)
    return begun


def _submit(state: State, question: Question, request: Request, on_delta: OnDelta | None = None) -> asyncio.Future[Any]:
    """Queue a question of this request's caller. Raises Problem."""
    _within_limit(state, request)
    key = request.state.caller.id
    if state.settings.prefix_cache_per_key:
        question = replace(question, salt=key)
    try:
        submitted: Future[Answer] = _taking(state).submit(question, on_delta)
    except Full as error:
        raise _overloaded(state, error.retry_after_s) from None
    except Yielded as error:
        raise _yielded(error.retry_after_s) from None
    except Closed:
        raise _draining() from None
    future = asyncio.wrap_future(submitted)
    state.asked[key] += 1
    begun = time.perf_counter()
    future.add_done_callback(lambda _: _answered(state, key))
    future.add_done_callback(lambda done: _traced(done, question, begun))
    return future


def _within_limit(state: State, request: Request) -> None:
    most = state.settings.key_questions_max
    if most is not None and state.asked[request.state.caller.id] >= most:
        detail = f"At most {most} questions of one key are taken at once; ask again when one of them is answered."
        raise Problem("too_many_questions", detail, headers={"Retry-After": "1"})


def _overloaded(state: State, wait_s: int) -> Problem:
    state.metrics.refused.inc()
    return Problem("overloaded", "Ask again later.", headers={"Retry-After": str(wait_s)})


def _traced(done: asyncio.Future[Answer], question: Question, begun: float) -> None:
    """Spans of the answer and of what grounded it, in the context of its request."""
    told: dict[str, str | int | float | None] = {"adapter": question.adapter_digest, "grounding": question.grounding}
    if not done.cancelled() and done.exception() is None:
        answer = done.result()
        told |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
        if answer.grounded is not None:
            tracing.past("vqa.grounding", *answer.grounded)
    else:
        told["error"] = "cancelled" if done.cancelled() else type(done.exception()).__name__
    tracing.past("vqa.answer", begun, time.perf_counter(), **told)


def _answered(state: State, key: str) -> None:
    state.asked[key] -= 1
    if not state.asked[key]:
        del state.asked[key]


def _result(future: asyncio.Future[Answer]) -> Answer:
    """The answer, or its failure as Problem."""
    try:
        return future.result()
    except asyncio.CancelledError:
        raise _draining() from None
    except Problem:  # of another server (service/upstream.py)
        raise
    except ConversationError as error:
        said = str(error)
        raise Problem("conversation_refused", f"{said[:1].upper()}{said[1:]}.", param="messages") from None
    except Yielded as error:
        raise _yielded(error.retry_after_s) from None
    except AdapterDamaged:
        raise Problem("artifact_damaged", "The adapter's stored files fail their digest or cannot be loaded.") from None
    except Exception:
        log.exception("the engine failed on a question")  # its type and place only (service/logs.py)
        raise Problem("answer_failed", "Try a shorter question or another image; the log has the request id.") from None
