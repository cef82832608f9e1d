"""How an image is written in a prompt's text, learnt when it is first processed: the next question on it needs no look at its pixels.

A processor puts as many placeholders as the image has visual tokens, with marks of rows and tiles between them, in the place of one; how
many depends on the image's size alone. What is kept of an image is that text and the sizes its positions depend on. Where the text is the
placeholder again and again, and that is one token whatever stands beside it, the token is repeated rather than the text.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hscr.chat import Asked, prompt_text

if TYPE_CHECKING:
    from hscr.model import VLM

MOST = 10_000


@dataclass(frozen=True)
class _Written:
    placeholder: str
    replacement: str
    repeats: int  # of the placeholder that are the replacement; 0: it is another text
    sizes: dict[str, Tensor]


class ImageTexts:
    """By image digest, least recently used out first. Not thread-safe."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, _Written] = OrderedDict()

    def learn(self, key: str, batch: Any) -> None:
        """From a processed prompt with this image alone (hscr/model.py, `processed`)."""
        (replaced,) = batch["text_replacement_offsets"]
        if len(replaced) == 1:
            sizes = {name: batch[name] for name in ("image_grid_thw",) if name in batch}
            text = sys.intern(replaced[0]["replacement"])  # one for all images of a size
            placeholder = replaced[0]["text"]
            n = len(text) // len(placeholder)
            self._items[key] = _Written(placeholder, text, n if text == placeholder * n else 0, sizes)
            if len(self._items) > MOST:
                self._items.popitem(last=False)

    def prompt(self, vlm: VLM, key: str, asked: Asked) -> tuple[Tensor, Tensor] | None:
        """Ids [T] and positions [T] ([3, T] under M-RoPE) of another question on a known image; None where it is not known."""
        written = self._items.get(key)
        if written is None:
            return None
        self._items.move_to_end(key)
        chat = prompt_text(vlm, asked, 1)
        if chat.count(written.placeholder) != 1:
            return None
        ids = torch.tensor(_ids(vlm, chat, written))
        return ids, vlm.family.positions(vlm.base, ids, written.sizes)


def _ids(vlm: VLM, chat: str, written: _Written) -> list[int]:
    special = adds_special_tokens(vlm, chat)
    if written.repeats and (token := vlm.tokenizer.convert_tokens_to_ids(written.placeholder)) is not None:
        # The tokenizer cuts a text at its added tokens before all else, so what stands around one does not depend on how often it comes.
        ids: list[int] = vlm.tokenizer(chat, add_special_tokens=special)["input_ids"]
        if token in vlm.tokenizer.added_tokens_decoder and ids.count(token) == 1:
            at = ids.index(token)
            return [*ids[:at], *[token] * written.repeats, *ids[at + 1 :]]
    text = chat.replace(written.placeholder, written.replacement)
    ids = vlm.tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def adds_special_tokens(vlm: VLM, chat: str) -> bool:
    """A template that writes the first token itself must not get a second one; stock apply_chat_template does the same."""
    bos = vlm.tokenizer.bos_token
    return bos is None or not chat.startswith(bos)
