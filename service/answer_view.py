"""What is said of an answer: its text, how far the image carries it, and whether it is withheld for that. Knows no route."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from hscr.answers import Answer
from service.adapters import Resolved

UNGROUNDED = "The grounding score is below the threshold of this version."
NO_THRESHOLD = "No threshold is known here, so nothing can be withheld: the base has none, nor a version whose evaluation gave none."


class AdapterRef(BaseModel):
    name: str
    version: int
    digest: str


class Token(BaseModel):
    text: str
    logprob: float
    logprob_without_image: float
    reward: float
    is_content: bool


class Grounding(BaseModel):
    score: float | None = Field(
        description="Reward of the least grounded word in nats: how much likelier the image makes it; below 0 it is said in spite of it."
    )
    flagged: bool | None = Field(description="The score is below the version's threshold; null where it has none.")
    threshold: float | None = Field(
        description="In nats, from the version's evaluation; null for the base and where that carried none."
    )
    tokens: list[Token] | None = Field(description="With `grounding` tokens, and an answer that is not withheld.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int


class AnswerView(BaseModel):
    """One policy's answer."""

    answer: str | None = Field(description="Null where it is withheld.")
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = Field(description="None where the answer is withheld.")
    adapter: AdapterRef | None
    grounding: Grounding | None
    abstained: bool | None = Field(
        None, description="With `abstain`: whether a flagged answer is withheld; null without."
    )
    abstain_note: str | None = Field(None, description="Why it is withheld, or why it could not have been.")
    usage: Usage


def scored(grounding: str, abstain: bool) -> str:
    """What has to be measured: abstaining needs the score, whether or not it was asked for."""
    return "summary" if abstain and grounding == "none" else grounding


def grounding_view(wanted: str, answer: Answer, threshold: float | None) -> Grounding | None:
    """What is told of an answer's grounding; `wanted` is none, summary or tokens."""
    if wanted == "none":
        return None
    tokens = None
    if wanted == "tokens" and answer.tokens is not None:
        tokens = [Token(**{name: getattr(t, name) for name in Token.model_fields}) for t in answer.tokens]
    flagged = answer.score < threshold if threshold is not None and answer.score is not None else None
    return Grounding(score=answer.score, flagged=flagged, threshold=threshold, tokens=tokens)


def answer_view(answer: Answer, resolved: Resolved | None, wanted: str, abstain: bool) -> AnswerView:
    """What may be said: of a withheld answer neither text nor tokens."""
    threshold = resolved.threshold if resolved else None
    grounding = grounding_view(scored(wanted, abstain), answer, threshold)
    withheld = abstain and grounding is not None and grounding.flagged is True
    if withheld and grounding is not None:
        grounding.tokens = None
    note = None
    if abstain:
        note = UNGROUNDED if withheld else NO_THRESHOLD if threshold is None else None
    return AnswerView(
        answer=None if withheld else answer.text,
        finish_reason=answer.finish_reason,
        token_ids=[] if withheld else answer.token_ids,
        adapter=AdapterRef(name=resolved.name, version=resolved.version, digest=resolved.digest) if resolved else None,
        grounding=grounding,
        abstained=withheld if abstain else None,
        abstain_note=note,
        usage=Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens),
    )
