"""What is said of an answer: its text, how far the image carries it, and whether it is withheld for that. Knows no route."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from hscr.answers import TOKEN_DROPOUT, Answer
from service.adapters import Resolved

UNGROUNDED = "The grounding score is below the threshold of this version."
NO_THRESHOLD = "No threshold is known here, so nothing can be withheld: {}."
OF_VERSIONS = "a threshold belongs to a version, and the base answered"
OTHER_SCORE = "another server answered, whose score no version's threshold is measured with"


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
        description="In nats, from the version's newest evaluation that has one; null for the base and where none has."
    )
    tokens: list[Token] | None = Field(description="With `grounding` tokens, and an answer that is not withheld.")
    perturbation: str = Field(description="How the image was hidden; thresholds hold for token_dropout only.")
    unavailable: str | None = Field(description="Why there is no score though it was asked for.")


class Usage(BaseModel):
    """By the model server's own count where another answers; 0 where it tells none."""

    prompt_tokens: int
    completion_tokens: int


class AnswerView(BaseModel):
    """One policy's answer."""

    answer: str | None = Field(description="Null where it is withheld.")
    finish_reason: Literal["stop", "length"]
    token_ids: list[int] = Field(description="Empty where the answer is withheld, or a model server tells none.")
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


def answer_view(answer: Answer, resolved: Resolved | None, grounding: str, abstain: bool) -> AnswerView:
    """What may be said: of a withheld answer neither text nor tokens."""
    threshold, missing = _threshold(answer, resolved)
    score = answer.score
    flagged = score < threshold if threshold is not None and score is not None else None
    withheld = abstain and flagged is True
    note = None
    if abstain:
        note = UNGROUNDED if withheld else NO_THRESHOLD.format(missing) if threshold is None else None
    tokens = None
    if grounding == "tokens" and answer.tokens is not None and not withheld:
        tokens = [Token(**{name: getattr(t, name) for name in Token.model_fields}) for t in answer.tokens]
    told = scored(grounding, abstain) != "none"
    return AnswerView(
        answer=None if withheld else answer.text,
        finish_reason=answer.finish_reason,
        token_ids=[] if withheld else answer.token_ids,
        adapter=AdapterRef(name=resolved.name, version=resolved.version, digest=resolved.digest) if resolved else None,
        grounding=Grounding(
            score=score,
            flagged=flagged,
            threshold=threshold,
            tokens=tokens,
            perturbation=answer.perturbation,
            unavailable=answer.unavailable,
        )
        if told
        else None,
        abstained=withheld if abstain else None,
        abstain_note=note,
        usage=Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens),
    )


def _threshold(answer: Answer, resolved: Resolved | None) -> tuple[float | None, str | None]:
    """The threshold that holds for this answer's score, or why none does."""
    if answer.perturbation != TOKEN_DROPOUT:
        return None, OTHER_SCORE
    return (resolved.threshold, resolved.no_threshold) if resolved else (None, OF_VERSIONS)
