"""How an image is written in a prompt's text, learnt when it is first processed: the next question on it needs no look at its pixels.

A processor puts as many placeholders as the image has visual tokens, with marks of rows and tiles between them, in the place of one; how
many depends on the image's size alone. What is kept of an image is that text and the sizes its positions depend on.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hscr.chat import Asked, prompt_text

if TYPE_CHECKING:
    from hscr.model import VLM

MOST = 10_000


@dataclass(frozen=True)
class _Written:
    placeholder: str
    replacement: str
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
            self._items[key] = _Written(replaced[0]["text"], text, sizes)
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
        text = chat.replace(written.placeholder, written.replacement)
        special = adds_special_tokens(vlm, chat)
        ids = vlm.tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"][0]
        return ids, vlm.family.positions(vlm.base, ids, written.sizes)


def adds_special_tokens(vlm: VLM, chat: str) -> bool:
    """A template that writes the first token itself must not get a second one; stock apply_chat_template does the same."""
    bos = vlm.tokenizer.bos_token
    return bos is None or not chat.startswith(bos)
