"""The plain route to an answer, for tests: one prompt, the stock decoding loop of hscr.decode, no batch and no server. Not a test."""

from __future__ import annotations

from typing import Any


def greedy(vlm: Any, images: list[Any], asked: Any, max_tokens: int) -> str:
    from hscr.decode import decode
    from hscr.model import decode_text, encode_prompts

    prompts = encode_prompts(vlm, [images], [asked])
    return decode_text(vlm, decode(vlm, prompts, max_tokens=max_tokens)[0])
