"""Conversations as a chat template writes them: turns in, one prompt's text out, and text that stays text whatever tokens it spells.

Knows nothing of images but their number, and loads no torch. A template that cannot say a conversation refuses it here: many would write it
wrongly without a word (a system text as if it were an earlier answer, two questions in a row with an empty answer between).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

if TYPE_CHECKING:
    from hscr.model import VLM

NO_SYSTEM = "the model's chat template has no system role there; put that text into the question"
MUST_ALTERNATE = "the model's chat template wants questions and answers in turn, beginning with a question"


class ConversationError(ValueError):
    """The model cannot be asked this conversation; the message says why and holds nothing of it."""


@dataclass(frozen=True)
class Turn:
    """One message. The images of all turns are given in order beside the conversation; a turn's own stand before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    n_images: int = 0


Asked = str | tuple[Turn, ...]  # a question, or a conversation that ends with one


def turns_of(asked: Asked, n_images: int) -> tuple[Turn, ...]:
    """A conversation of what was asked about n images; of a plain question one turn with them all.

    Raises ConversationError where it is no conversation: no turn, an answer last, images elsewhere than in questions, or not n of them.
    """
    if isinstance(asked, str):
        return (Turn("user", asked, n_images),)
    if not asked or asked[-1].role != "user":
        raise ConversationError("the last turn must be the user's")
    if any(turn.n_images and turn.role != "user" for turn in asked):
        raise ConversationError("only the user's turns may hold images")
    if (counted := sum(turn.n_images for turn in asked)) != n_images:
        raise ConversationError(f"the turns hold {counted} images, and {n_images} were given")
    return asked


def plain(vlm: VLM, text: str) -> str:
    """Text that spells a special token is broken up and so stays text: an "<image>" in a question adds no image."""
    for token in vlm.special_tokens:
        if token in text:
            text = text.replace(token, token[0] + " " + token[1:])
    return text


def prompt_text(vlm: VLM, asked: Asked, n_images: int) -> str:
    """What the model reads up to where its answer begins, a placeholder an image. Raises ConversationError."""
    turns = tuple(replace(turn, text=plain(vlm, turn.text)) for turn in turns_of(asked, n_images))
    in_turn = all(
        turn.role == ("user", "assistant")[n % 2] for n, turn in enumerate(t for t in turns if t.role != "system")
    )
    try:
        text = templated(vlm, turns)
    except TemplateError:  # a template's own refusal, whose words are not ours to pass on
        raise ConversationError(NO_SYSTEM if in_turn else MUST_ALTERNATE) from None
    if any(turn.role == "system" for turn in turns) and not _has_system_role(vlm, turns):
        raise ConversationError(NO_SYSTEM)
    if not in_turn and _alternates(vlm):
        raise ConversationError(MUST_ALTERNATE)
    return text


def templated(vlm: VLM, turns: Sequence[Turn]) -> str:
    """The processor's chat template over turns as they are, open for an answer after a question. Raises jinja2's TemplateError."""
    messages: list[dict[str, Any]] = [
        {"role": t.role, "content": [*[{"type": "image"}] * t.n_images, {"type": "text", "text": t.text}]}
        for t in turns
    ]
    generate = turns[-1].role == "user"
    return vlm.processor.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)


def _has_system_role(vlm: VLM, turns: tuple[Turn, ...]) -> bool:
    """Whether the template writes system texts, and not as if another had said them."""
    text = templated(vlm, turns)
    if not all(turn.text.strip() in text for turn in turns if turn.role == "system"):
        return False
    roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
    for role in roles:
        with suppress(TemplateError):
            if templated(vlm, [replace(t, role=role) if t.role == "system" else t for t in turns]) == text:
                return False
    return True


def _alternates(vlm: VLM) -> bool:
    """Whether the template opens an answer after each question, so that one without an answer is followed by an empty one."""
    first, second = Turn("user", "first"), Turn("user", "second")
    try:
        return templated(vlm, (first, second)).startswith(templated(vlm, (first,)))
    except TemplateError:
        return True
